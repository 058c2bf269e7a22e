//! Standing between a terminal (or pipes) and a container's process: signals
//! are handed on, a terminal is pumped, and the process' end becomes our exit
//! status.

use std::io::{IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socketpair};
use nix::sys::termios::{self, SetArg, Termios};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::cgroup::send_signal;

nix::ioctl_read_bad!(get_window, libc::TIOCGWINSZ, libc::winsize);
nix::ioctl_write_ptr_bad!(set_window, libc::TIOCSWINSZ, libc::winsize);

/// A pair of sockets over which a container's init hands its terminal to us.
pub fn console_pair() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Takes the terminal's master side out of the socket.
#[expect(unsafe_code, reason = "a received descriptor needs an owner")]
pub fn receive_console(socket: &OwnedFd) -> Result<OwnedFd> {
    let mut buf = [0u8; 4096];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut iov = [std::io::IoSliceMut::new(&mut buf)];
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    for cmsg in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = cmsg
            && let Some(fd) = fds.first()
        {
            // SAFETY: the kernel just made this descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(*fd) });
        }
    }
    anyhow::bail!("the container's process sent no terminal")
}

/// Signals as readable events. From here on they no longer end this process.
pub fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::all();
    // Faults are ours alone.
    for own in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGILL, Signal::SIGFPE, Signal::SIGABRT, Signal::SIGTRAP] {
        set.remove(own);
    }
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&set), None)?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

/// Waits for `pid` (a child), handing signals on, and returns the exit status
/// a shell would give it.
pub fn wait(pid: i32, signals: &SignalFd, console: Option<OwnedFd>) -> Result<i32> {
    let raw = RawTerminal::enter(console.is_some());
    if let Some(master) = &console {
        copy_window(master);
    }
    let status = pump(pid, signals, console.as_ref());
    drop(raw);
    status
}

fn pump(pid: i32, signals: &SignalFd, console: Option<&OwnedFd>) -> Result<i32> {
    let stdin = std::io::stdin();
    let mut stdin_open = console.is_some();
    let mut console_open = console.is_some();
    let mut ended = reap(pid)?;
    loop {
        if let Some(status) = ended {
            // What was written before the end is still in the terminal.
            while console_open && console.is_some_and(|master| copy_out(master, 50)) {}
            return Ok(status);
        }
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        if let (Some(master), true) = (console, console_open) {
            fds.push(PollFd::new(master.as_fd(), PollFlags::POLLIN));
            if stdin_open {
                fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return Err(err).context("waiting for the container"),
        }
        let ready = |n: usize, fds: &[PollFd]| fds.get(n).and_then(PollFd::revents).is_some_and(|r| !r.is_empty());
        let (from_container, from_user) = (ready(1, &fds), ready(2, &fds));
        drop(fds);
        if let (Some(master), true) = (console, from_container) {
            console_open = copy_out(master, 0);
        }
        if let (Some(master), true) = (console, from_user) {
            stdin_open = copy_in(master);
        }
        while let Some(info) = signals.read_signal()? {
            let signal = info.ssi_signo as i32;
            match Signal::try_from(signal) {
                Ok(Signal::SIGCHLD) => ended = ended.or(reap(pid)?),
                Ok(Signal::SIGWINCH) if console.is_some() => {
                    console.into_iter().for_each(copy_window);
                }
                // A reader that went away and Go's preemption signal are ours.
                Ok(Signal::SIGPIPE | Signal::SIGURG) => {}
                _ => {
                    let _ = send_signal(pid, signal);
                }
            }
        }
    }
}

/// Reaps every child that ended; the status of `pid` if it was among them.
fn reap(pid: i32) -> Result<Option<i32>> {
    let mut found = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(found),
            Ok(WaitStatus::Exited(who, code)) if who == Pid::from_raw(pid) => found = Some(code),
            Ok(WaitStatus::Signaled(who, signal, _)) if who == Pid::from_raw(pid) => {
                found = Some(128 + signal as i32);
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return Err(err).context("waiting for the container's process"),
        }
    }
}

/// Container to user. False when the terminal has closed.
fn copy_out(master: &OwnedFd, wait_ms: u16) -> bool {
    let mut fds = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
    if !matches!(poll(&mut fds, wait_ms), Ok(n) if n > 0) {
        return wait_ms == 0;
    }
    let mut buf = [0u8; 8192];
    match nix::unistd::read(master, &mut buf) {
        Ok(0) | Err(_) => false,
        Ok(n) => {
            let mut out = std::io::stdout();
            out.write_all(&buf[..n]).and_then(|()| out.flush()).is_ok()
        }
    }
}

/// User to container. False when there is no more input.
fn copy_in(master: &OwnedFd) -> bool {
    let mut buf = [0u8; 8192];
    match std::io::stdin().read(&mut buf) {
        Ok(0) | Err(_) => false,
        Ok(n) => {
            let mut rest = &buf[..n];
            while !rest.is_empty() {
                match nix::unistd::write(master, rest) {
                    Ok(n) => rest = &rest[n..],
                    Err(Errno::EINTR | Errno::EAGAIN) => {}
                    Err(_) => return false,
                }
            }
            true
        }
    }
}

#[expect(unsafe_code, reason = "window sizes have no safe interface")]
fn copy_window(master: &OwnedFd) {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        return;
    }
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: both calls get a live descriptor and a whole winsize.
    unsafe {
        if get_window(stdin.as_raw_fd(), &mut size).is_ok() {
            let _ = set_window(master.as_raw_fd(), &size);
        }
    }
}

/// The user's terminal in raw mode for as long as this lives.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter(wanted: bool) -> Self {
        let stdin = std::io::stdin();
        if !wanted || !stdin.is_terminal() {
            return RawTerminal(None);
        }
        let fd: BorrowedFd = stdin.as_fd();
        let Ok(before) = termios::tcgetattr(fd) else {
            return RawTerminal(None);
        };
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        let _ = termios::tcsetattr(fd, SetArg::TCSADRAIN, &raw);
        RawTerminal(Some(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, before);
        }
    }
}
