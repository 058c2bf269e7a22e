//! Entry point: picks the role, prints the result, sets the exit status.

use anyhow::{Context, Result, bail};
use clap::Parser;
use rdma_checker::cli::{Cli, Command, End};
use rdma_checker::pattern::Side;
use rdma_checker::timeline::say;
use rdma_checker::wire::Wire;
use rdma_checker::workload::Workload;
use rdma_checker::{hold, offset, processes, report, run, signals, timeline, verbs};
use std::net::TcpListener;
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    // A panic in any thread is a bug of this program; going on would only hide it.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        let _ = say(&report::failed(&format!("bug in the checker: {info}")));
        std::process::exit(1);
    }));
    signals::install();
    let cli = Cli::parse();
    match role(cli.command) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("rdma-checker: {e:#}");
            let _ = say(&report::failed(&format!("{e:#}")));
            ExitCode::FAILURE
        }
    }
}

fn role(command: Command) -> Result<bool> {
    match command {
        Command::Server { bind, port, processes: 1, end } => {
            let l = TcpListener::bind((bind.as_str(), port)).with_context(|| format!("listen on {bind}:{port}"))?;
            say(&serde_json::json!({"event": "listening", "port": port}).to_string())?;
            one_end(Side::Server, || Wire::accept(&l, patience(&end)), None, &end)
        }
        Command::Client { connect, port, processes: 1, workload, end } => {
            let w = normal(*workload)?;
            let to = format!("{connect}:{port}");
            one_end(Side::Client, || Wire::connect(&to, patience(&end)), Some(w), &end)
        }
        Command::Server { port, processes, .. } | Command::Client { port, processes, .. } => many(port, processes),
        Command::Loopback { workload, end } => loopback(normal(*workload)?, &end),
        Command::Hold(h) if h.processes > 1 => many(h.port, h.processes),
        Command::Hold(h) => {
            let outcome = hold::run(&h)?;
            say(&outcome.line())?;
            if let Some(path) = &h.result {
                timeline::append(path, &outcome.line()).with_context(|| format!("write {}", path.display()))?;
            }
            Ok(outcome.ok())
        }
        Command::Clock { ask: Some(whom), rounds, .. } => {
            say(&offset::ask(&whom, rounds)?.line())?;
            Ok(true)
        }
        Command::Clock { ask: None, port, .. } => offset::answer(port).map(|()| true),
        Command::Pair { port, workload, .. } => {
            normal(*workload)?;
            pair(port)
        }
    }
}

fn normal(mut w: Workload) -> Result<Workload> {
    w.normalise().map_err(anyhow::Error::msg)?;
    Ok(w)
}

fn patience(end: &End) -> Duration {
    Duration::from_secs_f64(end.connect_timeout)
}

fn one_end(side: Side, open: impl FnOnce() -> Result<Wire>, w: Option<Workload>, end: &End) -> Result<bool> {
    if end.sleeping_child {
        verbs::fork_init().context("prepare for fork")?;
    }
    let outcome = run::run(side, open()?, w, &end.local(), &end.watch())?;
    say(&outcome.line())?;
    Ok(outcome.ok())
}

/// Own arguments without the role, and without the options that are replaced.
fn arguments(drop: &[&str]) -> Vec<String> {
    let mut kept = Vec::new();
    let mut args = std::env::args().skip(2);
    while let Some(a) = args.next() {
        match drop.iter().find(|d| a == **d) {
            Some(_) => drop_value(&mut args),
            None if drop.iter().any(|d| a.starts_with(&format!("{d}="))) => {}
            None => kept.push(a),
        }
    }
    kept
}

fn drop_value(args: &mut impl Iterator<Item = String>) {
    let _ = args.next();
}

fn many(port: u16, processes: u16) -> Result<bool> {
    let role = std::env::args().nth(1).context("role")?;
    let common = arguments(&["--port", "--processes"]);
    let runs: Vec<Vec<String>> = (0..processes)
        .map(|i| {
            let mut a = vec![role.clone(), "--port".into(), (port + i).to_string()];
            a.extend(common.clone());
            a
        })
        .collect();
    processes::together(&runs)
}

fn pair(port: u16) -> Result<bool> {
    let given = arguments(&["--port"]);
    // The server takes only the options that concern one end.
    let mut ends = Vec::new();
    let mut i = 0;
    while i < given.len() {
        let name = given[i].split('=').next().unwrap_or_default();
        let own = [
            "--device",
            "--ib-port",
            "--gid-index",
            "--stall-timeout",
            "--connect-timeout",
            "--identity-ms",
            "--stamp-ms",
            "--progress",
        ];
        if own.contains(&name) {
            ends.push(given[i].clone());
            if !given[i].contains('=') && i + 1 < given.len() {
                ends.push(given[i + 1].clone());
            }
        }
        i += 1;
    }
    let port = port.to_string();
    let mut server = vec!["server".into(), "--bind".into(), "127.0.0.1".into(), "--port".into(), port.clone()];
    server.extend(ends);
    let mut client = vec!["client".into(), "--connect".into(), "127.0.0.1".into(), "--port".into(), port];
    client.extend(given);
    processes::together(&[server, client])
}

fn loopback(w: Workload, end: &End) -> Result<bool> {
    if end.sleeping_child {
        bail!("--sleeping-child forks before there are threads; use it with server, client or pair");
    }
    let l = TcpListener::bind("127.0.0.1:0").context("listen on the loopback interface")?;
    let to = l.local_addr()?.to_string();
    let mut quiet = end.clone();
    quiet.timeline = None;
    quiet.progress = 0.0;
    let server = std::thread::spawn(move || one_end(Side::Server, || Wire::accept(&l, patience(&quiet)), None, &quiet));
    let client = one_end(Side::Client, || Wire::connect(&to, patience(end)), Some(w), end);
    let server = server.join().map_err(|_| anyhow::anyhow!("the server's thread panicked"))?;
    Ok(client? & server?)
}
