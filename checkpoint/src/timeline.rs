//! When each phase of a migration ran: the one typed value that log lines, the user's summary and figures all read.
//!
//! Two lengths are told apart:
//! - the **pause** is what a peer or the application can notice on RDMA: from the moment the first end is told to
//!   hold its sends (start of [`Phase::Suspend`]) until every end was told to go on (end of [`Phase::Resume`]);
//! - **frozen** is what a program that only computes notices: from the cgroup freeze on the source (start of
//!   [`Phase::Freeze`]) until the destination let the tasks run (within [`Phase::Commit`]).

use crate::image::HandOver;
use crate::phase::Phase;
use serde::{Deserialize, Serialize};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One phase that ran to its end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    pub phase: Phase,
    /// Seconds since the migration began.
    pub start: f64,
    /// Length, seconds.
    pub seconds: f64,
}

/// The finished timeline, as told to people and written to reports.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Begin of the migration, seconds since 1970 by the source's clock.
    pub began: f64,
    pub spans: Vec<Span>,
    /// See the module's text. `None` if the migration ended before.
    pub pause_seconds: Option<f64>,
    pub frozen_seconds: Option<f64>,
    /// How the kernel objects came over; `None` for a container without RDMA.
    #[serde(default)]
    pub hand_over: Option<HandOver>,
    /// Bytes of image sent to the destination inside the pause.
    pub image_bytes: u64,
    /// Bytes sent before it, and in how many rounds.
    #[serde(default)]
    pub pre_copied_bytes: u64,
    #[serde(default)]
    pub pre_copy_rounds: u32,
    /// Registered memory that was sent apart from the image, and how much of that inside the pause, bytes.
    #[serde(default)]
    pub memory_bytes: u64,
    #[serde(default)]
    pub memory_bytes_in_pause: u64,
    /// MRs that moved, and those of them that were registered before the processes were restored.
    #[serde(default)]
    pub mrs_moved: u32,
    #[serde(default)]
    pub mrs_registered_early: u32,
    /// QPs that moved, and QPs of peers that changed over.
    pub qps_moved: u32,
    pub qps_switched: u32,
}

/// A running migration's clock.
#[derive(Debug)]
pub struct Timeline {
    zero: Instant,
    began: f64,
    spans: Vec<Span>,
    running: Option<(Phase, Instant)>,
    released: Option<f64>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self::begin()
    }
}

impl Timeline {
    /// Starts the clock.
    pub fn begin() -> Self {
        let began = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        Timeline { zero: Instant::now(), began, spans: Vec::new(), running: None, released: None }
    }

    /// `phase` starts now; one that was running ends.
    pub fn enter(&mut self, phase: Phase) {
        self.leave();
        self.running = Some((phase, Instant::now()));
    }

    /// The running phase ends; its length in seconds.
    pub fn leave(&mut self) -> Option<f64> {
        let (phase, since) = self.running.take()?;
        let seconds = since.elapsed().as_secs_f64();
        self.spans.push(Span { phase, start: (since - self.zero).as_secs_f64(), seconds });
        Some(seconds)
    }

    /// The phase that runs now.
    pub fn current(&self) -> Option<Phase> {
        self.running.map(|(phase, _)| phase)
    }

    /// The destination's tasks run since then.
    pub fn released(&mut self, at: Instant) {
        self.released = Some((at - self.zero).as_secs_f64());
    }

    /// What can be said so far.
    pub fn summary(&self) -> Summary {
        let start = |phase| self.spans.iter().find(|s| s.phase == phase).map(|s| s.start);
        let end = |phase| self.spans.iter().rev().find(|s| s.phase == phase).map(|s| s.start + s.seconds);
        Summary {
            began: self.began,
            spans: self.spans.clone(),
            pause_seconds: start(Phase::Suspend).zip(end(Phase::Resume)).map(|(a, b)| b - a),
            frozen_seconds: start(Phase::Freeze).zip(self.released).map(|(a, b)| b - a),
            ..Summary::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_is_from_suspend_to_the_end_of_resume() {
        let mut t = Timeline::begin();
        for phase in Phase::ALL {
            t.enter(phase);
            if phase == Phase::Commit {
                t.released(Instant::now());
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        t.leave();
        let s = t.summary();
        assert_eq!(s.spans.len(), Phase::ALL.len());
        let (pause, frozen) = (s.pause_seconds.unwrap(), s.frozen_seconds.unwrap());
        assert!(pause > frozen && frozen > 0.0);
        assert!(pause < s.spans.last().unwrap().start - s.spans[2].start + 1e-3);
    }

    #[test]
    fn an_aborted_migration_tells_no_pause() {
        let mut t = Timeline::begin();
        t.enter(Phase::Negotiate);
        t.leave();
        assert_eq!(t.summary().pause_seconds, None);
    }
}
