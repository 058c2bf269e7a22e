//! Device files that were handed to a container from outside: after a move its RDMA device is open through a mount of
//! the host, which CRIU does not find among the container's. Named as external here, they are left to the plugin.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::mountinfo::Mounts;

/// Names in CRIU's form of all character devices that these processes hold through a mount they do not have.
pub fn externals(pids: &[i32]) -> BTreeSet<String> {
    pids.iter().flat_map(|pid| of_process(*pid)).collect()
}

fn of_process(pid: i32) -> Vec<String> {
    let mounts: BTreeSet<u64> =
        Mounts::of(pid).map(|mounts| mounts.iter().map(|mount| mount.id).collect()).unwrap_or_default();
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return Vec::new() };
    files
        .flatten()
        .filter_map(|file| {
            let meta = fs::metadata(file.path()).ok().filter(|m| m.file_type().is_char_device())?;
            let number = file.file_name().into_string().ok()?;
            let mount = mount_of(&fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?)?;
            (!mounts.contains(&mount)).then(|| format!("file[{mount:x}:{:x}]", meta.ino()))
        })
        .collect()
}

fn mount_of(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_opened_here_is_not_external() {
        let _null = fs::File::open("/dev/null").unwrap();
        assert!(externals(&[std::process::id() as i32]).is_empty());
        assert_eq!(mount_of("pos:\t0\nflags:\t02\nmnt_id:\t25\n"), Some(25));
    }
}
