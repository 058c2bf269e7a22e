//! Where the destination puts an image that arrives: a fresh directory, plain names, checked sums. Beside the image lie
//! the rounds of its pre-copy, each in a directory of its own with a link to the one before, as CRIU expects them.
//!
//! Nothing is flushed: an image here is of use to nobody after a crash of this host. Before the decision the source has
//! the container, after it the restored tasks, which no longer need the image, have died with the host.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rdma_virt::id::MigrationId;

use crate::net::msg::{Order, PIECE, WholeFile};
use crate::record::{RecordError, make_dir};

/// Room over the source's estimate that an image may take, bytes.
const SLACK: u64 = 1 << 30;

/// Files of one image; CRIU writes a few dozen per process.
const MOST_FILES: u32 = 1 << 20;

/// Something about an arriving image is wrong.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot write {}", .path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{0:?} is no name for a file of an image")]
    Name(String),
    #[error("{0} out of turn")]
    Turn(&'static str),
    #[error("{name} has another length than sent: {got} of {len} bytes")]
    Length { name: String, got: u64, len: u64 },
    #[error("{0} was altered on the way: its checksum differs")]
    Sum(String),
    #[error("the image is larger than {limit} bytes, far more than was announced")]
    TooBig { limit: u64 },
    #[error("{got} of {expected} files arrived")]
    Files { got: u32, expected: u32 },
    #[error("round {got} of pre-copy where {expected} was expected")]
    Round { got: u32, expected: u32 },
}

#[derive(Debug)]
struct Open {
    name: String,
    file: File,
    got: u64,
    sum: crc32fast::Hasher,
}

/// Rounds of pre-copy; no source makes nearly as many.
const MOST_ROUNDS: u32 = 1000;

/// One arriving image.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    /// Where somebody else's image lies: it is complete, and stays.
    given: Option<PathBuf>,
    /// Where the files that arrive now go.
    at: PathBuf,
    /// Rounds of pre-copy that arrived.
    rounds: u32,
    open: Option<Open>,
    files: u32,
    left: u64,
    limit: u64,
}

impl Store {
    /// Where the image of this migration lies, if it arrives here.
    pub fn place(state_dir: &Path, id: MigrationId) -> PathBuf {
        state_dir.join("incoming").join(id.to_string())
    }

