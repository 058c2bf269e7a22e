//! A container's cgroup: freezing, listing, killing, limits, removal.
//!
//! Creation and limits go through libcgroups (systemd, v1 and v2); what only
//! the unified hierarchy offers is done on its files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use libcgroups::common::{AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, FreezerState};
use libcontainer::oci_spec::runtime::{LinuxResources, Spec};
use libcontainer::utils::get_cgroup_path;
use nix::sys::signal::Signal;

use crate::procfs;
use crate::store::ContainerHandle;

const UNIFIED: &str = "/sys/fs/cgroup";

/// One container's cgroup.
pub struct Cgroup {
    manager: AnyCgroupManager,
    /// Absolute path in the unified hierarchy, when there is one and it is known.
    unified: Option<PathBuf>,
}

impl Cgroup {
    /// The cgroup of an existing container.
    pub fn of(handle: &ContainerHandle) -> Result<Self> {
        let spec =
            handle.container.spec().with_context(|| format!("cannot read the cgroup of container {}", handle.id()))?;
        Self::open(spec.cgroup_path, handle.container.systemd(), handle.id(), &handle.sidecar.cgroup)
    }

    /// The cgroup a container with this specification will have.
    pub fn for_spec(spec: &Spec, id: &str, systemd: bool) -> Result<Self> {
        let config = config(spec, id, systemd)?;
        Self::open(config.cgroup_path, systemd, id, Path::new(""))
    }

    fn open(path: PathBuf, systemd: bool, id: &str, unified: &Path) -> Result<Self> {
        let manager = libcgroups::common::create_cgroup_manager(CgroupConfig {
            cgroup_path: path,
            systemd_cgroup: systemd,
            container_name: id.to_owned(),
        })
        .with_context(|| format!("cannot manage the cgroup of container {id}"))?;
        let unified = (!unified.as_os_str().is_empty())
            .then(|| Path::new(UNIFIED).join(unified.strip_prefix("/").unwrap_or(unified)))
            .filter(|path| path.starts_with(UNIFIED) && path != Path::new(UNIFIED));
        Ok(Cgroup { manager, unified })
    }

    /// Path in the unified hierarchy as `/sys/fs/cgroup/…`.
    pub fn unified(&self) -> Option<&Path> {
        self.unified.as_deref()
    }

    /// Moves a process in, creating the cgroup if need be.
    pub fn add(&self, pid: i32) -> Result<()> {
        self.manager
            .add_task(libcgroups_pid(pid))
            .with_context(|| format!("cannot move process {pid} into the container's cgroup"))
    }

