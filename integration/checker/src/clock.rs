//! Time as this process should see it, and the stamp thread that shows for how long it did not run.
//!
//! A process that is moved to another machine may find both clocks changed: the monotonic clock
//! counts from another boot, the wall clock may be off. Neither may fake a stall or a pause here, so
//! time is the sum of small steps, each the smaller of what both clocks say. Steps on which the
//! clocks disagree are counted and reported. Deadlines everywhere else are measured in this time.
//!
//! How long the process really stood still is told by the wall clock, which machines keep alike: a
//! monotonic clock that is carried along goes on where it stopped.

use crate::failure::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Disagreement of the two clocks within one step that is reported.
const STEP_NS: i64 = 200_000_000;
/// Standstills from this length on are kept one by one, the longest ones.
const GAP_NS: i64 = 20_000_000;
/// How many of them.
const GAPS: usize = 64;

/// The two clocks of the system, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// CLOCK_MONOTONIC.
    pub mono: i64,
    /// CLOCK_REALTIME.
    pub wall: i64,
}

impl Reading {
    /// Reads both clocks.
    #[must_use]
    #[expect(unsafe_code, reason = "std hides the value of CLOCK_MONOTONIC")]
    pub fn now() -> Self {
        let get = |id| {
            let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
            // SAFETY: the out parameter is valid.
            unsafe { libc::clock_gettime(id, &raw mut t) };
            t.tv_sec * 1_000_000_000 + t.tv_nsec
        };
        Self { mono: get(libc::CLOCK_MONOTONIC), wall: get(libc::CLOCK_REALTIME) }
    }
}

/// One standstill: the stamps on both sides of it, each by the clocks of the machine it was taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// Last stamp before.
    pub before: Reading,
    /// First stamp after.
    pub after: Reading,
}

/// What the stamps have shown.
#[derive(Clone, Debug, Default)]
pub struct Stamps {
    /// Largest time between two stamps by the wall clock (the monotonic one where that was set).
    pub max_ns: i64,
    /// Wall-clock time at the end of that step, in milliseconds since 1970.
    pub max_at_wall_ms: i64,
    /// Largest step of the monotonic clock alone.
    pub max_mono_ns: i64,
    /// Largest step of the wall clock alone.
    pub max_wall_ns: i64,
    /// Steps on which the clocks disagreed, and by how much: (monotonic, wall) in milliseconds.
    pub jumps: Vec<(i64, i64)>,
    /// The longest standstills, in the order they happened.
    pub gaps: Vec<Gap>,
}

impl Stamps {
    fn keep(&mut self, gap: Gap) {
        let length = |g: &Gap| g.after.wall - g.before.wall;
        self.gaps.push(gap);
        if self.gaps.len() > GAPS
            && let Some((shortest, _)) = self.gaps.iter().enumerate().min_by_key(|(_, g)| length(g))
        {
            self.gaps.remove(shortest);
        }
    }
}

#[derive(Debug)]
struct Inner {
    last: Reading,
    stamps: Stamps,
}

/// The process's own time.
#[derive(Debug)]
pub struct Clock {
    now_ns: AtomicU64,
    inner: Mutex<Inner>,
    stop: AtomicBool,
}

impl Clock {
    /// A clock at zero.
    #[must_use]
    pub fn new(start: Reading) -> Self {
        Self {
            now_ns: AtomicU64::new(0),
            inner: Mutex::new(Inner { last: start, stamps: Stamps::default() }),
            stop: AtomicBool::new(false),
        }
    }

    /// Nanoseconds since the start, as of the last stamp.
    #[must_use]
    pub fn now_ns(&self) -> u64 {
        self.now_ns.load(Ordering::Relaxed)
    }

