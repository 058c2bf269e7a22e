//! Plays the agent for two RDMA programs on one machine and walks them through the steps of a migration, without any
//! container, checkpoint or second host: what wait-before-stop and the change to second QPs do can be tried in seconds.
//!
//! ```text
//! scripted_agent SHIM SCENARIO ROUNDS -- SERVER-COMMAND -- CLIENT-COMMAND
//! ```
//! Scenarios: `abort` (suspend, drain, abort), `freeze` (and freeze before the abort), `switch` (both ends change to
//! second QPs in place), `idle` (nothing; for comparison). Both programs must end with status 0. Needs an RDMA device,
//! and fails without one.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, ExitCode};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rdma_virt::id::{MigrationId, PGid, PQpn, VQpn};
use rdma_virt::msg::{
    Answer, Ask, Connect, FromShim, Hello, KeyTable, MAGIC, MAX_FRAME, Reply, Request, Role, Scope, SwitchLink, ToShim,
};
use rdma_virt::saved::{ProcessState, QpPhase, QpState};

const DIR: &str = "/run/.migrrdma";
const PATIENCE: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("scripted_agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut parts = args.split(|a| a == "--");
    let (Some([shim, scenario, rounds]), Some(server), Some(client)) = (parts.next(), parts.next(), parts.next())
    else {
        bail!("usage: scripted_agent SHIM SCENARIO ROUNDS -- SERVER-COMMAND -- CLIENT-COMMAND");
    };
    let rounds: u32 = rounds.parse().context("ROUNDS")?;
    let _ = std::fs::remove_file(format!("{DIR}/agent.sock"));
    std::fs::create_dir_all(DIR)?;
    bump_epoch()?;
    let arrivals = listen()?;

    let mut server_process = start(shim, server)?;
    std::thread::sleep(Duration::from_millis(1500));
    let mut client_process = start(shim, client)?;
    let mut ends = [
        Shim::arrive(&arrivals, server_process.id()).context("the server's shim")?,
        Shim::arrive(&arrivals, client_process.id()).context("the client's shim")?,
    ];
    let outcome = (|| {
        await_traffic(&mut ends)?;
        for round in 0..rounds {
            std::thread::sleep(Duration::from_millis(700));
            let began = Instant::now();
            let id = MigrationId([round as u8 + 1; 16]);
            match scenario.as_str() {
                "idle" => {}
                "abort" => stop(&mut ends, id, false).and_then(|_| both(&mut ends, id, |_| Request::Abort))?,
                "freeze" => freeze(&mut ends, id, &arrivals)?,
                "switch" => switch(&mut ends, id)?,
                other => bail!("unknown scenario {other}"),
            }
            println!("round {round}: {scenario} in {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
        }
        Ok(())
    })();
    if outcome.is_err() {
        let _ = server_process.kill();
        let _ = client_process.kill();
    }
    let (server, client) = (wait(&mut server_process), wait(&mut client_process));
    outcome?;
    ensure!(client?.success(), "the client failed");
    ensure!(server?.success(), "the server failed");
    Ok(())
}

fn start(shim: &str, command: &[String]) -> Result<Child> {
    let (program, args) = command.split_first().context("an empty command")?;
    Command::new(program).args(args).env("LD_PRELOAD", shim).spawn().with_context(|| format!("starting {program}"))
}

fn wait(child: &mut Child) -> Result<std::process::ExitStatus> {
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.kill()?;
    bail!("a program did not end in {PATIENCE:?}")
}

fn bump_epoch() -> Result<()> {
    let path = format!("{DIR}/epoch");
    let now: u64 = std::fs::read_to_string(&path).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0);
    std::fs::write(format!("{path}.new"), format!("{}\n", now + 1))?;
    Ok(std::fs::rename(format!("{path}.new"), path)?)
}

// ---- the socket ----------------------------------------------------------------------------------------------------

type Arrivals = Mutex<Receiver<(u32, UnixStream)>>;

fn listen() -> Result<Arc<Arrivals>> {
    let listener = UnixListener::bind(format!("{DIR}/agent.sock"))?;
    let (tell, arrivals): (Sender<(u32, UnixStream)>, _) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let tell = tell.clone();
            std::thread::spawn(move || {
                if let Err(e) = greet(stream, &tell) {
                    eprintln!("scripted_agent: a connection: {e:#}");
                }
            });
        }
    });
    Ok(Arc::new(Mutex::new(arrivals)))
}

