//! Three real machines under QEMU, joined by lossless links.
//!
//! [`Lab::up`] restores them from saved state in seconds; [`Lab::attach`]
//! finds a lab that is already up. Addresses and differences between the
//! nodes are in [`topology`], the traps of the links in [`qemu`].

pub mod accel;
pub mod agent;
pub mod bundle;
pub mod deploy;
pub mod guest;
pub mod image;
pub mod mirror;
pub mod node;
pub mod paths;
pub mod qemu;
pub mod qmp;
pub mod snapshot;
pub mod standstill;
pub mod topology;
pub mod wire;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use image::Image;
use node::Node;
use paths::Paths;
use qemu::{Launch, Machine};
use qmp::Qmp;
use snapshot::Snapshots;
use topology::{HUB, NODES, NodeSpec};

/// Longest time a saved node may take to answer.
const RESTORE_LIMIT: Duration = Duration::from_secs(90);

#[derive(Debug, Serialize, Deserialize)]
struct State {
    token: String,
    machines: Vec<Machine>,
}

/// A running lab.
#[derive(Debug)]
pub struct Lab {
    paths: Paths,
    state: State,
}

impl Lab {
    /// Brings the lab up, or finds it up already; building the image and
    /// booting the nodes when that has not been done before. Returns whether
    /// it was started now.
    pub fn up() -> Result<(Lab, bool)> {
        Lab::up_in(Paths::new()?)
    }

    /// As [`Lab::up`]. A lab that is up already is left as it is, counted or not.
    pub fn up_in(paths: Paths) -> Result<(Lab, bool)> {
        let _lock = lock(&paths)?;
        if let Some(lab) = Lab::running(&paths)? {
            return Ok((lab, false));
        }
        let (image, snapshots) = prepare(&paths)?;
        let start = Instant::now();
        end_machines(&paths)?;
        let lab = start_all(paths, &image, &snapshots)?;
        eprintln!("lab: three nodes up after {:.1?}", start.elapsed());
        Ok((lab, true))
    }

    /// The lab that is up, or an error that says how to start it.
    pub fn attach() -> Result<Lab> {
        let paths = Paths::new()?;
        match Lab::running(&paths)? {
            Some(lab) => Ok(lab),
            None => bail!("the lab is not up; run `cargo xtask lab up`"),
        }
    }

    fn running(paths: &Paths) -> Result<Option<Lab>> {
        let Some(state) = read_state(paths)? else {
            return Ok(None);
        };
        if state.machines.len() != NODES.len() || !state.machines.iter().all(|m| m.process.alive()) {
            return Ok(None);
        }
        Ok(Some(Lab { paths: paths.clone(), state }))
    }

    /// Ends the lab. Not being up is no error.
    pub fn down() -> Result<()> {
        let paths = Paths::new()?;
        let _lock = lock(&paths)?;
        end_machines(&paths)?;
        // Unless somebody is booting nodes right now.
        if let Ok(_cache) = Flock::lock(cache_lock(&paths)?, FlockArg::LockExclusiveNonblock) {
            snapshot::end_interrupted(&paths)?;
        }
        if let Ok(dir) = paths.sockets() {
            let _ = fs::remove_dir_all(dir);
        }
        Ok(())
    }

    /// Puts nodes back to their saved state; all of them when `which` is
    /// empty. Files pushed since `up` are gone from them afterwards.
    pub fn reset(&mut self, which: &[&'static NodeSpec]) -> Result<()> {
        let _lock = lock(&self.paths)?;
        let (image, snapshots) = prepare(&self.paths)?;
        let all = which.is_empty() || which.iter().any(|n| n.name == HUB) || !qemu::links_reconnect(&qemu::version()?);
        if all {
            end_machines(&self.paths)?;
            *self = start_all(self.paths.clone(), &image, &snapshots)?;
            return Ok(());
        }
        let sockets = self.paths.sockets()?;
        for spec in which {
            let old = self.machine(spec)?;
            old.process.end(Duration::from_secs(5));
            let fresh = start_one(&self.paths, &image, &snapshots, &sockets, spec)?;
            for m in &mut self.state.machines {
                if m.node == spec.name {
                    *m = fresh.clone();
                }
            }
            self.save()?;
        }
        let nodes: Vec<(Node, Machine)> =
            which.iter().map(|s| Ok((self.handle(s)?, self.machine(s)?.clone()))).collect::<Result<_>>()?;
        await_nodes(&nodes)
    }

    /// A handle on a node, by name.
    pub fn node(&self, name: &str) -> Result<Node> {
        self.handle(NodeSpec::by_name(name)?)
    }

    /// Handles on all nodes: src, dst, peer.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        NODES.iter().map(|n| self.handle(n)).collect()
    }

