//! Helpers of a migration that are killed on the way: CRIU at either end, the incubator, the command that asked for it.
//! The agents live on: before the commit they undo it, and say who died.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::hindered::{Hindrance, hindered};
use super::settled::{ORDER, settled};
use super::stage::{Pair, Stage, tail};
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: true, limit: Duration::from_secs(600), run: $run }
    };
}

/// Claims about helpers that are killed.
pub const CLAIMS: &[Scenario] = &[
    claim!("CRIU is killed while it dumps: the source goes on and a later move succeeds", |c| {
        hindered(c, &Hindrance { node: "src", phase: "freeze", begin: CRIU, end: "true", words: &["criu"] })
    }),
    claim!("CRIU is killed while it restores: the source goes on and a later move succeeds", |c| {
        hindered(c, &Hindrance { node: "dst", phase: "transfer", begin: CRIU, end: "true", words: &["criu"] })
    }),
    claim!("the incubator is killed during pre-copy: the source goes on and a later move succeeds", |c| {
        hindered(c, &Hindrance { node: "dst", phase: "pre-copy", begin: INCUBATOR, end: "true", words: &["incubator"] })
    }),
    claim!("the incubator is killed during suspension: the source goes on and a later move succeeds", |c| {
        hindered(c, &Hindrance { node: "dst", phase: "suspend", begin: INCUBATOR, end: "true", words: &["incubator"] })
    }),
    claim!("the command that asked for a move is killed in any phase: one copy runs and nothing is lost", command),
];

/// The next CRIU that runs there.
const CRIU: &str = "for i in $(seq 2000); do pkill -KILL -x criu && exit 0; done; echo no criu was seen; exit 1";
const INCUBATOR: &str = "pkill -KILL -f ' incubator$'";

fn command(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let (mut at, mut to) = ("src", "dst");
    for phase in ["pre-setup", "suspend", "dump", "restore", "switch"] {
        let running = stage.begin_migration(&pair.client, to, &[])?;
        running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
        stage.ctx.node(at)?.sh("pkill -KILL -f '^migrrdma migrate'")?;
        let out = running.wait(ORDER)?;
        ensure!(!out.success(), "the command was not killed:\n{}", tail(&out.text()));
        let place = settled(&stage, &pair.client).with_context(|| format!("killed in {phase}"))?;
        stage.ctx.note(format!("{at} → {to}, the command killed in {phase}: runs on {place}"));
        if place == to {
            stage.moved(&pair.client, to)?;
            (at, to) = (to, at);
        }
        stage.flow(&pair.client, 300).context("the moved end")?;
        stage.flow(&pair.server, 300).context("its peer")?;
    }
    stage.migrate(&pair.client, to).context("a migration that nobody disturbs")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}
