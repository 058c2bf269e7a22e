//! The other hand-over: nothing is made before the container is there, its
//! processes make their RDMA objects again by themselves. For the program
//! inside, and for its peer, that must be no different.

use std::time::Duration;

use anyhow::Result;

use super::perftest;
use super::stage::{CHECKER, Pair, Stage};
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: false, limit: LIMIT, run: $run }
    };
}

/// Claims about rebuilding.
pub const CLAIMS: &[Scenario] = &[
    claim!("a process that makes its one QP again is moved there and back and nothing is lost or repeated", |c| {
        moves(c, &["--qps", "1", "--depth", "16"])
    }),
    claim!("events, a shared receive queue and two contexts are made again there and back", |c| {
        let load = ["--qps", "4", "--events", "--srq", "--contexts", "2", "--pds", "2", "--split-cq", "--two-sge"];
        moves(c, &load)
    }),
    claim!("epoll sets watch the channels that a process made again", |c| {
        moves(c, &["--qps", "4", "--epoll", "--solicited", "--threads-per-qp", "0"])
    }),
    claim!("ib_write_bw's client makes its objects again there and back and both ends run to their normal end", |c| {
        perftest::rebuilt(c)
    }),
    claim!("two processes that make their objects again find each other", |c| alone(c, "pair")),
    claim!("unused QPs in every state are made again in their state", |c| moves(c, &["--qps", "2", "--idle-qps"])),
    claim!("one move hands objects over, the next makes them again, and the other way round", mixed),
];

fn moves(ctx: &mut Context, load: &[&str]) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], load)?;
    for to in ["dst", "src"] {
        stage.migrate_by_rebuild(&pair.client, to)?;
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

fn alone(ctx: &mut Context, role: &str) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let name = "ck-alone";
    let command = [CHECKER, role, "--duration", "0", "--qps", "2", "--progress", "1"];
    stage.run(name, 140, &["src", "dst"], &command)?;
    stage.flow(name, 200)?;
    for to in ["dst", "src"] {
        stage.migrate_by_rebuild(name, to)?;
        stage.flow(name, 200)?;
    }
    stage.terminate(name)?;
    stage.verdict(name)?;
    stage.finish()
}

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
