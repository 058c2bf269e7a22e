//! What the shim adds to a post and a poll, measured against a libibverbs without a device behind it
//! (`tests/c/stub.c`), on any machine: `cargo bench -p shim-lib`. It prints numbers and judges none of them; runs with and
//! without the shim alternate, and the spread of each is printed beside its median.

#[path = "../tests/library/mod.rs"]
mod library;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use library::library;

/// How often the loop is run with and without the shim.
const ROUNDS: usize = 9;

fn cc(folder: &Path, arguments: &[&str]) -> Result<()> {
    let out = Command::new("cc").arg("-O2").args(arguments).current_dir(folder).output().context("cc")?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// Median, smallest and largest of some times.
fn spread(mut times: Vec<f64>) -> (f64, f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[0], times[times.len() - 1])
}

fn main() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let source = |name: &str| format!("{}/tests/c/{name}", env!("CARGO_MANIFEST_DIR"));
    let script = format!("-Wl,--version-script={}", source("stub.map"));
    let soname = "-Wl,-soname,libibverbs.so.1";
    cc(folder.path(), &["-fPIC", "-shared", soname, &script, "-o", "libibverbs.so.1", &source("stub.c")])?;
    cc(folder.path(), &["-o", "loop", &source("loop.c"), "-L.", "-l:libibverbs.so.1"])?;
    let run = |preload: Option<PathBuf>| -> Result<f64> {
        let mut command = Command::new(folder.path().join("loop"));
        command.env_clear().env("LD_LIBRARY_PATH", folder.path());
        if let Some(file) = preload {
            command.env("LD_PRELOAD", file);
        }
        let out = command.output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        ensure!(out.status.success(), "{}: {text}{}", out.status, String::from_utf8_lossy(&out.stderr));
        Ok(text.trim().parse()?)
    };
    let shim = library()?;
    let (mut without, mut with) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        without.push(run(None)?);
        with.push(run(Some(shim.clone()))?);
    }
    for (name, times) in [("without the shim", &without), ("with the shim", &with)] {
        let (median, low, high) = spread(times.clone());
        println!("post + poll, {name:16}: median {median:.1} ns ({low:.1} to {high:.1}, {ROUNDS} runs)");
    }
    let added: Vec<f64> = with.iter().zip(&without).map(|(a, b)| a - b).collect();
    let (median, low, high) = spread(added);
    println!("added by the shim: median {median:.1} ns ({low:.1} to {high:.1}, paired)");
    Ok(())
}
