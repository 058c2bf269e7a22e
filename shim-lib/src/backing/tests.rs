//! Backed memory under threads that write all the time, and in comparison with memory that is not backed.
#![expect(unsafe_code, reason = "maps memory and writes to it behind the compiler's back")]

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::*;

/// The table is the process': one test at a time looks at it.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    table().returned.clear();
    guard
}

/// Private memory that is given back at the end.
struct Memory {
    at: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> Self {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping.
        let at = unsafe { libc::mmap(null_mut(), len, protection, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        Memory { at: at as usize, len }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: mapped, and accessed by atomics alone.
        unsafe { std::slice::from_raw_parts(self.at as *const AtomicU64, self.len / 8) }
    }

    fn register(&self) -> Hold {
        acquire(self.at as u64, self.len as u64, 1)
    }

    fn is_backed(&self) -> bool {
        list().iter().any(|b| b.addr as usize <= self.at && self.at + self.len <= (b.addr + b.len) as usize)
    }

    fn perms(&self) -> Vec<String> {
        maps::within(self.at, self.at + self.len).unwrap().into_iter().map(|m| m.perms).collect()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped above.
        unsafe { libc::munmap(self.at as *mut libc::c_void, self.len) };
    }
}

#[test]
fn memory_is_in_a_file_while_it_is_registered_and_private_again_after() {
    let _alone = alone();
    let memory = Memory::new(1 << 20);
    memory.words().iter().enumerate().step_by(1000).for_each(|(i, w)| w.store(i as u64, Ordering::Relaxed));
    let same = || {
        memory
            .words()
            .iter()
            .enumerate()
            .all(|(i, w)| w.load(Ordering::Relaxed) == if i % 1000 == 0 { i as u64 } else { 0 })
    };
    let hold = memory.register();
    assert!(memory.is_backed() && same());
    let file = files::path(&list()[0].file);
    assert!(std::fs::metadata(&file).is_ok());
    memory.words()[1].store(7, Ordering::Relaxed);
    release(hold);
    assert!(!memory.is_backed());
    assert_eq!(memory.words()[1].swap(0, Ordering::Relaxed), 7);
    assert!(same());
    assert!(memory.perms().iter().all(|p| p == "rw-p"), "{:?}", memory.perms());
    assert!(std::fs::metadata(&file).is_err(), "the file is gone");
}

#[test]
fn no_write_of_a_running_thread_is_lost_in_a_hundred_swaps() {
    let _alone = alone();
    const THREADS: usize = 3;
    // Longer than what is exchanged at once.
    let memory = Arc::new(Memory::new(20 << 20));
    let stop = Arc::new(AtomicBool::new(false));
    // Each thread counts up words of its own all over the range and knows what each must hold.
    let writers: Vec<_> = (0..THREADS)
        .map(|me| {
            let (memory, stop) = (memory.clone(), stop.clone());
            thread::spawn(move || {
                let words = memory.words();
                let mine: Vec<usize> = (me..words.len()).step_by(509 * THREADS).collect();
                let mut round = 0;
                while !stop.load(Ordering::Relaxed) {
                    for at in &mine {
                        let before = words[*at].load(Ordering::Relaxed);
                        assert_eq!(before, round, "word {at} lost a write");
                        words[*at].store(round + 1, Ordering::Relaxed);
                    }
                    round += 1;
                }
                round
            })
        })
        .collect();
    for _ in 0..100 {
        table().returned.clear();
        let hold = memory.register();
        assert!(memory.is_backed());
        thread::sleep(Duration::from_millis(1));
        release(hold);
        assert!(!memory.is_backed());
    }
    stop.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.join().unwrap() > 0);
    }
}

#[test]
fn system_calls_of_other_threads_write_into_it_meanwhile() {
    let _alone = alone();
    let memory = Arc::new(Memory::new(1 << 20));
    let stop = Arc::new(AtomicBool::new(false));
    let reader = {
        let (memory, stop) = (memory.clone(), stop.clone());
        thread::spawn(move || {
            let zero = std::fs::File::open("/dev/urandom").unwrap();
            while !stop.load(Ordering::Relaxed) {
                // SAFETY: into memory nobody else writes to.
                let n = unsafe {
                    libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), memory.at as *mut libc::c_void, 512 << 10)
                };
                assert_eq!(n, 512 << 10, "{}", io::Error::last_os_error());
            }
        })
    };
    for _ in 0..50 {
        table().returned.clear();
        release(memory.register());
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().unwrap();
}

#[test]
fn registrations_inside_share_one_file_and_the_last_one_gives_it_back() {
    let _alone = alone();
    let memory = Memory::new(1 << 20);
    let whole = memory.register();
    let inside = acquire(memory.at as u64 + 5000, 100, 1);
    let same = memory.register();
    assert_eq!(list().len(), 1);
    release(whole);
    release(same);
    assert!(memory.is_backed(), "one is left");
    release(inside);
    assert!(!memory.is_backed());
}

