//! By files: a container is checkpointed with a command, its image carried to where it is wanted, and restored there
//! with another; with or without a partial restore beforehand. Its peer waits meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::settled::{settled, takes_part};
use super::stage::{CHECKER, Pair, Stage};
use crate::lab::agent::{AGENT, ANSWERS, killed_and_started};
use crate::lab::bundle::BUNDLES;
use crate::lab::node::{Node, Output};
use crate::lab::wire::Exec;
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(400);

macro_rules! claim {
    ($name:literal, $long:literal, $run:expr) => {
        Scenario { name: $name, long: $long, limit: LIMIT, run: $run }
    };
}

/// Claims about images on disk.
pub const CLAIMS: &[Scenario] = &[
    claim!("by files: a checkpoint is restored on another host and nothing is lost or repeated", false, elsewhere),
    claim!("by files: a checkpoint is restored on the same host and nothing is lost or repeated", true, same_host),
    claim!(
        "by files: a pre-dump, a partial restore, the checkpoint and its restore move a container and nothing is lost",
        false,
        with_partial
    ),
    claim!(
        "by files: a partial restore that is deleted leaves nothing behind and the source goes on",
        true,
        partial_deleted
    ),
    claim!("by files: an image is restored once, and a second time refused", true, restored_twice),
    claim!("by files: a container goes on beside its image, whose QPs come up in the error state", true, left_running),
    claim!(
        "by files: a partial restore of another series is named, and the source is unharmed",
        true,
        partial_of_another_series
    ),
    claim!("by files: registered memory in files goes to disk and comes back", true, memory_in_files),
    claim!("by files: a checkpoint that fails is undone and the container goes on", true, checkpoint_fails),
    claim!("by files: a peer that ends while it is parked costs only its own connections", true, peer_ends),
    Scenario {
        name: "by files: an agent restarted between a restore's commit and its end finishes it",
        long: true,
        limit: Duration::from_secs(1200),
        run: restarted_restore,
    },
    claim!("by files: a series of pre-dumps survives a restart of the agent", true, restarted_series),
    claim!(
        "by files: an agent that ends before a restore is decided leaves the image to be restored again",
        true,
        undecided_restore
    ),
    claim!("by files: a peer whose container nobody restores in time goes on alone", true, never_restored),
];

/// Where images lie on every node.
const IMAGES: &str = "/var/tmp/disk";

fn command(node: &Node, argv: &[&str]) -> Result<Output> {
    let argv = argv.iter().map(ToString::to_string).collect();
    node.run(Exec { argv, timeout_ms: Some(180_000), ..Exec::default() })
}

/// It ends with status 0.
pub fn succeeds(node: &Node, argv: &[&str]) -> Result<()> {
    let out = command(node, argv)?;
    ensure!(out.success(), "{} on {}: {}{}", argv.join(" "), node.name(), out.text(), out.errors());
    Ok(())
}

/// It ends with another status than 0, and one line names all of `words`.
pub fn refused(node: &Node, argv: &[&str], words: &[&str]) -> Result<()> {
    let out = command(node, argv)?;
    let said = out.errors();
    ensure!(!out.success(), "{} on {} ended with status 0: {said}", argv.join(" "), node.name());
    for word in words {
        ensure!(said.contains(word), "{}: the message lacks {word:?}: {said}", argv.join(" "));
    }
    Ok(())
}

/// Carries the directory of images from one node to another, as an administrator would with tar.
fn carry(from: &Node, to: &Node) -> Result<()> {
    from.sh(&format!("tar -C {IMAGES} -cf {IMAGES}.tar ."))?;
    let (bytes, mode) = from.read(&format!("{IMAGES}.tar"))?;
    to.write(&format!("{IMAGES}.tar"), mode, &bytes)?;
    to.sh(&format!("mkdir -p {IMAGES} && tar -C {IMAGES} -xpf {IMAGES}.tar && rm {IMAGES}.tar"))?;
    from.check(&["rm", &format!("{IMAGES}.tar")]).map(drop)
}

