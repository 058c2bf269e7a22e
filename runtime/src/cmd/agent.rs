//! `agent`: the one process of a host that speaks to other hosts.

use std::sync::Arc;

use anyhow::{Context, Result};
use checkpoint::agent::Agent;
use checkpoint::agent::config::Config;

use crate::cli::{AgentArgs, Global};
use crate::inject::HostPaths;
use crate::migration_host::MigrationHost;
use crate::{debris, memory, shown};

pub fn run(args: &AgentArgs, global: &Global) -> Result<i32> {
    let config = Config::load(args.config.as_deref())?;
    let host = MigrationHost { root: super::root(global).to_owned(), criu: global.criu.clone() };
    let agent = Agent::new(config, Arc::new(host)).context("the agent cannot start")?;
    // A container would mount it as well; so it is there from the first to the last.
    memory::mount_tmpfs(&HostPaths::default().memory)?;
    debris::sweep_if_idle(&agent.config.state_dir);
    shown::tidy(super::root(global), &HostPaths::default())?;
    agent.start().context("the agent cannot start")?;
    eprintln!("the agent of {} is ready", agent.config.name);
    // Everything happens in threads; the process ends by a signal only.
    loop {
        std::thread::park();
    }
}
