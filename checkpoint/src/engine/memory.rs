//! Registered memory that arrives: files equal to those of the source, in the directory that the container will see.
//! Blocks are written into them in place, because a NIC may hold them already.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::blocks::BLOCK;
use crate::agent::{chain, is_plain_name, lock};
use crate::net::msg::{MemoryBlocks, MemoryFile, Order, PIECE};

/// As many as a source sends.
const MOST: usize = 1 << 16;

/// As many as are written at once.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Room over the source's estimate, bytes.
const SLACK: u64 = 1 << 30;

/// Something about the arriving memory is wrong.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("{0:?} is no name for a file of memory")]
    Name(String),
    #[error("{0} files of memory are more than a container has")]
    Many(usize),
    #[error("blocks of {0}, which was not announced, or blocks that are not in it")]
    Blocks(String),
    #[error("registered memory is larger than {limit} bytes, far more than was announced")]
    TooBig { limit: u64 },
    #[error("{0} is no order about memory")]
    Turn(&'static str),
}

/// The files of one container to come.
#[derive(Debug)]
pub struct Memory {
    dir: PathBuf,
    files: BTreeMap<String, (MemoryFile, File)>,
    limit: u64,
}

/// The memory of one migration. Its blocks come also while the rest of the container is restored, so whoever brings them
/// needs nothing but this.
#[derive(Clone, Debug, Default)]
pub struct Incoming(Arc<Mutex<Option<Memory>>>);

impl Incoming {
    /// Which files there are; `begin` makes the place for them.
    pub fn announce(&self, order: Order, begin: impl FnOnce() -> Result<Memory, String>) -> Result<(), String> {
        let mut memory = lock(&self.0);
        let memory = match &mut *memory {
            Some(memory) => memory,
            none => none.insert(begin()?),
        };
        memory.take(order).map_err(|e| chain(&e))
    }

    /// Blocks of files that were announced to this agent: one that was started since knows of none.
    pub fn blocks(&self, order: Order) -> Result<(), String> {
        let mut memory = lock(&self.0);
        let memory = memory.as_mut().ok_or("blocks of memory that nobody announced here, or that runs already")?;
        memory.take(order).map_err(|e| chain(&e))
    }

    /// From now on nothing is written any more. Whether there was anything.
    pub fn close(&self) -> bool {
        lock(&self.0).take().is_some()
    }
}

impl Memory {
    /// In a directory that exists; what lies there from earlier goes.
    pub fn begin(dir: PathBuf, expected: u64) -> Result<Self, MemoryError> {
        let wrap = |source| MemoryError::Write { path: dir.clone(), source };
        for entry in fs::read_dir(&dir).map_err(wrap)? {
            fs::remove_file(entry.map_err(wrap)?.path()).map_err(wrap)?;
        }
        Ok(Memory { dir, files: BTreeMap::new(), limit: expected.saturating_mul(2).saturating_add(SLACK) })
    }

    pub fn take(&mut self, order: Order) -> Result<(), MemoryError> {
        match order {
            Order::Memory { files } => self.announce(files),
            Order::Blocks(blocks) => {
                if blocks.iter().map(|b| b.bytes.len()).sum::<usize>() > PIECE + BLOCK {
                    return Err(MemoryError::Turn("a piece that is too long"));
                }
                blocks.iter().try_for_each(|b| self.write(b))?;
                self.check_size()
            }
            other => Err(MemoryError::Turn(other.name())),
        }
    }

    /// Makes the files that are missing, and removes those that are not there any more or have become others.
    fn announce(&mut self, files: Vec<MemoryFile>) -> Result<(), MemoryError> {
        if files.len() > MOST {
            return Err(MemoryError::Many(files.len()));
        }
        let stale: Vec<String> =
            self.files.iter().filter(|(_, (known, _))| !files.contains(known)).map(|(name, _)| name.clone()).collect();
        for name in stale {
            self.files.remove(&name);
            let path = self.dir.join(&name);
            fs::remove_file(&path).map_err(|source| MemoryError::Write { path, source })?;
        }
        for wanted in files {
            if self.files.contains_key(&wanted.name) {
                continue;
            }
            if !is_plain_name(&wanted.name) {
                return Err(MemoryError::Name(wanted.name));
            }
            let path = self.dir.join(&wanted.name);
            let file = make(&path, &wanted).map_err(|source| MemoryError::Write { path, source })?;
            self.files.insert(wanted.name.clone(), (wanted, file));
        }
        Ok(())
    }

    fn write(&self, blocks: &MemoryBlocks) -> Result<(), MemoryError> {
        let bad = || MemoryError::Blocks(blocks.file.clone());
        let (known, file) = self.files.get(&blocks.file).ok_or_else(bad)?;
        let end = known.len.div_ceil(BLOCK as u64);
        let place = |(first, count): (u32, u32)| -> Result<(u64, usize), MemoryError> {
            let first = blocks.first.checked_add(first.into()).ok_or_else(bad)?;
            let past = first.checked_add(count.into()).filter(|past| *past <= end);
            past.map(|_| (first * BLOCK as u64, count as usize * BLOCK)).ok_or_else(bad)
        };
        let wrap = |source| MemoryError::Write { path: self.dir.join(&blocks.file), source };
        let mut bytes = blocks.bytes.as_slice();
        for run in &blocks.runs {
            let (at, len) = place(*run)?;
            let (these, rest) = bytes.split_at_checked(len).ok_or_else(bad)?;
            file.write_all_at(these, at).map_err(wrap)?;
            bytes = rest;
        }
        for run in &blocks.zeros {
            let (at, len) = place(*run)?;
            // Not by a hole: it would take the page away from whoever holds it.
            for done in (0..len).step_by(ZEROS.len()) {
                let these = &ZEROS[..ZEROS.len().min(len - done)];
                file.write_all_at(these, at + done as u64).map_err(wrap)?;
            }
        }
        if bytes.is_empty() { Ok(()) } else { Err(bad()) }
    }

