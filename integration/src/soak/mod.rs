//! `cargo xtask soak`: containers move at random among three hosts, under load, while agents are killed, commands are
//! interrupted and both ends move at once. Every byte is checked by the containers themselves.
//!
//! [`plan`] draws what happens, [`vitals`] counts what could leak, [`picture`] shows the run. This file runs it and
//! judges: whatever was done to it, a container is in one place and its traffic flows, and at the end every message
//! arrived once and every host holds what it held before.

pub mod picture;
pub mod plan;
pub mod vitals;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde::Serialize;
use serde_json::json;

use crate::bench::statistics::{Random, median};
use crate::census::NodeCensus;
use crate::lab::agent::killed_and_started;
use crate::lab::deploy;
use crate::lab::node::Output;
use crate::lab::{Lab, paths::Paths};
use crate::link_health::LinkHealth;
use crate::scenario::{Context, sole_user};
use crate::scenarios::migration::settled::settled;
use crate::scenarios::migration::stage::{Pair, Stage, json_lines, tail};
use plan::{Fault, NODES, Step, Whose};
use vitals::Vitals;

const AFTER_HELP: &str = "\
Six containers in three pairs; each pair loads both directions with every operation and checks every byte. One of the
pairs has its registered memory in files. A step is one migration of one container to a host it is not on, in one of
the ways `migrrdma migrate` has; in --faults of a hundred steps something goes wrong on purpose: the source's, the
destination's or a peer's agent is killed in some phase, the command is interrupted, or the other end is asked to move
at the same moment.

Written to target/soak/: report.json, soak.svg. The exit status says whether everything was right.";

/// How long and how rough.
#[derive(Args, Debug, Clone)]
#[command(after_help = AFTER_HELP)]
pub struct Options {
    /// Migrations
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub migrations: usize,
    /// Of a hundred migrations, so many are disturbed
    #[arg(long, value_name = "PERCENT", default_value_t = 25, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub faults: u8,
    /// Begins the sequence of steps
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Begin nothing new after so many minutes
    #[arg(long, value_name = "N")]
    pub minutes: Option<u64>,
    /// Operations per second and end; 0 is as many as possible
    #[arg(long, value_name = "N", default_value_t = 300)]
    pub rate: u32,
    /// Use the release binaries as they are
    #[arg(long)]
    pub no_build: bool,
    /// Leave the lab up at the end
    #[arg(long)]
    pub keep: bool,
}

/// Longest time one migration may take.
const MIGRATION: Duration = Duration::from_secs(240);
/// After so many steps it is counted what the hosts hold.
const EVERY: usize = 5;
/// Agents may have so many more files open at the end than at the beginning: connections to each other.
const MORE_FILES: u64 = 12;

/// What came of a step.
#[derive(Debug, Clone, Serialize)]
pub struct Told {
    /// Counted from 1.
    pub n: usize,
    pub container: String,
    pub from: &'static str,
    pub to: &'static str,
    pub way: String,
    pub fault: Option<String>,
    /// Whether it is at `to` now.
    pub moved: bool,
    /// By the tool's own times; absent when it was not the tool that came to the end of it.
    pub pause_ms: Option<f64>,
    pub seconds: f64,
    /// Of the three nodes, after every few steps.
    pub vitals: Option<Vec<Vitals>>,
}

/// Runs a soak in a lab of its own.
pub fn run(options: &Options) -> Result<()> {
    let paths = Paths::new()?;
    if !options.no_build {
        crate::setup::ensure()?;
        deploy::build(&paths)?;
    }
    let _alone = sole_user()?;
    let (mut lab, fresh) = Lab::up()?;
    if !fresh {
        lab.reset(&[])?;
    }
    let missing = deploy::deploy(&lab)?;
    ensure!(missing.is_empty(), "not built: {}; run `cargo build --release --workspace`", missing.join(", "));
    let mut told = Vec::new();
    let end = in_lab(&lab, options, &mut told);
    let published = publish(&told, options, end.as_ref().err(), &paths.target.join("soak"));
    // What is left of a failure is what one wants to look at.
    if options.keep || end.is_err() {
        println!("soak: the lab is still up (`cargo xtask lab down` ends it)");
    } else {
        Lab::down()?;
    }
    end.and(published)
}

