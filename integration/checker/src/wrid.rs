//! What a wr_id says: which QP, which lane, which request.

/// Lane number of the credit updates.
pub const CONTROL: u8 = 0xff;

/// A wr_id taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrId {
    /// A request of a send queue.
    Send {
        /// Index of the QP.
        qp: u16,
        /// Lane, or [`CONTROL`].
        lane: u8,
        /// Number within the lane (40 bits).
        seq: u64,
    },
    /// A RECV.
    Recv {
        /// Index of the QP, or of the SRQ.
        owner: u16,
        /// Buffer.
        slot: u16,
        /// How often the buffer was posted (24 bits).
        turn: u32,
    },
}

impl WrId {
    /// The number given to the library.
    #[must_use]
    pub fn encode(self) -> u64 {
        match self {
            Self::Send { qp, lane, seq } => u64::from(qp) << 48 | u64::from(lane) << 40 | (seq & 0xff_ffff_ffff),
            Self::Recv { owner, slot, turn } => {
                1 << 63 | u64::from(owner) << 48 | u64::from(slot) << 24 | u64::from(turn & 0xff_ffff)
            }
        }
    }

    /// Takes a number from the library apart.
    #[must_use]
    pub fn decode(v: u64) -> Self {
        let owner = (v >> 48 & 0x7fff) as u16;
        if v >> 63 == 1 {
            Self::Recv { owner, slot: (v >> 24 & 0xffff) as u16, turn: (v & 0xff_ffff) as u32 }
        } else {
            Self::Send { qp: owner, lane: (v >> 40 & 0xff) as u8, seq: v & 0xff_ffff_ffff }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_survives() {
        for id in [
            WrId::Send { qp: 0x7fff, lane: 0xff, seq: 0xff_ffff_ffff },
            WrId::Send { qp: 0, lane: 3, seq: 1 },
            WrId::Recv { owner: 0x7fff, slot: 0xffff, turn: 0xff_ffff },
            WrId::Recv { owner: 5, slot: 2, turn: 0 },
        ] {
            assert_eq!(WrId::decode(id.encode()), id);
        }
    }
}
