//! One QP's path through a migration: what a post does in each stage, and the only ways from one stage to the next.
//!
//! ```text
//!            suspend          drain           close           switch          resume
//!  Running ──────────► Suspended ──► Draining ──► Quiet ───────────► Switched ────────► Flushing ──► Running
//!     ▲                    │            │           │                                      ▲   (ledgers empty)
//!     └────────────────────┴── abort ───┴───────────┴──────────────────────────────────────┘
//!
//!  stage       post_send   post_recv                     the NIC's queue
//!  Running     pass        pass                          carries traffic
//!  Suspended   hold        pass                          finishes what it was given
//!  Draining    hold        pass                          as before, plus a marker where one is needed
//!  Quiet       hold        remember                      nothing under way
//!  Switched    hold        remembered first, then pass   the new one, receives only
//!  Flushing    hold        remembered first, then pass   held sends go out, oldest first
//! ```
//!
//! Everything here happens under the QP's lock, so "nobody is inside a post" and "the stage is set" are one event.
//! Losing a send in the race of a resume with a post is impossible by construction: passing and holding are two types
//! handed out by [`Gate::send`], and `Running` is entered only by [`Gate::next_flush`] when it finds both ledgers
//! empty, in the same critical section. No clock, no verbs: the owner performs what [`Gate::next_flush`] names and
//! reports back.

use crate::recvq::RecvQ;
use crate::sendq::{Full, Polled, SendQ};
use crate::wr::{HeldSend, Receive, Sge};

/// See the module's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Running,
    Suspended,
    Draining,
    Quiet,
    Switched,
    Flushing,
}

/// A step that the stage does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a QP that is {from:?} cannot {step}")]
pub struct Illegal {
    pub from: Stage,
    pub step: &'static str,
}

/// What to do with a chain of sends. Decided once per chain: the lock is held for all of it.
#[derive(Debug)]
pub enum SendPath<'a> {
    /// Give them to the NIC and report each that it took.
    Pass(Passing<'a>),
    /// Keep them.
    Hold(Holding<'a>),
}

/// Permission to give sends to the NIC.
#[derive(Debug)]
pub struct Passing<'a>(&'a mut SendQ);

impl Passing<'_> {
    /// The NIC took one. `signalled`: it will give a completion (flag on the WR, or on the whole QP).
    #[inline]
    pub fn posted(&mut self, opcode: u32, signalled: bool) {
        self.0.posted(opcode, signalled);
    }
}

/// Permission to keep sends.
#[derive(Debug)]
pub struct Holding<'a>(&'a mut SendQ);

impl Holding<'_> {
    /// Keeps one, behind all held before. [`Full`] is to be answered as a real queue answers: `ENOMEM`.
    pub fn hold(&mut self, wr: HeldSend) -> Result<(), Full> {
        self.0.hold(wr)
    }
}

/// What to do with a chain of receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecvPath {
    /// Give each to the NIC, then [`Gate::recv_posted`].
    Real,
    /// [`Gate::recv_remember`] each.
    LedgerOnly,
}

/// What has to be given to the NIC next.
#[derive(Debug, PartialEq, Eq)]
pub enum Flush<'a> {
    Receive(Receive<'a>),
    Send(&'a HeldSend),
    /// Nothing (any more).
    Done,
}

/// Whose completion it is that came with an error status, where the NIC does not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Send,
    Receive,
}

/// State of one QP that decides about its posts; lives under the QP's lock, together with the call into the NIC's
/// library.
#[derive(Debug)]
pub struct Gate {
    stage: Stage,
    sig_all: bool,
    sends: SendQ,
    /// `None` for a QP that uses an SRQ.
    recvs: Option<RecvQ>,
}

impl Gate {
    /// `recvs` is `None` for a QP with an SRQ; `sig_all` as in `ibv_qp_init_attr.sq_sig_all`.
    pub fn new(sends: SendQ, recvs: Option<RecvQ>, sig_all: bool) -> Self {
        Self { stage: Stage::Running, sig_all, sends, recvs }
    }

    pub fn stage(&self) -> Stage {
        self.stage
    }

    pub fn sends(&self) -> &SendQ {
        &self.sends
    }

    pub fn recvs(&self) -> Option<&RecvQ> {
        self.recvs.as_ref()
    }

    pub fn sig_all(&self) -> bool {
        self.sig_all
    }

    // ---- posts ----

