//! `pause` and `resume`: the freezer.

use anyhow::{Result, bail};
use libcontainer::container::ContainerStatus;

use crate::cli::{Global, Id};
use crate::store::{self, ContainerHandle};

pub fn pause(args: &Id, global: &Global) -> Result<i32> {
    let mut handle = ContainerHandle::load(super::root(global), &args.id)?;
    match handle.status() {
        ContainerStatus::Running => {}
        ContainerStatus::Paused => bail!("container {} is paused already", args.id),
        ContainerStatus::Stopped => bail!("cannot pause: {}", store::NOT_RUNNING),
        other => bail!("cannot pause a container in state {other}"),
    }
    handle.cgroup()?.freeze()?;
    handle.set_status(ContainerStatus::Paused)?;
    Ok(0)
}

pub fn resume(args: &Id, global: &Global) -> Result<i32> {
    let mut handle = ContainerHandle::load(super::root(global), &args.id)?;
    match handle.status() {
        ContainerStatus::Paused => {}
        other => bail!("container {} is not paused: {other}", args.id),
    }
    handle.cgroup()?.thaw()?;
    handle.set_status(ContainerStatus::Running)?;
    Ok(0)
}
