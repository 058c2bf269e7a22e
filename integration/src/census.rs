//! Counting what is on a node, so that a test can show it left nothing behind
//! and took nothing away.
//!
//! A census is a set of lines per subject with everything accidental (process
//! ids, inode and object numbers) left out; two of them are compared as
//! multisets. It counts and compares, it cleans nothing up.

use std::collections::BTreeMap;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::lab::node::Node;
use crate::lab::wire::GUEST_PORT;

/// Directories whose entries are counted. The project's own state first, then
/// the places where temporary things of any program end up.
const STATE_DIRS: &[&str] = &[
    "/run/migrrdma",
    "/run/migrrdma-agent",
    "/var/lib/migrrdma",
    "/etc/migrrdma",
    "/usr/local/lib/migrrdma",
    "/run/libcontainer",
    "/run/runc",
    "/run/youki",
    "/run/criu",
    "/srv/lab/bundles",
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/var/crash",
];

/// The end of an agent's address.
const AGENT: &str = ":7477";

/// What one node held at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeCensus {
    /// Subject and line, with how often it was there.
    lines: BTreeMap<(String, String), u32>,
}

/// One line that two censuses disagree about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What kind of thing: `process`, `mount`, `qp`, …
    pub subject: String,
    /// The thing, normalised.
    pub line: String,
    /// How many were there before and after.
    pub before: u32,
    /// See `before`.
    pub after: u32,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let how = if self.after > self.before { "left behind" } else { "gone" };
        write!(f, "{} {how}: {}", self.subject, self.line)?;
        if self.before.abs_diff(self.after) > 1 || self.before.min(self.after) > 0 {
            write!(f, " ({} before, {} after)", self.before, self.after)?;
        }
        Ok(())
    }
}

impl NodeCensus {
    /// Counts what is on `node` now.
    pub fn take(node: &Node) -> Result<NodeCensus> {
        let text = node.sh(&script()).with_context(|| format!("census of {}", node.name()))?;
        Ok(NodeCensus::parse(&text))
    }

    /// What differs between `self` (before) and `after`.
    pub fn changes(&self, after: &NodeCensus) -> Vec<Change> {
        let mut keys: Vec<_> = self.lines.keys().chain(after.lines.keys()).collect();
        keys.sort();
        keys.dedup();
        keys.into_iter()
            .filter_map(|key| {
                let before = self.lines.get(key).copied().unwrap_or(0);
                let now = after.lines.get(key).copied().unwrap_or(0);
                (before != now).then(|| Change { subject: key.0.clone(), line: key.1.clone(), before, after: now })
            })
            .collect()
    }

    /// How many lines of a subject there are, e.g. `qp`.
    pub fn count(&self, subject: &str) -> u32 {
        self.lines.iter().filter(|((s, _), _)| s == subject).map(|(_, n)| n).sum()
    }

    /// Waits up to `wait` for the node to hold again what it held at `self`;
    /// returns what still differs then. Kernels reap some things late.
    pub fn settle(&self, node: &Node, wait: Duration) -> Result<Vec<Change>> {
        let deadline = Instant::now() + wait;
        loop {
            let changes = self.changes(&NodeCensus::take(node)?);
            if changes.is_empty() || Instant::now() >= deadline {
                return Ok(changes);
            }
            thread::sleep(Duration::from_millis(300));
        }
    }

    fn parse(text: &str) -> NodeCensus {
        let mut census = NodeCensus::default();
        let mut subject = "";
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("== ") {
                subject = name;
                continue;
            }
            if let Some(line) = normalise(subject, line) {
                *census.lines.entry((subject.to_owned(), line)).or_default() += 1;
            }
        }
        census
    }
}

