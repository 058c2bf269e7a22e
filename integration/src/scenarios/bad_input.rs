//! Bad input: what does not exist, is damaged, or does not fit. Every time one clear line says what is wrong, the exit
//! status is not 0, the container goes on, and nothing stays behind.
//!
//! Many cases share one pair of containers: what they have in common, a load that must not notice anything, is set up
//! once.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::migration::stage::{Pair, Stage};
use crate::lab::agent::{AGENT, answering};
use crate::lab::bundle::{self, Bundle};
use crate::lab::node::{Node, Output};
use crate::lab::wire::Exec;
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);
const CRIU: &str = "/usr/sbin/criu";
const PLUGIN: &str = "/usr/local/lib/migrrdma/criu/libmigrrdma_plugin.so";

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: false, limit: LIMIT, run: $run }
    };
}

/// Claims about bad input.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "bad input: an unknown container, a wrong host, and missing tools or devices are each named, and the container goes on",
        surroundings
    ),
    claim!(
        "bad input: an image that is cut, altered or of a newer version is refused at the destination and the source goes on",
        images_on_their_way
    ),
    claim!("bad input: a checkpoint on disk that is cut, altered or newer is not restored", images_on_disk),
    claim!("bad input: a certificate of another authority and malformed settings are named", identities),
];

/// One line that names all of `words`, and a bad exit status.
fn refused(what: &str, out: &Output, words: &[&str]) -> Result<()> {
    let said = out.errors();
    ensure!(!out.success(), "{what}: it ended with status 0: {}{said}", out.text());
    ensure!(!out.done.timed_out, "{what}: it did not end by itself: {said}");
    let last = said.lines().last().unwrap_or_default();
    for word in words {
        ensure!(last.to_lowercase().contains(&word.to_lowercase()), "{what}: the message lacks {word:?}: {said:?}");
    }
    ensure!(!said.contains("panicked"), "{what}: {said}");
    ensure!(said.lines().count() == 1, "{what}: more than one line: {said:?}");
    Ok(())
}

fn command(node: &Node, argv: &[&str]) -> Result<Output> {
    let argv = argv.iter().map(ToString::to_string).collect();
    node.run(Exec { argv, timeout_ms: Some(60_000), ..Exec::default() })
}

/// A migration that must be refused for these words.
fn not_moved(stage: &Stage, pair: &Pair, what: &str, to: &str, words: &[&str]) -> Result<()> {
    let out = command(&stage.ctx.src, &["migrrdma", "migrate", &pair.client, "--to", to, "--json"])?;
    refused(what, &out, words)
}

/// The same while a file of a node is missing.
fn without(stage: &Stage, pair: &Pair, node: &str, file: &str, words: &[&str]) -> Result<()> {
    let away = format!("{file}.away");
    stage.ctx.node(node)?.check(&["mv", file, &away])?;
    let result = not_moved(stage, pair, &format!("{file} missing on {node}"), "dst", words);
    stage.ctx.node(node)?.check(&["mv", &away, file])?;
    result
}

fn runs_on(stage: &Stage, pair: &Pair) -> Result<()> {
    let state = stage.ctx.src.check(&["migrrdma", "state", &pair.client])?;
    ensure!(state.contains("running"), "the container is not running: {state}");
    stage.flow(&pair.client, 100)?;
    stage.flow(&pair.server, 100)
}

