//! `list`: all containers below the root.

use anyhow::Result;

use crate::cli::{Global, List, ListFormat};
use crate::store::{self, ContainerHandle};

pub fn run(args: &List, global: &Global) -> Result<i32> {
    let root = super::root(global);
    let ids = store::ids(root)?;
    if args.quiet {
        ids.iter().for_each(|id| println!("{id}"));
        return Ok(0);
    }
    // One that vanishes meanwhile, or is broken, must not hide the others.
    let all: Vec<_> = ids
        .iter()
        .filter_map(|id| ContainerHandle::load(root, id).ok())
        .map(|handle| super::state::describe(&handle))
        .collect();
    match args.format {
        ListFormat::Json => println!("{}", serde_json::to_string(&all)?),
        ListFormat::Table => {
            println!("{:<24} {:<10} {:<10} {:<32} CREATED", "ID", "PID", "STATUS", "BUNDLE");
            for one in &all {
                let text = |key: &str| one[key].as_str().unwrap_or("").to_owned();
                println!(
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
