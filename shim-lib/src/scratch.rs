//! Memory for what is made only to be sent away, and given back to the kernel when all of it is gone.
//!
//! The process that moves reports all it has in the pause, just before it is written down. Memory the report came from
//! would be dirty in the C library's heap although nothing lies in it any more, and be written down, sent and restored with
//! the rest. What [`within`] allocates comes from a mapping of its own instead.
//!
//! This is the allocator of this library's own code; the application's `malloc` is not concerned.
#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Address space of the mapping; what is not touched takes no memory. Who needs more than this gets it from the heap.
const SIZE: usize = 64 << 20;

/// Where the mapping is; 0 if there is none.
static BASE: AtomicUsize = AtomicUsize::new(0);
/// Bytes of it that were given out. Only the thread inside changes it.
static USED: AtomicUsize = AtomicUsize::new(0);
/// What was given out and not taken back yet.
static LIVE: AtomicUsize = AtomicUsize::new(0);
/// A thread is inside. In the child of a fork it may be one that is not there; that one does without.
static TAKEN: AtomicBool = AtomicBool::new(false);

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// See the module's text.
pub struct Scratch;

#[global_allocator]
static ALLOCATOR: Scratch = Scratch;

/// Does `f`. What it allocates and does not give back keeps the mapping until the next time.
pub fn within<R>(f: impl FnOnce() -> R) -> R {
    let _inside = Inside::begin();
    f()
}

/// A thread inside.
struct Inside(bool);

impl Inside {
    fn begin() -> Self {
        let free = TAKEN.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        if free {
            if BASE.load(Ordering::Relaxed) == 0 {
                USED.store(0, Ordering::Relaxed);
                BASE.store(map(), Ordering::Release);
            }
            INSIDE.set(true);
        }
        Inside(free)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        if !self.0 {
            return;
        }
        INSIDE.set(false);
        let base = BASE.load(Ordering::Relaxed);
        // Pairs with the release by whoever gave the last one back.
        if base != 0 && LIVE.load(Ordering::Acquire) == 0 {
            // First: whom the kernel gives the same place afterwards must not take it for ours.
            BASE.store(0, Ordering::Release);
            // SAFETY: made by `map`; nothing that was given out of it is in use any more.
            unsafe { libc::munmap(base as *mut libc::c_void, SIZE) };
        }
        TAKEN.store(false, Ordering::Release);
    }
}

/// The mapping's address, 0 if there can be none.
fn map() -> usize {
    let (access, kind) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: a new mapping wherever there is room; the advice concerns it alone.
    unsafe {
        let at = libc::mmap(null_mut(), SIZE, access, kind, -1, 0);
        if at == libc::MAP_FAILED {
            return 0;
        }
        // A huge page would be cleared as a whole.
        libc::madvise(at, SIZE, libc::MADV_NOHUGEPAGE);
        at as usize
    }
}

/// A place in the mapping for the thread inside.
fn give(layout: Layout) -> Option<*mut u8> {
    let base = BASE.load(Ordering::Relaxed);
    if base == 0 || !INSIDE.get() {
        return None;
    }
    let start = (base + USED.load(Ordering::Relaxed)).checked_next_multiple_of(layout.align())? - base;
    let end = start.checked_add(layout.size()).filter(|end| *end <= SIZE)?;
    USED.store(end, Ordering::Relaxed);
    LIVE.fetch_add(1, Ordering::Relaxed);
    Some((base + start) as *mut u8)
}

/// Whether a place is in the mapping. It stays where it is as long as there is such a place.
fn is_ours(at: *mut u8) -> bool {
    let base = BASE.load(Ordering::Acquire);
    base != 0 && (at as usize).wrapping_sub(base) < SIZE
}

/// The last one given out becomes longer or shorter where it is: what is built byte by byte is not copied.
fn resize(at: *mut u8, layout: Layout, size: usize) -> bool {
    let base = BASE.load(Ordering::Relaxed);
    let start = (at as usize).wrapping_sub(base);
    let is_last = INSIDE.get() && start.wrapping_add(layout.size()) == USED.load(Ordering::Relaxed);
    let end = start.checked_add(size).filter(|end| is_last && *end <= SIZE);
    end.inspect(|end| USED.store(*end, Ordering::Relaxed)).is_some()
}

