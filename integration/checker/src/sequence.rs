//! Numbers that must come exactly once and in order: the receiver's view of one stream.
//!
//! Pure bookkeeping; it says *what kind* of wrong a wrong number is, since "lost" and "repeated"
//! point at different bugs.

use std::fmt;

/// What is wrong about a number that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Numbers in between never came (yet).
    Lost {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// A number that was taken before came again.
    Repeated {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
    /// A number that had been skipped came late.
    Late {
        /// The number that was due.
        expected: u64,
        /// The number that came.
        got: u64,
    },
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost { expected, got } => {
                write!(f, "lost or overtaken: number {expected} was due, {got} came")
            }
            Self::Repeated { expected, got } => {
                write!(f, "repeated: number {expected} was due, {got} came again")
            }
            Self::Late { expected, got } => {
                write!(f, "reordered: number {expected} was due, {got} came late")
            }
        }
    }
}

/// Checks that numbers count up by exactly one from 0.
#[derive(Debug, Default)]
pub struct SequenceChecker {
    next: u64,
    missing: Vec<u64>,
}

impl SequenceChecker {
    /// The number that is due next, which is also how many came in order so far.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes one number.
    ///
    /// # Errors
    /// When it is not the one due. The checker goes on from the larger of both, so that one lost
    /// message is one error and not one per message after it.
    pub fn accept(&mut self, got: u64) -> Result<(), Wrong> {
        let expected = self.next;
        if got == expected {
            self.next += 1;
            return Ok(());
        }
        if got > expected {
            // Only the first few are remembered: enough to name a reordering.
            let room = 64usize.saturating_sub(self.missing.len());
            self.missing.extend((expected..got).take(room));
            self.next = got + 1;
            return Err(Wrong::Lost { expected, got });
        }
        if let Some(i) = self.missing.iter().position(|&m| m == got) {
            self.missing.swap_remove(i);
            return Err(Wrong::Late { expected, got });
        }
        Err(Wrong::Repeated { expected, got })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counting_up_by_one_is_right() {
        let mut s = SequenceChecker::default();
        assert!((0..1000).all(|n| s.accept(n).is_ok()));
        assert_eq!(s.next(), 1000);
    }

    #[test]
    fn a_lost_number_is_one_error() {
        let mut s = SequenceChecker::default();
        assert!(s.accept(0).is_ok());
        assert_eq!(s.accept(2), Err(Wrong::Lost { expected: 1, got: 2 }));
        assert!(s.accept(3).is_ok());
    }

    #[test]
    fn a_repeated_number_is_named_as_such() {
        let mut s = SequenceChecker::default();
        assert!(s.accept(0).is_ok() && s.accept(1).is_ok());
        assert_eq!(s.accept(1), Err(Wrong::Repeated { expected: 2, got: 1 }));
        assert!(s.accept(2).is_ok());
    }

    #[test]
    fn two_swapped_numbers_are_a_reordering_not_a_repetition() {
        let mut s = SequenceChecker::default();
        assert!(s.accept(0).is_ok());
        assert_eq!(s.accept(2), Err(Wrong::Lost { expected: 1, got: 2 }));
        assert_eq!(s.accept(1), Err(Wrong::Late { expected: 3, got: 1 }));
        assert_eq!(s.accept(1), Err(Wrong::Repeated { expected: 3, got: 1 }));
    }

    #[test]
    fn a_stream_that_does_not_start_at_zero_lost_something() {
        assert!(SequenceChecker::default().accept(1).is_err());
    }
}
