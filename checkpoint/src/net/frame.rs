//! Frames: a fixed header (magic, version where the protocol has one there, length) and a postcard body.
//!
//! The header is checked, and the length capped, before anything is allocated; a body must be used up to its last
//! byte. No sockets and no deadlines here: those belong to whoever owns the stream.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};

/// One of the two protocols that share this framing.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    magic: [u8; 4],
    /// In the header after the magic; the shim protocol has its version in its first message instead.
    version: Option<u16>,
    /// Longest body, bytes.
    cap: usize,
}

/// Between a shim and its agent ([`rdma_virt::msg`]).
pub const SHIM: Wire = Wire { magic: rdma_virt::msg::MAGIC, version: None, cap: rdma_virt::msg::MAX_FRAME };

/// Between agents ([`super::msg`]). The cap leaves room for the reports of many processes at once.
pub const AGENT: Wire = Wire { magic: *b"mra1", version: Some(super::msg::VERSION), cap: 64 << 20 };

/// Why a frame was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The stream ended between two frames: an orderly end.
    #[error("the other side closed the connection")]
    Closed,
    #[error("the connection broke")]
    Io(#[source] io::Error),
    #[error("the time for an answer is over")]
    TimedOut,
    #[error(
        "nothing was heard of it for {0:?}, not even that it is at work: the host or its agent stands still, or the \
             link is cut"
    )]
    Silent(std::time::Duration),
    #[error("the frame begins with {0:02x?}: this is not our protocol")]
    Magic([u8; 4]),
    #[error(
        "the other side speaks version {theirs} of the protocol, this program version {ours}; update the older one"
    )]
    Version { theirs: u16, ours: u16 },
    #[error("the frame claims {len} bytes, more than the allowed {cap}")]
    TooLong { len: usize, cap: usize },
    #[error("the message inside the frame cannot be read")]
    Body(#[source] postcard::Error),
    #[error("{0} bytes follow the message inside the frame")]
    Rest(usize),
    #[error("the message cannot be written")]
    Encode(#[source] postcard::Error),
}

impl From<io::Error> for FrameError {
    fn from(e: io::Error) -> Self {
        match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => FrameError::TimedOut,
            _ => FrameError::Io(e),
        }
    }
}

impl Wire {
    fn header_len(&self) -> usize {
        if self.version.is_some() { 10 } else { 8 }
    }

    /// The whole frame of a message.
    pub fn encode<T: Serialize>(&self, message: &T) -> Result<Vec<u8>, FrameError> {
        self.sealed(|out| postcard::to_extend(message, out).map_err(FrameError::Encode))
    }

    /// The frame of a body that was made elsewhere, and may be no message at all.
    pub fn frame(&self, body: &[u8]) -> Result<Vec<u8>, FrameError> {
        self.sealed(|mut out| {
            out.extend_from_slice(body);
            Ok(out)
        })
    }

    /// A header, then what `write` adds to it.
    fn sealed(&self, write: impl FnOnce(Vec<u8>) -> Result<Vec<u8>, FrameError>) -> Result<Vec<u8>, FrameError> {
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(&self.magic);
        out.extend(self.version.into_iter().flat_map(u16::to_le_bytes));
        out.extend_from_slice(&[0; 4]);
        let header = self.header_len();
        let mut out = write(out)?;
        let len = out.len() - header;
        if len > self.cap {
            return Err(FrameError::TooLong { len, cap: self.cap });
        }
        let len = u32::try_from(len).map_err(|_| FrameError::TooLong { len, cap: self.cap })?;
        out[header - 4..header].copy_from_slice(&len.to_le_bytes());
        Ok(out)
    }

    /// Writes one frame.
    pub fn write<T: Serialize>(&self, to: &mut impl Write, message: &T) -> Result<(), FrameError> {
        let bytes = self.encode(message)?;
        to.write_all(&bytes)?;
        Ok(to.flush()?)
    }

    /// The same for bodies of so many bytes at most.
    pub fn at_most(self, cap: usize) -> Self {
        Wire { cap: cap.min(self.cap), ..self }
    }

    /// Reads one frame. Memory grows with the bytes that really arrive, not with the length claimed.
    pub fn read<T: DeserializeOwned>(&self, from: &mut impl Read) -> Result<T, FrameError> {
        self.read_when(from, |_| ())
    }