fn in_lab(lab: &Lab, options: &Options, told: &mut Vec<Told>) -> Result<()> {
    let nodes = lab.nodes()?;
    let clean = nodes.iter().map(NodeCensus::take).collect::<Result<Vec<_>>>()?;
    let links = nodes.iter().map(LinkHealth::take).collect::<Result<Vec<_>>>()?;
    let mut ctx = Context::new(lab, Duration::from_secs(7 * 24 * 3600))?;
    let mut stage = Stage::new(&mut ctx);
    let cast = Cast::enter(&mut stage, options.rate)?;
    let before = take_all(&stage)?;
    steps(&mut stage, &cast, options, &before, told)?;
    println!("soak: both ends of every pair compare what they have");
    for pair in &cast.pairs {
        pair.judge(&mut stage).with_context(|| format!("{} and {}", pair.client, pair.server))?;
    }
    let after = take_all(&stage)?;
    stage.finish()?;
    for (i, name) in NODES.into_iter().enumerate() {
        let (was, is) = (before[i].agent_files, after[i].agent_files);
        ensure!(is <= was + MORE_FILES, "{name}: the agent has {is} files open, and had {was}");
    }
    let mut left = Vec::new();
    for ((node, clean), link) in nodes.iter().zip(&clean).zip(&links) {
        let changes = clean.settle(node, Duration::from_secs(20))?;
        left.extend(changes.iter().map(|c| format!("{}: {c}", node.name())));
        let bad = link.violations(&LinkHealth::take(node)?, &[], true);
        left.extend(bad.iter().map(|v| format!("{}: link: {v}", node.name())));
    }
    ensure!(left.is_empty(), "at the end: {}", left.join("; "));
    Ok(())
}

/// The containers: client and server of a pair one after the other.
struct Cast {
    pairs: Vec<Pair>,
    names: Vec<String>,
}

impl Cast {
    fn enter(stage: &mut Stage<'_>, rate: u32) -> Result<Cast> {
        let rate = rate.to_string();
        let loads: [&[&str]; 3] = [
            &["--qps", "4", "--threads-per-qp", "2", "--split-cq"],
            &["--qps", "4", "--events", "--srq", "--contexts", "2", "--idle-qps"],
            &["--qps", "2", "--registered", "8"],
        ];
        let mut pairs = Vec::new();
        for (tag, load) in (0u8..).zip(loads) {
            if tag == 2 {
                stage.memory_in_files();
            }
            // Begins somewhere else each time; everybody can be everywhere.
            let mut homes = NODES;
            homes.rotate_left(tag.into());
            let mut others = homes;
            others.rotate_left(1);
            // Twelve threads that wake up every millisecond would be half of an emulated node's load.
            let load = [load, &["--rate", &rate, "--stamp-ms", "20"]].concat();
            pairs.push(Pair::start(stage, tag, &homes, &others, &load)?);
        }
        let names = pairs.iter().flat_map(|p| [p.client.clone(), p.server.clone()]).collect();
        Ok(Cast { pairs, names })
    }
}

fn take_all(stage: &Stage<'_>) -> Result<Vec<Vitals>> {
    NODES.iter().map(|n| Vitals::take(stage.ctx.node(n)?)).collect()
}

fn steps(stage: &mut Stage<'_>, cast: &Cast, options: &Options, before: &[Vitals], told: &mut Vec<Told>) -> Result<()> {
    let mut random = Random::new(options.seed);
    let start = Instant::now();
    for n in 1..=options.migrations {
        if options.minutes.is_some_and(|m| start.elapsed() > Duration::from_secs(m * 60)) {
            println!("soak: time is up after {} of {} migrations", n - 1, options.migrations);
            break;
        }
        let mut places = Vec::new();
        for name in &cast.names {
            places.push(stage.node_of(name)?.name());
        }
        let step = plan::next(&mut random, &places, options.faults.into());
        let since = Instant::now();
        let mut one = one(stage, cast, &step, n, places[step.who])
            .with_context(|| format!("seed {}, migration {n}: {}", options.seed, describe(cast, &step, &places)))?;
        one.seconds = since.elapsed().as_secs_f64();
        if n % EVERY == 0 {
            let now = take_all(stage)?;
            if let Some(changed) = vitals::objects_changed(before, &now) {
                bail!("after migration {n} there are {changed}");
            }
            one.vitals = Some(now);
        }
        let left = start.elapsed().as_secs_f64() / n as f64 * (options.migrations - n) as f64 / 60.0;
        let pause = one.pause_ms.map_or_else(String::new, |ms| format!(", pause {ms:.0} ms"));
        println!(
            "soak: [{n}/{}] {}: {}{pause}; {:.0} s, about {left:.0} min left",
            options.migrations,
            describe(cast, &step, &places),
            if one.moved { "moved" } else { "goes on where it was" },
            one.seconds,
        );
        told.push(one);
    }
    Ok(())
}

fn describe(cast: &Cast, step: &Step, places: &[&str]) -> String {
    let mut text = format!("{} {} → {}", cast.names[step.who], places[step.who], step.to);
    if !step.way.is_empty() {
        text += &format!(" {}", step.way.join(" "));
    }
    if let Some(fault) = &step.fault {
        text += &format!(", {fault}");
    }
    text
}

