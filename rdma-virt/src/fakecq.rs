//! Completions taken from a real CQ before the application asked for them; it is served from here first.
//!
//! One per CQ, under the CQ's lock: as long as whoever fills it also holds that lock while polling the real queue,
//! completions reach the application in the order the NIC made them. Polling itself is not here.

use crate::id::VQpn;
use std::collections::VecDeque;

/// A completion: the fields of `struct ibv_wc`, in the application's own terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    pub wr_id: u64,
    /// `enum ibv_wc_status`.
    pub status: u32,
    /// `enum ibv_wc_opcode`.
    pub opcode: u32,
    pub vendor_err: u32,
    pub byte_len: u32,
    /// `imm_data` or `invalidated_rkey`, bytes as they came.
    pub imm: u32,
    pub qpn: VQpn,
    pub src_qp: u32,
    /// `enum ibv_wc_flags`.
    pub flags: u32,
    pub pkey_index: u16,
    pub slid: u16,
    pub sl: u8,
    pub dlid_path_bits: u8,
}

/// Completions waiting for the application, oldest first.
#[derive(Debug, Default)]
pub struct FakeCq {
    queue: VecDeque<Completion>,
}

impl FakeCq {
    pub fn new() -> Self {
        Self::default()
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub fn len(&self) -> usize {
        self.queue.len()
    }

    /// Adds one at the end. Its number is bounded by what can be in flight: every WR gives at most one completion.
    pub fn push(&mut self, completion: Completion) {
        self.queue.push_back(completion);
    }

    /// The oldest one.
    #[inline]
    pub fn pop(&mut self) -> Option<Completion> {
        self.queue.pop_front()
    }

    /// Removes what a QP left behind, as `ibv_destroy_qp` and a reset do with a real CQ.
    pub fn forget(&mut self, qpn: VQpn) {
        self.queue.retain(|c| c.qpn != qpn);
    }
}
