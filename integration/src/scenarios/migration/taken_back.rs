//! A destination host that dies, or seems to, after the commit: the container comes back on the source by hand, from
//! the image that is kept there until the end. When the host returns, nothing of the container stays on it.
//!
//! The host stands still as a whole machine, from the moment the commit begins. It may have heard of the decision by
//! then or not, may let the tasks run or not: what is checked holds either way.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::disk::{refused, succeeds};
use super::settled::{self, settled};
use super::stage::{CHECKER, Pair, Stage, tail};
use crate::lab::agent::{AGENT, ANSWERS, signalled};
use crate::lab::bundle::BUNDLES;
use crate::lab::node::{Node, Running};
use crate::lab::standstill::Standstill;
use crate::lab::topology::NodeSpec;
use crate::lab::wire::Exec;
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: true, limit: Duration::from_secs(900), run: $run }
    };
}

/// Claims about containers that are taken back.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "a destination host that dies after the commit: the container comes back on the source by hand, and the \
         host that returns ends its copy",
        |c| alone(c, &["loopback"], false)
    ),
    claim!("a container whose destination host died comes back with its registered memory in files", |c| {
        alone(c, &["loopback", "--msg-size", "65536"], true)
    }),
    claim!(
        "a destination host that dies after the commit: peers of the container that comes back see a dead host",
        peers
    ),
    claim!(
        "a destination that was only cut off ends its copy when it hears that the container was taken back",
        cut_off
    ),
    claim!("a container is not taken back while anybody reaches its destination, and the migration goes on", reached),
    claim!(
        "a destination that was restarted says itself that it has lost the container; a restore of it that fails is \
         tried again",
        restarted
    ),
];

/// Longer than agents wait for a sign of life; status names the command by then.
const LONG: Duration = Duration::from_secs(26);

/// From a host's return until nothing of the container is on it.
const RETURN: Duration = Duration::from_secs(90);

const SURE: &str = "--destination-is-gone";

/// Runs `migrrdma recover`, for as long as that may take.
fn recover(stage: &Stage<'_>, name: &str) -> Result<()> {
    succeeds(&stage.ctx.src, &["migrrdma", "recover", SURE, name]).context("the container was not taken back")
}

/// Nothing of the container is on the node, and its agent is not in the middle of anything.
pub fn rid_of_it(node: &Node, name: &str) -> Result<()> {
    let until = Instant::now() + RETURN;
    loop {
        let known = node.exec(&["migrrdma", "state", name])?.success();
        let status = node.exec(&["migrrdma", "status", "--json"])?;
        let arrives = node.sh("ls /var/lib/migrrdma/incoming 2>/dev/null || true")?;
        if !known && status.success() && !settled::takes_part(&status.text()) && arrives.trim().is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("after {RETURN:?} {} still has {name}: {}{arrives}", node.name(), status.text());
        }
        thread::sleep(Duration::from_millis(500));
    }
}

/// The source waits in vain, says what can be done about it, and explains the risk before anything is done.
fn told_what_to_do(stage: &Stage<'_>, name: &str) -> Result<()> {
    thread::sleep(LONG);
    let before = stage.ctx.src.check(&["migrrdma", "status"])?;
    ensure!(before.contains(&format!("migrrdma recover {name}")), "the status does not name the command: {before}");
    let words = ["does not answer", SURE, "two copies", "Nothing was changed"];
    refused(&stage.ctx.src, &["migrrdma", "recover", name], &words)?;
    let after = stage.ctx.src.check(&["migrrdma", "status"])?;
    // Those of earlier scenarios are remembered.
    let taken_back = |status: &str| status.matches("taken back").count();
    ensure!(taken_back(&after) == taken_back(&before), "an explanation took the container back: {after}");
    Ok(())
}

/// The command that moved it has ended, and says what became of it.
fn given_up(running: &Running) -> Result<()> {
    let out = running.wait(Duration::from_secs(60))?;
    let said = out.errors();
    ensure!(!out.success(), "the migration went through, its destination died too late:\n{}", tail(&out.text()));
    ensure!(said.contains("takes the container back"), "the migration was not given up: {said}");
    Ok(())
}

