//! The bytes a message or a memory slot carries: a header that says who wrote it and with which
//! number, then a pattern derived from exactly that, and a CRC over both.
//!
//! A receiver never trusts the header alone: it derives the whole content again from the number it
//! *expects* and compares every byte, so a message in the wrong place, an old one, or half of one
//! is seen. The CRC tells damage in flight ("header and body disagree") from a whole message that
//! is merely the wrong one. Nothing here knows about RDMA.

use std::fmt;

/// Bytes of the header, and the smallest message.
pub const HEADER: usize = 32;
const MAGIC: u32 = 0x4543_4e4f; // "ONCE"
const CRC_AT: usize = 20;

/// What a piece of memory was written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A message in a RECV buffer, sent without immediate data.
    Message = 1,
    /// A slot written by RDMA WRITE.
    Write = 2,
    /// A slot written by RDMA WRITE WITH IMMEDIATE.
    WriteImm = 3,
    /// The region that is only ever read.
    Known = 4,
    /// A slot before its first write.
    Untouched = 5,
    /// A message in a RECV buffer, sent with immediate data.
    MessageImm = 6,
}

/// Which end of the connection wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum Side {
    /// The end that connected.
    Client = 0,
    /// The end that accepted.
    Server = 1,
}

impl Side {
    /// The end at the other side of the connection.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// Identity of one content: no two contents of a run have the same stamp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// The end that made the content.
    pub from: Side,
    /// What it was made for.
    pub kind: Kind,
    /// Index of the QP in the run (not its number).
    pub qp: u16,
    /// Stream within the QP; every posting thread has its own.
    pub lane: u8,
    /// Number within (kind, QP, lane).
    pub seq: u64,
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {:?} qp {} lane {} number {}", self.kind, self.from, self.qp, self.lane, self.seq)
    }
}

/// Why a content is not the expected one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// Offset of the first wrong byte.
    pub at: usize,
    /// Length compared.
    pub len: usize,
    /// What the header found there says, or why it says nothing.
    pub found: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {} of {} is wrong; there is: {}", self.at, self.len, self.found)
    }
}

/// One round of splitmix64: spreads small differences over all bits.
#[must_use]
pub fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn seed(s: &Stamp) -> u64 {
    let place = (s.from as u64) << 40 | (s.kind as u64) << 32 | u64::from(s.qp) << 8 | u64::from(s.lane);
    mix(mix(place) ^ s.seq)
}

fn crc(buf: &[u8]) -> u32 {
    let mut h = crc32fast::Hasher::new();
    h.update(&buf[..CRC_AT]);
    h.update(&buf[CRC_AT + 4..]);
    h.finalize()
}