fn script() -> String {
    // `ps` first: what the later commands start is not counted.
    format!(
        "echo '== process'; ps -eo pid=,ppid=,comm=,args=
echo '== mount'; cut -d' ' -f4- /proc/self/mountinfo
for o in qp cq mr pd srq ctx cm_id; do echo \"== $o\"; rdma resource show $o; done
echo '== socket'; ss -Hantux
echo '== netns'; ls /run/netns 2>/dev/null
echo '== link'; ls /sys/class/net
echo '== cgroup'; find /sys/fs/cgroup -mindepth 1 -type d
echo '== firewall'; nft list ruleset
echo '== sysv'; tail -qn +2 /proc/sysvipc/shm /proc/sysvipc/sem /proc/sysvipc/msg
echo '== file'; find {} -xdev -mindepth 1 -printf '%y %p\\n' 2>/dev/null
true",
        STATE_DIRS.join(" ")
    )
}

/// The line without what changes from run to run; `None` for what is no
/// business of a census.
fn normalise(subject: &str, line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    if words.is_empty() {
        return None;
    }
    match subject {
        "process" => process(&words),
        "mount" => mount(&words),
        "socket" => socket(&words),
        "qp" | "cq" | "mr" | "pd" | "srq" | "ctx" | "cm_id" => rdma_object(&words),
        // The managers of the system's own services come and go.
        "cgroup" => {
            let path = words[0].strip_prefix("/sys/fs/cgroup/")?;
            let own = ["system.slice", "user.slice", "init.scope", "machine.slice"];
            (!own.iter().any(|s| path.starts_with(s)) && !path.ends_with(".mount")).then(|| path.to_owned())
        }
        // A bundle's upper and lower trees are its own business.
        "file" => {
            let path = words.get(1)?;
            let inner = path.strip_prefix("/srv/lab/bundles/").is_some_and(|rest| rest.contains('/'));
            let systemd = path.contains("systemd-private-");
            // The shim is installed once, under its content's name, and stays.
            let shim = path.starts_with("/var/lib/migrrdma/shim");
            (!inner && !systemd && !shim && !is_record(words[0], path)).then(|| words.join(" "))
        }
        _ => Some(words.join(" ")),
    }
}

/// What an agent remembers on purpose: how migrations ended, which numbers moved containers still show, and the
/// directories it keeps them and its images in. What lies in the image directories counts.
fn is_record(kind: &str, path: &str) -> bool {
    let Some(rest) = path.strip_prefix("/var/lib/migrrdma/") else { return false };
    let json = rest.ends_with(".json");
    (kind == "d" && !rest.contains('/')) || (json && (rest.starts_with("migrations/") || rest.starts_with("moved/")))
}

fn process(words: &[&str]) -> Option<String> {
    let [pid, ppid, comm, args @ ..] = words else {
        return None;
    };
    let kernel = *pid == "2" || *ppid == "2";
    // The census itself, and helpers udev keeps for a while.
    let own = args.join(" ").contains("== process") || (*comm == "ps" && args.contains(&"-eo"));
    let passing = comm.contains("udev-worker") || comm.contains("sd-");
    (!kernel && !own && !passing).then(|| args.join(" "))
}

fn mount(words: &[&str]) -> Option<String> {
    // root mountpoint options [optional]* - fstype source superoptions
    let dash = words.iter().position(|w| *w == "-")?;
    let (point, rest) = (words.get(1)?, &words[dash + 1..]);
    // An automount that may fire at any moment.
    if point.contains("binfmt_misc") || point.starts_with("/run/credentials/") {
        return None;
    }
    // `ip netns` makes this one at its first use and keeps it for ever.
    if *point == "/run/netns" && rest.first() == Some(&"tmpfs") {
        return None;
    }
    Some(format!("{point} {} {} from {}", rest.first()?, rest.get(1)?, words.first()?))
}

