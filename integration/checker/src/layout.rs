//! Where things are in the memory the peer may access. Both ends compute the same offsets.

use crate::workload::Workload;

/// Offsets within one QP's shared region.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    lanes: usize,
    slots: usize,
    ring: usize,
    /// Bytes of a slot that are used.
    pub slot_len: usize,
    stride: usize,
}

const LINE: usize = 64;

impl Layout {
    /// Layout for a workload.
    #[must_use]
    pub fn new(w: &Workload) -> Self {
        let slot_len = w.msg_size as usize;
        Self {
            lanes: usize::from(w.lanes()),
            slots: usize::from(w.slots),
            // A WRITE WITH IMMEDIATE of several packets may have placed data before it is refused
            // for want of a RECV: one more than can land, and one for the one being looked at.
            ring: w.landing() as usize + 2,
            slot_len,
            stride: slot_len.next_multiple_of(LINE),
        }
    }

    /// Word in which the peer says how many of our messages it has consumed.
    #[must_use]
    pub fn credit(&self) -> usize {
        0
    }

    /// Counter of a lane.
    #[must_use]
    pub fn counter(&self, lane: usize) -> usize {
        LINE + lane * LINE
    }

    /// Compare-and-swap cell of a lane.
    #[must_use]
    pub fn cell(&self, lane: usize) -> usize {
        self.counter(lane) + 8
    }

    fn block(&self, lane: usize) -> usize {
        LINE + self.lanes * LINE + lane * (1 + self.slots + self.ring) * self.stride
    }

    /// The slot of a lane that never changes.
    #[must_use]
    pub fn known(&self, lane: usize) -> usize {
        self.block(lane)
    }

    /// A slot for WRITEs.
    #[must_use]
    pub fn slot(&self, lane: usize, i: usize) -> usize {
        self.block(lane) + (1 + i) * self.stride
    }

    /// Place of a lane's `n`-th WRITE WITH IMMEDIATE.
    #[must_use]
    pub fn ring(&self, lane: usize, n: u64) -> usize {
        let at = usize::try_from(n % self.ring as u64).unwrap_or(0);
        self.block(lane) + (1 + self.slots + at) * self.stride
    }

    /// Distance of buffers of one message each.
    #[must_use]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Bytes of the region.
    #[must_use]
    pub fn total(&self) -> usize {
        self.block(self.lanes)
    }
}
