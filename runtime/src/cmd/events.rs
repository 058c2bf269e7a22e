//! `events`: statistics from the cgroup, in runc's form, once or for ever.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libcontainer::container::ContainerStatus;
use serde_json::{Value, json};

use crate::cli::{Events, Global};
use crate::report::outln;
use crate::store::ContainerHandle;

pub fn run(args: &Events, global: &Global) -> Result<i32> {
    let root = super::root(global);
    let interval = seconds(&args.interval)?;
    let mut ooms = None;
    loop {
        let handle = match ContainerHandle::load(root, &args.id) {
            Ok(handle) => handle,
            // It was deleted while we watched.
            Err(_) if ooms.is_some() => return Ok(0),
            Err(err) => return Err(err),
        };
        if handle.status() == ContainerStatus::Stopped {
            return match ooms {
                Some(_) => Ok(0),
                None => bail!("container {} is not running", args.id),
            };
        }
        let cgroup = handle.cgroup()?;
        let dir = cgroup.unified().context("statistics need the unified cgroup hierarchy")?;
        let killed = keyed(&dir.join("memory.events")).get("oom_kill").copied().unwrap_or(0);
        if ooms.is_some_and(|before| killed > before) {
            outln!("{}", json!({"type": "oom", "id": args.id}));
        }
        ooms = Some(killed);
        outln!("{}", json!({"type": "stats", "id": args.id, "data": stats(dir)}));
        if args.stats {
            return Ok(0);
        }
        std::thread::sleep(interval);
    }
}

fn stats(dir: &Path) -> Value {
    let cpu = keyed(&dir.join("cpu.stat"));
    let memory = keyed(&dir.join("memory.stat"));
    let of = |map: &BTreeMap<String, u64>, key: &str| map.get(key).copied().unwrap_or(0);
    let nanoseconds = |key: &str| of(&cpu, key).saturating_mul(1000);
    json!({
        "cpu": {
            "usage": {
                "total": nanoseconds("usage_usec"),
                "kernel": nanoseconds("system_usec"),
                "user": nanoseconds("user_usec"),
            },
            "throttling": {
                "periods": of(&cpu, "nr_periods"),
                "throttledPeriods": of(&cpu, "nr_throttled"),
                "throttledTime": nanoseconds("throttled_usec"),
            },
        },
        "memory": {
            "cache": of(&memory, "file"),
            "usage": {
                "usage": number(&dir.join("memory.current")),
                "max": number(&dir.join("memory.peak")),
                "limit": number(&dir.join("memory.max")),
                "failcnt": of(&keyed(&dir.join("memory.events")), "max"),
            },
            "swap": {
                "usage": number(&dir.join("memory.swap.current")),
                "limit": number(&dir.join("memory.swap.max")),
                "failcnt": 0,
            },
            "raw": memory,
        },
        "pids": {
            "current": number(&dir.join("pids.current")),
            "limit": number(&dir.join("pids.max")),
        },
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
    })
}

/// A file with one number; `max` and what is missing count as 0, as runc has it.
fn number(path: &Path) -> u64 {
    fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// A file of `key number` lines.
fn keyed(path: &Path) -> BTreeMap<String, u64> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// Go's notation for the units that make sense here: `500ms`, `5s`, `1m`.
fn seconds(text: &str) -> Result<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let scale = match unit {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => bail!("--interval {text}: write a number with ms, s, m or h"),
    };
    let number: f64 = number.parse().with_context(|| format!("--interval {text}"))?;
    match Duration::try_from_secs_f64(number * scale) {
        Ok(interval) if !interval.is_zero() => Ok(interval),
        _ => bail!("--interval {text} must be positive"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_gos() {
        assert_eq!(seconds("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(seconds("1m").unwrap(), Duration::from_secs(60));
        for bad in ["", "5", "0s", "-1s", "5d"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