#[test]
fn a_range_that_overlaps_a_registered_one_stays_as_it_is_and_keeps_the_other_in_place() {
    let _alone = alone();
    let memory = Memory::new(2 << 20);
    let half = acquire(memory.at as u64, 1 << 20, 1);
    let across = acquire(memory.at as u64 + (512 << 10), 1 << 20, 1);
    assert!(across.loose && list().len() == 1);
    release(half);
    assert_eq!(list().len(), 1, "a NIC writes to it through the other");
    release(across);
    assert!(list().is_empty());
    let loose = acquire_as_is(memory.at as u64, 100);
    let whole = memory.register();
    assert!(whole.loose, "a NIC has the first page of it");
    release(loose);
    release(whole);
}

#[test]
fn what_is_not_plain_memory_is_left_alone() {
    let _alone = alone();
    let before = list().len();
    let refused = |memory: &Memory| {
        let perms = memory.perms();
        let hold = memory.register();
        assert!(hold.loose);
        assert_eq!(memory.perms(), perms);
        release(hold);
    };
    refused(&Memory::new(32 << 10));
    let locked = Memory::new(128 << 10);
    // SAFETY: properties of our own mappings.
    unsafe { assert_eq!(libc::mlock(locked.at as *const libc::c_void, locked.len), 0) };
    refused(&locked);
    let reading = Memory::new(128 << 10);
    // SAFETY: as above.
    unsafe { assert_eq!(libc::mprotect(reading.at as *mut libc::c_void, reading.len, libc::PROT_READ), 0) };
    refused(&reading);
    let shared = Memory::new(128 << 10);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    // SAFETY: in place of our own mapping.
    let at =
        unsafe { libc::mmap(shared.at as *mut libc::c_void, shared.len, protection, flags | libc::MAP_FIXED, -1, 0) };
    assert_eq!(at as usize, shared.at);
    refused(&shared);
    let holed = Memory::new(256 << 10);
    // SAFETY: a part of our own mapping.
    unsafe { libc::munmap((holed.at + (128 << 10)) as *mut libc::c_void, PAGE) };
    let hold = acquire(holed.at as u64, holed.len as u64, 1);
    assert!(hold.loose);
    release(hold);
    for (addr, len) in [(0, 0), (u64::MAX, 1), (0, u64::MAX), (1 << 63, 1 << 62)] {
        release(acquire(addr, len, 1));
    }
    assert_eq!(list().len(), before);
}

#[test]
fn a_stack_is_not_taken_from_its_thread() {
    let _alone = alone();
    let big = vec![1u8; 256 << 10];
    let on_stack = [2u8; 256 << 10];
    let holds = [
        acquire(on_stack.as_ptr() as u64, on_stack.len() as u64, 1),
        acquire(big.as_ptr() as u64, big.len() as u64, 1),
    ];
    assert!(holds[0].loose);
    assert!(on_stack.iter().all(|b| *b == 2) && big.iter().all(|b| *b == 1));
    holds.into_iter().for_each(release);
    assert!(big.iter().all(|b| *b == 1));
}

#[test]
fn a_range_that_comes_back_again_and_again_is_no_longer_taken() {
    let _alone = alone();
    let memory = Memory::new(128 << 10);
    let backed: Vec<bool> = (0..5)
        .map(|_| {
            let hold = memory.register();
            let backed = memory.is_backed();
            release(hold);
            backed
        })
        .collect();
    assert_eq!(backed, [true, true, true, false, false]);
}

/// Runs `look` in a child; it answers with its exit status.
fn in_child(look: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child only looks and leaves.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(look)).unwrap_or(false);
            libc::_exit(i32::from(!good));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}

#[test]
fn a_child_of_fork_has_a_copy_of_its_own() {
    let _alone = alone();
    let memory = Memory::new(1 << 20);
    memory.words()[5].store(5, Ordering::Relaxed);
    let hold = memory.register();
    memory.words()[100_000].store(6, Ordering::Relaxed);
    let good = in_child(|| {
        let words = memory.words();
        let seen = (
            words[5].load(Ordering::Relaxed),
            words[100_000].load(Ordering::Relaxed),
            words[9].load(Ordering::Relaxed),
        );
        words[5].store(99, Ordering::Relaxed);
        // A grandchild, too.
        seen == (5, 6, 0) && list().is_empty() && in_child(|| memory.words()[5].load(Ordering::Relaxed) == 99)
    });
    assert!(good);
    assert_eq!(memory.words()[5].load(Ordering::Relaxed), 5, "the child's writes are its own");
    memory.words()[6].store(1, Ordering::Relaxed);
    assert!(memory.is_backed());
    release(hold);
    assert_eq!(memory.words()[6].load(Ordering::Relaxed), 1);
}

