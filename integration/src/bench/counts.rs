//! Counts that need no clock: mappings of a container, calls of the RDMA driver within a span of time.
//!
//! Driver calls are counted by the kernel: probes on the driver's own functions, in a trace instance whose clock is the
//! wall clock (TAI with offset 0). A node that cannot do that gives no count, rather than a wrong one.

use crate::lab::node::Node;
use anyhow::{Context, Result};
use std::collections::BTreeMap;

/// Event of a call that changes an object; all others make one.
pub const MODIFY: &str = "modify-qp";

/// Event and the driver's function behind it. Events are named with underscores in the kernel.
const PROBES: &[(&str, &str)] = &[
    ("context", "rxe_alloc_ucontext"),
    ("pd", "rxe_alloc_pd"),
    ("cq", "rxe_create_cq"),
    ("qp", "rxe_create_qp"),
    ("srq", "rxe_create_srq"),
    ("mr", "rxe_reg_user_mr"),
    (MODIFY, "rxe_modify_qp"),
];

/// The trace instance.
const INSTANCE: &str = "/sys/kernel/tracing/instances/migrrdma-bench";
/// The probes' group.
const GROUP: &str = "migrrdma_bench";

/// Sets the probes on a node. False when its kernel cannot do it.
pub fn watch(node: &Node) -> Result<bool> {
    let mut script =
        format!("set -e; cd /sys/kernel/tracing; mkdir -p {INSTANCE}; echo tai > {INSTANCE}/trace_clock\n");
    for (event, function) in PROBES {
        let event = event.replace('-', "_");
        script += &format!("[ -d events/{GROUP}/{event} ] || echo 'p:{GROUP}/{event} {function}' >> kprobe_events\n");
    }
    script += &format!("echo 1 > {INSTANCE}/events/{GROUP}/enable; echo 1 > {INSTANCE}/tracing_on");
    Ok(node.exec(&["sh", "-c", &script])?.success())
}

/// Forgets what was counted so far.
pub fn forget(node: &Node) -> Result<()> {
    node.sh(&format!("echo > {INSTANCE}/trace")).map(drop)
}

/// Takes the probes away again.
pub fn unwatch(node: &Node) {
    let _ = node.exec(&[
        "sh",
        "-c",
        &format!(
            "echo 0 > {INSTANCE}/events/{GROUP}/enable; rmdir {INSTANCE}
             cd /sys/kernel/tracing; grep -o ':{GROUP}/[a-z_]*' kprobe_events | sed 's/^:/-:/' | \
             while read e; do echo \"$e\" >> kprobe_events; done"
        ),
    ]);
}

/// Calls on a node from one moment to another, both by its own wall clock in seconds since 1970.
pub fn calls(node: &Node, from: f64, to: f64) -> Result<BTreeMap<String, u64>> {
    let text = node.sh(&format!("grep -v '^#' {INSTANCE}/trace || true"))?;
    Ok(count(&text, from, to))
}

/// Counts the lines of a trace within a span, by event.
fn count(trace: &str, from: f64, to: f64) -> BTreeMap<String, u64> {
    let mut all: BTreeMap<String, u64> = PROBES.iter().map(|(event, _)| ((*event).to_owned(), 0)).collect();
    for (at, event) in trace.lines().filter_map(parse) {
        if (from..=to).contains(&at)
            && let Some(n) = all.get_mut(&event)
        {
            *n += 1;
        }
    }
    all
}

/// Time and event of a line like `agent-607 [000] ..... 1795441023.158158: mr: (rxe_reg_user_mr+0x4/0x60)`.
fn parse(line: &str) -> Option<(f64, String)> {
    let (before, event) = line.split_once(": ")?;
    let at = before.split_whitespace().next_back()?.parse().ok()?;
    let event = event.split_once(':')?.0.trim().replace('_', "-");
    Some((at, event))
}

/// Mappings of all processes of a container, by its control group.
pub fn mappings(node: &Node, container: &str) -> Result<u64> {
    let text = node.sh(&format!(
        "for p in $(find /sys/fs/cgroup/lab/{container} -name cgroup.procs | xargs cat); do cat /proc/$p/maps; done | wc -l"
    ))?;
    text.trim().parse().with_context(|| format!("mappings of {container} on {}: {text:?}", node.name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_within_the_span_are_counted_by_event() {
        let trace = "# noise\n\
             \x20    agent-607     [000] ..... 1795441023.158158: mr: (rxe_reg_user_mr+0x4/0x60 [rdma_rxe])\n\
             \x20    migrrdma-6 7  [000] ..... 1795441024.000000: modify_qp: (rxe_modify_qp+0x4/0x60 [rdma_rxe])\n\
             \x20    agent-607     [000] ..... 1795441024.500000: mr: (rxe_reg_user_mr+0x4/0x60 [rdma_rxe])\n\
             \x20    agent-607     [000] ..... 1795441026.000000: mr: (rxe_reg_user_mr+0x4/0x60 [rdma_rxe])\n";
        let got = count(trace, 1_795_441_023.5, 1_795_441_025.0);
        assert_eq!((got["mr"], got[MODIFY], got["qp"]), (1, 1, 0));
    }
}
