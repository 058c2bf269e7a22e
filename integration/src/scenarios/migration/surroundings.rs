//! What happens around a migration while it runs: disks fill up, an agent falls silent as behind a cut line, a peer
//! stands still, a clock jumps. Before the commit the container goes on where it was, the message says what failed, and
//! once the cause is gone the next migration goes through.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::hindered::{Hindrance, hindered};
use super::stage::{Pair, Stage};
use crate::lab::agent::signalled;
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(600);

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: true, limit: LIMIT, run: $run }
    };
}

/// Claims about the surroundings.
pub const CLAIMS: &[Scenario] = &[
    claim!("a disk that fills up on the destination: the source goes on and a later move succeeds", |c| {
        hindered(c, &Hindrance { node: "dst", phase: "suspend", begin: FILL, end: EMPTY, words: &["no space left"] })
    }),
    claim!("a disk that fills up on the source: it goes on there and a later move succeeds", |c| {
        hindered(c, &Hindrance { node: "src", phase: "suspend", begin: FILL, end: EMPTY, words: &["no space left"] })
    }),
    claim!("a destination that falls silent during the transfer: the source goes on and a later move succeeds", |c| {
        let (begin, end) = (&signalled("STOP"), &signalled("CONT"));
        hindered(c, &Hindrance { node: "dst", phase: "transfer", begin, end, words: &["10.10.0.2"] })
    }),
    claim!("a peer whose agent falls silent during suspension: the source goes on and a later move succeeds", |c| {
        let (begin, end) = (&signalled("STOP"), &signalled("CONT"));
        hindered(c, &Hindrance { node: "peer", phase: "pre-setup", begin, end, words: &["10.10.0.3"] })
    }),
    claim!("a peer that is paused during suspension: the source goes on and a later move succeeds", |c| {
        let (begin, end) = ("migrrdma pause ck-server0", "migrrdma resume ck-server0");
        hindered(c, &Hindrance { node: "peer", phase: "pre-setup", begin, end, words: &["ck-server0"] })
    }),
    claim!("a process at the other end that is stopped: the source goes on and a later move succeeds", |c| {
        let (begin, end) = ("migrrdma kill ck-server0 STOP", "migrrdma kill ck-server0 CONT");
        hindered(c, &Hindrance { node: "peer", phase: "pre-setup", begin, end, words: &["ck-server0"] })
    }),
    claim!("clocks that jump on all hosts during a move disturb nothing", clocks),
];

/// Leaves no byte on the disk of the images, and none of what is kept back for root. Nearly all of it is reserved, not
/// written: that would take longer than a migration.
const FILL: &str = "fallocate -l $(( ($(stat -f -c %f /var/lib) - 256) * $(stat -f -c %S /var/lib) )) /var/lib/full; \
                    dd if=/dev/zero of=/var/lib/full bs=4096 oflag=append conv=notrunc 2>/dev/null; true";
const EMPTY: &str = "rm -f /var/lib/full";

fn clocks(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    for (phase, to, jump) in [("suspend", "dst", "+2 hours"), ("dump", "src", "-2 hours")] {
        let running = stage.begin_migration(&pair.client, to, &[])?;
        running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
        for node in ["src", "dst", "peer"] {
            stage.ctx.node(node)?.sh(&format!("date --set '{jump}' >/dev/null"))?;
        }
        let out = running.wait(Duration::from_secs(120))?;
        ensure!(out.success(), "clocks went {jump} in {phase}: {}", out.errors());
        stage.moved(&pair.client, to)?;
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}
