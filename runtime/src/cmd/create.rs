//! `create` and `start`.

use anyhow::{Context, Result};

use crate::cli::{Create, Global, Id};
use crate::launch::{self, Console, CreateOptions};
use crate::store::{self, ContainerHandle};

pub fn run(args: Create, global: &Global) -> Result<i32> {
    let options = CreateOptions {
        console: console(&args),
        detached: true,
        no_pivot: args.no_pivot,
        preserve_fds: args.preserve_fds,
        systemd_cgroup: global.systemd_cgroup,
        stdio: [None, None, None],
    };
    let handle = launch::create(super::root(global), &args.id, &args.bundle, options)?;
    write_pid(&handle, &args)?;
    Ok(0)
}

pub fn start(args: &Id, global: &Global) -> Result<i32> {
    let mut handle = ContainerHandle::load(super::root(global), &args.id)?;
    launch::start(&mut handle)?;
    Ok(0)
}

pub fn console(args: &Create) -> Console {
    match &args.console_socket {
        Some(path) if !path.as_os_str().is_empty() => Console::Socket(path.clone()),
        _ => Console::None,
    }
}

/// The pid file is the last thing written: engines go on when it appears.
pub fn write_pid(handle: &ContainerHandle, args: &Create) -> Result<()> {
    if let Some(path) = &args.pid_file {
        let pid = handle.init_pid().context(store::NOT_RUNNING)?;
        launch::write_pid_file(path, pid)?;
    }
    Ok(())
}
