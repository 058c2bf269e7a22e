//! `ps`: the processes of a container as the host numbers them.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cli::{Global, ListFormat, Ps};
use crate::report::outln;
use crate::store::ContainerHandle;

pub fn run(args: &Ps, global: &Global) -> Result<i32> {
    let handle = ContainerHandle::load(super::root(global), &args.id)?;
    let pids = handle.cgroup()?.pids()?;
    if args.format == ListFormat::Json {
        outln!("{}", serde_json::to_string(&pids)?);
        return Ok(0);
    }
    let options = match args.ps_options.is_empty() {
        true => vec!["-ef".to_owned()],
        false => args.ps_options.clone(),
    };
    let output = Command::new("ps").args(&options).output().context("cannot run ps")?;
    if !output.status.success() {
        bail!("ps failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or("");
    let column = header.split_whitespace().position(|name| name == "PID").context("ps printed no PID column")?;
    outln!("{header}");
    for line in lines {
        let pid = line.split_whitespace().nth(column).and_then(|pid| pid.parse().ok());
        if pid.is_some_and(|pid: i32| pids.contains(&pid)) {
            outln!("{line}");
        }
    }
    Ok(0)
}
