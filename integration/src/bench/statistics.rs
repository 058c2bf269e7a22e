//! What can be said of a handful of measured numbers: median, bootstrap interval, differences in pairs.
//!
//! Pure and repeatable: the same numbers give the same interval, on every machine.

use serde::{Deserialize, Serialize};

/// Resamples of one bootstrap.
const RESAMPLES: usize = 4000;
/// With fewer values no interval of a median can hold in 95 of 100 cases (2 · 0.5⁵ > 5 %).
pub const FEWEST: usize = 6;

/// A median with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Middle of the values.
    pub median: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
    /// Number of values.
    pub n: usize,
}

impl Estimate {
    /// Half the interval's width, in the values' unit.
    pub fn half_width(&self) -> f64 {
        (self.high - self.low) / 2.0
    }

    /// Whether the interval is no wider than ± `tolerance` (in the values' unit), and there are enough values for it.
    pub fn resolved(&self, tolerance: f64) -> bool {
        self.n >= FEWEST && self.half_width() <= tolerance
    }

    /// As [`Estimate::resolved`], with the tolerance as a share of the median.
    pub fn resolved_within(&self, share: f64) -> bool {
        self.resolved(share * self.median.abs())
    }
}

/// Middle of the values; the mean of the two middle ones of an even number. `None` without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    middle(&sorted)
}

fn middle(sorted: &[f64]) -> Option<f64> {
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some(f64::midpoint(sorted[half - 1], sorted[half])),
    }
}

/// Median with the percentile interval of its bootstrap. `None` without values.
pub fn estimate(values: &[f64]) -> Option<Estimate> {
    let median = median(values)?;
    // Fixed: the interval must not depend on when it is computed.
    let mut random = Random::new(values.len() as u64);
    let mut drawn = vec![0.0; values.len()];
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .filter_map(|_| {
            drawn.fill_with(|| values[random.below(values.len())]);
            drawn.sort_by(f64::total_cmp);
            middle(&drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    let at = |share: f64| medians[((RESAMPLES - 1) as f64 * share).round() as usize];
    Some(Estimate { median, low: at(0.025), high: at(0.975), n: values.len() })
}

/// Values of the rounds that both have, in the order of `first`. Each is a round's number and its value.
pub fn pairs(first: &[(u32, f64)], second: &[(u32, f64)]) -> Vec<(f64, f64)> {
    let partner = |round| second.iter().find(|(r, _)| *r == round).map(|(_, v)| *v);
    first.iter().filter_map(|(round, v)| Some((*v, partner(*round)?))).collect()
}

/// By how much the second of each pair is longer, as a share of the first. `None` without pairs.
pub fn relative_difference(pairs: &[(f64, f64)]) -> Option<Estimate> {
    let shares: Vec<f64> = pairs.iter().filter(|(a, _)| *a != 0.0).map(|(a, b)| (b - a) / a).collect();
    estimate(&shares)
}

/// The second of each pair over the first. `None` without pairs.
pub fn ratio(pairs: &[(f64, f64)]) -> Option<Estimate> {
    let ratios: Vec<f64> = pairs.iter().filter(|(a, _)| *a != 0.0).map(|(a, b)| b / a).collect();
    estimate(&ratios)
}

/// Repeatable random numbers (splitmix64); nothing secret hangs on them.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Puts things into another order.
    pub fn shuffle<T>(&mut self, things: &mut [T]) {
        for i in (1..things.len()).rev() {
            things.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_median_of_known_values() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn few_values_resolve_nothing_however_alike_they_are() {
        let five = estimate(&[100.0; 5]).unwrap();
        assert_eq!(five.half_width(), 0.0);
        assert!(!five.resolved_within(0.05));
        assert!(estimate(&[100.0; 6]).unwrap().resolved_within(0.05));
    }

    #[test]
    fn values_that_scatter_much_are_not_resolved() {
        let wide: Vec<f64> = (0..20).map(|i| 100.0 + f64::from(i) * 10.0).collect();
        assert!(!estimate(&wide).unwrap().resolved_within(0.05));
        let narrow: Vec<f64> = (0..20).map(|i| 100.0 + f64::from(i) * 0.1).collect();
        assert!(estimate(&narrow).unwrap().resolved_within(0.05));
    }

    #[test]
    fn the_interval_holds_the_truth_about_as_often_as_it_says() {
        let mut random = Random::new(7);
        let mut held = 0;
        for _ in 0..300 {
            // Sum of uniform numbers: symmetric around 6, which is the true median.
            let values: Vec<f64> =
                (0..15).map(|_| (0..12).map(|_| random.below(1_000_001) as f64 / 1e6).sum()).collect();
            let e = estimate(&values).unwrap();
            held += usize::from(e.low <= 6.0 && 6.0 <= e.high);
        }
        assert!(held >= 270, "the interval held the truth in {held} of 300 cases only");
    }

    #[test]
    fn only_rounds_that_both_have_make_pairs() {
        let a = [(1, 10.0), (2, 20.0), (4, 40.0)];
        let b = [(2, 22.0), (1, 11.0), (3, 33.0)];
        assert_eq!(pairs(&a, &b), [(10.0, 11.0), (20.0, 22.0)]);
        let e = relative_difference(&pairs(&a, &b)).unwrap();
        assert!((e.median - 0.1).abs() < 1e-12 && e.n == 2);
    }

    proptest! {
        #[test]
        fn the_interval_holds_the_median_and_lies_within_the_values(
            values in proptest::collection::vec(-1e6f64..1e6, 1..40)
        ) {
            let e = estimate(&values).unwrap();
            let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(*v), h.max(*v)));
            prop_assert!(e.low <= e.median && e.median <= e.high);
            prop_assert!(min <= e.low && e.high <= max);
            prop_assert_eq!(e.n, values.len());
        }

        #[test]
        fn the_interval_moves_with_the_values(
            values in proptest::collection::vec(0f64..1e3, 1..30), by in 0f64..1e3
        ) {
            let e = estimate(&values).unwrap();
            let moved = estimate(&values.iter().map(|v| v + by).collect::<Vec<_>>()).unwrap();
            prop_assert!((moved.median - e.median - by).abs() < 1e-6);
            prop_assert!((moved.low - e.low - by).abs() < 1e-6 && (moved.high - e.high - by).abs() < 1e-6);
        }

        #[test]
        fn the_order_of_values_does_not_matter_for_the_median(
            mut values in proptest::collection::vec(-1e6f64..1e6, 1..40), seed in 0u64..1000
        ) {
            let before = median(&values);
            Random::new(seed).shuffle(&mut values);
            prop_assert_eq!(before, median(&values));
        }

        #[test]
        fn equal_pairs_differ_by_nothing(values in proptest::collection::vec(1f64..1e6, 1..20)) {
            let pairs: Vec<_> = values.iter().map(|v| (*v, *v)).collect();
            let e = relative_difference(&pairs).unwrap();
            prop_assert_eq!((e.low, e.median, e.high), (0.0, 0.0, 0.0));
            prop_assert_eq!(ratio(&pairs).unwrap().median, 1.0);
        }

        #[test]
        fn random_numbers_stay_below(n in 1usize..1000, seed in 0u64..1000) {
            let mut r = Random::new(seed);
            prop_assert!((0..50).all(|_| r.below(n) < n));
        }
    }
}
