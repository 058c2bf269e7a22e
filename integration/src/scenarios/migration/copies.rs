//! `--copy-rootfs`: a container moves to a host that has no bundle of it, with what it wrote the moment before.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::stage::{CHECKER, Pair, Stage};
use crate::lab::bundle::{BUNDLES, Bundle};
use crate::lab::node::Node;
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);

/// Claims about copies.
pub const CLAIMS: &[Scenario] = &[
    Scenario {
        name: "a container moves with --copy-rootfs to a host without its bundle, and finds what it wrote just before",
        long: false,
        limit: LIMIT,
        run: with_rdma,
    },
    Scenario {
        name: "a copied bundle goes away with an undone migration, comes back over its own copy, and overwrites no other",
        long: false,
        limit: LIMIT,
        run: back_and_forth,
    },
];

const WRITER: &str = "writer";

/// Counts into a file it keeps open and one it makes anew each time.
const COUNTING: &str = "exec 3>>/journal; i=0; while :; do i=$((i+1)); echo $i >&3; echo $i >/last; sleep 0.1; done";

/// What the programs of these scenarios need, as a directory of its own instead of the overlay every bundle has: it is
/// copied as a whole, and a node is slow. With one of everything a copy could get wrong.
fn slim(node: &Node, name: &str) -> Result<()> {
    let dir = format!("{BUNDLES}/{name}");
    node.sh(&format!(
        "set -eu
[ ! -e {dir}/rootfs{CHECKER} ] || cp {dir}/rootfs{CHECKER} /tmp/kept-{name}
umount {dir}/rootfs; rm -rf {dir}/upper {dir}/work
cd /srv/lab/rootfs
lib=usr/lib/x86_64-linux-gnu
mkdir -p {dir}/rootfs
for d in bin lib lib64 sbin; do [ ! -L $d ] || cp -a $d {dir}/rootfs/; done
for f in usr/bin/sh usr/bin/dash usr/bin/sleep usr/lib64 etc/passwd etc/group etc/nsswitch.conf etc/ld.so.cache \\
         etc/libibverbs.d $lib/ld-linux* $lib/libc.so* $lib/libm.so* $lib/libgcc_s* $lib/libdl.so* $lib/libpthread.so* \\
         $lib/libibverbs.so* $lib/libnl-* $lib/libibverbs/librxe*; do
  [ -e $f ] || [ -L $f ] || continue
  cp -a --parents $f {dir}/rootfs/
done
cd {dir}/rootfs
mkdir -p proc dev sys tmp run usr/local/bin root odd
chmod 1777 tmp
[ ! -e /tmp/kept-{name} ] || mv /tmp/kept-{name} .{CHECKER}
echo one >odd/one; ln odd/one odd/two; ln -s /etc/passwd odd/absolute; ln -s ../../../nowhere odd/upwards
echo secret >odd/secret; chown 1234:5678 odd/secret; chmod 4710 odd/secret
mkfifo odd/fifo; mknod odd/null c 1 3
python3 -c \"import os; os.setxattr('odd/one', 'security.capability', bytes([1,0,0,2,0,32]+[0]*14))\"
"
    ))
    .map(drop)
    .with_context(|| format!("a small root file system for {name}"))
}

/// Names, types, owners, modes, links, attributes and contents below a bundle's root.
fn inventory(node: &Node, name: &str) -> Result<String> {
    node.sh(&format!(
        "set -eu; cd {BUNDLES}/{name}/rootfs
find . -path ./proc -prune -o ! -path ./journal ! -path ./last ! -path ./timeline ! -path . -printf '%P %y %m %U %G %n %s %l\\n' |
  grep -v '^\\(dev\\|sys\\|run\\|etc/ld.so.preload\\)' | sed 's/^\\([^ ]* d [^ ]* [^ ]* [^ ]*\\) .*/\\1/' | sort
find odd usr etc -type f ! -name ld.so.preload -exec sha256sum {{}} + | sort
stat -c '%t %T' odd/null; [ odd/one -ef odd/two ]
python3 -c \"import os; print(os.getxattr('odd/one', 'security.capability').hex())\""
    ))
}

fn same_files(stage: &Stage, name: &str) -> Result<()> {
    let (there, here) = (inventory(&stage.ctx.dst, name)?, inventory(&stage.ctx.src, name)?);
    let lost: Vec<&str> = here.lines().filter(|l| !there.lines().any(|t| t == *l)).take(5).collect();
    let new: Vec<&str> = there.lines().filter(|l| !here.lines().any(|t| t == *l)).take(5).collect();
    ensure!(lost.is_empty() && new.is_empty(), "the copy differs: {lost:?} on src, {new:?} on dst");
    Ok(())
}

