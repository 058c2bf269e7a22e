//! `cargo xtask test`: unit tests, release build, lab, scenarios, in this
//! order, with `--all` fuzzing after them, and one closing line for all.
//!
//! It decides what is run and adds up; how scenarios are run is the business
//! of [`crate::scenario`].

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::deploy;
use crate::lab::paths::Paths;
use crate::scenario::{RESULTS_ENV, Tally};
use crate::{fuzz, setup};

/// The lab instance tests use unless `MIGRRDMA_LAB` names another: a lab that
/// somebody works in is not reset under their hands.
const TEST_INSTANCE: &str = "test";

/// Seconds for each fuzz target in `--all`.
const FUZZ: u64 = 30;

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Include the long scenarios.
    pub all: bool,
    /// Only scenarios whose name contains one of these, and no unit tests.
    pub filters: Vec<String>,
    /// Leave the lab up.
    pub keep: bool,
}

/// Runs everything; returns whether all of it passed.
pub fn run(options: &Options) -> Result<bool> {
    let start = Instant::now();
    setup::ensure()?;
    let paths = Paths::new()?;
    let mut units = Units::default();
    if options.filters.is_empty() {
        heading("unit tests");
        units = unit_tests(&paths)?;
        if !units.ok {
            println!("\n{} passed, {} failed", units.passed, units.failed.max(1));
            return Ok(false);
        }
    }
    heading("release build");
    deploy::build(&paths)?;
    heading("scenarios in the lab");
    let lab = LabName::choose();
    let in_lab = in_the_lab(&paths, options, &lab);
    if !options.keep {
        lab.apply(Command::new(std::env::current_exe()?).args(["lab", "down"])).status().context("end the lab")?;
    }
    let (tally, shim) = in_lab?;
    units.passed += shim.passed;
    units.failed += shim.failed;
    let mut fuzzed = true;
    if options.all && options.filters.is_empty() {
        heading("fuzzing");
        if let Err(e) = fuzz::run(&fuzz::Options { seconds: FUZZ, list: false, targets: Vec::new() }) {
            println!("fuzzing FAILED: {e:#}");
            fuzzed = false;
            units.failed += 1;
        }
    }
    let minutes = start.elapsed().as_secs_f64() / 60.0;
    println!(
        "\nunit tests: {} passed, {} failed; scenarios: {} passed, {} failed; {minutes:.1} min in all",
        units.passed,
        units.failed,
        tally.passed(),
        tally.failed()
    );
    println!("{} passed, {} failed", units.passed + tally.passed(), units.failed + tally.failed());
    Ok(tally.failed() == 0 && shim.ok && fuzzed)
}

/// Which lab instance to use.
struct LabName(Option<&'static str>);

impl LabName {
    fn choose() -> LabName {
        LabName(std::env::var_os("MIGRRDMA_LAB").is_none().then_some(TEST_INSTANCE))
    }

    fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        match self.0 {
            Some(name) => command.env("MIGRRDMA_LAB", name),
            None => command,
        }
    }
}

/// The scenarios and, on the same nodes, the shim under programs that know
/// nothing of it.
fn in_the_lab(paths: &Paths, options: &Options, lab: &LabName) -> Result<(Tally, Units)> {
    let tally = scenarios(paths, options, lab)?;
    if !options.all {
        return Ok((tally, Units { ok: true, ..Units::default() }));
    }
    heading("the shim under ordinary programs, in the lab");
    let mut command = Command::new(env!("CARGO"));
    command.args(["test", "-p", "shim-lib", "--test", "lab", "--", "--ignored", "--test-threads", "1"]);
    let mut shim = count(paths, lab.apply(&mut command))?;
    if !shim.ok {
        // A test that does not even compile has failed, too.
        shim.failed = shim.failed.max(1);
    }
    Ok((tally, shim))
}

fn heading(text: &str) {
    println!("\n── {text} ──");
}

/// Results of `cargo test`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Units {
    passed: usize,
    failed: usize,
    ok: bool,
}

impl Units {
    /// Adds one `test result:` line.
    fn add(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result:") else { return };
        let number_before = |word: &str| {
            let end = rest.find(word)?;
            rest[..end].split_whitespace().last()?.parse::<usize>().ok()
        };
        self.passed += number_before(" passed").unwrap_or(0);
        self.failed += number_before(" failed").unwrap_or(0);
    }
}

fn unit_tests(paths: &Paths) -> Result<Units> {
    count(paths, Command::new(env!("CARGO")).args(["test", "--workspace", "--no-fail-fast"]))
}

/// Runs a `cargo test` and counts what its output says.
fn count(paths: &Paths, command: &mut Command) -> Result<Units> {
    let mut child = command
        .current_dir(&paths.root)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("run cargo test")?;
    let mut units = Units::default();
    let stdout = child.stdout.take().context("cargo test's output")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        units.add(&line);
        println!("{line}");
    }
    units.ok = child.wait()?.success();
    ensure!(!units.ok || units.passed > 0, "cargo test ran no test at all");
    Ok(units)
}

fn scenarios(paths: &Paths, options: &Options, lab: &LabName) -> Result<Tally> {
    let results = paths.lab().join("results.json");
    fs::create_dir_all(paths.lab())?;
    let _ = fs::remove_file(&results);
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("scenarios");
    if options.all {
        command.arg("--all");
    }
    // More is done on these nodes afterwards.
    command.arg("--keep");
    command.args(&options.filters);
    let status = lab
        .apply(&mut command)
        .current_dir(&paths.root)
        .env(RESULTS_ENV, &results)
        .stdin(Stdio::null())
        .status()
        .context("run the scenarios")?;
    let tally: Tally = match fs::read(&results) {
        Ok(bytes) => serde_json::from_slice(&bytes).context("results of the scenarios")?,
        Err(_) => bail!("the scenarios could not be run ({status}); the reason is above"),
    };
    // A runner that died half way has a tally without a failure in it.
    ensure!(status.success() || tally.failed() > 0, "the scenarios ended early ({status}); the reason is above");
    ensure!(!tally.outcomes.is_empty(), "no scenario was run");
    Ok(tally)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_results_of_several_test_binaries_add_up() {
        let mut units = Units::default();
        units.add("running 3 tests");
        units.add("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        units.add("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out");
        assert_eq!((units.passed, units.failed), (15, 2));
    }
}