fn clean(stage: &Stage) -> Result<()> {
    for node in stage.ctx.nodes() {
        node.check(&["rm", "-rf", IMAGES])?;
    }
    Ok(())
}

fn checkpoint<'a>(name: &'a str, image: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut argv = vec!["migrrdma", "checkpoint", "--image-path", image, "--tcp-established", "--file-locks"];
    argv.extend(more);
    argv.push(name);
    argv
}

fn restore<'a>(name: &'a str, image: &'a str, bundle: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let mut argv = vec!["migrrdma", "restore", "--image-path", image, "--bundle", bundle];
    if more.is_empty() {
        argv.extend(["--detach", "--supervise", "--tcp-established", "--file-locks"]);
    }
    argv.extend(more);
    argv.push(name);
    argv
}

fn begin<'a>(ctx: &'a mut Context, load: &[&str]) -> Result<(Stage<'a>, Pair, String)> {
    let mut stage = Stage::new(ctx);
    clean(&stage)?;
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], load)?;
    let bundle = format!("{BUNDLES}/{}", pair.client);
    Ok((stage, pair, bundle))
}

fn judge(mut stage: Stage, pair: &Pair) -> Result<()> {
    stage.flow(&pair.client, 200)?;
    stage.flow(&pair.server, 200)?;
    pair.judge(&mut stage)?;
    clean(&stage)?;
    stage.finish()
}

fn final_image() -> String {
    format!("{IMAGES}/final")
}

fn elsewhere(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "4"])?;
    let image = final_image();
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
    let listed = stage.ctx.src.check(&["migrrdma", "list", "--quiet"])?;
    ensure!(!listed.contains(&pair.client), "the checkpointed container is still listed: {listed}");
    let waits = stage.ctx.peer.check(&["migrrdma", "status"])?;
    ensure!(waits.contains("for its image"), "the peer does not say that it waits: {waits}");
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    stage.moved(&pair.client, "dst")?;
    stage.flow(&pair.client, 200)?;
    // What came from disk is a container like any other.
    stage.migrate(&pair.client, "src")?;
    judge(stage, &pair)
}

fn same_host(ctx: &mut Context) -> Result<()> {
    let (stage, pair, bundle) = begin(ctx, &["--qps", "2", "--events"])?;
    let image = final_image();
    for _ in 0..2 {
        succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
        succeeds(&stage.ctx.src, &restore(&pair.client, &image, &bundle, &[]))?;
        stage.flow(&pair.client, 200)?;
        stage.ctx.src.check(&["rm", "-r", &image])?;
    }
    judge(stage, &pair)
}

/// QPs that the kernel of a node has, but for its own.
fn qps(node: &Node) -> Result<usize> {
    let text = node.check(&["rdma", "-j", "resource", "show", "qp"])?;
    let list: Vec<serde_json::Value> = serde_json::from_str(&text).context("rdma resource show qp")?;
    Ok(list.iter().filter(|q| q["type"] == "RC").count())
}

fn with_partial(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "4", "--srq"])?;
    let (early, image) = (format!("{IMAGES}/early"), final_image());
    let before = qps(&stage.ctx.peer)?;
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &early, &["--pre-dump"]))?;
    stage.flow(&pair.client, 200)?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &early, &bundle, &["--partial"]))?;
    ensure!(qps(&stage.ctx.dst)? >= 4, "the partial restore made no QPs");
    ensure!(qps(&stage.ctx.peer)? >= before + 4, "the peer made no second QPs");
    let status = stage.ctx.dst.check(&["migrrdma", "status"])?;
    ensure!(status.contains("partial restore"), "the status does not show the partial restore: {status}");
    stage.flow(&pair.client, 200)?;
    refused(&stage.ctx.dst, &restore(&pair.client, &early, &bundle, &["--partial"]), &["already", "delete"])?;
    refused(&stage.ctx.dst, &restore(&pair.client, &early, &bundle, &[]), &["pre-dump"])?;
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &["--parent-path", "../early"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    stage.moved(&pair.client, "dst")?;
    judge(stage, &pair)
}

