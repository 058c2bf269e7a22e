//! The list of violations. One is enough to fail; the first few are kept word for word.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Violations kept word for word.
const KEPT: usize = 20;

/// Collects violations from all threads.
#[derive(Debug, Default)]
pub struct Failures {
    count: AtomicU64,
    first: Mutex<Vec<String>>,
}

impl Failures {
    /// Records one violation.
    pub fn add(&self, what: impl Into<String>) {
        let n = self.count.fetch_add(1, Ordering::SeqCst);
        if n < KEPT as u64 {
            let what = what.into();
            eprintln!("rdma-checker: violation: {what}");
            lock(&self.first).push(what);
        }
    }

    /// Violations so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// The first of them.
    #[must_use]
    pub fn first(&self) -> Vec<String> {
        lock(&self.first).clone()
    }
}

/// Locks; a thread that panicked while holding the lock has aborted the process (see `main`), so
/// poisoning tells nothing.
pub fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
