//! The lock around a post: held for some hundred nanoseconds, taken by every post, and the proof that nobody is inside
//! one when a suspension takes it.
//!
//! It guards no data of its own (the owner pairs it with what it protects), so it needs no unsafe code. It is generic
//! over the flag so that the same code runs under loom.

use std::sync::atomic::{AtomicBool, Ordering};

/// An atomic boolean: the standard one, or loom's.
pub trait Flag {
    /// Sets it, acquire; returns what it was.
    fn raise(&self) -> bool;
    /// Clears it, release.
    fn lower(&self);
    /// What it is, relaxed.
    fn is_raised(&self) -> bool;
    /// Lets others run, after some tries.
    fn pause(tries: u32);
}

impl Flag for AtomicBool {
    #[inline]
    fn raise(&self) -> bool {
        self.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err()
    }

    #[inline]
    fn lower(&self) {
        self.store(false, Ordering::Release);
    }

    #[inline]
    fn is_raised(&self) -> bool {
        self.load(Ordering::Relaxed)
    }

    fn pause(tries: u32) {
        // On a machine with fewer CPUs than threads the holder may not be running.
        if tries % 64 == 63 { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
}

/// A spin lock without data.
#[derive(Debug, Default)]
pub struct RawSpin<F: Flag = AtomicBool> {
    flag: F,
}

/// Holding a [`RawSpin`]; released on drop.
#[derive(Debug)]
pub struct Held<'a, F: Flag>(&'a F);

impl<F: Flag> Drop for Held<'_, F> {
    #[inline]
    fn drop(&mut self) {
        self.0.lower();
    }
}

impl<F: Flag> RawSpin<F> {
    pub const fn new(flag: F) -> Self {
        Self { flag }
    }

    /// Waits for it. A thread stopped by a debugger while holding it blocks this for ever: whoever has a deadline
    /// uses [`RawSpin::try_lock`].
    #[inline]
    pub fn lock(&self) -> Held<'_, F> {
        let mut tries = 0;
        loop {
            if let Some(held) = self.try_lock() {
                return held;
            }
            while self.flag.is_raised() {
                F::pause(tries);
                tries = tries.wrapping_add(1);
            }
        }
    }

    #[inline]
    pub fn try_lock(&self) -> Option<Held<'_, F>> {
        (!self.flag.raise()).then(|| Held(&self.flag))
    }
}