/// A process that is connected to itself has nobody who could see it break: nothing of it may be lost.
fn alone(ctx: &mut Context, load: &[&str], memory_in_files: bool) -> Result<()> {
    let mut dies = Standstill::of(NodeSpec::by_name("dst")?)?;
    let mut stage = Stage::new(ctx);
    if memory_in_files {
        stage.memory_in_files();
    }
    let name = "ck-alone";
    let mut command = vec![CHECKER];
    command.extend(load);
    command.extend(["--duration", "0", "--qps", "8", "--progress", "1"]);
    stage.run(name, 140, &["src", "dst"], &command)?;
    stage.flow(name, 200)?;
    let running = stage.begin_migration(name, "dst", &[])?;
    running.wait_for("\"enter\",\"phase\":\"commit\"", Duration::from_secs(120))?;
    dies.begin()?;
    told_what_to_do(&stage, name)?;
    recover(&stage, name)?;
    given_up(&running)?;
    for _ in 0..2 {
        stage.flow(name, 300).context("the container that came back")?;
    }
    let kept = stage.ctx.src.sh("ls /var/lib/migrrdma/outgoing")?;
    ensure!(kept.trim().is_empty(), "the image stays after it was used: {kept}");
    dies.end()?;
    rid_of_it(&stage.ctx.dst, name)?;
    stage.flow(name, 300).context("after the other host came back")?;
    ensure!(settled(&stage, name)? == "src", "the copy that was taken back is not the one that stayed");
    // It is a container like any other.
    stage.migrate(name, "dst").context("a later migration")?;
    stage.flow(name, 200)?;
    stage.terminate(name)?;
    stage.verdict(name)?;
    stage.finish()
}

/// What a dead host's peers count: retries that ran out, and what went missing before.
pub const OF_A_DEAD_HOST: &[&str] =
    &["retry_exceeded_err", "retry_rnr_exceeded_err", "send_err", "out_of_seq_request", "rcvd_seq_err"];

fn peers(ctx: &mut Context) -> Result<()> {
    OF_A_DEAD_HOST.iter().for_each(|counter| ctx.allow_counter(counter));
    let mut dies = Standstill::of(NodeSpec::by_name("dst")?)?;
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for("\"enter\",\"phase\":\"commit\"", Duration::from_secs(120))?;
    dies.begin()?;
    told_what_to_do(&stage, &pair.client)?;
    recover(&stage, &pair.client)?;
    given_up(&running)?;
    // It sees that its connections are broken, and so does the other end, which nobody holds any more.
    for (node, name) in [(&stage.ctx.src, &pair.client), (&stage.ctx.peer, &pair.server)] {
        let argv = ["migrrdma", "wait", "--timeout", "120", name].map(str::to_owned).to_vec();
        let out = node.run(Exec { argv, timeout_ms: Some(130_000), ..Exec::default() })?;
        ensure!(!out.errors().contains("still runs"), "{name} does not notice that its connections are broken");
    }
    let said = stage.ctx.src.check(&["migrrdma", "logs", &pair.client])?.to_lowercase();
    ensure!(said.contains("flush"), "the container that came back saw no flushed work: {}", tail(&said));
    let status = stage.ctx.peer.check(&["migrrdma", "status", "--json"])?;
    ensure!(!settled::takes_part(&status), "the peer still waits: {status}");
    dies.end()?;
    rid_of_it(&stage.ctx.dst, &pair.client)?;
    stage.finish()
}

/// Agents of other hosts are cut off from this node; RDMA and its containers' network are not.
fn cut(node: &Node, others: &[&str]) -> Result<()> {
    let mut script = "add table ip cut
        add chain ip cut in { type filter hook input priority 0; }
        add chain ip cut out { type filter hook output priority 0; }"
        .to_owned();
    for other in others {
        let there = NodeSpec::by_name(other)?.rdma_ip();
        script += &format!(
            "\nadd rule ip cut in ip saddr {there} meta l4proto tcp drop
             add rule ip cut out ip daddr {there} meta l4proto tcp drop"
        );
    }
    node.sh(&format!("nft '{script}'")).map(drop)
}

fn mend(node: &Node) -> Result<()> {
    node.sh("nft delete table ip cut").map(drop)
}

/// Starts a container that is connected to itself, and moves it as far as its commit.
fn loopback_commits(stage: &mut Stage<'_>, name: &str) -> Result<Running> {
    let command = [CHECKER, "loopback", "--duration", "0", "--qps", "16", "--progress", "1"];
    stage.run(name, 140, &["src", "dst"], &command)?;
    stage.flow(name, 200)?;
    let running = stage.begin_migration(name, "dst", &[])?;
    running.wait_for("\"enter\",\"phase\":\"commit\"", Duration::from_secs(120))?;
    Ok(running)
}