    /// Makes `dir`, which must not exist.
    pub fn make(dir: PathBuf, expected: u64) -> Result<Self, StoreError> {
        let wrap = |path: &Path, source| StoreError::Write { path: path.into(), source };
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700);
        if let Some(parent) = dir.parent() {
            builder.recursive(true).create(parent).map_err(|e| wrap(parent, e))?;
        }
        builder.recursive(false);
        for path in [dir.clone(), dir.join("images"), dir.join("work")] {
            builder.create(&path).map_err(|e| wrap(&path, e))?;
        }
        let limit = expected.saturating_mul(2).saturating_add(SLACK);
        let at = dir.join("images");
        Ok(Store { dir, given: None, at, rounds: 0, open: None, files: 0, left: limit, limit })
    }

    /// The complete image that an agent before this one received.
    pub fn again(dir: PathBuf) -> Self {
        Store { at: dir.join("images"), dir, given: None, rounds: 0, open: None, files: 0, left: 0, limit: 0 }
    }

    /// The directory of all this.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// An image that an administrator gave; it lies there as a whole. What belongs to its restore comes into `dir`, which
    /// is made if missing.
    pub fn given(images: PathBuf, dir: PathBuf) -> Result<Self, RecordError> {
        make_dir(&dir)?;
        let (at, given) = (images.clone(), Some(images));
        Ok(Store { dir, given, at, rounds: 0, open: None, files: 0, left: 0, limit: 0 })
    }

    /// See [`Store::given`].
    pub fn somebody_elses(&self) -> Option<&Path> {
        self.given.as_deref()
    }

    pub fn images(&self) -> PathBuf {
        self.given.clone().unwrap_or_else(|| self.dir.join("images"))
    }

    pub fn work(&self) -> PathBuf {
        self.dir.join("work")
    }

    /// One order about a file.
    pub fn take(&mut self, order: Order) -> Result<(), StoreError> {
        match order {
            Order::Round { number } => self.round(number),
            Order::Files(files) => files.into_iter().try_for_each(|file| self.whole(file)),
            Order::FileStart { name, mode } => self.start(name, mode),
            Order::FilePiece { bytes } => self.piece(&bytes),
            Order::FileEnd { len, crc } => self.end(len, crc),
            other => Err(StoreError::Turn(other.name())),
        }
    }

    /// What arrives from now on belongs to this round, or (0) to the image.
    fn round(&mut self, number: u32) -> Result<(), StoreError> {
        if self.open.is_some() {
            return Err(StoreError::Turn("a round"));
        }
        let before = self.rounds;
        self.at = if number == 0 {
            self.images()
        } else if number == before + 1 && number <= MOST_ROUNDS && (before == 0 || self.at != self.images()) {
            let at = self.dir.join(number.to_string());
            let made = fs::DirBuilder::new().mode(0o700).create(&at);
            made.map_err(|source| StoreError::Write { path: at.clone(), source })?;
            self.rounds = number;
            at
        } else {
            return Err(StoreError::Round { got: number, expected: before + 1 });
        };
        if before > 0 {
            let link = self.at.join("parent");
            let made = std::os::unix::fs::symlink(format!("../{before}"), &link);
            made.map_err(|source| StoreError::Write { path: link, source })?;
        }
        Ok(())
    }

    fn whole(&mut self, file: WholeFile) -> Result<(), StoreError> {
        let WholeFile { name, mode, bytes, crc } = file;
        self.start(name, mode)?;
        for piece in bytes.chunks(PIECE) {
            self.piece(piece)?;
        }
        self.end(bytes.len() as u64, crc)
    }

    fn start(&mut self, name: String, mode: u32) -> Result<(), StoreError> {
        if self.open.is_some() || self.files >= MOST_FILES {
            return Err(StoreError::Turn("the start of a file"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 200 || name.starts_with('.') || !name.chars().all(plain) {
            return Err(StoreError::Name(name));
        }
        let path = self.at.join(&name);
        let file = OpenOptions::new().write(true).create_new(true).mode(mode & 0o700 | 0o600).open(&path);
        let file = file.map_err(|source| StoreError::Write { path, source })?;
        self.open = Some(Open { name, file, got: 0, sum: crc32fast::Hasher::new() });
        Ok(())
    }

    fn piece(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        let path = self.at.clone();
        let Some(open) = self.open.as_mut().filter(|_| bytes.len() <= PIECE) else {
            return Err(StoreError::Turn("a piece of a file"));
        };
        let len = bytes.len() as u64;
        self.left = self.left.checked_sub(len).ok_or(StoreError::TooBig { limit: self.limit })?;
        open.got += len;
        open.sum.update(bytes);
        open.file.write_all(bytes).map_err(|source| StoreError::Write { path: path.join(&open.name), source })
    }

    fn end(&mut self, len: u64, crc: u32) -> Result<(), StoreError> {
        let Some(open) = self.open.take() else { return Err(StoreError::Turn("the end of a file")) };
        let Open { name, got, sum, .. } = open;
        if got != len {
            return Err(StoreError::Length { name, got, len });
        }
        if sum.finalize() != crc {
            return Err(StoreError::Sum(name));
        }
        self.files += 1;
        Ok(())
    }

    /// Whether that many files arrived, each complete.
    pub fn is_complete(&self, expected: u32) -> Result<(), StoreError> {
        if self.open.is_some() || self.files != expected {
            return Err(StoreError::Files { got: self.files, expected });
        }
        Ok(())
    }

    /// Removes everything that arrived.
    pub fn remove(self) -> Result<(), StoreError> {
        let wrap = |source| StoreError::Write { path: self.dir.clone(), source };
        let over = set_aside(&self.dir).map_err(wrap)?;
        fs::remove_dir_all(over).map_err(wrap)
    }
}

/// Ending of the name of a directory that is being removed.
const OVER: &str = "over";

/// Takes a directory out of sight in one step: half of one would tell the next agent another story, such as that of a
/// restore that broke off and whose container has to go.
pub(super) fn set_aside(dir: &Path) -> std::io::Result<PathBuf> {
    let over = dir.with_extension(OVER);
    fs::rename(dir, &over)?;
    Ok(over)
}

/// Whether this directory was being removed when the agent before this one ended.
pub(super) fn is_over(dir: &Path) -> bool {
    dir.extension().is_some_and(|ending| ending == OVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(dir: &tempfile::TempDir) -> Store {
        Store::make(dir.path().join("in/x"), 0).unwrap()
    }

    fn start(name: &str) -> Order {
        Order::FileStart { name: name.into(), mode: 0o644 }
    }

    #[test]
    fn a_whole_file_arrives_and_an_altered_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = store(&dir);
        for (name, crc) in [("a.img", crc32fast::hash(b"hello")), ("b.img", 7)] {
            s.take(start(name)).unwrap();
            s.take(Order::FilePiece { bytes: b"he".to_vec() }).unwrap();
            s.take(Order::FilePiece { bytes: b"llo".to_vec() }).unwrap();
            let end = s.take(Order::FileEnd { len: 5, crc });
            assert_eq!(end.is_ok(), name == "a.img", "{end:?}");
        }
        s.is_complete(1).unwrap();
        assert!(matches!(s.is_complete(2), Err(StoreError::Files { got: 1, expected: 2 })));
        assert_eq!(fs::read(s.images().join("a.img")).unwrap(), b"hello");
        s.remove().unwrap();
        assert!(!dir.path().join("in/x").exists());
    }

    #[test]
    fn rounds_lie_beside_the_image_and_lead_to_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = store(&dir);
        let file = |name: &str| {
            let bytes = name.as_bytes().to_vec();
            Order::Files(vec![WholeFile { name: name.into(), mode: 0o600, crc: crc32fast::hash(&bytes), bytes }])
        };
        for number in [1, 2, 0] {
            s.take(Order::Round { number }).unwrap();
            s.take(file(&format!("of-{number}"))).unwrap();
        }
        s.is_complete(3).unwrap();
        let images = s.images();
        for path in ["of-0", "parent/of-2", "parent/parent/of-1"] {
            assert!(images.join(path).is_file(), "{path}");
        }
        assert!(!images.join("parent/parent/parent").exists());
        for number in [2, 3, 5] {
            assert!(s.take(Order::Round { number }).is_err(), "round {number} after the image");
        }
        let mut skipping = Store::make(dir.path().join("in/y"), 0).unwrap();
        assert!(matches!(skipping.take(Order::Round { number: 2 }), Err(StoreError::Round { got: 2, expected: 1 })));
    }

    #[test]
    fn no_name_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = store(&dir);
        for name in ["../a", "a/b", "..", ".", "", "/etc/passwd", ".hidden", "a\0b", "ü"] {
            assert!(matches!(s.take(start(name)), Err(StoreError::Name(_))), "{name:?}");
        }
    }

    #[test]
    fn an_image_far_larger_than_announced_and_a_file_of_another_length_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut s = store(&dir);
        s.take(start("a")).unwrap();
        s.take(Order::FilePiece { bytes: vec![0; 2] }).unwrap();
        assert!(s.take(start("b")).is_err(), "the first is still open");
        let end = s.take(Order::FileEnd { len: 3, crc: crc32fast::hash(&[0; 2]) });
        assert!(matches!(end, Err(StoreError::Length { got: 2, len: 3, .. })), "{end:?}");
        s.left = 1;
        s.take(start("c")).unwrap();
        assert!(matches!(s.take(Order::FilePiece { bytes: vec![0; 2] }), Err(StoreError::TooBig { .. })));
    }

    #[test]
    fn an_image_that_was_given_stays_and_what_belongs_to_its_restore_goes() {
        let dir = tempfile::tempdir().unwrap();
        let (images, beside) = (dir.path().join("final"), dir.path().join("in/x"));
        fs::create_dir(&images).unwrap();
        let store = Store::given(images.clone(), beside.clone()).unwrap();
        assert_eq!((store.images(), store.dir()), (images.clone(), beside.as_path()));
        store.is_complete(0).unwrap();
        store.remove().unwrap();
        assert!(images.exists() && !beside.exists());
    }

    #[test]
    fn a_directory_that_exists_is_not_reused() {
        let dir = tempfile::tempdir().unwrap();
        let first = store(&dir);
        assert!(Store::make(dir.path().join("in/x"), 0).is_err());
        first.remove().unwrap();
    }
}
