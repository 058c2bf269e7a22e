//! Frames on a unix socket: magic, length, postcard. Every read and write has a deadline; a frame is bounded before
//! memory is taken for it.
//!
//! The socket's fd sits high, and before every use it is looked at: applications close fds they do not know, and the
//! number may by now be one of theirs. What the messages mean is not here.
#![expect(unsafe_code, reason = "sockets by number, because they may be taken from us")]

use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use rdma_virt::id::Vpid;
use rdma_virt::msg::{Hello, MAGIC, MAX_FRAME, Role, VERSION};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Where the agent of the host is found, inside a container as outside.
pub const SOCKET: &str = "/run/.migrrdma/agent.sock";

/// fds below this are left to the application, if its limit allows.
const HIGH: RawFd = 1000;

/// Longest time for the rest of a frame whose beginning is there, and for writing one.
const FRAME_TIME: Duration = Duration::from_secs(30);

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("cannot {0} the agent's socket {SOCKET}")]
    Os(&'static str, #[source] std::io::Error),
    #[error("the agent closed the connection")]
    Closed,
    #[error("the application closed the fd of the agent's connection")]
    Taken,
    #[error("no answer of the agent in time ({0})")]
    Late(&'static str),
    #[error("the agent sent something that is not a frame of version {VERSION}: {0}")]
    Garbage(&'static str),
}

fn os(what: &'static str) -> WireError {
    WireError::Os(what, std::io::Error::last_os_error())
}

/// Which file an fd is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FileId(u64, u64);

impl FileId {
    pub fn of(fd: RawFd) -> Option<Self> {
        // SAFETY: an out-parameter of the right type; any fd number may be asked about.
        unsafe {
            let mut st: libc::stat = zeroed();
            (libc::fstat(fd, &mut st) == 0).then_some(Self(st.st_dev, st.st_ino))
        }
    }
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Conn {
    fd: RawFd,
    id: FileId,
}

impl Conn {
    /// Connects and says hello.
    pub fn open(role: Role, deadline: Instant) -> Result<Self, WireError> {
        let conn = Self::connect()?;
        let hello =
            Hello { version: VERSION, vpid: Vpid(std::process::id() as i32), comm: super::report::comm(), role };
        conn.send_until(&hello, deadline)?;
        Ok(conn)
    }

    fn connect() -> Result<Self, WireError> {
        // SAFETY: plain system calls on values of ours; the fd is owned by the returned value or closed.
        unsafe {
            let flags = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            let low = libc::socket(libc::AF_UNIX, flags, 0);
            if low < 0 {
                return Err(os("make"));
            }
            let high = libc::fcntl(low, libc::F_DUPFD_CLOEXEC, HIGH);
            let fd = if high >= 0 {
                libc::close(low);
                high
            } else {
                low
            };
            let Some(id) = FileId::of(fd) else { return Err(WireError::Taken) };
            let conn = Self { fd, id };
            let mut address: libc::sockaddr_un = zeroed();
            address.sun_family = libc::AF_UNIX as libc::sa_family_t;
            for (to, from) in address.sun_path.iter_mut().zip(SOCKET.bytes()) {
                *to = from as libc::c_char;
            }
            let len = offset_of!(libc::sockaddr_un, sun_path) + SOCKET.len() + 1;
            debug_assert!(len <= size_of::<libc::sockaddr_un>());
            // A unix socket connects at once or says EAGAIN when the listener's backlog is full.
            if libc::connect(fd, (&raw const address).cast(), len as libc::socklen_t) != 0 {
                return Err(os("connect to"));
            }
            Ok(conn)
        }
    }

    /// Whether the number still is our socket.
    fn check(&self) -> Result<(), WireError> {
        if FileId::of(self.fd) == Some(self.id) { Ok(()) } else { Err(WireError::Taken) }
    }

    /// The number, for the child of a fork that must close it.
    pub fn number(&self) -> (RawFd, FileId) {
        (self.fd, self.id)
    }

    pub fn send(&self, message: &impl Serialize) -> Result<(), WireError> {
        self.send_until(message, Instant::now() + FRAME_TIME)
    }

    fn send_until(&self, message: &impl Serialize, deadline: Instant) -> Result<(), WireError> {
        let mut frame = MAGIC.to_vec();
        frame.extend_from_slice(&[0; 4]);
        let mut frame =
            postcard::to_extend(message, frame).map_err(|_| WireError::Garbage("a message cannot be encoded"))?;
        let body = frame.len() - 8;
        if body > MAX_FRAME {
            return Err(WireError::Garbage("a message of ours is too long"));
        }
        frame[4..8].copy_from_slice(&(body as u32).to_le_bytes());
        let mut rest = &frame[..];
        while !rest.is_empty() {
            self.wait(libc::POLLOUT, Some(deadline), "writing")?;
            // SAFETY: the buffer is `rest`.
            let n = unsafe { libc::send(self.fd, rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL) };
            match n {
                n if n > 0 => rest = &rest[n as usize..],
                _ if again() => {}
                _ => return Err(os("write to")),
            }
        }
        Ok(())
    }

    /// Waits for a frame to begin until `deadline` (for ever if `None`), then reads it.
    pub fn receive<T: DeserializeOwned>(&self, deadline: Option<Instant>) -> Result<T, WireError> {
        self.wait(libc::POLLIN, deadline, "waiting for a message")?;
        let end = Instant::now() + FRAME_TIME;
        let end = deadline.map_or(end, |d| d.min(end));
        let mut head = [0; 8];
        self.fill(&mut head, end)?;
        if head[..4] != MAGIC {
            return Err(WireError::Garbage("wrong magic"));
        }
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if len > MAX_FRAME {
            return Err(WireError::Garbage("too long"));
        }
        let mut body = vec![0; len];
        self.fill(&mut body, end)?;
        match postcard::take_from_bytes(&body) {
            Ok((message, [])) => Ok(message),
            Ok(_) => Err(WireError::Garbage("bytes left over")),
            Err(_) => Err(WireError::Garbage("unknown message")),
        }
    }

    /// Whether a message has begun to arrive (or the connection is broken: reading will tell) within `time`.
    pub fn is_ready(&self, time: Duration) -> bool {
        !matches!(self.wait(libc::POLLIN, Some(Instant::now() + time), ""), Err(WireError::Late(_)))
    }

    fn fill(&self, mut buffer: &mut [u8], deadline: Instant) -> Result<(), WireError> {
        while !buffer.is_empty() {
            self.wait(libc::POLLIN, Some(deadline), "reading")?;
            // SAFETY: the buffer is `buffer`.
            let n = unsafe { libc::recv(self.fd, buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            match n {
                0 => return Err(WireError::Closed),
                n if n > 0 => buffer = &mut buffer[n as usize..],
                _ if again() => {}
                _ => return Err(os("read from")),
            }
        }
        Ok(())
    }

    fn wait(&self, what: libc::c_short, deadline: Option<Instant>, doing: &'static str) -> Result<(), WireError> {
        loop {
            self.check()?;
            let mut poll = libc::pollfd { fd: self.fd, events: what, revents: 0 };
            // Not longer than a second at once: the application may close the fd while we sleep on it.
            let slice = deadline.map_or(Duration::from_secs(1), |d| {
                d.saturating_duration_since(Instant::now()).min(Duration::from_secs(1))
            });
            let time = libc::timespec {
                tv_sec: slice.as_secs() as libc::time_t,
                tv_nsec: slice.subsec_nanos() as libc::c_long,
            };
            // SAFETY: one pollfd and one timespec of ours; no signal mask.
            match unsafe { libc::ppoll(&mut poll, 1, &time, std::ptr::null()) } {
                n if n > 0 => return Ok(()),
                0 if deadline.is_some_and(|d| Instant::now() >= d) => return Err(WireError::Late(doing)),
                n if n < 0 && !again() => return Err(os("wait for")),
                _ => {}
            }
        }
    }
}

impl Drop for Conn {
    fn drop(&mut self) {
        close(self.fd, self.id);
    }
}

/// Closes an fd if it still is the file it was. Async-signal-safe: also for the child of a fork.
pub fn close(fd: RawFd, id: FileId) {
    if FileId::of(fd) == Some(id) {
        // SAFETY: it is our own socket, as just seen.
        unsafe { libc::close(fd) };
    }
}

fn again() -> bool {
    matches!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EAGAIN | libc::EINTR))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Conn, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a socket pair");
        ours.set_nonblocking(true).expect("a flag");
        let fd = ours.into_raw_fd();
        (Conn { fd, id: FileId::of(fd).expect("an open fd") }, theirs)
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(200))
    }

    #[test]
    fn a_message_arrives_as_it_was_sent() {
        let (a, b) = pair();
        b.set_nonblocking(true).expect("a flag");
        let b = Conn { id: FileId::of(b.as_raw_fd()).expect("an open fd"), fd: b.into_raw_fd() };
        assert!(!b.is_ready(Duration::ZERO));
        a.send(&(7u32, "text".to_owned())).expect("sent");
        assert!(b.is_ready(Duration::ZERO));
        assert_eq!(b.receive::<(u32, String)>(soon()).expect("received"), (7, "text".to_owned()));
        drop(a);
        assert!(matches!(b.receive::<u32>(soon()), Err(WireError::Closed)));
    }

    #[test]
    fn what_is_not_a_frame_is_refused_before_memory_is_taken_for_it() {
        let frames: [(&[u8], &str); 4] = [
            (b"GET / HT", "wrong magic"),
            (b"mrd1\xff\xff\xff\x7f", "too long"),
            (b"mrd1\x02\0\0\0\x05\x06", "bytes left over"),
            (b"mrd1\x01\0\0\0\xff", "unknown message"),
        ];
        for (bytes, why) in frames {
            let (a, mut b) = pair();
            b.write_all(bytes).expect("written");
            match a.receive::<u32>(soon()) {
                Err(WireError::Garbage(said)) => assert_eq!(said, why),
                other => panic!("{why}: {other:?}"),
            }
        }
    }

    #[test]
    fn half_a_frame_does_not_block_for_ever() {
        let (a, mut b) = pair();
        b.write_all(b"mrd1\x05\0\0\0ab").expect("written");
        assert!(matches!(a.receive::<String>(soon()), Err(WireError::Late(_))));
    }

    #[test]
    fn an_fd_the_application_took_is_neither_used_nor_closed() {
        let (a, _b) = pair();
        let (fd, _) = a.number();
        let file = std::fs::File::open("/dev/null").expect("a file");
        // SAFETY: puts another file behind the number, as an application does that closes all fds and opens its own.
        assert_eq!(unsafe { libc::dup2(file.as_raw_fd(), fd) }, fd);
        assert!(matches!(a.send(&1u32), Err(WireError::Taken)));
        assert!(matches!(a.receive::<u32>(soon()), Err(WireError::Taken)));
        drop(a);
        assert_eq!(FileId::of(fd), FileId::of(file.as_raw_fd()), "it is the application's now");
        // SAFETY: opened by this test.
        unsafe { libc::close(fd) };
    }
}