fn partial_deleted(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "4"])?;
    let early = format!("{IMAGES}/early");
    let before = (qps(&stage.ctx.dst)?, qps(&stage.ctx.peer)?);
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &early, &["--pre-dump"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &early, &bundle, &["--partial"]))?;
    ensure!(qps(&stage.ctx.dst)? >= before.0 + 4, "the partial restore made no QPs");
    succeeds(&stage.ctx.dst, &["migrrdma", "delete", &pair.client])?;
    let after = (qps(&stage.ctx.dst)?, qps(&stage.ctx.peer)?);
    ensure!(after == before, "QPs on dst and peer: {before:?} before, {after:?} after the partial restore was deleted");
    stage.ctx.dst.sh("! pgrep -f '[m]igrrdma incubator'").context("an incubator is left behind")?;
    stage.flow(&pair.client, 300)?;
    // The session goes on all the same: the checkpoint needs no partial restore.
    let image = final_image();
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &["--parent-path", "../early"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    stage.moved(&pair.client, "dst")?;
    judge(stage, &pair)
}

fn restored_twice(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "2"])?;
    let image = final_image();
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    stage.moved(&pair.client, "dst")?;
    refused(&stage.ctx.src, &restore(&pair.client, &image, &bundle, &[]), &["restored already"])?;
    let listed = stage.ctx.src.check(&["migrrdma", "list", "--quiet"])?;
    ensure!(!listed.contains(&pair.client), "the refused container is listed: {listed}");
    judge(stage, &pair)
}

fn left_running(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "2"])?;
    let image = final_image();
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &["--leave-running"]))?;
    stage.flow(&pair.client, 300).context("the original")?;
    stage.flow(&pair.server, 300).context("its peer")?;
    // A copy with the same address in the same network would disturb the original's TCP connection, as it does without us.
    pair.judge(&mut stage)?;
    stage.ctx.src.check(&["migrrdma", "delete", "--force", &pair.client])?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    let out = command(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    ensure!(out.success(), "the copy was not restored: {}", out.errors());
    ensure!(out.errors().contains("error state"), "nothing was said of the connections: {}", out.errors());
    let argv = ["migrrdma", "wait", "--timeout", "60", &pair.client].map(str::to_owned).to_vec();
    stage.ctx.dst.run(Exec { argv, timeout_ms: Some(70_000), ..Exec::default() })?;
    let said = stage.ctx.dst.check(&["migrrdma", "logs", &pair.client])?.to_lowercase();
    ensure!(said.contains("flush"), "the copy saw no flushed work: {said}");
    clean(&stage)?;
    stage.finish()
}

fn partial_of_another_series(ctx: &mut Context) -> Result<()> {
    let (stage, pair, bundle) = begin(ctx, &["--qps", "2"])?;
    let (early, image) = (format!("{IMAGES}/early"), final_image());
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &early, &["--pre-dump"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &early, &bundle, &["--partial"]))?;
    // Whoever restores a copy of a container that went on does not go on with what was prepared for the container.
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &["--leave-running"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    refused(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]), &["another series", "delete"])?;
    succeeds(&stage.ctx.dst, &["migrrdma", "delete", &pair.client])?;
    judge(stage, &pair)
}

fn memory_in_files(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    clean(&stage)?;
    stage.memory_in_files();
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2", "--msg-size", "65536"])?;
    let (bundle, image) = (format!("{BUNDLES}/{}", pair.client), final_image());
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    stage.moved(&pair.client, "dst")?;
    judge(stage, &pair)
}

