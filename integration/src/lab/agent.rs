//! The agent that runs on a node as a service: waiting for it, and killing it. Scripts are for the node's shell, so that a
//! step that belongs to them is not a round trip later.

use anyhow::{Context as _, Result};

use super::node::Node;

/// Its unit.
pub const AGENT: &str = "migrrdma-agent.service";

/// Script: ends as soon as the agent answers, with status 1 if it does not within 20 seconds or so.
pub const ANSWERS: &str =
    "(for i in $(seq 100); do migrrdma status >/dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1)";

/// Waits until the agent of a node answers.
pub fn answering(node: &Node) -> Result<()> {
    node.sh(ANSWERS).map(drop).with_context(|| format!("the agent of {} does not answer", node.name()))
}

/// Script: sends a signal to the agent, but not to what it has started.
pub fn signalled(signal: &str) -> String {
    format!("systemctl kill --kill-whom=main --signal={signal} {AGENT}")
}

/// Script: kills the agent, and starts the next one.
pub fn killed_and_started() -> String {
    format!("{}; sleep 0.3; systemctl restart {AGENT}", signalled("KILL"))
}
