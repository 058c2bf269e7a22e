//! Taking the container's rights: after [`take`] this process can ask the RDMA subsystem for no more than the
//! container itself could. The order matters: joining a cgroup and lowering limits need root, so capabilities go last.

use super::proto::Rights;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use std::fs;
use std::str::FromStr;

impl Rights {
    /// The rights this process has now.
    pub fn current() -> Self {
        let caps = caps::read(None, CapSet::Effective).unwrap_or_default();
        Self {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
            groups: nix::unistd::getgroups().unwrap_or_default().into_iter().map(Gid::as_raw).collect(),
            caps: caps.into_iter().map(|cap| cap.to_string()).collect(),
            memlock: None,
            cgroup: None,
        }
    }
}

/// Gives up everything the container does not have. On an error the process is in between and has to exit.
pub fn take(rights: &Rights) -> Result<(), String> {
    if let Some(dir) = &rights.cgroup {
        let procs = dir.join("cgroup.procs");
        fs::write(&procs, "0")
            .map_err(|e| format!("cannot join the container's cgroup through {}: {e}", procs.display()))?;
    }
    if let Some((soft, hard)) = rights.memlock {
        setrlimit(Resource::RLIMIT_MEMLOCK, soft, hard)
            .map_err(|e| format!("cannot set RLIMIT_MEMLOCK to {soft} of {hard} bytes: {e}"))?;
    }
    let mut wanted = CapsHashSet::new();
    for name in &rights.caps {
        let cap = Capability::from_str(name).map_err(|_| format!("capability {name} is not known here"))?;
        wanted.insert(cap);
    }
    let had = caps::read(None, CapSet::Permitted).map_err(|e| format!("cannot read capabilities: {e}"))?;
    // What nobody gave us we cannot pass on; a container with more rights than its agent does not exist.
    let wanted: CapsHashSet = wanted.intersection(&had).copied().collect();

    let changes_user = Uid::effective().as_raw() != rights.uid;
    if changes_user {
        caps::securebits::set_keepcaps(true).map_err(|e| format!("cannot keep capabilities: {e}"))?;
    }
    if Uid::effective().is_root() {
        let groups: Vec<Gid> = rights.groups.iter().copied().map(Gid::from_raw).collect();
        setgroups(&groups).map_err(|e| format!("cannot set groups: {e}"))?;
    }
    if nix::unistd::Gid::effective().as_raw() != rights.gid {
        setgid(Gid::from_raw(rights.gid)).map_err(|e| format!("cannot become group {}: {e}", rights.gid))?;
    }
    if changes_user {
        setuid(Uid::from_raw(rights.uid)).map_err(|e| format!("cannot become user {}: {e}", rights.uid))?;
    }
    let set = |which, caps: &CapsHashSet| {
        caps::set(None, which, caps).map_err(|e| format!("cannot set {which:?} capabilities: {e}"))
    };
    set(CapSet::Effective, &wanted)?;
    set(CapSet::Permitted, &wanted)?;
    set(CapSet::Inheritable, &CapsHashSet::new())?;
    nix::sys::prctl::set_no_new_privs().map_err(|e| format!("cannot set no_new_privs: {e}"))
}