fn checkpoint_fails(ctx: &mut Context) -> Result<()> {
    let (stage, pair, bundle) = begin(ctx, &["--qps", "2"])?;
    let image = final_image();
    // CRIU finds no room for its image.
    stage.ctx.src.sh(&format!("mkdir -p {IMAGES}/small && mount -t tmpfs -o size=64k none {IMAGES}/small"))?;
    let small = format!("{IMAGES}/small/image");
    let result = refused(&stage.ctx.src, &checkpoint(&pair.client, &small, &[]), &["dump", "undone"]);
    stage.ctx.src.sh(&format!("umount {IMAGES}/small"))?;
    result?;
    stage.flow(&pair.client, 200)?;
    stage.flow(&pair.server, 200)?;
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
    // A restore that fails leaves the image and the peer as they were.
    let program = format!("{bundle}/rootfs{}", CHECKER);
    stage.ctx.src.check(&["mv", &program, &format!("{program}.away")])?;
    let result = refused(&stage.ctx.src, &restore(&pair.client, &image, &bundle, &[]), &["rdma-checker"]);
    stage.ctx.src.check(&["mv", &format!("{program}.away"), &program])?;
    result?;
    succeeds(&stage.ctx.src, &restore(&pair.client, &image, &bundle, &[]))?;
    judge(stage, &pair)
}

/// Marks the process that ends, so that no other is killed in its place.
const VICTIM: &str = "server --progress 3";

/// The container has a second process, whose peer ends while it is parked: as a whole container, or as a process of one
/// that goes on.
fn peer_ends(ctx: &mut Context) -> Result<()> {
    for counter in ["retry_exceeded_err", "out_of_seq_request", "rcvd_seq_err"] {
        ctx.allow_counter(counter);
    }
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "2"])?;
    let (image, served) = (final_image(), format!("{CHECKER} {VICTIM}"));
    let stays = format!("{served}; sleep 1000");
    let (mut at, mut to) = ("src", "dst");
    for (n, command) in (0u8..).zip([served.as_str(), &stays]) {
        let victim = format!("ck-victim{n}");
        stage.run(&victim, 160 + n, &["peer"], &["sh", "-c", command])?;
        stage.wait_log(&victim, "listening", |t| t.contains("listening"))?;
        // It sees this node's GIDs, the first of which leads nowhere on one of them.
        let gid = stage.node_of(&pair.client)?.spec.gid_index;
        let second = format!(
            "exec {CHECKER} client --connect 10.20.0.{} --gid-index {gid} --duration 0 --qps 2 --timeout 17 \
             >/dev/null 2>&1",
            160 + n
        );
        stage.node_of(&pair.client)?.check(&["migrrdma", "exec", "--detach", &pair.client, "sh", "-c", &second])?;
        stage.flow(&victim, 100)?;
        succeeds(stage.ctx.node(at)?, &checkpoint(&pair.client, &image, &[]))?;
        let kill = match command == stays {
            // The shell that started it has another beginning.
            true => format!("pkill -KILL -f '^{CHECKER} {VICTIM}'"),
            false => format!("migrrdma kill {victim} KILL"),
        };
        stage.ctx.peer.sh(&kill)?;
        carry(stage.ctx.node(at)?, stage.ctx.node(to)?)?;
        let out = command_on(&stage, to, &restore(&pair.client, &image, &bundle, &[]))?;
        ensure!(out.success(), "without {victim} the container was not restored: {}", out.errors());
        let said = out.errors();
        ensure!(said.contains(&victim) && said.contains("dead remote"), "nothing was said of {victim}: {said}");
        stage.moved(&pair.client, to)?;
        stage.flow(&pair.client, 300).with_context(|| format!("without {victim}"))?;
        stage.flow(&pair.server, 300).with_context(|| format!("its peer, without {victim}"))?;
        // The process that lost its peer sees what it sees when a host dies, and ends.
        let left = "for i in $(seq 100); do \
                    [ $(ps -C rdma-checker -o stat= | grep -vc Z) = 1 ] && exit 0; sleep 0.3; done; exit 1";
        let lost = "the process that lost its peer does not end";
        stage.node_of(&pair.client)?.sh(left).with_context(|| format!("without {victim}: {lost}"))?;
        clean(&stage)?;
        (at, to) = (to, at);
    }
    judge(stage, &pair)
}

