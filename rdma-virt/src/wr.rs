//! Work requests as they are remembered: deep copies in the application's own terms (virtual keys and numbers).
//!
//! Turning them into `struct ibv_send_wr` again, with translated keys, is the shim's work.

use crate::id::{VLkey, VRkey};

/// `enum ibv_wr_opcode`, as far as the rules of this crate tell operations apart.
pub mod opcode {
    pub const RDMA_WRITE: u32 = 0;
    pub const RDMA_WRITE_WITH_IMM: u32 = 1;
    pub const SEND: u32 = 2;
    pub const SEND_WITH_IMM: u32 = 3;
    pub const RDMA_READ: u32 = 4;
    pub const ATOMIC_CMP_AND_SWP: u32 = 5;
    pub const ATOMIC_FETCH_AND_ADD: u32 = 6;
    pub const SEND_WITH_INV: u32 = 9;

    /// Whether it consumes a receive at the other end.
    #[inline]
    pub fn is_two_sided(opcode: u32) -> bool {
        matches!(opcode, RDMA_WRITE_WITH_IMM | SEND | SEND_WITH_IMM | SEND_WITH_INV)
    }
}

/// The `wr_id` of sends the shim adds on its own account. Completions that carry it never reach the application.
/// ("mrdmarkr": no program uses it as an index or a pointer.)
pub const MARKER_WR_ID: u64 = u64::from_be_bytes(*b"mrdmarkr");

/// One element of a scatter/gather list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sge {
    pub addr: u64,
    pub length: u32,
    /// [`VLkey`] as a plain number, so that a list can be made of zeroed memory.
    pub lkey: u32,
}

impl Sge {
    pub fn vlkey(&self) -> VLkey {
        VLkey(self.lkey)
    }
}

/// What a held send carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Memory that the application promised not to touch before the completion.
    Sges(Vec<Sge>),
    /// `IBV_SEND_INLINE`: the application may reuse its buffer as soon as the post returns, so the bytes are here.
    Inline(Vec<u8>),
}

/// A send posted while the QP was suspended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldSend {
    pub wr_id: u64,
    /// `enum ibv_wr_opcode`.
    pub opcode: u32,
    /// `enum ibv_send_flags`.
    pub flags: u32,
    /// `imm_data` or `invalidate_rkey`, bytes as they came.
    pub imm: u32,
    pub payload: Payload,
    /// Of one-sided operations.
    pub remote_addr: u64,
    pub rkey: VRkey,
    /// Of atomics.
    pub compare_add: u64,
    pub swap: u64,
    /// Of datagrams.
    pub datagram: Option<Datagram>,
}

/// Destination of a datagram, as posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Pointer to the application's address handle.
    pub ah: u64,
    pub remote_qpn: u32,
    pub remote_qkey: u32,
}

/// A posted receive, borrowed from the ledger that remembers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Receive<'a> {
    pub wr_id: u64,
    pub sges: &'a [Sge],
}