fn surroundings(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let out = command(&stage.ctx.src, &["migrrdma", "migrate", "nobody", "--to", "dst"])?;
    refused("an unknown container", &out, &["nobody", "does not exist"])?;
    for (what, to, words) in [
        ("a host without a name", "no.such.host", &["no.such.host", "no host this one can find"][..]),
        ("an address that is none", "a:b:c]", &["a:b:c]"]),
        ("this very host", "10.10.0.1", &["10.10.0.1", "this very host"]),
        ("a host that is not there", "10.10.0.77", &["cannot reach the agent at 10.10.0.77", "start"]),
        ("a host without an agent", "10.10.0.2:7999", &["cannot reach the agent at 10.10.0.2:7999", "start"]),
    ] {
        not_moved(&stage, &pair, what, to, words)?;
    }
    without(&stage, &pair, "src", CRIU, &["CRIU", "not installed", "install"])?;
    without(&stage, &pair, "dst", CRIU, &["on the destination", "CRIU", "not installed", "install"])?;
    without(&stage, &pair, "src", PLUGIN, &["CRIU plugin", PLUGIN, "install"])?;
    without(&stage, &pair, "dst", PLUGIN, &["on the destination", "CRIU plugin", PLUGIN, "install"])?;
    runs_on(&stage, &pair)?;

    stage.ctx.dst.check(&["rdma", "link", "delete", stage.ctx.dst.spec.rdma_device])?;
    let result = not_moved(&stage, &pair, "no RDMA device", "dst", &["on the destination", "no RDMA device", "rxe"]);
    let script = format!("set -e\n{}", stage.ctx.dst.spec.make_device());
    stage.ctx.dst.sh(&script).context("give dst its RDMA device back")?;
    result?;

    runs_on(&stage, &pair)?;
    stage.migrate(&pair.client, "dst").context("with everything in its place")?;
    stage.flow(&pair.client, 100)?;
    pair.judge(&mut stage)?;
    stage.finish()
}

/// Waits for our own image, which lies there before CRIU begins with its part, and damages it well before it is sent.
fn damage(how: &str) -> String {
    format!(
        "for i in $(seq 4000); do
  for f in /var/lib/migrrdma/outgoing/*/images; do
    if [ -s $f/rdma.img ]; then cd $f; {how}; exit 0; fi
  done
  sleep 0.01
done
exit 1"
    )
}

/// A move whose image is damaged before it is sent.
fn damaged(stage: &mut Stage, pair: &Pair, what: &str, how: &str, words: &[&str]) -> Result<()> {
    let damaging = stage.ctx.src.spawn(&["sh", "-c", &damage(how)])?;
    let out = stage.try_migrate(&pair.client, "dst", &[])?;
    ensure!(damaging.wait(Duration::from_secs(60))?.success(), "{what}: no image to damage was seen");
    let text = out.errors();
    refused(what, &out, &["undone", "runs here as before"])?;
    ensure!(words.iter().all(|w| text.contains(w)), "{what}: the message names not all of {words:?}: {text}");
    Ok(())
}

fn images_on_their_way(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    for (what, how, words) in [
        (
            "a flipped byte",
            "printf 'X' | dd of=rdma.img bs=1 seek=200 conv=notrunc status=none",
            &["rdma.img", "checksum"],
        ),
        (
            "a newer version",
            "printf '\\11' | dd of=rdma.img bs=1 seek=8 conv=notrunc status=none",
            &["rdma.img", "version 9"],
        ),
        ("a lost end", "truncate -s -9 rdma.img", &["rdma.img", "truncated"]),
    ] {
        damaged(&mut stage, &pair, what, how, words)?;
        runs_on(&stage, &pair).with_context(|| what.to_owned())?;
    }
    stage.migrate(&pair.client, "dst").context("an image that is whole")?;
    stage.flow(&pair.client, 100)?;
    pair.judge(&mut stage)?;
    stage.finish()
}

fn images_on_disk(ctx: &mut Context) -> Result<()> {
    let node = ctx.src.clone();
    let bundle = Bundle {
        name: "frugal".into(),
        no_rdma: true,
        command: ["sleep", "600"].map(str::to_owned).to_vec(),
        ..Bundle::default()
    };
    let dir = bundle.make(&node)?;
    node.sh(&format!("migrrdma run --detach --bundle {dir} frugal </dev/null >/dev/null 2>&1"))?;
    node.check(&["migrrdma", "checkpoint", "--image-path", "/tmp/good", "frugal"])?;
    let restore = |images: &str| {
        let argv = ["migrrdma", "restore", "--detach", "--bundle", &dir, "--image-path", images, "frugal"];
        command(&node, &argv)
    };
    for (what, how, words) in [
        ("no image", "rm -r /tmp/bad", &["/tmp/bad"][..]),
        ("an empty directory", "rm /tmp/bad/*", &["/tmp/bad", "no checkpoint"]),
        ("a lost end", "truncate -s -1 /tmp/bad/core-1.img", &["core-1.img", "bytes instead of", "take a new one"]),
        ("lost pages", "truncate -s 100 /tmp/bad/pages-1.img", &["pages-1.img", "100 bytes instead of"]),
        (
            "a flipped byte",
            "printf X | dd of=/tmp/bad/core-1.img bs=1 seek=60 conv=notrunc status=none",
            &["core-1.img", "altered"],
        ),
        ("garbage", "head -c 300 /dev/urandom > /tmp/bad/inventory.img", &["inventory.img", "instead of"]),
        (
            "a newer version",
            "sed -i 's/\"version\":[0-9]*/\"version\":9/' /tmp/bad/migrrdma.json && grep -q '\"version\":9' /tmp/bad/migrrdma.json",
            &["version 9", "newer migrrdma"],
        ),
    ] {
        node.sh(&format!("rm -rf /tmp/bad; cp -a /tmp/good /tmp/bad; {how}"))?;
        refused(what, &restore("/tmp/bad")?, words)?;
        let listed = node.check(&["migrrdma", "list", "--quiet"])?;
        ensure!(!listed.contains("frugal"), "{what}: the refused container is listed");
    }
    let out = restore("/tmp/good")?;
    ensure!(out.success(), "the good image: {}", out.errors());
    node.check(&["migrrdma", "delete", "--force", "frugal"])?;
    bundle::remove(&node, "frugal")?;
    node.sh("rm -rf /tmp/good /tmp/bad /var/lib/migrrdma/containers/frugal").map(drop)
}

