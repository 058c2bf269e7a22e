//! The frames spoken on a node's control channel, shared by both ends.
//!
//! One TCP connection carries one request. A frame is a little-endian `u32`
//! length, one tag byte and the payload. The channel is reachable from the
//! host's loopback only and opens with a token; it is the lab's own and has
//! nothing to do with the protocol of the project's agents.

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Changes whenever either side would misread the other.
pub const WIRE_VERSION: u32 = 1;

/// TCP port the guest side listens on, inside the node.
pub const GUEST_PORT: u16 = 4711;

/// Longest payload either side accepts, in bytes.
pub const MAX_FRAME: usize = 1 << 20;

/// What a frame's payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// [`Hello`] as JSON; the first frame of a connection.
    Hello = 1,
    /// Bytes for the process's standard input, or of a file being written.
    Input = 2,
    /// No more [`Tag::Input`] will come.
    InputEnd = 3,
    /// One byte: the signal to send to the process group.
    Signal = 4,
    /// Bytes of standard output, or of a file being read.
    Stdout = 5,
    /// Bytes of standard error.
    Stderr = 6,
    /// [`Done`] as JSON; the last frame of a connection.
    Done = 7,
    /// Text: the request could not be carried out.
    Failed = 8,
}

impl Tag {
    fn from_u8(v: u8) -> Option<Tag> {
        Some(match v {
            1 => Tag::Hello,
            2 => Tag::Input,
            3 => Tag::InputEnd,
            4 => Tag::Signal,
            5 => Tag::Stdout,
            6 => Tag::Stderr,
            7 => Tag::Done,
            8 => Tag::Failed,
            _ => return None,
        })
    }
}

/// Opens a connection.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    /// Must equal [`WIRE_VERSION`].
    pub version: u32,
    /// Secret made with the node image.
    pub token: String,
    /// What is asked for.
    pub request: Request,
}

/// What can be asked of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Answers [`Done`] with status 0.
    Ping,
    /// Runs a program and streams its output. The program and whatever shares
    /// its process group are ended when the connection goes away.
    Exec(Exec),
    /// Creates or replaces a file from the following input frames.
    Write {
        /// Absolute path; missing parent directories are made.
        path: String,
        /// Permission bits.
        mode: u32,
    },
    /// Sends a regular file's bytes as output frames.
    Read {
        /// Absolute path.
        path: String,
    },
    /// Sets the node's clock, which stood still in a snapshot.
    SetClock {
        /// Nanoseconds since the epoch.
        unix_nanos: u64,
    },
}

/// A program to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments, handed over as they are: no shell in between.
    pub argv: Vec<String>,
    /// Added to the node's own environment.
    pub env: Vec<(String, String)>,
    /// Working directory; `/root` when absent.
    pub cwd: Option<String>,
    /// Whether input frames will follow; otherwise `/dev/null`.
    pub stdin: bool,
    /// Ends the process group after this many milliseconds.
    pub timeout_ms: Option<u64>,
}

/// How a request ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Done {
    /// Exit status, when the program exited.
    pub code: Option<i32>,
    /// Signal number, when a signal ended it.
    pub signal: Option<i32>,
    /// Whether the time limit ended it.
    pub timed_out: bool,
    /// File mode, for [`Request::Read`].
    pub mode: Option<u32>,
}

impl Done {
    /// A request that simply succeeded.
    pub fn ok() -> Done {
        Done { code: Some(0), signal: None, timed_out: false, mode: None }
    }
}

/// Writes one frame with a single `write`, so that frames of several threads
/// do not interleave under a lock held for one call.
pub fn send(out: &mut impl Write, tag: Tag, payload: &[u8]) -> io::Result<()> {
    debug_assert!(payload.len() <= MAX_FRAME);
    let mut frame = Vec::with_capacity(payload.len() + 5);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.push(tag as u8);
    frame.extend_from_slice(payload);
    out.write_all(&frame)
}

/// Reads one frame; `None` when the other side closed between frames.
pub fn receive(input: &mut impl Read) -> io::Result<Option<(Tag, Vec<u8>)>> {
    let mut head = [0u8; 5];
    let mut have = 0;
    while have < head.len() {
        match input.read(&mut head[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => have += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
    let tag = Tag::from_u8(head[4]);
    let (Some(tag), true) = (tag, len <= MAX_FRAME) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("control channel: bad frame (tag {}, {len} bytes)", head[4]),
        ));
    };
    let mut payload = vec![0u8; len];
    input.read_exact(&mut payload)?;
    Ok(Some((tag, payload)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_it_was_sent() {
        let mut buf = Vec::new();
        send(&mut buf, Tag::Stdout, b"hello").unwrap();
        send(&mut buf, Tag::InputEnd, b"").unwrap();
        let mut r = buf.as_slice();
        assert_eq!(receive(&mut r).unwrap(), Some((Tag::Stdout, b"hello".to_vec())));
        assert_eq!(receive(&mut r).unwrap(), Some((Tag::InputEnd, vec![])));
        assert_eq!(receive(&mut r).unwrap(), None);
    }

    #[test]
    fn an_oversized_length_is_refused_before_it_is_allocated() {
        let mut frame = u32::MAX.to_le_bytes().to_vec();
        frame.push(Tag::Input as u8);
        assert_eq!(receive(&mut frame.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_frame_cut_short_is_an_error_not_an_end() {
        let mut buf = Vec::new();
        send(&mut buf, Tag::Stdout, b"hello").unwrap();
        buf.truncate(7);
        assert!(receive(&mut buf.as_slice()).is_err());
    }
}