fn command_on(stage: &Stage, node: &str, argv: &[&str]) -> Result<Output> {
    command(stage.ctx.node(node)?, argv)
}

/// Kills the agent as soon as a record decides, says "hit" if that one was not finished before, and starts the next agent.
fn killer() -> String {
    let decided = "grep -qs '\"state\": \"committed\"' /var/lib/migrrdma/migrations/*.json";
    format!(
        "pid=$(systemctl show -p MainPID --value {AGENT}); end=$(($(date +%s) + 150)); \
         until {decided}; do [ $(date +%s) -lt $end ] || exit 1; done; \
         kill -KILL $pid; if {decided}; then echo hit; fi; sleep 0.3; systemctl restart {AGENT}"
    )
}

fn restarted_restore(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "4"])?;
    let image = final_image();
    let (mut at, mut to, mut hits) = ("src", "dst", 0);
    // The kill may come after the end: a restore has little left to do by then.
    for round in 0..6 {
        succeeds(stage.ctx.node(at)?, &checkpoint(&pair.client, &image, &[]))?;
        carry(stage.ctx.node(at)?, stage.ctx.node(to)?)?;
        let killer = stage.ctx.node(to)?.spawn(&["sh", "-c", &killer()])?;
        succeeds(stage.ctx.node(to)?, &restore(&pair.client, &image, &bundle, &[]))?;
        let killed = killer.wait(Duration::from_secs(170))?;
        ensure!(killed.success(), "no agent was killed: {}{}", killed.text(), killed.errors());
        let hit = killed.text().contains("hit");
        let place = settled(&stage, &pair.client)?;
        ensure!(place == to, "it was restored on {to}, and runs on {place}");
        stage.moved(&pair.client, to)?;
        stage.flow(&pair.client, 300).with_context(|| format!("round {round}, hit: {hit}"))?;
        stage.flow(&pair.server, 300).with_context(|| format!("its peer in round {round}, hit: {hit}"))?;
        hits += u32::from(hit);
        clean(&stage)?;
        (at, to) = (to, at);
        if hits == 2 {
            break;
        }
    }
    ensure!(hits > 0, "the agent was never killed between the commit and the end");
    stage.ctx.note(format!("killed between the commit and the end {hits} times"));
    // What came back is a container like any other.
    stage.migrate(&pair.client, to)?;
    judge(stage, &pair)
}

fn restarted_series(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "4"])?;
    let (early, image) = (format!("{IMAGES}/early"), final_image());
    let before = qps(&stage.ctx.peer)?;
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &early, &["--pre-dump"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    succeeds(&stage.ctx.dst, &restore(&pair.client, &early, &bundle, &["--partial"]))?;
    stage.ctx.src.sh(&killed_and_started())?;
    // Peers and partial restores that hear nothing ask after 20 s, and look every five.
    std::thread::sleep(Duration::from_secs(60));
    let shows = |node: &Node, what: &str| -> Result<()> {
        let status = node.check(&["migrrdma", "status"])?;
        ensure!(status.contains(what), "the status of {} lacks {what:?}: {status}", node.name());
        Ok(())
    };
    shows(&stage.ctx.src, "pre-dumped")?;
    shows(&stage.ctx.dst, "partial restore")?;
    ensure!(qps(&stage.ctx.peer)? >= before + 4, "the peer has dropped its second QPs");
    stage.flow(&pair.client, 200)?;
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &["--parent-path", "../early"]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    let out = command(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]))?;
    ensure!(out.success(), "the checkpoint was not restored: {}", out.errors());
    let said = out.errors();
    ensure!(said.contains("partial restore made before is used"), "it belongs to another series: {said}");
    stage.moved(&pair.client, "dst")?;
    judge(stage, &pair)
}

