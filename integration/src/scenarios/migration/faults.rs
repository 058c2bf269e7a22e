//! Agents that are killed while they take part in a migration, in every phase: before the commit the source and its
//! peers go on as if nothing had happened, after it the destination does. The container runs in one place afterwards,
//! nothing is lost, and the next migration goes through.
//!
//! The kill follows the phase's begin by the time a command takes on a node, so a short phase may be over by then; what
//! is checked holds wherever it falls.

use std::time::Duration;

use anyhow::{Context as _, Result};

use super::settled;
use super::stage::{Pair, Stage};
use crate::lab::agent::killed_and_started;
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $long:literal, $limit:literal, $run:expr) => {
        Scenario { name: $name, long: $long, limit: Duration::from_secs($limit), run: $run }
    };
}

/// Claims about agents that are killed.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "a destination agent killed between the restore and the end: its container runs there and nothing is lost",
        false,
        600,
        |c| killed(c, Victim::Destination, &["commit", "switch", "resume"])
    ),
    claim!("the source's agent killed while a peer is on its host: that peer goes on too", true, 900, beside_its_peer),
    claim!("the source's agent killed in any phase: one copy runs and nothing is lost", true, 1800, |c| {
        killed(c, Victim::Source, ALL)
    }),
    claim!("the destination's agent killed in any phase: one copy runs and nothing is lost", true, 1800, |c| {
        killed(c, Victim::Destination, ALL)
    }),
    claim!("a peer's agent killed in any phase: one copy runs and nothing is lost", true, 1800, |c| {
        killed(c, Victim::Peer, ALL)
    }),
];

/// The phases every migration has.
const ALL: &[&str] = &[
    "negotiate",
    "pre-setup",
    "pre-copy",
    "suspend",
    "wait-before-stop",
    "freeze",
    "dump",
    "converge",
    "transfer",
    "restore",
    "commit",
    "switch",
    "resume",
    "finish",
];

/// Whose agent.
#[derive(Clone, Copy)]
enum Victim {
    Source,
    Destination,
    Peer,
}

fn killed(ctx: &mut Context, victim: Victim, phases: &[&str]) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let (mut at, mut to) = ("src", "dst");
    for phase in phases {
        let node = match victim {
            Victim::Source => at,
            Victim::Destination => to,
            Victim::Peer => "peer",
        };
        let moved = one(&mut stage, &pair, to, phase, node).with_context(|| format!("killed in {phase}"))?;
        stage.ctx.note(format!("{at} → {to}, killed on {node} in {phase}: runs on {}", if moved { to } else { at }));
        if moved {
            (at, to) = (to, at);
        }
    }
    stage.migrate(&pair.client, to).context("a migration that nobody disturbs")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}

/// The peer's second QPs, and its held sends, are in the hands of the very agent that is killed.
fn beside_its_peer(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["src"], &["--qps", "2"])?;
    for phase in ["pre-setup", "suspend", "dump", "commit", "switch", "resume"] {
        let moved = one(&mut stage, &pair, "dst", phase, "src").with_context(|| format!("killed in {phase}"))?;
        stage.ctx.note(format!("killed in {phase}: runs on {}", if moved { "dst" } else { "src" }));
        if moved {
            stage.migrate(&pair.client, "src").context("back")?;
            stage.flow(&pair.client, 200)?;
        }
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

/// One migration during which the agent of `node` is killed; whether the container is at `to` now.
fn one(stage: &mut Stage, pair: &Pair, to: &str, phase: &str, node: &str) -> Result<bool> {
    let running = stage.begin_migration(&pair.client, to, &[])?;
    running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
    stage.ctx.node(node)?.sh(&killed_and_started())?;
    Ok(settled::after(stage, pair, &running, to)? == to)
}
