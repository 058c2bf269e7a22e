//! The RDMA image: one flat file, [`FILE`], beside CRIU's images, holding what the shims said about their processes.
//!
//! On disk: magic, version, CRC-32 and length of the body, body (postcard). Everything is checked before a byte of the
//! body is decoded; what is not understood is refused in one line. The CRIU plugin compiles this same file, so it uses
//! nothing of this crate. CRIU's own images, memory pages and the order of phases are not here.

use rdma_virt::id::{MigrationId, PGid};
use rdma_virt::saved::ProcessState;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the file in an image directory.
pub const FILE: &str = "rdma.img";

/// Version written; the only one read.
pub const VERSION: u32 = 3;

/// Largest image accepted, bytes: tens of thousands of objects need a few megabytes.
pub const MAX_LEN: usize = 64 << 20;

const MAGIC: [u8; 8] = *b"MIGRRDMA";
/// Magic, version, checksum, length of the body.
const HEADER: usize = 8 + 4 + 4 + 8;

/// Everything about a container's RDMA that CRIU does not save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RdmaImage {
    /// Counts up with every image of a container that may run again; peers accept the newest only, and once.
    pub generation: u64,
    /// Proves to peers that who restores this image has this image.
    pub secret: Secret,
    /// Container id on the source.
    pub container: String,
    /// How its kernel objects come back.
    pub hand_over: HandOver,
    /// Name of the host it was made on, for messages to people.
    pub host: String,
    /// Devices its processes use, as they are on that host.
    pub devices: Vec<SourceDevice>,
    pub processes: Vec<ImagedProcess>,
    /// What a restore from files needs; absent in a migration, whose source is there to be asked.
    pub session: Option<ImagedSession>,
}

/// The series of pre-dumps and the checkpoint that an image on disk belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagedSession {
    /// The name under which peers know it.
    pub migration: MigrationId,
    /// `host:port` of the source's agent; empty if it has no address others could use.
    pub source: String,
    /// The container ended with this image, and its peers wait; otherwise it went on, and only a partial restore is
    /// possible.
    pub whole: bool,
    /// It is whole, and the container went on with its peers all the same: nobody waits for the image.
    pub left_running: bool,
    /// Numbers the container's later QPs come from: the first, and how many.
    pub lease: (u32, u32),
    /// Who is connected to whom, as JSON of the engine's plan: opaque here.
    pub plan: Vec<u8>,
}

/// How the restored process gets its kernel objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HandOver {
    /// An incubator made them before; CRIU plugs them in.
    #[default]
    Adopt,
    /// The shim makes them again inside the restored process; CRIU plugs in placeholders.
    Rebuild,
}

impl std::fmt::Display for HandOver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            HandOver::Adopt => "adopt",
            HandOver::Rebuild => "rebuild",
        })
    }
}

/// A number that only holders of the image know; not shown in logs.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Secret(pub [u8; 32]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// A device of the source host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceDevice {
    pub name: String,
    pub driver: String,
    /// Network byte order.
    pub node_guid: u64,
    pub gids: Vec<SourceGid>,
}

/// One entry of a GID table of the source host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceGid {
    pub port: u8,
    pub index: u16,
    pub gid: PGid,
    /// 0 InfiniBand, 1 RoCE v1, 2 RoCE v2.
    pub kind: u32,
}

/// One process with RDMA objects.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagedProcess {
    pub state: ProcessState,
    /// Its pid in the host's pid namespace at the moment of the dump; means nothing afterwards.
    pub host_pid: i32,
}

/// An RDMA image could not be written or is not acceptable.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("cannot {what} {}: {source}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{FILE} is truncated: {have} of {want} bytes; copy the image directory again")]
    Truncated { have: usize, want: usize },
    #[error("{FILE} is not an RDMA image (its first bytes are wrong)")]
    NotAnImage,
    #[error(
        "{FILE} has format version {found}, this program reads version {VERSION}; restore with the version that wrote it"
    )]
    Version { found: u32 },
    #[error("{FILE} is {len} bytes long, more than the {MAX_LEN} allowed")]
    TooLarge { len: u64 },
    #[error("{FILE} was altered: {what}; make the image anew")]
    Altered { what: &'static str },
    #[error("the RDMA state of the container does not fit into an image: {0}")]
    Encode(postcard::Error),
}

/// The bytes of an image file.
pub fn encode(image: &RdmaImage) -> Result<Vec<u8>, ImageError> {
    seal(&postcard::to_stdvec(image).map_err(ImageError::Encode)?)
}

/// The bytes of an image file with these contents, which may make no sense: header and checksum are right.
pub fn seal(body: &[u8]) -> Result<Vec<u8>, ImageError> {
    let len = body.len() as u64;
    if body.len() > MAX_LEN - HEADER {
        return Err(ImageError::TooLarge { len: len + HEADER as u64 });
    }
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&checksum(VERSION, len, body).to_le_bytes());
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(body);
    Ok(bytes)
}

