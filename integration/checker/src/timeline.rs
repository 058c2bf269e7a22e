//! Throughput and gaps over time, a line of JSON every 100 ms.

use crate::clock::Reading;
use crate::rig::Rig;
use serde_json::json;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

/// Distance of two lines.
pub const PERIOD: Duration = Duration::from_millis(100);

/// Writes lines to `path` (`-` is standard output) until the rig stops. The file is opened for every
/// line: a file that is open while a container is moved ties the container to that file's size.
pub fn run(rig: &Arc<Rig>, path: &str) {
    let (mut bytes, mut ops) = (0, 0);
    while !rig.stop.load(SeqCst) {
        std::thread::sleep(PERIOD);
        let now = Reading::now();
        let (b, o) = (rig.stats.bytes.load(Relaxed), rig.stats.ops.load(Relaxed));
        let gap = rig.stats.take_window_gap(rig.clock.now_ns());
        let line = json!({
            "event": "sample",
            "t_ms": rig.clock.now_ns() / 1_000_000,
            "mono_ms": now.mono / 1_000_000,
            "wall_ms": now.wall / 1_000_000,
            "bytes": b - bytes,
            "ops": o - ops,
            "max_gap_ms": (gap as f64 / 1e4).round() / 100.0,
        });
        (bytes, ops) = (b, o);
        if let Err(e) = tell(path, &line.to_string()) {
            rig.failures.add(format!("timeline {path}: {e}"));
            return;
        }
    }
}

fn tell(path: &str, line: &str) -> std::io::Result<()> {
    if path == "-" { say(line) } else { append(path.as_ref(), line) }
}

/// Appends one whole line to a file.
///
/// # Errors
/// When it cannot be written.
pub fn append(path: &std::path::Path, line: &str) -> std::io::Result<()> {
    let mut f = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
    f.write_all(format!("{line}\n").as_bytes())
}

/// Writes one whole line to standard output.
///
/// # Errors
/// When nobody reads it any more.
pub fn say(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes())?;
    out.flush()
}