fn socket(words: &[&str]) -> Option<String> {
    let [kind, state, _, _, local, rest @ ..] = words else {
        return None;
    };
    if kind.starts_with("u_") {
        // Unnamed and connected unix sockets belong to processes that are
        // counted; a listening one has a name.
        return (*state == "LISTEN").then(|| format!("{kind} {local}"));
    }
    let control = format!(":{GUEST_PORT}");
    // Agents keep connections to each other.
    let agents = *state == "ESTAB" && (local.ends_with(AGENT) || rest.first().is_some_and(|p| p.ends_with(AGENT)));
    if local.ends_with(&control) || *state == "TIME-WAIT" || agents {
        return None;
    }
    match *state {
        "LISTEN" | "UNCONN" => Some(format!("{kind} {state} {local}")),
        _ => {
            // The local port of an outgoing connection is accidental.
            let host = local.rsplit_once(':').map_or(*local, |(h, _)| h);
            let peer = rest.first().copied().unwrap_or("");
            Some(format!("{kind} {state} {host} to {peer}"))
        }
    }
}

fn rdma_object(words: &[&str]) -> Option<String> {
    // Objects of kernel services carry their module's name in brackets.
    if words.iter().any(|w| w.starts_with('[')) {
        return None;
    }
    let keep = ["link", "dev", "type", "state", "comm", "cqe", "mrlen"];
    let mut out = Vec::new();
    for pair in words.windows(2) {
        if keep.contains(&pair[0]) {
            out.push(pair.join(" "));
        }
    }
    Some(out.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: &str = "== process
 1 0 systemd /sbin/init
 2 0 kthreadd [kthreadd]
 9 2 kworker/0:1 [kworker/0:1-events]
 77 60 sh sh -c echo '== process'; ps
 78 77 ps ps -eo pid=,ppid=,comm=,args=
== mount
/ / rw,noatime shared:1 - ext4 /dev/vda rw
== qp
link rxe0/1 lqpn 1 type GSI state RTS sq-psn 0 comm [ib_core]
== socket
tcp LISTEN 0 128 0.0.0.0:4711 0.0.0.0:*
tcp ESTAB 0 0 10.0.2.15:4711 10.0.2.2:33598
";

    #[test]
    fn an_agents_records_do_not_count_but_images_left_behind_do() {
        for kept in ["d /var/lib/migrrdma/outgoing", "f /var/lib/migrrdma/moved/a.moved.json"] {
            assert_eq!(normalise("file", kept), None, "{kept}");
        }
        for left in ["d /var/lib/migrrdma/outgoing/ab", "f /var/lib/migrrdma/incoming/ab/images/core-1.img"] {
            assert!(normalise("file", left).is_some(), "{left}");
        }
        assert_eq!(normalise("socket", "tcp ESTAB 0 0 10.10.0.1:7477 10.10.0.3:35160"), None);
        assert!(normalise("socket", "tcp LISTEN 0 0 10.10.0.1:7477 0.0.0.0:*").is_some());
    }

    #[test]
    fn a_node_seen_twice_with_other_numbers_is_unchanged() {
        let again = BEFORE.replace("77", "1077").replace("33598", "44000");
        let a = NodeCensus::parse(BEFORE);
        assert_eq!(a.changes(&NodeCensus::parse(&again)), vec![]);
        assert_eq!(a.count("process"), 1);
    }

    #[test]
    fn what_was_left_behind_and_what_is_gone_is_named() {
        let after = "== process
== mount
/ / rw,noatime shared:1 - ext4 /dev/vda rw
/ /srv/lab/x rw - overlay lab-x rw
== qp
link rxe0/1 lqpn 17 rqpn 17 type RC state RTS rq-psn 7 sq-psn 8 path-mig-state MIGRATED pdn 1 pid 518 comm checker
== socket
tcp ESTAB 0 0 10.10.0.1:42680 10.10.0.3:22427
";
        let changes: Vec<String> =
            NodeCensus::parse(BEFORE).changes(&NodeCensus::parse(after)).iter().map(ToString::to_string).collect();
        assert_eq!(
            changes,
            [
                "mount left behind: /srv/lab/x overlay lab-x from /",
                "process gone: /sbin/init",
                "qp left behind: link rxe0/1 type RC state RTS comm checker",
                "socket left behind: tcp ESTAB 10.10.0.1 to 10.10.0.3:22427",
            ]
        );
    }
}
