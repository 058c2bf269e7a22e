//! A container's stdin, stdout and stderr across a checkpoint.
//!
//! They lead out of the container, so CRIU must be told which they are when
//! dumping and be handed replacements when restoring. `descriptors.json` in
//! the image directory is the list, in runc's form: one string each, of which
//! `pipe:[INODE]` is inherited. A file or /dev/null from outside the container is
//! added as `file[MNT:INODE]`, CRIU's key for it, which runc ignores.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Result, bail};

use crate::mountinfo::Mounts;
use crate::procfs;
use crate::store;

/// Name of the list in the image directory.
pub const DESCRIPTORS: &str = "descriptors.json";

/// What fds 0 to 2 of a process refer to, as the kernel words it.
pub fn links(pid: i32) -> Vec<String> {
    (0..3).map(|n| procfs::fd_link(pid, n).unwrap_or_else(|| "/dev/null".into())).collect()
}

/// The list for a dump: keys for inheritable descriptors, the link otherwise.
pub fn keys(pid: i32) -> Vec<String> {
    (0..3)
        .map(|n| outside_file(pid, n).or_else(|| procfs::fd_link(pid, n)).unwrap_or_else(|| "/dev/null".into()))
        .collect()
}

/// Keys among `keys` that CRIU must be told are external.
pub fn external(keys: &[String]) -> impl Iterator<Item = &String> {
    keys.iter().filter(|key| key.starts_with("file["))
}

/// /dev/null and its like, which CRIU treats as files.
fn is_memory_device(meta: &fs::Metadata) -> bool {
    const MEM_MAJOR: u64 = 1;
    meta.file_type().is_char_device() && nix::sys::stat::major(meta.rdev()) == MEM_MAJOR
}

/// CRIU's key of a file that lies on none of the process' own mounts.
fn outside_file(pid: i32, n: i32) -> Option<String> {
    let meta = fs::metadata(format!("/proc/{pid}/fd/{n}")).ok()?;
    if !meta.is_file() && !is_memory_device(&meta) {
        return None;
    }
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{n}")).ok()?;
    let mount: u64 = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse().ok()?;
    let own = Mounts::of(pid).ok()?.iter().any(|own| own.id == mount);
    (!own).then(|| format!("file[{mount:x}:{:x}]", meta.ino()))
}

/// Writes the list beside CRIU's images.
pub fn write(image_dir: &Path, keys: &[String]) -> Result<()> {
    store::write_json(&image_dir.join(DESCRIPTORS), &keys)
}

/// The keys to inherit on restore with their descriptor numbers.
pub fn inheritable(image_dir: &Path) -> Result<Vec<(String, usize)>> {
    let path = image_dir.join(DESCRIPTORS);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let keys: Vec<String> = store::read_json(&path)?;
    if keys.len() > 3 {
        bail!("{} lists {} descriptors, not 3", path.display(), keys.len());
    }
    Ok(keys
        .into_iter()
        .enumerate()
        .filter(|(_, key)| key.contains("pipe:[") || key.starts_with("file["))
        .map(|(n, key)| (key, n))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_and_outside_files_are_inherited_others_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let list = ["/dev/null", "pipe:[77]", "file[2f:1a]"].map(String::from);
        write(dir.path(), &list).unwrap();
        assert_eq!(inheritable(dir.path()).unwrap(), [("pipe:[77]".to_owned(), 1), ("file[2f:1a]".to_owned(), 2)]);
        assert_eq!(external(&list).collect::<Vec<_>>(), ["file[2f:1a]"]);
    }

    #[test]
    fn a_malformed_list_is_refused_and_a_missing_one_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        assert!(inheritable(dir.path()).unwrap().is_empty());
        fs::write(dir.path().join(DESCRIPTORS), "[1,2").unwrap();
        assert!(inheritable(dir.path()).is_err());
    }

    #[test]
    fn this_process_own_files_are_not_outside() {
        let file = tempfile::tempfile().unwrap();
        let n = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert_eq!(outside_file(std::process::id() as i32, n), None);
    }
}
