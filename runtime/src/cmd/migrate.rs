//! `migrate`: asks the agent of this host to move a container, and shows what happens. Ctrl-C undoes it, as long as it
//! is not decided.

use std::os::fd::AsFd;
use std::thread;

use anyhow::{Context, Result, bail};
use checkpoint::agent::admin::{Event, Request};
use checkpoint::agent::config::Config;
use checkpoint::engine::MigrateRequest;
use nix::sys::signal::{SigSet, Signal};

use crate::admin_client::{self, Client};
use crate::cli::MigrateArgs;
use crate::progress::{Display, Form};

pub fn run(args: &MigrateArgs) -> Result<i32> {
    let config = Config::load(args.config.as_deref())?;
    let request = Request::Migrate(MigrateRequest {
        container: args.id.clone(),
        to: args.to.clone(),
        dry_run: args.dry_run,
        pre_setup: !args.no_pre_setup,
        pre_copy_rounds: args.pre_copy_rounds,
        max_blackout: args.max_blackout,
        copy_rootfs: args.copy_rootfs,
        hand_over: args.hand_over.map(Into::into),
        drain: args.drain_timeout,
    });
    let stops = stop_signals()?;
    let mut client = Client::ask(&config.admin(), &request)?;
    abort_on(stops, &client)?;
    let form = if args.json {
        Form::Json
    } else if nix::unistd::isatty(std::io::stderr().as_fd()).unwrap_or(false) {
        Form::Bars
    } else {
        Form::Plain
    };
    let mut display = Display::new(form);
    while let Some(event) = client.next()? {
        display.show(&event);
        match event {
            Event::Done { summary } => {
                if let Some(path) = &args.report {
                    let text = serde_json::to_vec_pretty(&summary)?;
                    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
                }
                return Ok(0);
            }
            Event::Possible => return Ok(0),
            Event::Refused { reasons } => {
                let title = format!("container {} cannot be moved to {}", args.id, args.to);
                bail!("{title}: {}", reasons.join("; "))
            }
            Event::Undone { phase, why, left } => {
                let left: String = left.iter().map(|l| format!("\n  - not undone: {l}")).collect();
                bail!("failed in {phase} and undone, container {} runs here as before: {why}{left}", args.id)
            }
            Event::Unfinished { phase, why } => bail!(
                "container {} belongs to {} now, but {phase} could not be finished: {why}; see `migrrdma status` \
                 there; {}",
                args.id,
                args.to,
                checkpoint::engine::take_back::hint(&args.id)
            ),
            Event::Error { text } => bail!("{text}"),
            _ => {}
        }
    }
    bail!("the agent ended before it said how the migration ended; when it is back, `migrrdma status` knows")
}

/// Blocks the signals a person stops a program with, for all threads to come.
fn stop_signals() -> Result<SigSet> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(set)
}

/// The first such signal asks the agent to undo; it decides whether it still can, and says how it ended.
fn abort_on(stops: SigSet, client: &Client) -> Result<()> {
    let mut sender = client.sender()?;
    thread::spawn(move || {
        if stops.wait().is_ok() {
            eprintln!("asking the agent to undo the migration");
            let _ = admin_client::send(&mut sender, &Request::Abort);
        }
        if stops.wait().is_ok() {
            eprintln!("the agent goes on by itself");
            std::process::exit(130);
        }
    });
    Ok(())
}
