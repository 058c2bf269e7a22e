//! Mounts that a CRIU which was killed leaves behind: a view of the cgroups in its work directory, and the root of its
//! mount namespaces below `/tmp`. One that ends by itself takes them down.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::procfs;

const CGROUPS: &[u8] = b".criu.cgyard.";
const NAMESPACES: &str = "/tmp/.criu.mntns.";

/// For the processes of a CRIU that was killed.
const PATIENCE: Duration = Duration::from_secs(3);

/// As [`sweep`], unless a CRIU runs: one whose monitor outlived the agent works below `dir`.
pub fn sweep_if_idle(dir: &Path) {
    if !criu_runs() {
        sweep(dir);
    }
}

/// Takes down what lies in `dir`, or below it: the caller knows that its CRIU is no more. And what no CRIU that runs can be
/// using. Best effort: what stays is in nobody's way.
pub fn sweep(dir: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let namespaces = |path: &PathBuf| path.as_os_str().as_bytes().starts_with(NAMESPACES.as_bytes());
    let idle = !points(&mounts).any(|path| namespaces(&path)) || becomes_idle();
    let wanted = |path: &PathBuf| {
        let cgroups = path.starts_with(dir) && path.components().any(|c| c.as_os_str().as_bytes().starts_with(CGROUPS));
        cgroups || idle && namespaces(path)
    };
    let found: Vec<PathBuf> = points(&mounts).filter(wanted).collect();
    // The innermost first.
    for point in found.iter().rev() {
        let _ = umount2(point, MntFlags::MNT_DETACH);
    }
    for point in found.iter().rev() {
        let _ = fs::remove_dir(point);
    }
}

/// Mount points in the order they were made; those with blanks in their names are not CRIU's.
fn points(mountinfo: &str) -> impl Iterator<Item = PathBuf> + '_ {
    mountinfo.lines().filter_map(|line| Some(PathBuf::from(line.split(' ').nth(4)?)))
}

/// The children of one that was killed are on their way out.
fn becomes_idle() -> bool {
    let end = Instant::now() + PATIENCE;
    loop {
        match criu_runs() {
            false => return true,
            true if Instant::now() >= end => return false,
            true => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn criu_runs() -> bool {
    let is_criu =
        |pid: i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim_end() == "criu");
    // One that has ended and was not waited for yet has nothing mounted any more.
    let lives = |pid: i32| procfs::stat(pid).is_some_and(|stat| !stat.gone);
    let pid = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<i32>().ok();
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(pid).any(|pid| is_criu(pid) && lives(pid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_in_order() {
        let text =
            "21 1 254:0 / / rw - ext4 /dev/vda rw\n90 21 0:42 / /x/work/.criu.cgyard.a1/unified rw - cgroup2 none rw\n";
        let found: Vec<PathBuf> = points(text).collect();
        assert_eq!(found, [PathBuf::from("/"), PathBuf::from("/x/work/.criu.cgyard.a1/unified")]);
    }
}
