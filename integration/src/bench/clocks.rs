//! Which clock tells how long a container stood still, and how wrong it may be.
//!
//! The stamps of a moved container come from two machines. Its monotonic clock says nothing: it is another machine's
//! after the move (or is carried along where there is a time namespace, and then leaves the pause out). So the wall
//! clocks are used, and how far they are apart is measured just before and just after each move, by questions over the
//! network of which the quickest counts. In between the offset is taken to change evenly. The error is half the slower
//! of the two quickest rounds; it is kept with every measurement.

use crate::lab::node::{Node, Running};
use anyhow::{Context, Result};
use serde_json::Value;

/// Where the checker lies on a node, outside of any container.
pub const TOOL: &str = "/usr/local/bin/migrrdma-bench-checker";
const PORT: u16 = 18600;

/// How far another clock is ahead, at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading {
    /// Own wall clock, seconds since 1970.
    pub at: f64,
    /// Seconds.
    pub ahead: f64,
    /// Largest error, seconds.
    pub error: f64,
}

/// How far another clock is ahead during a span of time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Offset {
    /// At its begin.
    pub before: Reading,
    /// At its end.
    pub after: Reading,
}

impl Offset {
    /// How far it was ahead when the own clock showed `at`; beyond the span as at its ends.
    pub fn ahead_at(&self, at: f64) -> f64 {
        let (a, b) = (self.before, self.after);
        let share = if b.at > a.at { ((at - a.at) / (b.at - a.at)).clamp(0.0, 1.0) } else { 0.0 };
        a.ahead + share * (b.ahead - a.ahead)
    }

    /// Largest error, seconds.
    pub fn error(&self) -> f64 {
        self.before.error.max(self.after.error)
    }

    /// A moment of the own clock as the other one showed it.
    pub fn theirs(&self, own: f64) -> f64 {
        own + self.ahead_at(own)
    }
}

/// Answers other nodes' questions until dropped.
pub fn answer(node: &Node) -> Result<Running> {
    let running = node.spawn(&[TOOL, "clock", "--port", &PORT.to_string()])?;
    Ok(running)
}

/// Asks how far `whom` is ahead of `node`.
pub fn ask(node: &Node, whom: &Node) -> Result<Reading> {
    let to = format!("{}:{PORT}", whom.spec.rdma_ip());
    let text = node
        .check(&[TOOL, "clock", "--ask", &to, "--rounds", "40"])
        .with_context(|| format!("clock of {}", whom.name()))?;
    parse(&text).with_context(|| format!("clock of {}: {text:?}", whom.name()))
}

fn parse(text: &str) -> Option<Reading> {
    let v: Value = serde_json::from_str(text.lines().last()?).ok()?;
    let seconds = |k: &str| v[k].as_i64().map(|n| n as f64 / 1e9);
    Some(Reading { at: seconds("at_ns")?, ahead: seconds("ahead_ns")?, error: seconds("error_ns")? })
}

/// One standstill as the checker reports it, in seconds of the clocks it was stamped with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gap {
    /// Last stamp before it, by the clock of the machine it was on then.
    pub before: f64,
    /// First stamp after it, likewise.
    pub after: f64,
}

/// Standstills in the result of a checker, of all its processes.
pub fn gaps(result: &Value) -> Vec<Gap> {
    let own = result["stamp_gaps"].as_array().into_iter().flatten();
    let theirs = result["processes"].as_array().into_iter().flatten().flat_map(|p| {
        let gaps = p["stamp_gaps"].as_array();
        gaps.into_iter().flatten()
    });
    own.chain(theirs)
        .filter_map(|g| {
            let at = |i: usize| g.get(i)?.as_i64().map(|ns| ns as f64 / 1e9);
            Some(Gap { before: at(0)?, after: at(1)? })
        })
        .collect()
}

/// Length in seconds of the standstill of a move: the longest one that began between two moments of the source's clock,
/// its end being on the destination.
pub fn standstill(gaps: &[Gap], from: f64, to: f64, destination: &Offset) -> Option<f64> {
    let began_then = gaps.iter().filter(|g| (from..=to).contains(&g.before));
    let longest = began_then.max_by(|a, b| (a.after - a.before).total_cmp(&(b.after - b.before)))?;
    Some(longest.after - destination.ahead_at(longest.after) - longest.before)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn offset(before: (f64, f64), after: (f64, f64)) -> Offset {
        let reading = |(at, ahead)| Reading { at, ahead, error: 0.001 };
        Offset { before: reading(before), after: reading(after) }
    }

    #[test]
    fn the_offset_changes_evenly_between_its_readings() {
        let o = offset((100.0, 0.5), (110.0, 0.6));
        assert!((o.ahead_at(105.0) - 0.55).abs() < 1e-9);
        assert_eq!((o.ahead_at(0.0), o.ahead_at(1e9)), (0.5, 0.6));
        assert_eq!(o.error(), 0.001);
        assert!((o.theirs(110.0) - 110.6).abs() < 1e-9);
    }

    #[test]
    fn the_standstill_of_a_move_is_free_of_the_clocks_offset() {
        let gaps = [
            Gap { before: 90.0, after: 99.0 },
            Gap { before: 101.0, after: 101.03 },
            // 2 s on a destination that is 0.5 s ahead.
            Gap { before: 103.0, after: 105.5 },
            Gap { before: 120.0, after: 125.0 },
        ];
        let o = offset((100.0, 0.5), (110.0, 0.5));
        let got = standstill(&gaps, 100.0, 110.0, &o).unwrap();
        assert!((got - 2.0).abs() < 1e-9);
        assert_eq!(standstill(&gaps, 200.0, 210.0, &o), None);
    }

    #[test]
    fn standstills_of_one_process_and_of_several_are_found() {
        let one = json!({"stamp_gaps": [[1_000_000_000i64, 3_000_000_000i64, 1, 2]]});
        assert_eq!(gaps(&one), [Gap { before: 1.0, after: 3.0 }]);
        assert_eq!(gaps(&json!({"processes": [one, one]})).len(), 2);
    }

    #[test]
    fn an_answer_of_the_checker_is_read() {
        let r =
            parse("{\"ahead_ns\":76020433,\"at_ns\":2000000000,\"error_ns\":307703,\"event\":\"offset\"}\n").unwrap();
        assert!((r.ahead - 0.076_020_433).abs() < 1e-12 && r.at == 2.0);
        assert!(parse("nothing").is_none());
    }
}
