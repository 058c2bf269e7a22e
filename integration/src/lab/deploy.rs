//! Putting this project's own binaries on the nodes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result};

use super::Lab;
use super::agent::{AGENT, ANSWERS};
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
    let mut slim = Vec::new();
    let mut missing = Vec::new();
    for (name, remote) in ARTEFACTS {
        if built(lab.paths(), name).exists() {
            slim.push((stripped(lab.paths(), name)?, *remote));
        } else {
            missing.push(*name);
        }
    }
    let pki = if missing.is_empty() { Some(certificates(lab)?) } else { None };
    thread::scope(|s| {
        let handles: Vec<_> = nodes
            .iter()
            .map(|node| {
                let (slim, pki) = (&slim, pki.as_deref());
                s.spawn(move || -> Result<()> {
                    for (local, remote) in slim {
                        node.push(local, remote)?;
                    }
                    match pki {
                        Some(pki) => start_agent(lab, node, pki),
                        None => Ok(()),
                    }
                })
            })
            .collect();
        for h in handles {
            h.join().map_err(|_| anyhow::anyhow!("deploy thread panicked"))??;
        }
        Ok::<(), anyhow::Error>(())
    })?;
    Ok(missing)
}

/// The artefact without its line tables, which are most of it; the build id
/// stays. Kept until the artefact is built anew.
fn stripped(paths: &Paths, name: &str) -> Result<PathBuf> {
    let from = built(paths, name);
    let dir = paths.lab().join("stripped");
    let to = dir.join(name);
    let age = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).ok();
    if age(&to).is_some_and(|to| age(&from).is_some_and(|from| from < to)) {
        return Ok(to);
    }
    fs::create_dir_all(&dir)?;
    // Two labs may do this at once: make it aside, put it in place whole.
    let aside = dir.join(format!(".{name}.{}", std::process::id()));
    run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&aside).arg(&from))?;
    fs::rename(&aside, &to).with_context(|| format!("write {}", to.display()))?;
    Ok(to)
}

/// A certificate authority of this checkout and a certificate per node, made
/// by the project's own `pki` command. Returns their directory.
fn certificates(lab: &Lab) -> Result<PathBuf> {
    let dir = lab.paths().lab().join("pki");
    if dir.join("complete").exists() {
        return Ok(dir);
    }
    let _ = fs::remove_dir_all(&dir);
    let migrrdma = built(lab.paths(), "migrrdma");
    run(Command::new(&migrrdma).args(["pki", "init"]).arg(&dir).stdout(Stdio::null()))?;
    for node in lab.nodes()? {
        run(Command::new(&migrrdma)
            .args(["pki", "issue"])
            .arg(&dir)
            .arg(node.name())
            .args(["--ip", &node.spec.rdma_ip(), "--ip", &node.spec.lan_ip(), "--dns", node.name()])
            .stdout(Stdio::null()))?;
    }
    fs::write(dir.join("complete"), "")?;
    Ok(dir)
}

/// Starts the node's migration agent, or starts it again, and waits until it
/// answers.
fn start_agent(lab: &Lab, node: &Node, pki: &Path) -> Result<()> {
    let configs = lab.paths().root.join("configs");
    let name = node.name();
    node.push(&pki.join("ca.pem"), "/etc/migrrdma/pki/ca.pem")?;
    node.push(&pki.join(format!("{name}.pem")), "/etc/migrrdma/pki/node.pem")?;
    node.push(&pki.join(format!("{name}.key")), "/etc/migrrdma/pki/node.key")?;
    node.push(&configs.join("agent.json"), "/etc/migrrdma/agent.json")?;
    node.push(&configs.join("systemd/migrrdma-agent.service"), "/etc/systemd/system/migrrdma-agent.service")?;
    let script = format!(
        "systemctl daemon-reload && systemctl restart {AGENT} && {ANSWERS} && exit 0; \
         echo 'the agent does not answer; its journal:'; migrrdma status; journalctl -u {AGENT} --no-pager -n 30; exit 1"
    );
    node.sh(&script).map(drop).with_context(|| format!("start the agent of {name}"))
}
