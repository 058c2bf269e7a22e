//! `cargo xtask demo`: an RDMA client in a container is moved to another host and back while its peer keeps sending.
//!
//! It starts two containers that run the exactly-once checker against each other, moves the client `src → dst → src`
//! with the commands a user would type, and shows what the peer saw of it. It judges nothing itself: the checker in the
//! containers says whether anything was lost, repeated, reordered or corrupted, and the phase times are those that
//! `migrrdma migrate` printed.

pub mod picture;

use crate::lab::bundle::{self, Bundle};
use crate::lab::node::Node;
use crate::lab::topology::NodeSpec;
use crate::lab::wire::Exec;
use crate::lab::{Lab, deploy};
use anyhow::{Context, Result, bail, ensure};
use picture::{Move, Phase, Sample};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

const CHECKER: &str = "/usr/local/bin/rdma-checker";
const SERVER: &str = "demo-server";
const CLIENT: &str = "demo-client";
const SERVER_IP: &str = "10.20.0.111/24";
const CLIENT_IP: &str = "10.20.0.112/24";

/// Seconds of undisturbed load before, between and after the moves: what the picture compares the moves with.
const REST: Duration = Duration::from_secs(8);

/// What the demo is asked to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// QPs between the two containers.
    pub qps: u16,
    /// Where report and pictures go.
    pub output: PathBuf,
}

/// Runs the demo in a lab that is up and has the project's binaries. Fails if anything the checker knows of went wrong.
pub fn run(lab: &Lab, options: &Options) -> Result<()> {
    let checker = deploy::built(lab.paths(), "rdma-checker");
    ensure!(checker.exists(), "{} is missing: build the workspace first (`cargo xtask lab deploy`)", checker.display());
    let stage = Stage { src: lab.node("src")?, dst: lab.node("dst")?, peer: lab.node("peer")?, checker };
    stage.clear();
    let told = stage.play(options);
    if told.is_err() {
        stage.confess();
    }
    stage.clear();
    let told = told?;
    publish(&told, options)
}

struct Stage {
    src: Node,
    dst: Node,
    peer: Node,
    checker: PathBuf,
}

/// What is left of a run.
struct Told {
    moves: Vec<Move>,
    summaries: Vec<Value>,
    samples: Vec<Sample>,
    client: Value,
    server: Value,
}

impl Stage {
    fn play(&self, options: &Options) -> Result<Told> {
        say("two containers: the server on peer, the client on src; the client's place on dst is prepared");
        let load: Vec<String> =
            ["--qps", &options.qps.to_string(), "--duration", "0", "--depth", "8", "--progress", "0"]
                .map(str::to_owned)
                .to_vec();
        let server = command(&["server"], &["--timeline", "-", "--progress", "0"], &[]);
        let client = command(&["client", "--connect", "10.20.0.111"], &[], &load);
        self.bundle(&self.peer, SERVER, SERVER_IP, &server)?;
        self.bundle(&self.src, CLIENT, CLIENT_IP, &client)?;
        self.bundle(&self.dst, CLIENT, CLIENT_IP, &client)?;
        start(&self.peer, SERVER)?;
        wait_for_log(&self.peer, SERVER, "\"listening\"", Duration::from_secs(60))?;
        start(&self.src, CLIENT)?;
        wait_for_log(&self.src, CLIENT, "\"running\"", Duration::from_secs(120))
            .context("the client did not connect to the server")?;
        say(&format!(
            "{} QPs are busy in both directions: SEND, WRITE, READ, atomics, with and without immediate",
            options.qps
        ));
        thread::sleep(REST);

        let mut moves = Vec::new();
        let mut summaries = Vec::new();
        for (from, to) in [(&self.src, &self.dst), (&self.dst, &self.src)] {
            say(&format!("moving the client {} → {} while the server keeps sending", from.name(), to.name()));
            let summary = migrate(from, to.spec)?;
            moves.push(as_move(&format!("{} → {}", from.name(), to.name()), &summary)?);
            summaries.push(summary);
            thread::sleep(REST);
        }

        say("the client is told to finish: both ends drain and compare what they have");
        let home = &self.src;
        home.check(&["migrrdma", "kill", CLIENT, "TERM"])?;
        let client = self.outcome(home, CLIENT)?;
        let server = self.outcome(&self.peer, SERVER)?;
        let samples = samples(&log(&self.peer, SERVER)?);
        Ok(Told { moves, summaries, samples, client, server })
    }

    fn bundle(&self, node: &Node, name: &str, ip: &str, command: &[String]) -> Result<()> {
        Bundle {
            name: name.to_owned(),
            ip: Some(ip.to_owned()),
            copies: vec![(self.checker.clone(), CHECKER.to_owned())],
            command: command.to_vec(),
            ..Bundle::default()
        }
        .make(node)
        .map(drop)
    }