/// Reads the bytes of an image file.
pub fn decode(bytes: &[u8]) -> Result<RdmaImage, ImageError> {
    if bytes.len() > MAX_LEN {
        return Err(ImageError::TooLarge { len: bytes.len() as u64 });
    }
    let known = bytes.len().min(MAGIC.len());
    if bytes[..known] != MAGIC[..known] {
        return Err(ImageError::NotAnImage);
    }
    let Some((header, body)) = bytes.split_at_checked(HEADER) else {
        return Err(ImageError::Truncated { have: bytes.len(), want: HEADER });
    };
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let version = number(8);
    if version != VERSION {
        return Err(ImageError::Version { found: version });
    }
    let len = u64::from(number(16)) | u64::from(number(20)) << 32;
    if len > (MAX_LEN - HEADER) as u64 {
        return Err(ImageError::TooLarge { len });
    }
    let want = len as usize;
    if body.len() < want {
        return Err(ImageError::Truncated { have: bytes.len(), want: HEADER + want });
    }
    if body.len() > want {
        return Err(ImageError::Altered { what: "there is something behind its end" });
    }
    if checksum(version, len, body) != number(12) {
        return Err(ImageError::Altered { what: "its checksum is wrong" });
    }
    match postcard::take_from_bytes(body) {
        Ok((image, [])) => Ok(image),
        Ok(_) => Err(ImageError::Altered { what: "it holds more than an image" }),
        Err(_) => Err(ImageError::Altered { what: "its contents make no sense" }),
    }
}

fn checksum(version: u32, len: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&version.to_le_bytes());
    hasher.update(&len.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

/// Writes the image into a directory so that after a crash there is either the whole file or none.
pub fn write(dir: &Path, image: &RdmaImage) -> Result<(), ImageError> {
    put(dir, image, true)
}

/// As [`write`], for an image that is sent on at once and means nothing after a crash: a flush would lengthen a pause.
pub fn write_unflushed(dir: &Path, image: &RdmaImage) -> Result<(), ImageError> {
    put(dir, image, false)
}

fn put(dir: &Path, image: &RdmaImage, flush: bool) -> Result<(), ImageError> {
    let bytes = encode(image)?;
    let path = dir.join(FILE);
    let draft = dir.join(format!(".{FILE}.{}", std::process::id()));
    let result = (|| {
        let mut file = File::create(&draft)?;
        file.write_all(&bytes)?;
        if flush {
            file.sync_all()?;
        }
        fs::rename(&draft, &path)?;
        if flush { File::open(dir)?.sync_all() } else { Ok(()) }
    })();
    result.map_err(|source| {
        let _ = fs::remove_file(&draft);
        ImageError::Io { what: "write", path, source }
    })
}

/// Reads the image of a directory; `None` if there is none, as for a container without RDMA.
pub fn read(dir: &Path) -> Result<Option<RdmaImage>, ImageError> {
    let path = dir.join(FILE);
    match File::open(&path) {
        Ok(file) => read_file(file, path).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ImageError::Io { what: "open", path, source }),
    }
}

/// Reads an open image file; `path` is for messages.
pub fn read_file(file: File, path: PathBuf) -> Result<RdmaImage, ImageError> {
    let fail = |source| ImageError::Io { what: "read", path: path.clone(), source };
    let len = file.metadata().map_err(fail)?.len();
    if len > MAX_LEN as u64 {
        return Err(ImageError::TooLarge { len });
    }
    let mut bytes = Vec::with_capacity(len as usize);
    // A file that grows meanwhile must not fill the memory.
    file.take(MAX_LEN as u64 + 1).read_to_end(&mut bytes).map_err(fail)?;
    decode(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rdma_virt::id::Vpid;

    fn image() -> RdmaImage {
        RdmaImage {
            generation: 7,
            secret: Secret([3; 32]),
            container: "c1".into(),
            hand_over: HandOver::Adopt,
            host: "src".into(),
            devices: vec![SourceDevice {
                name: "rxe0".into(),
                driver: "rxe".into(),
                node_guid: 9,
                gids: vec![SourceGid { port: 1, index: 1, gid: PGid([1; 16]), kind: 2 }],
            }],
            processes: vec![ImagedProcess {
                state: ProcessState {
                    vpid: Vpid(5),
                    comm: "app".into(),
                    builds: vec![],
                    contexts: vec![],
                    blockers: vec![],
                    memory: vec![],
                },
                host_pid: 4711,
            }],
            session: Some(ImagedSession {
                migration: MigrationId([4; 16]),
                source: "10.0.0.1:7477".into(),
                whole: true,
                left_running: false,
                lease: (1 << 20, 8),
                plan: b"{}".to_vec(),
            }),
        }
    }

    #[test]
    fn an_image_survives_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap().is_none());
        write(dir.path(), &image()).unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(image()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left behind");
    }

    #[test]
    fn a_newer_version_is_refused_by_name() {
        let mut bytes = encode(&image()).unwrap();
        bytes[8] = 99;
        let text = decode(&bytes).unwrap_err().to_string();
        assert!(text.contains("format version 99"), "{text}");
    }

    #[test]
    fn a_file_that_claims_to_be_huge_is_refused_before_it_is_read() {
        let mut bytes = encode(&image()).unwrap();
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(decode(&bytes), Err(ImageError::TooLarge { .. })));
    }

    #[test]
    fn another_file_is_not_taken_for_an_image() {
        assert!(matches!(decode(b"#!/bin/sh\necho hello, this is long enough"), Err(ImageError::NotAnImage)));
    }

    #[test]
    fn a_tail_is_refused() {
        let mut bytes = encode(&image()).unwrap();
        bytes.push(0);
        assert!(matches!(decode(&bytes), Err(ImageError::Altered { .. })));
    }

    #[test]
    fn the_secret_is_not_in_debug_output() {
        assert!(!format!("{:?}", image()).contains("3, 3"));
    }

    proptest! {
        #[test]
        fn any_truncation_is_refused(cut in 0usize..1000) {
            let bytes = encode(&image()).unwrap();
            let cut = cut % bytes.len();
            prop_assert!(decode(&bytes[..cut]).is_err());
        }

        #[test]
        fn any_flipped_bit_is_refused(at in 0usize..1000, bit in 0u8..8) {
            let mut bytes = encode(&image()).unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn any_garbage_is_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
