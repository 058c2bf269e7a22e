//! What was posted and has not come back: receives of a QP in order, receives of an SRQ by slot, and sends that wait
//! for the end of a suspension. Bookkeeping only; nothing here calls a verb.
#![expect(unsafe_code, reason = "work requests arrive as C lists")]

use std::collections::VecDeque;

use crate::abi::{ibv_recv_wr, ibv_send_wr, ibv_sge, send_flags};

/// SGEs of a work request; short lists, which are nearly all, sit inside.
#[derive(Clone)]
pub enum Sges {
    Few(u8, [ibv_sge; 2]),
    Many(Box<[ibv_sge]>),
}

const NO_SGE: ibv_sge = ibv_sge { addr: 0, length: 0, lkey: 0 };

impl Sges {
    pub fn new(list: &[ibv_sge]) -> Self {
        if list.len() <= 2 {
            let mut few = [NO_SGE; 2];
            few[..list.len()].copy_from_slice(list);
            Self::Few(list.len() as u8, few)
        } else {
            Self::Many(list.into())
        }
    }

    pub fn as_slice(&self) -> &[ibv_sge] {
        match self {
            Self::Few(n, few) => &few[..usize::from(*n)],
            Self::Many(many) => many,
        }
    }
}

/// The SGE list of a request as a slice.
///
/// # Safety
/// `list` has `count` entries, as the poster promised.
pub unsafe fn sges<'a>(list: *const ibv_sge, count: i32) -> &'a [ibv_sge] {
    if count <= 0 || list.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(list, count as usize) }
}

/// A receive as the application posted it, keys virtual.
#[derive(Clone)]
pub struct Recv {
    pub wr_id: u64,
    pub sges: Sges,
}

impl Recv {
    /// # Safety
    /// `wr` is a request the application posted.
    pub unsafe fn new(wr: *const ibv_recv_wr) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self { wr_id: (*wr).wr_id, sges: Sges::new(sges((*wr).sg_list, (*wr).num_sge)) } }
    }
}

/// Receives of one QP, oldest first: a receive queue completes in order. Those the NIC has come before those it has
/// not been given.
#[derive(Default)]
pub struct RecvQueue {
    entries: VecDeque<Recv>,
    /// How many of them, from the oldest, the NIC has.
    posted: usize,
}

impl RecvQueue {
    pub fn with_capacity(n: usize) -> Self {
        Self { entries: VecDeque::with_capacity(n), posted: 0 }
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Remembers one the NIC gets now. Only right while the NIC has all others.
    pub fn push_posted(&mut self, recv: Recv) {
        self.entries.push_back(recv);
        self.posted += 1;
    }

    /// Remembers one the NIC does not get yet.
    pub fn push_waiting(&mut self, recv: Recv) {
        self.entries.push_back(recv);
    }

    /// The NIC refused the last `n` after all.
    pub fn take_back(&mut self, n: usize) {
        self.entries.truncate(self.entries.len().saturating_sub(n));
        self.posted = self.posted.min(self.entries.len());
    }

    /// The oldest the NIC has.
    pub fn oldest(&self) -> Option<&Recv> {
        if self.posted == 0 { None } else { self.entries.front() }
    }

    /// The oldest completed.
    pub fn complete(&mut self) -> Option<Recv> {
        if self.posted == 0 {
            return None;
        }
        self.posted -= 1;
        self.entries.pop_front()
    }

    /// The NIC that had some is gone: it has none now.
    pub fn forget_posting(&mut self) {
        self.posted = 0;
    }

    pub fn clear(&mut self) {
        self.entries.clear();
        self.posted = 0;
    }

    /// The oldest the NIC has not got.
    pub fn next_waiting(&self) -> Option<&Recv> {
        self.entries.get(self.posted)
    }

    /// The NIC took the one `next_waiting` named.
    pub fn mark_posted(&mut self) {
        self.posted = (self.posted + 1).min(self.entries.len());
    }
}

struct Slot {
    recv: Recv,
    /// Order of posting; `None` when the slot is free.
    seq: Option<u64>,
    posted: bool,
}

/// Receives of one SRQ: they complete in any order, so each has a slot, and the slot's number travels as its wr_id.
#[derive(Default)]
pub struct SlotBook {
    slots: Vec<Slot>,
    free: Vec<u32>,
    seq: u64,
}

impl SlotBook {
    pub fn in_use(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub fn insert(&mut self, recv: Recv, posted: bool) -> u32 {
        self.seq += 1;
        let slot = Slot { recv, seq: Some(self.seq), posted };
        match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = slot;
                index
            }
            None => {
                self.slots.push(slot);
                (self.slots.len() - 1) as u32
            }
        }
    }

