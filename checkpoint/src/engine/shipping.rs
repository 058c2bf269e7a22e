//! Files of an image on their way to the destination: small ones many at a time, because each answer costs a round
//! trip, large ones in pieces, and pages while CRIU is still writing them. Where they come from is the business of
//! [`super::handover`] and [`super::precopy`].

use std::collections::BTreeMap;
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

/// A file that grows is worth a piece when it has so much more, bytes. A smaller one goes with the others at the end: its
/// pieces, each with an answer, would take CRIU more time than they save.
const GROWN: u64 = 512 << 10;

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
#[derive(Debug, Default)]
pub(super) struct Voyage {
    sent: Sent,
    /// Files that have gone in pieces, and their lengths.
    gone: BTreeMap<String, u64>,
    going: Option<Going>,
    /// Number of the file of pages to look at after that.
    next: u32,
    /// Small files that wait for company, and their bytes.
    batch: Vec<WholeFile>,
    waiting: usize,
}

/// A file that goes in pieces.
#[derive(Debug)]
struct Going {
    name: String,
    path: PathBuf,
    file: File,
    sent: u64,
    crc: crc32fast::Hasher,
}

impl Going {
    /// The next piece, if there is one of at least that many bytes by now.
    fn piece(&mut self, least: u64) -> io::Result<Option<Vec<u8>>> {
        let there = self.file.metadata()?.len().saturating_sub(self.sent);
        if there == 0 || there < least {
            return Ok(None);
        }
        let mut bytes = Vec::with_capacity(there.min(PIECE as u64) as usize);
        (&mut self.file).take(PIECE as u64).read_to_end(&mut bytes)?;
        self.sent += bytes.len() as u64;
        self.crc.update(&bytes);
        Ok(Some(bytes))
    }
}

fn pages(number: u32) -> String {
    format!("pages-{number}.img")
}

