//! `restore`: flags to [`restore::RestoreOptions`], then wait unless detached.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::by_agent::{self, How};
use crate::cli::{Global, Restore};
use crate::restore::RestoreOptions;
use crate::starter::RestoreOrder;
use crate::store::ContainerHandle;
use crate::{destroy, foreground};

pub fn run(args: Restore, global: &Global) -> Result<i32> {
    let bundle = match &args.bundle {
        Some(bundle) => bundle.clone(),
        None => std::env::current_dir().context("no current directory and no --bundle")?,
    };
    let images = args.criu.image_path.clone().unwrap_or_else(|| "checkpoint".into());
    let absolute = |path: PathBuf| std::path::absolute(path).context("no current directory");
    let root = super::root(global).to_owned();
    let mut options = RestoreOptions::new(&root, &args.id, &bundle, &absolute(images)?);
    let images = options.common.image_path.clone();
    options.common = super::checkpoint::common(&args.criu, images, global)?;
    options.systemd_cgroup = global.systemd_cgroup;
    options.pid_file = args.pid_file.clone();
    options.console_socket = args.console_socket.clone().filter(|path| !path.as_os_str().is_empty());
    options.tcp_close = args.tcp_close;
    options.lsm_profile = args.lsm_profile.clone();
    options.lsm_mount_context = args.lsm_mount_context.clone();
    let images = options.common.image_path.clone();
    if args.partial {
        crate::store::validate_id(&args.id)?;
        return by_agent::partial(&args.id, &images, &bundle).map(|()| 0);
    }
    if args.supervise {
        let order = order(&options, &images, &absolute(bundle.clone())?)?;
        by_agent::restore(&args.id, &images, &bundle, args.disconnected, How::Monitor(Box::new(order)))?;
        return Ok(0);
    }
    // Blocked before there is a child, so that its end is never missed.
    let signals = match args.detach {
        true => None,
        false => {
            if !args.no_subreaper {
                nix::sys::prctl::set_child_subreaper(true)?;
            }
            Some(foreground::block_signals()?)
        }
    };
    let restored = by_agent::restore(&args.id, &images, &bundle, args.disconnected, How::Here(Box::new(options)))?;
    let Some(signals) = signals else {
        return Ok(0);
    };
    let status = foreground::wait(restored.pid, &signals, restored.console)?;
    if let Ok(handle) = ContainerHandle::load(&root, &args.id) {
        destroy::delete(handle, true)?;
    }
    Ok(status)
}

/// The same for a monitor, which takes what a container without a terminal needs.
fn order(options: &RestoreOptions, images: &Path, bundle: &Path) -> Result<RestoreOrder> {
    let absolute = |path: &Path| std::path::absolute(path).context("no current directory");
    let common = &options.common;
    Ok(RestoreOrder {
        root: absolute(&options.root)?,
        id: options.id.clone(),
        bundle: bundle.to_owned(),
        image_path: images.to_owned(),
        work_path: common.work_path.as_deref().map(absolute).transpose()?,
        systemd_cgroup: options.systemd_cgroup,
        tcp_established: common.tcp_established,
        file_locks: common.file_locks,
        ext_unix_sk: common.ext_unix_sk,
        skip_network_lock: false,
        skip_create_hooks: false,
        criu: Some(common.criu.clone()),
        criu_log_level: common.log_level,
        plugin_dir: None,
        plugin_env: BTreeMap::new(),
        hold: false,
        door: None,
        deadline_s: Some(common.deadline.as_secs()),
        pid_file: options.pid_file.as_deref().map(absolute).transpose()?,
    })
}
