//! `status`: what the agent of this host knows.

use anyhow::{Result, bail};
use checkpoint::agent::admin::{Event, Request};
use checkpoint::agent::config::Config;
use checkpoint::agent::status::{Container, Process, Status};

use crate::admin_client::Client;
use crate::cli::StatusArgs;

pub fn run(args: &StatusArgs) -> Result<i32> {
    let config = Config::load(args.config.as_deref())?;
    let mut client = Client::ask(&config.admin(), &Request::Status)?;
    match client.next()? {
        Some(Event::Status { status }) if args.json => println!("{}", serde_json::to_string_pretty(&status)?),
        Some(Event::Status { status }) => show(&status),
        Some(Event::Error { text }) => bail!("{text}"),
        other => bail!("the agent answered with something else: {other:?}"),
    }
    Ok(0)
}

fn show(status: &Status) {
    println!("host {} (migrrdma {})", status.host, status.version);
    if let Some(why) = &status.no_network {
        println!("  no migration: {why}");
    }
    for device in &status.devices {
        println!("  device {} ({}): {}", device.name, device.driver, device.gids.join(", "));
    }
    for container in &status.containers {
        show_container(container);
    }
    for (container, migration) in &status.held {
        println!("container {container} takes part in migration {migration}");
    }
    for arrival in &status.arriving {
        println!("arriving: {arrival}");
    }
    for session in &status.sessions {
        println!("{session}");
    }
    for m in &status.migrations {
        let state = serde_json::to_value(m.state).ok();
        let state = state.as_ref().and_then(|s| s.as_str()).unwrap_or("?");
        let why = m.why.as_ref().map_or(String::new(), |why| format!(": {why}"));
        println!("migration {} of {} to {}: {state}{why}", m.id, m.container, m.to);
    }
}

fn show_container(container: &Container) {
    let paused = if container.paused { ", paused" } else { "" };
    println!("container {} (init {}{paused})", container.id, container.init);
    for process in &container.processes {
        show_process(process);
    }
}

fn show_process(p: &Process) {
    let [pds, cqs, srqs, mrs] = p.objects;
    println!("  {} (pid {}, {} on the host)", p.comm, p.vpid, p.pid);
    if let Some(trouble) = &p.trouble {
        println!("    {trouble}");
        return;
    }
    println!("    {pds} PDs, {cqs} CQs, {srqs} SRQs, {mrs} MRs of {} bytes", p.registered);
    for qp in &p.qps {
        let now = if qp.vqpn == qp.pqpn { String::new() } else { format!(" (now {})", qp.pqpn) };
        let remote = qp.remote.as_ref().map_or(String::new(), |r| format!(" ↔ {r}"));
        println!("    QP {}{now} on {} {}{remote}", qp.vqpn, qp.device, qp.phase);
    }
    for blocker in &p.blockers {
        println!("    cannot be moved: {blocker}");
    }
}
