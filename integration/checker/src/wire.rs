//! The TCP connection between the two ends: set-up, heartbeats, comparison at the end.
//!
//! It stays open during the whole run, so that its survival is part of what is checked.

use crate::link::Offer;
use crate::wake;
use crate::workload::Workload;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Raised when the messages change.
pub const VERSION: u32 = 2;
/// Longest message.
const LINE: usize = 8 << 20;
/// An interruption of waiting for a client costs at most so much of the time for it, milliseconds.
const SLICE_MS: i32 = 1000;

/// What one lane has done, for the other end to compare with what it saw.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LaneTotals {
    /// Two-sided messages sent.
    pub two_sided: u64,
    /// FETCH_ADDs done.
    pub added: u64,
    /// CMP_SWPs done.
    pub swapped: u64,
    /// CRC of every slot as written.
    pub slots: Vec<u32>,
}

/// Messages, one JSON line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// First message of the client.
    Hello {
        /// Version of the messages.
        version: u32,
        /// What to do.
        workload: Box<Workload>,
    },
    /// The sender's QPs.
    Offers(Vec<Offer>),
    /// The sender's QPs are connected and its RECVs posted.
    Ready,
    /// Once a second, counting from 0.
    Heartbeat(u64),
    /// Everything asked for by --count is posted.
    CountReached,
    /// The server wants to end (it got SIGTERM).
    PleaseStop,
    /// No new work.
    Stop,
    /// Everything posted is complete; per QP, per lane.
    Drained(Vec<Vec<LaneTotals>>),
    /// What the sender found.
    Verdict {
        /// Nothing wrong.
        ok: bool,
        /// The first violations.
        errors: Vec<String>,
    },
    /// The sender found a violation and ends now.
    Abort(Vec<String>),
}

/// One end of the connection.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Wire {
    /// Connects, trying again until `patience` is over: the server may still be starting.
    ///
    /// # Errors
    /// When nobody answers in time.
    pub fn connect(to: &str, patience: Duration) -> Result<Self> {
        let tries = patience.as_millis() / 200 + 1;
        let mut n = 0;
        loop {
            n += 1;
            match TcpStream::connect(to) {
                Ok(s) => return Self::over(s),
                Err(e) if n >= tries => {
                    return Err(e).with_context(|| format!("connect to {to}, {n} tries"));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }

    /// Waits for one client.
    ///
    /// # Errors
    /// When nobody comes in time.
    pub fn accept(listener: &TcpListener, patience: Duration) -> Result<Self> {
        // In slices: a wait that is interrupted, as by a move, costs one of them.
        let mut left = patience;
        while !wake::readable(listener.as_raw_fd(), SLICE_MS)? {
            left = left.saturating_sub(Duration::from_millis(SLICE_MS.unsigned_abs().into()));
            if left.is_zero() {
                bail!("no client came within {} s", patience.as_secs());
            }
        }
        Self::over(listener.accept().context("accept a client")?.0)
    }

    fn over(stream: TcpStream) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::new() })
    }

    /// Sends one message.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn send(&mut self, m: &Message) -> Result<()> {
        let mut line = serde_json::to_vec(m)?;
        line.push(b'\n');
        self.stream.write_all(&line).context("TCP connection to the other end")
    }

    /// Waits up to `ms` milliseconds for a message.
    ///
    /// # Errors
    /// When the connection is gone or what comes is no message.
    pub fn poll(&mut self, ms: i32) -> Result<Option<Message>> {
        if let Some(m) = self.take()? {
            return Ok(Some(m));
        }
        if !wake::readable(self.stream.as_raw_fd(), ms)? {
            return Ok(None);
        }
        let mut chunk = [0; 65536];
        let n = match self.stream.read(&mut chunk) {
            Ok(0) => bail!("TCP connection closed by the other end"),
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::Interrupted => return Ok(None),
            Err(e) => return Err(e).context("TCP connection to the other end"),
        };
        if self.buffer.len() + n > LINE {
            bail!("message of more than {LINE} bytes from the other end");
        }
        self.buffer.extend_from_slice(&chunk[..n]);
        self.take()
    }

    fn take(&mut self) -> Result<Option<Message>> {
        let Some(end) = self.buffer.iter().position(|b| *b == b'\n') else {
            return Ok(None);
        };
        let line: Vec<u8> = self.buffer.drain(..=end).collect();
        serde_json::from_slice(&line).context("message from the other end").map(Some)
    }
}