    /// Paths of this lab on the build machine.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The machine behind a node: its process, port and logs.
    pub fn machine(&self, spec: &NodeSpec) -> Result<&Machine> {
        self.state
            .machines
            .iter()
            .find(|m| m.node == spec.name)
            .with_context(|| format!("{} is not part of the running lab", spec.name))
    }

    fn handle(&self, spec: &'static NodeSpec) -> Result<Node> {
        Ok(Node::new(spec, self.machine(spec)?.port, self.state.token.clone()))
    }

    fn save(&self) -> Result<()> {
        let path = self.paths.state();
        let temp = path.with_extension("new");
        fs::write(&temp, serde_json::to_vec_pretty(&self.state)?)?;
        fs::rename(&temp, &path).with_context(|| format!("write {}", path.display()))
    }
}

/// Image and saved nodes, made when missing.
pub fn prepare(paths: &Paths) -> Result<(Image, Snapshots)> {
    // One builder at a time, whatever the instance.
    let _lock =
        Flock::lock(cache_lock(paths)?, FlockArg::LockExclusive).map_err(|(_, e)| e).context("lock the lab's cache")?;
    let image = image::ensure(paths)?;
    let snapshots = snapshot::ensure(paths, &image, accel::choose(paths, &image)?)?;
    Ok((image, snapshots))
}

fn cache_lock(paths: &Paths) -> Result<fs::File> {
    fs::create_dir_all(paths.lab())?;
    fs::File::create(paths.lab().join("build.lock")).context("open the lock of the lab's cache")
}

fn lock(paths: &Paths) -> Result<Flock<fs::File>> {
    fs::create_dir_all(paths.run())?;
    let file = fs::File::create(paths.run().join("lock"))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| e).context("lock the lab instance")
}

fn read_state(paths: &Paths) -> Result<Option<State>> {
    match fs::read(paths.state()) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).with_context(|| format!("read {}", paths.state().display())),
    }
}

fn end_machines(paths: &Paths) -> Result<()> {
    if let Some(state) = read_state(paths)? {
        for m in &state.machines {
            m.process.end(Duration::from_secs(5));
        }
        fs::remove_file(paths.state())?;
    }
    Ok(())
}

fn start_one(
    paths: &Paths,
    image: &Image,
    snapshots: &Snapshots,
    sockets: &std::path::Path,
    spec: &'static NodeSpec,
) -> Result<Machine> {
    let disk = paths.run().join(format!("{}.qcow2", spec.name));
    snapshot::overlay(&snapshots.disk(spec), "qcow2", &disk)?;
    qemu::launch(&Launch {
        node: spec,
        image,
        accel: snapshots.accel,
        disk: &disk,
        incoming: Some(&snapshots.state(spec)),
        sockets,
        logs: &paths.run(),
        counter: paths.counter.as_deref(),
    })
}

fn start_all(paths: Paths, image: &Image, snapshots: &Snapshots) -> Result<Lab> {
    let sockets = paths.sockets()?;
    let mut lab = Lab { paths, state: State { token: image.token.clone(), machines: Vec::new() } };
    let started = (|| {
        for spec in snapshot::in_start_order() {
            let machine = start_one(&lab.paths, image, snapshots, &sockets, spec)?;
            lab.state.machines.push(machine);
            // Written at every step, so that `down` finds what was started.
            lab.save()?;
            if spec.name == HUB {
                qemu::wait_for_links(&sockets, Duration::from_secs(30))?;
            }
        }
        let nodes: Vec<(Node, Machine)> = lab
            .nodes()?
            .into_iter()
            .map(|n| {
                let m = lab.machine(n.spec)?.clone();
                Ok((n, m))
            })
            .collect::<Result<_>>()?;
        await_nodes(&nodes)
    })();
    if let Err(e) = started {
        end_machines(&lab.paths)?;
        return Err(e);
    }
    Ok(lab)
}

/// Waits for restored nodes and puts their clocks right.
fn await_nodes(nodes: &[(Node, Machine)]) -> Result<()> {
    thread::scope(|s| {
        let handles: Vec<_> = nodes
            .iter()
            .map(|(node, machine)| {
                s.spawn(move || -> Result<()> {
                    Qmp::connect(&machine.monitor, Duration::from_secs(20))?.wait_running(RESTORE_LIMIT).with_context(
                        || {
                            let said = fs::read_to_string(&machine.errors).unwrap_or_default();
                            format!("restore {}: {said}", machine.node)
                        },
                    )?;
                    snapshot::wait_for_node(node, machine, RESTORE_LIMIT)?;
                    node.set_clock()
                })
            })
            .collect();
        for h in handles {
            h.join().map_err(|_| anyhow::anyhow!("restore thread panicked"))??;
        }
        Ok(())
    })
}
