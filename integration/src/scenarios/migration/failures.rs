//! A migration that fails before its commit leaves everything as it was: the
//! container runs on at the source, its peer notices nothing, the message says
//! what failed where, and a later migration succeeds.

use std::time::Duration;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use super::stage::{Pair, Stage, json_lines};
use super::undone::{later, undone};
use crate::lab::agent::{AGENT, answering};
use crate::lab::bundle::BUNDLES;
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(400);

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: false, limit: LIMIT, run: $run }
    };
}

/// Claims about failures.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "a destination agent killed during the transfer: the source goes on and a later move succeeds",
        agent_killed
    ),
    claim!("a restore that fails on the destination: the source goes on and a later move succeeds", |c| {
        restore_fails(c, &["--qps", "4"])
    }),
    Scenario {
        name: "asynchronous events that were not read are read after a move that was undone and one that was not, once",
        long: true,
        limit: LIMIT,
        run: |c| restore_fails(c, &["--qps", "2", "--async-events", "--idle-qps"]),
    },
    claim!("a peer whose agent cannot be reached: the move is refused and names it", peer_unreachable),
    claim!("a receiver that posts no RECV: wait-before-stop gives up in time and the source goes on", never_drains),
    claim!("Ctrl-C during a move: the source goes on and a later move succeeds", interrupted),
    claim!("a dry run says that a move is possible and changes nothing", dry_run),
];

fn pair<'a>(ctx: &'a mut Context, load: &[&str]) -> Result<(Stage<'a>, Pair)> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], load)?;
    Ok((stage, pair))
}

fn enter(phase: &str) -> String {
    format!("\"enter\",\"phase\":\"{phase}\"")
}

fn agent_killed(ctx: &mut Context) -> Result<()> {
    let (stage, pair) = pair(ctx, &["--qps", "4"])?;
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for(&enter("transfer"), Duration::from_secs(120))?;
    stage.ctx.dst.check(&["systemctl", "kill", "--signal=KILL", AGENT])?;
    let out = running.wait(Duration::from_secs(120))?;
    undone(&stage, &pair, &out, &["undone", "10.10.0.2"])?;
    stage.ctx.dst.check(&["systemctl", "restart", AGENT])?;
    answering(&stage.ctx.dst)?;
    later(stage, &pair)
}

fn restore_fails(ctx: &mut Context, load: &[&str]) -> Result<()> {
    let (stage, pair) = pair(ctx, load)?;
    let program = format!("{BUNDLES}/{}/rootfs{}", pair.client, super::stage::CHECKER);
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for(&enter("suspend"), Duration::from_secs(120))?;
    // The restored process maps its program from here.
    stage.ctx.dst.check(&["mv", &program, &format!("{program}.away")])?;
    let out = running.wait(Duration::from_secs(120))?;
    stage.ctx.dst.check(&["mv", &format!("{program}.away"), &program])?;
    undone(&stage, &pair, &out, &["undone", "restore"])?;
    later(stage, &pair)
}

fn peer_unreachable(ctx: &mut Context) -> Result<()> {
    let (stage, pair) = pair(ctx, &["--qps", "2"])?;
    stage.ctx.peer.check(&["systemctl", "stop", AGENT])?;
    let out = stage.try_migrate(&pair.client, "dst", &[])?;
    undone(&stage, &pair, &out, &["10.10.0.3"])?;
    stage.ctx.peer.check(&["systemctl", "start", AGENT])?;
    answering(&stage.ctx.peer)?;
    later(stage, &pair)
}

fn never_drains(ctx: &mut Context) -> Result<()> {
    for counter in ["out_of_seq_request", "rcvd_seq_err"] {
        ctx.allow_counter(counter);
    }
    let load = ["--qps", "2", "--starve", "60", "--mix", "send,write,send_imm,read"];
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &load)?;
    // The server stops posting RECVs three seconds after its start.
    std::thread::sleep(Duration::from_secs(5));
    let out = stage.try_migrate(&pair.client, "dst", &["--drain-timeout", "5"])?;
    undone(&stage, &pair, &out, &["undone", "wait-before-stop", "in flight"])?;
    // It is hungry for a while yet; nothing could be drained before it posts RECVs again.
    let sent = |text: &str| json_lines(text).filter(|v| v["event"] == "progress").last()?["sent"].as_u64();
    let before = sent(&stage.log(&pair.client)?).unwrap_or(0);
    stage.wait_log(&pair.client, "end of the hunger", |text| sent(text).is_some_and(|n| n > before + 200))?;
    later(stage, &pair)
}

fn interrupted(ctx: &mut Context) -> Result<()> {
    let (stage, pair) = pair(ctx, &["--qps", "4"])?;
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for(&enter("suspend"), Duration::from_secs(120))?;
    running.signal(Signal::SIGINT)?;
    let out = running.wait(Duration::from_secs(120))?;
    undone(&stage, &pair, &out, &["undone"])?;
    later(stage, &pair)
}

fn dry_run(ctx: &mut Context) -> Result<()> {
    let (stage, pair) = pair(ctx, &["--qps", "2"])?;
    let out = stage.try_migrate(&pair.client, "dst", &["--dry-run"])?;
    ensure!(out.success(), "{}{}", out.text(), out.errors());
    stage.flow(&pair.client, 200)?;
    later(stage, &pair)
}