    /// Takes a receive out: it completed, or the NIC refused it.
    pub fn remove(&mut self, index: u32) -> Option<Recv> {
        let slot = self.slots.get_mut(index as usize)?;
        slot.seq.take()?;
        self.free.push(index);
        Some(slot.recv.clone())
    }

    pub fn forget_posting(&mut self) {
        for slot in &mut self.slots {
            slot.posted = false;
        }
    }

    pub fn mark_posted(&mut self, index: u32) {
        if let Some(slot) = self.slots.get_mut(index as usize) {
            slot.posted = true;
        }
    }

    /// Those the NIC has not got, in order of posting.
    pub fn waiting(&self) -> Vec<(u32, Recv)> {
        let mut found: Vec<_> = (0u32..)
            .zip(&self.slots)
            .filter_map(|(i, s)| s.seq.filter(|_| !s.posted).map(|seq| (seq, i, s.recv.clone())))
            .collect();
        found.sort_unstable_by_key(|(seq, _, _)| *seq);
        found.into_iter().map(|(_, i, r)| (i, r)).collect()
    }
}

/// A send that waits: everything the application may change or free after its post returned is copied.
pub struct Held {
    /// `next` and `sg_list` are filled in when it goes out.
    pub wr: ibv_send_wr,
    pub sges: Sges,
    /// Payload of an inline send, in one piece.
    pub payload: Option<Box<[u8]>>,
}

// SAFETY: the pointers in `wr` that matter (AH, MW, MR) name objects the application keeps alive until completion.
unsafe impl Send for Held {}

impl Held {
    /// # Safety
    /// `wr` is a valid send request; if it is inline its buffers are readable.
    pub unsafe fn new(wr: *const ibv_send_wr) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let list = sges((*wr).sg_list, (*wr).num_sge);
            let payload = ((*wr).send_flags & send_flags::INLINE != 0).then(|| {
                let mut bytes = Vec::with_capacity(list.iter().map(|s| s.length as usize).sum());
                for s in list.iter().filter(|s| s.length > 0) {
                    bytes.extend_from_slice(std::slice::from_raw_parts(s.addr as *const u8, s.length as usize));
                }
                bytes.into_boxed_slice()
            });
            Self { wr: *wr, sges: Sges::new(list), payload }
        }
    }

    /// The SGEs to post it with.
    pub fn outgoing(&self) -> Sges {
        match &self.payload {
            Some(bytes) if bytes.is_empty() => Sges::new(&[]),
            Some(bytes) => Sges::new(&[ibv_sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 }]),
            None => self.sges.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recv(wr_id: u64) -> Recv {
        Recv { wr_id, sges: Sges::new(&[]) }
    }

    #[test]
    fn receives_complete_in_order_and_only_if_posted() {
        let mut q = RecvQueue::with_capacity(4);
        q.push_posted(recv(1));
        q.push_posted(recv(2));
        q.push_waiting(recv(3));
        assert_eq!(q.complete().map(|r| r.wr_id), Some(1));
        assert_eq!(q.complete().map(|r| r.wr_id), Some(2));
        assert!(q.complete().is_none(), "the third was never given to the NIC");
        assert_eq!(q.next_waiting().map(|r| r.wr_id), Some(3));
        q.mark_posted();
        assert_eq!(q.complete().map(|r| r.wr_id), Some(3));
    }

    #[test]
    fn what_an_srq_never_completed_is_reposted_in_order() {
        let mut book = SlotBook::default();
        let slots: Vec<_> = (0..4).map(|i| book.insert(recv(i), true)).collect();
        assert_eq!(book.remove(slots[1]).map(|r| r.wr_id), Some(1));
        assert!(book.remove(slots[1]).is_none(), "a slot completes once");
        book.insert(recv(9), true);
        book.forget_posting();
        let order: Vec<_> = book.waiting().into_iter().map(|(_, r)| r.wr_id).collect();
        assert_eq!(order, [0, 2, 3, 9]);
    }

    #[test]
    fn a_held_inline_send_does_not_see_later_changes_of_its_buffer() {
        let mut buffer = *b"before";
        let mut sge = ibv_sge { addr: buffer.as_mut_ptr() as u64, length: 6, lkey: 0 };
        // SAFETY: all-zero is a valid work request.
        let mut wr: ibv_send_wr = unsafe { std::mem::zeroed() };
        wr.sg_list = &raw mut sge;
        wr.num_sge = 1;
        wr.send_flags = send_flags::INLINE;
        // SAFETY: built above.
        let held = unsafe { Held::new(&raw const wr) };
        buffer.copy_from_slice(b"after!");
        assert_eq!(held.payload.as_deref(), Some(&b"before"[..]));
    }
}
