//! `state`: one container as JSON.

use anyhow::Result;
use serde_json::{Value, json};

use crate::cli::{Global, Id};
use crate::clock;
use crate::report::outln;
use crate::store::ContainerHandle;
use libcontainer::container::ContainerStatus;

pub fn run(args: &Id, global: &Global) -> Result<i32> {
    let handle = ContainerHandle::load(super::root(global), &args.id)?;
    outln!("{}", serde_json::to_string_pretty(&describe(&handle))?);
    Ok(0)
}

/// The state in runc's form: the specification's fields and a few more.
pub fn describe(handle: &ContainerHandle) -> Value {
    let state = &handle.container.state;
    let status = handle.status();
    let pid = match status {
        ContainerStatus::Stopped => 0,
        _ => handle.init_pid().unwrap_or(0),
    };
    let mut value = json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": pid,
        "status": status.to_string().to_lowercase(),
        "bundle": state.bundle,
        "rootfs": handle.sidecar.rootfs,
        "created": state.created.map(|time| clock::rfc3339(time.into())),
        "owner": "",
    });
    if let Some(annotations) = state.annotations.as_ref().filter(|all| !all.is_empty()) {
        value["annotations"] = json!(annotations);
    }
    value
}
