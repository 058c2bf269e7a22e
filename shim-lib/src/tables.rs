//! Numbers that exist twice, as the data path looks them up: `rdma-virt`'s lock-free tables, with what their tokens
//! mean here.
//!
//! QPNs: what the NIC writes into a completion (physical) to the QP and the number its application knows (virtual).
//! Keys: what the application writes into a work request (virtual) to what the NIC accepts (physical). Which numbers
//! are given out is not decided here.
#![expect(unsafe_code, reason = "tokens of the QPN table are pointers")]

use rdma_virt::id::{PQpn, VQpn};
pub use rdma_virt::keys::{LocalKeys, RemoteKeys};

use crate::qp::ShadowQp;

/// Virtual number of QPs the shim makes for itself: their completions are nobody's.
pub const OURS: VQpn = VQpn(u32::MAX);

/// What a physical QPN means.
pub enum Owner<'a> {
    /// A QP of the application.
    Qp(&'a ShadowQp),
    /// One that was destroyed; its completions still carry the number its application knew.
    Gone(VQpn),
    /// A helper of the shim.
    Ours,
    /// A QP we do not shadow.
    Unknown,
}

/// Physical QPN to shadow QP. A token is the address of a shadow, which is even, or a number the application knew with
/// a one behind it.
#[derive(Debug, Default)]
pub struct Qpns(rdma_virt::qpns::QpnTable);

fn number(vqpn: VQpn) -> usize {
    (vqpn.0 as usize) << 1 | 1
}

impl Qpns {
    pub fn new() -> Self {
        Self::default()
    }

    /// Who completions with this QPN belong to. The reference is good as long as the caller holds the lock of a CQ of
    /// that QP: a QP being destroyed leaves this table first and passes through its CQs' locks before it goes.
    #[inline]
    pub fn owner(&self, pqpn: u32) -> Owner<'_> {
        match self.0.get(PQpn(pqpn)) {
            None => Owner::Unknown,
            // SAFETY: see above; tokens without the mark are addresses put here by `insert`.
            Some(token) if token & 1 == 0 => Owner::Qp(unsafe { &*(token as *const ShadowQp) }),
            Some(token) if token == number(OURS) => Owner::Ours,
            Some(token) => Owner::Gone(VQpn((token >> 1) as u32)),
        }
    }

    pub fn insert(&self, pqpn: PQpn, qp: *const ShadowQp) {
        self.0.set(pqpn, qp as usize);
    }

    /// Names a QP of the shim's own.
    pub fn insert_helper(&self, pqpn: PQpn) {
        self.0.set(pqpn, number(OURS));
    }

    /// The NIC's QP is gone, its completions may still be in a CQ: leaves the number its application knew.
    pub fn remove(&self, pqpn: PQpn, qp: *const ShadowQp, known_as: VQpn) {
        if self.0.get(pqpn) == Some(qp as usize) {
            self.0.set(pqpn, number(known_as));
        }
    }
}
