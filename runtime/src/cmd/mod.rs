//! One file for each verb (small relatives share one). A verb returns the
//! exit status of the whole program.

mod agent;
mod checkpoint;
mod create;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod logs;
mod migrate;
mod pause;
mod pki;
mod ps;
mod recover;
mod restore;
mod run;
mod spec;
mod state;
mod status;
mod update;
mod wait;

use std::path::Path;

use anyhow::Result;

use crate::cli::{Global, Verb};
use crate::monitor;

/// Runs one verb. A subcommand that belongs to the migration engine (agent,
/// migrate, pki, …) gets its own module here and calls into `checkpoint`.
pub fn run(verb: Verb, global: &Global) -> Result<i32> {
    match verb {
        Verb::Create(args) => create::run(args, global),
        Verb::Start(args) => create::start(&args, global),
        Verb::Run(args) => run::run(args, global),
        Verb::State(args) => state::run(&args, global),
        Verb::Kill(args) => kill::run(&args, global),
        Verb::Delete(args) => delete::run(&args, global),
        Verb::Exec(args) => exec::run(args, global),
        Verb::Ps(args) => ps::run(&args, global),
        Verb::List(args) => list::run(&args, global),
        Verb::Pause(args) => pause::pause(&args, global),
        Verb::Resume(args) => pause::resume(&args, global),
        Verb::Update(args) => update::run(&args, global),
        Verb::Events(args) => events::run(&args, global),
        Verb::Spec(args) => spec::run(&args),
        Verb::Features => features::run(),
        Verb::Checkpoint(args) => checkpoint::run(args, global),
        Verb::Restore(args) => restore::run(*args, global),
        Verb::Logs(args) => logs::run(&args),
        Verb::Wait(args) => wait::run(&args),
        Verb::Agent(args) => agent::run(&args, global),
        Verb::Migrate(args) => migrate::run(&args),
        Verb::Pki(verb) => pki::run(&verb),
        Verb::Recover(args) => recover::run(&args, global),
        Verb::Status(args) => status::run(&args),
        Verb::Monitor => monitor::main().map(|()| 0),
    }
}

/// The directory of containers' state; main has filled it in.
fn root(global: &Global) -> &Path {
    global.root.as_deref().unwrap_or(Path::new("/run/migrrdma"))
}
