//! Wait-before-stop: when is nothing of a QP under way any more, what to do about it, and how to say it is not.
//!
//! A pure function of counts. It is asked after every round of polling, for every QP that stops; polling, posting the
//! marker and the deadline are its caller's.
//!
//! Which states have something under way:
//! - RESET, INIT: nothing can be sent, no packet is accepted. Posted receives are in the ledger.
//! - RTR: it cannot send, but messages arrive and complete: only what arrives is awaited.
//! - RTS, SQE: both directions (SQE: sends are flushed, messages still arrive).
//! - SQD: the NIC finishes what it has begun and starts nothing new, so sends posted since never complete, and it is
//!   not known which. Awaited like RTS; the reason names the state if it does not end.
//! - ERR: the NIC accepts no packet and completes everything with a flush error. A peer's count can never be reached
//!   and unsignalled sends show up or not: awaited are only completions that must come.

use crate::gate::Gate;
use crate::saved::QpPhase;
use crate::sendq::Polled;

/// What is known of one QP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// As the application (or an error) set it.
    pub phase: QpPhase,
    /// A completion with an error status was seen.
    pub failed: bool,
    /// Completions of the application's sends still to come.
    pub sends: u64,
    pub trailing_unsignalled: u64,
    /// Completions of our markers still to come.
    pub markers: u64,
    /// Two-sided messages received.
    pub received: u64,
    /// Two-sided messages its remote end has sent in all; `None`: nobody said, do not wait for any.
    pub expected: Option<u64>,
    /// Receives the NIC can still use (those of the SRQ, if it has one).
    pub receives_posted: u64,
}

impl Situation {
    /// From the QP's own books. Call it under the QP's lock, after polling its CQs empty.
    pub fn of(gate: &Gate, polled: &Polled, phase: QpPhase, expected: Option<u64>, srq_outstanding: u64) -> Self {
        let sends = gate.sends();
        Self {
            phase,
            failed: polled.has_failed(),
            sends: sends.outstanding(polled),
            trailing_unsignalled: sends.trailing_unsignalled(),
            markers: sends.markers_outstanding(polled),
            received: polled.messages(),
            expected,
            receives_posted: gate.recvs().map_or(srq_outstanding, |r| r.outstanding(polled)),
        }
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing is under way: close it.
    Quiet,
    /// All that can be seen to complete has, but unsignalled sends follow: post a marker (there is room for it).
    PostMarker,
    /// Poll again.
    Wait,
}

impl Situation {
    fn sends_matter(&self) -> bool {
        matches!(self.phase, QpPhase::Rts | QpPhase::Sqd | QpPhase::Sqe) && !self.failed
    }

    fn messages_matter(&self) -> bool {
        matches!(self.phase, QpPhase::Rtr | QpPhase::Rts | QpPhase::Sqd | QpPhase::Sqe) && !self.failed
    }

    fn messages_missing(&self) -> u64 {
        if !self.messages_matter() {
            return 0;
        }
        self.expected.unwrap_or(0).saturating_sub(self.received)
    }

    /// What to do next.
    pub fn verdict(&self) -> Verdict {
        let dead = self.failed || self.phase == QpPhase::Err;
        if dead {
            // Each signalled send and each marker gives exactly one completion, flushed or not.
            return if self.sends > 0 || self.markers > 0 { Verdict::Wait } else { Verdict::Quiet };
        }
        if self.sends_matter() && (self.sends > 0 || self.markers > 0) {
            return Verdict::Wait;
        }
        if self.sends_matter() && self.trailing_unsignalled > 0 {
            return Verdict::PostMarker;
        }
        if self.messages_missing() > 0 { Verdict::Wait } else { Verdict::Quiet }
    }

    /// Why it is not quiet, in words; empty if it is.
    pub fn why(&self) -> String {
        let mut reasons = Vec::new();
        if self.sends > 0 {
            reasons.push(format!("{} not completed", count(self.sends, "send")));
        }
        if self.markers > 0 || self.sends_matter() && self.sends == 0 && self.trailing_unsignalled > 0 {
            reasons
                .push(format!("{} not known to be done", count(self.trailing_unsignalled.max(1), "unsignalled send")));
        }
        let missing = self.messages_missing();
        if missing > 0 {
            let posted = count(self.receives_posted, "receive");
            reasons.push(format!("waiting for {}, {posted} posted", count(missing, "message")));
        }
        if self.phase == QpPhase::Sqd && !reasons.is_empty() {
            reasons.push("the QP is in SQD and starts no send".into());
        }
        reasons.join(", ")
    }
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Situation = Situation {
        phase: QpPhase::Rts,
        failed: false,
        sends: 0,
        trailing_unsignalled: 0,
        markers: 0,
        received: 0,
        expected: None,
        receives_posted: 0,
    };

    #[test]
    fn a_qp_waits_for_its_sends_then_for_a_marker_then_for_messages() {
        let mut s = Situation { sends: 3, trailing_unsignalled: 2, expected: Some(7), received: 5, ..IDLE };
        assert_eq!(s.verdict(), Verdict::Wait);
        assert_eq!(s.why(), "3 sends not completed, waiting for 2 messages, 0 receives posted");
        s.sends = 0;
        assert_eq!(s.verdict(), Verdict::PostMarker);
        (s.trailing_unsignalled, s.markers) = (0, 1);
        assert_eq!(s.verdict(), Verdict::Wait);
        s.markers = 0;
        assert_eq!(s.verdict(), Verdict::Wait);
        assert_eq!(s.why(), "waiting for 2 messages, 0 receives posted");
        s.received = 7;
        assert_eq!((s.verdict(), s.why().as_str()), (Verdict::Quiet, ""));
    }

    #[test]
    fn states_that_cannot_send_are_not_awaited_for_sends() {
        for phase in [QpPhase::Reset, QpPhase::Init, QpPhase::Rtr] {
            assert_eq!(Situation { phase, trailing_unsignalled: 1, ..IDLE }.verdict(), Verdict::Quiet);
        }
        let receiving = Situation { phase: QpPhase::Rtr, expected: Some(1), ..IDLE };
        assert_eq!(receiving.verdict(), Verdict::Wait);
    }

    #[test]
    fn a_failed_qp_only_waits_for_completions_that_must_come() {
        let failed = Situation { failed: true, expected: Some(9), trailing_unsignalled: 3, ..IDLE };
        assert_eq!(failed.verdict(), Verdict::Quiet);
        assert_eq!(Situation { sends: 1, ..failed }.verdict(), Verdict::Wait);
    }
}
