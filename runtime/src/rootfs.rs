//! Paths inside a container's root file system, followed from the host.
//!
//! An image may hold any symbolic link: every step is resolved as the
//! container would, so that nothing outside the root is ever reached.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};

const MAX_LINKS: usize = 64;

/// Where `path` of the container lies on the host. What does not exist yet is
/// taken as it is written.
pub fn resolve(root: &Path, path: &Path) -> Result<PathBuf> {
    Ok(root.join(resolve_inside(root, path)?))
}

/// Like [`resolve`], as the container sees it, without the leading slash.
pub fn resolve_inside(root: &Path, path: &Path) -> Result<PathBuf> {
    let mut inside = PathBuf::new();
    let mut todo: VecDeque<OsString> = names(path);
    let mut links = 0;
    while let Some(name) = todo.pop_front() {
        if name == ".." {
            inside.pop();
            continue;
        }
        let next = inside.join(&name);
        match fs::read_link(root.join(&next)) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    bail!("too many symbolic links in {}", path.display());
                }
                if target.is_absolute() {
                    inside = PathBuf::new();
                }
                for name in names(&target).into_iter().rev() {
                    todo.push_front(name);
                }
            }
            Err(_) => inside = next,
        }
    }
    Ok(inside)
}

fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// Makes a mount point: a directory, or an empty file, with its parents.
pub fn make_mount_point(path: &Path, directory: bool) -> Result<()> {
    if path.symlink_metadata().is_ok() {
        return Ok(());
    }
    let make = || -> std::io::Result<()> {
        if directory {
            return fs::create_dir_all(path);
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::OpenOptions::new().create(true).append(true).open(path).map(drop)
    };
    make().with_context(|| format!("cannot make the mount point {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_never_lead_out_of_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../../etc", root.join("escape")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let at = |path: &str| resolve_inside(root, Path::new(path)).unwrap();
        assert_eq!(at("/var/run/lock"), Path::new("run/lock"));
        assert_eq!(at("/escape/passwd"), Path::new("etc/passwd"));
        assert_eq!(at("/../../x"), Path::new("x"));
        assert!(resolve_inside(root, Path::new("/loop/x")).is_err());
    }
}
