//! A value and the lock around it: `rdma-virt`'s spin lock, which is what makes "nobody is inside a post or a poll" a
//! provable statement, with something inside. It can be waited for with a deadline, because a thread may be stopped by
//! a debugger while it holds it. It is not fair and does not poison.
#![expect(unsafe_code, reason = "a lock hands out exclusive references to its content")]

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use rdma_virt::spin::{Held, RawSpin};

/// A value and its lock.
#[derive(Debug)]
pub struct Spin<T> {
    lock: RawSpin<AtomicBool>,
    value: UnsafeCell<T>,
}

// SAFETY: the content is reached by one thread at a time only.
unsafe impl<T: Send> Send for Spin<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Spin<T> {}

impl<T> Spin<T> {
    pub const fn new(value: T) -> Self {
        Self { lock: RawSpin::new(AtomicBool::new(false)), value: UnsafeCell::new(value) }
    }

    #[inline]
    pub fn lock(&self) -> SpinGuard<'_, T> {
        SpinGuard { _held: self.lock.lock(), value: &self.value }
    }

    /// `None` when the deadline passes first.
    pub fn lock_until(&self, deadline: Instant) -> Option<SpinGuard<'_, T>> {
        loop {
            if let Some(held) = self.lock.try_lock() {
                return Some(SpinGuard { _held: held, value: &self.value });
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

/// Access to the content; the lock is free again when this goes.
#[derive(Debug)]
pub struct SpinGuard<'a, T> {
    _held: Held<'a, AtomicBool>,
    value: &'a UnsafeCell<T>,
}

impl<T> Deref for SpinGuard<'_, T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: this guard is the only one.
        unsafe { &*self.value.get() }
    }
}

impl<T> DerefMut for SpinGuard<'_, T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard is the only one.
        unsafe { &mut *self.value.get() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_threads_are_never_inside_together() {
        let lock = Spin::new(0u64);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..10_000 {
                        *lock.lock() += 1;
                    }
                });
            }
        });
        assert_eq!(*lock.lock(), 40_000);
    }

    #[test]
    fn waiting_for_a_held_lock_ends_at_the_deadline() {
        let lock = Spin::new(());
        let _held = lock.lock();
        assert!(lock.lock_until(Instant::now() + Duration::from_millis(5)).is_none());
    }
}
