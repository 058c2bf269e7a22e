//! Calling other agents: one call, one deadline, connections kept for the next call.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};

use super::frame::{AGENT, FrameError};
use super::msg::{Answer, Back, Call, Order, Refusal};
use super::unheard;
use rdma_virt::id::MigrationId;

/// How long a connection may take to be made, whatever the call's own deadline is.
const DIAL: Duration = Duration::from_secs(5);

/// Idle connections kept for one agent.
const KEPT: usize = 16;

/// Why a call brought no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    #[error("no certificates: {0}")]
    NoIdentity(String),
    #[error("{0:?} is no address of an agent; HOST, HOST:PORT or [IPv6]:PORT is expected")]
    Address(String),
    #[error("cannot reach the agent at {at} (is it started, and is that its address?)")]
    Dial { at: String, source: io::Error },
    #[error(
        "the agent at {at} and this one cannot prove to each other who they are (both need certificates of the same \
         authority that name their addresses, see `migrrdma pki issue`)"
    )]
    Tls { at: String, source: FrameError },
    #[error("asking the agent at {at} for {order}")]
    Talk { at: String, order: &'static str, source: FrameError },
    #[error("the agent at {at} answered {order} with something else")]
    Confused { at: String, order: &'static str },
    /// It answered, and the answer is no.
    #[error("the agent at {at} refused {order}: {refusal}")]
    Refused { at: String, order: &'static str, refusal: Refusal },
}

/// A stream on which every single read and write gets what is left of one deadline.
#[derive(Debug)]
pub struct Deadlined {
    stream: TcpStream,
    /// `None`: for ever.
    pub until: Option<Instant>,
}

impl Deadlined {
    pub fn new(stream: TcpStream) -> Self {
        Deadlined { stream, until: None }
    }

    pub fn tcp(&self) -> &TcpStream {
        &self.stream
    }

    fn left(&self) -> io::Result<Option<Duration>> {
        let Some(until) = self.until else { return Ok(None) };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(Some(left)) }
    }
}

impl Read for Deadlined {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.left()?)?;
        self.stream.read(buf)
    }
}

impl Write for Deadlined {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(self.left()?)?;
        self.stream.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

struct Conn {
    stream: StreamOwned<ClientConnection, Deadlined>,
    seq: u64,
}

impl Conn {
    /// Nothing may arrive on an idle connection, so whatever can be read means that it is dead.
    fn is_fresh(&self) -> bool {
        let tcp = self.stream.sock.tcp();
        let blocked = tcp.set_nonblocking(true).is_ok()
            && matches!(tcp.peek(&mut [0]), Err(e) if e.kind() == io::ErrorKind::WouldBlock);
        tcp.set_nonblocking(false).is_ok() && blocked
    }
}

/// The calling half of an agent.
pub struct Client {
    identity: Result<Arc<ClientConfig>, String>,
    port: u16,
    /// An agent that is asked something, and of which nothing is heard for so long, is given up.
    silence: Duration,
    idle: Mutex<HashMap<String, Vec<Conn>>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Client {
    /// Without an identity every call fails with its reason. `port` is the one of addresses that name none.
    pub fn new(identity: Result<Arc<ClientConfig>, String>, port: u16, silence: Duration) -> Self {
        Client { identity, port, silence, idle: Mutex::default() }
    }

    /// `host:port` in the one form that is used as a key everywhere.
    pub fn normalise(&self, at: &str) -> Result<String, CallError> {
        let (host, port) = split(at, self.port).ok_or_else(|| CallError::Address(at.into()))?;
        Ok(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
    }

    /// Asks, and waits for the answer until the deadline, for as long as there are signs of life.
    pub fn call(
        &self,
        at: &str,
        migration: Option<MigrationId>,
        order: Order,
        deadline: Duration,
    ) -> Result<Answer, CallError> {
        self.call_and_meanwhile(at, migration, order, deadline, &mut || ())
    }

    /// As [`Client::call`]; `sent` is run when the order is on its way.
    pub fn call_and_meanwhile(
        &self,
        at: &str,
        migration: Option<MigrationId>,
        order: Order,
        deadline: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Answer, CallError> {
        let until = Instant::now() + deadline;
        let at = self.normalise(at)?;
        let name = order.name();
        let talk = |source| match is_about_certificates(&source) {
            true => CallError::Tls { at: at.clone(), source },
            false => CallError::Talk { at: at.clone(), order: name, source },
        };
        let mut conn = match self.take_idle(&at) {
            Some(conn) => conn,
            None => self.dial(&at, until)?,
        };
        conn.seq += 1;
        conn.stream.sock.until = Some(until);
        let call = Call { migration, seq: conn.seq, order };
        AGENT.write(&mut conn.stream, &call).map_err(talk)?;
        sent();
        let back = loop {
            conn.stream.sock.until = Some(until.min(Instant::now() + self.silence));
            match AGENT.read(&mut conn.stream) {
                Ok(Back::Working) => {}
                Ok(Back::Return(back)) => break back,
                Err(FrameError::TimedOut) if Instant::now() < until => {
                    return Err(talk(FrameError::Silent(self.silence)));
                }
                Err(e) => return Err(talk(e)),
            }
        };
        if back.seq != conn.seq {
            return Err(CallError::Confused { at, order: name });
        }
        self.keep(&at, conn);
        back.answer.map_err(|refusal| CallError::Refused { at, order: name, refusal })
    }

    fn take_idle(&self, at: &str) -> Option<Conn> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let list = idle.get_mut(at)?;
        while let Some(conn) = list.pop() {
            if conn.is_fresh() {
                return Some(conn);
            }
        }
        None
    }

    /// Closes idle connections whose other end is gone. Called every now and then.
    pub fn tidy(&self) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|_, list| {
            list.retain(Conn::is_fresh);
            !list.is_empty()
        });
    }

