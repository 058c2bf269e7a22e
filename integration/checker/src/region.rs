//! Model of a remote region that only one lane writes: what must be in it once all is done, and
//! which slot may be written or read back now.
//!
//! A slot being read back is not written until the READ is known to be complete: after a
//! retransmission the responder may execute a READ again, and it would rightly see the later WRITE.
//!
//! Contents follow from their stamps, so stamps are all that is kept: a model that wrote as much memory as the lane writes
//! over the wire would be most of what a moved checker has to copy.

use crate::pattern::{self, Kind, Side, Stamp};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Nothing is under way that reads it; may be written.
    Settled,
    /// Written and not read back yet.
    Written,
    /// A READ of it is under way.
    Reading,
}

/// What a slot holds: each of these from the slot's start, a later one over an earlier one that is longer.
type Layers = Vec<(usize, Stamp)>;

/// The slots of one lane in the peer's memory.
#[derive(Debug)]
pub struct RegionModel {
    side: Side,
    qp: u16,
    lane: u8,
    slot_len: usize,
    layers: Vec<Layers>,
    slots: Vec<Slot>,
    cursor: usize,
    next_stamp: u64,
}

/// One WRITE the caller shall post.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlannedWrite {
    /// Slot to write.
    pub slot: usize,
    /// Bytes to write, from the slot's start.
    pub len: usize,
    /// Their content.
    pub stamp: Stamp,
}

impl RegionModel {
    /// A region of `slots` slots of `slot_len` bytes that still holds its initial content.
    #[must_use]
    pub fn new(side: Side, qp: u16, lane: u8, slots: usize, slot_len: usize) -> Self {
        // The initial content is the owner's, that is, the other side's.
        let layers = (0..slots).map(|i| vec![(slot_len, untouched(side.other(), qp, lane, i))]).collect();
        Self { side, qp, lane, slot_len, layers, slots: vec![Slot::Settled; slots], cursor: 0, next_stamp: 0 }
    }

    /// Chooses the next slot to write and records the write as done. `None` when every slot is
    /// being read back.
    pub fn plan_write(&mut self) -> Option<PlannedWrite> {
        let n = self.slots.len();
        let slot = (0..n).map(|i| (self.cursor + i) % n).find(|&i| self.slots[i] != Slot::Reading)?;
        self.cursor = (slot + 1) % n;
        let seq = self.next_stamp;
        self.next_stamp += 1;
        let stamp = Stamp { from: self.side, kind: Kind::Write, qp: self.qp, lane: self.lane, seq };
        let len = pattern::message_len(seq, self.slot_len);
        let layers = &mut self.layers[slot];
        layers.retain(|(under, _)| *under > len);
        layers.push((len, stamp));
        self.slots[slot] = Slot::Written;
        Some(PlannedWrite { slot, len, stamp })
    }

    /// Chooses a written slot to read back in full. `None` when there is none.
    pub fn plan_read_back(&mut self) -> Option<usize> {
        let n = self.slots.len();
        let slot = (0..n).map(|i| (self.cursor + i) % n).find(|&i| self.slots[i] == Slot::Written)?;
        self.slots[slot] = Slot::Reading;
        Some(slot)
    }

    /// The READ of `slot` is complete and brought `data`.
    ///
    /// # Errors
    /// When the data is not what was written last.
    pub fn read_back(&mut self, slot: usize, data: &[u8]) -> Result<(), pattern::Mismatch> {
        self.slots[slot] = Slot::Settled;
        pattern::compare(data, &self.expected(slot))
    }

    /// What `slot` must hold once every planned write is done.
    #[must_use]
    pub fn expected(&self, slot: usize) -> Vec<u8> {
        let mut content = vec![0; self.slot_len];
        for (len, stamp) in &self.layers[slot] {
            pattern::fill(&mut content[..*len], stamp);
        }
        content
    }

