//! Programs everybody has: perftest and the pingpongs, unmodified, are moved
//! in the middle of their run and end as if nothing had happened.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::stage::{Stage, tail};
use crate::scenario::fabric::QP_TIMEOUT;
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(240);
const LONG: Duration = Duration::from_secs(900);

/// Which end is moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Client,
    Server,
}

pub const SERVER: &str = "pt-server";
pub const CLIENT: &str = "pt-client";
pub const SERVER_IP: &str = "10.20.0.160";

const PERFTEST: &[&str] = &["ib_write_bw", "ib_send_bw", "ib_read_bw", "ib_atomic_bw", "ib_send_lat"];
const PINGPONG: &[&str] = &["ibv_rc_pingpong", "ibv_srq_pingpong"];

macro_rules! claim {
    ($name:literal, $long:literal, $program:literal, $end:expr, $options:expr) => {
        Scenario { name: $name, long: $long, limit: LIMIT, run: |c| one(c, $program, $end, $options) }
    };
}

macro_rules! every {
    ($name:literal, $program:literal) => {
        Scenario { name: $name, long: true, limit: LONG, run: |c| every_end(c, $program) }
    };
}

/// Claims about perftest and the pingpongs.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "ib_write_bw's client is moved and both ends run to their normal end",
        false,
        "ib_write_bw",
        End::Client,
        &["-q", "4"]
    ),
    claim!(
        "ib_send_bw's server with events is moved and both ends run to their normal end",
        false,
        "ib_send_bw",
        End::Server,
        &["-e"]
    ),
    claim!(
        "ib_read_bw's client with events is moved and both ends run to their normal end",
        false,
        "ib_read_bw",
        End::Client,
        &["-e"]
    ),
    claim!(
        "ib_atomic_bw's server is moved and both ends run to their normal end",
        true,
        "ib_atomic_bw",
        End::Server,
        &[]
    ),
    claim!(
        "ib_send_lat's client is moved and both ends run to their normal end",
        true,
        "ib_send_lat",
        End::Client,
        &[]
    ),
    claim!(
        "ibv_rc_pingpong's client with events is moved and both ends run to their normal end",
        false,
        "ibv_rc_pingpong",
        End::Client,
        &["-e"]
    ),
    claim!(
        "ibv_srq_pingpong's server is moved and both ends run to their normal end",
        true,
        "ibv_srq_pingpong",
        End::Server,
        &[]
    ),
    every!("every end of ib_write_bw is moved, polling and with events if it knows them", "ib_write_bw"),
    every!("every end of ib_send_bw is moved, polling and with events if it knows them", "ib_send_bw"),
    every!("every end of ib_read_bw is moved, polling and with events if it knows them", "ib_read_bw"),
    every!("every end of ib_atomic_bw is moved, polling and with events if it knows them", "ib_atomic_bw"),
    every!("every end of ib_send_lat is moved, polling and with events if it knows them", "ib_send_lat"),
    every!("every end of ibv_rc_pingpong is moved, polling and with events if it knows them", "ibv_rc_pingpong"),
    every!("every end of ibv_srq_pingpong is moved, polling and with events if it knows them", "ibv_srq_pingpong"),
];

fn command(program: &str, node_gid: u8, options: &[&str]) -> Vec<String> {
    let mut argv = vec![program.to_owned()];
    if PERFTEST.contains(&program) {
        argv.extend(["-F", "-u", QP_TIMEOUT].map(str::to_owned));
        if options.contains(&"-e") {
            // perftest measures by time only when it polls. About as long as the others, in the lab.
            let often = match program {
                "ib_atomic_bw" => "200000",
                "ib_send_lat" => "3000",
                _ => "8000",
            };
            argv.extend(["-n", often].map(str::to_owned));
        } else if !options.contains(&"-D") {
            argv.extend(["-D", "25"].map(str::to_owned));
        }
    } else {
        argv.extend(["-g", &node_gid.to_string(), "-n", "20000"].map(str::to_owned));
    }
    argv.extend(options.iter().map(ToString::to_string));
    argv
}

fn one(ctx: &mut Context, program: &str, end: End, options: &[&str]) -> Result<()> {
    moved(ctx, program, end, options, |stage, name| stage.migrate(name, "dst").map(drop))
}

