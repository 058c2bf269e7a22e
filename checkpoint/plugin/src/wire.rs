//! What the CRIU plugin, inside a task being restored, and the incubator say to each other: one request and one reply
//! per connection, each one packet of a `SOCK_SEQPACKET` unix socket. The reply carries a descriptor when it grants.
//!
//! Compiled into both sides. Only bytes are made and checked here; sockets are elsewhere.

/// Where the socket is inside a container.
pub const SOCKET: &str = "/run/.migrrdma/incubator.sock";

/// Environment variable of `criu` that names another socket path.
pub const SOCKET_ENV: &str = "MIGRRDMA_INCUBATOR";

/// Length of a request, bytes.
pub const REQUEST: usize = 32;

/// Longest reply, bytes.
pub const MAX_REPLY: usize = REPLY_HEADER + MAX_PLACES * PLACE;

/// Longest reason for a refusal, bytes.
const MAX_WHY: usize = 480;

/// Most places in one reply.
pub const MAX_PLACES: usize = 1024;

/// Length of one, bytes.
const PLACE: usize = 20;

const MAGIC: [u8; 4] = *b"mri1";
const VERSION: u16 = 2;
const REPLY_HEADER: usize = 16;

/// What a restored task needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// The file that was open as `fd` in process `vpid`.
    File { vpid: i32, fd: i32 },
    /// The file and offset to map at `addr` in process `vpid`, where `offset` was mapped before.
    Map { vpid: i32, addr: u64, offset: u64 },
    /// Where everything is to be mapped that process `vpid` had mapped, but for the `first` places: one question instead
    /// of one for each queue. A reply with fewer than [`MAX_PLACES`] is the last one.
    Maps { vpid: i32, first: u32 },
}

/// A queue of a process that asks for all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Where it was mapped.
    pub addr: u64,
    /// Descriptor of the process that it is mapped from.
    pub fd: i32,
    /// The offset there now.
    pub offset: u64,
}

/// The incubator's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A descriptor comes with it; `offset` is meant for [`Want::Map`].
    Granted { offset: u64 },
    /// To [`Want::Maps`]: no descriptor comes with it, the process has them.
    Places(Vec<Place>),
    /// In one sentence.
    Refused { why: String },
}

/// A packet is not what this version speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadPacket;

impl std::fmt::Display for BadPacket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("plugin and incubator do not speak the same version; install both from one release")
    }
}

fn head(kind: u16) -> [u8; 8] {
    let mut head = [0; 8];
    head[..4].copy_from_slice(&MAGIC);
    head[4..6].copy_from_slice(&VERSION.to_le_bytes());
    head[6..].copy_from_slice(&kind.to_le_bytes());
    head
}

fn kind_of(packet: &[u8]) -> Result<u16, BadPacket> {
    if packet.get(..4) != Some(&MAGIC[..]) || packet.get(4..6) != Some(&VERSION.to_le_bytes()[..]) {
        return Err(BadPacket);
    }
    packet.get(6..8).map(|k| u16::from_le_bytes([k[0], k[1]])).ok_or(BadPacket)
}

fn u32_at(packet: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
}

fn u64_at(packet: &[u8], at: usize) -> u64 {
    u64::from(u32_at(packet, at)) | u64::from(u32_at(packet, at + 4)) << 32
}

impl Want {
    pub fn encode(self) -> [u8; REQUEST] {
        let (kind, vpid, fd, addr, offset) = match self {
            Want::File { vpid, fd } => (1, vpid, fd, 0, 0),
            Want::Map { vpid, addr, offset } => (2, vpid, -1, addr, offset),
            Want::Maps { vpid, first } => (3, vpid, -1, first.into(), 0),
        };
        let mut packet = [0; REQUEST];
        packet[..8].copy_from_slice(&head(kind));
        packet[8..12].copy_from_slice(&vpid.to_le_bytes());
        packet[12..16].copy_from_slice(&fd.to_le_bytes());
        packet[16..24].copy_from_slice(&addr.to_le_bytes());
        packet[24..32].copy_from_slice(&offset.to_le_bytes());
        packet
    }

