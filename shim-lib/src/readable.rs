//! What can be read from a descriptor at once: whether there is something, and taking it without waiting for more.
#![expect(unsafe_code, reason = "descriptors by number, as applications know them")]

use std::io;
use std::os::fd::RawFd;

/// Whether something is there to be read.
pub fn is_readable(fd: RawFd) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd of ours; asks without waiting.
    unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents & libc::POLLIN != 0 }
}

/// Whether who reads it waits until there is something.
pub fn blocks(fd: RawFd) -> bool {
    status(fd).is_ok_and(|flags| flags & libc::O_NONBLOCK == 0)
}

fn status(fd: RawFd) -> io::Result<i32> {
    // SAFETY: asks for flags; any number may be asked about.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    if flags < 0 { Err(io::Error::last_os_error()) } else { Ok(flags) }
}

fn set_status(fd: RawFd, flags: i32) -> io::Result<()> {
    // SAFETY: flags the open file has had, or O_NONBLOCK.
    if unsafe { libc::fcntl(fd, libc::F_SETFL, flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `PTHREAD_CANCEL_DISABLE`.
const CANCEL_DISABLE: libc::c_int = 1;

unsafe extern "C" {
    fn pthread_setcancelstate(state: libc::c_int, before: *mut libc::c_int) -> libc::c_int;
}

/// As long as this lives its thread is not cancelled: `poll` and `read` are places where a thread may be, and an
/// application's thread that is cancelled in a verb of ours where it cannot be in the library's would end the process.
#[derive(Debug)]
#[must_use]
pub struct Uncancelled {
    before: libc::c_int,
    /// Not for another thread.
    _here: std::marker::PhantomData<*const ()>,
}

impl Uncancelled {
    pub fn new() -> Self {
        let mut before = 0;
        // SAFETY: a number of ours; cannot fail with this state.
        unsafe { pthread_setcancelstate(CANCEL_DISABLE, &raw mut before) };
        Self { before, _here: std::marker::PhantomData }
    }
}

impl Drop for Uncancelled {
    fn drop(&mut self) {
        // SAFETY: what it was.
        unsafe { pthread_setcancelstate(self.before, std::ptr::null_mut()) };
    }
}

/// As long as this lives nobody waits who reads from the descriptor. The open file has one such flag for all its users:
/// who would wait gets EAGAIN meanwhile, and has to ask again.
#[derive(Debug)]
#[must_use]
pub struct Impatience {
    fd: RawFd,
    /// What the flags were, if they had to be changed.
    before: Option<i32>,
}

impl Impatience {
    pub fn with(fd: RawFd) -> io::Result<Self> {
        let flags = status(fd)?;
        if flags & libc::O_NONBLOCK != 0 {
            return Ok(Self { fd, before: None });
        }
        set_status(fd, flags | libc::O_NONBLOCK)?;
        Ok(Self { fd, before: Some(flags) })
    }
}

impl Drop for Impatience {
    fn drop(&mut self) {
        if let Some(flags) = self.before {
            let _ = set_status(self.fd, flags);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;

    #[test]
    fn a_thread_can_be_cancelled_again_afterwards() {
        let state = || {
            let mut now = -1;
            // SAFETY: a number of ours; the state is put back at once.
            unsafe {
                pthread_setcancelstate(CANCEL_DISABLE, &raw mut now);
                pthread_setcancelstate(now, std::ptr::null_mut());
            }
            now
        };
        let before = state();
        let guard = Uncancelled::new();
        assert_eq!(state(), CANCEL_DISABLE);
        drop(guard);
        assert_eq!(state(), before);
    }

    #[test]
    fn nobody_waits_for_a_moment_and_everybody_as_before_then() {
        let (mut file, mut far) = std::io::pipe().unwrap();
        let fd = file.as_raw_fd();
        assert!(blocks(fd) && !is_readable(fd));
        {
            let _moment = Impatience::with(fd).unwrap();
            assert!(!blocks(fd));
            assert_eq!(file.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            // One in another: the inner one leaves the flag to the outer one.
            drop(Impatience::with(fd).unwrap());
            assert!(!blocks(fd));
        }
        assert!(blocks(fd));
        far.write_all(&[1]).unwrap();
        assert!(is_readable(fd));
        assert!(Impatience::with(-1).is_err());
    }
}
