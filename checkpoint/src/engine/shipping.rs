//! Files of an image on their way to the destination: small ones many at a time, because each answer costs a round
//! trip, large ones in pieces. Where they come from is the business of [`super::handover`] and [`super::precopy`].

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::source::{Run, Stop, confused};
use crate::agent::admin::Event;
use crate::net::msg::{Answer, Order, PIECE, WholeFile};
use crate::phase::Phase;

/// For one piece.
const PATIENCE: Duration = Duration::from_secs(60);

/// CRIU's link to the round before; the destination makes its own.
const PARENT: &str = "parent";

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub files: u32,
    pub bytes: u64,
}

impl std::ops::AddAssign for Sent {
    fn add_assign(&mut self, more: Sent) {
        self.files += more.files;
        self.bytes += more.bytes;
    }
}

/// One directory's files.
#[derive(Debug)]
struct Cargo {
    /// Name and length, in order.
    files: Vec<(String, u64)>,
}

impl Cargo {
    fn list(dir: &Path) -> Result<Cargo, Stop> {
        let read = |e: io::Error| Stop::Failed(format!("cannot read {}: {e}", dir.display()));
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).map_err(read)? {
            let entry = entry.map_err(read)?;
            let meta = fs::symlink_metadata(entry.path()).map_err(read)?;
            match entry.file_name().into_string() {
                Ok(name) if meta.is_file() => files.push((name, meta.len())),
                Ok(name) if name == PARENT && meta.is_symlink() => {}
                _ => {
                    let path = entry.path();
                    return Err(Stop::Failed(format!("{} does not belong into an image", path.display())));
                }
            }
        }
        files.sort();
        Ok(Cargo { files })
    }
}

/// A directory under way.
struct Voyage<'r, 'w> {
    run: &'r Run<'w>,
    phase: Phase,
    total: u64,
    sent: Sent,
    /// Small files that wait for company, and their bytes.
    batch: Vec<WholeFile>,
    waiting: usize,
}

impl Run<'_> {
    /// Sends all files of a directory, as part of that round (0: of the image itself).
    pub(super) fn ship(&self, dir: &Path, round: u32, phase: Phase) -> Result<Sent, Stop> {
        let cargo = Cargo::list(dir)?;
        let total = cargo.files.iter().map(|(_, len)| len).sum();
        self.post(Order::Round { number: round })?;
        let mut voyage = Voyage { run: self, phase, total, sent: Sent::default(), batch: Vec::new(), waiting: 0 };
        for (name, len) in cargo.files {
            voyage.take(dir.join(&name), name, len)?;
        }
        voyage.flush()?;
        Ok(voyage.sent)
    }

    fn post(&self, order: Order) -> Result<(), Stop> {
        self.wanted()?;
        let name = order.name();
        match self.ask_destination(order, PATIENCE)? {
            Answer::Done => Ok(()),
            _ => Err(confused("the destination", name)),
        }
    }
}

impl Voyage<'_, '_> {
    fn take(&mut self, path: PathBuf, name: String, len: u64) -> Result<(), Stop> {
        let read = |e: io::Error| Stop::Failed(format!("cannot read {}: {e}", path.display()));
        let mut file = File::open(&path).map_err(read)?;
        let mode = file.metadata().map_err(read)?.mode() & 0o777;
        self.sent.files += 1;
        if len > (PIECE / 4) as u64 {
            return self.in_pieces(&mut file, &path, name, len, mode);
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.read_to_end(&mut bytes).map_err(read)?;
        if bytes.len() as u64 != len {
            return Err(Stop::Failed(format!("{} changed while it was sent", path.display())));
        }
        if self.waiting + bytes.len() > PIECE {
            self.flush()?;
        }
        self.waiting += bytes.len();
        self.batch.push(WholeFile { name, mode, crc: crc32fast::hash(&bytes), bytes });
        Ok(())
    }

    fn in_pieces(&mut self, file: &mut File, path: &Path, name: String, len: u64, mode: u32) -> Result<(), Stop> {
        self.run.post(Order::FileStart { name, len, mode })?;
        let mut crc = crc32fast::Hasher::new();
        loop {
            let mut bytes = Vec::with_capacity(PIECE);
            let read = file.take(PIECE as u64).read_to_end(&mut bytes);
            if read.map_err(|e| Stop::Failed(format!("cannot read {}: {e}", path.display())))? == 0 {
                break;
            }
            crc.update(&bytes);
            let n = bytes.len() as u64;
            self.run.post(Order::FilePiece { bytes })?;
            self.arrived(n);
        }
        self.run.post(Order::FileEnd { crc: crc.finalize() })
    }

    fn flush(&mut self) -> Result<(), Stop> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.run.post(Order::Files(std::mem::take(&mut self.batch)))?;
        let n = std::mem::take(&mut self.waiting) as u64;
        self.arrived(n);
        Ok(())
    }

    fn arrived(&mut self, bytes: u64) {
        self.sent.bytes += bytes;
        let (phase, done, total) = (self.phase, self.sent.bytes, self.total.max(self.sent.bytes));
        self.run.progress.event(Event::Progress { phase, done, total, unit: "bytes".into() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_flat_but_for_the_link_to_its_parent() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("b.img"), b"22").unwrap();
        fs::write(dir.path().join("a.img"), b"1").unwrap();
        std::os::unix::fs::symlink("../1", dir.path().join("parent")).unwrap();
        let cargo = Cargo::list(dir.path()).unwrap();
        assert_eq!(cargo.files, [("a.img".to_owned(), 1), ("b.img".to_owned(), 2)]);
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("c.img")).unwrap();
        assert!(Cargo::list(dir.path()).unwrap_err().to_string().contains("c.img"));
        fs::remove_file(dir.path().join("c.img")).unwrap();
        fs::create_dir(dir.path().join("sub")).unwrap();
        assert!(Cargo::list(dir.path()).is_err());
    }
}
