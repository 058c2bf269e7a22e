//! Posted work requests of one lane: every one completes exactly once, in the order posted.
//!
//! An unsignalled request has no completion of its own; it is known complete when a later one of
//! the same queue completes. Lanes of one QP are tracked apart, since threads that post to one QP
//! without a common lock have no order between them.

use std::collections::VecDeque;
use std::fmt;

#[derive(Debug)]
struct Posted<T> {
    wr_id: u64,
    signalled: bool,
    what: T,
}

/// What is wrong about a completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// The request was never posted, or completed before.
    NotOutstanding {
        /// wr_id of the completion.
        got: u64,
        /// Oldest request still outstanding.
        oldest: Option<u64>,
    },
    /// An older signalled request has not completed.
    Overtook {
        /// wr_id of the completion.
        got: u64,
        /// The older request whose completion is missing.
        missing: u64,
    },
    /// The request was posted unsignalled and succeeded, so nothing should have come.
    Unasked {
        /// wr_id of the completion.
        got: u64,
    },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotOutstanding { got, oldest } => write!(
                f,
                "completion of wr_id {got:#x}, which is not outstanding (completed before, or never posted); oldest outstanding {oldest:?}"
            ),
            Self::Overtook { got, missing } => write!(
                f,
                "completion of wr_id {got:#x} came while the older signalled wr_id {missing:#x} has none: lost or overtaken"
            ),
            Self::Unasked { got } => {
                write!(f, "completion of wr_id {got:#x}, which was posted unsignalled")
            }
        }
    }
}

/// Requests posted and not known complete.
#[derive(Debug)]
pub struct Tracker<T> {
    posted: VecDeque<Posted<T>>,
}

impl<T> Default for Tracker<T> {
    fn default() -> Self {
        Self { posted: VecDeque::new() }
    }
}

impl<T> Tracker<T> {
    /// Records one request, in posting order.
    pub fn post(&mut self, wr_id: u64, signalled: bool, what: T) {
        self.posted.push_back(Posted { wr_id, signalled, what });
    }

    /// Takes one completion and hands out, in order, every request it proves complete. The last of
    /// them is the completed one itself.
    ///
    /// # Errors
    /// When the completion is not the one due. Nothing is retired then.
    pub fn complete(&mut self, wr_id: u64) -> Result<impl Iterator<Item = T>, Wrong> {
        let Some(at) = self.posted.iter().position(|p| p.wr_id == wr_id) else {
            return Err(Wrong::NotOutstanding { got: wr_id, oldest: self.posted.front().map(|p| p.wr_id) });
        };
        if let Some(older) = self.posted.iter().take(at).find(|p| p.signalled) {
            return Err(Wrong::Overtook { got: wr_id, missing: older.wr_id });
        }
        if !self.posted[at].signalled {
            return Err(Wrong::Unasked { got: wr_id });
        }
        Ok(self.posted.drain(..=at).map(|p| p.what))
    }

    /// Requests not known complete.
    #[must_use]
    pub fn len(&self) -> usize {
        self.posted.len()
    }

    /// Whether everything posted is known complete.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.posted.is_empty()
    }

    /// Whether the newest request will produce a completion (true when there is none).
    #[must_use]
    pub fn ends_signalled(&self) -> bool {
        self.posted.back().is_none_or(|p| p.signalled)
    }

    /// wr_id, signalled and content of what is outstanding, oldest first.
    pub fn outstanding(&self) -> impl Iterator<Item = (u64, bool, &T)> {
        self.posted.iter().map(|p| (p.wr_id, p.signalled, &p.what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tracker(signalled: &[bool]) -> Tracker<usize> {
        let mut t = Tracker::default();
        for (i, s) in signalled.iter().enumerate() {
            t.post(i as u64, *s, i);
        }
        t
    }

    fn done(t: &mut Tracker<usize>, id: u64) -> Result<Vec<usize>, Wrong> {
        t.complete(id).map(Iterator::collect)
    }

    #[test]
    fn a_signalled_request_completes_the_unsignalled_ones_before_it() {
        let mut t = tracker(&[false, false, true, false]);
        assert_eq!(done(&mut t, 2), Ok(vec![0, 1, 2]));
        assert_eq!(t.len(), 1);
        assert!(!t.ends_signalled());
    }

    #[test]
    fn a_completion_that_comes_twice_is_refused() {
        let mut t = tracker(&[true, true]);
        assert!(done(&mut t, 0).is_ok());
        assert_eq!(done(&mut t, 0), Err(Wrong::NotOutstanding { got: 0, oldest: Some(1) }));
    }

    #[test]
    fn a_lost_completion_is_noticed_by_the_next_one() {
        let mut t = tracker(&[true, true]);
        assert_eq!(done(&mut t, 1), Err(Wrong::Overtook { got: 1, missing: 0 }));
    }

    #[test]
    fn a_completion_nobody_asked_for_is_refused() {
        let mut t = tracker(&[false, true]);
        assert_eq!(done(&mut t, 0), Err(Wrong::Unasked { got: 0 }));
    }

    proptest! {
        #[test]
        fn in_order_completion_of_the_signalled_ones_retires_all_exactly_once(
            signalled in proptest::collection::vec(any::<bool>(), 1..100)
        ) {
            let mut t = tracker(&signalled);
            let mut seen = Vec::new();
            for (i, _) in signalled.iter().enumerate().filter(|(_, s)| **s) {
                seen.extend(done(&mut t, i as u64).expect("in order"));
            }
            let covered = signalled.iter().rposition(|s| *s).map_or(0, |i| i + 1);
            prop_assert_eq!(seen, (0..covered).collect::<Vec<_>>());
            prop_assert_eq!(t.len(), signalled.len() - covered);
        }
    }
}