impl Run<'_> {
    /// Begins to send the files of that round (0: of the image itself).
    pub(super) fn embark(&self, round: u32) -> Result<Voyage, Stop> {
        self.post(Order::Round { number: round })?;
        Ok(Voyage { next: 1, ..Voyage::default() })
    }

    /// Sends what CRIU has written so far of the directory's pages. It writes one file of them after the other, each
    /// from its begin to its end.
    pub(super) fn send_grown(&self, voyage: &mut Voyage, dir: &Path, phase: Phase) -> Result<(), Stop> {
        loop {
            let over = |next: u32| dir.join(pages(next)).exists();
            if voyage.going.is_none() {
                let name = pages(voyage.next);
                let Ok(meta) = fs::symlink_metadata(dir.join(&name)) else { return Ok(()) };
                if meta.is_file() && meta.len() >= GROWN {
                    self.begin(voyage, dir, name)?;
                } else if !over(voyage.next + 1) {
                    return Ok(());
                }
                // A small one waits for company.
                voyage.next += 1;
                continue;
            }
            self.advance(voyage, GROWN, phase)?;
            if !over(voyage.next) {
                return Ok(());
            }
            self.complete(voyage, phase)?;
        }
    }

    /// Sends what has not gone yet of a directory to which nothing is added any more.
    pub(super) fn send_rest(&self, mut voyage: Voyage, dir: &Path, phase: Phase) -> Result<Sent, Stop> {
        if voyage.going.is_some() {
            self.complete(&mut voyage, phase)?;
        }
        for (name, len) in Cargo::list(dir)?.files {
            match voyage.gone.get(&name) {
                Some(sent) if *sent == len => {}
                Some(_) => return Err(changed(&dir.join(name))),
                None => self.take(&mut voyage, dir, name, len, phase)?,
            }
        }
        self.flush(&mut voyage, phase)?;
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

    fn take(&self, voyage: &mut Voyage, dir: &Path, name: String, len: u64, phase: Phase) -> Result<(), Stop> {
        let path = dir.join(&name);
        if len > (PIECE / 4) as u64 {
            self.begin(voyage, dir, name)?;
            let sent = self.complete(voyage, phase)?;
            return if sent == len { Ok(()) } else { Err(changed(&path)) };
        }
        let mut file = File::open(&path).map_err(|e| unreadable(&path, &e))?;
        let mut bytes = Vec::with_capacity(len as usize);
        file.read_to_end(&mut bytes).map_err(|e| unreadable(&path, &e))?;
        if bytes.len() as u64 != len {
            return Err(changed(&path));
        }
        let mode = mode(&file).map_err(|e| unreadable(&path, &e))?;
        if voyage.waiting + bytes.len() > PIECE {
            self.flush(voyage, phase)?;
        }
        voyage.sent.files += 1;
        voyage.waiting += bytes.len();
        voyage.batch.push(WholeFile { name, mode, crc: crc32fast::hash(&bytes), bytes });
        Ok(())
    }

    fn begin(&self, voyage: &mut Voyage, dir: &Path, name: String) -> Result<(), Stop> {
        let path = dir.join(&name);
        let file = File::open(&path).map_err(|e| unreadable(&path, &e))?;
        let mode = mode(&file).map_err(|e| unreadable(&path, &e))?;
        self.post(Order::FileStart { name: name.clone(), mode })?;
        voyage.sent.files += 1;
        voyage.going = Some(Going { name, path, file, sent: 0, crc: crc32fast::Hasher::new() });
        Ok(())
    }

    /// Sends what is there, in pieces of at least that many bytes.
    fn advance(&self, voyage: &mut Voyage, least: u64, phase: Phase) -> Result<(), Stop> {
        while let Some(going) = &mut voyage.going {
            let Some(bytes) = going.piece(least).map_err(|e| unreadable(&going.path, &e))? else { break };
            let n = bytes.len() as u64;
            self.post(Order::FilePiece { bytes })?;
            self.arrived(voyage, n, phase);
        }
        Ok(())
    }

    /// The file has its end; its length.
    fn complete(&self, voyage: &mut Voyage, phase: Phase) -> Result<u64, Stop> {
        self.advance(voyage, 1, phase)?;
        let Some(Going { name, sent, crc, .. }) = voyage.going.take() else { return Ok(0) };
        self.post(Order::FileEnd { len: sent, crc: crc.finalize() })?;
        voyage.gone.insert(name, sent);
        Ok(sent)
    }

    fn flush(&self, voyage: &mut Voyage, phase: Phase) -> Result<(), Stop> {
        if voyage.batch.is_empty() {
            return Ok(());
        }
        self.post(Order::Files(std::mem::take(&mut voyage.batch)))?;
        let n = std::mem::take(&mut voyage.waiting) as u64;
        self.arrived(voyage, n, phase);
        Ok(())
    }

    fn arrived(&self, voyage: &mut Voyage, bytes: u64, phase: Phase) {
        voyage.sent.bytes += bytes;
        // How much there will be is known only when CRIU has written all of it.
        let done = voyage.sent.bytes;
        let going = voyage.going.as_ref().and_then(|g| g.file.metadata().ok()).map_or(0, |meta| meta.len());
        let sent = voyage.going.as_ref().map_or(0, |g| g.sent);
        let total = done + going.saturating_sub(sent) + voyage.waiting as u64;
        self.progress.event(Event::Progress { phase, done, total, unit: "bytes".into() });
    }
}

fn mode(file: &File) -> io::Result<u32> {
    Ok(file.metadata()?.mode() & 0o777)
}

fn unreadable(path: &Path, e: &io::Error) -> Stop {
    Stop::Failed(format!("cannot read {}: {e}", path.display()))
}

fn changed(path: &Path) -> Stop {
    Stop::Failed(format!("{} changed while it was sent", path.display()))
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

    #[test]
    fn pieces_of_a_growing_file_are_all_of_it_and_none_is_too_small() {
        use std::io::Write;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(pages(1));
        let mut out = File::create(&path).unwrap();
        let file = File::open(&path).unwrap();
        let mut going = Going { name: pages(1), path, file, sent: 0, crc: crc32fast::Hasher::new() };
        assert_eq!(going.piece(1).unwrap(), None);
        out.write_all(b"hello").unwrap();
        assert_eq!(going.piece(6).unwrap(), None);
        out.write_all(b" world").unwrap();
        assert_eq!(going.piece(6).unwrap().unwrap(), b"hello world");
        out.write_all(b"!").unwrap();
        assert_eq!(going.piece(1).unwrap().unwrap(), b"!");
        assert_eq!(going.piece(1).unwrap(), None);
        assert_eq!((going.sent, going.crc.finalize()), (12, crc32fast::hash(b"hello world!")));
    }
}
