//! `update`: new resource limits for a container that exists.

use std::io::Read;

use anyhow::{Context, Result, bail};
use libcontainer::container::ContainerStatus;
use libcontainer::oci_spec::runtime::{
    LinuxCpuBuilder, LinuxMemoryBuilder, LinuxPidsBuilder, LinuxResources, LinuxResourcesBuilder,
};

use crate::cli::{Global, Update};
use crate::store::ContainerHandle;

/// No resource description is longer.
const INPUT_CAP: u64 = 1 << 20;

pub fn run(args: &Update, global: &Global) -> Result<i32> {
    let handle = ContainerHandle::load(super::root(global), &args.id)?;
    if handle.status() == ContainerStatus::Stopped {
        bail!("cannot update: {}", crate::store::NOT_RUNNING);
    }
    let resources = match &args.resources {
        Some(source) => read(source)?,
        None => from_flags(args)?,
    };
    handle.cgroup()?.apply(&resources)?;
    keep(&handle, resources)?;
    Ok(0)
}

fn read(source: &str) -> Result<LinuxResources> {
    let mut text = String::new();
    match source {
        "-" => std::io::stdin().take(INPUT_CAP).read_to_string(&mut text),
        path => std::fs::File::open(path)
            .with_context(|| format!("cannot open {path}"))?
            .take(INPUT_CAP)
            .read_to_string(&mut text),
    }
    .with_context(|| format!("cannot read the resources from {source}"))?;
    serde_json::from_str(&text).with_context(|| format!("the resources in {source} are malformed"))
}

fn from_flags(args: &Update) -> Result<LinuxResources> {
    let mut cpu = LinuxCpuBuilder::default();
    macro_rules! cpu {
        ($($flag:ident => $set:ident),*) => {
            $(if let Some(value) = args.$flag.clone() { cpu = cpu.$set(value); })*
        };
    }
    cpu!(cpu_share => shares, cpu_quota => quota, cpu_period => period, cpu_burst => burst,
        cpu_rt_period => realtime_period, cpu_rt_runtime => realtime_runtime,
        cpuset_cpus => cpus, cpuset_mems => mems, cpu_idle => idle);
    let mut memory = LinuxMemoryBuilder::default();
    macro_rules! memory {
        ($($flag:ident => $set:ident),*) => {
            $(if let Some(value) = args.$flag { memory = memory.$set(value); })*
        };
    }
    memory!(memory => limit, memory_reservation => reservation, memory_swap => swap);
    let mut all = LinuxResourcesBuilder::default().cpu(cpu.build()?).memory(memory.build()?);
    if let Some(limit) = args.pids_limit {
        all = all.pids(LinuxPidsBuilder::default().limit(limit).build()?);
    }
    if let Some(weight) = args.blkio_weight {
        all = all.block_io(libcontainer::oci_spec::runtime::LinuxBlockIoBuilder::default().weight(weight).build()?);
    }
    let mut all = all.build()?;
    // The builder's default denies every device; nobody asked for that.
    all.set_devices(None);
    Ok(all)
}

/// A later restore applies what is in the kept specification.
fn keep(handle: &ContainerHandle, new: LinuxResources) -> Result<()> {
    let mut spec = handle.spec()?;
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(());
    };
    let old = linux.resources().clone().unwrap_or_default();
    linux.set_resources(Some(merge(old, new)?));
    spec.set_linux(Some(linux));
    handle.save_spec(&spec)
}

/// Field by field, new over old; done on the JSON so that no field is forgotten.
fn merge(old: LinuxResources, new: LinuxResources) -> Result<LinuxResources> {
    fn overlay(old: &mut serde_json::Value, new: serde_json::Value) {
        match (old, new) {
            (serde_json::Value::Object(old), serde_json::Value::Object(new)) => {
                for (key, value) in new {
                    overlay(old.entry(key).or_insert(serde_json::Value::Null), value);
                }
            }
            (_, serde_json::Value::Null) => {}
            (old, new) => *old = new,
        }
    }
    let mut value = serde_json::to_value(old)?;
    overlay(&mut value, serde_json::to_value(new)?);
    Ok(serde_json::from_value(value)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_changes_what_it_names_and_keeps_the_rest() {
        let old: LinuxResources = serde_json::from_str(r#"{"memory":{"limit":100},"pids":{"limit":5}}"#).unwrap();
        let new: LinuxResources = serde_json::from_str(r#"{"memory":{"limit":200}}"#).unwrap();
        let merged = merge(old, new).unwrap();
        assert_eq!(merged.memory().as_ref().unwrap().limit(), Some(200));
        assert_eq!(serde_json::to_value(&merged).unwrap()["pids"]["limit"], 5);
    }
}
