//! One measurement: two containers are started, one is moved, what was seen of it is gathered, all is removed. It is
//! moved there, back and there, as often as asked for: to start it costs more time than to move it. Its first move is not
//! counted if there are others ([`Measured::counted`]). Plain runc moves it once.
//!
//! The container that is moved is alike in all variants but for RDMA: the same program and libraries (without RDMA the
//! devices are listed and left alone), memory, number of threads and TCP connection, the same devices and network. It
//! takes no part in judging: gaps come from its stamps, everything else from outside.

use super::clocks::{self, Offset};
use super::counts;
use super::instructions;
use super::plain::{self, Plain};
use super::plan::{Item, Variant};
use super::samples::{Counts, Measured, OtherEnd, Seen};
use super::statistics;
use crate::demo::picture;
use crate::lab::node::Node;
use crate::lab::paths::Paths;
use crate::lab::{bundle, deploy, qemu};
use crate::scenario::Context;
use crate::scenarios::migration::stage::{CHECKER, Stage, json_lines, tail};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::thread;
use std::time::Duration;

const MOVED: &str = "bench-moved";
const OTHER: &str = "bench-other";
const MOVED_HOST: u8 = 181;
const MOVED_IP: &str = "10.20.0.181/24";
const OTHER_HOST: u8 = 182;
const OTHER_IP: &str = "10.20.0.182";
/// Where the container of plain runc leaves its result: its output goes nowhere.
const RESULT: &str = "/root/bench-result.json";
/// Undisturbed time before the move, seconds: what "before" and "normal" mean.
const BEFORE: f64 = 2.0;
/// Time for the other end to show its gap after the last phase, seconds.
const AFTER: f64 = 1.0;

/// What is the same in all measurements of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Operations per second and end; 0 is as many as possible.
    pub rate: u32,
    /// Further options of every `migrrdma migrate`.
    pub migrate_options: Vec<String>,
    /// Registered memory lies in files, as far as a container uses RDMA.
    pub memory_in_files: bool,
    /// Moves of one measurement.
    pub moves: u8,
}

impl Load {
    /// As part of the key of measurements.
    pub fn key(&self) -> String {
        let memory = if self.memory_in_files { "files" } else { "private" };
        format!("rate {}; memory {memory}; moves {}; {}", self.rate, self.moves, self.migrate_options.join(" "))
    }
}

/// Makes one measurement. What it leaves after a failure is the caller's to clean, by resetting the nodes.
pub fn measure(ctx: &mut Context, item: &Item, load: &Load, counting: bool) -> Result<Measured> {
    let mut stage = Stage::new(ctx);
    if load.memory_in_files && matches!(item.variant, Variant::B | Variant::C) {
        stage.memory_in_files();
    }
    let moves = match item.variant {
        Variant::D => vec![by_hand(&mut stage, item)?],
        _ => with_migrrdma(&mut stage, item, load, counting)?,
    };
    stage.finish()?;
    Ok(Measured { moves })
}

/// Removes what an interrupted run has left on a node; nothing to remove is no error.
pub fn clear(node: &Node) {
    for name in [MOVED, OTHER] {
        plain::remove(node, name);
        let _ = node.exec(&["migrrdma", "delete", "--force", name]);
        let _ = bundle::remove(node, name);
        let _ = node.exec(&["rm", "-rf", &format!("/var/lib/migrrdma/containers/{name}")]);
    }
}