    pub fn decode(packet: &[u8]) -> Result<Self, BadPacket> {
        let kind = kind_of(packet)?;
        if packet.len() != REQUEST {
            return Err(BadPacket);
        }
        let vpid = u32_at(packet, 8) as i32;
        match kind {
            1 => Ok(Want::File { vpid, fd: u32_at(packet, 12) as i32 }),
            2 => Ok(Want::Map { vpid, addr: u64_at(packet, 16), offset: u64_at(packet, 24) }),
            3 => Ok(Want::Maps { vpid, first: u32_at(packet, 16) }),
            _ => Err(BadPacket),
        }
    }
}

impl Answer {
    pub fn encode(&self) -> Vec<u8> {
        let (kind, number) = match self {
            Answer::Granted { offset } => (0, *offset),
            Answer::Refused { .. } => (1, 0),
            Answer::Places(_) => (2, 0),
        };
        let mut packet = head(kind).to_vec();
        packet.extend_from_slice(&number.to_le_bytes());
        match self {
            Answer::Granted { .. } => {}
            Answer::Refused { why } => packet.extend_from_slice(&why.as_bytes()[..why.len().min(MAX_WHY)]),
            Answer::Places(places) => {
                for place in places.iter().take(MAX_PLACES) {
                    packet.extend_from_slice(&place.addr.to_le_bytes());
                    packet.extend_from_slice(&place.offset.to_le_bytes());
                    packet.extend_from_slice(&place.fd.to_le_bytes());
                }
            }
        }
        packet
    }

    pub fn decode(packet: &[u8]) -> Result<Self, BadPacket> {
        let kind = kind_of(packet)?;
        if packet.len() < REPLY_HEADER {
            return Err(BadPacket);
        }
        match kind {
            0 => Ok(Answer::Granted { offset: u64_at(packet, 8) }),
            1 => Ok(Answer::Refused { why: String::from_utf8_lossy(&packet[REPLY_HEADER..]).into_owned() }),
            2 if (packet.len() - REPLY_HEADER).is_multiple_of(PLACE) && packet.len() <= MAX_REPLY => {
                let place = |p: &[u8]| Place { addr: u64_at(p, 0), offset: u64_at(p, 8), fd: u32_at(p, 16) as i32 };
                Ok(Answer::Places(packet[REPLY_HEADER..].chunks_exact(PLACE).map(place).collect()))
            }
            _ => Err(BadPacket),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_replies_survive_their_bytes() {
        let map = Want::Map { vpid: 1, addr: 0x7fff_1234_5000, offset: 1 << 40 };
        for want in [Want::File { vpid: 7, fd: 900 }, map, Want::Maps { vpid: 2, first: 1024 }] {
            assert_eq!(Want::decode(&want.encode()), Ok(want));
        }
        let places = [(1 << 40, 4, 1 << 33), (4096, -1, 0)].map(|(addr, fd, offset)| Place { addr, fd, offset });
        for answer in [
            Answer::Granted { offset: 1 << 33 },
            Answer::Refused { why: "QP 17: sizes differ".into() },
            Answer::Places(places.to_vec()),
            Answer::Places(Vec::new()),
            Answer::Places(vec![places[0]; MAX_PLACES]),
        ] {
            assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
        }
    }

    #[test]
    fn a_long_refusal_is_cut_and_garbage_is_refused() {
        let long = Answer::Refused { why: "x".repeat(5000) };
        assert_eq!(long.encode().len(), REPLY_HEADER + MAX_WHY);
        let mut uneven = Answer::Places(vec![Place { addr: 1, fd: 1, offset: 1 }]).encode();
        uneven.pop();
        assert_eq!(Answer::decode(&uneven), Err(BadPacket));
        for len in 0..40 {
            assert_eq!(Want::decode(&vec![0xa5; len]), Err(BadPacket));
            assert_eq!(Answer::decode(&vec![0xa5; len]), Err(BadPacket));
        }
        let mut newer = Want::File { vpid: 1, fd: 1 }.encode();
        newer[4] = 3;
        assert_eq!(Want::decode(&newer), Err(BadPacket));
    }
}