fn greet(mut stream: UnixStream, tell: &Sender<(u32, UnixStream)>) -> Result<()> {
    let hello: Hello = receive(&mut stream)?;
    match hello.role {
        Role::Control => tell.send((hello.vpid.0 as u32, stream))?,
        Role::Ask => {
            let answer = match receive(&mut stream)? {
                Ask::RegisterQp { pqpn } => Answer::Registered { vqpn: VQpn(pqpn.0) },
                // Programs of this test connect before anything moves.
                Ask::Resolve { vgid, vqpn } => {
                    Answer::Resolved { pgid: PGid(vgid.0), pqpn: PQpn(vqpn.0), keys: vec![] }
                }
            };
            send(&mut stream, &answer)?;
        }
    }
    Ok(())
}

fn send(stream: &mut UnixStream, message: &impl serde::Serialize) -> Result<()> {
    let body = postcard::to_stdvec(message)?;
    let mut frame = MAGIC.to_vec();
    frame.extend_from_slice(&u32::try_from(body.len())?.to_le_bytes());
    frame.extend_from_slice(&body);
    Ok(stream.write_all(&frame)?)
}

fn receive<T: serde::de::DeserializeOwned>(stream: &mut UnixStream) -> Result<T> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = [0; 8];
    stream.read_exact(&mut head)?;
    ensure!(head[..4] == MAGIC, "wrong magic");
    let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
    ensure!(len <= MAX_FRAME, "too long");
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(postcard::from_bytes(&body)?)
}

/// One program, by its shim.
struct Shim {
    pid: u32,
    stream: UnixStream,
    seq: u64,
}

impl Shim {
    fn arrive(arrivals: &Arrivals, pid: u32) -> Result<Self> {
        let arrivals = arrivals.lock().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        let mut others = Vec::new();
        loop {
            let (who, stream) = arrivals.recv_timeout(PATIENCE).context("no connection in time")?;
            if who == pid {
                return Ok(Self { pid, stream, seq: 0 });
            }
            others.push(stream);
        }
    }

    fn ask(&mut self, migration: Option<MigrationId>, request: Request) -> Result<Reply> {
        self.seq += 1;
        let what = format!("{request:?}").chars().take(60).collect::<String>();
        let began = Instant::now();
        send(&mut self.stream, &ToShim { seq: self.seq, migration, request })?;
        let reply: FromShim = receive(&mut self.stream).with_context(|| format!("reply to {what}"))?;
        ensure!(reply.seq == self.seq, "reply to another request");
        if migration.is_some() {
            let step: String = what.chars().take_while(char::is_ascii_alphabetic).collect();
            println!("    {:>7.1} ms  {step} of {}", began.elapsed().as_secs_f64() * 1e3, self.pid);
        }
        match reply.reply {
            Reply::Refused { why } => bail!("{what} of {}: refused: {why}", self.pid),
            Reply::Stuck { qps } => bail!("{what} of {}: stuck: {qps:?}", self.pid),
            Reply::Busy { by } => bail!("{what} of {}: busy with {by}", self.pid),
            reply => Ok(reply),
        }
    }

    fn report(&mut self) -> Result<ProcessState> {
        match self.ask(None, Request::Report)? {
            Reply::State(state) => Ok(*state),
            other => bail!("to Report: {other:?}"),
        }
    }
}

fn qps(state: &ProcessState) -> impl Iterator<Item = &QpState> {
    state.contexts.iter().flat_map(|c| &c.qps)
}

