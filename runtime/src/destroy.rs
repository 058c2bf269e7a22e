//! Ending a container and removing everything it had on the host.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libcontainer::container::ContainerStatus;
use libcontainer::hooks;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::Signal;

use crate::cgroup::{self, Cgroup};
use crate::inject::HostPaths;
use crate::store::ContainerHandle;
use crate::tmpfs;

/// Where a restore binds the root file system, below the state directory.
pub const CRIU_ROOT: &str = "criu-root";

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
        let killed = cgroup.kill_all(Signal::SIGKILL as i32);
        if has_cgroup(handle) {
            killed?;
        }
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
        let emptied = empty(&cgroup);
        if has_cgroup(&handle) {
            emptied?;
        }
    }
    remove_state_dir(&dir)?;
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

/// A creation that was killed half-way may not have got a cgroup yet.
fn has_cgroup(handle: &ContainerHandle) -> bool {
    !handle.sidecar.cgroup.as_os_str().is_empty()
}

fn empty(cgroup: &Cgroup) -> Result<()> {
    cgroup.kill_all(Signal::SIGKILL as i32)?;
    cgroup.wait_empty(KILL_DEADLINE)?;
    cgroup.remove()
}

/// Removes a container's state. A restore that was killed may have left the
/// root file system bound in there: it is let go first, and nothing is
/// removed while anything is still mounted, for that would be the user's.
pub fn remove_state_dir(dir: &Path) -> Result<()> {
    tmpfs::take_down(&dir.join(tmpfs::DIR));
    let bound = dir.join(CRIU_ROOT);
    // Several binds may lie on top of each other.
    for _ in 0..16 {
        if umount2(&bound, MntFlags::MNT_DETACH).is_err() {
            break;
        }
    }
    match fs::remove_dir(&bound) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            return Err(err).with_context(|| format!("cannot release {}", bound.display()));
        }
        _ => {}
    }
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

/// Best effort after a failed creation or restore: the error that led here
/// matters more than any met on the way.
pub fn leftovers(dir: &Path, id: &str, cgroup: Option<&Cgroup>, injected: bool) {
    if let Some(cgroup) = cgroup {
        let _ = cgroup.kill_all(Signal::SIGKILL as i32);
        let _ = cgroup.wait_empty(Duration::from_secs(2));
        let _ = cgroup.remove();
    }
    let _ = remove_state_dir(dir);
    if injected {
        HostPaths::default().forget(id);
    }
}
