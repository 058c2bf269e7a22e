//! Booted nodes, kept: each node is booted once, configured, and its memory
//! and disk saved, so that a lab comes up in seconds and always the same.
//!
//! A saved node is a machine state file and the disk as it was at that moment.
//! Runs get an empty overlay over that disk, so the saved node never changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::image::{self, Image};
use super::node::Node;
use super::paths::{Paths, content_key};
use super::qemu::{self, Accel, Launch, Machine};
use super::qmp::Qmp;
use super::topology::{HUB, NODES, NodeSpec};
use crate::setup::run;

/// Longest time a cold boot may take under emulation.
const BOOT_LIMIT: Duration = Duration::from_secs(400);

/// Saved nodes ready to be continued.
#[derive(Debug, Clone)]
pub struct Snapshots {
    dir: PathBuf,
    /// Accelerator the nodes were saved under; a state is valid for it only.
    pub accel: Accel,
}

impl Snapshots {
    /// Machine state of a node.
    pub fn state(&self, node: &NodeSpec) -> PathBuf {
        self.dir.join(format!("{}.state", node.name))
    }

    /// Disk of a node at the same moment.
    pub fn disk(&self, node: &NodeSpec) -> PathBuf {
        self.dir.join(format!("{}.qcow2", node.name))
    }
}

/// Makes a copy-on-write disk over `backing`.
pub fn overlay(backing: &Path, backing_format: &str, to: &Path) -> Result<()> {
    let _ = fs::remove_file(to);
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", backing_format, "-b"]).arg(backing).arg(to))
}

/// Returns the saved nodes, booting and saving them when there are none for
/// this image, QEMU, processor and configuration.
pub fn ensure(paths: &Paths, image: &Image, accel: Accel) -> Result<Snapshots> {
    let qemu_version = qemu::version()?;
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find(|l| l.starts_with("model name")).unwrap_or_default();
    let recipe: Vec<String> = NODES
        .iter()
        .flat_map(|n| [n.setup_script(), qemu::kernel_line(n), qemu::hardware(n, accel).join(" ")])
        .collect();
    let key = content_key(&[
        image.key.as_bytes(),
        image.token.as_bytes(),
        qemu_version.as_bytes(),
        cpu.as_bytes(),
        recipe.join("\n").as_bytes(),
    ]);
    let dir = paths.lab().join(format!("nodes-{key}"));
    let snapshots = Snapshots { dir: dir.clone(), accel };
    if dir.join("complete").exists() {
        return Ok(snapshots);
    }
    let start = Instant::now();
    eprintln!("lab: booting the three nodes for the first time; this takes a minute or two, once");
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    // Not the running instance's sockets: a lab may be up while we boot.
    let sockets = dir.join("s");
    let sockets = if sockets.as_os_str().len() < 80 {
        fs::create_dir_all(&sockets)?;
        sockets
    } else {
        paths.sockets()?
    };
    let mut booting = Booting::new(paths)?;
    let result = boot_all(image, &snapshots, &sockets, &mut booting);
    booting.end();
    result?;
    fs::write(dir.join("complete"), "")?;
    image::drop_older(paths, "nodes-", &dir);
    eprintln!("lab: nodes booted and saved after {:.0?}", start.elapsed());
    Ok(snapshots)
}

fn boot_all(image: &Image, snapshots: &Snapshots, sockets: &Path, booting: &mut Booting) -> Result<()> {
    for spec in in_start_order() {
        let disk = snapshots.disk(spec);
        overlay(&image.disk, "raw", &disk)?;
        booting.add(qemu::launch(&Launch {
            node: spec,
            image,
            accel: snapshots.accel,
            disk: &disk,
            incoming: None,
            sockets,
            logs: &snapshots.dir,
            counter: None,
        })?)?;
        if spec.name == HUB {
            qemu::wait_for_links(sockets, Duration::from_secs(30))?;
        }
    }
    let machines = &booting.machines;
    thread::scope(|s| {
        let handles: Vec<_> = machines.iter().map(|m| s.spawn(|| configure(m, image))).collect();
        handles
            .into_iter()
            .map(|h| h.join().map_err(|_| anyhow::anyhow!("boot thread panicked"))?)
            .collect::<Result<Vec<()>>>()
    })?;
    // All are configured before the first is stopped: a stopped node would
    // hold up the frames of the others.
    for machine in machines {
        let spec = NodeSpec::by_name(&machine.node)?;
        let mut qmp = Qmp::connect(&machine.monitor, Duration::from_secs(10))?;
        qmp.save_state(&snapshots.state(spec), Duration::from_secs(120))
            .with_context(|| format!("save {}", spec.name))?;
        let _ = qmp.command("quit", json!({}));
    }
    Ok(())
}

/// Machines that boot to be saved or tried, on record, so that those of a boot that
/// was interrupted are found and ended by the next.
pub(super) struct Booting {
    record: PathBuf,
    machines: Vec<Machine>,
}

impl Booting {
    pub fn new(paths: &Paths) -> Result<Booting> {
        let record = paths.lab().join("booting.json");
        let machines = match fs::read(&record) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
            Err(_) => Vec::new(),
        };
        let mut booting = Booting { record, machines };
        booting.end();
        Ok(booting)
    }

    pub fn add(&mut self, machine: Machine) -> Result<()> {
        self.machines.push(machine);
        fs::write(&self.record, serde_json::to_vec(&self.machines)?)
            .with_context(|| format!("write {}", self.record.display()))
    }

    pub fn end(&mut self) {
        for m in self.machines.drain(..) {
            m.process.end(Duration::from_secs(5));
        }
        let _ = fs::remove_file(&self.record);
    }
}

/// Ends what an interrupted first boot left running. The caller holds the
/// lock of the lab's cache.
pub fn end_interrupted(paths: &Paths) -> Result<()> {
    Booting::new(paths).map(|_| ())
}

/// The hub first: the others connect to it.
pub fn in_start_order() -> impl Iterator<Item = &'static NodeSpec> {
    let hub = NODES.iter().filter(|n| n.name == HUB);
    hub.chain(NODES.iter().filter(|n| n.name != HUB))
}

/// Waits for a node's control channel.
pub fn wait_for_node(node: &Node, machine: &Machine, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        match node.ping(Duration::from_secs(5)) {
            Ok(()) => return Ok(()),
            Err(e) if !machine.process.alive() => {
                let said = fs::read_to_string(&machine.errors).unwrap_or_default();
                bail!("{}: QEMU ended: {said}{e:#}", machine.node);
            }
            Err(e) if Instant::now() >= deadline => {
                return Err(e).with_context(|| {
                    format!(
                        "{} did not answer within {limit:?}; its console is in {}",
                        machine.node,
                        machine.console.display()
                    )
                });
            }
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

fn configure(machine: &Machine, image: &Image) -> Result<()> {
    let spec = NodeSpec::by_name(&machine.node)?;
    let node = Node::new(spec, machine.port, image.token.clone());
    wait_for_node(&node, machine, BOOT_LIMIT)?;
    node.set_clock()?;
    // Until the last unit has settled, so that nothing starts later.
    node.sh("systemctl is-system-running --wait || true")?;
    node.write("/usr/local/sbin/lab-setup", 0o755, spec.setup_script().as_bytes())?;
    node.check(&["sh", "-x", "/usr/local/sbin/lab-setup"]).with_context(|| format!("configure {}", spec.name))?;
    Ok(())
}