fn with_migrrdma(stage: &mut Stage, item: &Item, load: &Load, counting: bool) -> Result<Vec<Seen>> {
    start_other(stage, item)?;
    stage.run(MOVED, MOVED_HOST, &["src", "dst"], &strs(&moved_command(item, load)))?;
    stage.wait_log(MOVED, "connection", |t| running(t) >= usize::from(item.cell.peers))?;
    stage.flow(MOVED, if item.variant.rdma() { 200 } else { 1 })?;
    let (src, dst) = (stage.ctx.src.clone(), stage.ctx.dst.clone());
    let mappings = counts::mappings(&src, MOVED)?;
    let counted = instructions::are_counted(&Paths::new()?, &[src.clone(), dst.clone()]);
    let ahead = if counted { Some((instructions::ahead(&src)?, instructions::ahead(&dst)?)) } else { None };
    let mut moves = Vec::new();
    for (n, (from, to)) in [("src", "dst"), ("dst", "src")].into_iter().cycle().take(load.moves.into()).enumerate() {
        let mut moved = move_once(stage, item, load, counting, from, to).with_context(|| format!("{from} → {to}"))?;
        if let Some((src, dst)) = ahead {
            let ahead = if n % 2 == 0 { (src, dst) } else { (dst, src) };
            moved.counts.instructions = instructions_of(&moved, from, to, ahead)?;
        }
        moves.push(moved);
    }
    stage.terminate(MOVED)?;
    let result = stage.verdict(MOVED)?;
    stage.verdict(OTHER)?;
    let text = if item.variant.rdma() { Some(stage.log(OTHER)?) } else { None };
    let mut seen = moves.into_iter().map(|m| m.seen(&result, text.as_deref())).collect::<Result<Vec<_>>>()?;
    seen.iter_mut().for_each(|s| s.counts.mappings = Some(mappings));
    Ok(seen)
}

/// What was executed in a move's pause, where that is counted.
fn instructions_of(moved: &Moved, from: &str, to: &str, ahead: (f64, f64)) -> Result<Option<u64>> {
    let paths = Paths::new()?;
    let log = |node: &str| fs::read(qemu::instructions(&paths.run(), node)).map(|ring| instructions::Log::parse(&ring));
    let (Ok(source), Ok(destination)) = (log(from), log(to)) else { return Ok(None) };
    Ok(instructions::of_pause(&source, &destination, ahead, &moved.to_destination, &moved.summary))
}

/// One move, before its container has told what it saw.
struct Moved {
    moments: Moments,
    /// From the clock of the host it left.
    to_destination: Offset,
    /// Likewise, with RDMA.
    to_peer: Option<Offset>,
    counts: Counts,
    summary: Value,
}

fn move_once(stage: &mut Stage, item: &Item, load: &Load, counting: bool, from: &str, to: &str) -> Result<Moved> {
    let rdma = item.variant.rdma();
    thread::sleep(Duration::from_secs_f64(BEFORE + 0.5));
    let (here, there, peer) = (stage.ctx.node(from)?.clone(), stage.ctx.node(to)?.clone(), stage.ctx.peer.clone());
    if counting {
        stage.ctx.nodes().into_iter().try_for_each(counts::forget)?;
    }
    let ask = || anyhow::Ok((clocks::ask(&here, &there)?, rdma.then(|| clocks::ask(&here, &peer)).transpose()?));
    let before = ask()?;
    let mut options = strs(&load.migrate_options);
    if item.variant == Variant::C {
        options.push("--no-pre-setup");
    }
    let summary = stage.migrate_with(MOVED, to, &options)?;
    let after = ask()?;
    let to_destination = Offset { before: before.0, after: after.0 };
    let to_peer = before.1.zip(after.1).map(|(before, after)| Offset { before, after });
    stage.flow(MOVED, if rdma { 100 } else { 1 })?;
    thread::sleep(Duration::from_secs_f64(AFTER));

    let moments = Moments::of(&summary).with_context(|| format!("phases of {summary}"))?;
    let mut counts = Counts {
        mappings: None,
        transferred_bytes: summary["image_bytes"].as_u64(),
        pre_copied_bytes: summary["pre_copied_bytes"].as_u64(),
        driver_calls_in_pause: None,
        instructions: None,
    };
    if let Some(to_peer) = to_peer.as_ref().filter(|_| counting) {
        let mut all = std::collections::BTreeMap::new();
        for (node, name, offset) in [(&there, "dst", &to_destination), (&peer, "peer", to_peer)] {
            let (from, to) = (offset.theirs(moments.suspend), offset.theirs(moments.resumed));
            all.extend(
                super::counts::calls(node, from, to)?.into_iter().map(|(event, n)| (format!("{name} {event}"), n)),
            );
        }
        counts.driver_calls_in_pause = Some(all);
    }
    Ok(Moved { moments, to_destination, to_peer, counts, summary })
}

