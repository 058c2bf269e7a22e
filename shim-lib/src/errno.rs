//! The number C programs expect when something fails, as a type of its own. Not a general error type: what is said in
//! words is said by `control`.
#![expect(unsafe_code, reason = "errno is a thread-local of libc")]

use std::fmt;

/// An `errno` value; never zero.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

impl Errno {
    /// The calling thread's `errno`; `EIO` if a failing call left it zero.
    pub fn last() -> Self {
        // SAFETY: the location is valid for the life of the thread.
        match unsafe { *libc::__errno_location() } {
            0 => Self(libc::EIO),
            e => Self(e),
        }
    }

    /// Makes this the calling thread's `errno`.
    pub fn set(self) {
        set_errno(self.0);
    }

    /// What a verb answered that returns 0 or an errno value; some answer -1 and set `errno`.
    pub fn check(answer: i32) -> Result<(), Self> {
        match answer {
            0 => Ok(()),
            e if e > 0 => Err(Self(e)),
            _ => Err(Self::last()),
        }
    }

    /// The other way round, for a verb of ours that returns 0 or an errno value.
    pub fn answer(result: Result<(), Self>) -> i32 {
        match result {
            Ok(()) => 0,
            Err(e) => {
                e.set();
                e.0
            }
        }
    }
}

/// Sets `errno`, zero included.
pub fn set_errno(value: i32) {
    // SAFETY: the location is valid for the life of the thread.
    unsafe { *libc::__errno_location() = value };
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&std::io::Error::from_raw_os_error(self.0), f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {self})", self.0)
    }
}

impl std::error::Error for Errno {}
