//! Carrying processes started by `exec` along in a checkpoint.
//!
//! CRIU dumps the tree under a container's init. A process that `exec` puts
//! into the container from outside is no child of init, is not dumped, and
//! dies with the container. So in containers with the RDMA shim `exec` leaves
//! a *keeper* in the container's pid namespace: it forks, the child becomes
//! the program, and the keeper only hands signals in and the exit status out.
//! A dump ends the keepers first; their children then fall to init, as
//! orphans in a pid namespace do, and belong to the tree.
//!
//! What this deliberately does not do: keep the far end alive. The caller of
//! `exec` sees its process end when the container leaves.

#![expect(unsafe_code, reason = "fork and raw signals inside a forked child")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::cgroup::signal_pid;
use crate::procfs;
use crate::stdio;
use crate::store::ContainerHandle;

/// A descriptor of a carried process that leads out of the container.
pub type OutsideKey = (String, usize);

/// Forks inside the container. Returns in the child, in a session of its own;
/// the parent stays as the keeper and never returns. Where a seccomp filter
/// forbids it, the caller goes on without a keeper.
pub fn split() {
    // SAFETY: the process has a single thread; the parent's branch calls
    // only system calls until it exits.
    match unsafe { libc::fork() } {
        0 => {
            // SAFETY: plain system call.
            unsafe { libc::setsid() };
        }
        child if child > 0 => keep(child),
        _ => {}
    }
}

fn keep(child: i32) -> ! {
    // SAFETY: system calls on local memory only. Everything inherited is
    // closed: the pipe that tells `exec` of success, the caller's stdio.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"migrrdma-keep".as_ptr());
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_SETMASK, &all, std::ptr::null_mut());
        if libc::syscall(libc::SYS_close_range, 0u32, u32::MAX, 0u32) != 0 {
            for fd in 0..1024 {
                libc::close(fd);
            }
        }
        loop {
            let mut status = 0;
            if libc::waitpid(child, &mut status, libc::WNOHANG) == child {
                let code = match libc::WIFSIGNALED(status) {
                    true => 128 + libc::WTERMSIG(status),
                    false => libc::WEXITSTATUS(status),
                };
                libc::_exit(code);
            }
            let signal = libc::sigwaitinfo(&all, std::ptr::null_mut());
            if signal > 0 && signal != libc::SIGCHLD {
                libc::kill(child, signal);
            }
        }
    }
}

fn record_path(handle: &ContainerHandle, pid: i32) -> PathBuf {
    handle.dir().join("keepers").join(pid.to_string())
}

/// Remembers a keeper; its start time tells it from a later process with its pid.
pub fn record(handle: &ContainerHandle, pid: i32) -> Result<()> {
    let Some(stat) = procfs::stat(pid) else {
        return Ok(());
    };
    let path = record_path(handle, pid);
    fs::create_dir_all(handle.dir().join("keepers"))?;
    fs::write(&path, stat.start_time.to_string()).with_context(|| format!("cannot write {}", path.display()))
}

/// Forgets a keeper that has ended by itself.
pub fn forget(handle: &ContainerHandle, pid: i32) {
    let _ = fs::remove_file(record_path(handle, pid));
}

fn keepers(handle: &ContainerHandle) -> Vec<i32> {
    let entries = fs::read_dir(handle.dir().join("keepers"));
    entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let start: u64 = fs::read_to_string(entry.path()).ok()?.parse().ok()?;
            let stat = procfs::stat(pid)?;
            (!stat.gone && stat.start_time == start).then_some(pid)
        })
        .collect()
}

/// Ends the keepers, so that their children belong to init, and returns what
/// of those leads out of the container. Works on frozen containers.
pub fn release(handle: &ContainerHandle) -> Result<Vec<OutsideKey>> {
    let keepers = keepers(handle);
    if keepers.is_empty() {
        return Ok(Vec::new());
    }
    let carried: Vec<i32> = handle
        .cgroup()?
        .pids()?
        .into_iter()
        .filter(|pid| procfs::stat(*pid).is_some_and(|stat| keepers.contains(&stat.parent)))
        .collect();
    for pid in &keepers {
        signal_pid(*pid, Signal::SIGKILL as i32)?;
    }
    let end = Instant::now() + Duration::from_secs(5);
    let gone = |pid: &i32| procfs::stat(*pid).is_none_or(|stat| stat.gone);
    while !keepers.iter().all(gone) {
        if Instant::now() >= end {
            bail!("the keepers {keepers:?} of exec'd processes do not end");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    for pid in keepers {
        forget(handle, pid);
    }
    let mut keys = Vec::new();
    for pid in carried {
        for (n, key) in stdio::keys(pid).into_iter().enumerate() {
            if key.starts_with("pipe:[") || key.starts_with("file[") {
                keys.push((key, n));
            }
        }
    }
    keys.sort();
    keys.dedup();
    Ok(keys)
}

/// Processes of the container that are not in init's tree and would be lost:
/// (pid, name).
pub fn outsiders(handle: &ContainerHandle) -> Result<Vec<(i32, String)>> {
    let init = handle.init_pid().context(crate::store::NOT_RUNNING)?;
    let keepers = keepers(handle);
    let pids = handle.cgroup()?.pids()?;
    let inside = |pid: i32| {
        let mut at = pid;
        // No chain of parents is longer than the number of processes.
        for _ in 0..=pids.len() {
            match procfs::stat(at) {
                _ if at == init || keepers.contains(&at) => return true,
                Some(stat) if pids.contains(&stat.parent) => at = stat.parent,
                Some(stat) => return stat.gone || stat.parent == init,
                // It ended while we looked.
                None => return true,
            }
        }
        true
    };
    Ok(pids
        .iter()
        .filter(|pid| !inside(**pid))
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            (*pid, name.trim().to_owned())
        })
        .collect())
}