    /// Waits for a container's end; its last word.
    fn outcome(&self, node: &Node, name: &str) -> Result<Value> {
        let done = node.run(Exec {
            argv: ["migrrdma", "wait", name].map(str::to_owned).to_vec(),
            timeout_ms: Some(180_000),
            ..Exec::default()
        })?;
        let text = log(node, name)?;
        let result = json_lines(&text)
            .filter(|v| v["event"] == "result")
            .last()
            .with_context(|| format!("{name} ended without a result (status {}):\n{}", done.status(), tail(&text)))?;
        Ok(result)
    }

    /// After a failure: what the containers and agents said.
    fn confess(&self) {
        for (node, name) in [(&self.src, CLIENT), (&self.dst, CLIENT), (&self.peer, SERVER)] {
            if let Ok(text) = log(node, name) {
                eprintln!("--- {name} on {}:\n{}", node.name(), tail(&text));
            }
        }
    }

    fn clear(&self) {
        for node in [&self.src, &self.dst, &self.peer] {
            for name in [CLIENT, SERVER] {
                let _ = node.exec(&["migrrdma", "delete", "--force", name]);
                let _ = bundle::remove(node, name);
            }
        }
    }
}

fn say(text: &str) {
    println!("demo: {text}");
}

fn command(role: &[&str], own: &[&str], load: &[String]) -> Vec<String> {
    let words = std::iter::once(CHECKER).chain(role.iter().copied()).chain(own.iter().copied());
    words.map(str::to_owned).chain(load.iter().cloned()).collect()
}

fn start(node: &Node, name: &str) -> Result<()> {
    let dir = format!("{}/{name}", bundle::BUNDLES);
    node.check(&["migrrdma", "run", "--detach", "--supervise", "--bundle", &dir, name]).map(drop)
}

fn log(node: &Node, name: &str) -> Result<String> {
    node.check(&["migrrdma", "logs", name])
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|l| !l.contains("\"sample\"")).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn wait_for_log(node: &Node, name: &str, what: &str, limit: Duration) -> Result<()> {
    let start = Instant::now();
    loop {
        let text = log(node, name).unwrap_or_default();
        if text.contains(what) {
            return Ok(());
        }
        if start.elapsed() > limit {
            bail!(
                "{name} on {} did not say {what} within {} s; it said:\n{}",
                node.name(),
                limit.as_secs(),
                tail(&text)
            );
        }
        thread::sleep(Duration::from_millis(300));
    }
}

fn json_lines(text: &str) -> impl Iterator<Item = Value> + '_ {
    text.lines().filter_map(|l| serde_json::from_str(l.get(l.find('{')?..)?).ok())
}

/// Runs the migration with its own progress display on this terminal; the summary it ends with.
fn migrate(from: &Node, to: &NodeSpec) -> Result<Value> {
    let report = "/run/demo-migration.json";
    let done = from.run_attached(Exec {
        argv: ["migrrdma", "migrate", CLIENT, "--to", &to.rdma_ip(), "--report", report].map(str::to_owned).to_vec(),
        timeout_ms: Some(300_000),
        ..Exec::default()
    })?;
    let status = crate::lab::node::shell_status(&done);
    ensure!(status == 0, "migrrdma migrate on {} ended with status {status}", from.name());
    let text = from.read(report)?.0;
    from.check(&["rm", "-f", report])?;
    serde_json::from_slice(&text).with_context(|| format!("{report} on {}", from.name()))
}

/// From the summary of `migrrdma migrate`: `began` in seconds since 1970, spans in seconds from there.
pub(crate) fn as_move(title: &str, summary: &Value) -> Result<Move> {
    let began = summary["began"].as_f64().context("the migration's report does not say when it began")? * 1000.0;
    let spans = summary["spans"].as_array().context("the migration's report has no phases")?;
    let phases: Vec<Phase> = spans
        .iter()
        .filter_map(|s| {
            let start_ms = began + s["start"].as_f64()? * 1000.0;
            Some(Phase {
                name: s["phase"].as_str()?.to_owned(),
                start_ms,
                end_ms: start_ms + s["seconds"].as_f64()? * 1000.0,
            })
        })
        .collect();
    let at = |name: &str| phases.iter().find(|p| p.name == name);
    let pause = at("suspend").zip(at("resume")).map(|(a, b)| (a.start_ms, b.end_ms));
    Ok(Move { title: title.to_owned(), phases, pause })
}

fn samples(text: &str) -> Vec<Sample> {
    let mut last = None;
    json_lines(text)
        .filter(|v| v["event"] == "sample")
        .filter_map(|v| {
            let at_ms = v["wall_ms"].as_f64()?;
            let mono = v["mono_ms"].as_f64()?;
            let length = mono - last.replace(mono)?;
            let mb_per_s = v["bytes"].as_f64()? / 1e6 / (length.max(1.0) / 1000.0);
            Some(Sample { at_ms, mb_per_s, gap_ms: v["max_gap_ms"].as_f64()? })
        })
        .collect()
}

