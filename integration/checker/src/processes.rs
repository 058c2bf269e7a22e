//! Several processes: one for each connection, both ends in one container, a child that sleeps.
#![expect(unsafe_code, reason = "fork and kill")]

use crate::signals;
use crate::timeline::say;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A forked child that only sleeps.
#[derive(Debug)]
pub struct Child(libc::pid_t);

/// Forks a child that sleeps until it is ended: it shares the parent's memory copy-on-write, and
/// holds copies of its descriptors.
///
/// # Errors
/// When the system refuses another process.
pub fn sleeping_child() -> Result<Child> {
    // SAFETY: called before any other thread of this program exists (libraries may have some); the
    // child only makes system calls.
    let pid = unsafe { libc::fork() };
    match pid {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => loop {
            // SAFETY: the default action of SIGTERM ends this child; prctl takes plain numbers.
            unsafe {
                libc::signal(libc::SIGTERM, libc::SIG_DFL);
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                libc::pause();
            }
        },
        pid => Ok(Child(pid)),
    }
}

impl Child {
    /// Ends the child; it must still have been asleep.
    ///
    /// # Errors
    /// When it was gone already, or did not end as told.
    pub fn end(self) -> Result<()> {
        let mut status = 0;
        // SAFETY: the child is ours and not waited for yet.
        unsafe {
            if libc::waitpid(self.0, &raw mut status, libc::WNOHANG) != 0 {
                bail!("the sleeping child had ended (status {status:#x})");
            }
            libc::kill(self.0, libc::SIGKILL);
            if libc::waitpid(self.0, &raw mut status, 0) != self.0 || !libc::WIFSIGNALED(status) {
                bail!("the sleeping child did not end as told (status {status:#x})");
            }
        }
        Ok(())
    }
}

/// Runs this program once for each argument list, passes SIGTERM on, and joins the results: one
/// final line, ok only when all are.
///
/// # Errors
/// When a process cannot be started.
pub fn together(runs: &[Vec<String>]) -> Result<bool> {
    let me = std::env::current_exe().context("own path")?;
    let mut children = Vec::new();
    let mut readers = Vec::new();
    for args in runs {
        let mut child = Command::new(&me)
            .args(args)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {}", me.display()))?;
        let out = child.stdout.take().context("pipe made above")?;
        readers.push(std::thread::spawn(move || {
            let mut last = None;
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if let Ok(v) = serde_json::from_str::<Value>(&line)
                    && v["event"] == "result"
                {
                    last = Some(v);
                    continue;
                }
                let _ = say(&line);
            }
            last
        }));
        children.push(child);
    }
    let mut codes = vec![None; children.len()];
    let mut told = false;
    while codes.iter().any(Option::is_none) {
        if signals::asked_to_stop() && !told {
            told = true;
            for c in &children {
                if let Ok(pid) = libc::pid_t::try_from(c.id()) {
                    // SAFETY: the child is ours and not waited for before its code is known.
                    unsafe { libc::kill(pid, libc::SIGTERM) };
                }
            }
        }
        for (code, c) in codes.iter_mut().zip(&mut children) {
            if code.is_none() {
                *code = c.try_wait()?.map(|s| s.code().unwrap_or(128));
            }
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let results: Vec<Value> = readers
        .into_iter()
        .map(|r| r.join().ok().flatten().unwrap_or(json!({"ok": false, "errors": ["no result"]})))
        .collect();
    let ok = codes.iter().all(|c| *c == Some(0)) && results.iter().all(|r| r["ok"] == true);
    let errors: Vec<&Value> = results.iter().filter_map(|r| r["errors"].as_array()).flatten().collect();
    let sum = |k: &str| results.iter().filter_map(|r| r[k].as_u64()).sum::<u64>();
    let max = |k: &str| results.iter().filter_map(|r| r[k].as_f64()).fold(0.0, f64::max);
    let line = json!({
        "event": "result", "ok": ok, "errors": errors, "error_count": sum("error_count"),
        "sent": sum("sent"), "received": sum("received"), "writes": sum("writes"), "reads": sum("reads"), "atomics": sum("atomics"),
        "ops": sum("ops"), "bytes": sum("bytes"),
        "max_gap_ms": max("max_gap_ms"), "max_stamp_gap_ms": max("max_stamp_gap_ms"),
        "exit_codes": codes, "processes": results,
    });
    say(&line.to_string())?;
    Ok(ok)
}