    fn keep(&self, at: &str, conn: Conn) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let list = idle.entry(at.to_owned()).or_default();
        if list.len() < KEPT {
            list.push(conn);
        }
    }

    fn dial(&self, at: &str, until: Instant) -> Result<Conn, CallError> {
        let config = self.identity.as_ref().map_err(|why| CallError::NoIdentity(why.clone()))?;
        let (host, port) = split(at, self.port).ok_or_else(|| CallError::Address(at.into()))?;
        let wrap = |source| CallError::Dial { at: at.to_owned(), source };
        let until = until.min(Instant::now() + DIAL);
        let addresses: Vec<SocketAddr> = (host.as_str(), port).to_socket_addrs().map_err(wrap)?.collect();
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        let mut tcp = None;
        for address in addresses {
            let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
            match TcpStream::connect_timeout(&address, left) {
                Ok(stream) => {
                    tcp = Some(stream);
                    break;
                }
                Err(e) => last = e,
            }
        }
        let Some(tcp) = tcp else { return Err(wrap(last)) };
        tcp.set_nodelay(true).map_err(wrap)?;
        unheard::end_after(&tcp, self.silence).map_err(wrap)?;
        // The zone of a link-local address is no part of a name.
        let plain = host.split('%').next().unwrap_or(&host).to_owned();
        let server = ServerName::try_from(plain).map_err(|_| CallError::Address(at.into()))?;
        let tls = ClientConnection::new(config.clone(), server)
            .map_err(|e| CallError::Tls { at: at.into(), source: FrameError::Io(io::Error::other(e)) })?;
        let mut stream = StreamOwned::new(tls, Deadlined { stream: tcp, until: Some(until) });
        while stream.conn.is_handshaking() {
            stream
                .conn
                .complete_io(&mut stream.sock)
                .map_err(|e| CallError::Tls { at: at.into(), source: FrameError::from(e) })?;
        }
        Ok(Conn { stream, seq: 0 })
    }
}

/// The other side hears of our certificate after its own has been accepted, so its verdict comes in place of an answer.
fn is_about_certificates(e: &FrameError) -> bool {
    let FrameError::Io(e) = e else { return false };
    let said = e.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    matches!(said, Some(rustls::Error::AlertReceived(_) | rustls::Error::InvalidCertificate(_)))
}

/// `host`, `host:port`, `1.2.3.4:port`, `[v6]:port` or a bare IPv6 address.
fn split(at: &str, default: u16) -> Option<(String, u16)> {
    if let Some(rest) = at.strip_prefix('[') {
        let (host, tail) = rest.split_once(']')?;
        let port = if tail.is_empty() { default } else { tail.strip_prefix(':')?.parse().ok()? };
        return Some((host.to_owned(), port));
    }
    match at.matches(':').count() {
        0 if !at.is_empty() => Some((at.to_owned(), default)),
        1 => {
            let (host, port) = at.split_once(':')?;
            (!host.is_empty()).then_some((host.to_owned(), port.parse().ok()?))
        }
        0 => None,
        _ => Some((at.to_owned(), default)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_in_every_usual_form() {
        for (text, host, port) in [
            ("10.0.0.1", "10.0.0.1", 7477),
            ("10.0.0.1:5", "10.0.0.1", 5),
            ("node", "node", 7477),
            ("[fe80::1]:5", "fe80::1", 5),
            ("fe80::1", "fe80::1", 7477),
        ] {
            assert_eq!(split(text, 7477), Some((host.into(), port)), "{text}");
        }
        for bad in ["", ":5", "a:b", "[::1", "[::1]x"] {
            assert_eq!(split(bad, 7477), None, "{bad}");
        }
    }

    #[test]
    fn without_certificates_a_call_says_so() {
        let client = Client::new(Err("none made".into()), 7477, Duration::from_secs(20));
        let err = client.call("127.0.0.1", None, Order::Describe, Duration::from_secs(1)).unwrap_err();
        assert!(err.to_string().contains("none made"));
    }
}
