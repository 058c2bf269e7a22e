//! Registered memory in an image on disk: CRIU leaves the files out that it lies in, because a migration sends them by
//! itself. Written while the container stands still, put back before it is restored.
//!
//! One file: a magic, then frames of length, CRC-32 and what a migration would have sent.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::engine::blocks::CHUNK;
use crate::engine::memory::{Memory, MemoryError};
use crate::engine::regmem;
use crate::engine::view::View;
use crate::net::msg::{MemoryBlocks, Order, PIECE};

/// Its name in an image directory.
pub const NAME: &str = "registered-memory.img";

/// What it begins with. 2: blocks are smaller than pages.
pub const MAGIC: [u8; 8] = *b"mrmem\0\0\x02";

/// Longest frame: one piece and what describes it, bytes.
const LONGEST: usize = PIECE + (1 << 20);

/// Registered memory could not be written into an image, or put back from one.
#[derive(Debug, thiserror::Error)]
pub enum MemoryImageError {
    #[error("cannot write registered memory to {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read registered memory from {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not what a checkpoint wrote ({what}); copy the checkpoint again, or take a new one", .path.display())]
    Bad { path: PathBuf, what: &'static str },
    #[error("registered memory cannot be put back from {}", .path.display())]
    Put { path: PathBuf, source: MemoryError },
}

/// Writes the files of `dir` into the image. Nothing is written if there are none.
pub fn save(dir: &Path, images: &Path) -> Result<(), MemoryImageError> {
    let path = images.join(NAME);
    let wrap = |source| MemoryImageError::Write { path: path.clone(), source };
    let files = regmem::list(dir).map_err(|e| wrap(io::Error::other(e.to_string())))?;
    if files.is_empty() {
        return Ok(());
    }
    let mut out = BufWriter::new(File::create(&path).map_err(wrap)?);
    out.write_all(&MAGIC).map_err(wrap)?;
    put(&mut out, &Order::Memory { files: files.iter().map(|(_, file)| file.clone()).collect() }).map_err(wrap)?;
    for (file, meta) in &files {
        if meta.len == 0 {
            continue;
        }
        let view = View::of(file, meta.len).map_err(wrap)?;
        for (chunk, data) in regmem::filled(file).map_err(wrap)? {
            // The container stands still; a file that is cut short all the same is zeros from there on.
            let (diff, _) = regmem::compare(&view, chunk, &[], &data);
            let (first, runs, zeros, bytes) = (chunk * CHUNK as u64, diff.runs, diff.zeros, diff.bytes);
            let blocks = MemoryBlocks { file: meta.name.clone(), first, runs, zeros, bytes };
            put(&mut out, &Order::Blocks(vec![blocks])).map_err(wrap)?;
        }
    }
    out.into_inner().map_err(|e| wrap(e.into_error()))?.sync_all().map_err(wrap)
}

fn put(out: &mut impl Write, order: &Order) -> io::Result<()> {
    part(out, &postcard::to_stdvec(order).map_err(io::Error::other)?)
}

/// One part of an image, with its length and checksum. Nothing says that it makes sense.
pub fn part(out: &mut impl Write, body: &[u8]) -> io::Result<()> {
    out.write_all(&(body.len() as u32).to_le_bytes())?;
    out.write_all(&crc32fast::hash(body).to_le_bytes())?;
    out.write_all(body)
}

/// Whether an image holds registered memory.
pub fn is_in(images: &Path) -> bool {
    images.join(NAME).exists()
}

/// Makes the files again, in a directory that exists.
pub fn load(images: &Path, dir: &Path) -> Result<(), MemoryImageError> {
    let path = images.join(NAME);
    let wrap = |source| MemoryImageError::Read { path: path.clone(), source };
    let bad = |what| MemoryImageError::Bad { path: path.clone(), what };
    let place = |source| MemoryImageError::Put { path: path.clone(), source };
    let file = File::open(&path).map_err(wrap)?;
    let mut memory = Memory::begin(dir.to_owned(), file.metadata().map_err(wrap)?.len()).map_err(place)?;
    let mut input = BufReader::new(file);
    let mut magic = [0; 8];
    input.read_exact(&mut magic).map_err(wrap)?;
    if magic != MAGIC {
        return Err(bad("it does not begin like one, or is of another version"));
    }
    loop {
        let mut head = [0; 8];
        match input.read(&mut head[..1]).map_err(wrap)? {
            0 => return Ok(()),
            _ => input.read_exact(&mut head[1..]).map_err(wrap)?,
        }
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        if len > LONGEST {
            return Err(bad("a part of it is too long"));
        }
        let mut body = vec![0; len];
        input.read_exact(&mut body).map_err(wrap)?;
        if crc32fast::hash(&body) != u32::from_le_bytes([head[4], head[5], head[6], head[7]]) {
            return Err(bad("a checksum is wrong"));
        }
        let order = postcard::from_bytes(&body).map_err(|_| bad("a part of it makes no sense"))?;
        memory.take(order).map_err(place)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::FileExt;

    #[test]
    fn memory_survives_the_disk_and_altered_memory_is_refused() {
        let [from, images, to] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        save(from.path(), images.path()).unwrap();
        assert!(!is_in(images.path()), "nothing for nothing");
        let file = File::create(from.path().join("7.1")).unwrap();
        file.set_len(1 << 40).unwrap();
        let content: Vec<u8> = (0..6 << 20).map(|i: u32| (i / 5000) as u8).collect();
        file.write_all_at(&content, 4096).unwrap();
        File::create(from.path().join("7.2")).unwrap();
        save(from.path(), images.path()).unwrap();
        load(images.path(), to.path()).unwrap();
        let mut back = vec![1; content.len() + 8192];
        let there = File::open(to.path().join("7.1")).unwrap();
        assert_eq!(there.metadata().unwrap().len(), 1 << 40);
        there.read_exact_at(&mut back, 0).unwrap();
        assert!(back[4096..4096 + content.len()] == content && back[..4096].iter().all(|b| *b == 0));
        assert!(to.path().join("7.2").exists());

        let path = images.path().join(NAME);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(load(images.path(), to.path()), Err(MemoryImageError::Bad { .. })));
        fs::write(&path, &bytes[..middle]).unwrap();
        assert!(load(images.path(), to.path()).is_err());
    }
}
