//! Lines between hosts that are cut or slow during a migration. Before the commit it is undone, after it everything goes
//! forward once the line is back; at every moment one copy runs at most.
//!
//! What is cut is what the agents say to each other. RDMA goes on: Soft-RoCE gives wrong data by itself where packets are
//! lost, so a test that cut it would show nothing of ours.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::settled;
use super::stage::{Pair, Stage};
use crate::lab::topology::RDMA_IF;
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: true, limit: Duration::from_secs(1800), run: $run }
    };
}

/// Claims about lines.
pub const CLAIMS: &[Scenario] = &[
    claim!("the line between source and destination is cut for a while in any phase: nothing is lost", |c| {
        cut(c, Line::SourceDestination)
    }),
    claim!("the line between source and peer is cut for a while in any phase: nothing is lost", |c| {
        cut(c, Line::SourcePeer)
    }),
    claim!("the line between destination and peer is cut for a while in any phase: nothing is lost", |c| {
        cut(c, Line::DestinationPeer)
    }),
    claim!("a move over slow lines, there and back, goes through", slow),
];

/// Longer than agents wait for a sign of life.
const LONG: u32 = 35;

const PHASES: &[&str] = &["negotiate", "pre-setup", "suspend", "dump", "restore", "commit", "switch", "finish"];

#[derive(Clone, Copy)]
enum Line {
    SourceDestination,
    SourcePeer,
    DestinationPeer,
}

fn cut(ctx: &mut Context, line: Line) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let (mut at, mut to) = ("src", "dst");
    for phase in PHASES {
        let (one, other) = match line {
            Line::SourceDestination => (at, to),
            Line::SourcePeer => (at, "peer"),
            Line::DestinationPeer => (to, "peer"),
        };
        let place = once(&mut stage, &pair, to, phase, one, other).with_context(|| format!("cut in {phase}"))?;
        stage.ctx.note(format!("{at} → {to}, {one} and {other} apart in {phase}: runs on {place}"));
        if place == to {
            (at, to) = (to, at);
        }
    }
    stage.migrate(&pair.client, to).context("a migration that nobody disturbs")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}

/// One migration during which two nodes are apart for a while; where the container is then.
fn once(stage: &mut Stage, pair: &Pair, to: &str, phase: &str, one: &str, other: &str) -> Result<&'static str> {
    let there = stage.ctx.node(other)?.spec.rdma_ip();
    // A table of its own, which leaves nothing behind.
    let both = format!(
        "nft 'add table ip cut
              add chain ip cut in {{ type filter hook input priority 0; }}
              add chain ip cut out {{ type filter hook output priority 0; }}
              add rule ip cut in ip saddr {there} meta l4proto tcp drop
              add rule ip cut out ip daddr {there} meta l4proto tcp drop' && sleep {LONG}; nft delete table ip cut"
    );
    let running = stage.begin_migration(&pair.client, to, &[])?;
    running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
    stage.ctx.node(one)?.sh(&both)?;
    settled::after(stage, pair, &running, to)
}

/// Every packet is late, and none is lost. The lines are slow before the first one: a queue that is exchanged drops what
/// it holds.
fn slow(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let each = |stage: &Stage, script: &str| {
        ["src", "dst", "peer"].into_iter().try_for_each(|node| stage.ctx.node(node)?.sh(script).map(drop))
    };
    each(&stage, &format!("tc qdisc replace dev {RDMA_IF} root netem delay 15ms limit 100000"))?;
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2", "--timeout", "18"])?;
    for to in ["dst", "src"] {
        stage.migrate(&pair.client, to)?;
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    each(&stage, &format!("tc qdisc del dev {RDMA_IF} root"))?;
    stage.finish()
}
