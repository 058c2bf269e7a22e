//! The plugin's own image, `migrrdma-files.img`: for every file CRIU calls *external*, whose descriptor it was and how
//! it was opened. Records of fixed length, each with magic, version and checksum, appended one by one.

use crate::criu::ImageDir;
use nix::fcntl::OFlag;
use std::collections::BTreeMap;
use std::io::{self, Read, Write};

/// Name in the image directory.
pub const FILE: &str = "migrrdma-files.img";

const MAGIC: [u8; 4] = *b"mrf1";
const VERSION: u16 = 1;
const RECORD: usize = 28;
/// More external files than any container can have open.
const MAX_RECORDS: usize = 1 << 20;

/// Whose descriptor a file was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// CRIU's id of the file.
    pub id: u32,
    pub vpid: i32,
    pub fd: i32,
    /// File status flags (`F_GETFL`).
    pub flags: i32,
}

impl Record {
    fn encode(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.vpid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.fd.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.flags.to_le_bytes());
        let crc = crc32fast::hash(&bytes[..24]);
        bytes[24..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if bytes.len() != RECORD {
            return Err("it is truncated");
        }
        if bytes[..4] != MAGIC {
            return Err("it is not an image of this plugin");
        }
        if bytes[4..6] != VERSION.to_le_bytes() {
            return Err("it was written by another version of this plugin");
        }
        if crc32fast::hash(&bytes[..24]) != number(24) {
            return Err("a checksum is wrong");
        }
        Ok(Self { id: number(8), vpid: number(12) as i32, fd: number(16) as i32, flags: number(20) as i32 })
    }
}

/// Empties the image: a dump into a directory that was used before must not find old records.
pub fn create(dir: &ImageDir) -> io::Result<()> {
    dir.file(FILE, OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_WRONLY).map(|_| ())
}

/// Adds one record. Flushed no more than CRIU's own images are.
pub fn append(dir: &ImageDir, record: Record) -> io::Result<()> {
    let file = dir.file(FILE, OFlag::O_CREAT | OFlag::O_APPEND | OFlag::O_WRONLY)?;
    let mut file = file.ok_or(io::ErrorKind::NotFound)?;
    file.write_all(&record.encode())
}

/// All records by CRIU's file id; none if the image does not exist.
pub fn read(dir: &ImageDir) -> Result<BTreeMap<u32, Record>, String> {
    let Some(file) = dir.file(FILE, OFlag::O_RDONLY).map_err(|e| format!("cannot open {FILE}: {e}"))? else {
        return Ok(BTreeMap::new());
    };
    let mut bytes = Vec::new();
    let limit = (MAX_RECORDS * RECORD) as u64;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| format!("cannot read {FILE}: {e}"))?;
    if bytes.len() as u64 > limit {
        return Err(format!("{FILE} is longer than {limit} bytes"));
    }
    bytes
        .chunks(RECORD)
        .map(|chunk| Record::decode(chunk).map(|record| (record.id, record)))
        .collect::<Result<_, _>>()
        .map_err(|what| format!("{FILE} cannot be used: {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_disk_and_a_second_dump_starts_anew() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = ImageDir::at(tmp.path());
        assert!(read(&dir).unwrap().is_empty());
        create(&dir).unwrap();
        for id in 1..4 {
            append(&dir, Record { id, vpid: 7, fd: 900 + id as i32, flags: libc::O_RDWR }).unwrap();
        }
        assert_eq!(read(&dir).unwrap().len(), 3);
        assert_eq!(read(&dir).unwrap()[&2].fd, 902);
        create(&dir).unwrap();
        assert!(read(&dir).unwrap().is_empty());
    }

    #[test]
    fn every_cut_and_every_flipped_bit_is_refused() {
        let good = Record { id: 1, vpid: 2, fd: 3, flags: 4 }.encode();
        for cut in 1..RECORD {
            assert!(Record::decode(&good[..cut]).is_err());
        }
        for bit in 0..RECORD * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Record::decode(&bad).is_err(), "bit {bit}");
        }
    }
}
