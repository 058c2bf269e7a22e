//! Agents that are killed while they take part in a migration, in every phase: before the commit the source and its
//! peers go on as if nothing had happened, after it the destination does. The container runs in one place afterwards,
//! nothing is lost, and the next migration goes through.
//!
//! The kill follows the phase's begin by the time a command takes on a node, so a short phase may be over by then; what
//! is checked holds wherever it falls.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::stage::{Pair, Stage, tail};
use crate::lab::deploy::AGENT;
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

/// From a fault until everything is in order again.
const ORDER: Duration = Duration::from_secs(150);

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
        let moved = one(&mut stage, &pair, (at, to), phase, node).with_context(|| format!("killed in {phase}"))?;
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

/// One migration during which the agent of `node` is killed; whether the container is at `to` now.
fn one(stage: &mut Stage, pair: &Pair, (at, to): (&str, &str), phase: &str, node: &str) -> Result<bool> {
    let running = stage.begin_migration(&pair.client, to, &[])?;
    running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
    let again = format!("systemctl kill --kill-whom=main --signal=KILL {AGENT}; sleep 0.3; systemctl restart {AGENT}");
    stage.ctx.node(node)?.sh(&again)?;
    let out = running.wait(ORDER)?;
    ensure!(!out.done.timed_out, "the migration did not end by itself:\n{}", tail(&out.text()));
    let place = settled(stage, &pair.client, (at, to)).with_context(|| tail(&(out.text() + &out.errors())))?;
    if out.success() {
        ensure!(place == to, "the migration succeeded, and the container runs on {place}");
    }
    if place == to {
        stage.moved(&pair.client, to)?;
    }
    // Traffic in both directions, for longer than what was held could last.
    stage.flow(&pair.client, 300).context("the moved end")?;
    stage.flow(&pair.server, 300).context("its peer")?;
    Ok(place == to)
}

/// Where the container is once only one host knows it and no host takes part in a migration any more.
fn settled<'n>(stage: &Stage, name: &str, (at, to): (&'n str, &'n str)) -> Result<&'n str> {
    let until = Instant::now() + ORDER;
    loop {
        let here = stage.ctx.node(at)?.exec(&["migrrdma", "state", name])?.success();
        let there = stage.ctx.node(to)?.exec(&["migrrdma", "state", name])?.success();
        let mut busy = Vec::new();
        for node in ["src", "dst", "peer"] {
            let out = stage.ctx.node(node)?.exec(&["migrrdma", "status", "--json"])?;
            if !out.success() || takes_part(&out.text()) {
                busy.push(format!("{node}: {}{}", out.text(), out.errors()));
            }
        }
        match (here, there) {
            (true, false) if busy.is_empty() => return Ok(at),
            (false, true) if busy.is_empty() => return Ok(to),
            _ if Instant::now() < until => std::thread::sleep(Duration::from_millis(500)),
            _ => bail!("not settled after {ORDER:?}: known on {at}: {here}, on {to}: {there}; {}", busy.join("\n")),
        }
    }
}

/// Whether an agent's status names a migration that is not over.
fn takes_part(status: &str) -> bool {
    let Ok(status) = serde_json::from_str::<serde_json::Value>(status) else { return true };
    status["migrations"].as_array().is_none_or(|list| !list.iter().all(|m| m["over"] == true))
}

#[cfg(test)]
mod tests {
    use super::takes_part;

    #[test]
    fn a_host_takes_part_until_all_it_names_is_over() {
        assert!(!takes_part(r#"{"migrations": []}"#) && !takes_part(r#"{"migrations": [{"over": true}]}"#));
        assert!(takes_part(r#"{"migrations": [{"over": true}, {"over": false}]}"#));
        assert!(takes_part("{}") && takes_part(""));
    }
}