/// One step, with everything that must hold after it.
fn one(stage: &mut Stage<'_>, cast: &Cast, step: &Step, n: usize, from: &'static str) -> Result<Told> {
    let (name, other) = (&cast.names[step.who], &cast.names[step.who ^ 1]);
    let running = stage.begin_migration(name, step.to, step.way)?;
    let beside = match step.fault {
        Some(Fault::OtherEnd(to)) => Some((stage.begin_migration(other, to, &[])?, to)),
        Some(fault) => {
            disturb(stage, &running, fault, from, step.to, stage.node_of(other)?.name())?;
            None
        }
        None => None,
    };
    let out = running.wait(MIGRATION)?;
    let beside = beside.map(|(running, to)| running.wait(MIGRATION).map(|out| (out, to))).transpose()?;
    let disturbed = matches!(step.fault, Some(Fault::Killed(..) | Fault::Interrupted(_)));
    let place = if disturbed { settled(stage, name)? } else { step.to };
    if !disturbed {
        succeeded(&out)?;
    }
    ensure!(place == step.to || place == from, "{name} is on {place}, where nobody sent it");
    ensure!(!out.success() || place == step.to, "the migration succeeded, and {name} runs on {place}");
    stage.moved(name, place)?;
    if let Some((out, to)) = beside {
        succeeded(&out).context("the other end")?;
        stage.moved(other, to)?;
    }
    // Traffic in both directions, for longer than what was held could last.
    stage.all_flow(&[name, other], 100)?;
    Ok(Told {
        n,
        container: name.clone(),
        from,
        to: step.to,
        way: step.way.join(" "),
        fault: step.fault.map(|f| f.to_string()),
        moved: place == step.to,
        pause_ms: pause_of(&out).map(|s| s * 1000.0),
        seconds: 0.0,
        vitals: None,
    })
}

fn disturb(
    stage: &Stage<'_>,
    running: &crate::lab::node::Running,
    fault: Fault,
    from: &str,
    to: &str,
    peer: &str,
) -> Result<()> {
    let (Fault::Killed(_, phase) | Fault::Interrupted(phase)) = fault else { return Ok(()) };
    let enter = format!("\"enter\",\"phase\":\"{phase}\"");
    if let Err(e) = running.wait_for(&enter, Duration::from_secs(120)) {
        // Not every way of moving has every phase; without it nothing is disturbed.
        return if running.is_running() { Err(e) } else { Ok(()) };
    }
    let node = match fault {
        Fault::Killed(Whose::Source, _) => from,
        Fault::Killed(Whose::Destination, _) => to,
        Fault::Killed(Whose::Peer, _) => peer,
        _ => return running.signal(nix::sys::signal::Signal::SIGINT),
    };
    stage.ctx.node(node)?.sh(&killed_and_started()).map(drop)
}

fn succeeded(out: &Output) -> Result<()> {
    ensure!(!out.done.timed_out, "it did not end by itself:\n{}", tail(&out.text()));
    ensure!(out.success(), "nothing disturbed it, and it failed: {}\n{}", out.errors(), tail(&out.text()));
    Ok(())
}

fn pause_of(out: &Output) -> Option<f64> {
    json_lines(&out.text()).filter(|v| v["event"] == "done").last()?["summary"]["pause_seconds"].as_f64()
}

/// Writes report and picture, and prints what the run was.
fn publish(told: &[Told], options: &Options, failed: Option<&anyhow::Error>, output: &Path) -> Result<()> {
    let moved = told.iter().filter(|t| t.moved).count();
    let disturbed = told.iter().filter(|t| t.fault.is_some()).count();
    let pauses: Vec<f64> = told.iter().filter_map(|t| t.pause_ms).collect();
    let seconds: f64 = told.iter().map(|t| t.seconds).sum();
    let report = json!({
        "ok": failed.is_none(),
        "error": failed.map(|e| format!("{e:#}")),
        "seed": options.seed,
        "migrations": told.len(),
        "moved": moved,
        "disturbed": disturbed,
        "median_pause_ms": median(&pauses),
        "seconds": seconds,
        "steps": told,
    });
    fs::create_dir_all(output).with_context(|| format!("make {}", output.display()))?;
    let write = |name: &str, text: &str| {
        let path = output.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    write("report.json", &serde_json::to_string_pretty(&report)?)?;
    write("soak.svg", &picture::svg(told))?;
    println!(
        "\n  {} migrations in {:.0} min: {moved} moved, {} went on where they were; {disturbed} were disturbed",
        told.len(),
        seconds / 60.0,
        told.len() - moved
    );
    if let Some(ms) = median(&pauses) {
        println!("  median pause {ms:.0} ms");
    }
    println!(
        "  {}",
        match failed {
            None => "Nothing lost, repeated, reordered, corrupted or left behind.".to_owned(),
            Some(e) => format!("It failed: {e:#}"),
        }
    );
    println!("  {}", output.join("soak.svg").display());
    Ok(())
}
