//! Counters and completion gaps, fed by every completion.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters of one end. All monotonic but the window's.
#[derive(Debug, Default)]
pub struct Stats {
    /// Two-sided messages posted.
    pub sent: AtomicU64,
    /// Two-sided messages known delivered.
    pub delivered: AtomicU64,
    /// Two-sided messages received and checked.
    pub received: AtomicU64,
    /// WRITEs known complete.
    pub writes: AtomicU64,
    /// READs checked.
    pub reads: AtomicU64,
    /// Atomics checked.
    pub atomics: AtomicU64,
    /// Credit updates known complete.
    pub credit_updates: AtomicU64,
    /// Payload bytes of everything above.
    pub bytes: AtomicU64,
    /// Operations of everything above.
    pub ops: AtomicU64,
    /// Completion events taken.
    pub cq_events: AtomicU64,
    /// Rounds of the identity check.
    pub identity_checks: AtomicU64,
    /// Objects made and destroyed by the churn thread.
    pub churned: AtomicU64,
    /// Device-wide asynchronous events that concern no object of ours.
    pub async_events: AtomicU64,
    /// Asynchronous events that were left unread on purpose and found in the end.
    pub unread_events: AtomicU64,
    last_ns: AtomicU64,
    max_gap_ns: AtomicU64,
    max_gap_end_ns: AtomicU64,
    window_gap_ns: AtomicU64,
}

impl Stats {
    /// Completions came at `now` (process time).
    pub fn progress(&self, now_ns: u64) {
        let last = self.last_ns.swap(now_ns, Relaxed);
        if last == 0 {
            return;
        }
        let gap = now_ns.saturating_sub(last);
        self.window_gap_ns.fetch_max(gap, Relaxed);
        if self.max_gap_ns.fetch_max(gap, Relaxed) < gap {
            self.max_gap_end_ns.store(now_ns, Relaxed);
        }
    }

    /// One operation of `bytes` is done.
    pub fn op(&self, kind: &AtomicU64, bytes: u64) {
        kind.fetch_add(1, Relaxed);
        self.ops.fetch_add(1, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    /// Process time of the last completion; 0 before the first.
    #[must_use]
    pub fn last_ns(&self) -> u64 {
        self.last_ns.load(Relaxed)
    }

    /// Largest time without any completion, and the process time at which it ended.
    #[must_use]
    pub fn max_gap(&self) -> (u64, u64) {
        (self.max_gap_ns.load(Relaxed), self.max_gap_end_ns.load(Relaxed))
    }

    /// Largest gap since the last call, counting one that is still open.
    #[must_use]
    pub fn take_window_gap(&self, now_ns: u64) -> u64 {
        let open = match self.last_ns() {
            0 => 0,
            last => now_ns.saturating_sub(last),
        };
        self.window_gap_ns.swap(0, Relaxed).max(open)
    }
}
