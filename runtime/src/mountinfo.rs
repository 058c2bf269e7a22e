//! The mounts a process has, as `/proc/PID/mountinfo` lists them. It reads; what a mount means is its callers' business.

use std::fs;

use anyhow::{Context, Result};

/// All mounts of one process, in the order they were made, as they were when it was read.
#[derive(Debug)]
pub struct Mounts(String);

/// One of them. Blanks and backslashes in names are escaped, as the kernel writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mount<'a> {
    /// What `mnt_id` in fdinfo says of files opened through it.
    pub id: u64,
    /// Major and minor number of its file system.
    pub dev: &'a str,
    /// What of the file system is mounted.
    pub root: &'a str,
    /// Where, seen from the process' root.
    pub at: &'a str,
    /// Type of the file system.
    pub kind: &'a str,
    /// Options of the file system, in the kernel's words.
    pub options: &'a str,
}

impl Mounts {
    /// Those of a process.
    pub fn of(pid: i32) -> Result<Mounts> {
        let path = format!("/proc/{pid}/mountinfo");
        fs::read_to_string(&path).map(Mounts).with_context(|| format!("cannot read {path}"))
    }

    /// Those of this process; none where they cannot be read.
    pub fn own() -> Mounts {
        Mounts(fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
    }

    #[cfg(test)]
    pub fn from_text(text: &str) -> Mounts {
        Mounts(text.to_owned())
    }

    /// One after the other. A line that is not understood is left out.
    pub fn iter(&self) -> impl Iterator<Item = Mount<'_>> {
        self.0.lines().filter_map(parse)
    }
}

fn parse(line: &str) -> Option<Mount<'_>> {
    // The number of fields before the dash differs.
    let (left, right) = line.split_once(" - ")?;
    let mut left = left.split(' ');
    let id = left.next()?.parse().ok()?;
    let _parent = left.next()?;
    let (dev, root, at) = (left.next()?, left.next()?, left.next()?);
    let mut right = right.split(' ');
    Some(Mount { id, dev, root, at, kind: right.next()?, options: right.nth(1)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_any_number_of_optional_fields_and_others_are_left_out() {
        let text = "21 1 254:0 / / rw - ext4 /dev/vda rw\n\nnonsense\n\
                    90 21 0:42 /part /x/.criu.cgyard.a1/unified rw shared:3 master:1 - cgroup2 none rw,nsdelegate\n";
        let mounts = Mounts::from_text(text);
        let all: Vec<Mount<'_>> = mounts.iter().collect();
        let [root, other] = all.as_slice() else { panic!("{all:?}") };
        assert_eq!((root.id, root.at, root.kind), (21, "/", "ext4"));
        let whole = Mount {
            id: 90,
            dev: "0:42",
            root: "/part",
            at: "/x/.criu.cgyard.a1/unified",
            kind: "cgroup2",
            options: "rw,nsdelegate",
        };
        assert_eq!(*other, whole);
        assert!(Mounts::own().iter().any(|mount| mount.at == "/"));
    }
}