    fn check_size(&self) -> Result<(), MemoryError> {
        let held = |(_, file): &(MemoryFile, File)| file.metadata().map_or(0, |meta| meta.blocks() * 512);
        let limit = self.limit;
        if self.files.values().map(held).sum::<u64>() > limit { Err(MemoryError::TooBig { limit }) } else { Ok(()) }
    }
}

fn make(path: &Path, wanted: &MemoryFile) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.set_len(wanted.len)?;
    fchown(&file, Some(wanted.uid), Some(wanted.gid))?;
    file.set_permissions(fs::Permissions::from_mode(wanted.mode & 0o777))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, id: u64, blocks: u64) -> MemoryFile {
        MemoryFile { name: name.into(), id, len: blocks * BLOCK as u64, mode: 0o600, uid: 0, gid: 0 }
    }

    fn blocks(file: &str, runs: &[(u32, u32)], zeros: &[(u32, u32)], byte: u8) -> Order {
        let count: u32 = runs.iter().map(|(_, n)| n).sum();
        let bytes = vec![byte; count as usize * BLOCK];
        Order::Blocks(vec![MemoryBlocks { file: file.into(), first: 0, runs: runs.into(), zeros: zeros.into(), bytes }])
    }

    #[test]
    fn files_come_and_go_with_the_source_and_blocks_are_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("old"), "x").unwrap();
        let mut memory = Memory::begin(dir.path().into(), 0).unwrap();
        let names = || {
            let mut all: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
            all.sort();
            all
        };
        assert!(names().is_empty());
        memory.take(Order::Memory { files: vec![file("7.1", 1, 4), file("7.2", 2, 1 << 28)] }).unwrap();
        memory.take(blocks("7.1", &[(1, 2)], &[], 5)).unwrap();
        let inode = fs::metadata(dir.path().join("7.1")).unwrap().ino();
        memory.take(Order::Memory { files: vec![file("7.1", 1, 4)] }).unwrap();
        memory.take(blocks("7.1", &[(3, 1)], &[(1, 1)], 6)).unwrap();
        assert_eq!(names(), ["7.1"]);
        let path = dir.path().join("7.1");
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode, "the same file");
        let content = fs::read(&path).unwrap();
        assert_eq!(content.chunks(BLOCK).map(|b| b[17]).collect::<Vec<_>>(), [0, 0, 5, 6]);
        memory.take(Order::Memory { files: vec![file("7.1", 9, 4)] }).unwrap();
        assert_eq!(fs::read(&path).unwrap(), vec![0; 4 * BLOCK], "a file that is another one begins anew");
    }

    #[test]
    fn blocks_are_written_from_the_announcement_until_the_container_runs() {
        let dir = tempfile::tempdir().unwrap();
        let incoming = Incoming::default();
        let write = |byte| incoming.blocks(blocks("7.1", &[(0, 1)], &[], byte));
        assert!(write(5).unwrap_err().contains("nobody announced"));
        let files = Order::Memory { files: vec![file("7.1", 1, 1)] };
        incoming.announce(files, || Ok(Memory::begin(dir.path().into(), 0).unwrap())).unwrap();
        write(6).unwrap();
        assert!(incoming.close());
        assert!(write(7).unwrap_err().contains("runs already"));
        assert_eq!(fs::read(dir.path().join("7.1")).unwrap(), vec![6; BLOCK]);
        assert!(!incoming.close());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = Memory::begin(dir.path().into(), 0).unwrap();
        for name in ["../x", "", ".x", "a/b"] {
            let refused = memory.take(Order::Memory { files: vec![file(name, 1, 1)] });
            assert!(matches!(refused, Err(MemoryError::Name(_))), "{name}: {refused:?}");
        }
        memory.take(Order::Memory { files: vec![file("7.1", 1, 4)] }).unwrap();
        for order in [
            blocks("7.2", &[(0, 1)], &[], 1),
            blocks("7.1", &[(4, 1)], &[], 1),
            blocks("7.1", &[], &[(3, 2)], 1),
            blocks("7.1", &[(u32::MAX, 1)], &[], 1),
        ] {
            assert!(matches!(memory.take(order), Err(MemoryError::Blocks(_))));
        }
        let mut short = blocks("7.1", &[(0, 2)], &[], 1);
        if let Order::Blocks(list) = &mut short {
            list[0].bytes.truncate(BLOCK);
        }
        assert!(memory.take(short).is_err());
        let zeros = Order::Blocks(vec![MemoryBlocks {
            file: "7.1".into(),
            first: u64::MAX,
            runs: vec![(1, 1)],
            zeros: vec![],
            bytes: vec![0; BLOCK],
        }]);
        assert!(memory.take(zeros).is_err());
    }
}
