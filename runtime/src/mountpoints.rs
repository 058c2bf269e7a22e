//! Mount points CRIU will need in the root file system before it mounts there.
//!
//! At the dump they existed because the creating runtime made them; another
//! host's copy of the root file system may lack them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use libcontainer::oci_spec::runtime::{Mount, Spec};
use libcontainer::rootfs::utils::is_bind;

use crate::rootfs;

/// Makes what is missing. A mount point inside another bind mount is made in
/// that mount's source; one inside a tmpfs comes back with what lies in it.
pub fn make(spec: &Spec, root: &Path) -> Result<()> {
    let mounts: Vec<&Mount> = spec.mounts().iter().flatten().collect();
    for (n, mount) in mounts.iter().enumerate() {
        if mount.typ().as_deref() == Some("cgroup") {
            // Its mount point is below /sys, which the kernel fills.
            continue;
        }
        let Some((base, rest)) = host_place(root, &mounts[..n], mount.destination())? else {
            continue;
        };
        let place = rootfs::resolve(&base, &rest)?;
        rootfs::make_mount_point(&place, is_directory(mount))?;
    }
    Ok(())
}

/// The directory on the host a destination lies in, with the rest of its
/// path; `None` when an earlier mount there is none of the host's files.
fn host_place(root: &Path, earlier: &[&Mount], destination: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let inside = rootfs::resolve_inside(root, destination)?;
    let mut best: Option<(&Mount, PathBuf)> = None;
    for mount in earlier {
        let at = rootfs::resolve_inside(root, mount.destination())?;
        let covers = inside.starts_with(&at) && inside != at;
        if covers && best.as_ref().is_none_or(|(_, old)| at.starts_with(old)) {
            best = Some((mount, at));
        }
    }
    Ok(match best {
        None => Some((root.to_owned(), inside)),
        Some((mount, at)) if is_bind(mount) => {
            let rest = inside.strip_prefix(&at).unwrap_or(&inside).to_owned();
            mount.source().clone().map(|source| (source, rest))
        }
        Some(_) => None,
    })
}

fn is_directory(mount: &Mount) -> bool {
    if !is_bind(mount) {
        return true;
    }
    mount.source().as_ref().is_none_or(|source| source.is_dir())
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::MountBuilder;

    fn mount(destination: &str, source: Option<&Path>) -> Mount {
        let mut builder = MountBuilder::default().destination(destination);
        builder = match source {
            Some(source) => builder.typ("bind").source(source).options(vec!["bind".to_owned()]),
            None => builder.typ("tmpfs").source("tmpfs").options(vec![]),
        };
        builder.build().unwrap()
    }

    #[test]
    fn points_are_made_in_the_root_and_in_outer_binds_but_not_in_a_tmpfs() {
        let dir = tempfile::tempdir().unwrap();
        let (root, data, file) = (dir.path().join("root"), dir.path().join("data"), dir.path().join("file"));
        std::fs::create_dir(&root).unwrap();
        std::fs::create_dir(&data).unwrap();
        std::fs::write(&file, "x").unwrap();
        let mut spec = Spec::default();
        spec.set_mounts(Some(vec![
            mount("/data", Some(&data)),
            mount("/data/inner", Some(&file)),
            mount("/run", None),
            mount("/run/x", Some(&file)),
            mount("/etc/conf", Some(&file)),
        ]));
        make(&spec, &root).unwrap();
        assert!(root.join("data").is_dir());
        assert!(data.join("inner").is_file());
        assert!(root.join("run").is_dir() && !root.join("run/x").exists());
        assert!(root.join("etc/conf").is_file());
    }
}
