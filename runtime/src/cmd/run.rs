//! `run`: create and start; in the foreground wait and clean up as well.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cli::{Global, Run};
use crate::launch::{self, Console, CreateOptions};
use crate::starter::{Order, RunOrder, Starter};
use crate::store::{self, ContainerHandle};
use crate::{destroy, foreground};

pub fn run(args: Run, global: &Global) -> Result<i32> {
    if args.supervise {
        return supervise(&args, global);
    }
    let create = &args.create;
    let root = super::root(global);
    let mut console = super::create::console(create);
    let mut pair = None;
    if !args.detach && matches!(console, Console::None) && bundle_wants_terminal(create) {
        let (ours, theirs) = foreground::console_pair()?;
        console = Console::Pair(theirs);
        pair = Some(ours);
    }
    let options = CreateOptions {
        console,
        detached: args.detach,
        no_pivot: create.no_pivot,
        preserve_fds: create.preserve_fds,
        systemd_cgroup: global.systemd_cgroup,
        stdio: [None, None, None],
    };
    let mut handle = launch::create(root, &create.id, &create.bundle, options)?;
    let outcome = go(&mut handle, &args, pair);
    match outcome {
        Ok(status) if args.detach => Ok(status),
        outcome => {
            if !args.keep || outcome.is_err() {
                // Loaded afresh: a checkpoint may have removed it meanwhile.
                if let Ok(handle) = ContainerHandle::load(root, &create.id) {
                    destroy::delete(handle, true)?;
                }
            }
            outcome
        }
    }
}

fn go(handle: &mut ContainerHandle, args: &Run, pair: Option<std::os::fd::OwnedFd>) -> Result<i32> {
    let pid = handle.init_pid().context(store::NOT_RUNNING)?;
    // The terminal is handed over before the process waits for its start.
    let terminal = pair.map(|socket| foreground::receive_console(&socket)).transpose()?;
    let signals = match args.detach {
        true => None,
        false => Some(foreground::block_signals()?),
    };
    launch::start(handle)?;
    if args.create.pid_file.is_some()
        && let Some(path) = &args.create.pid_file
    {
        launch::write_pid_file(path, pid)?;
    }
    match signals {
        None => Ok(0),
        Some(signals) => foreground::wait(pid, &signals, terminal),
    }
}

fn bundle_wants_terminal(create: &crate::cli::Create) -> bool {
    store::load_spec_file(&create.bundle.join("config.json")).is_ok_and(|spec| launch::wants_terminal(&spec))
}

fn supervise(args: &Run, global: &Global) -> Result<i32> {
    let create = &args.create;
    if create.console_socket.is_some() || bundle_wants_terminal(create) {
        bail!("a supervised container has no terminal: set process.terminal to false");
    }
    store::validate_id(&create.id)?;
    let absolute =
        |path: &std::path::Path| std::path::absolute(path).with_context(|| format!("cannot use {}", path.display()));
    let order = Order::Run(RunOrder {
        root: absolute(super::root(global))?,
        id: create.id.clone(),
        bundle: absolute(&create.bundle)?,
        systemd_cgroup: global.systemd_cgroup,
        no_pivot: create.no_pivot,
        pid_file: create.pid_file.as_deref().map(absolute).transpose()?,
    });
    Starter::start(&order)?.running(Duration::from_secs(120))?;
    Ok(0)
}
