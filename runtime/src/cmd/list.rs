//! `list`: all containers below the root.

use anyhow::Result;

use crate::cli::{Global, List, ListFormat};
use crate::report::outln;
use crate::store::{self, ContainerHandle};

pub fn run(args: &List, global: &Global) -> Result<i32> {
    let root = super::root(global);
    let ids = store::ids(root)?;
    if args.quiet {
        for id in &ids {
            outln!("{id}");
        }
        return Ok(0);
    }
    // One that vanishes meanwhile, or is broken, must not hide the others.
    let all: Vec<_> = ids
        .iter()
        .filter_map(|id| ContainerHandle::load(root, id).ok())
        .map(|handle| super::state::describe(&handle))
        .collect();
    match args.format {
        ListFormat::Json => {
            outln!("{}", serde_json::to_string(&all)?);
        }
        ListFormat::Table => {
            outln!("{:<24} {:<10} {:<10} {:<32} CREATED", "ID", "PID", "STATUS", "BUNDLE");
            for one in &all {
                let text = |key: &str| one[key].as_str().unwrap_or("").to_owned();
                outln!(
                    "{:<24} {:<10} {:<10} {:<32} {}",
                    text("id"),
                    one["pid"],
                    text("status"),
                    text("bundle"),
                    text("created")
                );
            }
        }
    }
    Ok(0)
}
