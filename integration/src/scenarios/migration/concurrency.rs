//! Migrations that meet each other, and processes that come and go while one is under way. Where only one migration
//! can go first the other says *busy* and tries again, so that in the end all are where they were asked to be.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::stage::{CHECKER, Pair, Stage, json_lines, tail};
use crate::lab::node::Output;
use crate::scenario::{Context, Scenario};

/// Longest time for migrations that wait for each other.
const TOGETHER: Duration = Duration::from_secs(180);

macro_rules! claim {
    ($name:literal, $long:literal, $limit:literal, $run:expr) => {
        Scenario { name: $name, long: $long, limit: Duration::from_secs($limit), run: $run }
    };
}

/// Claims about what happens at the same time.
pub const CLAIMS: &[Scenario] = &[
    claim!("both ends of a connection are asked to move at the same moment, and both do", false, 400, both_ends),
    claim!("two containers move to the same host at the same moment", true, 400, same_destination),
    claim!("three containers in a ring move at the same moment", true, 600, ring),
    claim!("a peer that starts to move in any phase of ours: both moves succeed", true, 1200, in_any_phase),
    claim!("a peer process that is killed in any phase of a move disturbs nobody else", true, 1200, peer_dies),
];

/// Runs several migrations at once; all must succeed.
fn at_once(stage: &mut Stage, moves: &[(&str, &str)]) -> Result<()> {
    let running = moves.iter().map(|(name, to)| stage.begin_migration(name, to, &[])).collect::<Result<Vec<_>>>()?;
    let ended = running.into_iter().map(|r| r.wait(TOGETHER)).collect::<Result<Vec<_>>>()?;
    for ((name, to), out) in moves.iter().zip(&ended) {
        succeeded(name, to, out)?;
    }
    for ((name, to), out) in moves.iter().zip(&ended) {
        stage.moved(name, to)?;
        stage.ctx.note(format!("{name} → {to}: {}", waited(out)));
    }
    Ok(())
}

fn succeeded(name: &str, to: &str, out: &Output) -> Result<()> {
    ensure!(!out.done.timed_out, "{name} → {to} did not end by itself:\n{}", tail(&out.text()));
    ensure!(out.success(), "{name} → {to}: {}\n{}", out.errors(), tail(&out.text()));
    Ok(())
}

/// How often a migration had to try again.
fn waited(out: &Output) -> String {
    let notes = json_lines(&out.text()).filter(|v| v["event"] == "note").collect::<Vec<_>>();
    let again = notes.iter().filter(|v| v["text"].as_str().is_some_and(|t| t.contains("trying again"))).count();
    if again == 0 { "at the first try".into() } else { format!("tried again {again} times") }
}