// SAFETY: what is given out lies in the mapping, aligned and apart from everything else, and the mapping stays until all of
// it was given back; everything else is the system's, which also takes back what it gave.
unsafe impl GlobalAlloc for Scratch {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        give(layout).unwrap_or_else(|| unsafe { System.alloc(layout) })
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // Not always fresh: a place is used again after its neighbour became shorter.
        give(layout).map_or_else(
            // SAFETY: the caller's promise.
            || unsafe { System.alloc_zeroed(layout) },
            // SAFETY: as long as the layout says.
            |at| unsafe {
                at.write_bytes(0, layout.size());
                at
            },
        )
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if is_ours(at) {
            LIVE.fetch_sub(1, Ordering::Release);
        } else {
            // SAFETY: the system's, by the caller's promise.
            unsafe { System.dealloc(at, layout) }
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        if !is_ours(at) {
            // SAFETY: the system's, by the caller's promise.
            return unsafe { System.realloc(at, layout, size) };
        }
        if resize(at, layout, size) {
            return at;
        }
        // SAFETY: the caller's promise; both places are as long as what is copied.
        unsafe {
            let new = self.alloc(Layout::from_size_align_unchecked(size, layout.align()));
            if !new.is_null() {
                new.copy_from_nonoverlapping(at, layout.size().min(size));
                self.dealloc(at, layout);
            }
            new
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    /// There is one mapping for all tests.
    static ONE: Mutex<()> = Mutex::new(());

    fn alone(test: impl FnOnce()) {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        test();
    }

    fn at<T>(values: &[T]) -> *mut u8 {
        values.as_ptr().cast_mut().cast()
    }

    #[test]
    fn what_is_made_and_dropped_inside_leaves_no_mapping() {
        alone(|| {
            let outside = vec![1u8; 100];
            assert!(!is_ours(at(&outside)));
            let sum: u32 = within(|| {
                let inside: Vec<u32> = (0..10_000).collect();
                assert!(is_ours(at(&inside)));
                let words: Vec<String> = inside.iter().map(ToString::to_string).collect();
                words.iter().map(|w| w.len() as u32).sum()
            });
            assert_eq!(sum, 38_890);
            assert_eq!((BASE.load(Ordering::Relaxed), LIVE.load(Ordering::Relaxed)), (0, 0));
        });
    }

    #[test]
    fn what_outlives_it_stays_valid_and_the_mapping_goes_the_next_time() {
        alone(|| {
            let kept = within(|| vec![7u8; 1000]);
            assert!(is_ours(at(&kept)) && kept.iter().all(|b| *b == 7));
            let copied = std::thread::spawn(move || kept.to_vec()).join().unwrap();
            assert!(!is_ours(at(&copied)) && copied.len() == 1000);
            assert_ne!(BASE.load(Ordering::Relaxed), 0);
            within(|| ());
            assert_eq!(BASE.load(Ordering::Relaxed), 0);
        });
    }

    #[test]
    fn what_grows_at_the_end_stays_where_it_is_and_what_does_not_is_copied() {
        alone(|| {
            within(|| {
                let mut first = vec![1u8; 8];
                let place = at(&first);
                first.extend([2; 5000]);
                assert_eq!(at(&first), place);
                let mut second = vec![3u8; 8];
                first.extend([4; 20_000]);
                assert_ne!(at(&first), place);
                second.shrink_to(4);
                assert!(first[..8].iter().all(|b| *b == 1) && first[8..5008].iter().all(|b| *b == 2));
                assert!(first[5008..].iter().all(|b| *b == 4) && second == [3; 8]);
                let zeros = vec![0u64; 1000];
                assert!(zeros.iter().all(|z| *z == 0));
            });
        });
    }

    #[test]
    fn who_needs_more_than_there_is_gets_it_from_the_heap() {
        alone(|| {
            within(|| {
                let large: Vec<u8> = Vec::with_capacity(SIZE + 1);
                assert!(!is_ours(at(&large)));
            });
            assert_eq!(BASE.load(Ordering::Relaxed), 0);
        });
    }

    #[test]
    fn another_thread_does_without_meanwhile() {
        alone(|| {
            let is_inside = || {
                let one: Vec<u8> = Vec::with_capacity(10);
                is_ours(at(&one))
            };
            within(|| {
                let elsewhere = std::thread::scope(|s| s.spawn(|| within(is_inside)).join().unwrap());
                assert!(!elsewhere && is_inside());
            });
        });
    }
}