impl Moved {
    /// `result` is the container's, `text` what the other end printed.
    fn seen(self, result: &Value, text: Option<&str>) -> Result<Seen> {
        let Moved { moments, to_destination, to_peer, counts, summary } = self;
        let end = |(text, to_peer): (&str, &Offset)| {
            other_end(text, &moments, to_peer).context("the other end printed no samples around the move")
        };
        let other_end = text.zip(to_peer.as_ref()).map(end).transpose()?;
        let seen = standstill(result, moments.began, moments.ended, &to_destination)?;
        let frozen = summary["frozen_seconds"].as_f64().unwrap_or(0.0) * 1000.0;
        // The runtime learns of the release a moment after it; more than that is no moment.
        ensure!(
            (0.7 * frozen..1.3 * frozen + 1000.0).contains(&seen.gap_ms),
            "the container says it stood still for {:.0} ms, the runtime froze it for {frozen:.0} ms: one of them is wrong",
            seen.gap_ms
        );
        Ok(Seen { other_end, counts, summary, ..seen })
    }
}

fn by_hand(stage: &mut Stage, item: &Item) -> Result<Seen> {
    let (src, dst) = (stage.ctx.src.clone(), stage.ctx.dst.clone());
    start_other(stage, item)?;
    let plain = Plain { name: MOVED, ip: MOVED_IP, from: &src, to: &dst };
    plain.prepare(&deploy::built(&Paths::new()?, "rdma-checker"), CHECKER, &hold_command(item))?;
    stage.adopt(MOVED, "src", &["src", "dst"]);
    let done = move_by_hand(stage, &plain);
    if done.is_err() {
        plain.remove();
    }
    done
}

fn move_by_hand(stage: &mut Stage, plain: &Plain) -> Result<Seen> {
    let (src, dst) = (plain.from, plain.to);
    plain.start()?;
    // Its output goes nowhere: that it is connected is told by the other end.
    stage.wait_log(OTHER, "connection", |t| running(t) > 0)?;
    stage.flow(OTHER, 1)?;
    thread::sleep(Duration::from_secs_f64(BEFORE + 0.5));
    let mappings = counts::mappings(src, plain.name)?;
    let before = clocks::ask(src, dst)?;
    let steps = plain.migrate()?;
    let to_dst = Offset { before, after: clocks::ask(src, dst)? };
    stage.flow(OTHER, 2).context("after the move by hand")?;
    plain.terminate()?;
    stage.verdict(OTHER)?;
    let text = dst.sh(&format!("cat {}/{MOVED}/rootfs{RESULT}", crate::lab::bundle::BUNDLES))?;
    let results: Vec<Value> = json_lines(&text).collect();
    ensure!(!results.is_empty() && results.iter().all(|r| r["ok"] == true), "the container found: {}", tail(&text));
    let at = |k: &str| steps[k].as_f64().with_context(|| format!("no {k} in {steps}"));
    let mut seen = standstill(&json!({"processes": results}), at("began")?, at("ended")?, &to_dst)?;
    seen.counts.mappings = Some(mappings);
    seen.counts.transferred_bytes = steps["image_bytes"].as_u64();
    seen.summary = steps;
    plain.remove();
    Ok(seen)
}

fn standstill(result: &Value, began: f64, ended: f64, to_dst: &Offset) -> Result<Seen> {
    let gaps = clocks::gaps(result);
    let gap = clocks::standstill(&gaps, began, ended, to_dst)
        .with_context(|| format!("no standstill between {began:.3} and {ended:.3} among {gaps:?}"))?;
    Ok(Seen {
        gap_ms: gap * 1000.0,
        clock_error_ms: to_dst.error() * 1000.0,
        clock_ahead_ms: to_dst.ahead_at(ended) * 1000.0,
        ..Seen::default()
    })
}