    /// Seconds since the start.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        Duration::from_nanos(self.now_ns()).as_secs_f64()
    }

    /// Takes one stamp.
    pub fn stamp(&self, r: Reading) {
        let mut i = lock(&self.inner);
        let mono = r.mono - i.last.mono;
        let wall = r.wall - i.last.wall;
        let gap = Gap { before: i.last, after: r };
        i.last = r;
        let step = match (mono >= 0, wall >= 0) {
            (true, true) => mono.min(wall),
            (true, false) => mono,
            (false, true) => wall,
            (false, false) => 0,
        };
        let s = &mut i.stamps;
        if (mono - wall).abs() > STEP_NS && s.jumps.len() < 32 {
            s.jumps.push((mono / 1_000_000, wall / 1_000_000));
        }
        // A wall clock that jumps by an hour was set.
        let stood = if (0..3_600_000_000_000).contains(&wall) { wall } else { mono.max(0) };
        if stood > s.max_ns {
            s.max_ns = stood;
            s.max_at_wall_ms = r.wall / 1_000_000;
        }
        if stood >= GAP_NS {
            s.keep(gap);
        }
        s.max_mono_ns = s.max_mono_ns.max(mono);
        s.max_wall_ns = s.max_wall_ns.max(wall);
        self.now_ns.fetch_add(u64::try_from(step).unwrap_or(0), Ordering::Relaxed);
    }

    /// What the stamps have shown so far.
    #[must_use]
    pub fn stamps(&self) -> Stamps {
        lock(&self.inner).stamps.clone()
    }

    /// Stamps every `period` until told to stop.
    pub fn run(&self, period: Duration) {
        while !self.stop.load(Ordering::Relaxed) {
            std::thread::sleep(period);
            self.stamp(Reading::now());
        }
    }

    /// Ends [`Clock::run`].
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mono_ms: i64, wall_ms: i64) -> Reading {
        Reading { mono: mono_ms * 1_000_000, wall: wall_ms * 1_000_000 }
    }

    #[test]
    fn a_pause_seen_by_both_clocks_is_a_pause() {
        let c = Clock::new(at(0, 0));
        c.stamp(at(1, 1));
        c.stamp(at(501, 501));
        let s = c.stamps();
        assert_eq!(s.max_ns, 500_000_000);
        assert_eq!(s.max_at_wall_ms, 501);
        assert!(s.jumps.is_empty());
    }

    #[test]
    fn a_monotonic_clock_of_another_machine_fakes_neither_time_nor_pause() {
        let c = Clock::new(at(1000, 0));
        c.stamp(at(1_000_000, 300));
        c.stamp(at(5, 301));
        assert_eq!(c.now_ns(), 301_000_000);
        assert_eq!(c.stamps().jumps.len(), 2);
    }

    #[test]
    fn a_monotonic_clock_that_was_carried_along_does_not_hide_the_pause() {
        let c = Clock::new(at(0, 0));
        c.stamp(at(20, 900));
        assert_eq!(c.stamps().max_ns, 900_000_000);
        assert_eq!(c.now_ns(), 20_000_000);
    }

    #[test]
    fn the_longest_standstills_are_kept_with_the_stamps_on_both_sides() {
        let c = Clock::new(at(0, 0));
        let (mut t, mut longest) = (0, at(0, 0));
        for n in 0..200 {
            t += if n == 7 { 900 } else { 30 };
            if n == 7 {
                longest = at(t, t);
            }
            c.stamp(at(t, t));
            t += 1;
            c.stamp(at(t, t));
        }
        let gaps = c.stamps().gaps;
        assert_eq!(gaps.len(), GAPS);
        assert!(gaps.is_sorted_by_key(|g| g.after.wall));
        assert!(gaps.iter().any(|g| g.after == longest && g.after.wall - g.before.wall == 900_000_000));
    }

    #[test]
    fn a_wall_clock_set_back_is_ignored() {
        let c = Clock::new(at(0, 1_000_000));
        c.stamp(at(10, 0));
        assert_eq!(c.now_ns(), 10_000_000);
        assert_eq!(c.stamps().max_ns, 10_000_000);
    }
}