fn identities(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "2"])?;
    let dst = stage.ctx.dst.clone();
    dst.sh("set -e
cp -a /etc/migrrdma/pki /tmp/pki.good
migrrdma pki init /tmp/other >/dev/null
migrrdma pki issue /tmp/other dst --ip 10.10.0.2 --dns dst >/dev/null
cp /tmp/other/ca.pem /etc/migrrdma/pki/ca.pem
cp /tmp/other/dst.pem /etc/migrrdma/pki/node.pem
cp /tmp/other/dst.key /etc/migrrdma/pki/node.key
systemctl restart migrrdma-agent")?;
    let result = answering(&dst).and_then(|()| {
        not_moved(&stage, &pair, "another authority", "dst", &["the agent at dst", "same authority", "pki issue"])
    });
    dst.sh("rm -r /etc/migrrdma/pki /tmp/other; mv /tmp/pki.good /etc/migrrdma/pki; systemctl restart migrrdma-agent")?;
    answering(&dst)?;
    result?;

    dst.write("/tmp/bad.json", 0o600, b"{\"listen\": \"0.0.0.0:7477\", \"lisen\": 1}\n")?;
    let agent = command(&dst, &["migrrdma", "agent", "--config", "/tmp/bad.json"])?;
    refused("a misspelt setting", &agent, &["/tmp/bad.json", "lisen", "line 1"])?;
    dst.write("/tmp/bad.json", 0o600, b"{\"deadlines\": {\"drain\": \"soon\"}\n")?;
    let agent = command(&dst, &["migrrdma", "agent", "--config", "/tmp/bad.json"])?;
    refused("a setting of the wrong kind", &agent, &["/tmp/bad.json", "line 1"])?;
    let status = command(&dst, &["migrrdma", "status", "--config", "/tmp/bad.json"])?;
    refused("settings of another command", &status, &["/tmp/bad.json"])?;
    let agent = command(&dst, &["migrrdma", "agent", "--config", "/tmp/none.json"])?;
    refused("settings that are not there", &agent, &["/tmp/none.json"])?;
    dst.check(&["rm", "/tmp/bad.json"])?;

    stage.ctx.src.check(&["systemctl", "stop", AGENT])?;
    let result = not_moved(&stage, &pair, "no agent here", "dst", &["no agent runs on this host", "start"]);
    stage.ctx.src.check(&["systemctl", "start", AGENT])?;
    answering(&stage.ctx.src)?;
    result?;

    runs_on(&stage, &pair)?;
    stage.migrate(&pair.client, "dst").context("with its own certificate again")?;
    stage.flow(&pair.client, 100)?;
    pair.judge(&mut stage)?;
    stage.finish()
}
