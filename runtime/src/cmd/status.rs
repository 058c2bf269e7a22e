//! `status`: what the agent of this host knows.

use anyhow::{Result, bail};
use checkpoint::agent::admin::{Event, Request};
use checkpoint::agent::config::Config;
use checkpoint::agent::status::{Container, Process, Status};
use checkpoint::agent::taking_part::{Migration, Wait};
use checkpoint::agent::under_way::Role;

use crate::admin_client::Client;
use crate::cli::StatusArgs;

pub fn run(args: &StatusArgs) -> Result<i32> {
    let config = Config::load(args.config.as_deref())?;
    let request = if args.metrics { Request::Metrics } else { Request::Status };
    let mut client = Client::ask(&config.admin(), &request)?;
    match client.next()? {
        Some(Event::Metrics { text }) => print!("{text}"),
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
    for migration in &status.migrations {
        println!("{}", line(migration));
    }
}

/// More of what is waited for is only counted.
const NAMED: usize = 3;

fn line(m: &Migration) -> String {
    let direction = match m.role {
        Role::Source => "source, to",
        Role::Destination => "destination, from",
        Role::Peer => "peer of one from",
    };
    let since =
        if m.over { format!("began {} ago", time(m.since_seconds)) } else { format!("for {}", time(m.since_seconds)) };
    let mut line = format!("migration {} of {}, {direction} {}: {}, {since}", m.id, m.container, m.other, m.state);
    let named: Vec<String> = m.waits_for.iter().take(NAMED).map(awaited).collect();
    if !named.is_empty() {
        line += &format!(", waits for {}", named.join("; "));
    }
    let more = m.waits_for.len().saturating_sub(NAMED);
    if more > 0 {
        line += &format!("; and {more} more");
    }
    if let Some(left) = m.left_seconds {
        line += &format!(", {} left", time(left));
    }
    if let Some(why) = &m.why {
        line += &format!(": {why}");
    }
    line
}

fn awaited(wait: &Wait) -> String {
    let left = wait.left_seconds.map_or(String::new(), |left| format!(" ({} left)", time(left)));
    format!("{}{left}", wait.what)
}

/// Short lengths are worth a digit, long ones are not.
fn time(seconds: f64) -> String {
    if seconds < 10.0 { format!("{seconds:.1} s") } else { format!("{seconds:.0} s") }
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

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::phase::Phase;

    fn migration() -> Migration {
        Migration {
            id: "0123".into(),
            container: "web".into(),
            role: Role::Source,
            other: "10.0.0.2:7477".into(),
            phase: Some(Phase::WaitBeforeStop),
            state: "wait-before-stop".into(),
            since_seconds: 0.34,
            waits_for: Vec::new(),
            left_seconds: None,
            over: false,
            why: None,
        }
    }

    #[test]
    fn a_line_says_what_is_waited_for_and_how_much_time_is_left() {
        let wait = |what: &str, left| Wait { what: what.into(), since_seconds: Some(0.3), left_seconds: left };
        let waits_for = vec![wait("a to drain", Some(12.6)), wait("b", None), wait("c", None), wait("d", None)];
        assert_eq!(
            line(&Migration { waits_for, ..migration() }),
            "migration 0123 of web, source, to 10.0.0.2:7477: wait-before-stop, for 0.3 s, waits for a to drain (13 s left); \
             b; c; and 1 more"
        );
        let parked = Migration {
            role: Role::Peer,
            other: "an image".into(),
            state: "parked".into(),
            waits_for: vec![wait("its image to be restored", None)],
            left_seconds: Some(590.2),
            ..migration()
        };
        assert_eq!(
            line(&parked),
            "migration 0123 of web, peer of one from an image: parked, for 0.3 s, waits for its image to be restored, 590 s \
             left"
        );
        let over = Migration { over: true, state: "aborted".into(), why: Some("Ctrl-C".into()), ..migration() };
        assert_eq!(line(&over), "migration 0123 of web, source, to 10.0.0.2:7477: aborted, began 0.3 s ago: Ctrl-C");
    }
}
