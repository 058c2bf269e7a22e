//! The send side of one QP: what was given to the NIC and has not completed, and what is held back.
//!
//! Counts are kept where sends are posted (under the QP's lock) and where completions are polled ([`Polled`], without
//! a lock): never only when the application polls. The rule that decides between giving and holding is in
//! [`crate::gate`]; this module only makes sure that a held send cannot get lost or overtaken: the ledger hands out
//! its oldest entry for posting and drops it only when told that the NIC has taken it.

use crate::wr::{HeldSend, opcode};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What polling found out about a QP. Written by whoever polls a CQ (one thread at a time per CQ), read by anybody.
/// All counts are since the QP was last in RESET.
#[derive(Debug, Default)]
pub struct Polled {
    sends: AtomicU64,
    markers: AtomicU64,
    receives: AtomicU64,
    messages: AtomicU64,
    failed: AtomicBool,
}

impl Polled {
    /// The completion of an application's send was taken from the real CQ.
    #[inline]
    pub fn send_completed(&self) {
        self.sends.fetch_add(1, Ordering::Release);
    }

    /// The completion of one of our own sends was taken from the real CQ (and must not reach the application).
    pub fn marker_completed(&self) {
        self.markers.fetch_add(1, Ordering::Release);
    }

    /// A two-sided message arrived. `own_queue`: it used up a receive of the QP's own receive queue, not of an SRQ.
    #[inline]
    pub fn message_received(&self, own_queue: bool) {
        if own_queue {
            self.receives.fetch_add(1, Ordering::Release);
        }
        self.messages.fetch_add(1, Ordering::Release);
    }

    /// A receive of the QP's own queue completed without a message: flushed, or with an error.
    pub fn receive_failed(&self) {
        self.receives.fetch_add(1, Ordering::Release);
        self.failed.store(true, Ordering::Release);
    }

    /// Any completion had an error status. The QP is in the error state, or soon will be.
    pub fn set_failed(&self) {
        self.failed.store(true, Ordering::Release);
    }

    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    pub fn sends(&self) -> u64 {
        self.sends.load(Ordering::Acquire)
    }

    pub fn markers(&self) -> u64 {
        self.markers.load(Ordering::Acquire)
    }

    /// Receives of the QP's own queue that are used up.
    #[inline]
    pub fn receives(&self) -> u64 {
        self.receives.load(Ordering::Acquire)
    }

    /// Two-sided messages received.
    pub fn messages(&self) -> u64 {
        self.messages.load(Ordering::Acquire)
    }

    /// The QP went to RESET: nobody may be polling one of its completions.
    pub fn reset(&self) {
        for count in [&self.sends, &self.markers, &self.receives, &self.messages] {
            count.store(0, Ordering::Release);
        }
        self.failed.store(false, Ordering::Release);
    }
}

/// The ledger of held sends is as long as the real send queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the send queue is full")]
pub struct Full;

/// Send side of one QP; lives under the QP's lock.
#[derive(Debug)]
pub struct SendQ {
    /// What the application was told its queue can take.
    capacity: u32,
    /// All sends the NIC was given, ours included.
    posted: u64,
    /// Those of the application that give a completion.
    signalled: u64,
    /// Value of `posted` after the last send that gives a completion, ours included.
    last_signalled: u64,
    markers: u64,
    two_sided: u64,
    held: VecDeque<HeldSend>,
}

impl SendQ {
    pub fn new(capacity: u32) -> Self {
        Self { capacity, posted: 0, signalled: 0, last_signalled: 0, markers: 0, two_sided: 0, held: VecDeque::new() }
    }

    /// The NIC took one of the application's sends.
    #[inline]
    pub(crate) fn posted(&mut self, op: u32, signalled: bool) {
        self.posted += 1;
        self.two_sided += u64::from(opcode::is_two_sided(op));
        if signalled {
            self.signalled += 1;
            self.last_signalled = self.posted;
        }
    }

    /// The NIC took a marker.
    pub(crate) fn marker_posted(&mut self) {
        self.posted += 1;
        self.markers += 1;
        self.last_signalled = self.posted;
    }

    pub(crate) fn hold(&mut self, wr: HeldSend) -> Result<(), Full> {
        if self.held.len() >= self.capacity as usize {
            return Err(Full);
        }
        self.held.push_back(wr);
        Ok(())
    }

    /// Oldest held send.
    pub(crate) fn first_held(&self) -> Option<&HeldSend> {
        self.held.front()
    }

    /// The NIC took the oldest held send.
    pub(crate) fn first_held_posted(&mut self, sig_all: bool) {
        const SIGNALED: u32 = 1 << 1;
        if let Some(wr) = self.held.pop_front() {
            self.posted(wr.opcode, sig_all || wr.flags & SIGNALED != 0);
        }
    }

    pub fn held(&self) -> usize {
        self.held.len()
    }

    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Completions of the application's sends still to come.
    pub fn outstanding(&self, polled: &Polled) -> u64 {
        // A poller may be ahead of the poster who is about to count; and a flushed queue completes unsignalled ones.
        self.signalled.saturating_sub(polled.sends())
    }

    /// Sends after the last one that will give a completion: nobody can tell when these are done.
    pub fn trailing_unsignalled(&self) -> u64 {
        self.posted - self.last_signalled
    }

    /// Completions of markers still to come.
    pub fn markers_outstanding(&self, polled: &Polled) -> u64 {
        self.markers.saturating_sub(polled.markers())
    }

    /// Two-sided messages given to the NIC. Held ones are not among them.
    pub fn two_sided(&self) -> u64 {
        self.two_sided
    }

    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.capacity);
    }

    /// A new NIC queue takes the place of the old one, on which nothing is outstanding any more. What was not known
    /// to be complete there (after an error) never will be; messages keep being counted.
    pub(crate) fn settle(&mut self, polled: &Polled) {
        self.signalled = polled.sends();
        self.markers = polled.markers();
        self.last_signalled = self.posted;
    }
}