fn await_traffic(ends: &mut [Shim; 2]) -> Result<()> {
    let began = Instant::now();
    loop {
        let mut connected = true;
        for end in ends.iter_mut() {
            let state = end.report()?;
            connected &= qps(&state).count() > 0 && qps(&state).all(|q| matches!(q.phase, QpPhase::Rts | QpPhase::Rtr));
        }
        if connected {
            for end in ends.iter_mut() {
                let state = end.report()?;
                println!("{} ({}): {} builds, blockers {:?}", end.pid, state.comm, state.builds.len(), state.blockers);
                for c in &state.contexts {
                    println!(
                        "  {} {}: {} PDs, {} CQs, {} SRQs, {} QPs, {} MRs, gids {:?}",
                        c.device,
                        c.driver,
                        c.pds.len(),
                        c.cqs.len(),
                        c.srqs.len(),
                        c.qps.len(),
                        c.mrs.len(),
                        c.gids
                    );
                }
            }
            return Ok(());
        }
        ensure!(began.elapsed() < PATIENCE, "the programs never connected");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The same step at both ends at once.
fn both(ends: &mut [Shim; 2], id: MigrationId, request: impl Fn(usize) -> Request) -> Result<()> {
    let requests = [request(0), request(1)];
    std::thread::scope(|s| {
        let steps: Vec<_> =
            ends.iter_mut().zip(requests).map(|(end, r)| s.spawn(move || end.ask(Some(id), r))).collect();
        for step in steps {
            step.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

// ---- scenarios -----------------------------------------------------------------------------------------------------

/// Suspends and drains both ends. `all`: the first one as the moving process.
fn stop(ends: &mut [Shim; 2], id: MigrationId, all: bool) -> Result<()> {
    let states = [ends[0].report()?, ends[1].report()?];
    let mut sent: [HashMap<VQpn, u64>; 2] = Default::default();
    let began = Instant::now();
    for (i, end) in ends.iter_mut().enumerate() {
        let scope = if all && i == 0 { Scope::All } else { Scope::Qps(qps(&states[i]).map(|q| q.vqpn).collect()) };
        match end.ask(Some(id), Request::Suspend { scope })? {
            Reply::Suspended { counts } => sent[i].extend(counts.iter().map(|c| (c.vqpn, c.sent))),
            other => bail!("to Suspend: {other:?}"),
        }
    }
    let suspended = began.elapsed();
    let expect = |i: usize| {
        qps(&states[i]).filter_map(|q| Some((q.vqpn, *sent[1 - i].get(&q.remote?.vqpn)?))).collect::<Vec<_>>()
    };
    both(ends, id, |i| Request::Drain { expect: expect(i), deadline_ms: 10_000 })?;
    println!(
        "  suspended in {:.1} ms, drained in {:.1} ms; sent {:?}",
        suspended.as_secs_f64() * 1e3,
        (began.elapsed() - suspended).as_secs_f64() * 1e3,
        [sent[0].values().sum::<u64>(), sent[1].values().sum::<u64>()]
    );
    Ok(())
}

fn freeze(ends: &mut [Shim; 2], id: MigrationId, arrivals: &Arrivals) -> Result<()> {
    stop(ends, id, true)?;
    match ends[0].ask(Some(id), Request::Freeze)? {
        Reply::State(_) => {}
        other => bail!("to Freeze: {other:?}"),
    }
    // It closes the connection by itself, and holds nothing of ours.
    ends[0].stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    ensure!(ends[0].stream.read(&mut [0; 1])? == 0, "the frozen process did not close its connection");
    let pid = ends[0].pid;
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let to = std::fs::read_link(fd.path()).unwrap_or_default();
        ensure!(!to.starts_with(DIR), "the frozen process holds {}", to.display());
        if fd.file_name().to_string_lossy().parse::<i32>().is_ok_and(|n| n >= 1000) {
            bail!("the frozen process holds fd {} -> {}", fd.file_name().display(), to.display());
        }
    }
    std::thread::sleep(Duration::from_millis(300));
    bump_epoch()?;
    ends[0] = Shim::arrive(arrivals, pid)?;
    both(ends, id, |_| Request::Abort)
}

fn switch(ends: &mut [Shim; 2], id: MigrationId) -> Result<()> {
    let states = [ends[0].report()?, ends[1].report()?];
    let mut seconds: [HashMap<VQpn, PQpn>; 2] = Default::default();
    for (i, end) in ends.iter_mut().enumerate() {
        let wanted = qps(&states[i]).map(|q| q.vqpn).collect();
        match end.ask(Some(id), Request::Prepare { qps: wanted })? {
            Reply::Prepared { qps } => seconds[i].extend(qps),
            other => bail!("to Prepare: {other:?}"),
        }
    }
    let links = |i: usize| -> Vec<(VQpn, PGid, PQpn)> {
        qps(&states[i])
            .filter_map(|q| {
                let remote = q.remote?;
                Some((q.vqpn, remote.pgid, *seconds[1 - i].get(&remote.vqpn)?))
            })
            .collect()
    };
    both(ends, id, |i| Request::Connect {
        links: links(i)
            .into_iter()
            .map(|(vqpn, remote_gid, remote_qpn)| {
                let (sq_psn, rq_psn) = if i == 0 { (0x111, 0x222) } else { (0x222, 0x111) };
                Connect { vqpn, remote_gid, remote_qpn, sq_psn, rq_psn }
            })
            .collect(),
    })?;
    stop(ends, id, false)?;
    both(ends, id, |i| Request::Switch {
        links: links(i)
            .into_iter()
            .map(|(vqpn, remote_gid, remote_qpn)| SwitchLink { vqpn, remote_gid, remote_qpn, table: 0 })
            .collect(),
        tables: vec![KeyTable::default()],
    })?;
    both(ends, id, |_| Request::Resume)
}
