//! What the shim adds to a post and a poll, measured against a libibverbs without a device behind it
//! (`tests/c/stub.c`), on any machine. Run it with `--release --nocapture` to see the numbers.

mod library;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use library::library;

/// Nanoseconds that a post and a poll together may take more, on a busy machine and without optimisation.
const LIMIT: f64 = 250.0;

fn cc(folder: &Path, arguments: &[&str]) -> Result<()> {
    let out = Command::new("cc").arg("-O2").args(arguments).current_dir(folder).output().context("cc")?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

#[test]
fn a_post_and_a_poll_cost_little_more_with_the_shim() -> Result<()> {
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
    let plain = run(None)?;
    let shim = run(Some(library()?))?;
    println!("post + poll: {plain:.1} ns without the shim, {shim:.1} ns with it");
    ensure!(shim > plain, "the shim was not in the way at all");
    ensure!(shim - plain < LIMIT, "the shim adds {:.1} ns to a post and a poll", shim - plain);
    Ok(())
}
