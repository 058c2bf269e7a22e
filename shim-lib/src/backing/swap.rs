//! Taking private memory out from under running threads and putting a file's pages in its place, with the same content
//! at every moment; and back.
//!
//! Meanwhile a userfaultfd holds everybody who would change the memory. We are one of those: between [`Uffd::hold`] and
//! the new mapping this thread must write to nothing but its stack. So there is no allocation, no lock and no error
//! with a text in it, and signals are blocked.
//!
//! What it cannot hold are devices that were given the pages before (a direct read from a disk under way, buffers given
//! to io_uring): they go on writing to the old ones, as they do after a fork.
#![expect(unsafe_code, reason = "replaces mappings of this process")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::{null_mut, slice_from_raw_parts};

use libc::c_int;

use super::uffd::Uffd;
use super::{PAGE, files};

/// Bytes that are exchanged at once: nobody waits longer than that takes, and no more memory than that is there twice.
const AT_ONCE: usize = 8 << 20;

/// Bytes around the stack pointer that the swap may use itself.
const OWN_STACK: usize = 512 << 10;

/// A temporary mapping of ours.
struct Temporary {
    at: *mut u8,
    len: usize,
}

impl Temporary {
    fn file(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        Self::map(libc::MAP_SHARED, fd.as_raw_fd(), offset, len)
    }

    fn private(len: usize) -> io::Result<Self> {
        Self::map(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1, 0, len)
    }

    fn map(flags: c_int, fd: c_int, offset: u64, len: usize) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel has room.
        let at = unsafe { libc::mmap(null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, fd, offset as i64) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at: at.cast(), len }) }
    }

    /// Moves it, in place of what is there.
    fn move_to(&mut self, to: usize) -> bool {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: a mapping of ours; the caller owns what is at `to`.
        let moved = unsafe { libc::mremap(self.at.cast(), self.len, self.len, flags, to as *mut libc::c_void) };
        if moved == libc::MAP_FAILED {
            return false;
        }
        self.len = 0;
        true
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: mapped above, moved nowhere.
            unsafe { libc::munmap(self.at.cast(), self.len) };
        }
    }
}

/// No signal handler runs on this thread while this exists: it could touch what we hold.
struct Unsignalled(libc::sigset_t);

impl Unsignalled {
    fn begin() -> Self {
        // SAFETY: both sets are ours; blocking signals touches nothing else.
        unsafe {
            let mut all = std::mem::zeroed();
            let mut before = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
            Self(before)
        }
    }
}

impl Drop for Unsignalled {
    fn drop(&mut self) {
        // SAFETY: the set from before.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, null_mut()) };
    }
}

/// Whether this thread's own stack is in the range: then it cannot be the one that swaps it.
fn is_own_stack(start: usize, len: usize) -> bool {
    let here = 0u8;
    let at = std::ptr::from_ref(&here) as usize;
    start < at.saturating_add(OWN_STACK) && at.saturating_sub(OWN_STACK) < start + len
}

/// Replaces the private memory `[start, start + len)` by the beginning of `file`, where nothing is yet. After an error it
/// is private memory as before, or (if the kernel cannot even do that) still partly the file.
///
/// # Safety
/// The range is whole pages of plain memory of this process, and no device has been given its pages.
pub unsafe fn to_file(start: usize, len: usize, file: &File) -> io::Result<()> {
    if is_own_stack(start, len) {
        return Err(io::Error::other("it is the stack of the thread that registers it"));
    }
    let pagemap = File::open("/proc/self/pagemap")?;
    for at in (0..len).step_by(AT_ONCE) {
        let n = AT_ONCE.min(len - at);
        // A tmpfs or a memory limit that is reached must show here, not when the application writes.
        let here = files::allocate(file, at, n).and_then(|()| {
            // SAFETY: a part of the range.
            unsafe { part_to_file(start + at, n, file, at, &pagemap) }
        });
        if let Err(e) = here {
            // SAFETY: what has been replaced so far.
            return unsafe { to_private(start, at, file, 0) }.and(Err(e));
        }
    }
    Ok(())
}

/// # Safety
/// As for [`to_file`].
unsafe fn part_to_file(start: usize, len: usize, file: &File, offset: usize, pagemap: &File) -> io::Result<()> {
    let copy = Temporary::file(file.as_fd(), offset as u64, len)?;
    // In this order: on an error the memory is let go before signals are.
    let unsignalled = Unsignalled::begin();
    let uffd = Uffd::open()?;
    uffd.hold(start, len)?;
    // SAFETY: nobody changes the range any more; the copy is ours and as long.
    let done = unsafe { copy_present(start, len, copy.at, pagemap) } && {
        // SAFETY: the content is in the file; who waits goes on with the file.
        unsafe { map_file(start, len, file.as_fd(), offset as u64) || put_back(start, &copy) }
    };
    uffd.wake(start, len);
    drop(uffd);
    drop(unsignalled);
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Copies the pages that exist.
///
/// # Safety
/// Both ranges are mapped and `len` long, and nobody writes to the first.
unsafe fn copy_present(start: usize, len: usize, to: *mut u8, pagemap: &File) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const ENTRIES: usize = 512;
    let mut entries = [0u8; ENTRIES * 8];
    let pages = len / PAGE;
    let mut first = 0;
    while first < pages {
        let n = ENTRIES.min(pages - first);
        let entries = &mut entries[..n * 8];
        if pagemap.read_exact_at(entries, ((start / PAGE + first) * 8) as u64).is_err() {
            return false;
        }
        for (i, entry) in entries.chunks_exact(8).enumerate() {
            let entry =
                u64::from_ne_bytes([entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7]]);
            if entry & (PRESENT | SWAPPED) != 0 {
                let at = (first + i) * PAGE;
                // SAFETY: inside both ranges. What is not present would make us wait for ourselves: it is left out.
                unsafe { std::ptr::copy_nonoverlapping((start + at) as *const u8, to.add(at), PAGE) };
            }
        }
        first += n;
    }
    true
}

