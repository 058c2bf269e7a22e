//! Signals that become due while a process is being written down.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use super::stage::{Stage, tail};
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: false, limit: Duration::from_secs(300), run: $run }
    };
}

/// Claims about signals.
pub const CLAIMS: &[Scenario] = &[
    claim!("timers that go off while their process is written down go off once after the move", timers),
    claim!("signals that are sent to a process while it is written down arrive once after the move", sent),
];

const NAME: &str = "timers";
const PROGRAM: &str = include_str!("timers.py");
const PROCESSES: u32 = 4;
/// The timers of each.
const TIMERS: [&str; 3] = ["alarms", "queued", "threads"];
/// Long enough for timers of a second, on an emulated node too.
const PATIENCE: Duration = Duration::from_secs(30);

fn begin(stage: &mut Stage) -> Result<()> {
    stage.run(NAME, 150, &["src", "dst"], &["python3", "-c", PROGRAM])?;
    go_on(stage)
}

/// What the last whole line of this process says of `word`.
fn said<'a>(log: &'a str, process: u32, word: &str) -> Option<&'a str> {
    let begin = format!("process={process} ");
    let line = log.rsplit_once('\n')?.0.lines().rfind(|line| line.starts_with(&begin))?;
    line.split(' ').find_map(|part| part.strip_prefix(word)?.strip_prefix('='))
}

/// Waits until every timer has gone off some more times.
fn go_on(stage: &Stage) -> Result<()> {
    let number = |log: &str, (process, word)| said(log, process, word).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let timers = || (0..PROCESSES).flat_map(|process| TIMERS.map(|timer| (process, timer)));
    let before = stage.log(NAME)?;
    let start = Instant::now();
    loop {
        let log = stage.log(NAME)?;
        let still: Vec<_> = timers().filter(|t| number(&log, *t) < number(&before, *t) + 3).collect();
        if still.is_empty() {
            let early = (0..PROCESSES).any(|process| said(&log, process, "early") != Some("0"));
            ensure!(!early, "a timer went off and was still running: {}", tail(&log));
            return Ok(());
        }
        if start.elapsed() > PATIENCE {
            bail!("no more of {still:?} (process, timer) for {PATIENCE:?}; they said:\n{}", tail(&log));
        }
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn timers(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    begin(&mut stage)?;
    for to in ["dst", "src", "dst", "src"] {
        stage.migrate(NAME, to)?;
        go_on(&stage).with_context(|| format!("after the move to {to}"))?;
    }
    end(stage)
}

/// Sends signals to process `$0` as soon as CRIU makes its image: by then it has looked at what is pending. Nothing but the
/// shell's own words, to be quick.
const SEND: &str = "echo ready
while set -- /var/lib/migrrdma/outgoing/*/images/core-1.img; [ ! -e \"$1\" ]; do :; done
kill -USR1 $0; kill -50 $0; echo sent";

fn sent(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    begin(&mut stage)?;
    for (to, all) in [("dst", "10,50"), ("src", "10,50,10,50")] {
        let state = stage.node_of(NAME)?.check(&["migrrdma", "state", NAME])?;
        let pid = serde_json::from_str::<Value>(&state).context("state")?["pid"].to_string();
        let sender = stage.node_of(NAME)?.spawn(&["sh", "-c", SEND, &pid])?;
        sender.wait_for("ready", Duration::from_secs(20))?;
        stage.migrate(NAME, to)?;
        let out = sender.wait(Duration::from_secs(20))?;
        ensure!(out.success() && out.text().contains("sent"), "{}{}", out.text(), out.errors());
        go_on(&stage).with_context(|| format!("after the move to {to}"))?;
        let log = stage.log(NAME)?;
        let told = said(&log, 0, "told").unwrap_or_default();
        ensure!(told == all, "on {to} signals {told:?} have arrived instead of {all:?}");
    }
    end(stage)
}

fn end(stage: Stage) -> Result<()> {
    stage.node_of(NAME)?.check(&["migrrdma", "kill", NAME, "KILL"])?;
    stage.finish()
}