    /// CRC of every slot, for the owner of the memory to compare with.
    #[must_use]
    pub fn checksums(&self) -> Vec<u32> {
        (0..self.slots.len()).map(|slot| crc32fast::hash(&self.expected(slot))).collect()
    }

    /// Writes planned so far.
    #[must_use]
    pub fn writes(&self) -> u64 {
        self.next_stamp
    }
}

/// Fills one slot with the content it has before the first write.
pub fn initial(buf: &mut [u8], owner: Side, qp: u16, lane: u8, slot: usize) {
    pattern::fill(buf, &untouched(owner, qp, lane, slot));
}

fn untouched(owner: Side, qp: u16, lane: u8, slot: usize) -> Stamp {
    Stamp { from: owner, kind: Kind::Untouched, qp, lane, seq: slot as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owner_memory(slots: usize, len: usize) -> Vec<u8> {
        let mut m = vec![0; slots * len];
        for i in 0..slots {
            initial(&mut m[i * len..][..len], Side::Server, 0, 0, i);
        }
        m
    }

    fn execute(memory: &mut [u8], len: usize, w: &PlannedWrite) {
        pattern::fill(&mut memory[w.slot * len..][..w.len], &w.stamp);
    }

    fn sums(memory: &[u8], len: usize) -> Vec<u32> {
        memory.chunks(len).map(crc32fast::hash).collect()
    }

    #[test]
    fn an_untouched_region_agrees_with_its_owner() {
        let model = RegionModel::new(Side::Client, 0, 0, 4, 256);
        assert_eq!(model.checksums(), sums(&owner_memory(4, 256), 256));
    }

    #[test]
    fn a_lost_last_write_is_seen_by_the_owners_checksum() {
        let mut model = RegionModel::new(Side::Client, 0, 0, 4, 256);
        let mut memory = owner_memory(4, 256);
        for i in 0..9 {
            let w = model.plan_write().expect("no slot is being read");
            if i != 8 {
                execute(&mut memory, 256, &w);
            }
        }
        assert_ne!(model.checksums(), sums(&memory, 256));
    }

    #[test]
    fn a_write_that_landed_in_the_wrong_slot_is_seen_when_read_back() {
        let mut model = RegionModel::new(Side::Client, 0, 0, 4, 256);
        let mut memory = owner_memory(4, 256);
        let mut w = model.plan_write().expect("free slot");
        w.slot = 2;
        execute(&mut memory, 256, &w);
        let s = model.plan_read_back().expect("one written slot");
        assert!(model.read_back(s, &memory[s * 256..][..256]).is_err());
    }

    #[test]
    fn a_slot_that_is_being_read_is_never_written() {
        let mut model = RegionModel::new(Side::Client, 0, 0, 2, 64);
        let a = model.plan_write().expect("free slot").slot;
        assert_eq!(model.plan_read_back(), Some(a));
        for _ in 0..5 {
            assert_ne!(model.plan_write().expect("the other slot").slot, a);
        }
        let _ = model.plan_read_back();
        assert_eq!(model.plan_write(), None);
    }

    proptest! {
        #[test]
        fn a_memory_that_executes_every_write_in_order_always_agrees(
            ops in proptest::collection::vec(0u8..3, 1..200)
        ) {
            let mut model = RegionModel::new(Side::Client, 1, 2, 4, 128);
            let mut memory = vec![0; 4 * 128];
            for i in 0..4 {
                initial(&mut memory[i * 128..][..128], Side::Server, 1, 2, i);
            }
            let mut reading = Vec::new();
            for op in ops {
                match op {
                    0 => if let Some(w) = model.plan_write() { execute(&mut memory, 128, &w) },
                    1 => reading.extend(model.plan_read_back()),
                    _ => if let Some(s) = reading.pop() {
                        prop_assert!(model.read_back(s, &memory[s * 128..][..128]).is_ok());
                    },
                }
            }
            prop_assert_eq!(model.checksums(), sums(&memory, 128));
        }
    }
}
