//! Receives of a shared receive queue: which are posted and not used up.
//!
//! Several QPs, polled on several CQs, use up one SRQ, so completions come in no order of it. Every receive therefore
//! gets a slot, and the slot's name is posted as its `wr_id`; the completion gives the application's back. Lives under
//! a lock of the SRQ.

use crate::sendq::Full;
use crate::wr::{Receive, Sge};

/// Upper 16 bits of every name we give, so that it cannot be mistaken for an application's `wr_id` ("SQ").
const TAG: u64 = 0x5351 << 48;

#[derive(Clone, Copy, Debug)]
struct Slot {
    wr_id: u64,
    /// Place in the order of posts; 0: the slot is free.
    order: u64,
    generation: u16,
    len: u16,
    real: bool,
}

const FREE: Slot = Slot { wr_id: 0, order: 0, generation: 0, len: 0, real: false };

/// Ledger of one SRQ.
#[derive(Debug)]
pub struct Srq {
    /// What the application was told its queue can take.
    capacity: u32,
    stride: usize,
    slots: Vec<Slot>,
    sges: Vec<Sge>,
    free: Vec<u32>,
    /// Order of the youngest.
    last: u64,
    used: usize,
    remembered: usize,
    closed: bool,
}

impl Srq {
    pub fn new(capacity: u32, max_sge: u32) -> Self {
        let slots = capacity.max(1) as usize;
        let stride = max_sge.max(1) as usize;
        Self {
            capacity,
            stride,
            slots: vec![FREE; slots],
            sges: vec![Sge::default(); slots * stride],
            free: (0..slots as u32).rev().collect(),
            last: 0,
            used: 0,
            remembered: 0,
            closed: false,
        }
    }

    /// After `ibv_modify_srq(IBV_SRQ_MAX_WR)`.
    pub fn set_capacity(&mut self, capacity: u32) {
        self.capacity = capacity;
    }

    /// Whether a post goes to the NIC: not after [`Srq::close`], nor while older ones wait to be posted again.
    #[inline]
    pub fn passes(&self) -> bool {
        !self.closed && self.remembered == 0
    }

    /// Takes a slot for a receive and returns the `wr_id` to post it with. If the NIC then refuses it:
    /// [`Srq::unpost`]. Where posts do not pass the receive is only remembered, and [`Full`] answered as a real queue
    /// does: `ENOMEM`.
    #[inline]
    pub fn post(&mut self, wr_id: u64, sges: &[Sge]) -> Result<u64, Full> {
        let real = self.passes();
        if !real && self.used >= self.capacity as usize {
            return Err(Full);
        }
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => self.grow(),
        };
        let len = sges.len().min(self.stride);
        self.sges[slot as usize * self.stride..][..len].copy_from_slice(&sges[..len]);
        self.last += 1;
        let entry = &mut self.slots[slot as usize];
        *entry = Slot { wr_id, order: self.last, generation: entry.generation.wrapping_add(1), len: len as u16, real };
        self.used += 1;
        self.remembered += usize::from(!real);
        Ok(name(slot, entry.generation))
    }

    /// A NIC frees its slot when a message arrives, the ledger when that is polled: so it can need more room.
    fn grow(&mut self) -> u32 {
        let slot = self.slots.len();
        self.slots.push(FREE);
        self.sges.resize((slot + 1) * self.stride, Sge::default());
        slot as u32
    }

    fn slot_of(&self, name: u64) -> Option<usize> {
        let slot = name as u32 as usize;
        let entry = self.slots.get(slot)?;
        (name & TAG == TAG && name >> 48 == TAG >> 48 && entry.order != 0 && entry.generation == (name >> 32) as u16)
            .then_some(slot)
    }

    /// The NIC did not take what [`Srq::post`] named.
    pub fn unpost(&mut self, name: u64) {
        let _ = self.completed(name);
    }

    /// A completion with this `wr_id` was polled: the application's own `wr_id`. `None`: not one of ours (for
    /// instance a send's that failed).
    #[inline]
    pub fn completed(&mut self, name: u64) -> Option<u64> {
        let slot = self.slot_of(name)?;
        let entry = &mut self.slots[slot];
        entry.order = 0;
        self.used -= 1;
        self.remembered -= usize::from(!entry.real);
        let wr_id = entry.wr_id;
        self.free.push(slot as u32);
        Some(wr_id)
    }

    /// The process stops: receives are only remembered from now on.
    pub fn close(&mut self) {
        self.closed = true;
    }

    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// After a stop that led nowhere: the NIC's queue is the old one. Then post what [`Srq::next_remembered`] names.
    pub fn reopen(&mut self) {
        self.closed = false;
    }

    /// The NIC's queue was replaced by an empty one. Then post what [`Srq::next_remembered`] names.
    pub fn switched(&mut self) {
        self.closed = false;
        for slot in self.slots.iter_mut().filter(|s| s.order != 0) {
            slot.real = false;
        }
        self.remembered = self.used;
    }

    /// The oldest remembered receive: the name to post it with, and what it is. Linear in the number of slots.
    pub fn next_remembered(&self) -> Option<(u64, Receive<'_>)> {
        self.remembered().into_iter().next().map(|name| (name, self.receive(name)))
    }

    /// Names of all remembered receives, oldest first.
    pub fn remembered(&self) -> Vec<u64> {
        let mut found: Vec<_> =
            self.slots.iter().enumerate().filter(|(_, s)| s.order != 0 && !s.real).map(|(i, s)| (s.order, i)).collect();
        found.sort_unstable();
        found.into_iter().map(|(_, i)| name(i as u32, self.slots[i].generation)).collect()
    }

    /// What a name of [`Srq::remembered`] stands for (empty for a name not in use).
    pub fn receive(&self, name: u64) -> Receive<'_> {
        match self.slot_of(name) {
            None => Receive { wr_id: 0, sges: &[] },
            Some(i) => {
                let slot = &self.slots[i];
                Receive { wr_id: slot.wr_id, sges: &self.sges[i * self.stride..][..slot.len as usize] }
            }
        }
    }

    /// The NIC took a remembered receive.
    pub fn remembered_posted(&mut self, name: u64) {
        if let Some(i) = self.slot_of(name)
            && !self.slots[i].real
        {
            self.slots[i].real = true;
            self.remembered -= 1;
        }
    }

    /// Receives in the NIC's queue.
    pub fn outstanding(&self) -> usize {
        self.used - self.remembered
    }
}

