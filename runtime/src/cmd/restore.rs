//! `restore`: flags to [`restore::RestoreOptions`], then wait unless detached.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::cli::{Global, Restore};
use crate::gate::OpenGate;
use crate::restore::{self, RestoreOptions};
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
    if args.partial {
        return restore::restore_partial(&options).map(|()| 0);
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
    let restored = restore::restore(options, &mut OpenGate)?;
    let Some(signals) = signals else {
        return Ok(0);
    };
    let status = foreground::wait(restored.pid, &signals, restored.console)?;
    if let Ok(handle) = ContainerHandle::load(&root, &args.id) {
        destroy::delete(handle, true)?;
    }
    Ok(status)
}