    /// As [`Wire::read`]. `room` is told the length before the body is read; what it returns is kept until the message is
    /// there.
    pub fn read_when<T: DeserializeOwned, G>(
        &self,
        from: &mut impl Read,
        room: impl FnOnce(usize) -> G,
    ) -> Result<T, FrameError> {
        let mut header = [0; 10];
        let header = &mut header[..self.header_len()];
        read_header(from, header)?;
        let magic: [u8; 4] = [header[0], header[1], header[2], header[3]];
        if magic != self.magic {
            return Err(FrameError::Magic(magic));
        }
        if let Some(ours) = self.version {
            let theirs = u16::from_le_bytes([header[4], header[5]]);
            if theirs != ours {
                return Err(FrameError::Version { theirs, ours });
            }
        }
        let tail = header.len() - 4;
        let len = u32::from_le_bytes([header[tail], header[tail + 1], header[tail + 2], header[tail + 3]]) as usize;
        if len > self.cap {
            return Err(FrameError::TooLong { len, cap: self.cap });
        }
        let _room = room(len);
        let mut body = Vec::with_capacity(len.min(64 << 10));
        from.take(len as u64).read_to_end(&mut body)?;
        if body.len() < len {
            return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into()));
        }
        match postcard::take_from_bytes(&body) {
            Ok((message, [])) => Ok(message),
            Ok((_, rest)) => Err(FrameError::Rest(rest.len())),
            Err(e) => Err(FrameError::Body(e)),
        }
    }
}

/// Like `read_exact`, but an end before the first byte is [`FrameError::Closed`].
fn read_header(from: &mut impl Read, header: &mut [u8]) -> Result<(), FrameError> {
    let mut got = 0;
    while got < header.len() {
        match from.read(&mut header[got..]) {
            Ok(0) if got == 0 => return Err(FrameError::Closed),
            Ok(0) => return Err(FrameError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => got += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdma_virt::id::Vpid;
    use rdma_virt::msg::{Hello, Role};

    fn hello() -> Hello {
        Hello { version: 1, vpid: Vpid(7), comm: "app".into(), role: Role::Control }
    }

    fn decode(wire: Wire, bytes: &[u8]) -> Result<Hello, FrameError> {
        wire.read(&mut &bytes[..])
    }

    #[test]
    fn a_message_survives_the_wire() {
        for wire in [SHIM, AGENT] {
            assert_eq!(decode(wire, &wire.encode(&hello()).unwrap()).unwrap(), hello());
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        for wire in [SHIM, AGENT] {
            let bytes = wire.encode(&hello()).unwrap();
            assert!(matches!(decode(wire, &[]), Err(FrameError::Closed)));
            for n in 1..bytes.len() {
                assert!(matches!(decode(wire, &bytes[..n]), Err(FrameError::Io(_))), "cut at {n}");
            }
        }
    }

    #[test]
    fn wrong_magic_wrong_version_and_oversize_are_told_apart() {
        let good = AGENT.encode(&hello()).unwrap();
        let with = |at: usize, byte: u8| {
            let mut b = good.clone();
            b[at] = byte;
            decode(AGENT, &b)
        };
        assert!(matches!(with(0, b'x'), Err(FrameError::Magic(_))));
        assert!(matches!(with(4, 0xfe), Err(FrameError::Version { theirs: 0xfe, .. })));
        assert!(matches!(with(9, 0xff), Err(FrameError::TooLong { .. })));
    }

    #[test]
    fn bytes_after_the_message_are_refused() {
        let mut bytes = SHIM.encode(&hello()).unwrap();
        let len = u32::from_le_bytes(bytes[4..8].try_into().unwrap());
        bytes[4..8].copy_from_slice(&(len + 1).to_le_bytes());
        bytes.push(0);
        assert!(matches!(decode(SHIM, &bytes), Err(FrameError::Rest(1))));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_at_all_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = decode(SHIM, &bytes);
            let mut framed = SHIM.magic.to_vec();
            framed.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
            framed.extend_from_slice(&bytes);
            let _ = decode(SHIM, &framed);
            let _ = SHIM.read::<rdma_virt::msg::FromShim>(&mut &framed[..]);
        }
    }
}