#[test]
fn memory_that_was_kept_from_children_still_is() {
    let _alone = alone();
    let memory = Memory::new(128 << 10);
    // SAFETY: a property of our own mapping.
    unsafe { libc::madvise(memory.at as *mut libc::c_void, memory.len, libc::MADV_DONTFORK) };
    let absent = || maps::within(memory.at, memory.at + memory.len).is_ok_and(|m| m.is_empty());
    let hold = memory.register();
    assert!(memory.is_backed());
    assert!(in_child(absent));
    release(hold);
    assert!(!memory.is_backed() && in_child(absent));
}

#[test]
fn memory_that_was_unmapped_and_used_for_something_else_is_not_touched_by_the_end() {
    let _alone = alone();
    let memory = Memory::new(256 << 10);
    let hold = memory.register();
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: in place of our own mapping.
    let at =
        unsafe { libc::mmap(memory.at as *mut libc::c_void, 128 << 10, protection, flags | libc::MAP_FIXED, -1, 0) };
    assert_eq!(at as usize, memory.at);
    memory.words()[0].store(77, Ordering::Relaxed);
    assert!(list().is_empty(), "it is not whole any more");
    release(hold);
    assert_eq!(memory.words()[0].load(Ordering::Relaxed), 77);
    assert!(memory.perms().iter().all(|p| p == "rw-p"));
}

#[test]
fn memory_that_was_moved_and_made_longer_follows() {
    let _alone = alone();
    let mut memory = Memory::new(256 << 10);
    memory.words()[3].store(3, Ordering::Relaxed);
    let hold = memory.register();
    let longer = 1 << 20;
    // SAFETY: our own mapping.
    let at = unsafe { libc::mremap(memory.at as *mut libc::c_void, memory.len, longer, libc::MREMAP_MAYMOVE) };
    assert_ne!(at, libc::MAP_FAILED);
    (memory.at, memory.len) = (at as usize, longer);
    assert_eq!(memory.words()[3].load(Ordering::Relaxed), 3);
    let last = memory.words().last().unwrap();
    assert_eq!(last.swap(4, Ordering::Relaxed), 0, "there is memory behind it, zero as ever");
    release(hold);
    assert!(memory.perms().iter().all(|p| p == "rw-p"));
    assert_eq!((memory.words()[3].load(Ordering::Relaxed), last.load(Ordering::Relaxed)), (3, 4));
}

#[test]
fn advice_means_what_it_means_for_private_memory() {
    let _alone = alone();
    let memory = Memory::new(256 << 10);
    let fill = || memory.words().iter().for_each(|w| w.store(1, Ordering::Relaxed));
    let at = |offset: usize| (memory.at + offset) as *mut libc::c_void;
    let look = || {
        fill();
        // SAFETY: our own memory.
        let answers = unsafe {
            [
                advice::madvise(at(64 << 10), 64 << 10, libc::MADV_DONTNEED),
                advice::madvise(at(128 << 10), 64 << 10, libc::MADV_FREE),
                advice::madvise(at(0), 64 << 10, libc::MADV_REMOVE),
                advice::madvise(at(1), 64 << 10, libc::MADV_DONTNEED),
                advice::madvise(at(0), 64 << 10, libc::MADV_WILLNEED),
            ]
        };
        let word = |offset: usize| memory.words()[offset / 8].load(Ordering::Relaxed);
        (answers, [0, (64 << 10) - 8, 64 << 10, (128 << 10) - 8, 192 << 10].map(word))
    };
    let private = look();
    let hold = memory.register();
    assert!(memory.is_backed());
    assert_eq!(look(), private);
    assert_eq!(private.1, [1, 1, 0, 0, 1]);
    release(hold);
    assert!(memory.perms().iter().all(|p| p == "rw-p"));
    assert_eq!(memory.words()[0].load(Ordering::Relaxed), 1);
}

#[test]
fn protection_given_meanwhile_is_kept() {
    let _alone = alone();
    let memory = Memory::new(128 << 10);
    let hold = memory.register();
    // SAFETY: our own mapping.
    unsafe { assert_eq!(libc::mprotect(memory.at as *mut libc::c_void, memory.len, libc::PROT_READ), 0) };
    release(hold);
    assert!(memory.perms().iter().all(|p| p == "r--p"), "{:?}", memory.perms());
}

#[test]
fn files_of_processes_that_are_gone_are_removed() {
    let _alone = alone();
    // No process has a number beyond the kernel's limit.
    let stale = files::path("4194999.1");
    let own = files::path(&format!("{}.999999", std::process::id()));
    let foreign = files::path("1.5");
    for path in [&stale, &own, &foreign] {
        std::fs::write(path, b"x").unwrap();
    }
    files::clean(|name| name.ends_with(".999999"));
    let there: Vec<bool> = [&stale, &own, &foreign].iter().map(|p| std::fs::metadata(p).is_ok()).collect();
    assert_eq!(there, [false, true, true]);
    files::clean(|_| false);
    assert!(std::fs::metadata(&own).is_err(), "a program that ran in this process before had it");
}