fn both_ends(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer", "src"], &["--qps", "4"])?;
    for (client, server) in [("dst", "src"), ("src", "peer")] {
        at_once(&mut stage, &[(&pair.client, client), (&pair.server, server)])?;
        stage.flow(&pair.client, 300)?;
        stage.flow(&pair.server, 300)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

fn same_destination(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let first = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let second = Pair::start(&mut stage, 1, &["peer", "dst"], &["src"], &["--qps", "2"])?;
    at_once(&mut stage, &[(&first.client, "dst"), (&second.client, "dst")])?;
    for pair in [&first, &second] {
        stage.flow(&pair.client, 300)?;
        stage.flow(&pair.server, 300)?;
    }
    at_once(&mut stage, &[(&first.client, "src"), (&second.client, "peer")])?;
    for pair in [first, second] {
        stage.flow(&pair.client, 300)?;
        pair.judge(&mut stage)?;
    }
    stage.finish()
}

/// One container of a ring: a server for the one before it, a client of the one behind it. Only the client tells its
/// progress. SIGTERM ends the client, which takes leave of its server.
fn link_of_ring(next: &str) -> String {
    format!(
        "trap 'kill -TERM $c' TERM; \
         {CHECKER} server --progress 0 & s=$!; \
         until [ -e /dev/shm/go ]; do sleep 0.2; done; \
         {CHECKER} client --connect {next} --duration 0 --qps 2 --progress 1 & c=$!; \
         wait $c; a=$?; if [ $a -gt 128 ]; then wait $c; a=$?; fi; \
         wait $s; exit $((a + $?))"
    )
}

fn ring(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let names = ["ring-a", "ring-b", "ring-c"];
    let homes = [["src", "dst"], ["dst", "peer"], ["peer", "src"]];
    for (i, name) in names.iter().enumerate() {
        let next = format!("10.20.0.{}", 170 + (i + 1) % 3);
        stage.run(name, 170 + u8::try_from(i)?, &homes[i], &["sh", "-c", &link_of_ring(&next)])?;
    }
    for name in names {
        stage.wait_log(name, "listening", |t| t.contains("listening"))?;
    }
    for name in names {
        stage.node_of(name)?.check(&["migrrdma", "exec", name, "touch", "/dev/shm/go"])?;
    }
    for name in names {
        stage.flow(name, 100)?;
    }
    for turn in [1, 0] {
        let moves: Vec<_> = names.iter().zip(&homes).map(|(name, homes)| (*name, homes[turn])).collect();
        at_once(&mut stage, &moves)?;
        for name in names {
            stage.flow(name, 200)?;
        }
    }
    for name in names {
        stage.terminate(name)?;
    }
    for name in names {
        let said = stage.ended(name)?;
        let results = json_lines(&said).filter(|v| v["event"] == "result").collect::<Vec<_>>();
        ensure!(results.len() == 2, "{name} has {} results instead of two:\n{}", results.len(), tail(&said));
        for r in results {
            ensure!(r["ok"] == true && r["ops"].as_u64() > Some(0), "{name} found: {r}");
        }
    }
    stage.finish()
}

/// The phases in which a peer can do something of its own.
const PHASES: &[&str] =
    &["pre-setup", "pre-copy", "suspend", "wait-before-stop", "freeze", "transfer", "restore", "switch", "finish"];

fn enter(phase: &str) -> String {
    format!("\"enter\",\"phase\":\"{phase}\"")
}

fn in_any_phase(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer", "src"], &["--qps", "2"])?;
    let (mut to, mut other) = (["dst", "src"], ["src", "peer"]);
    for phase in PHASES {
        let ours = stage.begin_migration(&pair.client, to[0], &[])?;
        ours.wait_for(&enter(phase), Duration::from_secs(120)).with_context(|| format!("ours in {phase}"))?;
        let theirs = stage.begin_migration(&pair.server, other[0], &[])?;
        let (ours, theirs) = (ours.wait(TOGETHER)?, theirs.wait(TOGETHER)?);
        succeeded(&pair.client, to[0], &ours).with_context(|| format!("the peer began in {phase}"))?;
        succeeded(&pair.server, other[0], &theirs).with_context(|| format!("it began in {phase}"))?;
        stage.moved(&pair.client, to[0])?;
        stage.moved(&pair.server, other[0])?;
        stage.ctx.note(format!("in {phase}: ours {}, the peer's {}", waited(&ours), waited(&theirs)));
        stage.flow(&pair.client, 300)?;
        stage.flow(&pair.server, 300)?;
        to.reverse();
        other.reverse();
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

/// The moved container has a second process; the one that this one is connected to is killed on the way. The first
/// connection must not notice, and the move goes on without the dead one, if need be after another look round.
fn peer_dies(ctx: &mut Context) -> Result<()> {
    for counter in ["retry_exceeded_err", "out_of_seq_request", "rcvd_seq_err"] {
        ctx.allow_counter(counter);
    }
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let (mut at, mut to) = ("src", "dst");
    for (n, phase) in (0u8..).zip(PHASES) {
        let victim = format!("ck-victim{n}");
        stage.run(&victim, 160 + n, &["peer"], &[CHECKER, "server", "--progress", "1"])?;
        stage.wait_log(&victim, "listening", |t| t.contains("listening"))?;
        let second = format!(
            "exec {CHECKER} client --connect 10.20.0.{} --duration 0 --qps 2 --timeout 14 >/dev/null 2>&1",
            160 + n
        );
        stage.node_of(&pair.client)?.check(&["migrrdma", "exec", "--detach", &pair.client, "sh", "-c", &second])?;
        stage.flow(&victim, 100)?;
        let running = stage.begin_migration(&pair.client, to, &[])?;
        running.wait_for(&enter(phase), Duration::from_secs(120)).with_context(|| format!("in {phase}"))?;
        stage.node_of(&victim)?.check(&["migrrdma", "kill", &victim, "KILL"])?;
        let out = running.wait(TOGETHER)?;
        succeeded(&pair.client, to, &out).with_context(|| format!("killed in {phase}"))?;
        stage.moved(&pair.client, to)?;
        stage.ctx.note(format!("killed in {phase}: {}", waited(&out)));
        (at, to) = (to, at);
        stage.flow(&pair.client, 300).with_context(|| format!("killed in {phase}"))?;
        stage.flow(&pair.server, 300)?;
        // The process that lost its peer sees what it sees without a move, and ends.
        let node = stage.node_of(&pair.client)?;
        // A container's first process that waits for no child leaves a dead one behind.
        let left = "for i in $(seq 100); do \
                    [ $(ps -C rdma-checker -o stat= | grep -vc Z) = 1 ] && exit 0; sleep 0.3; done; exit 1";
        node.sh(left).with_context(|| format!("killed in {phase}: the process that lost its peer does not end"))?;
    }
    stage.migrate(&pair.client, to).with_context(|| format!("the last one, from {at}"))?;
    pair.judge(&mut stage)?;
    stage.finish()
}
