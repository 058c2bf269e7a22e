//! `recover`: has the agent of this host end a migration whose other end is gone. On the source it gives the migration up,
//! and this program restores what was kept of the container; a monitor owns it, as after any migration. On the destination
//! the agent lets run what it has restored.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use checkpoint::agent::config::Config;
use checkpoint::engine::take_back::RecoverRequest;

use crate::by_agent::{self, How, Recovered};
use crate::cli::{Global, RecoverArgs};
use crate::migration_host::by_systemd;
use crate::starter::RestoreOrder;
use crate::{criu_plan, store};

pub fn run(args: &RecoverArgs, global: &Global) -> Result<i32> {
    let config = Config::load(args.config.as_deref())?;
    let root = std::path::absolute(super::root(global)).context("no current directory")?;
    let RecoverArgs { destination_is_gone, source_is_gone, .. } = *args;
    let request = RecoverRequest { container: args.id.clone(), destination_is_gone, source_is_gone };
    let how = |id: &str, images: &Path, bundle: &Path| {
        order(&root, id, images, bundle, global).map(|order| How::Monitor(Box::new(order)))
    };
    match by_agent::recover(&config, request, how)? {
        Recovered::Restored { id, pid } => eprintln!("container {id} runs here again (pid {pid})"),
        Recovered::TakenOver => eprintln!("container {} runs here", args.id),
    }
    Ok(0)
}

/// As the destination would have restored it.
fn order(root: &Path, id: &str, images: &Path, bundle: &Path, global: &Global) -> Result<RestoreOrder> {
    let spec = store::load_spec_file(&bundle.join("config.json"))?;
    Ok(RestoreOrder {
        root: root.to_owned(),
        id: id.to_owned(),
        bundle: bundle.to_owned(),
        image_path: images.to_owned(),
        work_path: images.parent().map(|base| base.join("work")),
        systemd_cgroup: global.systemd_cgroup || by_systemd(&spec),
        tcp_established: true,
        file_locks: true,
        ext_unix_sk: false,
        skip_network_lock: false,
        skip_create_hooks: false,
        criu: Some(global.criu.clone()),
        criu_log_level: criu_plan::migration_log_level(),
        plugin_dir: None,
        plugin_env: BTreeMap::new(),
        hold: false,
        door: None,
        deadline_s: None,
        pid_file: None,
    })
}