fn with_rdma(ctx: &mut Context) -> Result<()> {
    let checker = ctx.target.join("release/rdma-checker");
    let mut stage = Stage::new(ctx);
    let pair = Pair { client: "ck-copied".into(), server: "ck-server0".into() };
    stage.run(&pair.server, 120, &["peer"], &[CHECKER, "server", "--progress", "2"])?;
    stage.wait_log(&pair.server, "listening", |t| t.contains("listening"))?;
    let command = [CHECKER, "client", "--connect", "10.20.0.120", "--duration", "0", "--progress", "1"];
    let load = ["--qps", "2", "--timeline", "/timeline"];
    let bundle = Bundle {
        name: pair.client.clone(),
        ip: Some("10.20.0.121/24".into()),
        copies: vec![(checker, CHECKER.to_owned())],
        command: command.iter().chain(&load).map(ToString::to_string).collect(),
        ..Bundle::default()
    };
    let dir = bundle.make(&stage.ctx.src)?;
    slim(&stage.ctx.src, &pair.client)?;
    bundle.make_network(&stage.ctx.dst)?;
    stage.ctx.src.check(&["migrrdma", "run", "--detach", "--supervise", "--bundle", &dir, &pair.client])?;
    stage.adopt(&pair.client, "src", &["src", "dst"]);
    stage.wait_log(&pair.client, "connection", |t| t.contains("\"running\""))?;
    stage.flow(&pair.client, 200)?;

    let out = stage.try_migrate(&pair.client, "dst", &[])?;
    ensure!(!out.success() && out.errors().contains("--copy-rootfs"), "without a bundle: {}", out.errors());
    stage.carry(&pair.client, "dst")?;
    stage.flow(&pair.client, 200)?;
    same_files(&stage, &pair.client)?;
    let before = stage.ctx.src.sh(&format!("cat {dir}/rootfs/timeline"))?;
    let after = stage.ctx.dst.sh(&format!("cat {dir}/rootfs/timeline"))?;
    ensure!(!before.is_empty() && after.starts_with(&before), "the file it wrote did not come along whole");
    ensure!(after.len() > before.len(), "nothing was added after the move");
    let devices = stage.ctx.dst.sh(&format!("grep -c /dev/infiniband/uverbs1 {dir}/config.json"))?;
    ensure!(devices.trim() == "1", "the copied bundle names another host's device");
    pair.judge(&mut stage)?;
    stage.finish()
}

/// Every number once, up to the last one.
fn gapless(node: &Node) -> Result<u64> {
    let text = node.sh(&format!("cat {BUNDLES}/{WRITER}/rootfs/journal"))?;
    let mut last = 0;
    for line in text.lines() {
        let number: u64 = line.parse().with_context(|| format!("the journal holds {line:?}"))?;
        ensure!(number == last + 1, "the journal jumps from {last} to {number}");
        last = number;
    }
    Ok(last)
}

fn writes_on(node: &Node) -> Result<u64> {
    let before = gapless(node)?;
    std::thread::sleep(Duration::from_secs(2));
    let after = gapless(node)?;
    ensure!(after > before, "nothing was written on {} for two seconds", node.name());
    Ok(after)
}

fn back_and_forth(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let command = ["sh", "-c", COUNTING].map(str::to_owned).to_vec();
    let bundle = Bundle { name: WRITER.into(), no_rdma: true, command, ..Bundle::default() };
    let dir = bundle.make(&stage.ctx.src)?;
    slim(&stage.ctx.src, WRITER)?;
    stage.ctx.src.check(&["migrrdma", "run", "--detach", "--supervise", "--bundle", &dir, WRITER])?;
    stage.adopt(WRITER, "src", &["src", "dst"]);

    stage.ctx.dst.sh(&format!("mkdir -p {dir} && echo mine >{dir}/config.json"))?;
    let out = stage.try_migrate(WRITER, "dst", &["--copy-rootfs"])?;
    ensure!(!out.success() && out.errors().contains("no copy"), "over a foreign bundle: {}", out.errors());
    let kept = stage.ctx.dst.sh(&format!("cat {dir}/config.json; ls -A {dir}; rm -r {dir}"))?;
    ensure!(kept == "mine\nconfig.json\n", "the foreign bundle was touched: {kept:?}");

    let out = stage.try_migrate(WRITER, "dst", &["--copy-rootfs"])?;
    ensure!(!out.success() && out.errors().contains("network namespace"), "without a namespace: {}", out.errors());
    let left = stage.ctx.dst.sh(&format!("ls -A {BUNDLES}"))?;
    ensure!(left.trim().is_empty(), "the refused copy is still there: {left}");

    bundle.make_network(&stage.ctx.dst)?;
    writes_on(&stage.ctx.src)?;
    stage.carry(WRITER, "dst")?;
    writes_on(&stage.ctx.dst)?;
    same_files(&stage, WRITER)?;
    // What was left behind is an older copy of the same bundle now.
    stage.ctx.src.sh(&format!("touch {dir}/rootfs/stale"))?;
    stage.carry(WRITER, "src")?;
    writes_on(&stage.ctx.src)?;
    let stale = stage.ctx.src.sh(&format!("ls {dir}/rootfs/stale 2>/dev/null || true"))?;
    ensure!(stale.is_empty(), "a file that the container did not have is there again");
    stage.ctx.src.check(&["migrrdma", "kill", WRITER, "KILL"])?;
    stage.finish()
}
