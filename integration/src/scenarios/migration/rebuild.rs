//! The other hand-over: nothing is made before the container is there, its
//! processes make their RDMA objects again by themselves. For the program
//! inside, and for its peer, that must be no different.

use std::time::Duration;

use anyhow::Result;

use super::perftest;
use super::stage::{Pair, Stage, alone_moves, by_rebuild, client_moves};
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);

macro_rules! claim {
    ($name:literal, $long:literal, $run:expr) => {
        Scenario { name: $name, long: $long, limit: LIMIT, run: $run }
    };
}

/// Claims about rebuilding.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "a process that makes its one QP again is moved there and back and nothing is lost or repeated",
        false,
        |c| { client_moves(c, &["dst", "src"], &["--qps", "1", "--depth", "16"], by_rebuild) }
    ),
    claim!("events, a shared receive queue and two contexts are made again there and back", false, |c| {
        let load = ["--qps", "4", "--events", "--srq", "--contexts", "2", "--pds", "2", "--split-cq", "--two-sge"];
        client_moves(c, &["dst", "src"], &load, by_rebuild)
    }),
    claim!("epoll sets watch the channels that a process made again", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "4", "--epoll", "--solicited", "--threads-per-qp", "0"], by_rebuild)
    }),
    claim!(
        "ib_write_bw's client makes its objects again there and back and both ends run to their normal end",
        true,
        |c| { perftest::rebuilt(c) }
    ),
    claim!("two processes that make their objects again find each other", false, |c| alone_moves(
        c, "pair", by_rebuild
    )),
    claim!("unused QPs in every state are made again in their state", true, |c| client_moves(
        c,
        &["dst", "src"],
        &["--qps", "2", "--idle-qps"],
        by_rebuild
    )),
    claim!("asynchronous events that were not read before objects are made again are read after it, once", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "2", "--async-events", "--idle-qps"], by_rebuild)
    }),
    claim!("one move hands objects over, the next makes them again, and the other way round", true, mixed),
];

fn mixed(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4", "--events"])?;
    stage.migrate(&pair.client, "dst")?;
    stage.flow(&pair.client, 200)?;
    stage.migrate_by_rebuild(&pair.client, "src")?;
    stage.flow(&pair.client, 200)?;
    stage.migrate(&pair.client, "dst")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}
