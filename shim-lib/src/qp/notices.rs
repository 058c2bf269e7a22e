//! Which of the events that a QP's kernel object raises are the application's. A kernel object made anew is taken to the
//! state its predecessor was in, and reports that it got there: the application has heard it of the predecessor, or is
//! told by us. Without a move every event is the application's.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use rdma_virt::saved::QpPhase;

use super::ShadowQp;
use crate::abi::{event, ibv_async_element, ibv_async_event, ibv_qp, qp_state};

/// The send queue is drained: reported on the way to SQD.
const DRAINED: u8 = 1 << 0;
/// No receive comes any more: reported, of QPs with an SRQ, on the way to ERR.
const LAST_WQE: u8 = 1 << 1;

fn bit_of(event_type: u32) -> u8 {
    match event_type {
        event::SQ_DRAINED => DRAINED,
        event::QP_LAST_WQE_REACHED => LAST_WQE,
        _ => 0,
    }
}

/// What may be reported anew once the application has taken the QP to that state.
fn anew_after(state: u32) -> u8 {
    match state {
        qp_state::SQD => DRAINED,
        // From RESET it may get to where it fails by itself.
        qp_state::RESET | qp_state::ERR => LAST_WQE,
        _ => 0,
    }
}

/// What is known about a QP's reports.
#[derive(Debug, Default)]
pub struct Notices {
    /// Reports of these kinds are of our doing.
    ours: AtomicU8,
    /// The application took the QP to SQD and the kernel has not reported that it is drained.
    draining: AtomicBool,
}

/// What was before the application's call, should it fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Before {
    ours: u8,
    draining: bool,
}

impl Notices {
    /// Whether a report of that kind is the application's. It counts as made.
    fn hears(&self, event_type: u32) -> bool {
        if self.ours.load(Ordering::Acquire) & bit_of(event_type) != 0 {
            return false;
        }
        if event_type == event::SQ_DRAINED {
            self.draining.store(false, Ordering::Release);
        }
        true
    }

    /// Whether reports of our doing may be on their way that could be taken for those of what the application asks now.
    pub fn in_the_way(&self, state: u32) -> bool {
        self.ours.load(Ordering::Acquire) & anew_after(state) != 0
    }

    /// The application is about to take the QP to that state: what is reported then is its own. `reported`: whether the
    /// kernel will say when the send queue is drained.
    pub fn asked(&self, state: u32, reported: bool) -> Before {
        let ours = self.ours.fetch_and(!anew_after(state), Ordering::AcqRel);
        let draining = self.draining.load(Ordering::Acquire);
        if state == qp_state::SQD && reported {
            self.draining.store(true, Ordering::Release);
        }
        Before { ours, draining }
    }

    /// It was not taken there.
    pub fn refused(&self, before: Before) {
        self.ours.store(before.ours, Ordering::Release);
        self.draining.store(before.draining, Ordering::Release);
    }

    /// There is a new kernel object, which was or will be taken to `phase` by us. Everything in flight on the old one had
    /// been completed: whether the application has yet to be told that its send queue is drained.
    fn made_anew(&self, phase: QpPhase) -> bool {
        let state = if phase == QpPhase::Err { LAST_WQE } else { 0 };
        // It may have been in SQD at any time before now.
        self.ours.store(DRAINED | state, Ordering::Release);
        self.draining.swap(false, Ordering::AcqRel) && phase == QpPhase::Sqd
    }
}

impl ShadowQp {
    /// Whether an event of that kind of one of its real QPs is the application's.
    pub(crate) fn hears(&self, real: *mut ibv_qp, event_type: u32) -> bool {
        !self.is_beside(real) && self.notices.hears(event_type)
    }

    /// Notes that there is a new kernel object. What the old one has not reported, and will not, is kept for the
    /// application; the caller announces it.
    pub fn made_anew(&self) {
        if self.notices.made_anew(self.attr().phase) {
            let element = ibv_async_element { qp: self.visible() };
            self.ctx().keep(ibv_async_event { element, event_type: event::SQ_DRAINED });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_move_everything_is_the_applications() {
        let notices = Notices::default();
        for kind in [event::SQ_DRAINED, event::SQ_DRAINED, event::QP_LAST_WQE_REACHED, event::QP_FATAL] {
            assert!(notices.hears(kind));
        }
    }

    #[test]
    fn what_was_reported_before_a_move_is_not_reported_after_it() {
        let notices = Notices::default();
        notices.asked(qp_state::SQD, true);
        assert!(notices.hears(event::SQ_DRAINED));
        assert!(!notices.made_anew(QpPhase::Sqd), "the application has it");
        // An incubator may have been there more than once.
        assert!(!notices.hears(event::SQ_DRAINED) && !notices.hears(event::SQ_DRAINED));
        assert!(notices.hears(event::QP_FATAL) && notices.hears(event::QP_LAST_WQE_REACHED));
        // And it goes there again by itself.
        assert!(notices.in_the_way(qp_state::SQD) && !notices.in_the_way(qp_state::RTS));
        notices.asked(qp_state::RTS, true);
        assert!(!notices.hears(event::SQ_DRAINED), "a late one");
        notices.asked(qp_state::SQD, true);
        assert!(!notices.in_the_way(qp_state::SQD));
        assert!(notices.hears(event::SQ_DRAINED));
    }

    #[test]
    fn what_was_not_reported_before_a_move_is_owed_once() {
        let notices = Notices::default();
        notices.asked(qp_state::SQD, true);
        assert!(notices.made_anew(QpPhase::Sqd));
        assert!(!notices.made_anew(QpPhase::Sqd));
        // One that does not report it on request only, and one that has left the state.
        notices.asked(qp_state::SQD, false);
        assert!(!notices.made_anew(QpPhase::Sqd));
        notices.asked(qp_state::SQD, true);
        assert!(!notices.made_anew(QpPhase::Err));
    }

    #[test]
    fn a_refused_change_of_state_changes_nothing() {
        let notices = Notices::default();
        assert!(!notices.made_anew(QpPhase::Sqd));
        let before = notices.asked(qp_state::SQD, true);
        notices.refused(before);
        assert!(!notices.hears(event::SQ_DRAINED), "still of our doing");
        assert!(!notices.made_anew(QpPhase::Sqd), "nothing is awaited");
    }

    #[test]
    fn one_that_failed_before_a_move_says_so_once() {
        let notices = Notices::default();
        assert!(notices.hears(event::QP_LAST_WQE_REACHED));
        notices.made_anew(QpPhase::Err);
        assert!(!notices.hears(event::QP_LAST_WQE_REACHED));
        assert!(notices.in_the_way(qp_state::RESET));
        notices.asked(qp_state::RESET, true);
        assert!(notices.hears(event::QP_LAST_WQE_REACHED));
        notices.made_anew(QpPhase::Rts);
        assert!(notices.hears(event::QP_LAST_WQE_REACHED), "it fails at its new place");
    }
}