fn start_other(stage: &mut Stage, item: &Item) -> Result<()> {
    let peers = item.cell.peers.to_string();
    let mut command = if item.variant.rdma() {
        vec![CHECKER, "server", "--timeline", "-", "--progress", "2", "--identity-ms", "0"]
    } else {
        vec![CHECKER, "hold"]
    };
    command.extend(["--processes", &peers]);
    stage.run(OTHER, OTHER_HOST, &["peer"], &command)?;
    let wanted = usize::from(item.cell.peers);
    stage.wait_log(OTHER, "listening", |t| t.matches("\"listening\"").count() >= wanted)
}

fn running(text: &str) -> usize {
    text.matches("\"running\"").count()
}

fn strs(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

fn moved_command(item: &Item, load: &Load) -> Vec<String> {
    if !item.variant.rdma() {
        return hold_command(item);
    }
    let peers = item.cell.peers;
    let rate = if load.rate == 0 { 0 } else { (load.rate / u32::from(peers)).max(1) };
    words(&[
        (CHECKER, "client".to_owned()),
        ("--connect", OTHER_IP.to_owned()),
        ("--processes", peers.to_string()),
        ("--qps", (item.cell.qps / peers).to_string()),
        ("--registered", (item.cell.registered / u32::from(peers)).to_string()),
        ("--one-registration", String::new()),
        ("--rate", rate.to_string()),
        // Small, so that many QPs fit into little memory; nobody polls, so that no other node is robbed of its CPU.
        ("--depth", "4".to_owned()),
        ("--msg-size", "1024".to_owned()),
        ("--completions", "events".to_owned()),
        ("--duration", "0".to_owned()),
        ("--progress", "1".to_owned()),
        ("--identity-ms", "0".to_owned()),
    ])
}

fn hold_command(item: &Item) -> Vec<String> {
    let peers = item.cell.peers;
    words(&[
        (CHECKER, "hold".to_owned()),
        ("--connect", OTHER_IP.to_owned()),
        ("--processes", peers.to_string()),
        ("--memory", (item.cell.registered / u32::from(peers)).to_string()),
        ("--list-devices", String::new()),
        ("--result", RESULT.to_owned()),
    ])
}

/// Options with their values; those with an empty one have none.
fn words(pairs: &[(&str, String)]) -> Vec<String> {
    pairs.iter().flat_map(|(k, v)| [(*k).to_owned(), v.clone()]).filter(|word| !word.is_empty()).collect()
}

/// Moments of a migration by the source's clock, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moments {
    began: f64,
    suspend: f64,
    resumed: f64,
    ended: f64,
}

impl Moments {
    fn of(summary: &Value) -> Option<Moments> {
        let began = summary["began"].as_f64()?;
        let spans: Vec<(&str, f64, f64)> = summary["spans"]
            .as_array()?
            .iter()
            .filter_map(|s| {
                let start = s["start"].as_f64()?;
                Some((s["phase"].as_str()?, began + start, began + start + s["seconds"].as_f64()?))
            })
            .collect();
        let of = |name| spans.iter().find(|(n, ..)| *n == name);
        let ended = spans.iter().map(|s| s.2).fold(began, f64::max);
        let (suspend, resumed) = (of("suspend").or(of("freeze"))?.1, of("resume").or(of("commit"))?.2);
        Some(Moments { began, suspend, resumed, ended })
    }
}