fn name(slot: u32, generation: u16) -> u64 {
    TAG | u64::from(generation) << 32 | u64::from(slot)
}

/// Whether a `wr_id` looks like one of ours.
#[inline]
pub fn is_slot(wr_id: u64) -> bool {
    wr_id >> 48 == TAG >> 48
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn completions_in_any_order_give_the_right_wr_ids_and_the_rest_is_posted_again_in_order() {
        let mut srq = Srq::new(2, 1);
        let sge = |addr| [Sge { addr, length: 1, lkey: 2 }];
        let names: Vec<_> = (0..5).map(|i| srq.post(100 + i, &sge(i)).unwrap()).collect();
        assert_eq!(srq.completed(names[3]), Some(103));
        assert_eq!(srq.completed(names[3]), None, "once only");
        assert_eq!(srq.completed(103), None);
        let reused = srq.post(105, &sge(5)).unwrap();
        assert_ne!(reused, names[3]);
        assert_eq!(srq.completed(names[0]), Some(100));
        srq.close();
        assert_eq!(srq.post(106, &[]), Err(Full));
        assert_eq!(srq.completed(names[1]), Some(101));
        assert_eq!(srq.completed(names[2]), Some(102));
        assert_eq!(srq.outstanding(), 2);
        srq.set_capacity(3);
        let late = srq.post(107, &sge(7)).unwrap();
        assert_eq!(srq.remembered(), [late]);
        srq.switched();
        assert!(!srq.passes());
        let late2 = srq.post(108, &sge(8));
        assert_eq!(late2, Err(Full));
        let again: Vec<_> = srq.remembered().into_iter().map(|n| (srq.receive(n).wr_id, n)).collect();
        assert_eq!(again.iter().map(|a| a.0).collect::<Vec<_>>(), [104, 105, 107]);
        assert_eq!(srq.receive(again[1].1).sges, sge(5));
        for (_, name) in &again {
            srq.remembered_posted(*name);
        }
        assert!(srq.passes());
        assert_eq!(srq.outstanding(), 3);
    }

    #[test]
    fn an_aborted_stop_posts_only_what_came_late() {
        let mut srq = Srq::new(4, 1);
        srq.post(1, &[]).unwrap();
        srq.close();
        let late = srq.post(2, &[]).unwrap();
        srq.reopen();
        assert_eq!(srq.next_remembered().map(|(n, r)| (n, r.wr_id)), Some((late, 2)));
        srq.remembered_posted(late);
        assert_eq!(srq.next_remembered(), None);
        assert_eq!(srq.outstanding(), 2);
    }
}
