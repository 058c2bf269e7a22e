//! The few facts about a process that its state file cannot be trusted for.

use std::fs;
use std::path::PathBuf;

/// A process seen at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// Zombie or dead: only its exit status is left.
    pub gone: bool,
    /// Clock ticks after boot; together with the pid it names a process for good.
    pub start_time: u64,
    /// Pid of the parent.
    pub parent: i32,
}

/// `/proc/PID/stat`, or `None` when there is no such process.
pub fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<Stat> {
    // The name in parentheses may hold anything, even parentheses.
    let rest = &text[text.rfind(')')? + 1..];
    let fields: Vec<&str> = rest.split_whitespace().collect();
    Some(Stat {
        gone: matches!(*fields.first()?, "Z" | "X" | "x"),
        parent: fields.get(1)?.parse().ok()?,
        start_time: fields.get(19)?.parse().ok()?,
    })
}

/// The process' cgroup in the unified hierarchy, relative to its mount point.
pub fn unified_cgroup(pid: i32) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("0::")).map(PathBuf::from)
}

/// All cgroups of the process as (controllers, path); controllers is empty for the unified one.
pub fn cgroups(pid: i32) -> Vec<(String, String)> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let mut parts = line.splitn(3, ':');
            parts.next()?;
            Some((parts.next()?.to_owned(), parts.next()?.to_owned()))
        })
        .collect()
}

/// What fd `n` of the process refers to, as the kernel words it.
pub fn fd_link(pid: i32, n: i32) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{n}")).ok()?;
    Some(link.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let line = "42 (a) b) (c) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 98765 1 2";
        assert_eq!(parse_stat(line), Some(Stat { gone: false, start_time: 98765, parent: 7 }));
    }

    #[test]
    fn this_process_is_alive() {
        let me = stat(std::process::id() as i32).unwrap();
        assert!(!me.gone && me.start_time > 0);
    }
}
