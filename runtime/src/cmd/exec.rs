//! `exec`: one more process in a running container.

use anyhow::Result;

use crate::cli::{Exec, Global};
use crate::launch::{self, Console};
use crate::store::ContainerHandle;
use crate::tenant::{self, TenantOptions};
use crate::{foreground, keeper};

pub fn run(args: Exec, global: &Global) -> Result<i32> {
    let handle = ContainerHandle::load(super::root(global), &args.id)?;
    let options = TenantOptions {
        process: args.process,
        args: args.command,
        env: args.env,
        cwd: args.cwd,
        terminal: args.tty,
        user: args.user,
        additional_gids: args.additional_gids,
        capabilities: args.cap,
        no_new_privileges: args.no_new_privs,
        apparmor: args.apparmor,
        ignore_paused: args.ignore_paused,
        preserve_fds: args.preserve_fds,
        detached: args.detach,
    };
    let process = tenant::process_of(&handle, &options)?;
    let mut pair = None;
    let console = match args.console_socket {
        Some(path) if !path.as_os_str().is_empty() => Console::Socket(path),
        _ if process.terminal().unwrap_or(false) && !args.detach => {
            let (ours, theirs) = foreground::console_pair()?;
            pair = Some(ours);
            Console::Pair(theirs)
        }
        _ => Console::None,
    };
    let pid = tenant::exec(&handle, process, console, &options)?;
    if let Some(path) = &args.pid_file {
        launch::write_pid_file(path, pid)?;
    }
    if args.detach {
        return Ok(0);
    }
    let terminal = pair.map(|socket| foreground::receive_console(&socket)).transpose()?;
    let signals = foreground::block_signals()?;
    let status = foreground::wait(pid, &signals, terminal);
    keeper::forget(&handle, pid);
    status
}
