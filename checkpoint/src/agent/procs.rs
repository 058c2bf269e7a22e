//! Which processes of a container use RDMA, seen from outside: by their open files, not by what they say.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rdma_virt::id::Vpid;

use crate::kcmp::same_file;

/// Major number of uverbs character devices (`IB_UVERBS_MAJOR`; later devices get a dynamic one, found by name).
const UVERBS_MAJOR: u64 = 231;

/// One process of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// In the agent's pid namespace.
    pub pid: i32,
    /// In its own.
    pub vpid: Vpid,
    pub comm: String,
    /// Its descriptors of uverbs files.
    pub verbs: Vec<i32>,
    /// Holds an rdma_cm file.
    pub cm: bool,
}

impl Process {
    /// Whether all uverbs files it holds are `other`'s, as in the child of a fork.
    pub fn shares_verbs_of(&self, other: &Process) -> bool {
        let shared = |fd: &i32| other.verbs.iter().any(|theirs| same_file((self.pid, *fd), (other.pid, *theirs)));
        self.pid != other.pid && self.verbs.iter().all(shared)
    }
}

/// All processes in `cgroup` (v2 directory) and below, except those that ended meanwhile.
pub fn of_cgroup(cgroup: &Path) -> std::io::Result<Vec<Process>> {
    let mut pids = BTreeSet::new();
    collect(cgroup, &mut pids, 0)?;
    Ok(pids.into_iter().filter_map(look).collect())
}

/// Number of `comm` and pid for messages: `ib_write_bw (pid 7)`.
impl std::fmt::Display for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (pid {} in the container, {} on the host)", self.comm, self.vpid.0, self.pid)
    }
}

fn collect(dir: &Path, pids: &mut BTreeSet<i32>, depth: u32) -> std::io::Result<()> {
    let text = match fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => text,
        // A threaded sub-cgroup lists its processes in its parent.
        Err(e) if depth > 0 && e.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => String::new(),
        Err(e) => return Err(e),
    };
    pids.extend(text.lines().filter_map(|l| l.parse::<i32>().ok()).filter(|pid| *pid > 0));
    if depth < 16 {
        for entry in fs::read_dir(dir)?.flatten() {
            if entry.file_type().is_ok_and(|t| t.is_dir()) {
                // A sub-cgroup may go away while we look.
                let _ = collect(&entry.path(), pids, depth + 1);
            }
        }
    }
    Ok(())
}

fn look(pid: i32) -> Option<Process> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    if field(&status, "State").is_some_and(|s| s.starts_with('Z')) {
        return None;
    }
    let (mut verbs, mut cm) = (Vec::new(), false);
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten() {
        let Ok(meta) = fs::metadata(entry.path()) else { continue };
        if !meta.file_type().is_char_device() {
            continue;
        }
        let name = fs::read_link(entry.path()).unwrap_or_default();
        let name = name.to_string_lossy();
        if nix::libc::major(meta.rdev()) as u64 == UVERBS_MAJOR || name.contains("/infiniband/uverbs") {
            verbs.extend(entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()));
        }
        cm |= name.contains("/infiniband/rdma_cm");
    }
    Some(Process {
        pid,
        vpid: inner_pid(&status).unwrap_or(Vpid(pid)),
        comm: field(&status, "Name").unwrap_or("?").to_owned(),
        verbs,
        cm,
    })
}

/// Whether `pid` (in the agent's namespace) is a process that has not ended.
pub fn is_alive(pid: i32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    field(&status, "State").is_some_and(|s| !s.starts_with(['Z', 'X']))
}

/// When a process began, in ticks since the host was started: with its pid it tells the process from any other.
pub fn began(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Its name is in parentheses, and may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

/// The pid a process has in its own namespace.
pub fn vpid_of(pid: i32) -> Option<Vpid> {
    inner_pid(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)
}

fn inner_pid(status: &str) -> Option<Vpid> {
    field(status, "NSpid")?.split_whitespace().next_back()?.parse().ok().map(Vpid)
}

/// The line of this name in a `/proc/PID/status`.
pub fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// Whether `pid` lives in `cgroup` or below. `cgroup` is an absolute directory under `/sys/fs/cgroup`.
pub fn in_cgroup(pid: i32, cgroup: &Path) -> bool {
    let Ok(relative) = cgroup.strip_prefix("/sys/fs/cgroup") else { return false };
    let wanted = Path::new("/").join(relative);
    fs::read_to_string(format!("/proc/{pid}/cgroup"))
        .unwrap_or_default()
        .lines()
        .filter_map(|l| l.strip_prefix("0::"))
        .any(|path| Path::new(path).starts_with(&wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen_with_its_name_and_without_devices() {
        let pid = std::process::id() as i32;
        let me = look(pid).unwrap();
        assert!(!me.comm.is_empty() && me.verbs.is_empty() && !me.cm);
        assert_eq!(vpid_of(pid), Some(me.vpid));
        assert!(is_alive(pid));
    }

    #[test]
    fn a_process_began_after_the_one_that_started_it() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (parent, child_began) = (began(std::process::id() as i32), began(child.id() as i32));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(parent.is_some() && child_began >= parent, "{parent:?} {child_began:?}");
        assert_eq!(began(child.id() as i32), None);
    }

    #[test]
    fn a_process_that_ended_and_was_not_waited_for_is_not_alive() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while is_alive(pid) {
            assert!(std::time::Instant::now() < until, "`true` has not ended");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }
}
