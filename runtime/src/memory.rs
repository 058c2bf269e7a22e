//! A place in a container where the shim can put registered memory, so that it can be moved while the container runs:
//! a directory of one tmpfs of this host, and the device through which a process takes memory out from under its own
//! threads.
//!
//! | in the container | on the host | |
//! |---|---|---|
//! | [`MEMORY_DIR`] | `/run/migrrdma-agent/memory/ID/` | one file for each range of memory |
//! | `/dev/userfaultfd` | the same | may be opened by everybody |
//!
//! What the files mean is not known here.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libcontainer::oci_spec::runtime::{
    LinuxDeviceBuilder, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxResourcesBuilder, Mount, Spec,
};
use nix::mount::{MsFlags, mount};

use crate::inject;

/// Annotation that says where registered memory lies: `files` or `private`.
pub const ANNOTATION: &str = "org.migrrdma.registered-memory";
/// The directory inside a container.
pub const MEMORY_DIR: &str = "/run/.migrrdma-memory";
/// The device, in the container and on the host.
pub const DEVICE: &str = "/dev/userfaultfd";

/// Whether this container's registered memory shall lie in files.
pub fn wanted(spec: &Spec) -> Result<bool> {
    let annotation = spec.annotations().as_ref().and_then(|all| all.get(ANNOTATION));
    match annotation.map(String::as_str) {
        Some("files") => Ok(true),
        Some("private") | None => Ok(false),
        Some(other) => bail!("annotation {ANNOTATION} is {other:?}; it must be files or private"),
    }
}

/// Puts the directory and the device into `spec`. A host without the device leaves registered memory where it is.
pub fn give(spec: &mut Spec, dir: &Path) -> Result<Option<Mount>> {
    let Ok(device) = fs::metadata(DEVICE) else {
        return Ok(None);
    };
    if !device.file_type().is_char_device() {
        return Ok(None);
    }
    let (major, minor) = (nix::sys::stat::major(device.rdev()), nix::sys::stat::minor(device.rdev()));
    let (major, minor) = (i64::try_from(major)?, i64::try_from(minor)?);
    let mut linux = spec.linux().clone().context("config.json lacks linux")?;
    let mut devices = linux.devices().clone().unwrap_or_default();
    if !devices.iter().any(|d| d.path() == Path::new(DEVICE)) {
        let node = LinuxDeviceBuilder::default()
            .path(DEVICE)
            .typ(LinuxDeviceType::C)
            .major(major)
            .minor(minor)
            .file_mode(0o666u32)
            .uid(0u32)
            .gid(0u32);
        devices.push(node.build()?);
    }
    linux.set_devices(Some(devices));
    let mut resources = match linux.resources() {
        Some(resources) => resources.clone(),
        None => LinuxResourcesBuilder::default().build()?,
    };
    let mut rules = resources.devices().clone().unwrap_or_default();
    let rule = LinuxDeviceCgroupBuilder::default().allow(true).typ(LinuxDeviceType::C).major(major).minor(minor);
    rules.push(rule.access("rw").build()?);
    resources.set_devices(Some(rules));
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    make_dir(dir)?;
    inject::bind(dir, MEMORY_DIR, &["rw", "noexec"]).map(Some)
}

/// Makes a container's directory, and the tmpfs it lies on if this is the first.
pub fn make_dir(dir: &Path) -> Result<()> {
    let top = dir.parent().context("a directory of memory files needs one above it")?;
    mount_tmpfs(top)?;
    match fs::create_dir(dir) {
        Err(err) if err.kind() != io::ErrorKind::AlreadyExists => {
            return Err(err).with_context(|| format!("cannot make {}", dir.display()));
        }
        _ => {}
    }
    // Whoever a process of the container is, it may keep its own memory here.
    fs::set_permissions(dir, fs::Permissions::from_mode(0o1777))
        .with_context(|| format!("cannot open {} to the container", dir.display()))
}

/// Its size is that of all memory: what lies there is charged to the containers, and their limits hold.
pub fn mount_tmpfs(top: &Path) -> Result<()> {
    fs::create_dir_all(top).with_context(|| format!("cannot make {}", top.display()))?;
    let beside = top.with_extension("lock");
    let file = fs::File::create(&beside).with_context(|| format!("cannot make {}", beside.display()))?;
    let _lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {}", beside.display()))?;
    if is_mounted(top)? {
        return Ok(());
    }
    let options = Some("size=100%,nr_inodes=0,mode=0711");
    mount(Some("migrrdma-memory"), top, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, options)
        .with_context(|| format!("cannot mount a tmpfs at {}", top.display()))
}

fn is_mounted(dir: &Path) -> Result<bool> {
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev());
    let above = dir.parent().map(PathBuf::from).unwrap_or_default();
    Ok(device(dir)? != device(&above)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(annotation: Option<&str>) -> Spec {
        let mut spec = Spec::default();
        spec.set_annotations(annotation.map(|text| [(ANNOTATION.to_owned(), text.to_owned())].into()));
        spec
    }

    #[test]
    fn the_annotation_decides() {
        assert!(!wanted(&spec(None)).unwrap());
        assert!(wanted(&spec(Some("files"))).unwrap());
        assert!(!wanted(&spec(Some("private"))).unwrap());
        assert!(wanted(&spec(Some("yes"))).unwrap_err().to_string().contains("files or private"));
    }

    #[test]
    fn the_tmpfs_is_mounted_once_and_the_container_may_write_to_its_directory() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("memory");
        for id in ["one", "two", "one"] {
            make_dir(&top.join(id)).unwrap();
        }
        assert!(is_mounted(&top).unwrap());
        assert_eq!(fs::metadata(top.join("two")).unwrap().mode() & 0o7777, 0o1777);
        nix::mount::umount(&top).unwrap();
        assert!(!is_mounted(&top).unwrap(), "there was one mount");
    }

    #[test]
    fn a_container_gets_the_directory_and_the_device() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("memory");
        let mut spec = Spec::default();
        let mount = give(&mut spec, &top.join("one")).unwrap().expect("this host has the device");
        nix::mount::umount(&top).unwrap();
        assert_eq!(mount.destination(), Path::new(MEMORY_DIR));
        let linux = spec.linux().clone().unwrap();
        assert!(linux.devices().iter().flatten().any(|d| d.path() == Path::new(DEVICE)));
        let rules = linux.resources().clone().unwrap().devices().clone().unwrap();
        assert!(rules.last().is_some_and(|rule| rule.allow() && rule.access().as_deref() == Some("rw")));
    }
}
