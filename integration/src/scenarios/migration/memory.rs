//! Registered memory in files: it is at the destination, and registered there, before the pause; and it is the same
//! memory for the program all the time.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::stage::{Pair, Stage};
use crate::lab::node::Node;
use crate::scenario::{Context, Scenario};

const MEMORY: &str = "/run/migrrdma-agent/memory";

/// Moves the client of a pair along `path`; `look` judges what each move says about itself.
fn moves(ctx: &mut Context, path: &[&str], load: &[&str], look: fn(&Value) -> Result<()>) -> Result<()> {
    let mut stage = Stage::new(ctx);
    stage.memory_in_files();
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], load)?;
    for to in path {
        let summary = stage.migrate(&pair.client, to)?;
        look(&summary)?;
        let number = |key: &str| summary[key].as_u64().unwrap_or(0) >> 10;
        stage.ctx.note(format!(
            "registered memory: {} KiB sent, {} KiB of it in the pause",
            number("memory_bytes"),
            number("memory_bytes_in_pause")
        ));
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    let nodes = ["src", "dst", "peer"].map(|n| stage.ctx.node(n).cloned());
    stage.finish()?;
    for node in nodes {
        let left = node?.sh(&format!("find {MEMORY} -type f 2>/dev/null | wc -l"))?;
        ensure!(left.trim() == "0", "{} files of registered memory are left", left.trim());
    }
    Ok(())
}

fn all_early(summary: &Value) -> Result<()> {
    let number = |key: &str| summary[key].as_u64().unwrap_or(0);
    let (moved, early) = (number("mrs_moved"), number("mrs_registered_early"));
    ensure!(moved > 0 && early == moved, "{early} of {moved} MRs were registered before the restore: {summary}");
    ensure!(number("memory_bytes") > 0, "no registered memory was sent ahead: {summary}");
    Ok(())
}

/// Prints memory in use, in KiB: what cannot be dropped or read again from a disk. With an argument the most of it until
/// that file is gone.
const IN_USE: &str = r#"
import os, sys, time
most = 0
while True:
    lines = dict(line.split(':') for line in open('/proc/meminfo'))
    most = max(most, sum(int(lines[key].split()[0]) for key in ('AnonPages', 'Shmem')))
    if len(sys.argv) < 2 or not os.path.exists(sys.argv[1]):
        break
    time.sleep(0.05)
print(most)
"#;

fn in_use(node: &Node) -> Result<u64> {
    node.check(&["python3", "-c", IN_USE])?.trim().parse().context("memory in use")
}

/// At no moment is there more of the container on the destination than all of it and a tenth.
fn peak(ctx: &mut Context, in_files: bool) -> Result<()> {
    const SAMPLING: &str = "/run/lab-sampling";
    let mut stage = Stage::new(ctx);
    if in_files {
        stage.memory_in_files();
    }
    let load = ["--qps", "2", "--registered", "256", "--one-registration", "--rate", "200"];
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &load)?;
    let dst = stage.ctx.dst.clone();
    dst.check(&["touch", SAMPLING])?;
    let before = in_use(&dst)?;
    let sampler = dst.spawn(&["python3", "-c", IN_USE, SAMPLING])?;
    stage.migrate(&pair.client, "dst")?;
    stage.flow(&pair.client, 200)?;
    dst.check(&["rm", SAMPLING])?;
    let most: u64 = sampler.wait(Duration::from_secs(30))?.text().trim().parse().context("the most memory in use")?;
    let after = in_use(&dst)?;
    let (container, peak) = (after.saturating_sub(before), most.saturating_sub(before));
    let percent = peak * 100 / container.max(1);
    stage.ctx.note(format!("container {} MiB, peak {} MiB: {percent} %", container >> 10, peak >> 10));
    ensure!(container >= 256 << 10, "a container of 256 MiB takes {container} KiB");
    ensure!(percent <= 110, "the destination held {percent} % of the container's memory");
    pair.judge(&mut stage)?;
    stage.finish()
}

/// Claims about registered memory.
pub const CLAIMS: &[Scenario] = &[
    Scenario {
        name: "registered memory is sent ahead of the pause, and nothing is registered inside it",
        long: true,
        limit: Duration::from_secs(600),
        run: |c| moves(c, &["dst", "src"], &["--qps", "2", "--depth", "4", "--msg-size", "65536"], all_early),
    },
    Scenario {
        name: "registered memory: ten moves in a row under inbound writes keep every byte",
        long: true,
        limit: Duration::from_secs(900),
        run: |c| {
            let path = ["dst", "src"].repeat(5);
            moves(c, &path, &["--qps", "2", "--mix", "write,write_imm", "--msg-size", "65536"], all_early)
        },
    },
    Scenario {
        name: "the destination never holds more than the container's memory and a tenth, registered in files",
        long: true,
        limit: Duration::from_secs(600),
        run: |c| peak(c, true),
    },
    Scenario {
        name: "the destination never holds more than the container's memory and a tenth, registered as it is",
        long: true,
        limit: Duration::from_secs(600),
        run: |c| peak(c, false),
    },
    Scenario {
        name: "registered memory that is registered and deregistered all the time is moved",
        long: true,
        limit: Duration::from_secs(300),
        run: |c| moves(c, &["dst", "src"], &["--qps", "2", "--msg-size", "65536", "--churn"], |_| Ok(())),
    },
];