fn cut_off(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let name = "ck-alone";
    let running = loopback_commits(&mut stage, name)?;
    cut(&stage.ctx.dst, &["src", "peer"])?;
    told_what_to_do(&stage, name)?;
    recover(&stage, name)?;
    given_up(&running)?;
    stage.flow(name, 300).context("the container that came back")?;
    // What the administrator was warned of.
    let other = stage.ctx.dst.exec(&["migrrdma", "status", "--json"])?;
    ensure!(other.text().contains(name), "there was no second copy to be ended: {}", other.text());
    let two = other.text().contains("\"running");
    stage.ctx.note(format!("the copy that was cut off {}", if two { "ran" } else { "waited for its decision" }));
    mend(&stage.ctx.dst)?;
    rid_of_it(&stage.ctx.dst, name)?;
    stage.flow(name, 300).context("after the line was mended")?;
    ensure!(settled(&stage, name)? == "src", "the copy that was taken back is not the one that stayed");
    stage.terminate(name)?;
    stage.verdict(name)?;
    stage.finish()
}

fn reached(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let recover = ["migrrdma", "recover", SURE, &pair.client];
    refused(&stage.ctx.src, &recover, &["no migration of it"])?;
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for("\"enter\",\"phase\":\"commit\"", Duration::from_secs(120))?;
    cut(&stage.ctx.src, &["dst"])?;
    let result = refused(&stage.ctx.src, &recover, &["10.10.0.2", "10.10.0.3", "not gone"]);
    mend(&stage.ctx.src)?;
    result?;
    let place = settled::after(&mut stage, &pair, &running, "dst")?;
    ensure!(place == "dst", "the container runs on {place} although it had been decided");
    pair.judge(&mut stage)?;
    stage.finish()
}

/// What a restart leaves of a host: its disks. Restored tasks may hang on mounts of their runtime's, which end with them,
/// and notes that do not outlive a start of the kernel are of another one.
fn restart() -> String {
    format!(
        r#"{}; systemctl stop {AGENT}
    pkill -KILL -f '^/proc/self/exe (monitor|incubator)'; pkill -KILL -x migrrdma; pkill -KILL -x criu
    pkill -KILL -x rdma-checker; sleep 0.5
    grep -o ' /run/migrrdma/[^ ]*' /proc/self/mounts | tac | xargs -r -n1 umount -l
    rm -rf --one-file-system /run/migrrdma
    sed -i 's/"boot": *"[^"]*"/"boot":"before"/' /var/lib/migrrdma/incoming/*/prepared.json 2>/dev/null
    systemctl start {AGENT}; {ANSWERS}"#,
        signalled("KILL")
    )
}

fn restarted(ctx: &mut Context) -> Result<()> {
    let mut dies = Standstill::of(NodeSpec::by_name("dst")?)?;
    let mut stage = Stage::new(ctx);
    let name = "ck-alone";
    let running = loopback_commits(&mut stage, name)?;
    dies.pull()?;
    stage.ctx.dst.sh(&restart()).context("restart")?;
    dies.end()?;
    // Until nobody has connections any more that ended unnoticed.
    thread::sleep(LONG);
    // CRIU finds that the program is another one, after it was decided to whom the container belongs.
    let program = format!("{BUNDLES}/{name}/rootfs{CHECKER}");
    stage.ctx.src.sh(&format!("cp -p {program} {program}.kept && printf x >> {program}"))?;
    let again = format!("migrrdma recover {name}");
    let result = refused(&stage.ctx.src, &["migrrdma", "recover", name], &["its image is kept", &again]);
    stage.ctx.src.sh(&format!("mv {program}.kept {program}"))?;
    result?;
    given_up(&running)?;
    let status = stage.ctx.src.check(&["migrrdma", "status"])?;
    ensure!(
        status.contains("`migrrdma recover` to restore it"),
        "the status does not say what is left to do: {status}"
    );
    succeeds(&stage.ctx.src, &["migrrdma", "recover", name]).context("the second time")?;
    stage.flow(name, 300).context("the container that came back")?;
    rid_of_it(&stage.ctx.dst, name)?;
    ensure!(settled(&stage, name)? == "src", "it does not run where it was taken back");
    stage.migrate(name, "dst").context("a later migration")?;
    stage.flow(name, 200)?;
    stage.terminate(name)?;
    stage.verdict(name)?;
    stage.finish()
}