fn undecided_restore(ctx: &mut Context) -> Result<()> {
    let (mut stage, pair, bundle) = begin(ctx, &["--qps", "4"])?;
    let image = final_image();
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
    carry(&stage.ctx.src, &stage.ctx.dst)?;
    // As CRIU restores, which is before the decision.
    let killer = format!(
        "pid=$(systemctl show -p MainPID --value {AGENT}); end=$(($(date +%s) + 100)); \
         until pgrep -x criu >/dev/null; do [ $(date +%s) -lt $end ] || exit 1; done; \
         kill -KILL $pid; sleep 0.3; systemctl restart {AGENT}; {ANSWERS}"
    );
    let killer = stage.ctx.dst.spawn(&["sh", "-c", &killer])?;
    refused(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[]), &[])?;
    let killed = killer.wait(Duration::from_secs(120))?;
    ensure!(killed.success(), "no agent was killed: {}{}", killed.text(), killed.errors());
    let known = stage.ctx.dst.exec(&["migrrdma", "state", &pair.client])?;
    ensure!(!known.success(), "the refused restore left a container: {}", known.text());
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let waits = stage.ctx.peer.check(&["migrrdma", "status"])?;
        let at_work = takes_part(&stage.ctx.dst.check(&["migrrdma", "status", "--json"])?);
        if waits.contains("for its image") && !at_work {
            break;
        }
        ensure!(Instant::now() < until, "the peer does not wait again, or the restore is not over: {waits}");
        std::thread::sleep(Duration::from_millis(500));
    }
    succeeds(&stage.ctx.dst, &restore(&pair.client, &image, &bundle, &[])).context("the second time")?;
    stage.moved(&pair.client, "dst")?;
    judge(stage, &pair)
}

/// Sets how long peers wait for an image that is made on this host.
fn parked(node: &Node, from: u32, to: u32) -> Result<()> {
    let settings = "/etc/migrrdma/agent.json";
    node.sh(&format!(
        "grep -q '\"parked\": {from}' {settings} && sed -i 's/\"parked\": {from}/\"parked\": {to}/' {settings} && \
         systemctl restart {AGENT} && {ANSWERS}"
    ))
    .map(drop)
    .context("set the deadline")
}

fn never_restored(ctx: &mut Context) -> Result<()> {
    for counter in ["retry_exceeded_err", "out_of_seq_request", "rcvd_seq_err"] {
        ctx.allow_counter(counter);
    }
    // Who only waits for messages, or for room to send some, does not notice that nobody sends any; and Soft-RoCE takes a
    // retry count of 7 for one without an end.
    let load = ["--qps", "2", "--mix", "write,read", "--retry", "3"];
    let (stage, pair, bundle) = begin(ctx, &load)?;
    let image = final_image();
    parked(&stage.ctx.src, 600, 15)?;
    succeeds(&stage.ctx.src, &checkpoint(&pair.client, &image, &[]))?;
    parked(&stage.ctx.src, 15, 600)?;
    let argv = ["migrrdma", "wait", "--timeout", "90", &pair.server].map(str::to_owned).to_vec();
    let out = stage.ctx.peer.run(Exec { argv, timeout_ms: Some(100_000), ..Exec::default() })?;
    ensure!(!out.errors().contains("still runs"), "the peer does not notice that its connections are broken");
    let said = stage.log(&pair.server)?.to_lowercase();
    ensure!(said.contains("retry"), "the peer saw something else than a dead host: {said}");
    // Too late for its connections, and it says so; without them it comes back.
    refused(&stage.ctx.src, &restore(&pair.client, &image, &bundle, &[]), &["--disconnected"])?;
    let argv = [&restore(&pair.client, &image, &bundle, &[])[..], &["--disconnected"]].concat();
    succeeds(&stage.ctx.src, &argv)?;
    clean(&stage)?;
    stage.finish()
}