/// What the samples of the other end say, by its own clock.
fn other_end(text: &str, moments: &Moments, to_peer: &Offset) -> Option<OtherEnd> {
    struct Line {
        at: f64,
        gap: f64,
        ops: f64,
        bytes: f64,
        length: f64,
    }
    let mut last = None;
    let lines: Vec<Line> = json_lines(text)
        .filter(|v| v["event"] == "sample")
        .filter_map(|v| {
            let number = |k: &str| v[k].as_f64();
            let mono = number("mono_ms")? / 1000.0;
            let length = last.replace(mono).map_or(0.1, |l: f64| (mono - l).max(0.001));
            let at = number("wall_ms")? / 1000.0;
            Some(Line { at, gap: number("max_gap_ms")?, ops: number("ops")?, bytes: number("bytes")?, length })
        })
        .collect();
    let theirs = |own: f64| to_peer.theirs(own);
    let within = |from: f64, to: f64| lines.iter().filter(move |l| l.at >= from && l.at <= to);
    let began = theirs(moments.began);
    let before = || within(began - BEFORE, began);
    let normal_ms = statistics::median(&before().map(|l| l.gap).collect::<Vec<_>>())?;
    let gap_ms = within(theirs(moments.suspend), theirs(moments.resumed) + AFTER).map(|l| l.gap).reduce(f64::max)?;
    let rate = |from, to| {
        let (ops, time) = within(from, to).fold((0.0, 0.0), |(o, t), l| (o + l.ops, t + l.length));
        if time > 0.0 { ops / time } else { 0.0 }
    };
    let timeline = within(began - BEFORE, theirs(moments.ended) + AFTER)
        .map(|l| picture::Sample {
            at_ms: ((l.at - began) * 1000.0).round(),
            mb_per_s: (l.bytes / l.length / 1e3).round() / 1e3,
            gap_ms: l.gap,
        })
        .collect();
    Some(OtherEnd {
        gap_ms,
        normal_ms,
        ops_before: rate(began - BEFORE, began),
        ops_during: rate(began, theirs(moments.suspend)),
        timeline,
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::Cell;
    use super::*;

    fn summary() -> Value {
        json!({"began": 100.0, "spans": [
            {"phase": "negotiate", "start": 0.0, "seconds": 2.0},
            {"phase": "suspend", "start": 2.0, "seconds": 0.1},
            {"phase": "resume", "start": 4.0, "seconds": 0.5},
            {"phase": "finish", "start": 4.5, "seconds": 0.5}]})
    }

    #[test]
    fn moments_are_those_of_the_phases() {
        let m = Moments::of(&summary()).unwrap();
        assert_eq!(m, Moments { began: 100.0, suspend: 102.0, resumed: 104.5, ended: 105.0 });
        assert_eq!(Moments::of(&json!({})), None);
    }

    #[test]
    fn the_other_end_is_looked_at_by_its_own_clock() {
        // It is one second ahead, does 10 operations in 100 ms, and stands still from 103.2 to 105.2 of its clock.
        let r = clocks::Reading { at: 100.0, ahead: 1.0, error: 0.0 };
        let offset = Offset { before: r, after: r };
        let mut text = String::new();
        for i in 0..120 {
            let wall = 97_000 + i * 100;
            let still = (103_200..105_200).contains(&wall);
            let gap = if wall == 105_200 { 2000 } else { 12 };
            let ops = if still { 0 } else { 10 };
            text += &json!({"event": "sample", "wall_ms": wall, "mono_ms": i * 100, "ops": ops, "bytes": ops * 1000,
                "max_gap_ms": gap})
            .to_string();
            text.push('\n');
        }
        let seen = other_end(&text, &Moments::of(&summary()).unwrap(), &offset).unwrap();
        assert_eq!((seen.gap_ms, seen.normal_ms, seen.extra_ms()), (2000.0, 12.0, 1988.0));
        assert!((seen.ops_before - 100.0).abs() < 1.0 && (seen.ops_during - 100.0).abs() < 1.0, "{seen:?}");
        assert!(!seen.timeline.is_empty());
        assert_eq!(other_end("", &Moments::of(&summary()).unwrap(), &offset), None);
    }

    #[test]
    fn amounts_are_dealt_out_to_the_peers() {
        let item = Item { round: 0, variant: Variant::B, cell: Cell { qps: 8, registered: 16, peers: 4 }, nth: 0 };
        let line = moved_command(&item, &load(400)).join(" ");
        assert!(
            line.contains("--qps 2 ") && line.contains("--registered 4 ") && line.contains("--rate 100 "),
            "{line}"
        );
        let item = Item { variant: Variant::A, cell: item.cell.baseline(), ..item };
        assert!(moved_command(&item, &load(0)).join(" ").contains("hold --connect 10.20.0.182 --processes 4"));
    }

    fn load(rate: u32) -> Load {
        Load { rate, migrate_options: vec![], memory_in_files: true, moves: 4 }
    }
}
