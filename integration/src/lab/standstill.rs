//! A machine that stands still: for all others it has died, until it goes on from the very instruction it stood at.
//!
//! Its links are pulled meanwhile. A machine that stands takes nothing off them, and the hub would wait for it with
//! everybody else's packets once their sockets are full.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use super::Lab;
use super::node::Node;
use super::qmp::Qmp;
use super::snapshot;
use super::topology::{HUB, NETS, NodeSpec};

/// For a machine that goes on to answer again.
const BACK: Duration = Duration::from_secs(60);

/// The switch of one machine. Dropped while it stands still or is cut off, it goes on.
#[derive(Debug)]
pub struct Standstill {
    lab: Lab,
    node: Node,
    monitor: Qmp,
    hub: Qmp,
    still: bool,
    pulled: bool,
}

impl Standstill {
    /// Connects, so that the machine stands the moment it is told to.
    pub fn of(spec: &'static NodeSpec) -> Result<Self> {
        ensure!(spec.name != HUB, "{HUB} carries everybody's packets and cannot stand still");
        let lab = Lab::attach()?;
        let connect = |spec| Qmp::connect(&lab.machine(spec)?.monitor, Duration::from_secs(10));
        let (monitor, hub) = (connect(spec)?, connect(NodeSpec::by_name(HUB)?)?);
        Ok(Self { node: lab.node(spec.name)?, lab, monitor, hub, still: false, pulled: false })
    }

    /// From now on nothing of it moves. Nobody may ask it for anything.
    pub fn begin(&mut self) -> Result<()> {
        self.pull()?;
        self.still = true;
        self.monitor.command("stop", json!({})).with_context(|| format!("stop {}", self.node.name()))?;
        Ok(())
    }

    /// From now on nobody hears it, and it hears nobody; it goes on, and does what the lab tells it.
    pub fn pull(&mut self) -> Result<()> {
        self.pulled = true;
        self.links(false)
    }

    /// The hub's ends of its links.
    fn links(&mut self, up: bool) -> Result<()> {
        for net in NETS {
            let name = format!("{net}-{}", self.node.name());
            self.hub.command("set_link", json!({"name": name, "up": up})).with_context(|| format!("link {name}"))?;
        }
        Ok(())
    }

    /// It goes on; its clock, which stood as well, is put right.
    pub fn end(mut self) -> Result<()> {
        self.go_on()?;
        snapshot::wait_for_node(&self.node, self.lab.machine(self.node.spec)?, BACK)?;
        self.node.set_clock()
    }

    fn go_on(&mut self) -> Result<()> {
        if self.still {
            self.monitor.command("cont", json!({})).with_context(|| format!("continue {}", self.node.name()))?;
            self.still = false;
        }
        if self.pulled {
            self.links(true)?;
            self.pulled = false;
        }
        Ok(())
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        // Whoever looks at the node after a failure would wait for ever.
        if let Err(e) = self.go_on() {
            eprintln!("{e:#}");
        }
    }
}
