//! `cargo xtask bench blackout`: how long a moved container stands still, with RDMA and without, side by side.
//!
//! [`plan`] says what is measured in which order, [`measure`] makes one measurement in the lab, [`samples`] keeps it,
//! [`report`] draws the conclusions, [`table`] and [`plot`] show them. This file runs them one after the other. It
//! judges nothing: a benchmark has no pass or fail, only numbers that are resolved or not.

pub mod clocks;
pub mod counts;
pub mod instructions;
pub mod measure;
pub mod plain;
pub mod plan;
pub mod plot;
pub mod report;
pub mod samples;
pub mod session;
pub mod statistics;
pub mod table;

use crate::demo;
use crate::lab::deploy;
use crate::lab::paths::Paths;
use anyhow::{Context, Result};
use clap::Args;
use measure::Load;
use plan::{Item, Matrix, Variant};
use report::Report;
use samples::{Measured, OtherEnd, Store};
use serde_json::json;
use session::{Session, Warm};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Binaries a measurement belongs to.
const BINARIES: &[&str] = &["migrrdma", "libmigrrdma.so", "libmigrrdma_plugin.so", "rdma-checker"];

const AFTER_HELP: &str = "\
Variants, all with the same program, memory, threads and TCP connection:
  a  no RDMA in use, moved by `migrrdma migrate`: what the others are compared with
  b  RDMA, moved by `migrrdma migrate`
  c  RDMA, moved by `migrrdma migrate --no-pre-setup`
  d  no RDMA in use, moved by `runc checkpoint`, a copy, `runc restore`

Each round makes every measurement once, in an order of its own, and (a) before and after everything that is compared
with it; comparisons are made within rounds. A measurement takes about a minute. The run can be interrupted at any time: what is finished lies in
target/bench/blackout/samples.jsonl and is used by the next run of the same build, also with more repeats, other
amounts or other variants. An interval of a median needs 6 rounds.

  cargo xtask bench blackout                                   # 1, 8, 32 and 128 QPs, 16 MiB, 8 rounds
  cargo xtask bench blackout --qps 8 --repeats 20              # one amount, well resolved
  cargo xtask bench blackout --registered 16,512 --qps 8       # does registered memory cost anything
  cargo xtask bench blackout --rate 0 --variants b --qps 8     # throughput during pre-setup, under full load
  cargo xtask bench blackout --full --minutes 60               # an hour's share of everything
  cargo xtask bench blackout --report-only                     # tables and pictures of what there is";

/// What to measure.
#[derive(Args, Debug, Clone)]
#[command(after_help = AFTER_HELP)]
pub struct Options {
    /// QPs of the container that is moved
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1, 8, 32, 128])]
    pub qps: Vec<u16>,
    /// MiB of memory registered (without RDMA: held)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [16])]
    pub registered: Vec<u32>,
    /// Peer processes; the container that is moved has as many, QPs and memory are dealt out evenly
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1])]
    pub peers: Vec<u16>,
    /// Rounds
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub repeats: u32,
    /// Variants to measure, by letter
    #[arg(long, value_name = "LETTERS", default_value = "abcd")]
    pub variants: String,
    /// Operations per second and end; 0 is as many as possible. Measurements of different rates are kept apart
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub rate: u32,
    /// Where registered memory lies: `files`, which go ahead of the pause, or `private`, which CRIU copies in it.
    /// Measurements of each are kept apart
    #[arg(long, value_name = "WHERE", default_value = "files", value_parser = ["files", "private"])]
    pub memory: String,
    /// Moves of each measurement, there, back and there. The first one does not count if there are others, of which the
    /// median does. Measurements of different numbers are kept apart
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=15))]
    pub moves: u8,
    /// A further option of every `migrrdma migrate`, as in --migrate-option=--pre-copy-rounds=0 (repeatable).
    /// Measurements with different ones are kept apart
    #[arg(long = "migrate-option", value_name = "OPTION", allow_hyphen_values = true)]
    pub migrate_options: Vec<String>,
    /// 1, 2, 4 … 128 and 512 QPs, 16, 64, 256 and 512 MiB, 1, 2 and 4 peers: days, in this lab
    #[arg(long, conflicts_with_all = ["qps", "registered", "peers"])]
    pub full: bool,
    /// Begin nothing new after so many minutes; the next run goes on
    #[arg(long, value_name = "N")]
    pub minutes: Option<u64>,
    /// Forget what was measured before
    #[arg(long)]
    pub fresh: bool,
    /// Measure nothing
    #[arg(long, conflicts_with = "fresh")]
    pub report_only: bool,
    /// Use the release binaries as they are
    #[arg(long)]
    pub no_build: bool,
    /// Leave the lab up at the end
    #[arg(long)]
    pub keep: bool,
}

