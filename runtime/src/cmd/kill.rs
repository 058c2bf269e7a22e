//! `kill`: a signal to the container's init, or to all of its processes.

use anyhow::{Result, bail};
use libcontainer::container::ContainerStatus;
use libcontainer::oci_spec::runtime::LinuxNamespaceType;
use nix::sys::signal::Signal;

use crate::cgroup::signal_pid;
use crate::cli::{Global, Kill};
use crate::store::{self, ContainerHandle};

pub fn run(args: &Kill, global: &Global) -> Result<i32> {
    let signal = parse(&args.signal)?;
    let handle = ContainerHandle::load(super::root(global), &args.id)?;
    let stopped = handle.status() == ContainerStatus::Stopped;
    if args.all {
        // Stragglers of an ended container are the reason to ask for all.
        handle.cgroup()?.kill_all(signal)?;
        return Ok(0);
    }
    let Some(pid) = handle.init_pid().filter(|_| !stopped) else {
        bail!("{}", store::NOT_RUNNING);
    };
    if signal == Signal::SIGKILL as i32 && !has_own_pids(&handle) {
        // Without its own pid namespace nothing ends with init.
        handle.cgroup()?.kill_all(signal)?;
        return Ok(0);
    }
    signal_pid(pid, signal)?;
    Ok(0)
}

fn has_own_pids(handle: &ContainerHandle) -> bool {
    let Ok(spec) = handle.spec() else {
        return true;
    };
    let linux = spec.linux().as_ref();
    linux
        .and_then(|linux| linux.namespaces().as_ref())
        .is_some_and(|all| all.iter().any(|n| n.typ() == LinuxNamespaceType::Pid && n.path().is_none()))
}

/// `9`, `KILL`, `sigkill`, `RTMIN+3`.
fn parse(text: &str) -> Result<i32> {
    let highest = libc::SIGRTMAX();
    if let Ok(number) = text.parse::<i32>() {
        if (0..=highest).contains(&number) {
            return Ok(number);
        }
        bail!("unknown signal {text:?}");
    }
    let upper = text.to_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |rest: &str| -> Option<i32> {
        match rest {
            "" => Some(0),
            rest => rest.trim_start_matches('+').parse().ok(),
        }
    };
    let real_time = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(rest), _) => offset(rest).map(|n| libc::SIGRTMIN() + n),
        (_, Some(rest)) => offset(rest).map(|n| highest + n),
        _ => None,
    };
    if let Some(number) = real_time.filter(|n| (libc::SIGRTMIN()..=highest).contains(n)) {
        return Ok(number);
    }
    match format!("SIG{name}").parse::<Signal>() {
        Ok(signal) => Ok(signal as i32),
        Err(_) => bail!("unknown signal {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn signals_have_numbers_and_names() {
        for text in ["9", "KILL", "SIGKILL", "sigkill"] {
            assert_eq!(parse(text).unwrap(), 9, "{text}");
        }
        assert_eq!(parse("SIGRTMIN+3").unwrap(), libc::SIGRTMIN() + 3);
        for bad in ["", "SIGNOTHING", "-1", "999", "RTMAX+1"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
