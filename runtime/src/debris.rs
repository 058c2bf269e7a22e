//! Mounts that a CRIU which was killed leaves behind: a view of the cgroups in its work directory, and the root of its
//! mount namespaces below `/tmp`. One that ends by itself takes them down.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};

use crate::mountinfo::Mounts;
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
    // In the order they were made; one with blanks in its name is not CRIU's.
    let points: Vec<PathBuf> = Mounts::own().iter().map(|mount| PathBuf::from(mount.at)).collect();
    let namespaces = |path: &PathBuf| path.as_os_str().as_bytes().starts_with(NAMESPACES.as_bytes());
    let idle = !points.iter().any(namespaces) || becomes_idle();
    let wanted = |path: &PathBuf| {
        let cgroups = path.starts_with(dir) && path.components().any(|c| c.as_os_str().as_bytes().starts_with(CGROUPS));
        cgroups || idle && namespaces(path)
    };
    let found: Vec<&PathBuf> = points.iter().filter(|path| wanted(path)).collect();
    // The innermost first.
    for point in found.iter().rev() {
        let _ = umount2(point.as_path(), MntFlags::MNT_DETACH);
    }
    for point in found.iter().rev() {
        let _ = fs::remove_dir(point);
    }
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
