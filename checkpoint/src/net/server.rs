//! Being called by other agents: one thread per connection, a cap on how many, nothing done before both ends have
//! proved who they are.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::beat::Beat;
use super::client::Deadlined;
use super::frame::{AGENT, FrameError};
use super::msg::{Back, Call, Return};
use super::unheard;
use crate::agent::metrics::Reason;

/// Connections at a time; more are closed at once.
const MOST: usize = 512;

/// For the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Between two calls on one connection; callers dial again when it was closed.
const IDLE: Duration = Duration::from_secs(600);

/// For writing a return.
const WRITE: Duration = Duration::from_secs(60);

/// Answers calls.
pub trait Handler: Send + Sync + 'static {
    /// Does what `call` asks, with whatever deadline that needs; `from` is the caller's address.
    fn handle(&self, from: SocketAddr, call: Call) -> Return;
    /// Somebody was not heard.
    fn rejected(&self, reason: Reason);
}

/// Serves until the process ends. Callers that acknowledge nothing for as long as `silence` are given up.
pub fn serve(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    silence: Duration,
    handler: Arc<dyn Handler>,
) -> io::Result<()> {
    unheard::end_after(&listener, silence)?;
    let live = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name("net-accept".into()).spawn(move || {
        loop {
            let (tcp, from) = match listener.accept() {
                Ok(pair) => pair,
                Err(e) => {
                    eprintln!("accepting a connection: {e}");
                    // Out of descriptors, most likely: give the others time to end.
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if live.fetch_add(1, Ordering::Relaxed) >= MOST {
                live.fetch_sub(1, Ordering::Relaxed);
                eprintln!("{from}: closed, {MOST} connections are open");
                handler.rejected(Reason::Flood);
                continue;
            }
            let (config, handler, done) = (config.clone(), handler.clone(), live.clone());
            let spawned = thread::Builder::new().name("net-call".into()).spawn(move || {
                if let Err(e) = converse(tcp, from, config, &*handler) {
                    eprintln!("{from}: {}", crate::agent::chain(&e));
                }
                done.fetch_sub(1, Ordering::Relaxed);
            });
            if let Err(e) = spawned {
                live.fetch_sub(1, Ordering::Relaxed);
                eprintln!("{from}: no thread for it: {e}");
            }
        }
    })?;
    Ok(())
}

fn converse(
    tcp: TcpStream,
    from: SocketAddr,
    config: Arc<ServerConfig>,
    handler: &dyn Handler,
) -> Result<(), FrameError> {
    tcp.set_nodelay(true)?;
    let tls = ServerConnection::new(config).map_err(|e| FrameError::Io(io::Error::other(e)))?;
    let mut stream = StreamOwned::new(tls, Deadlined::new(tcp));
    stream.sock.until = Some(Instant::now() + HANDSHAKE);
    while stream.conn.is_handshaking() {
        if let Err(e) = stream.conn.complete_io(&mut stream.sock) {
            let e = FrameError::from(e);
            // Whatever else ends a handshake is about certificates, or came from no agent.
            handler.rejected(if matches!(e, FrameError::TimedOut) { Reason::Slow } else { Reason::Tls });
            return Err(e);
        }
    }
    let (beat, stream) = (Beat::default(), Mutex::new(stream));
    thread::scope(|scope| {
        thread::Builder::new().name("net-beat".into()).spawn_scoped(scope, || beat.run(&stream))?;
        // Also when a call panics: the scope waits for the heart to stop.
        let _ends = beat.ends();
        calls(&stream, &beat, from, handler)
    })
}

type Stream = StreamOwned<ServerConnection, Deadlined>;

/// One call after the other.
fn calls(stream: &Mutex<Stream>, beat: &Beat, from: SocketAddr, handler: &dyn Handler) -> Result<(), FrameError> {
    loop {
        let mut idle = lock(stream);
        idle.sock.until = Some(Instant::now() + IDLE);
        let call: Call = match AGENT.read(&mut *idle) {
            Ok(call) => call,
            Err(FrameError::Closed | FrameError::TimedOut) => return Ok(()),
            // A caller that just went away, without TLS' good-bye: its own business.
            Err(FrameError::Io(e)) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(FrameError::Io(e)) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Err(e) => {
                Reason::of(&e).into_iter().for_each(|reason| handler.rejected(reason));
                return Err(e);
            }
        };
        drop(idle);
        beat.begin();
        let back = handler.handle(from, call);
        beat.pause();
        let mut stream = lock(stream);
        stream.sock.until = Some(Instant::now() + WRITE);
        AGENT.write(&mut *stream, &Back::Return(back))?;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::client::{CallError, Client};
    use crate::net::msg::{Answer, BEAT, Order, Refusal};
    use crate::net::tls::{Identity, TlsFiles};
    use crate::pki;
    use std::io::Write;
    use std::path::Path;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<Reason>>);
    impl Handler for Echo {
        fn handle(&self, _: SocketAddr, call: Call) -> Return {
            let answer = match call.order {
                Order::Describe => Ok(Answer::Done),
                Order::Finish => {
                    thread::sleep(BEAT * 2);
                    Ok(Answer::Done)
                }
                _ => Err(Refusal::Failed("only describe".into())),
            };
            Return { seq: call.seq, answer }
        }
        fn rejected(&self, reason: Reason) {
            self.0.lock().unwrap().push(reason);
        }
    }

    fn wait_for(echo: &Echo, expected: &[Reason]) {
        let until = Instant::now() + SOON;
        while echo.0.lock().unwrap().len() < expected.len() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(*echo.0.lock().unwrap(), expected);
    }

    fn identity(dir: &Path, name: &str) -> Identity {
        issue(dir, name);
        load(dir, name)
    }

    fn issue(dir: &Path, name: &str) {
        pki::issue(dir, name, &["127.0.0.1".parse().unwrap()], &[]).unwrap();
    }

    fn load(dir: &Path, name: &str) -> Identity {
        Identity::load(&TlsFiles {
            ca: dir.join("ca.pem"),
            cert: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        })
        .unwrap()
    }

    fn start(identity: &Identity) -> (u16, Arc<Echo>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let echo = Arc::new(Echo::default());
        serve(listener, identity.server.clone(), SOON, echo.clone()).unwrap();
        (port, echo)
    }

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn two_nodes_of_one_authority_talk_and_reuse_their_connection() {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path()).unwrap();
        let (port, echo) = start(&identity(dir.path(), "a"));
        let client = Client::new(Ok(identity(dir.path(), "b").client), port, SOON);
        for _ in 0..3 {
            assert_eq!(client.call("127.0.0.1", None, Order::Describe, SOON).unwrap(), Answer::Done);
        }
        let refused = client.call("127.0.0.1", None, Order::Fate, SOON).unwrap_err();
        assert!(matches!(refused, CallError::Refused { .. }), "{refused}");
        assert!(echo.0.lock().unwrap().is_empty());
    }

    #[test]
    fn a_long_answer_is_waited_for_and_a_silent_agent_is_not() {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path()).unwrap();
        let (port, _echo) = start(&identity(dir.path(), "a"));
        let tls = identity(dir.path(), "b").client;
        // It sleeps for two beats: longer than the silence allowed, if none were heard.
        let patient = Client::new(Ok(tls.clone()), port, BEAT + BEAT / 2);
        assert_eq!(patient.call("127.0.0.1", None, Order::Finish, SOON).unwrap(), Answer::Done);
        assert_eq!(patient.call("127.0.0.1", None, Order::Describe, SOON).unwrap(), Answer::Done);
        let hasty = Client::new(Ok(tls), port, BEAT / 4);
        let since = Instant::now();
        let silent = hasty.call("127.0.0.1", None, Order::Finish, SOON).unwrap_err();
        assert!(matches!(silent, CallError::Talk { source: FrameError::Silent(_), .. }), "{silent}");
        assert!(since.elapsed() < BEAT, "before the first beat");
    }

    #[test]
    fn who_speaks_otherwise_is_counted_by_what_is_wrong() {
        let dir = tempfile::tempdir().unwrap();
        pki::init(dir.path()).unwrap();
        let (port, echo) = start(&identity(dir.path(), "a"));
        let config = identity(dir.path(), "b").client;
        let good = AGENT.encode(&Call { migration: None, seq: 1, order: Order::Describe }).unwrap();
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            bytes
        };
        let mut expected = Vec::new();
        for (bytes, reason) in [
            (with(0, b'x'), Reason::Malformed),
            (with(4, 0xfe), Reason::Version),
            (with(9, 0xff), Reason::Size),
            (with(good.len() - 1, 0xff), Reason::Malformed),
        ] {
            let name = rustls::pki_types::ServerName::from(std::net::IpAddr::from([127, 0, 0, 1]));
            let tls = rustls::ClientConnection::new(config.clone(), name).unwrap();
            let mut stream = StreamOwned::new(tls, TcpStream::connect(("127.0.0.1", port)).unwrap());
            stream.write_all(&bytes).unwrap();
            stream.flush().unwrap();
            expected.push(reason);
            wait_for(&echo, &expected);
        }
    }

    #[test]
    fn a_node_of_another_authority_is_not_heard() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        pki::init(ours.path()).unwrap();
        pki::init(theirs.path()).unwrap();
        let (port, echo) = start(&identity(ours.path(), "a"));
        let client = Client::new(Ok(identity(theirs.path(), "b").client), port, SOON);
        let refused = client.call("127.0.0.1", None, Order::Describe, SOON).unwrap_err();
        assert!(refused.to_string().contains("same authority"), "{refused}");
        wait_for(&echo, &[Reason::Tls]);
    }

    #[test]
    fn a_caller_whose_certificate_is_refused_hears_that_it_is_the_certificate() {
        let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        pki::init(ours.path()).unwrap();
        pki::init(theirs.path()).unwrap();
        let (port, echo) = start(&identity(ours.path(), "a"));
        // Trusts the server, but was issued by somebody else.
        issue(theirs.path(), "b");
        std::fs::copy(ours.path().join("ca.pem"), theirs.path().join("ca.pem")).unwrap();
        let client = Client::new(Ok(load(theirs.path(), "b").client), port, SOON);
        let refused = client.call("127.0.0.1", None, Order::Describe, SOON).unwrap_err();
        assert!(refused.to_string().contains("same authority"), "{refused}");
        wait_for(&echo, &[Reason::Tls]);
    }
}
