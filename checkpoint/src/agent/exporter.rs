//! The page of metrics over plain HTTP, for who wants to fetch it: `GET /metrics`, nothing else, one request per
//! connection. Off unless the settings name an address. Anybody who reaches the address may read, and nobody can change
//! anything; what is on the page is not known here.
//!
//! A request is read up to a cap and a deadline, and only its first line is looked at.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::metrics::Reason;
use crate::net::client::Deadlined;

/// What one caller may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of a request.
    pub request: usize,
    /// For all of it to arrive; and the same for the answer to be taken.
    pub time: Duration,
    /// Connections at a time; more are closed at once.
    pub connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { request: 8 << 10, time: Duration::from_secs(5), connections: 8 }
    }
}

/// After the answer: what a caller still sends is taken and thrown away for a moment, or it would not get the answer.
const LINGER: Duration = Duration::from_millis(500);

/// And so many bytes of it.
const REST: usize = 256 << 10;

/// Where the page comes from.
pub trait Source: Send + Sync + 'static {
    fn page(&self) -> String;
    fn rejected(&self, reason: Reason);
}

/// Serves until the process ends.
pub fn serve(listener: TcpListener, source: Arc<dyn Source>, limits: Limits) -> io::Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    thread::Builder::new().name("metrics".into()).spawn(move || {
        loop {
            let Ok((tcp, _)) = listener.accept() else {
                // Out of descriptors, most likely.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            if open.fetch_add(1, Ordering::Relaxed) >= limits.connections {
                open.fetch_sub(1, Ordering::Relaxed);
                source.rejected(Reason::Flood);
                continue;
            }
            let (source, done) = (source.clone(), open.clone());
            let spawned = thread::Builder::new().name("metrics-client".into()).spawn(move || {
                // Whoever does not take the answer does without.
                let _ = converse(tcp, &*source, limits);
                done.fetch_sub(1, Ordering::Relaxed);
            });
            if spawned.is_err() {
                open.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })?;
    Ok(())
}

/// What came instead of a request.
enum Bad {
    Long,
    Slow,
    /// It has gone away.
    Gone,
}

fn converse(tcp: TcpStream, source: &dyn Source, limits: Limits) -> io::Result<()> {
    let mut stream = Deadlined::new(tcp);
    stream.until = Some(Instant::now() + limits.time);
    let (status, reason) = match read_head(&mut stream, limits.request) {
        Ok(head) => judge(&head),
        Err(Bad::Long) => ("400 Bad Request", Some(Reason::Size)),
        Err(Bad::Slow) => ("408 Request Timeout", Some(Reason::Slow)),
        Err(Bad::Gone) => return Ok(()),
    };
    let body = match reason {
        None => source.page(),
        Some(reason) => {
            source.rejected(reason);
            format!("{status}\n")
        }
    };
    let kind = if reason.is_none() { "text/plain; version=0.0.4; charset=utf-8" } else { "text/plain; charset=utf-8" };
    let allow = if status.starts_with("405") { "Allow: GET\r\n" } else { "" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n{allow}Connection: close\r\n\r\n",
        body.len()
    );
    stream.until = Some(Instant::now() + limits.time);
    stream.write_all(head.as_bytes())?;
    stream.write_all(body.as_bytes())?;
    stream.tcp().shutdown(Shutdown::Write)?;
    stream.until = Some(Instant::now() + LINGER);
    io::copy(&mut stream.take(REST as u64), &mut io::sink())?;
    Ok(())
}

/// Everything up to the empty line.
fn read_head(stream: &mut impl Read, cap: usize) -> Result<Vec<u8>, Bad> {
    let mut head = Vec::new();
    let mut piece = [0; 1024];
    loop {
        let n = match stream.read(&mut piece) {
            Ok(0) => return Err(Bad::Gone),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return Err(Bad::Slow),
            Err(_) => return Err(Bad::Gone),
        };
        // The end may lie across two pieces.
        let from = head.len().saturating_sub(3);
        head.extend_from_slice(&piece[..n]);
        let new = &head[from..];
        let ended = new.windows(4).any(|w| w == b"\r\n\r\n") || new.windows(2).any(|w| w == b"\n\n");
        if head.len() > cap {
            return Err(Bad::Long);
        }
        if ended {
            return Ok(head);
        }
    }
}

/// The status of the answer, and what is wrong with the request.
fn judge(head: &[u8]) -> (&'static str, Option<Reason>) {
    let malformed = |status| (status, Some(Reason::Malformed));
    let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
    let words: Option<Vec<&str>> =
        std::str::from_utf8(line).ok().map(|l| l.trim_end_matches('\r').split(' ').collect());
    let Some([method, target, version]) = words.as_deref() else { return malformed("400 Bad Request") };
    let is_method = !method.is_empty() && method.bytes().all(|b| b.is_ascii_uppercase());
    if !is_method || !target.starts_with('/') || !version.starts_with("HTTP/1.") {
        return malformed("400 Bad Request");
    }
    if target.split('?').next() != Some("/metrics") {
        return malformed("404 Not Found");
    }
    if *method != "GET" {
        return malformed("405 Method Not Allowed");
    }
    ("200 OK", None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;
    use std::sync::Mutex;

    const SHORT: Duration = Duration::from_millis(300);

    /// Longer than anything here may take.
    const SOON: Duration = Duration::from_secs(20);

    #[derive(Default)]
    struct Told(Mutex<Vec<Reason>>);

    impl Source for Told {
        fn page(&self) -> String {
            "m 1\n".into()
        }
        fn rejected(&self, reason: Reason) {
            self.0.lock().unwrap().push(reason);
        }
    }

    fn start(limits: Limits) -> (SocketAddr, Arc<Told>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let told = Arc::new(Told::default());
        serve(listener, told.clone(), limits).unwrap();
        (at, told)
    }

    fn dial(at: SocketAddr) -> TcpStream {
        let tcp = TcpStream::connect(at).unwrap();
        tcp.set_read_timeout(Some(SOON)).unwrap();
        tcp
    }

    fn answer(mut tcp: TcpStream) -> String {
        let mut text = String::new();
        tcp.read_to_string(&mut text).unwrap();
        text
    }

    fn say(at: SocketAddr, request: &[u8]) -> String {
        let mut tcp = dial(at);
        tcp.write_all(request).unwrap();
        answer(tcp)
    }

    fn wait_for(told: &Told, expected: &[Reason]) {
        let until = Instant::now() + SOON;
        while told.0.lock().unwrap().len() < expected.len() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(*told.0.lock().unwrap(), expected);
    }

    #[test]
    fn the_page_is_there_for_get_and_nothing_else_is() {
        let (at, told) = start(Limits::default());
        let page = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: 4\r\n\
                    Connection: close\r\n\r\nm 1\n";
        assert_eq!(say(at, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), page);
        assert_eq!(say(at, b"GET /metrics?a=b HTTP/1.0\n\n"), page);
        assert!(told.0.lock().unwrap().is_empty());
        for (request, status) in [
            (&b"POST /metrics HTTP/1.1\r\n\r\n"[..], "405"),
            (b"GET / HTTP/1.1\r\n\r\n", "404"),
            (b"GET /metrics/../x HTTP/1.1\r\n\r\n", "404"),
            (b"get /metrics HTTP/1.1\r\n\r\n", "400"),
            (b"GET /metrics\r\n\r\n", "400"),
            (b"GET /metrics HTTP/2\r\n\r\n", "400"),
            (b"GET  /metrics HTTP/1.1\r\n\r\n", "400"),
            (b"GET http://x/metrics HTTP/1.1\r\n\r\n", "400"),
            (b"\xff\xfe /metrics HTTP/1.1\r\n\r\n", "400"),
            (b"\r\n\r\n", "400"),
        ] {
            let text = say(at, request);
            assert!(text.starts_with(&format!("HTTP/1.1 {status} ")), "{request:?}: {text}");
            assert!(!text.contains("m 1"), "{text}");
            assert_eq!(text.contains("Allow: GET\r\n"), status == "405", "{text}");
        }
        wait_for(&told, &[Reason::Malformed; 10]);
    }

    #[test]
    fn a_request_that_does_not_end_is_cut_off_at_the_cap() {
        let (at, told) = start(Limits { request: 2000, ..Limits::default() });
        let mut request = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        request.resize(100_000, b'x');
        assert!(say(at, &request).starts_with("HTTP/1.1 400 "));
        wait_for(&told, &[Reason::Size]);
        let mut fits = b"GET /metrics HTTP/1.1\r\nX: ".to_vec();
        fits.resize(1996, b'x');
        fits.extend_from_slice(b"\r\n\r\n");
        assert_eq!(fits.len(), 2000);
        assert!(say(at, &fits).starts_with("HTTP/1.1 200 "));
    }

    #[test]
    fn one_that_drips_is_not_waited_for_beyond_the_time_for_all_of_it() {
        let (at, told) = start(Limits { time: SHORT, ..Limits::default() });
        let tcp = dial(at);
        let mut drip = tcp.try_clone().unwrap();
        let began = Instant::now();
        // Each byte comes well before a deadline of its own would be over.
        let dripping = thread::spawn(move || {
            while began.elapsed() < SOON && drip.write_all(b"G").is_ok() {
                thread::sleep(SHORT / 10);
            }
        });
        let mut status = [0; 12];
        let mut reading = tcp.try_clone().unwrap();
        reading.read_exact(&mut status).unwrap();
        assert_eq!(&status, b"HTTP/1.1 408");
        assert!(began.elapsed() >= SHORT && began.elapsed() < SOON / 2, "{:?}", began.elapsed());
        wait_for(&told, &[Reason::Slow]);
        tcp.shutdown(Shutdown::Both).unwrap();
        dripping.join().unwrap();
    }

    #[test]
    fn too_many_at_a_time_are_closed_and_others_served_once_those_end() {
        let (at, told) = start(Limits { connections: 2, ..Limits::default() });
        let quiet = [dial(at), dial(at)];
        // Accepted in order, so this one finds the two before it.
        let mut third = dial(at);
        assert_eq!(third.read(&mut [0]).unwrap_or(0), 0);
        wait_for(&told, &[Reason::Flood]);
        drop(quiet);
        let until = Instant::now() + SOON;
        loop {
            let mut tcp = dial(at);
            let mut text = String::new();
            let sent = tcp.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
            if sent.is_ok() && tcp.read_to_string(&mut text).is_ok() && text.ends_with("m 1\n") {
                break;
            }
            assert!(Instant::now() < until, "{text}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}
