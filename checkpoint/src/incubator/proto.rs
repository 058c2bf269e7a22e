//! What the agent and its incubator say to each other over their socket pair: one command, one reply, as frames of
//! postcard with magic and length cap. The socket to the plugin speaks another language (`wire`).

use rdma_virt::id::{ObjId, Vpid};
use rdma_virt::saved::{AdoptedProcess, ProcessState, Remote};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, Read, Write};
use std::path::PathBuf;

/// Start of every frame.
const MAGIC: [u8; 4] = *b"mrc1";

/// Longest body, bytes.
pub const MAX_FRAME: usize = 64 << 20;

/// What an incubator is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// First, once: take these rights, open the plugin socket.
    Start(Start),
    /// Make the kernel objects equal to these processes'.
    Converge(Vec<ProcessState>),
    /// Connect QPs.
    Connect(Vec<Link>),
    /// Say again what there is.
    Report,
    /// Answer (or refuse) the plugin from now on.
    Arm(bool),
    /// What has the plugin taken?
    Handed,
    /// Exit; what others hold stays.
    Release,
}

/// What an incubator answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Adopted(Vec<AdoptedProcess>),
    Handed(Handed),
    /// In one sentence.
    Refused(String),
}

/// How an incubator begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    pub rights: Rights,
    /// Device on the source → device here. A device not named is matched by its driver.
    pub devices: Vec<(String, String)>,
    /// Host path of the plugin socket.
    pub socket: PathBuf,
    /// Host path of the files with the container's registered memory.
    pub memory: Option<PathBuf>,
}

/// The rights of the container whose objects are made: the kernel checks who asks, and it must not be root who asks
/// for a container that is not.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rights {
    /// On this host.
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
    /// Effective capabilities, as `CAP_NET_RAW`.
    pub caps: Vec<String>,
    /// Soft and hard `RLIMIT_MEMLOCK`, bytes: the only limit the RDMA subsystem looks at. `None`: as the parent.
    pub memlock: Option<(u64, u64)>,
    /// Directory of a cgroup of the container (v2, or the rdma controller of v1).
    pub cgroup: Option<PathBuf>,
}

/// How to connect one QP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub vpid: Vpid,
    pub ctx: ObjId,
    pub qp: ObjId,
    pub remote: Remote,
    /// First PSN this end sends with, and the one it expects. 24 bits.
    pub sq_psn: u32,
    pub rq_psn: u32,
}

/// What the plugin has taken over so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handed {
    pub files: u32,
    pub maps: u32,
    /// What it has not, in words; empty when the restored processes hold everything.
    pub missing: Vec<String>,
}

/// Writes one frame.
pub fn send<T: Serialize>(mut to: impl Write, message: &T) -> io::Result<()> {
    let body = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if body.len() > MAX_FRAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a message of {} bytes is too long", body.len()),
        ));
    }
    let mut frame = Vec::with_capacity(8 + body.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    to.write_all(&frame)
}

/// Reads one frame; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(mut from: impl Read) -> io::Result<Option<T>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut head = [0; 8];
    match from.read(&mut head[..1])? {
        0 => return Ok(None),
        _ => from.read_exact(&mut head[1..])?,
    }
    if head[..4] != MAGIC {
        return Err(bad("not a frame of this protocol"));
    }
    let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    if len > MAX_FRAME {
        return Err(bad("the frame is too long"));
    }
    let mut body = vec![0; len];
    from.read_exact(&mut body)?;
    postcard::from_bytes(&body).map(Some).map_err(|_| bad("the frame makes no sense"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_survives_the_stream_and_its_end_is_seen() {
        let mut bytes = Vec::new();
        send(&mut bytes, &Reply::Refused("no".into())).unwrap();
        let mut stream = bytes.as_slice();
        assert_eq!(receive::<Reply>(&mut stream).unwrap(), Some(Reply::Refused("no".into())));
        assert_eq!(receive::<Reply>(&mut stream).unwrap(), None);
    }

    #[test]
    fn a_cut_or_foreign_or_huge_frame_is_refused() {
        let mut bytes = Vec::new();
        send(&mut bytes, &Reply::Refused("no".into())).unwrap();
        for cut in 1..bytes.len() {
            assert!(receive::<Reply>(&bytes[..cut]).is_err());
        }
        assert!(receive::<Reply>(&b"GET / HTTP/1.1"[..]).is_err());
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(receive::<Reply>(bytes.as_slice()).is_err());
    }
}
