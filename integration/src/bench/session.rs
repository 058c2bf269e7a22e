//! The lab for as long as measurements are made: tools on the nodes, probes set, everything clean again at the end.

use super::clocks;
use super::counts;
use super::measure::{self, Load};
use super::plan::Item;
use super::samples::Measured;
use crate::lab::node::Running;
use crate::lab::paths::Paths;
use crate::lab::{Lab, deploy};
use crate::scenario::{Context, sole_user};
use anyhow::{Context as _, Result, ensure};
use nix::fcntl::Flock;
use std::fs::File;
use std::time::Duration;

/// Hard limit of one measurement, and for each of its moves.
const LIMIT: Duration = Duration::from_secs(240);
const MOVE: Duration = Duration::from_secs(60);
/// Clocks further apart than this are set again, seconds.
const APART: f64 = 0.2;

/// Brings the programs of a move into the page cache.
const READ: &str = "cat /usr/sbin/criu /usr/sbin/runc /usr/bin/python3 /usr/local/bin/* /usr/local/lib/migrrdma/*.so \
    /usr/local/lib/migrrdma/criu/* /srv/lab/rootfs/lib/x86_64-linux-gnu/lib[cim]*.so.* >/dev/null 2>&1; true";

/// What fresh nodes are warmed up with.
#[derive(Debug)]
pub struct Warm<'a> {
    /// The move.
    pub item: Item,
    /// As in the measurements, but for the number of moves.
    pub load: &'a Load,
}

/// See the module's text.
#[derive(Debug)]
pub struct Session {
    lab: Lab,
    /// Whether the lab was up before: an interrupted run may have left something.
    found: bool,
    /// Whether the lab shall be up afterwards.
    keep: bool,
    counting: bool,
    answering: Vec<Running>,
    _alone: Flock<File>,
}

impl Session {
    /// Brings the lab up, or takes the one that is up.
    pub fn begin(keep: bool, warm: &Warm) -> Result<Session> {
        let alone = sole_user()?;
        let mut paths = Paths::new()?;
        paths.counter = Some(deploy::built(&paths, "liblab_counter.so")).filter(|plugin| plugin.exists());
        let (lab, fresh) = Lab::up_in(paths)?;
        let mut session =
            Session { lab, found: !fresh, keep: keep || !fresh, counting: false, answering: Vec::new(), _alone: alone };
        match session.prepare().and_then(|()| session.warm_up(warm)) {
            Ok(()) => Ok(session),
            Err(e) => {
                // The reason counts, not what else goes wrong.
                let _ = session.end();
                Err(e)
            }
        }
    }

    fn prepare(&mut self) -> Result<()> {
        let missing = deploy::deploy(&self.lab)?;
        ensure!(missing.is_empty(), "not built: {}; run `cargo build --release --workspace`", missing.join(", "));
        let tool = deploy::built(self.lab.paths(), "rdma-checker");
        let nodes = self.lab.nodes()?;
        for node in &nodes {
            if self.found {
                measure::clear(node);
            }
            node.push(&tool, clocks::TOOL)?;
        }
        self.counting = nodes.iter().map(counts::watch).collect::<Result<Vec<_>>>()?.into_iter().all(|can| can);
        if !self.counting {
            println!("bench: the nodes' kernels cannot count the driver's calls; they are left out");
        }
        if !super::instructions::are_counted(self.lab.paths(), &nodes) {
            println!(
                "bench: what the nodes execute is not counted: it takes QEMU 10, emulation, and a lab started for it"
            );
        }
        self.answering = nodes.iter().map(clocks::answer).collect::<Result<_>>()?;
        self.set_clocks()
    }

    /// Clocks that are far apart would put a phase of one node into another of the other.
    fn set_clocks(&self) -> Result<()> {
        let nodes = self.lab.nodes()?;
        for node in &nodes[1..] {
            // It may just have been started.
            let mut asked = clocks::ask(&nodes[0], node);
            for _ in 0..5 {
                if asked.is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(300));
                asked = clocks::ask(&nodes[0], node);
            }
            if asked?.ahead.abs() > APART {
                nodes.iter().try_for_each(crate::lab::node::Node::set_clock)?;
            }
        }
        Ok(())
    }

    /// Makes one measurement.
    pub fn measure(&mut self, item: &Item, load: &Load) -> Result<Measured> {
        let mut ctx = Context::new(&self.lab, LIMIT + MOVE * u32::from(load.moves))?;
        measure::measure(&mut ctx, item, load, self.counting)
    }

    /// Fresh nodes, after a failure.
    pub fn recover(&mut self, warm: &Warm) -> Result<()> {
        self.reset()?;
        self.warm_up(warm)
    }

    fn reset(&mut self) -> Result<()> {
        println!("bench: the nodes are reset");
        self.answering.clear();
        self.lab.reset(&[]).context("reset the nodes")?;
        self.found = false;
        self.prepare()
    }

    /// Moves there and back that do not count: the first ones on fresh nodes read every program from the disk.
    fn warm_up(&mut self, warm: &Warm) -> Result<()> {
        for node in self.lab.nodes()? {
            node.sh(READ)?;
        }
        println!("bench: there and back to warm up, ({}) {}", warm.item.variant.letter(), warm.item.cell);
        if let Err(e) = self.measure(&warm.item, &Load { moves: 2, ..warm.load.clone() }) {
            println!("bench: it failed: {e:#}");
            self.reset()?;
        }
        Ok(())
    }

    /// Leaves the nodes as they were, and ends the lab if it was started for this.
    pub fn end(mut self) -> Result<()> {
        self.answering.clear();
        if !self.keep {
            return Lab::down();
        }
        for node in self.lab.nodes()? {
            counts::unwatch(&node);
            node.check(&["rm", "-f", clocks::TOOL])?;
        }
        Ok(())
    }
}
