//! What the kernel does about an end that is not heard of any more. Who asks gives up by a deadline of its own; but what it
//! closes then lives on in the kernel, which tries to deliver the rest at ever longer intervals, and for a while after the
//! line is back.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};

/// The connection ends, closed or not, when nothing of what was sent on it was acknowledged for so long. On a socket that
/// listens it is so for all connections that are accepted.
pub fn end_after(socket: &impl AsFd, silence: Duration) -> io::Result<()> {
    // The kernel takes it for a signed number.
    let millis = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX).min(i32::MAX as u32);
    Ok(setsockopt(socket, TcpUserTimeout, &millis)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::getsockopt;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn it_is_so_for_those_that_are_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        end_after(&listener, Duration::from_secs(20)).unwrap();
        let calls = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        assert_eq!(getsockopt(&accepted, TcpUserTimeout), Ok(20_000));
        assert_eq!(getsockopt(&calls, TcpUserTimeout), Ok(0));
        end_after(&calls, Duration::from_secs(1 << 40)).unwrap();
    }
}
