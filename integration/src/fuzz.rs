//! `cargo xtask fuzz`: everything that comes from outside is fed with mutated bytes for a while.
//!
//! The targets lie in `checkpoint/fuzz`; libFuzzer is driven by cargo-fuzz, which is installed below `target/` when it
//! is not there. Inputs that reach something new are kept in `target/fuzz/corpus`, and those that broke something in
//! `target/fuzz/artifacts`. A stable toolchain is enough: the code under test is safe Rust, so a panic or a lot of memory
//! is what can go wrong, and both are noticed without a sanitizer.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::lab::paths::Paths;
use crate::setup;

/// Version of cargo-fuzz that the options below belong to.
const CARGO_FUZZ: &str = "^0.13";
/// Longest input, bytes: longer than any header, short enough to be quick.
const LONGEST: usize = 16 << 10;
/// A target that needs more memory than this has been made to, MiB.
const MEMORY: usize = 1024;

/// What to feed, and for how long.
#[derive(Args, Debug, Clone)]
pub struct Options {
    /// Seconds for each target
    #[arg(long, value_name = "N", default_value_t = 60)]
    pub seconds: u64,
    /// Show the targets
    #[arg(long)]
    pub list: bool,
    /// Only these targets
    pub targets: Vec<String>,
}

/// Runs the targets one after the other. An error names those that broke.
pub fn run(options: &Options) -> Result<()> {
    let paths = Paths::new()?;
    let all = targets(&paths)?;
    if options.list {
        all.iter().for_each(|t| println!("{t}"));
        return Ok(());
    }
    if let Some(unknown) = options.targets.iter().find(|t| !all.contains(t)) {
        bail!("no target called {unknown:?}; there are {}", all.join(", "));
    }
    setup::ensure()?;
    setup::ensure_for_fuzzing()?;
    let tool = tool(&paths)?;
    let mut broken = Vec::new();
    for target in all.iter().filter(|t| options.targets.is_empty() || options.targets.contains(t)) {
        let since = Instant::now();
        let ok = one(&paths, &tool, target, options.seconds)?;
        println!("fuzz: {target}: {}, {:.0} s", if ok { "ok" } else { "BROKEN" }, since.elapsed().as_secs_f64());
        if !ok {
            broken.push(target.as_str());
        }
    }
    ensure!(
        broken.is_empty(),
        "{}: the input is in {}, what it did is above",
        broken.join(", "),
        paths.target.join("fuzz/artifacts").display()
    );
    Ok(())
}

/// The targets' names, from their sources.
fn targets(paths: &Paths) -> Result<Vec<String>> {
    let dir = fuzz_dir(paths).join("fuzz_targets");
    let mut names = Vec::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        names.extend(name.strip_suffix(".rs").map(str::to_owned));
    }
    names.sort();
    Ok(names)
}

fn fuzz_dir(paths: &Paths) -> PathBuf {
    paths.root.join("checkpoint/fuzz")
}

fn one(paths: &Paths, tool: &Path, target: &str, seconds: u64) -> Result<bool> {
    let work = paths.target.join("fuzz");
    let (corpus, artifacts) = (work.join("corpus").join(target), work.join("artifacts").join(target));
    for dir in [&corpus, &artifacts] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let mut command = Command::new(tool);
    // `fuzz` is what cargo would say when it calls the tool.
    command.args(["fuzz", "run", "--sanitizer", "none", "--fuzz-dir"]).arg(fuzz_dir(paths));
    command.arg("--target-dir").arg(work.join("build")).arg(target).arg(&corpus);
    let seeds = fuzz_dir(paths).join("seeds").join(target);
    if seeds.exists() {
        command.arg(seeds);
    }
    command.arg("--").arg(format!("-max_total_time={seconds}")).arg(format!("-max_len={LONGEST}"));
    command.arg(format!("-rss_limit_mb={MEMORY}")).arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.args(["-timeout=20", "-print_final_stats=1", "-verbosity=0"]);
    let status = command.current_dir(&paths.root).stdin(Stdio::null()).status().context("run cargo-fuzz")?;
    Ok(status.success())
}

/// cargo-fuzz, installed if need be.
fn tool(paths: &Paths) -> Result<PathBuf> {
    let root = paths.target.join("tools");
    let program = root.join("bin/cargo-fuzz");
    if !program.exists() {
        eprintln!("fuzz: installing cargo-fuzz, which drives libFuzzer, into {}", root.display());
        let mut install = Command::new(env!("CARGO"));
        install.args(["install", "cargo-fuzz", "--locked", "--version", CARGO_FUZZ, "--root"]).arg(&root);
        setup::run(&mut install).context("install cargo-fuzz")?;
    }
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_built_and_every_seed_belongs_to_one() {
        let paths = Paths::new().expect("paths");
        let manifest = fs::read_to_string(fuzz_dir(&paths).join("Cargo.toml")).expect("manifest");
        let all = targets(&paths).expect("targets");
        assert!(!all.is_empty());
        for target in &all {
            assert!(manifest.contains(&format!("path = \"fuzz_targets/{target}.rs\"")), "{target} is not built");
        }
        for entry in fs::read_dir(fuzz_dir(&paths).join("seeds")).expect("seeds") {
            let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
            assert!(all.contains(&name), "the seeds of {name} belong to no target");
        }
    }
}
