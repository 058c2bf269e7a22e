//! The role that RDMA is compared with: the same memory, threads, TCP connection and stamps, and no verbs call but, on
//! request, the one that loads the drivers.
//!
//! One end waits (without `--connect`), one connects; both count heartbeats, and whoever gets SIGTERM ends both.

use crate::cli::Hold;
use crate::clock::{Clock, Reading};
use crate::report;
use crate::signals;
use crate::timeline::say;
use crate::verbs::{Context as Device, Memory};
use crate::wire::{Message, Wire};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde_json::json;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Distance of two heartbeats, seconds.
const BEAT: f64 = 1.0;
const PAGE: usize = 4096;

/// What there is to report.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// Seconds it ran.
    pub seconds: f64,
    /// Heartbeats received over TCP.
    pub heartbeats: u64,
    /// The same: all that is done here and could have gone wrong.
    pub ops: u64,
    /// Bytes of memory held.
    pub held_bytes: usize,
    /// Pages written to.
    pub touched: u64,
    /// Largest time the stamp thread did not run, in milliseconds.
    pub max_stamp_gap_ms: f64,
    /// As in the outcome of an end with RDMA.
    pub stamp_gaps: Vec<[i64; 4]>,
    /// Violations, all of them.
    pub error_count: u64,
    /// The same in words.
    pub errors: Vec<String>,
}

impl Held {
    /// Whether nothing was wrong.
    #[must_use]
    pub fn ok(&self) -> bool {
        self.error_count == 0
    }

    /// The final line.
    #[must_use]
    pub fn line(&self) -> String {
        let mut v = json!({"event": "result", "ok": self.ok()});
        if let (Some(v), Ok(serde_json::Value::Object(all))) = (v.as_object_mut(), serde_json::to_value(self)) {
            v.extend(all);
        }
        v.to_string()
    }
}

/// Runs one end until somebody asks for the end of it.
///
/// # Errors
/// When the run could not take place.
pub fn run(options: &Hold) -> Result<Held> {
    let patience = Duration::from_secs_f64(options.stall_timeout);
    let memory = Memory::filled((options.memory as usize) << 20).ok().filter(|m| !m.is_empty());
    if memory.is_none() && options.memory > 0 {
        bail!("there is no memory of {} MiB", options.memory);
    }
    if options.list_devices {
        Device::list().context("list the RDMA devices")?;
    }
    let wire = match &options.connect {
        Some(host) => Wire::connect(&format!("{host}:{}", options.port), patience)?,
        None => {
            let l = TcpListener::bind(("0.0.0.0", options.port)).with_context(|| format!("port {}", options.port))?;
            say(&json!({"event": "listening", "port": options.port}).to_string())?;
            Wire::accept(&l, patience)?
        }
    };
    let clock = Arc::new(Clock::new(Reading::now()));
    let stamp = {
        let (clock, period) = (clock.clone(), Duration::from_millis(options.stamp_ms));
        std::thread::Builder::new().name("stamp".into()).spawn(move || clock.run(period))?
    };
    let stop = Arc::new(AtomicBool::new(false));
    for n in 0..options.threads {
        let stop = stop.clone();
        std::thread::Builder::new().name(format!("idle{n}")).spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(20));
            }
        })?;
    }
    say(&json!({"event": "running", "held_mib": options.memory}).to_string())?;
    let mut holding = Holding { options, wire, memory, clock, beats: (0, 0), touched: 0 };
    let error = holding.until_told().err();
    stop.store(true, Ordering::Relaxed);
    let mut held = holding.outcome();
    if let Some(e) = error {
        held.errors.push(format!("{e:#}"));
        held.error_count += 1;
    }
    holding.clock.stop();
    let _ = stamp.join();
    Ok(held)
}

struct Holding<'a> {
    options: &'a Hold,
    wire: Wire,
    memory: Option<Memory>,
    clock: Arc<Clock>,
    /// Sent and received.
    beats: (u64, u64),
    touched: u64,
}

impl Holding<'_> {
    fn until_told(&mut self) -> Result<()> {
        let (mut next_beat, mut next_word, mut last_heard) = (0.0, 1.0, 0.0);
        loop {
            if let Some(m) = self.wire.poll(5)? {
                last_heard = self.clock.seconds();
                match m {
                    Message::Heartbeat(n) if n == self.beats.1 => self.beats.1 += 1,
                    Message::Stop => return Ok(()),
                    other => bail!("{other:?} came when heartbeat {} was due", self.beats.1),
                }
            }
            let now = self.clock.seconds();
            if signals::asked_to_stop() {
                return self.wire.send(&Message::Stop);
            }
            if now >= next_beat {
                next_beat = now + BEAT;
                self.wire.send(&Message::Heartbeat(self.beats.0))?;
                self.beats.0 += 1;
            }
            if now >= next_word {
                next_word = now + 1.0;
                // Nobody reading is no violation.
                let _ = say(&json!({"event": "progress", "ops": self.beats.1}).to_string());
            }
            if now - last_heard > self.options.stall_timeout {
                bail!("nothing came over the TCP connection for {} s", self.options.stall_timeout);
            }
            self.touch(now);
        }
    }

    /// As many pages as are due by now.
    fn touch(&mut self, now: f64) {
        let Some(memory) = &self.memory else { return };
        let due = (now * f64::from(self.options.touch)) as u64;
        while self.touched < due {
            let pages = (memory.len() / PAGE) as u64;
            let page = usize::try_from(self.touched % pages).unwrap_or(0);
            memory.touch(page * PAGE, self.touched / pages + 1);
            self.touched += 1;
        }
    }

    /// First byte that is not what was written there last.
    fn wrong(&self) -> Option<usize> {
        let memory = self.memory.as_ref()?;
        let pages = (memory.len() / PAGE) as u64;
        let times = |at: usize| match at % PAGE {
            0 => (self.touched + pages - 1 - (at / PAGE) as u64) / pages,
            _ => 0,
        };
        memory.first_unlike(times)
    }

    fn outcome(&self) -> Held {
        let stamps = self.clock.stamps();
        let changed = self.wrong();
        let errors: Vec<String> = changed.iter().map(|at| format!("held memory has changed at byte {at}")).collect();
        Held {
            seconds: self.clock.seconds(),
            heartbeats: self.beats.1,
            ops: self.beats.1,
            held_bytes: self.memory.as_ref().map_or(0, Memory::len),
            touched: self.touched,
            max_stamp_gap_ms: stamps.max_ns as f64 / 1e6,
            stamp_gaps: report::stamp_gaps(&stamps.gaps),
            error_count: errors.len() as u64,
            errors,
        }
    }
}
