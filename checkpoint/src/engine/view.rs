//! A file that a container can write, mapped so that it can be looked at without being copied first.
//!
//! Whoever cuts a file short kills all who look at what is no longer there (SIGBUS). A container must not have that power
//! over the agent: here what is missing reads as zeros, and [`View::look`] says so.
//!
//! What is looked at may change at any moment. Nothing may be concluded from looking twice; who needs that makes a copy.
#![expect(unsafe_code, reason = "maps files, and stays alive when one is cut short")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize, compiler_fence};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// Bytes.
const PAGE: usize = 4096;

/// A file as it is, from its first byte on.
#[derive(Debug)]
pub(crate) struct View {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is nobody else's, it is only read, and it is not bound to the thread that made it.
unsafe impl Send for View {}
// SAFETY: as above; what a fault changes is the kernel's page table.
unsafe impl Sync for View {}

/// It was cut short while somebody looked: what is missing was seen as zeros. The view shows them from now on, whatever
/// becomes of the file, and is to be thrown away.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Torn;

/// What a thread is looking at, for the handler, which runs in that thread: between two instructions of it, which is what
/// the fences are for. `to` is 0 while it looks at nothing.
struct Look {
    from: AtomicUsize,
    to: AtomicUsize,
    torn: AtomicBool,
}

thread_local! {
    /// Without a destructor or a first use: a signal handler may read it.
    static LOOK: Look =
        const { Look { from: AtomicUsize::new(0), to: AtomicUsize::new(0), torn: AtomicBool::new(false) } };
}

impl Look {
    /// Shows the handler what is looked at from now on.
    fn begin(&self, seen: &[u8]) {
        // One look inside another would not be noticed.
        assert_eq!(self.to.load(Relaxed), 0, "a thread looks at one view at a time");
        let from = seen.as_ptr() as usize;
        self.torn.store(false, Relaxed);
        self.from.store(from, Relaxed);
        self.to.store(from + seen.len(), Relaxed);
        compiler_fence(SeqCst);
    }

    fn end(&self) {
        compiler_fence(SeqCst);
        self.to.store(0, Relaxed);
    }

