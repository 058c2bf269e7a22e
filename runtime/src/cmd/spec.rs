//! `spec`: a config.json to start from.

use std::fs::OpenOptions;
use std::io::Write;

use anyhow::{Context, Result};
use libcontainer::oci_spec::runtime::Spec;

use crate::cli::SpecArgs;

pub fn run(args: &SpecArgs) -> Result<i32> {
    let spec = match args.rootless {
        false => template(),
        true => {
            let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
            Spec::rootless(uid.as_raw(), gid.as_raw())
        }
    };
    let path = args.bundle.join("config.json");
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| format!("cannot write {}; remove an old one first", path.display()))?;
    file.write_all(serde_json::to_string_pretty(&spec)?.as_bytes())?;
    Ok(0)
}

fn template() -> Spec {
    let mut spec = Spec::default();
    if let Some(mut process) = spec.process().clone() {
        process.set_args(Some(vec!["sh".into()]));
        process.set_terminal(Some(true));
        spec.set_process(Some(process));
    }
    spec
}
