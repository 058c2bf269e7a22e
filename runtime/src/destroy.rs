//! Ending a container and removing everything it had on the host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libcontainer::container::ContainerStatus;
use libcontainer::hooks;
use nix::sys::signal::Signal;

use crate::cgroup::{self, Cgroup};
use crate::inject::HostPaths;
use crate::store::ContainerHandle;

const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// `delete`: refuses a running container unless `force`.
pub fn delete(handle: ContainerHandle, force: bool) -> Result<()> {
    match handle.status() {
        ContainerStatus::Stopped => {}
        ContainerStatus::Created => kill(&handle)?,
        _ if force => kill(&handle)?,
        other => bail!("cannot delete container {} that is not stopped: {other}; stop it or use --force", handle.id()),
    }
    remove(handle)
}

fn kill(handle: &ContainerHandle) -> Result<()> {
    if let Ok(cgroup) = handle.cgroup() {
        cgroup.kill_all(Signal::SIGKILL as i32)?;
        let _ = cgroup.thaw();
    }
    if let Some(pid) = handle.init_pid() {
        cgroup::signal_pid(pid, Signal::SIGKILL as i32)?;
    }
    let end = std::time::Instant::now() + KILL_DEADLINE;
    while handle.init_pid().is_some() {
        if std::time::Instant::now() >= end {
            bail!("container {} does not end although it was killed", handle.id());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Removes a container whose init is gone: stragglers, cgroup, state; then
/// runs the poststop hooks.
pub fn remove(mut handle: ContainerHandle) -> Result<()> {
    handle.container.state.status = ContainerStatus::Stopped;
    let config = handle.container.spec();
    let dir = handle.dir().to_owned();
    if let Ok(cgroup) = handle.cgroup() {
        cgroup.kill_all(Signal::SIGKILL as i32)?;
        cgroup.wait_empty(KILL_DEADLINE)?;
        cgroup.remove()?;
    }
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    if handle.sidecar.shim.is_some() {
        HostPaths::default().forget(handle.id());
    }
    if let Some(all) = config.ok().and_then(|config| config.hooks) {
        handle.container.state.pid = None;
        hooks::run_hooks(all.poststop().as_ref(), Some(&handle.container.state), None, None, None)
            .context("a poststop hook failed")?;
    }
    Ok(())
}

/// Best effort after a failed creation or restore: the error that led here
/// matters more than any met on the way.
pub fn leftovers(dir: &Path, id: &str, cgroup: Option<&Cgroup>, injected: bool) {
    if let Some(cgroup) = cgroup {
        let _ = cgroup.kill_all(Signal::SIGKILL as i32);
        let _ = cgroup.wait_empty(Duration::from_secs(2));
        let _ = cgroup.remove();
    }
    let _ = fs::remove_dir_all(dir);
    if injected {
        HostPaths::default().forget(id);
    }
}
