//! Where the library under test is. It runs nothing.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// The library as cargo built it for this test run.
pub fn library() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let deps = exe.parent().context("the test has a folder")?;
    [deps.join("libmigrrdma.so"), deps.with_file_name("libmigrrdma.so")]
        .into_iter()
        .filter_map(|p| Some((p.metadata().ok()?.modified().ok()?, p)))
        .max()
        .map(|(_, p)| p)
        .context("libmigrrdma.so was not built beside this test")
}
