//! RDMA device files (and userfaultfd's) in a restored container's /dev. CRIU brings back the
//! files of the host it was dumped on; the devices here have other names and
//! numbers. Those the bundle gives the container here are put beside them, so
//! that its processes can open them.
//!
//! Nothing here fails a restore: a container whose processes got their open
//! files from elsewhere needs none of it, and a migration that does need them
//! looks before it commits.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libcontainer::oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use crate::{memory, rootfs};

/// Makes the bundle's RDMA devices in the mount namespace of `init`, whose
/// tasks stand still.
pub fn adapt(spec: &Spec, init: i32) {
    let root = PathBuf::from(format!("/proc/{init}/root"));
    for device in wanted(spec) {
        if let Err(err) = make(&root, device) {
            eprintln!("{} in the restored container: {err:#}", device.path().display());
        }
    }
}

fn wanted(spec: &Spec) -> impl Iterator<Item = &LinuxDevice> {
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    devices.into_iter().flatten().filter(|device| {
        let ours = device.path().starts_with("/dev/infiniband") || device.path() == Path::new(memory::DEVICE);
        ours && matches!(device.typ(), LinuxDeviceType::C | LinuxDeviceType::U)
    })
}

fn make(root: &Path, device: &LinuxDevice) -> Result<()> {
    let path = rootfs::resolve(root, device.path())?;
    let number = makedev(u64::try_from(device.major())?, u64::try_from(device.minor())?);
    match fs::symlink_metadata(&path) {
        Ok(found) if found.file_type().is_char_device() && found.rdev() == number => return Ok(()),
        Ok(_) => fs::remove_file(&path).context("cannot remove the other host's")?,
        Err(_) => {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
        }
    }
    let mode = device.file_mode().unwrap_or(0o666);
    mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(mode), number).context("cannot make it")?;
    // The umask has a say in mknod.
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    chown(&path, device.uid(), device.gid())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(path: &str) -> Spec {
        let json = format!(
            r#"{{"ociVersion":"1.0.2","linux":{{"devices":[{{"path":"{path}","type":"c","major":1,"minor":3,"fileMode":416}}]}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn only_rdma_devices_are_made() {
        assert_eq!(wanted(&spec("/dev/infiniband/uverbs1")).count(), 1);
        assert_eq!(wanted(&spec("/dev/nvidia0")).count(), 0);
    }

    #[test]
    fn a_missing_node_is_made_inside_the_root_and_another_hosts_is_replaced() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/elsewhere", root.path().join("dev")).unwrap();
        let spec = spec("/dev/infiniband/uverbs1");
        let device = wanted(&spec).next().unwrap();
        let path = root.path().join("elsewhere/infiniband/uverbs1");
        for before in [None, Some("a file in its place")] {
            if let Some(text) = before {
                fs::remove_file(&path).unwrap();
                fs::write(&path, text).unwrap();
            }
            make(root.path(), device).unwrap();
            let made = fs::symlink_metadata(&path).unwrap();
            assert!(made.file_type().is_char_device());
            assert_eq!((made.rdev(), made.mode() & 0o777), (makedev(1, 3), 0o640));
        }
    }
}
