//! The result of a run, as the last line on standard output.

use crate::clock::{Clock, Gap};
use crate::rig::Rig;
use serde::Serialize;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Everything there is to report of one end.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// `client` or `server`.
    pub side: &'static str,
    /// QPs connected.
    pub qps: usize,
    /// Seconds of load.
    pub seconds: f64,
    /// Two-sided messages sent.
    pub sent: u64,
    /// Two-sided messages received and checked.
    pub received: u64,
    /// WRITEs done.
    pub writes: u64,
    /// READs checked.
    pub reads: u64,
    /// Atomics checked.
    pub atomics: u64,
    /// Credit updates done.
    pub credit_updates: u64,
    /// Operations done and messages received.
    pub ops: u64,
    /// Their payload.
    pub bytes: u64,
    /// Completion events taken.
    pub cq_events: u64,
    /// Asynchronous events that concern the port or device.
    pub async_events: u64,
    /// Asynchronous events that were left unread and found at the end of the run, as they had to be.
    pub unread_events: u64,
    /// Rounds in which every query answered as at the start.
    pub identity_checks: u64,
    /// Objects made and destroyed beside the load.
    pub churned: u64,
    /// Heartbeats received over TCP.
    pub heartbeats: u64,
    /// Largest time without any completion, in milliseconds.
    pub max_gap_ms: f64,
    /// Largest time the stamp thread did not run, in milliseconds.
    pub max_stamp_gap_ms: f64,
    /// Wall-clock time at its end, in milliseconds since 1970.
    pub max_stamp_gap_at_wall_ms: i64,
    /// The same by the monotonic clock alone.
    pub max_stamp_gap_mono_ms: f64,
    /// The same by the wall clock alone.
    pub max_stamp_gap_wall_ms: f64,
    /// Steps on which the clocks disagreed: (monotonic, wall) in milliseconds.
    pub clock_jumps: Vec<(i64, i64)>,
    /// The longest standstills of the stamp thread: wall clock before and after, monotonic clock before and after,
    /// in nanoseconds.
    pub stamp_gaps: Vec<[i64; 4]>,
    /// Bytes of memory registered.
    pub registered_bytes: usize,
    /// Violations, all of them.
    pub error_count: u64,
    /// The first of them.
    pub errors: Vec<String>,
}

impl Outcome {
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

/// Reads all counters.
#[must_use]
pub fn gather(rig: &Rig, heartbeats: u64) -> Outcome {
    let s = &rig.stats;
    let get = |a: &std::sync::atomic::AtomicU64| a.load(Ordering::Relaxed);
    let stamps = rig.clock.stamps();
    let ms = |ns: i64| ns as f64 / 1e6;
    Outcome {
        side: match rig.side {
            crate::pattern::Side::Client => "client",
            crate::pattern::Side::Server => "server",
        },
        qps: rig.links.len(),
        seconds: rig.clock.seconds(),
        sent: get(&s.sent),
        received: get(&s.received),
        writes: get(&s.writes),
        reads: get(&s.reads),
        atomics: get(&s.atomics),
        credit_updates: get(&s.credit_updates),
        ops: get(&s.ops),
        bytes: get(&s.bytes),
        cq_events: get(&s.cq_events),
        async_events: get(&s.async_events),
        unread_events: get(&s.unread_events),
        identity_checks: get(&s.identity_checks),
        churned: get(&s.churned),
        heartbeats,
        max_gap_ms: s.max_gap().0 as f64 / 1e6,
        max_stamp_gap_ms: ms(stamps.max_ns),
        max_stamp_gap_at_wall_ms: stamps.max_at_wall_ms,
        max_stamp_gap_mono_ms: ms(stamps.max_mono_ns),
        max_stamp_gap_wall_ms: ms(stamps.max_wall_ns),
        clock_jumps: stamps.jumps,
        stamp_gaps: stamp_gaps(&stamps.gaps),
        registered_bytes: rig.registered(),
        error_count: rig.failures.count(),
        errors: rig.failures.first(),
    }
}

/// Standstills as they are reported.
#[must_use]
pub fn stamp_gaps(gaps: &[Gap]) -> Vec<[i64; 4]> {
    gaps.iter().map(|g| [g.before.wall, g.after.wall, g.before.mono, g.after.mono]).collect()
}

/// The final line when there was no run to report of.
#[must_use]
pub fn failed(error: &str) -> String {
    json!({"event": "result", "ok": false, "error_count": 1, "errors": [error]}).to_string()
}

/// Fails the process when `alive` (process time in nanoseconds) falls more than `limit` seconds behind;
/// returns when it holds the largest number.
pub fn watch_main(alive: &AtomicU64, clock: &Clock, limit: f64) {
    loop {
        std::thread::sleep(Duration::from_millis(500));
        let seen = alive.load(Ordering::SeqCst);
        if seen == u64::MAX {
            return;
        }
        let behind = Duration::from_nanos(clock.now_ns().saturating_sub(seen)).as_secs_f64();
        if behind > limit {
            let _ = crate::timeline::say(&failed(&format!(
                "the main thread is stuck in a verbs call or TCP write for {behind:.0} s"
            )));
            std::process::exit(1);
        }
    }
}

/// Fails the process when the flag returned is not set within `limit`.
#[must_use]
pub fn watchdog(what: &'static str, limit: Duration) -> Arc<AtomicBool> {
    let done = Arc::new(AtomicBool::new(false));
    let seen = done.clone();
    std::thread::spawn(move || {
        for _ in 0..limit.as_millis() / 50 {
            std::thread::sleep(Duration::from_millis(50));
            if seen.load(Ordering::SeqCst) {
                return;
            }
        }
        let threads = crate::stuck::threads().join("; ");
        let _ = crate::timeline::say(&failed(&format!("{what} does not end within {} s: {threads}", limit.as_secs())));
        std::process::exit(1);
    });
    done
}