/// Writes report and pictures, prints the summary, and fails if a checker found something.
fn publish(told: &Told, options: &Options) -> Result<()> {
    let mut moves = told.moves.clone();
    let mut samples = told.samples.clone();
    let zero = samples.first().map_or(0.0, |s| s.at_ms);
    for s in &mut samples {
        s.at_ms -= zero;
    }
    for m in &mut moves {
        for p in &mut m.phases {
            p.start_ms -= zero;
            p.end_ms -= zero;
        }
        m.pause = m.pause.map(|(a, b)| (a - zero, b - zero));
    }
    let clean = told.client["ok"] == true && told.server["ok"] == true;
    let verdict = if clean {
        "Nothing lost, repeated, reordered or corrupted: both checkers agree.".to_owned()
    } else {
        "The checkers found errors; see report.json.".to_owned()
    };
    let seen: Vec<f64> = moves
        .iter()
        .map(|m| {
            let (from, to) = m.phases.first().zip(m.phases.last()).map_or((0.0, 0.0), |(a, b)| (a.start_ms, b.end_ms));
            samples.iter().filter(|s| s.at_ms >= from && s.at_ms <= to + 500.0).map(|s| s.gap_ms).fold(0.0, f64::max)
        })
        .collect();
    let report = json!({
        "ok": clean,
        "qps": options.qps,
        "client": told.client,
        "server": told.server,
        "migrations": told.summaries,
        "longest_gap_seen_by_peer_ms": seen,
        "samples": samples,
    });
    std::fs::create_dir_all(&options.output).with_context(|| format!("make {}", options.output.display()))?;
    let title = format!("An RDMA container moves to another host and back ({} QPs)", options.qps);
    let svg = picture::svg(&title, &samples, &moves);
    let pretty = serde_json::to_string_pretty(&report)?;
    let page = picture::page(&title, &svg, &moves, &verdict, &pretty);
    write(&options.output.join("report.json"), &pretty)?;
    write(&options.output.join("throughput.svg"), &svg)?;
    write(&options.output.join("index.html"), &page)?;

    println!();
    for (n, (m, gap)) in moves.iter().zip(&seen).enumerate() {
        let pause = m.pause.map_or_else(|| "?".to_owned(), |(a, b)| format!("{:.0} ms", b - a));
        println!("  {}  pause {pause}; the peer went {gap:.0} ms without a completion", m.title);
        for p in &told.moves[n].phases {
            println!("      {:18} {:8.1} ms", p.name, p.end_ms - p.start_ms);
        }
    }
    let number = |v: &Value, k: &str| v[k].as_u64().unwrap_or(0);
    for (name, v) in [("client", &told.client), ("server", &told.server)] {
        println!(
            "  {name}: {} messages sent, {} received, {} WRITEs, {} READs, {} atomics; {} errors; longest standstill {} ms",
            number(v, "sent"),
            number(v, "received"),
            number(v, "writes"),
            number(v, "reads"),
            number(v, "atomics"),
            number(v, "error_count"),
            v["max_stamp_gap_ms"].as_f64().unwrap_or(0.0).round()
        );
    }
    println!("  {verdict}");
    println!("  pictures and numbers: {}", options.output.join("index.html").display());
    ensure!(clean, "the checkers found errors: client {}, server {}", told.client["errors"], told.server["errors"]);
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_becomes_phases_on_the_wall_clock() {
        let summary = json!({"began": 1000.0, "spans": [
            {"phase": "negotiate", "start": 0.0, "seconds": 0.5},
            {"phase": "suspend", "start": 0.5, "seconds": 0.1},
            {"phase": "resume", "start": 1.0, "seconds": 0.25}]});
        let one = as_move("a → b", &summary).expect("a move");
        assert_eq!(one.phases.len(), 3);
        assert_eq!(one.pause, Some((1_000_500.0, 1_001_250.0)));
    }

    #[test]
    fn samples_are_rates_over_the_time_that_passed() {
        let text = "{\"event\":\"sample\",\"wall_ms\":100,\"mono_ms\":0,\"bytes\":0,\"max_gap_ms\":1}\n\
                    noise\n{\"event\":\"sample\",\"wall_ms\":2100,\"mono_ms\":2000,\"bytes\":4000000,\"max_gap_ms\":1900}\n";
        let got = samples(text);
        assert_eq!(got.len(), 1);
        assert!((got[0].mb_per_s - 2.0).abs() < 1e-9 && got[0].gap_ms == 1900.0);
    }
}
