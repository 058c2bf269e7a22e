//! `migrrdma`: an OCI runtime on libcontainer whose containers, RDMA
//! connections included, can be checkpointed and moved with stock parts.
//!
//! This binary is the thin end: the command line engines expect, container
//! state on disk, and the places where a migration holds CRIU. The engine
//! itself is the crate `checkpoint`; this one knows nothing of verbs.

mod admin_client;
mod argv;
mod by_agent;
mod cgroup;
mod cli;
mod clock;
mod cmd;
mod console;
mod core_image;
mod criu_plan;
mod criu_version;
mod debris;
mod debug_log;
mod destroy;
mod devices;
mod door;
mod dump;
mod executor;
mod foreground;
mod gate;
mod handed;
mod inject;
mod keeper;
mod launch;
mod localise;
mod memory;
mod migration_host;
mod monitor;
mod mountinfo;
mod mountpoints;
mod nodes;
mod pending;
mod procfs;
mod progress;
mod record;
mod report;
mod restore;
mod rootfs;
mod seal;
mod shown;
mod starter;
mod stdio;
mod store;
mod tenant;
mod tmpfs;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::{ContextKind, ErrorKind};
use clap::{CommandFactory, Parser};

use crate::cli::{Cli, LogFormat};

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|arg| arg == checkpoint::incubator::SUBCOMMAND) {
        // A process of its own kind, started by the agent: it parses nothing.
        std::process::exit(checkpoint::incubator::main());
    }
    let argv: Vec<OsString> = argv::normalise(&Cli::command(), std::env::args_os().collect());
    let cli = match Cli::try_parse_from(&argv) {
        Ok(cli) => cli,
        Err(err) => return usage(&err),
    };
    if cli.global.version {
        return print_version();
    }
    let Some(verb) = cli.verb else {
        let _ = Cli::command().print_help();
        return ExitCode::SUCCESS;
    };
    let mut global = cli.global;
    let root = global.root.take().unwrap_or_else(default_root);
    global.root = Some(root);
    if global.debug {
        debug_log::install(log_file(global.log.as_deref()));
    }
    match cmd::run(verb, &global) {
        Ok(status) => ExitCode::from(status.clamp(0, 255) as u8),
        Err(err) if reader_is_gone(&err) => ExitCode::FAILURE,
        Err(err) => {
            let json = global.log_format == LogFormat::Json;
            report::failure(&err, log_file(global.log.as_deref()), json);
            ExitCode::FAILURE
        }
    }
}

/// `migrrdma list | head -1` is no failure worth a message.
fn reader_is_gone(err: &anyhow::Error) -> bool {
    err.downcast_ref::<std::io::Error>().is_some_and(|err| err.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Where containers' state lies unless `--root` says otherwise. Engines set
/// XDG_RUNTIME_DIR to odd values even for root, so root never asks it.
fn default_root() -> PathBuf {
    if !nix::unistd::geteuid().is_root()
        && let Some(dir) = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty())
    {
        return PathBuf::from(dir).join("migrrdma");
    }
    "/run/migrrdma".into()
}

fn log_file(path: Option<&Path>) -> Option<&Path> {
    path.filter(|path| !path.as_os_str().is_empty())
}

/// Help goes to stdout with status 0. Engines probe with wrong command lines
/// and look for Go's wording of a missing value.
fn usage(err: &clap::Error) -> ExitCode {
    if matches!(err.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = err.print();
        return ExitCode::SUCCESS;
    }
    let missing_value = err.kind() == ErrorKind::InvalidValue
        && err.get(ContextKind::InvalidValue).is_none_or(|value| value.to_string().is_empty());
    match (missing_value, err.get(ContextKind::InvalidArg)) {
        (true, Some(arg)) => {
            let text = arg.to_string();
            let name = text.split([' ', '=']).next().unwrap_or(&text);
            eprintln!("flag needs an argument: {name}");
        }
        _ => {
            let _ = err.print();
        }
    }
    ExitCode::FAILURE
}

fn print_version() -> ExitCode {
    let commit = option_env!("MIGRRDMA_COMMIT").unwrap_or("unknown");
    let mut out = std::io::stdout();
    let _ = writeln!(
        out,
        "migrrdma version {}\ncommit: {commit}\nspec: {}",
        env!("CARGO_PKG_VERSION"),
        libcontainer::oci_spec::runtime::VERSION
    );
    ExitCode::SUCCESS
}
