//! What a node holds while a soak is under way: the memory and descriptors of its agent, and kernel objects. Leaks show
//! as numbers that grow.

use anyhow::{Context, Result};
use serde::Serialize;

use crate::lab::agent::AGENT;
use crate::lab::node::Node;

/// RDMA objects that are counted; containers take them along when they move, so their sum over all hosts stays.
const OBJECTS: [&str; 6] = ["qp", "cq", "mr", "pd", "srq", "ctx"];

/// One node at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Vitals {
    /// Resident memory of the agent, KiB.
    pub agent_kib: u64,
    /// Open files of the agent.
    pub agent_files: u64,
    /// Threads of the agent.
    pub agent_threads: u64,
    /// QPs, CQs, MRs, PDs, SRQs and contexts, those of kernel services left out.
    pub objects: [u64; OBJECTS.len()],
    /// Files and directories below `/var/lib/migrrdma` and `/run/migrrdma`.
    pub state_files: u64,
}

impl Vitals {
    /// Asks a node.
    pub fn take(node: &Node) -> Result<Vitals> {
        let script = format!(
            "pid=$(systemctl show -p MainPID --value {AGENT}); \
             sed -n 's/^VmRSS:[^0-9]*\\([0-9]*\\).*/\\1/p' /proc/$pid/status; \
             ls /proc/$pid/fd | wc -l; ls /proc/$pid/task | wc -l; \
             for o in {}; do rdma resource show $o | grep -vc '\\['; done; \
             find /var/lib/migrrdma /run/migrrdma -xdev 2>/dev/null | wc -l",
            OBJECTS.join(" ")
        );
        parse(&node.sh(&script)?).with_context(|| format!("vitals of {}", node.name()))
    }
}

fn parse(text: &str) -> Result<Vitals> {
    let mut numbers = text.lines().map(|l| l.trim().parse::<u64>());
    let mut next = || numbers.next().context("fewer numbers than asked for")?.context("not a number");
    let (agent_kib, agent_files, agent_threads) = (next()?, next()?, next()?);
    let mut objects = [0; OBJECTS.len()];
    for n in &mut objects {
        *n = next()?;
    }
    Ok(Vitals { agent_kib, agent_files, agent_threads, objects, state_files: next()? })
}

/// Objects of all nodes together, in words, when they are not what they were.
pub fn objects_changed(before: &[Vitals], after: &[Vitals]) -> Option<String> {
    let sum = |all: &[Vitals], i: usize| all.iter().map(|v| v.objects[i]).sum::<u64>();
    let changed: Vec<String> = (0..OBJECTS.len())
        .filter(|i| sum(before, *i) != sum(after, *i))
        .map(|i| format!("{} {} instead of {}", sum(after, i), OBJECTS[i], sum(before, i)))
        .collect();
    (!changed.is_empty()).then(|| changed.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_vitals_and_missing_ones_an_error() {
        let v = parse("5120\n31\n9\n4\n3\n2\n1\n0\n1\n77\n").expect("vitals");
        assert_eq!((v.agent_kib, v.agent_files, v.agent_threads, v.state_files), (5120, 31, 9, 77));
        assert_eq!(v.objects, [4, 3, 2, 1, 0, 1]);
        assert!(parse("5120\n31\n").is_err() && parse("").is_err());
    }

    #[test]
    fn objects_may_change_their_host_and_not_their_number() {
        let on = |n| parse(&format!("1\n1\n1\n{n}\n0\n0\n0\n0\n0\n1\n")).expect("vitals");
        assert_eq!(objects_changed(&[on(4), on(0)], &[on(1), on(3)]), None);
        assert_eq!(objects_changed(&[on(4), on(0)], &[on(4), on(1)]).as_deref(), Some("5 qp instead of 4"));
    }
}