    fn holds(&self, at: usize) -> bool {
        (self.from.load(Relaxed)..self.to.load(Relaxed)).contains(&at)
    }
}

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

impl View {
    /// Of `len` bytes, in whole pages. An empty file has nothing to show.
    pub(crate) fn of(file: &File, len: u64) -> io::Result<View> {
        let len = usize::try_from(len).unwrap_or(usize::MAX).checked_next_multiple_of(PAGE).and_then(NonZeroUsize::new);
        let len = len.ok_or(io::ErrorKind::InvalidInput)?;
        guard()?;
        // SAFETY: a mapping at a place of the kernel's choice touches no memory that is in use.
        let at = unsafe { mmap(None, len, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(View { at: at.cast(), len: len.get() })
    }

    /// Lets `look` see these bytes, as far as the view goes. Those of a hole had better not be looked at: the file gets
    /// memory for them.
    pub(crate) fn look<T>(&self, bytes: Range<usize>, look: impl FnOnce(&[u8]) -> T) -> (T, Result<(), Torn>) {
        let end = bytes.end.min(self.len);
        let start = bytes.start.min(end);
        // SAFETY: the range lies in the mapping, which lives as long as `self`, and every byte of it can be read: where
        // the file has none any more, the handler puts a page of zeros. Others may write meanwhile, which is the point of
        // a view; a reader that looks once at each byte sees some value of it.
        let seen = unsafe { std::slice::from_raw_parts(self.at.as_ptr().add(start), end - start) };
        LOOK.with(|l| l.begin(seen));
        let ends = Ends;
        let said = look(seen);
        drop(ends);
        (said, if LOOK.with(|l| l.torn.load(Relaxed)) { Err(Torn) } else { Ok(()) })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and whoever looked at it borrowed `self`.
        let _ = unsafe { munmap(self.at.cast(), self.len) };
    }
}

/// Also after a panic.
struct Ends;

impl Drop for Ends {
    fn drop(&mut self) {
        LOOK.with(Look::end);
    }
}

/// From now on [`handler`] is asked first.
fn guard() -> io::Result<()> {
    static ASKED: OnceLock<Result<(), i32>> = OnceLock::new();
    let asked = ASKED.get_or_init(|| {
        // SAFETY: both structures are plain data for which zeros are a value; the handler does only what a handler may.
        unsafe {
            let mut before: libc::sigaction = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, ptr::null(), &mut before) != 0 {
                return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
            }
            let _ = BEFORE.set(before);
            let mut ours: libc::sigaction = std::mem::zeroed();
            ours.sa_sigaction = handler as *const () as usize;
            ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigemptyset(&mut ours.sa_mask);
            match libc::sigaction(libc::SIGBUS, &ours, ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
            }
        }
    });
    asked.map_err(io::Error::from_raw_os_error)
}

/// Puts a page of zeros where the thread looks and there is nothing. Any other SIGBUS is left to who was here before: the
/// instruction is tried again, and now it is theirs.
extern "C" fn handler(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel hands over a valid structure. mmap, sigaction and errno are all that is used, and all of them
    // are system calls or plain memory. The page is replaced in a mapping that is being looked at, hence alive.
    unsafe {
        let errno = *libc::__errno_location();
        let at = (*info).si_addr() as usize;
        let page = at & !(PAGE - 1);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let ours = LOOK.with(|look| look.holds(at))
            && libc::mmap(page as *mut libc::c_void, PAGE, libc::PROT_READ, flags, -1, 0) != libc::MAP_FAILED;
        if ours {
            LOOK.with(|look| look.torn.store(true, Relaxed));
        } else if let Some(before) = BEFORE.get() {
            libc::sigaction(libc::SIGBUS, before, ptr::null_mut());
        }
        *libc::__errno_location() = errno;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    fn file(pages: usize) -> File {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![7; pages * PAGE], 0).unwrap();
        file
    }

    #[test]
    fn what_is_written_later_is_seen() {
        let file = file(2);
        let view = View::of(&file, 2 * PAGE as u64).unwrap();
        file.write_all_at(&[9], 5).unwrap();
        assert_eq!(view.look(5..7, <[u8]>::to_vec), (vec![9, 7], Ok(())));
        assert_eq!(view.look(PAGE..9 * PAGE, <[u8]>::len), (PAGE, Ok(())), "it goes no further than the file");
        assert!(View::of(&file, 0).is_err());
    }

    #[test]
    fn a_file_that_is_cut_short_reads_as_zeros_and_is_told() {
        let file = file(4);
        let view = View::of(&file, 4 * PAGE as u64).unwrap();
        let sum = |bytes: &[u8]| bytes.iter().map(|b| u64::from(*b)).sum::<u64>();
        assert_eq!(view.look(0..4 * PAGE, sum), (7 * 4 * PAGE as u64, Ok(())));
        file.set_len(PAGE as u64).unwrap();
        assert_eq!(view.look(0..4 * PAGE, sum), (7 * PAGE as u64, Err(Torn)));
        assert_eq!(view.look(0..PAGE, sum), (7 * PAGE as u64, Ok(())), "and what is there is not");
    }

    #[test]
    fn any_other_fault_ends_the_process_as_it_would_have() {
        // In a process of its own, which is this test again.
        const CHILD: &str = "MIGRRDMA_TEST_FAULT";
        if let Some(path) = std::env::var_os(CHILD) {
            let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
            let (mine, other) = (View::of(&file, PAGE as u64).unwrap(), View::of(&file, PAGE as u64).unwrap());
            file.set_len(0).unwrap();
            let _ = mine.look(0..1, |_| {
                // SAFETY: there is nothing to read any more, which is what is tried out.
                unsafe { other.at.as_ptr().read_volatile() }
            });
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; PAGE]).unwrap();
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "engine::view::tests::any_other_fault_ends_the_process_as_it_would_have"])
            .env(CHILD, &path)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .unwrap();
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(status.signal(), Some(libc::SIGBUS));
    }
}
