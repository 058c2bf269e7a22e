//! What nodes execute in a pause, as QEMU's plugin counts it (`integration/counter`): work rather than time, the same on a
//! busy machine. Only emulated nodes can be counted.
//!
//! Source and destination take turns in a pause, and so do the spans that are counted: of the source from the freeze until
//! the image is there, of the destination from then on until it lets the container run. Whatever else a node does in its
//! span is counted, too.

use super::clocks::Offset;
use crate::lab::node::Node;
use crate::lab::paths::Paths;
use crate::lab::qemu;
use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::time::SystemTime;

/// How often a node is asked for its time; the quickest answer counts.
const ASKED: usize = 5;

/// Numbers of one node, by the machine's clock.
#[derive(Debug, Default, PartialEq)]
pub struct Log(Vec<(f64, u64)>);

impl Log {
    /// From the ring the plugin writes: pairs in any order of age.
    pub fn parse(ring: &[u8]) -> Log {
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        let pairs = ring.chunks_exact(16).map(|pair| (number(&pair[..8]), number(&pair[8..])));
        let mut all: Vec<(f64, u64)> = pairs.filter(|(at, _)| *at > 0).map(|(at, n)| (at as f64 / 1e9, n)).collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        Log(all)
    }

    fn at(&self, time: f64) -> Option<f64> {
        let next = self.0.partition_point(|(at, _)| *at < time);
        let (from, to) = (self.0.get(next.checked_sub(1)?)?, self.0.get(next)?);
        // Nothing is written down while nothing is executed.
        let share = (time - from.0) / (to.0 - from.0).max(f64::EPSILON);
        Some(from.1 as f64 + share * (to.1 as f64 - from.1 as f64))
    }

    /// Executed between two moments; `None` if the log does not reach that far.
    pub fn between(&self, from: f64, to: f64) -> Option<f64> {
        Some(self.at(to)? - self.at(from)?)
    }
}

/// Whether the lab that is up counts.
pub fn are_counted(paths: &Paths, nodes: &[Node]) -> bool {
    let file = |node: &Node| qemu::instructions(&paths.run(), node.name());
    nodes.iter().all(|node| fs::metadata(file(node)).is_ok_and(|meta| meta.len() > 0))
}

/// How far a node's clock is ahead of the machine's, seconds.
pub fn ahead(node: &Node) -> Result<f64> {
    let machine = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map(|d| d.as_secs_f64());
    let mut best = None;
    for _ in 0..ASKED {
        let before = machine()?;
        let said = node.check(&["date", "+%s.%N"])?;
        let after = machine()?;
        let theirs: f64 = said.trim().parse().with_context(|| format!("the time of {}: {said:?}", node.name()))?;
        let one = (after - before, theirs - f64::midpoint(before, after));
        best = Some(best.map_or(one, |best: (f64, f64)| if one.0 < best.0 { one } else { best }));
    }
    Ok(best.context("nobody was asked")?.1)
}

/// Instructions of the pause of a move. `ahead` of source and destination; `None` if the log does not hold all of it.
pub fn of_pause(source: &Log, destination: &Log, ahead: (f64, f64), to: &Offset, summary: &Value) -> Option<u64> {
    let began = summary["began"].as_f64()?;
    let span = |name: &str| summary["spans"].as_array()?.iter().find(|s| s["phase"] == name)?["start"].as_f64();
    let (freeze, restore) = (began + span("freeze")?, began + span("restore")?);
    let runs = freeze + summary["frozen_seconds"].as_f64()?;
    let here = source.between(freeze - ahead.0, restore - ahead.0)?;
    let there = destination.between(to.theirs(restore) - ahead.1, to.theirs(runs) - ahead.1)?;
    Some((here + there).round() as u64)
}

#[cfg(test)]
mod tests {
    use super::super::clocks::Reading;
    use super::*;
    use serde_json::json;

    /// 1000 instructions per second from `from` on, for ten seconds, written down every tenth; the ring has gone round.
    fn ring(from: u64) -> Vec<u8> {
        let pair = |i: u64| [(from * 10 + i) * 100_000_000, i * 100].map(u64::to_le_bytes).concat();
        [(60..=100).flat_map(pair).collect::<Vec<_>>(), vec![0; 16], (0..60).flat_map(pair).collect()].concat()
    }

    #[test]
    fn numbers_between_two_moments_are_those_of_the_ring_whatever_its_order() {
        let log = Log::parse(&ring(50));
        assert_eq!(log.between(52.0, 54.5), Some(2500.0));
        assert!((log.between(52.05, 52.15).unwrap() - 100.0).abs() < 1e-6);
        assert_eq!(log.between(49.0, 52.0), None, "before the first");
        assert_eq!(log.between(52.0, 61.0), None, "after the last");
        assert_eq!(Log::parse(&[1; 15]), Log::default());
    }

    #[test]
    fn a_pause_is_the_source_s_part_and_then_the_destination_s_by_their_own_clocks() {
        // The source is 1 s ahead of the machine, the destination 3 s, so 2 s ahead of the source.
        let reading = Reading { at: 0.0, ahead: 2.0, error: 0.0 };
        let to = Offset { before: reading, after: reading };
        let (source, destination) = (Log::parse(&ring(100)), Log::parse(&ring(100)));
        let summary = json!({"began": 101.0, "frozen_seconds": 4.0, "spans": [
            {"phase": "freeze", "start": 1.0, "seconds": 0.1}, {"phase": "restore", "start": 3.5, "seconds": 1.0}]});
        let got = of_pause(&source, &destination, (1.0, 3.0), &to, &summary);
        // 101.0 … 103.5 and 103.5 … 105.0 by the machine's clock.
        assert_eq!(got, Some(4000));
        assert_eq!(of_pause(&source, &Log::default(), (1.0, 3.0), &to, &summary), None);
        assert_eq!(of_pause(&source, &destination, (1.0, 3.0), &to, &json!({})), None);
    }
}
