//! What remote atomics must return: a counter only one lane adds to, and a cell only one lane swaps.
//!
//! Since nobody else touches them, every returned value is known before the operation is posted;
//! an operation executed twice, or not at all, shifts every later value.

use crate::pattern::mix;

/// A remote counter that only ever has 1 added to it.
#[derive(Debug, Default)]
pub struct Counter {
    posted: u64,
}

impl Counter {
    /// Registers one FETCH_ADD(+1); returns the value it must fetch.
    pub fn add(&mut self) -> u64 {
        let v = self.posted;
        self.posted += 1;
        v
    }

    /// Operations registered; also what the counter must hold when all are done.
    #[must_use]
    pub fn posted(&self) -> u64 {
        self.posted
    }
}

/// A remote cell that walks along a chain of values by CMP_SWP.
#[derive(Debug, Default)]
pub struct Chain {
    posted: u64,
}

impl Chain {
    /// The `n`-th value of the chain; cells start at `value(0)`, which is 0.
    #[must_use]
    pub fn value(n: u64) -> u64 {
        if n == 0 { 0 } else { mix(n) | 1 }
    }

    /// Registers one CMP_SWP; returns (value to compare with, value to store). It must fetch the
    /// former.
    pub fn step(&mut self) -> (u64, u64) {
        let n = self.posted;
        self.posted += 1;
        (Self::value(n), Self::value(n + 1))
    }

    /// Operations registered.
    #[must_use]
    pub fn posted(&self) -> u64 {
        self.posted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fetched_values_count_up_by_one_and_the_counter_ends_at_the_number_posted() {
        let (mut model, mut memory) = (Counter::default(), 0u64);
        for _ in 0..100 {
            let fetched = memory;
            memory += 1;
            assert_eq!(model.add(), fetched);
        }
        assert_eq!(memory, model.posted());
    }

    #[test]
    fn an_add_executed_twice_is_seen_by_the_next_one() {
        let (mut model, mut memory) = (Counter::default(), 0u64);
        assert_eq!(model.add(), memory);
        memory += 2;
        assert_ne!(model.add(), memory);
    }

    #[test]
    fn a_swap_that_was_lost_breaks_the_chain() {
        let (mut model, mut memory) = (Chain::default(), 0u64);
        for n in 0..10 {
            let (compare, swap) = model.step();
            let fetched = memory;
            if n != 5 && fetched == compare {
                memory = swap;
            }
            assert_eq!(fetched == compare, n <= 5, "step {n}");
        }
    }

    #[test]
    fn values_of_the_chain_do_not_return() {
        let all: std::collections::HashSet<_> = (0..10_000).map(Chain::value).collect();
        assert_eq!(all.len(), 10_000);
    }
}
