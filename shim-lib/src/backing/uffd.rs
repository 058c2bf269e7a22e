//! A userfaultfd on a range of our own memory: whoever writes there, or touches a page that is not there yet, waits in
//! the kernel until we let go. Only what the swap needs of it.
//!
//! Faults that system calls of other threads take must wait too, not fail: that needs `/dev/userfaultfd` (granted by the
//! container's runtime) or a privileged process.
#![expect(unsafe_code, reason = "ioctls with structures of the kernel")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong};

const DEVICE: &str = "/dev/userfaultfd";

const API: u64 = 0xaa;
/// Write protection and missing pages, of private and of shared memory. Kernel 5.19 has them all.
const FEATURES: u64 = 1 << 0 | 1 << 5 | 1 << 12;
const MODE_MISSING: u64 = 1 << 0;
const MODE_WP: u64 = 1 << 1;

const fn ioc(direction: c_ulong, number: c_ulong, size: usize) -> c_ulong {
    direction << 30 | (size as c_ulong) << 16 | (API as c_ulong) << 8 | number
}

const IOC_NEW: c_ulong = ioc(0, 0, 0);
const IOC_API: c_ulong = ioc(3, 0x3f, size_of::<UffdioApi>());
const IOC_REGISTER: c_ulong = ioc(3, 0, size_of::<UffdioRegister>());
const IOC_WAKE: c_ulong = ioc(2, 2, size_of::<Range>());
const IOC_PROTECT: c_ulong = ioc(3, 6, size_of::<UffdioProtect>());

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct UffdioRegister {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdioProtect {
    range: Range,
    mode: u64,
}

/// Closing it lets everybody go on.
pub struct Uffd(OwnedFd);

impl Uffd {
    pub fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let number = match OpenOptions::new().read(true).write(true).open(DEVICE) {
            // SAFETY: makes a descriptor; touches no memory.
            Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW, flags) },
            // SAFETY: as above. Refused unless the process may handle faults of the kernel.
            Err(_) => unsafe { libc::syscall(libc::SYS_userfaultfd, flags) as c_int },
        };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made it for us.
        let uffd = Self(unsafe { OwnedFd::from_raw_fd(number) });
        let mut api = UffdioApi { api: API, features: FEATURES, ioctls: 0 };
        uffd.ioctl(IOC_API, &raw mut api)?;
        Ok(uffd)
    }

    /// From its return on nobody changes the range: neither what is there, nor by making there be more. Writes nothing
    /// but the caller's stack.
    pub fn hold(&self, start: usize, len: usize) -> io::Result<()> {
        let range = Range { start: start as u64, len: len as u64 };
        let mut register = UffdioRegister { range, mode: MODE_MISSING | MODE_WP, ioctls: 0 };
        self.ioctl(IOC_REGISTER, &raw mut register)?;
        let mut protect = UffdioProtect { range, mode: 1 };
        loop {
            match self.ioctl(IOC_PROTECT, &raw mut protect) {
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {}
                other => return other,
            }
        }
    }

    /// Lets those who wait look again, after something else was mapped there.
    pub fn wake(&self, start: usize, len: usize) {
        let mut range = Range { start: start as u64, len: len as u64 };
        // It cannot fail for a range of pages; closing the descriptor would wake them as well.
        let _ = self.ioctl(IOC_WAKE, &raw mut range);
    }

    fn ioctl<T>(&self, request: c_ulong, argument: *mut T) -> io::Result<()> {
        // SAFETY: `argument` is the structure this request takes.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_have_the_numbers_of_linux_userfaultfd_h() {
        assert_eq!(
            [IOC_NEW, IOC_API, IOC_REGISTER, IOC_WAKE, IOC_PROTECT],
            [0xaa00, 0xc018_aa3f, 0xc020_aa00, 0x8010_aa02, 0xc018_aa06]
        );
    }
}
