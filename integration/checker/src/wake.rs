//! A doorbell between threads whose waits are relative.
//!
//! Not a condition variable: its timeouts are points on the monotonic clock, which means something
//! else after the process was moved to a machine that booted at another time. `poll` takes a
//! duration.
#![expect(unsafe_code, reason = "eventfd and poll")]

use std::io;
use std::os::fd::AsRawFd;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// One doorbell.
#[derive(Debug)]
pub struct Wake {
    fd: OwnedFd,
    sleeping: AtomicBool,
}

impl Wake {
    /// A doorbell nobody rang.
    ///
    /// # Errors
    /// When there is no descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: the descriptor is new and ours.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            sleeping: AtomicBool::new(false),
        })
    }

    /// Rings. Cheap when nobody sleeps.
    pub fn ring(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            let one = 1u64.to_ne_bytes();
            // SAFETY: eight bytes, as eventfd wants.
            unsafe { libc::write(self.fd.as_raw_fd(), one.as_ptr().cast(), 8) };
        }
    }

    /// Announces that the caller is about to wait; it must look for work once more after this.
    pub fn announce(&self) {
        self.sleeping.store(true, Ordering::SeqCst);
    }

    /// Waits for a ring, at most `ms` milliseconds.
    pub fn wait(&self, ms: i32) {
        if readable(self.fd.as_raw_fd(), ms).unwrap_or(false) {
            let mut n = [0u8; 8];
            // SAFETY: eight bytes, as eventfd wants.
            unsafe { libc::read(self.fd.as_raw_fd(), n.as_mut_ptr().cast(), 8) };
        }
        self.sleeping.store(false, Ordering::SeqCst);
    }
}

/// Waits until `fd` is readable, at most `ms` milliseconds. An interrupted wait counts as one that
/// found nothing.
///
/// # Errors
/// When the descriptor is bad.
pub fn readable(fd: RawFd, ms: i32) -> io::Result<bool> {
    let mut p = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    match unsafe { libc::poll(&raw mut p, 1, ms) } {
        0 => Ok(false),
        n if n > 0 => Ok(true),
        _ => match io::Error::last_os_error() {
            e if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            e => Err(e),
        },
    }
}

/// An epoll set with one descriptor in it.
#[derive(Debug)]
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Makes the set.
    ///
    /// # Errors
    /// When there is no descriptor left, or `fd` cannot be watched.
    pub fn of(fd: RawFd) -> io::Result<Self> {
        // SAFETY: no pointers involved.
        let e = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if e < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours.
        let set = unsafe { OwnedFd::from_raw_fd(e) };
        let mut ev = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 };
        // SAFETY: one valid event.
        if unsafe { libc::epoll_ctl(e, libc::EPOLL_CTL_ADD, fd, &raw mut ev) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(set))
    }

    /// Waits until the descriptor is readable, at most `ms` milliseconds.
    #[must_use]
    pub fn wait(&self, ms: i32) -> bool {
        let mut ev = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event.
        unsafe { libc::epoll_wait(self.0.as_raw_fd(), &raw mut ev, 1, ms) > 0 }
    }
}
