//! Starting a program with exactly the descriptors it should have.
//!
//! Not `std::process::Command`: CRIU wants its socket on fd 3 and inherited
//! descriptors on the numbers named in the request, and `Command` keeps a
//! private pipe somewhere among those numbers.

#![expect(unsafe_code, reason = "fork, descriptor placement and exec have no safe interface")]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

/// Descriptors handed to a child live here until they are moved into place,
/// so that moving one never overwrites another.
const PARKING: RawFd = 200;

/// A started child. Not reaped on drop: the owner waits for it.
#[derive(Debug)]
pub(super) struct Child {
    pid: Pid,
    status: Option<WaitStatus>,
}

impl Child {
    /// Forks and executes `path`; `fds[i]` becomes descriptor `i` of the child,
    /// everything else is closed by close-on-exec as far as it is marked so.
    pub(super) fn start(path: &CString, argv: &[CString], env: &[CString], fds: &[RawFd]) -> io::Result<Child> {
        let parked = fds.iter().map(|fd| park(*fd)).collect::<io::Result<Vec<OwnedFd>>>()?;
        let places: Vec<(RawFd, RawFd)> =
            parked.iter().enumerate().map(|(to, from)| (from.as_raw_fd(), to as RawFd)).collect();
        let mut argv: Vec<*const libc::c_char> = argv.iter().map(|a| a.as_ptr()).collect();
        argv.push(std::ptr::null());
        let mut envp: Vec<*const libc::c_char> = env.iter().map(|e| e.as_ptr()).collect();
        envp.push(std::ptr::null());
        let (report_read, low) = pipe2(OFlag::O_CLOEXEC)?;
        let report_write = park(low.as_raw_fd())?;
        drop(low);

        // SAFETY: between fork and exec the child calls only async-signal-safe
        // functions on memory prepared above; it never returns from this block.
        match unsafe { fork() }? {
            ForkResult::Child => {
                // SAFETY: as above; every pointer outlives the call, the arrays
                // end in null, and the process ends here whatever happens.
                unsafe {
                    let mut empty: libc::sigset_t = std::mem::zeroed();
                    libc::sigemptyset(&mut empty);
                    libc::sigprocmask(libc::SIG_SETMASK, &empty, std::ptr::null_mut());
                    // The Rust runtime ignores SIGPIPE, and exec would hand that on.
                    libc::signal(libc::SIGPIPE, libc::SIG_DFL);
                    for (from, to) in &places {
                        if libc::dup2(*from, *to) < 0 {
                            fail(report_write.as_raw_fd());
                        }
                    }
                    libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr());
                    fail(report_write.as_raw_fd());
                }
            }
            ForkResult::Parent { child } => {
                drop(report_write);
                let mut child = Child { pid: child, status: None };
                let mut errno = [0u8; 4];
                match read_full(&report_read, &mut errno)? {
                    0 => Ok(child),
                    4 => {
                        child.wait()?;
                        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(errno)))
                    }
                    _ => Err(io::Error::other("short report from the forked child")),
                }
            }
        }
    }

    /// Pid of the child.
    pub(super) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits until the child has ended. Only ever this pid is reaped.
    pub(super) fn wait(&mut self) -> io::Result<WaitStatus> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        loop {
            match waitpid(self.pid, None) {
                Ok(status) => {
                    self.status = Some(status);
                    return Ok(status);
                }
                Err(nix::errno::Errno::EINTR) => {}
                Err(err) => return Err(err.into()),
            }
        }
    }

    /// Whether the child has ended; reaps it if so.
    pub(super) fn ended(&mut self) -> io::Result<bool> {
        if self.status.is_some() {
            return Ok(true);
        }
        match waitpid(self.pid, Some(WaitPidFlag::WNOHANG))? {
            WaitStatus::StillAlive => Ok(false),
            status => {
                self.status = Some(status);
                Ok(true)
            }
        }
    }

    /// Kills the child if it still runs, and reaps it.
    pub(super) fn kill(&mut self) {
        if self.status.is_none() {
            let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
            let _ = self.wait();
        }
    }
}

/// Tells the parent errno through the pipe and ends the forked child.
///
/// # Safety
/// Only for the forked child: it does not return.
unsafe fn fail(report: RawFd) -> ! {
    // SAFETY: plain system calls on a local value.
    unsafe {
        let errno = (*libc::__errno_location()).to_ne_bytes();
        libc::write(report, errno.as_ptr().cast(), errno.len());
        libc::_exit(127)
    }
}

fn park(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the borrow lasts for the one call; a bad number yields EBADF.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
    let parked = fcntl(borrowed, FcntlArg::F_DUPFD_CLOEXEC(PARKING))?;
    // SAFETY: fcntl just made this descriptor; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(parked) })
}

fn read_full(fd: &OwnedFd, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match nix::unistd::read(fd, &mut buf[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(nix::errno::Errno::EINTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
    Ok(done)
}