    /// Applies limits.
    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        self.manager
            .apply(&ControllerOpt { resources, disable_oom_killer: false, oom_score_adj: None, freezer_state: None })
            .context("cannot set the container's resource limits")
    }

    /// Limits RDMA objects for each device, which libcgroups does not know.
    pub fn apply_rdma(path: &Path, resources: &LinuxResources) -> Result<()> {
        for (device, limits) in resources.rdma().iter().flatten() {
            enable_rdma(path);
            let of = |limit: Option<u32>| limit.map_or("max".to_owned(), |n| n.to_string());
            let line =
                format!("{device} hca_handle={} hca_object={}", of(limits.hca_handles()), of(limits.hca_objects()));
            let file = path.join("rdma.max");
            fs::write(&file, &line).with_context(|| format!("cannot write {line:?} to {}", file.display()))?;
        }
        Ok(())
    }

    /// Freezes all processes and waits until they stand still.
    pub fn freeze(&self) -> Result<()> {
        self.manager.freeze(FreezerState::Frozen).context("cannot freeze the container")
    }

    /// Lets the processes run again.
    pub fn thaw(&self) -> Result<()> {
        self.manager.freeze(FreezerState::Thawed).context("cannot thaw the container")
    }

    /// Whether somebody asked for the freeze (as opposed to an ancestor's).
    pub fn is_frozen(&self) -> bool {
        self.unified
            .as_ref()
            .and_then(|path| fs::read_to_string(path.join("cgroup.freeze")).ok())
            .is_some_and(|text| text.trim() == "1")
    }

    /// All processes, of sub-cgroups too.
    pub fn pids(&self) -> Result<Vec<i32>> {
        if let Some(path) = &self.unified {
            let mut pids = Vec::new();
            collect_pids(path, &mut pids)?;
            pids.sort_unstable();
            return Ok(pids);
        }
        let pids = self.manager.get_all_pids().context("cannot list the container's processes")?;
        Ok(pids.into_iter().map(|pid| pid.as_raw()).collect())
    }

    /// Sends `signal` to every process; SIGKILL reaches frozen ones too.
    pub fn kill_all(&self, signal: i32) -> Result<()> {
        if signal == Signal::SIGKILL as i32
            && let Some(path) = &self.unified
        {
            let kill = path.join("cgroup.kill");
            if kill.exists() {
                return fs::write(&kill, "1").with_context(|| format!("cannot write {}", kill.display()));
            }
        }
        for pid in self.pids()? {
            signal_pid(pid, signal)?;
        }
        Ok(())
    }

    /// Waits until no process is left.
    pub fn wait_empty(&self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            let left: Vec<i32> = self
                .pids()
                .unwrap_or_default()
                .into_iter()
                .filter(|pid| procfs::stat(*pid).is_some_and(|stat| !stat.gone))
                .collect();
            if left.is_empty() {
                return Ok(());
            }
            if Instant::now() >= end {
                bail!("processes {left:?} are still there after SIGKILL");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Removes the cgroup and what is left below it.
    pub fn remove(&self) -> Result<()> {
        self.manager.remove().context("cannot remove the container's cgroup")
    }
}

/// libcgroups' configuration for a specification.
pub fn config(spec: &Spec, id: &str, systemd: bool) -> Result<CgroupConfig> {
    let linux = spec.linux().as_ref().context("config.json lacks linux")?;
    Ok(CgroupConfig {
        cgroup_path: get_cgroup_path(linux.cgroups_path(), id),
        systemd_cgroup: systemd,
        container_name: id.to_owned(),
    })
}

/// Signals one process; one that is gone already is no error.
pub fn signal_pid(pid: i32, signal: i32) -> Result<()> {
    match send_signal(pid, signal) {
        Ok(()) | Err(nix::errno::Errno::ESRCH) => Ok(()),
        Err(err) => Err(err).with_context(|| format!("cannot send signal {signal} to {pid}")),
    }
}

/// kill(2) with a signal number: real-time signals have no name in nix.
#[expect(unsafe_code, reason = "nix knows no real-time signals")]
pub fn send_signal(pid: i32, signal: i32) -> nix::Result<()> {
    // SAFETY: kill takes two integers and touches no memory of ours.
    nix::errno::Errno::result(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Hands the controller down to the cgroup; a failure shows when it is used.
fn enable_rdma(path: &Path) {
    let mut above: Vec<&Path> = path.ancestors().skip(1).take_while(|p| p.starts_with(UNIFIED)).collect();
    above.reverse();
    for dir in above {
        let _ = fs::write(dir.join("cgroup.subtree_control"), "+rdma");
    }
}

fn collect_pids(path: &Path, pids: &mut Vec<i32>) -> Result<()> {
    let text = match fs::read_to_string(path.join("cgroup.procs")) {
        Ok(text) => text,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        // A threaded cgroup lists its processes at its root only.
        Err(err) if err.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        Err(err) => return Err(err).with_context(|| format!("cannot read {}", path.display())),
    };
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_pids(&entry.path(), pids)?;
        }
    }
    Ok(())
}

/// libcgroups has its own nix.
fn libcgroups_pid(pid: i32) -> libcgroups_nix::Pid {
    libcgroups_nix::Pid::from_raw(pid)
}

/// The nix version of libcgroups' interface.
mod libcgroups_nix {
    pub use nix029::unistd::Pid;
}