impl Options {
    /// The matrix they mean.
    pub fn matrix(&self) -> Result<Matrix> {
        let (qps, registered, peers) = if self.full {
            (vec![1, 2, 4, 8, 16, 32, 64, 128, 512], vec![16, 64, 256, 512], vec![1, 2, 4])
        } else {
            (self.qps.clone(), self.registered.clone(), self.peers.clone())
        };
        let variants = Variant::from_letters(&self.variants)?;
        let matrix = Matrix { qps, registered, peers, variants, repeats: self.repeats };
        matrix.check()?;
        Ok(matrix)
    }
}

/// Runs the benchmark as far as it gets, and shows what there is then.
pub fn run(options: &Options) -> Result<()> {
    let matrix = options.matrix()?;
    let load = Load {
        rate: options.rate,
        migrate_options: options.migrate_options.clone(),
        memory_in_files: options.memory == "files",
        moves: options.moves,
    };
    let paths = Paths::new()?;
    if !options.no_build && !options.report_only {
        crate::setup::ensure()?;
        deploy::build(&paths)?;
    }
    let output = paths.target.join("bench/blackout");
    let file = output.join("samples.jsonl");
    if options.fresh && file.exists() {
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    }
    let binaries: Vec<PathBuf> = BINARIES.iter().map(|b| deploy::built(&paths, b)).collect();
    let mut store = Store::open(&file, &samples::key(&binaries, &load.key())?)?;
    if store.foreign > 0 {
        println!("bench: {} measurements of other builds or loads are left alone", store.foreign);
    }
    if !options.report_only {
        let limit = options.minutes.map(|m| Duration::from_secs(m * 60));
        work(&matrix, &load, &mut store, limit, options.keep)?;
    }
    let report = report::build(&matrix, options.rate > 0, &store.samples);
    publish(&report, &matrix, &store, &output)
}

/// Makes the measurements that are missing.
fn work(matrix: &Matrix, load: &Load, store: &mut Store, limit: Option<Duration>, keep: bool) -> Result<()> {
    let all = matrix.items();
    let todo: Vec<_> = all.iter().filter(|i| !store.has(i)).copied().collect();
    println!("bench: {} measurements, {} of them are done", all.len(), all.len() - todo.len());
    if todo.is_empty() {
        return Ok(());
    }
    let start = Instant::now();
    let warm = Warm { item: warm_up(&todo), load };
    let mut session = Session::begin(keep, &warm)?;
    for (n, item) in todo.iter().enumerate() {
        // At least one, or a run that takes long to warm up would never get on.
        if n > 0 && limit.is_some_and(|l| start.elapsed() >= l) {
            println!("bench: time is up, {} measurements are left for the next run", todo.len() - n);
            break;
        }
        let since = Instant::now();
        let outcome = session.measure(item, load);
        let took = since.elapsed();
        let left = start.elapsed() / u32::try_from(n + 1)? * u32::try_from(todo.len() - n - 1)?;
        println!(
            "bench: [{}/{}] round {} ({}) {}: {}; {:.0} s, about {:.0} min left",
            all.len() - todo.len() + n + 1,
            all.len(),
            item.round + 1,
            item.variant.letter(),
            item.cell,
            describe(&outcome),
            took.as_secs_f64(),
            left.as_secs_f64() / 60.0
        );
        let failed = outcome.is_err();
        store.append(*item, took.as_secs_f64(), outcome.map_err(|e| format!("{e:#}")))?;
        if failed && let Err(e) = session.recover(&warm) {
            let _ = session.end();
            return Err(e);
        }
    }
    session.end()
}