/// Writes the content of `stamp` over the whole of `buf`.
///
/// # Panics
/// When `buf` is shorter than [`HEADER`].
pub fn fill(buf: &mut [u8], stamp: &Stamp) {
    assert!(buf.len() >= HEADER, "a content needs {HEADER} bytes");
    let len = u32::try_from(buf.len()).expect("contents are far below 4 GiB");
    buf[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    buf[4] = stamp.kind as u8;
    buf[5] = stamp.lane;
    buf[6..8].copy_from_slice(&stamp.qp.to_le_bytes());
    buf[8..16].copy_from_slice(&stamp.seq.to_le_bytes());
    buf[16..20].copy_from_slice(&len.to_le_bytes());
    buf[24..32].copy_from_slice(&(stamp.from as u64).to_le_bytes());
    let mut word = seed(stamp);
    let mut chunks = buf[HEADER..].chunks_exact_mut(8);
    for c in &mut chunks {
        c.copy_from_slice(&word.to_le_bytes());
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    }
    let rest = chunks.into_remainder();
    let n = rest.len();
    rest.copy_from_slice(&word.to_le_bytes()[..n]);
    let sum = crc(buf);
    buf[CRC_AT..CRC_AT + 4].copy_from_slice(&sum.to_le_bytes());
}

/// Compares `buf` with the content of `stamp` at that length.
///
/// # Errors
/// The first wrong byte and what is there instead.
pub fn verify(buf: &[u8], stamp: &Stamp) -> Result<(), Mismatch> {
    if buf.len() < HEADER {
        return Err(Mismatch { at: 0, len: buf.len(), found: format!("only {} bytes", buf.len()) });
    }
    let mut want = vec![0; buf.len()];
    fill(&mut want, stamp);
    compare(buf, &want)
}

/// Compares `buf` with `want` byte by byte.
///
/// # Errors
/// The first wrong byte and what is there instead.
pub fn compare(buf: &[u8], want: &[u8]) -> Result<(), Mismatch> {
    if buf == want {
        return Ok(());
    }
    let at = buf.iter().zip(want).position(|(a, b)| a != b).unwrap_or_else(|| buf.len().min(want.len()));
    Err(Mismatch { at, len: want.len(), found: describe(buf) })
}

/// The number a message claims to carry, or `None` when its header is no header of ours.
#[must_use]
pub fn claimed_seq(buf: &[u8]) -> Option<(u8, u64)> {
    if buf.len() < HEADER || buf[0..4] != MAGIC.to_le_bytes() {
        return None;
    }
    Some((buf[5], u64::from_le_bytes(buf[8..16].try_into().ok()?)))
}

/// Says in words what `buf` seems to hold.
#[must_use]
pub fn describe(buf: &[u8]) -> String {
    let Some((lane, seq)) = claimed_seq(buf) else {
        let head = &buf[..buf.len().min(16)];
        return format!("no header of ours (first bytes {head:02x?})");
    };
    let len = u32::from_le_bytes([buf[16], buf[17], buf[18], buf[19]]) as usize;
    let kind = match buf[4] {
        1 => "Message",
        2 => "Write",
        3 => "WriteImm",
        4 => "Known",
        5 => "Untouched",
        6 => "MessageImm",
        _ => "unknown kind",
    };
    let side = if buf[24] == 0 { "Client" } else { "Server" };
    let qp = u16::from_le_bytes([buf[6], buf[7]]);
    let whole = if len < HEADER || len > buf.len() {
        "its length does not fit".to_owned()
    } else {
        let stored = u32::from_le_bytes([buf[20], buf[21], buf[22], buf[23]]);
        if crc(&buf[..len]) == stored { "its CRC is right".to_owned() } else { "its CRC is wrong".to_owned() }
    };
    format!("{kind} of {side} qp {qp} lane {lane} number {seq}, length {len}, {whole}")
}

/// Length of the `seq`-th message: most are `max`, every fourth is shorter, so that a byte count
/// that stands still is noticed and inline sizes occur.
#[must_use]
pub fn message_len(seq: u64, max: usize) -> usize {
    if seq % 4 != 3 || max <= HEADER {
        return max;
    }
    // Half of the short ones are small enough for inline sends.
    let span = if seq % 8 == 3 { (max - HEADER).min(64) } else { max - HEADER };
    HEADER + usize::try_from(mix(seq) % (span as u64 + 1)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(seq: u64) -> Stamp {
        Stamp { from: Side::Client, kind: Kind::Message, qp: 3, lane: 1, seq }
    }

    #[test]
    fn a_content_verifies_against_its_own_stamp_at_every_length() {
        for len in HEADER..HEADER + 40 {
            let mut b = vec![0; len];
            fill(&mut b, &stamp(7));
            assert_eq!(verify(&b, &stamp(7)), Ok(()));
        }
    }

    #[test]
    fn every_single_flipped_bit_is_seen() {
        let mut b = vec![0; 200];
        fill(&mut b, &stamp(7));
        for bit in 0..200 * 8 {
            b[bit / 8] ^= 1 << (bit % 8);
            let m = verify(&b, &stamp(7)).expect_err("a flipped bit must be seen");
            assert_eq!(m.at, bit / 8);
            b[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn contents_of_other_numbers_lanes_qps_sides_and_kinds_differ_in_the_body_too() {
        let base = stamp(7);
        let others = [
            stamp(8),
            Stamp { lane: 2, ..base },
            Stamp { qp: 4, ..base },
            Stamp { from: Side::Server, ..base },
            Stamp { kind: Kind::Write, ..base },
        ];
        let mut a = vec![0; 64];
        fill(&mut a, &base);
        for o in others {
            let mut b = vec![0; 64];
            fill(&mut b, &o);
            assert_ne!(a[HEADER..], b[HEADER..], "{o}");
        }
    }

    #[test]
    fn a_torn_content_is_told_from_a_whole_but_wrong_one() {
        let mut old = vec![0; 100];
        fill(&mut old, &stamp(1));
        let whole = verify(&old, &stamp(2)).expect_err("old content");
        assert!(whole.found.contains("number 1") && whole.found.contains("CRC is right"));
        let mut torn = vec![0; 100];
        fill(&mut torn, &stamp(2));
        torn[80..].copy_from_slice(&old[80..]);
        let torn = verify(&torn, &stamp(2)).expect_err("torn content");
        assert!(torn.found.contains("CRC is wrong"), "{}", torn.found);
    }

    #[test]
    fn lengths_vary_stay_in_bounds_and_are_the_same_on_both_ends() {
        let lens: Vec<_> = (0..1000).map(|s| message_len(s, 4096)).collect();
        assert!(lens.iter().all(|l| (HEADER..=4096).contains(l)));
        assert!(lens.iter().collect::<std::collections::HashSet<_>>().len() > 20);
        assert_eq!(message_len(3, HEADER), HEADER);
    }
}
