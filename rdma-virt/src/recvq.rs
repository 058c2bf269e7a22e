//! Receives of one QP's own receive queue: which are posted and not used up, so that they can be posted again.
//!
//! A queue is first in, first out, so a completion needs no look-up: the number of receives used up (see
//! [`Polled`](crate::sendq::Polled)) tells which entries are dead. An entry is in the NIC's queue or only remembered;
//! the remembered ones are always the youngest.

use crate::sendq::{Full, Polled};
use crate::wr::{Receive, Sge};

/// Ledger of one receive queue; lives under the QP's lock. Positions count from the QP's last RESET.
#[derive(Debug)]
pub struct RecvQ {
    /// What the application was told its queue can take.
    capacity: u32,
    /// Elements per entry.
    stride: usize,
    wr_ids: Vec<u64>,
    lens: Vec<u32>,
    sges: Vec<Sge>,
    /// Position of the oldest entry kept; those before are used up.
    first: u64,
    /// Position of the first entry that is only remembered.
    real: u64,
    /// Position after the youngest entry.
    end: u64,
}

impl RecvQ {
    /// `capacity` in receives, `max_sge` in elements per receive. Memory is taken now and touched when used.
    pub fn new(capacity: u32, max_sge: u32) -> Self {
        let slots = (capacity.max(1) as usize).next_power_of_two();
        let stride = max_sge.max(1) as usize;
        Self {
            capacity,
            stride,
            wr_ids: vec![0; slots],
            lens: vec![0; slots],
            sges: vec![Sge::default(); slots * stride],
            first: 0,
            real: 0,
            end: 0,
        }
    }

    fn slot(&self, position: u64) -> usize {
        position as usize & (self.wr_ids.len() - 1)
    }

    /// Drops entries that are used up.
    fn trim(&mut self, polled: &Polled) {
        // A completion may be counted before the post that caused it is: never beyond what is here.
        self.first = self.first.max(polled.receives().min(self.real));
    }

    fn push(&mut self, wr_id: u64, sges: &[Sge], polled: &Polled) {
        self.trim(polled);
        if (self.end - self.first) as usize == self.wr_ids.len() {
            self.grow();
        }
        let slot = self.slot(self.end);
        self.end += 1;
        self.wr_ids[slot] = wr_id;
        // More elements than the queue was made for: the NIC refuses such a WR, so it is never pushed by a post.
        let len = sges.len().min(self.stride);
        self.lens[slot] = len as u32;
        self.sges[slot * self.stride..][..len].copy_from_slice(&sges[..len]);
    }

    /// A NIC frees a slot when a message arrives, the ledger when that is polled: so it can need more room.
    fn grow(&mut self) {
        let mut bigger = Self::new((self.wr_ids.len() * 2) as u32, self.stride as u32);
        for position in self.first..self.end {
            let (from, to) = (self.slot(position), bigger.slot(position));
            bigger.wr_ids[to] = self.wr_ids[from];
            bigger.lens[to] = self.lens[from];
            let source = &self.sges[from * self.stride..][..self.stride];
            bigger.sges[to * self.stride..][..self.stride].copy_from_slice(source);
        }
        *self = Self { capacity: self.capacity, first: self.first, real: self.real, end: self.end, ..bigger };
    }

    /// The NIC took a receive. Only while nothing is merely remembered, or order would be lost.
    #[inline]
    pub(crate) fn posted(&mut self, wr_id: u64, sges: &[Sge], polled: &Polled) {
        debug_assert_eq!(self.real, self.end, "a receive overtook remembered ones");
        self.push(wr_id, sges, polled);
        self.real = self.end;
    }

    pub(crate) fn remember(&mut self, wr_id: u64, sges: &[Sge], polled: &Polled) -> Result<(), Full> {
        self.trim(polled);
        if self.end - self.first >= u64::from(self.capacity) {
            return Err(Full);
        }
        self.push(wr_id, sges, polled);
        Ok(())
    }

    /// Oldest receive that is only remembered.
    pub(crate) fn first_remembered(&self) -> Option<Receive<'_>> {
        (self.real < self.end).then(|| self.entry(self.real))
    }

    /// The NIC took the oldest remembered receive.
    pub(crate) fn first_remembered_posted(&mut self) {
        debug_assert!(self.real < self.end);
        self.real = self.end.min(self.real + 1);
    }

    fn entry(&self, position: u64) -> Receive<'_> {
        let slot = self.slot(position);
        Receive { wr_id: self.wr_ids[slot], sges: &self.sges[slot * self.stride..][..self.lens[slot] as usize] }
    }

    /// Receives that are only remembered.
    pub fn remembered(&self) -> u64 {
        self.end - self.real
    }

    /// Receives in the NIC's queue, not used up.
    pub fn outstanding(&self, polled: &Polled) -> u64 {
        self.real - self.first.max(polled.receives().min(self.real))
    }

    /// Every receive not used up, oldest first.
    pub fn iter<'a>(&'a self, polled: &Polled) -> impl Iterator<Item = Receive<'a>> + use<'a> {
        (self.first.max(polled.receives().min(self.real))..self.end).map(|position| self.entry(position))
    }

    /// `wr_id` of the receive the NIC will use up next.
    pub(crate) fn next_wr_id(&self, polled: &Polled) -> Option<u64> {
        let next = self.first.max(polled.receives());
        (next < self.real).then(|| self.wr_ids[self.slot(next)])
    }

    /// The NIC's queue was replaced by an empty one: all that is left is only remembered.
    pub(crate) fn all_remembered(&mut self, polled: &Polled) {
        self.trim(polled);
        self.real = self.first;
    }

    pub(crate) fn reset(&mut self) {
        (self.first, self.real, self.end) = (0, 0, 0);
    }
}
