//! `madvise` on registered memory that lies in a file: it has the effect it has on private memory, where giving pages up
//! means zeros the next time. (The NIC keeps the pages it holds, as it does without us.)
//!
//! Allocators call this under their own locks. So here nothing is locked and nothing allocated, and in a process that
//! never backed anything it is the system call and one load.
#![expect(unsafe_code, reason = "replaces a function of the C library")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use libc::{c_int, c_void};

use super::{MOST, PAGE};

static ANY: AtomicBool = AtomicBool::new(false);

/// Backed ranges as start and end; both zero where there is none. Written under the table's lock.
static RANGES: [[AtomicUsize; 2]; MOST] = [const { [const { AtomicUsize::new(0) }; 2] }; MOST];

/// From now on a range is backed.
pub fn add(range: &Range<usize>) {
    if let Some([start, end]) = RANGES.iter().find(|r| r[1].load(Ordering::Relaxed) == 0) {
        start.store(range.start, Ordering::Relaxed);
        end.store(range.end, Ordering::Release);
        ANY.store(true, Ordering::Release);
    }
}

/// The range that starts there is private again.
pub fn remove(at: usize) {
    for [start, end] in RANGES.iter().filter(|r| r[0].load(Ordering::Relaxed) == at) {
        end.store(0, Ordering::Release);
        start.store(0, Ordering::Relaxed);
    }
}

/// Everything is private: a child of fork.
pub fn clear() {
    for [start, end] in &RANGES {
        end.store(0, Ordering::Relaxed);
        start.store(0, Ordering::Relaxed);
    }
    ANY.store(false, Ordering::Relaxed);
}

/// The backed parts of a range.
fn backed(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    RANGES.iter().filter_map(move |[start, end]| {
        let end = end.load(Ordering::Acquire).min(range.end);
        let start = start.load(Ordering::Relaxed).max(range.start);
        (start < end).then_some(start..end)
    })
}

/// # Safety
/// As its manual page asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    // SAFETY: the caller's promise.
    let real = || unsafe { libc::syscall(libc::SYS_madvise, addr, len, advice) as c_int };
    if !ANY.load(Ordering::Relaxed) {
        return real();
    }
    let start = addr as usize;
    let range = start..start.saturating_add(len).checked_next_multiple_of(PAGE).unwrap_or(usize::MAX);
    match advice {
        libc::MADV_DONTNEED => {
            let done = real();
            if done == 0 && start.is_multiple_of(PAGE) {
                for part in backed(range) {
                    let (protection, flags) =
                        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                    let (at, len) = (part.start as *mut c_void, part.len());
                    // SAFETY: the application gives up what is in its memory there.
                    if unsafe { libc::mmap(at, len, protection, flags | libc::MAP_FIXED, -1, 0) } == libc::MAP_FAILED {
                        return -1;
                    }
                }
            }
            done
        }
        // The kernel may take its time to give pages up: for ever, too.
        libc::MADV_FREE if backed(range.clone()).next().is_some() => 0,
        // It is for memory that is shared.
        libc::MADV_REMOVE if backed(range).next().is_some() => {
            crate::errno::set_errno(libc::EINVAL);
            -1
        }
        _ => real(),
    }
}
