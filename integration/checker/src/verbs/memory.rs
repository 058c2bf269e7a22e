//! Memory the device reads and writes, and its registration.
#![expect(unsafe_code, reason = "maps memory and calls libibverbs")]

use super::{Pd, check, last};
use crate::pattern::mix;
use rdma_sys as ib;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// Anonymous private memory, zeroed. Never freed before the process ends: the device may hold it.
///
/// No reference to its bytes is ever handed out, since the device changes them behind the
/// compiler's back; content is copied in and out.
#[derive(Debug)]
pub struct Memory {
    start: *mut u8,
    len: usize,
}

// SAFETY: access is by copy; who owns which part when is decided by the protocol above.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes whose start is `skew` bytes into a page.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn map(len: usize, skew: usize) -> io::Result<Self> {
        // SAFETY: an anonymous mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len + skew,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(last("mmap"));
        }
        Ok(Self {
            // SAFETY: within the mapping.
            start: unsafe { p.cast::<u8>().add(skew) },
            len,
        })
    }

    /// Maps `len` bytes and fills them.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn filled(len: usize) -> io::Result<Self> {
        let memory = Self::map(len, 0)?;
        memory.fill();
        Ok(memory)
    }

    /// Gives every whole word a value that says where it is.
    pub fn fill(&self) {
        (0..self.len / 8).for_each(|i| self.touch(i * 8, 0));
    }

    /// The `len` bytes at `at`, under another name.
    ///
    /// # Panics
    /// When they are not all inside.
    #[must_use]
    pub fn part(&self, at: usize, len: usize) -> Self {
        assert!(at + len <= self.len, "part outside of the memory");
        // SAFETY: within the mapping.
        Self { start: unsafe { self.start.add(at) }, len }
    }

    /// Writes the word at `at` for that time; [`Memory::fill`] does it for time 0.
    ///
    /// # Panics
    /// When it is outside or not aligned.
    pub fn touch(&self, at: usize, time: u64) {
        self.word(at).store(mix(at as u64 ^ time << 40), Ordering::Relaxed);
    }

    /// First byte of filled memory whose word is not what it was when it was last touched; `time` says when that was.
    #[must_use]
    pub fn first_unlike(&self, time: impl Fn(usize) -> u64) -> Option<usize> {
        (0..self.len / 8).map(|i| i * 8).find(|at| self.load(*at) != mix(*at as u64 ^ time(*at) << 40))
    }

    /// Address of a byte, as the device is told.
    ///
    /// # Panics
    /// When it is outside.
    #[must_use]
    pub fn addr(&self, at: usize) -> u64 {
        assert!(at <= self.len, "offset {at} outside of {}", self.len);
        self.start as u64 + at as u64
    }

    /// Bytes mapped.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is mapped.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Copies `data` in.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn write(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.len, "write outside of the memory");
        // SAFETY: checked above; the source is no part of this memory, no reference to which exists.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.start.add(at), data.len()) }
    }

    /// Copies out into `data`.
    ///
    /// # Panics
    /// When it asks for more than there is.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        assert!(at + data.len() <= self.len, "read outside of the memory");
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.start.add(at), data.as_mut_ptr(), data.len()) }
    }

    /// Sets bytes to one value.
    ///
    /// # Panics
    /// When it reaches outside.
    pub fn set(&self, at: usize, len: usize, value: u8) {
        assert!(at + len <= self.len, "write outside of the memory");
        // SAFETY: as for `write`.
        unsafe { std::ptr::write_bytes(self.start.add(at), value, len) }
    }

    /// A word the device may change at any time.
    ///
    /// # Panics
    /// When it is outside or not aligned.
    #[must_use]
    pub fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= self.len, "word outside of the memory");
        let p = self.addr(at) as *mut u64;
        assert!(p.is_aligned(), "word not aligned");
        // SAFETY: inside, aligned, and only used as an atomic while the mapping lives, i.e. for ever.
        unsafe { AtomicU64::from_ptr(p) }
    }

    /// Value of a word now.
    #[must_use]
    pub fn load(&self, at: usize) -> u64 {
        self.word(at).load(Ordering::Acquire)
    }
}

/// A registered memory region.
#[derive(Clone, Copy, Debug)]
pub struct Mr {
    ptr: *mut ib::ibv_mr,
}

// SAFETY: libibverbs objects may be used from any thread.
unsafe impl Send for Mr {}
// SAFETY: as above.
unsafe impl Sync for Mr {}

/// The fields of a region an application reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MrFields {
    /// Local key.
    pub lkey: u32,
    /// Remote key.
    pub rkey: u32,
    /// Start.
    pub addr: u64,
    /// Bytes.
    pub len: usize,
}

impl Mr {
    /// Registers all of `memory`; remote access includes WRITE, READ and atomics.
    ///
    /// # Errors
    /// As the library says.
    pub fn register(pd: &Pd, memory: &Memory, remote: bool, by_iova: bool) -> io::Result<Self> {
        use ib::ibv_access_flags as a;
        let mut access = a::IBV_ACCESS_LOCAL_WRITE.0;
        if remote {
            access |= a::IBV_ACCESS_REMOTE_WRITE.0 | a::IBV_ACCESS_REMOTE_READ.0 | a::IBV_ACCESS_REMOTE_ATOMIC.0;
        }
        let start = memory.start.cast();
        // The header's macro calls one or the other, depending on the flags at the call site.
        let ptr = if by_iova {
            // SAFETY: the memory is mapped for ever and the domain is alive.
            unsafe { ib::ibv_reg_mr_iova2(pd.ptr, start, memory.len, memory.addr(0), access) }
        } else {
            // SAFETY: as above; access flags are small positive numbers.
            unsafe { ib::ibv_reg_mr(pd.ptr, start, memory.len, access.cast_signed()) }
        };
        if ptr.is_null() {
            return Err(last("ibv_reg_mr"));
        }
        Ok(Self { ptr })
    }

    /// Its public fields, read anew.
    #[must_use]
    pub fn fields(&self) -> MrFields {
        // SAFETY: the region is alive until `dereg`.
        let m = unsafe { &*self.ptr };
        MrFields { lkey: m.lkey, rkey: m.rkey, addr: m.addr as u64, len: m.length }
    }

    /// Ends the registration.
    ///
    /// # Errors
    /// As the library says.
    pub fn dereg(self) -> io::Result<()> {
        // SAFETY: the caller does this once per region.
        check("ibv_dereg_mr", unsafe { ib::ibv_dereg_mr(self.ptr) })
    }
}
