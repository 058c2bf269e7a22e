//! A source host that stands still in the middle of a migration, as one that has died looks to all others: nobody else
//! decides in its place, unless an administrator says that it is gone. What the destination has restored runs only if the
//! source had decided so, and once the host is back the migration ends one way or the other.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::disk::{refused, succeeds};
use super::settled::{self, ORDER, settled};
use super::stage::{Pair, Stage};
use super::taken_back::{OF_A_DEAD_HOST, rid_of_it};
use crate::lab::standstill::Standstill;
use crate::lab::topology::NodeSpec;
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: true, limit: Duration::from_secs(900), run: $run }
    };
}

/// Claims about sources that are gone for a while.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "a source host that stands still before the commit: what its destination holds does not run, and nothing is lost",
        |c| stands(c, "restore", None)
    ),
    claim!("a source host that stands still after the commit: its container goes on at the destination", |c| {
        stands(c, "switch", Some("dst"))
    }),
    claim!(
        "a source host that dies when all is restored, or after the commit: its destination takes the container over by \
         hand, nothing is lost, and the host that returns ends its copy",
        taken_over
    ),
];

/// Longer than agents wait for a sign of life.
const LONG: Duration = Duration::from_secs(40);

fn stands(ctx: &mut Context, phase: &str, decided: Option<&str>) -> Result<()> {
    let mut dies = Standstill::of(NodeSpec::by_name("src")?)?;
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
    dies.begin()?;
    thread::sleep(LONG);
    if decided.is_none() {
        runs_nowhere(&stage, &pair)?;
    }
    let status = stage.ctx.peer.check(&["migrrdma", "status"])?;
    ensure!(status.contains("its source is silent"), "the peer does not say what it waits for: {status}");
    dies.end()?;
    let place = settled::after(&mut stage, &pair, &running, "dst")?;
    ensure!(decided.is_none_or(|at| at == place), "it had been decided, and the container runs on {place}");
    stage.ctx.note(format!("the source stood still in {phase}: runs on {place}"));
    let to = if place == "dst" { "src" } else { "dst" };
    stage.migrate(&pair.client, to).context("a migration that nobody disturbs")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}

/// The destination says that it waits, and its copy says nothing new.
fn runs_nowhere(stage: &Stage<'_>, pair: &Pair) -> Result<()> {
    let dst = &stage.ctx.dst;
    let status = dst.check(&["migrrdma", "status"])?;
    ensure!(status.contains(&pair.client) && status.contains("waits for"), "dst does not say that it waits: {status}");
    let said = || dst.exec(&["migrrdma", "logs", &pair.client]).map(|out| out.text());
    let before = said()?;
    thread::sleep(Duration::from_secs(4));
    ensure!(said()? == before, "the copy at the destination runs before it was decided: {}", said()?);
    Ok(())
}

/// For a destination to notice that its source is silent.
const HINT: Duration = Duration::from_secs(90);

const SURE: &str = "--source-is-gone";

fn taken_over(ctx: &mut Context) -> Result<()> {
    OF_A_DEAD_HOST.iter().for_each(|counter| ctx.allow_counter(counter));
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    let name = pair.client.as_str();
    for phase in ["commit", "switch"] {
        let mut dies = Standstill::of(NodeSpec::by_name("src")?)?;
        let running = stage.begin_migration(name, "dst", &[])?;
        running.wait_for(&format!("\"enter\",\"phase\":\"{phase}\""), Duration::from_secs(120))?;
        dies.begin()?;
        let hint = format!("migrrdma recover {name}");
        let until = Instant::now() + HINT;
        loop {
            let status = stage.ctx.dst.check(&["migrrdma", "status"])?;
            if status.contains(&hint) {
                break;
            }
            ensure!(Instant::now() < until, "after {HINT:?} the status does not name the command: {status}");
            thread::sleep(Duration::from_secs(2));
        }
        let words = ["does not answer", SURE, "two copies", "Nothing was changed"];
        refused(&stage.ctx.dst, &["migrrdma", "recover", name], &words)?;
        succeeds(&stage.ctx.dst, &["migrrdma", "recover", SURE, name]).with_context(|| format!("dead in {phase}"))?;
        stage.moved(name, "dst")?;
        stage.all_flow(&[name, &pair.server], 300).context("while the source is gone")?;
        dies.end()?;
        // However it ends: its host is told that the container is not its own any more.
        running.wait(ORDER)?;
        rid_of_it(&stage.ctx.src, name)?;
        let place = settled(&stage, name)?;
        ensure!(place == "dst", "it was taken over, and runs on {place}");
        stage.all_flow(&[name, &pair.server], 300).context("after the source came back")?;
        stage.migrate(name, "src").context("back, by a migration that nobody disturbs")?;
        stage.flow(name, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}