    /// For `ibv_post_send`.
    #[inline]
    pub fn send(&mut self) -> SendPath<'_> {
        if self.stage == Stage::Running {
            SendPath::Pass(Passing(&mut self.sends))
        } else {
            SendPath::Hold(Holding(&mut self.sends))
        }
    }

    /// For `ibv_post_recv`.
    #[inline]
    pub fn recv(&self) -> RecvPath {
        let remembered = self.recvs.as_ref().map_or(0, RecvQ::remembered);
        if self.stage == Stage::Quiet || remembered > 0 { RecvPath::LedgerOnly } else { RecvPath::Real }
    }

    /// The NIC took a receive. `sges` in virtual keys.
    #[inline]
    pub fn recv_posted(&mut self, wr_id: u64, sges: &[Sge], polled: &Polled) {
        if let Some(recvs) = &mut self.recvs {
            recvs.posted(wr_id, sges, polled);
        }
    }

    /// Keeps a receive for later. [`Full`] is to be answered as a real queue answers: `ENOMEM`.
    pub fn recv_remember(&mut self, wr_id: u64, sges: &[Sge], polled: &Polled) -> Result<(), Full> {
        self.recvs.as_mut().ok_or(Full)?.remember(wr_id, sges, polled)
    }

    /// The NIC took a marker: a send of ours, with [`crate::wr::MARKER_WR_ID`], that gives a completion.
    pub fn marker_posted(&mut self) {
        self.sends.marker_posted();
    }

    /// For a completion with an error status on a CQ that serves both sides: providers leave the opcode undefined.
    /// A queue that is being flushed completes in order, so a receive has the `wr_id` of the oldest one. (Where both
    /// sides use the same number the answer may be wrong for a single completion, never for the sum.)
    pub fn side_of_error(&self, wr_id: u64, polled: &Polled) -> Side {
        match &self.recvs {
            Some(recvs) if recvs.next_wr_id(polled) == Some(wr_id) => Side::Receive,
            _ => Side::Send,
        }
    }

    // ---- stages ----

    fn step(&mut self, step: &'static str, legal: &[Stage], to: Stage) -> Result<(), Illegal> {
        if self.stage == to {
            return Ok(()); // a repetition
        }
        if !legal.contains(&self.stage) {
            return Err(Illegal { from: self.stage, step });
        }
        self.stage = to;
        Ok(())
    }

    /// New sends are held from now on. Legal until the QP is drained; a repetition changes nothing.
    pub fn suspend(&mut self) -> Result<(), Illegal> {
        if matches!(self.stage, Stage::Draining | Stage::Quiet) {
            return Ok(());
        }
        self.step("be suspended", &[Stage::Running, Stage::Flushing], Stage::Suspended)
    }

    /// What is under way shall finish.
    pub fn drain(&mut self) -> Result<(), Illegal> {
        if self.stage == Stage::Quiet {
            return Ok(());
        }
        self.step("be drained", &[Stage::Suspended], Stage::Draining)
    }

    /// A drain that ran out of time ends here: suspended as before.
    pub fn undrain(&mut self) -> Result<(), Illegal> {
        self.step("stop draining", &[Stage::Draining, Stage::Quiet], Stage::Suspended)
    }

    /// Nothing is under way any more: from here on receives are only remembered.
    pub fn close(&mut self) -> Result<(), Illegal> {
        self.step("be closed", &[Stage::Draining], Stage::Quiet)
    }

    /// The NIC's queues were replaced by new, empty ones. There is no way back from here.
    pub fn switch(&mut self, polled: &Polled) -> Result<(), Illegal> {
        if self.stage == Stage::Switched {
            return Ok(());
        }
        self.step("be switched", &[Stage::Quiet], Stage::Switched)?;
        self.sends.settle(polled);
        if let Some(recvs) = &mut self.recvs {
            recvs.all_remembered(polled);
        }
        Ok(())
    }

    /// Every end is in place: held sends may go out. Follow with [`Gate::next_flush`] until it says `Done`.
    pub fn resume(&mut self) -> Result<(), Illegal> {
        if self.stage == Stage::Running {
            return Ok(());
        }
        self.step("be resumed", &[Stage::Switched], Stage::Flushing)
    }

    /// The migration does not take place: the old queues stay. Follow with [`Gate::next_flush`] until `Done`.
    pub fn abort(&mut self) -> Result<(), Illegal> {
        if self.stage == Stage::Running {
            return Ok(());
        }
        self.step("abort", &[Stage::Suspended, Stage::Draining, Stage::Quiet], Stage::Flushing)
    }

    /// What to give to the NIC next: remembered receives, and in `Flushing` also held sends, each oldest first. When
    /// nothing is left in `Flushing` the QP is `Running` as this returns. In the other stages nothing is to be done.
    pub fn next_flush(&mut self) -> Flush<'_> {
        let receives = matches!(self.stage, Stage::Switched | Stage::Flushing);
        if receives && self.recvs.as_ref().is_some_and(|r| r.remembered() > 0) {
            let first = self.recvs.as_ref().and_then(RecvQ::first_remembered);
            return first.map_or(Flush::Done, Flush::Receive);
        }
        if self.stage == Stage::Flushing {
            if self.sends.held() == 0 {
                self.stage = Stage::Running;
                return Flush::Done;
            }
            return self.sends.first_held().map_or(Flush::Done, Flush::Send);
        }
        Flush::Done
    }

    /// The NIC took the receive that [`Gate::next_flush`] named.
    pub fn receive_flushed(&mut self) {
        if let Some(recvs) = &mut self.recvs {
            recvs.first_remembered_posted();
        }
    }

    /// The NIC took the send that [`Gate::next_flush`] named.
    pub fn send_flushed(&mut self) {
        self.sends.first_held_posted(self.sig_all);
    }

    /// The QP went to RESET: its queues are empty. The stage stays.
    pub fn reset(&mut self, polled: &Polled) {
        polled.reset();
        self.sends.reset();
        if let Some(recvs) = &mut self.recvs {
            recvs.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::VRkey;
    use crate::wr::{Payload, opcode};

    fn send(wr_id: u64) -> HeldSend {
        HeldSend {
            wr_id,
            opcode: opcode::SEND,
            flags: 2,
            imm: 0,
            payload: Payload::Sges(vec![]),
            remote_addr: 0,
            rkey: VRkey(0),
            compare_add: 0,
            swap: 0,
            datagram: None,
        }
    }

    fn hold(gate: &mut Gate, wr_id: u64) -> Result<(), Full> {
        match gate.send() {
            SendPath::Pass(_) => panic!("{wr_id} would have been passed"),
            SendPath::Hold(mut ledger) => ledger.hold(send(wr_id)),
        }
    }

    #[test]
    fn a_send_posted_during_the_flush_goes_behind_the_held_ones() {
        let polled = Polled::default();
        let mut gate = Gate::new(SendQ::new(4), Some(RecvQ::new(4, 1)), false);
        gate.suspend().unwrap();
        hold(&mut gate, 1).unwrap();
        hold(&mut gate, 2).unwrap();
        gate.drain().unwrap();
        gate.close().unwrap();
        gate.recv_remember(10, &[], &polled).unwrap();
        gate.switch(&polled).unwrap();
        assert_eq!(gate.next_flush(), Flush::Receive(Receive { wr_id: 10, sges: &[] }));
        gate.receive_flushed();
        assert_eq!(gate.next_flush(), Flush::Done, "sends wait for the other ends");
        assert_eq!(gate.abort(), Err(Illegal { from: Stage::Switched, step: "abort" }));
        gate.resume().unwrap();
        assert!(matches!(gate.next_flush(), Flush::Send(wr) if wr.wr_id == 1));
        gate.send_flushed();
        hold(&mut gate, 3).unwrap();
        for wr_id in [2, 3] {
            assert!(matches!(gate.next_flush(), Flush::Send(wr) if wr.wr_id == wr_id));
            gate.send_flushed();
        }
        assert_eq!(gate.stage(), Stage::Flushing);
        assert_eq!(gate.next_flush(), Flush::Done);
        assert_eq!(gate.stage(), Stage::Running);
        assert!(matches!(gate.send(), SendPath::Pass(_)));
        assert_eq!(gate.sends().two_sided(), 3);
    }

    #[test]
    fn the_ledger_is_as_long_as_the_queue_and_drops_nothing() {
        let mut gate = Gate::new(SendQ::new(2), None, false);
        gate.suspend().unwrap();
        hold(&mut gate, 1).unwrap();
        hold(&mut gate, 2).unwrap();
        assert_eq!(hold(&mut gate, 3), Err(Full));
        gate.abort().unwrap();
        assert!(matches!(gate.next_flush(), Flush::Send(wr) if wr.wr_id == 1));
        assert_eq!(gate.sends().held(), 2, "named, not taken yet");
    }

    #[test]
    fn receives_posted_while_closed_keep_their_place() {
        let polled = Polled::default();
        let mut gate = Gate::new(SendQ::new(1), Some(RecvQ::new(2, 1)), false);
        assert_eq!(gate.recv(), RecvPath::Real);
        gate.recv_posted(1, &[], &polled);
        gate.suspend().unwrap();
        assert_eq!(gate.recv(), RecvPath::Real, "a SEND in flight needs it");
        gate.drain().unwrap();
        gate.close().unwrap();
        assert_eq!(gate.recv(), RecvPath::LedgerOnly);
        gate.recv_remember(2, &[], &polled).unwrap();
        assert_eq!(gate.recv_remember(3, &[], &polled), Err(Full));
        gate.abort().unwrap();
        assert_eq!(gate.recv(), RecvPath::LedgerOnly, "2 is not posted yet");
        assert!(matches!(gate.next_flush(), Flush::Receive(r) if r.wr_id == 2));
        gate.receive_flushed();
        assert_eq!(gate.recv(), RecvPath::Real);
        polled.message_received(true);
        gate.recv_posted(3, &[], &polled);
        let left: Vec<_> = gate.recvs().unwrap().iter(&polled).map(|r| r.wr_id).collect();
        assert_eq!(left, [2, 3]);
    }

    #[test]
    fn an_error_is_told_apart_by_the_oldest_receive() {
        let polled = Polled::default();
        let mut gate = Gate::new(SendQ::new(1), Some(RecvQ::new(2, 1)), false);
        gate.recv_posted(7, &[], &polled);
        assert_eq!(gate.side_of_error(8, &polled), Side::Send);
        assert_eq!(gate.side_of_error(7, &polled), Side::Receive);
        polled.receive_failed();
        assert_eq!(gate.side_of_error(7, &polled), Side::Send);
    }
}
