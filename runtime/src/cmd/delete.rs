//! `delete`.

use anyhow::Result;

use crate::by_agent;
use crate::cli::{Delete, Global};
use crate::destroy;
use crate::store::{self, ContainerHandle};

pub fn run(args: &Delete, global: &Global) -> Result<i32> {
    let root = super::root(global);
    store::validate_id(&args.id)?;
    let dir = root.join(&args.id);
    if !dir.exists() && by_agent::drop_partial(&args.id) {
        return Ok(0);
    }
    if args.force && !dir.exists() {
        // Engines delete what may be gone already.
        return Ok(0);
    }
    match ContainerHandle::load(root, &args.id) {
        Ok(handle) => destroy::delete(handle, args.force)?,
        Err(_) if args.force && !dir.join("state.json").exists() => {
            destroy::remove_state_dir(&dir)?;
        }
        Err(err) => return Err(err),
    }
    Ok(0)
}