/// `ib_write_bw`'s client makes its objects again by itself, on the way there and on the way back.
pub fn rebuilt(ctx: &mut Context) -> Result<()> {
    // Long enough for both moves: what is shown is that traffic goes on after each.
    moved(ctx, "ib_write_bw", End::Client, &["-q", "4", "-D", "70"], |stage, name| {
        stage.migrate_by_rebuild(name, "dst")?;
        std::thread::sleep(Duration::from_secs(2));
        stage.migrate_by_rebuild(name, "src")
    })
}

/// Runs a program's two ends and has one of them moved in the middle.
fn moved(
    ctx: &mut Context,
    program: &str,
    end: End,
    options: &[&str],
    go: impl FnOnce(&mut Stage, &str) -> Result<()>,
) -> Result<()> {
    ensure!(PERFTEST.contains(&program) || PINGPONG.contains(&program), "{program} is none of those known here");
    let mut stage = Stage::new(ctx);
    let (server_homes, client_homes): (&[&str], &[&str]) = match end {
        End::Client => (&["peer"], &["src", "dst"]),
        End::Server => (&["peer", "dst"], &["src"]),
    };
    let server = command(program, stage.ctx.peer.spec.gid_index, options);
    let mut client = command(program, stage.ctx.src.spec.gid_index, options);
    client.push(SERVER_IP.to_owned());
    stage.run(SERVER, 160, server_homes, &words(&server))?;
    listening(&stage, SERVER)?;
    stage.run(CLIENT, 161, client_homes, &words(&client))?;
    connected(&stage, qps(program, options))?;
    // Into the middle of the run, not into its set-up.
    std::thread::sleep(Duration::from_secs(3));
    let moved = if end == End::Client { CLIENT } else { SERVER };
    go(&mut stage, moved)?;
    for name in [CLIENT, SERVER] {
        let text = stage.ended(name).with_context(|| {
            // Whichever ended first made the other one fail.
            let said = |n| tail(&stage.log(n).unwrap_or_default());
            format!("{SERVER} said:\n{}\n{CLIENT} said:\n{}", said(SERVER), said(CLIENT))
        })?;
        let proof = if PERFTEST.contains(&program) { "#bytes" } else { "20000 iters" };
        ensure!(text.contains(proof), "{program} in {name} ended with status 0 and without a result:\n{text}");
    }
    stage.finish()
}

fn words(argv: &[String]) -> Vec<&str> {
    argv.iter().map(String::as_str).collect()
}

/// Waits until a container listens as servers of perftest do, seen from inside its network namespace.
pub fn listening(stage: &Stage, name: &str) -> Result<()> {
    let script = format!(
        "for i in $(seq 300); do ip netns exec {name} ss -Hltn | grep -q :18515 && exit 0; sleep 0.1; done; exit 1"
    );
    stage.node_of(name)?.sh(&script).map(drop).with_context(|| {
        format!("the server does not listen; it said:\n{}", tail(&stage.log(name).unwrap_or_default()))
    })
}

/// Waits until all QPs of both ends are connected: one that is moved before is another claim.
fn connected(stage: &Stage, qps: usize) -> Result<()> {
    let start = Instant::now();
    let ready = |text: &str| {
        let rc = text.lines().filter(|l| l.contains("type RC"));
        rc.filter(|l| l.contains("state RTS") || l.contains("state RTR")).count()
    };
    loop {
        let client = stage.ctx.src.check(&["rdma", "resource", "show", "qp"])?;
        let server = stage.ctx.peer.check(&["rdma", "resource", "show", "qp"])?;
        if ready(&client) >= qps && ready(&server) >= qps {
            return Ok(());
        }
        if start.elapsed() > Duration::from_secs(60) {
            bail!("the QPs were not connected; the client said:\n{}\nQPs:\n{client}\n{server}", stage.log(CLIENT)?);
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// How many QPs a program makes.
fn qps(program: &str, options: &[&str]) -> usize {
    let asked = options.iter().position(|o| *o == "-q").and_then(|i| options.get(i + 1)?.parse().ok());
    asked.unwrap_or(if program == "ibv_srq_pingpong" { 16 } else { 1 })
}

/// Client and server, polling and with events.
fn every_end(ctx: &mut Context, program: &str) -> Result<()> {
    for end in [End::Client, End::Server] {
        for options in [&[][..], &["-e"][..]] {
            if program == "ib_write_bw" && options == ["-e"] {
                // It knows no events: perftest offers them for everything but WRITE.
                continue;
            }
            one(ctx, program, end, options).with_context(|| format!("{program} {options:?}, {end:?} moved"))?;
        }
    }
    Ok(())
}