/// The one that uses most of what the others use.
fn warm_up(todo: &[Item]) -> Item {
    *todo.iter().find(|i| i.variant == Variant::B).unwrap_or(&todo[0])
}

fn describe(outcome: &Result<Measured>) -> String {
    match outcome {
        Ok(measured) => {
            let mut text = format!("pause {:.0} ms", measured.median(|s| Some(s.gap_ms)).unwrap_or(f64::NAN));
            if let Some(ms) = measured.median(|s| s.other_end.as_ref().map(OtherEnd::extra_ms)) {
                text += &format!(", other end {ms:.0} ms");
            }
            if let Some(n) = measured.most(|s| s.counts.made_in_pause()) {
                text += &format!(", {n} objects made in it");
            }
            text
        }
        Err(e) => format!("FAILED: {e:#}"),
    }
}

/// Writes JSON, tables and pictures, and prints the tables.
fn publish(report: &Report, matrix: &Matrix, store: &Store, output: &Path) -> Result<()> {
    let title = "How long a moved container stands still";
    let json = serde_json::to_string_pretty(&json!({"matrix": matrix, "report": report}))?;
    let mut pictures: Vec<(String, String)> =
        plot::pictures(report).into_iter().map(|(name, svg)| (name.to_owned(), svg)).collect();
    pictures.extend(throughput(store));
    fs::create_dir_all(output).with_context(|| format!("make {}", output.display()))?;
    let write = |name: &str, text: &str| {
        let path = output.join(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))
    };
    write("report.json", &json)?;
    write("report.md", &format!("# {title}\n{}", table::markdown(report)))?;
    let text = table::text(report);
    write("report.txt", &text)?;
    for (name, svg) in &pictures {
        write(name, svg)?;
    }
    write("index.html", &plot::page(title, report, &pictures, &json))?;
    println!("{text}\npictures and numbers: {}", output.join("index.html").display());
    Ok(())
}

/// What the other end did around a move: for every amount with pre-setup, the last move with one peer process.
fn throughput(store: &Store) -> Vec<(String, String)> {
    let mut all = std::collections::BTreeMap::new();
    for (item, measured) in store.good() {
        let Some(seen) = measured.moves.last() else { continue };
        let Some(end) = seen.other_end.as_ref().filter(|_| item.variant == Variant::B && item.cell.peers == 1) else {
            continue;
        };
        let title = format!("Throughput as the other end sees it, {}", item.cell);
        // On the axis of the samples, which begins with the move.
        let mut summary = seen.summary.clone();
        summary["began"] = json!(0.0);
        let Ok(one) = demo::as_move("pre-setup", &summary) else { continue };
        let name = format!("throughput-{}qps-{}mib.svg", item.cell.qps, item.cell.registered);
        all.insert(item.cell, (name, demo::picture::svg(&title, &end.timeline, &[one])));
    }
    all.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn parse(args: &[&str]) -> Options {
        Cli::try_parse_from([&["x"], args].concat()).expect("options").options
    }

    #[test]
    fn the_defaults_are_those_of_the_help() {
        let m = parse(&[]).matrix().unwrap();
        assert_eq!((m.qps, m.registered, m.peers, m.repeats), (vec![1, 8, 32, 128], vec![16], vec![1], 8));
        assert_eq!(m.variants, Variant::ALL);
    }

    #[test]
    fn lists_and_the_full_matrix_are_understood() {
        let m = parse(&["--qps", "1,8", "--registered", "16,512", "--peers", "1,2,4", "--variants", "bc"])
            .matrix()
            .unwrap();
        assert_eq!((m.qps, m.registered, m.peers), (vec![1, 8], vec![16, 512], vec![1, 2, 4]));
        let full = parse(&["--full"]).matrix().unwrap();
        assert!(full.qps.contains(&512) && full.registered.contains(&256));
        assert!(Cli::try_parse_from(["x", "--full", "--qps", "1"]).is_err());
        assert!(parse(&["--variants", "z"]).matrix().is_err());
    }
}
