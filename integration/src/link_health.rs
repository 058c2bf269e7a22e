//! Proof that the lab's links stayed lossless: on a link that drops, rxe's
//! own retry bugs give wrong answers that no migration caused.
//!
//! Counters are read before and after; only differences count.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::lab::node::Node;
use crate::lab::topology::{LAN_IF, RDMA_IF};

/// Counters that must not move in an undisturbed run.
const FATAL: &[&str] = &[
    "retry_exceeded_err",
    "retry_rnr_exceeded_err",
    "send_err",
    "link_downed",
    "rdma qdisc drops",
    "lan qdisc drops",
    "rdma rx errors",
    "rdma rx dropped",
    "rdma tx errors",
    "rdma tx dropped",
];

/// A gap in the sequence: on a link that dropped nothing it comes from rxe going back after a timer of its own fired
/// (see [`RETRIED`]), which happens when the build machine is busy. Without such a timer it is fatal, too.
const GAPS: &[&str] = &["out_of_seq_request", "rcvd_seq_err"];

/// A sender's timer fired and it sent again.
const RETRIED: &str = "completer_retry_err";

/// Counters worth knowing: emulated nodes are slow, so timers fire early.
const TELLING: &[&str] = &["duplicate_request", RETRIED, "out_of_seq_request", "rcvd_seq_err"];

/// The counters of one node at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkHealth {
    counters: BTreeMap<String, u64>,
}

impl LinkHealth {
    /// Reads a node's counters.
    pub fn take(node: &Node) -> Result<LinkHealth> {
        let device = node.spec.rdma_device;
        let text = node
            .sh(&format!(
                "rdma statistic show link {device}/1
echo == {RDMA_IF}; tc -s -j qdisc show dev {RDMA_IF} root
echo == {LAN_IF}; tc -s -j qdisc show dev {LAN_IF} root
echo == stats; ip -s -j link show {RDMA_IF}"
            ))
            .with_context(|| format!("link counters of {}", node.name()))?;
        parse(&text).with_context(|| format!("link counters of {}", node.name()))
    }

    /// A counter's value; 0 when there is none of that name.
    pub fn get(&self, name: &str) -> u64 {
        self.counters.get(name).copied().unwrap_or(0)
    }

    /// Whether a sender of this node sent again because a timer fired.
    pub fn retried(&self, after: &LinkHealth) -> bool {
        after.get(RETRIED) > self.get(RETRIED)
    }

    /// Counters that moved since `self` and must not have, except those in
    /// `allowed`: a test that kills a node expects retries to run out.
    /// `retried`: some node's [`LinkHealth::retried`].
    pub fn violations(&self, after: &LinkHealth, allowed: &[String], retried: bool) -> Vec<String> {
        let gaps = if retried { &[] } else { GAPS };
        self.moved(after, FATAL)
            .chain(self.moved(after, gaps))
            .filter(|(name, _)| !allowed.iter().any(|a| a == name))
            .map(|(name, by)| format!("{name} +{by}"))
            .collect()
    }

    /// Counters that moved and may.
    pub fn remarks(&self, after: &LinkHealth) -> Vec<String> {
        self.moved(after, TELLING).map(|(name, by)| format!("{name} +{by}")).collect()
    }

    fn moved<'a>(
        &'a self,
        after: &'a LinkHealth,
        names: &'a [&'static str],
    ) -> impl Iterator<Item = (&'static str, u64)> + 'a {
        names.iter().map(|name| (*name, after.get(name).saturating_sub(self.get(name)))).filter(|(_, by)| *by > 0)
    }
}

fn parse(text: &str) -> Result<LinkHealth> {
    let mut health = LinkHealth::default();
    let mut section = "";
    let mut seen = 0;
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("== ") {
            section = name;
            continue;
        }
        match section {
            "" => {
                let mut words = line.split_whitespace();
                if let (Some(name), Some(value)) = (words.next(), words.next())
                    && let Ok(value) = value.parse()
                {
                    health.counters.insert(name.to_owned(), value);
                }
            }
            "stats" => {
                let all: Value = serde_json::from_str(line).context("ip -j link")?;
                let stats = &all[0]["stats64"];
                for (way, what) in [("rx", "errors"), ("rx", "dropped"), ("tx", "errors"), ("tx", "dropped")] {
                    let n = stats[way][what].as_u64().context("ip -j link: counter")?;
                    health.counters.insert(format!("rdma {way} {what}"), n);
                    seen += 1;
                }
            }
            net => {
                let all: Value = serde_json::from_str(line).context("tc -j qdisc")?;
                let drops = all[0]["drops"].as_u64().context("tc -j qdisc: drops")?;
                health.counters.insert(format!("{net} qdisc drops"), drops);
                seen += 1;
            }
        }
    }
    // A counter that cannot be read must not look like one that stayed still.
    anyhow::ensure!(seen == 6, "expected 6 interface counters, found {seen}");
    anyhow::ensure!(health.counters.contains_key("rcvd_seq_err"), "no rdma statistic");
    Ok(health)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(seq: u64, drops: u64, dup: u64) -> String {
        format!(
            "link rxe0/1 \n    rcvd_seq_err {seq} \n    duplicate_request {dup} \n== rdma\n[{{\"drops\":{drops}}}]\n== lan\n[{{\"drops\":0}}]\n== stats\n[{{\"stats64\":{{\"rx\":{{\"errors\":0,\"dropped\":10}},\"tx\":{{\"errors\":0,\"dropped\":0}}}}}}]\n"
        )
    }

    #[test]
    fn a_drop_or_a_sequence_error_is_a_violation_and_a_duplicate_a_remark() {
        let before = parse(&text(1, 0, 5)).unwrap();
        let after = parse(&text(3, 2, 9)).unwrap();
        assert_eq!(before.violations(&after, &[], false), ["rdma qdisc drops +2", "rcvd_seq_err +2"]);
        assert_eq!(before.violations(&after, &["rcvd_seq_err".into()], false), ["rdma qdisc drops +2"]);
        assert_eq!(before.violations(&after, &[], true), ["rdma qdisc drops +2"], "a timer explains a gap, not a drop");
        assert_eq!(before.remarks(&after), ["duplicate_request +4", "rcvd_seq_err +2"]);
        assert!(before.violations(&before.clone(), &[], false).is_empty());
    }

    #[test]
    fn missing_counters_are_an_error_not_a_zero() {
        assert!(parse("").is_err());
        assert!(parse(&text(0, 0, 0).replace("rcvd_seq_err", "x")).is_err());
    }
}
