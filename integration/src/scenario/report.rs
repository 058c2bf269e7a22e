//! What a run of scenarios came to: the table, the closing line, the JSON for
//! whoever adds several runs up, and the evidence of a failure.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::RESULTS_ENV;
use crate::lab::Lab;

/// How one scenario ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Outcome {
    /// The claim.
    pub name: String,
    /// Why it failed; empty when it passed.
    pub problems: Vec<String>,
    /// Remarks and numbers.
    pub notes: Vec<String>,
    /// Time it took, cleaning included, in seconds.
    pub seconds: f64,
}

impl Outcome {
    /// Whether the claim held.
    pub fn passed(&self) -> bool {
        self.problems.is_empty()
    }

    /// The result as a few lines of text.
    pub fn line(&self) -> String {
        let word = if self.passed() { "ok" } else { "FAILED" };
        let mut text = format!("      {word} in {:.1} s", self.seconds);
        for note in &self.notes {
            let _ = write!(text, "\n        - {note}");
        }
        for problem in &self.problems {
            let _ = write!(text, "\n        ! {}", problem.replace('\n', "\n          "));
        }
        text
    }
}

/// The results of a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Tally {
    /// In the order they ran.
    pub outcomes: Vec<Outcome>,
}

impl Tally {
    /// How many passed.
    pub fn passed(&self) -> usize {
        self.outcomes.iter().filter(|o| o.passed()).count()
    }

    /// How many failed.
    pub fn failed(&self) -> usize {
        self.outcomes.len() - self.passed()
    }

    /// Prints the table and the closing line.
    pub fn print(&self) {
        println!();
        for o in &self.outcomes {
            let word = if o.passed() { "ok    " } else { "FAILED" };
            println!("{word} {:7.1} s  {}", o.seconds, o.name);
        }
        println!("\n{} passed, {} failed", self.passed(), self.failed());
    }

    /// Writes the tally where [`RESULTS_ENV`] says, if it says so.
    pub fn save(&self) -> Result<()> {
        if let Some(path) = std::env::var_os(RESULTS_ENV) {
            let path = PathBuf::from(path);
            fs::write(&path, serde_json::to_vec_pretty(self)?).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}

/// Saves what the nodes know, before they are reset. Returns the directory.
pub fn keep_evidence(lab: &Lab, name: &str) -> Result<PathBuf> {
    let slug: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(60).collect();
    let dir = lab.paths().lab().join("failures").join(slug);
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir)?;
    for node in lab.nodes()? {
        let script = "for c in 'ps -eo pid,ppid,stat,wchan:20,args --forest' 'dmesg' 'rdma resource show qp' \
            'rdma resource show mr' 'rdma resource show cq' 'rdma statistic show' 'ss -antup' 'mount' \
            'ip netns' 'ip addr' 'ls -laR /run/migrrdma /var/lib/migrrdma /var/crash' \
            'journalctl -b --no-pager -o short-precise'; do echo; echo \"### $c\"; $c 2>&1; done; \
            for f in $(find /run/migrrdma /var/lib/migrrdma /run/libcontainer -name '*.log' -size -2M 2>/dev/null); do \
            echo; echo \"### $f\"; cat $f; done; true";
        let text = match node.sh(script) {
            Ok(text) => text,
            Err(e) => format!("{e:#}\n"),
        };
        fs::write(dir.join(format!("{}.txt", node.name())), text)?;
        let console = &lab.machine(node.spec)?.console;
        let _ = fs::copy(console, dir.join(format!("{}.console", node.name())));
    }
    Ok(dir)
}