/// # Safety
/// The caller owns the range.
unsafe fn map_file(start: usize, len: usize, file: BorrowedFd<'_>, offset: u64) -> bool {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    let at = start as *mut libc::c_void;
    // SAFETY: the caller's promise.
    unsafe {
        libc::mmap(at, len, protection, flags, file.as_raw_fd(), offset as i64) != libc::MAP_FAILED
            // A child of fork that our handlers do not know of must not share it.
            && { libc::madvise(at, len, libc::MADV_DONTFORK); true }
    }
}

/// The kernel had no room for the mapping of the file and may have taken the old one away. Puts its content there again.
/// Always false.
///
/// # Safety
/// The caller owns the range of that length at `start`.
unsafe fn put_back(start: usize, copy: &Temporary) -> bool {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let at = start as *mut libc::c_void;
    // SAFETY: the caller's promise; the copy has every page.
    unsafe {
        let errno = *libc::__errno_location();
        if libc::mmap(at, copy.len, protection, flags | libc::MAP_FIXED, -1, 0) != libc::MAP_FAILED {
            std::ptr::copy_nonoverlapping(copy.at, at.cast(), copy.len);
        }
        *libc::__errno_location() = errno;
    }
    false
}

/// Replaces the file's pages from `offset` at `[start, start + len)` by private memory with their content, and gives the
/// file's pages back to the system.
///
/// # Safety
/// The range is a shared mapping of that part of `file`, and nobody else needs that part.
pub unsafe fn to_private(start: usize, len: usize, file: &File, offset: u64) -> io::Result<()> {
    if len > 0 && is_own_stack(start, len) {
        return Err(io::Error::other("it is the stack of the thread that deregisters it"));
    }
    for at in (0..len).step_by(AT_ONCE) {
        let n = AT_ONCE.min(len - at);
        // SAFETY: a part of the range.
        unsafe { part_to_private(start + at, n, file, offset + at as u64) }?;
        files::punch(file, offset + at as u64, n);
    }
    Ok(())
}

/// # Safety
/// As for [`to_private`].
unsafe fn part_to_private(start: usize, len: usize, file: &File, offset: u64) -> io::Result<()> {
    let mut memory = Temporary::private(len)?;
    // In this order: on an error the memory is let go before signals are.
    let unsignalled = Unsignalled::begin();
    let uffd = Uffd::open()?;
    uffd.hold(start, len)?;
    // SAFETY: fresh memory of ours; nobody changes the file through the range.
    let copied = unsafe { std::slice::from_raw_parts_mut(memory.at, len) };
    let mut done = file.read_exact_at(copied, offset).is_ok();
    if done && !memory.move_to(start) {
        done = false;
        // What was there may be gone already; the file still has it.
        // SAFETY: as promised by the caller.
        unsafe { map_file(start, len, file.as_fd(), offset) };
    }
    uffd.wake(start, len);
    drop(uffd);
    drop(unsignalled);
    if done { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Copies what is not zero.
///
/// # Safety
/// `to` is as long as `from`, and fresh.
unsafe fn copy_filled(from: &Temporary, to: &Temporary) {
    for at in (0..from.len).step_by(PAGE) {
        // SAFETY: inside both.
        unsafe {
            let page = from.at.add(at);
            let words = &*slice_from_raw_parts(page.cast::<u64>(), PAGE / 8);
            if words.iter().any(|w| *w != 0) {
                std::ptr::copy_nonoverlapping(page, to.at.add(at), PAGE);
            }
        }
    }
}

/// A private copy of memory that others may be writing to, as a fork makes one.
pub struct Snapshot {
    start: usize,
    copy: Temporary,
}

impl Snapshot {
    /// # Safety
    /// The range is mapped and can be read.
    pub unsafe fn take(start: usize, len: usize) -> io::Result<Self> {
        let copy = Temporary::private(len)?;
        // SAFETY: the caller's promise; the copy is as long.
        unsafe {
            let from = Temporary { at: start as *mut u8, len };
            copy_filled(&from, &copy);
            std::mem::forget(from);
        }
        Ok(Self { start, copy })
    }

    /// Puts the copy in the place of what it was taken of.
    ///
    /// # Safety
    /// This process owns the range.
    pub unsafe fn install(mut self) {
        self.copy.move_to(self.start);
    }
}
