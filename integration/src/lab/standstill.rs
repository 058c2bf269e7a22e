//! A machine that stands still: for all others it has died, until it goes on from the very instruction it stood at.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::Lab;
use super::node::Node;
use super::qmp::Qmp;
use super::snapshot;
use super::topology::NodeSpec;

/// For a machine that goes on to answer again.
const BACK: Duration = Duration::from_secs(60);

/// The switch of one machine. Dropped while it stands still, it goes on.
#[derive(Debug)]
pub struct Standstill {
    lab: Lab,
    node: Node,
    monitor: Qmp,
    still: bool,
}

impl Standstill {
    /// Connects, so that the machine stands the moment it is told to.
    pub fn of(spec: &'static NodeSpec) -> Result<Self> {
        let lab = Lab::attach()?;
        let monitor = Qmp::connect(&lab.machine(spec)?.monitor, Duration::from_secs(10))?;
        Ok(Self { node: lab.node(spec.name)?, lab, monitor, still: false })
    }

    /// From now on nothing of it moves. Nobody may ask it for anything.
    pub fn begin(&mut self) -> Result<()> {
        self.monitor.command("stop", json!({})).with_context(|| format!("stop {}", self.node.name()))?;
        self.still = true;
        Ok(())
    }

    /// It goes on; its clock, which stood as well, is put right.
    pub fn end(mut self) -> Result<()> {
        self.go_on()?;
        snapshot::wait_for_node(&self.node, self.lab.machine(self.node.spec)?, BACK)?;
        self.node.set_clock()
    }

    fn go_on(&mut self) -> Result<()> {
        self.monitor.command("cont", json!({})).with_context(|| format!("continue {}", self.node.name()))?;
        self.still = false;
        Ok(())
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        // Whoever looks at the node after a failure would wait for ever.
        if self.still
            && let Err(e) = self.go_on()
        {
            eprintln!("{e:#}");
        }
    }
}
