//! Where the two ends of a connection are before and after a move.

use std::time::Duration;

use anyhow::Result;

use super::stage::{Pair, Stage, alone_moves, plainly};
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);

/// Claims about places.
pub const CLAIMS: &[Scenario] = &[
    Scenario {
        name: "the peer moves and then the first one, so that both ends have moved",
        long: false,
        limit: LIMIT,
        run: both_move,
    },
    Scenario {
        name: "two containers of one host are separated by a move and brought together again",
        long: false,
        limit: LIMIT,
        run: same_host,
    },
    Scenario {
        name: "two processes of one container that are connected to each other move together",
        long: false,
        limit: LIMIT,
        run: |c| alone_moves(c, "pair", plainly),
    },
    Scenario {
        name: "a process that is connected to itself moves",
        long: false,
        limit: LIMIT,
        run: |c| alone_moves(c, "loopback", plainly),
    },
    Scenario {
        name: "a moved container's connection survives the reuse of its QP numbers on the old host",
        long: true,
        limit: LIMIT,
        run: numbers_reused,
    },
];

fn both_move(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "peer"], &["peer", "dst"], &["--qps", "4"])?;
    stage.migrate(&pair.server, "dst")?;
    stage.flow(&pair.client, 200)?;
    stage.migrate(&pair.client, "peer")?;
    stage.flow(&pair.client, 200)?;
    stage.migrate(&pair.server, "peer")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}

fn same_host(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["src"], &["--qps", "4"])?;
    for to in ["dst", "src"] {
        stage.migrate(&pair.client, to)?;
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

/// After the first client left src, a second one there gets the QP numbers the first one still shows to its peer.
fn numbers_reused(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let first = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    stage.migrate(&first.client, "dst")?;
    let second = Pair::start(&mut stage, 1, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    stage.flow(&first.client, 200)?;
    stage.migrate(&second.client, "dst")?;
    stage.flow(&second.client, 200)?;
    stage.migrate(&first.client, "src")?;
    stage.flow(&first.client, 200)?;
    first.judge(&mut stage)?;
    second.judge(&mut stage)?;
    stage.finish()
}
