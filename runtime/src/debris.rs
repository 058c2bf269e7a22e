//! Mounts that a CRIU which was killed leaves behind: a view of the cgroups in its work directory, and the root of its
//! mount namespaces below `/tmp`. One that ends by itself takes them down.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

const CGROUPS: &[u8] = b".criu.cgyard.";
const NAMESPACES: &str = "/tmp/.criu.mntns.";

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
    let idle = !criu_runs();
    let wanted = |path: &PathBuf| {
        let cgroups = path.starts_with(dir) && path.components().any(|c| c.as_os_str().as_bytes().starts_with(CGROUPS));
        cgroups || idle && path.as_os_str().as_bytes().starts_with(NAMESPACES.as_bytes())
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

fn criu_runs() -> bool {
    let name = |entry: fs::DirEntry| fs::read_to_string(entry.path().join("comm")).ok();
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(name).any(|comm| comm.trim_end() == "criu")
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
