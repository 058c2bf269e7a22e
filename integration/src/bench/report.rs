//! From finished measurements to what is said of them: a row per variant and amount, a verdict per published figure.
//!
//! Pure. An interval wider than ± 5 % resolves nothing: what rests on it is reported as *not resolved*, never as reached.

use super::plan::{Cell, Matrix, Variant};
use super::samples::{Measured, Sample, Seen};
use super::statistics::{self, Estimate, FEWEST};
use serde::Serialize;
use serde_json::Value;
use std::collections::BTreeSet;

/// Widest half of an interval that still says something: a share, of the median or of the baseline.
pub const TOLERANCE: f64 = 0.05;
/// Phases in which kernel objects are made, connected, and memory is registered, if they lie within the pause.
const SET_UP: &[&str] = &["converge", "switch"];

/// What is told of one variant with one amount.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    pub variant: Variant,
    #[serde(flatten)]
    pub cell: Cell,
    /// Pause by the container's stamps, milliseconds.
    pub gap_ms: Estimate,
    /// By how much longer than variant a just before and after it, as a share of that.
    pub extra_share: Option<Estimate>,
    /// [`Row::gap_ms`] of the first move of each container; in no other time.
    pub first_ms: Option<Estimate>,
    /// What the move adds to the other end's normal gap, milliseconds.
    pub other_end_ms: Option<Estimate>,
    /// From the first held send until all are free again, by the runtime, milliseconds.
    pub own_pause_ms: Option<Estimate>,
    /// From the freeze until the tasks run again, by the runtime, milliseconds.
    pub own_frozen_ms: Option<Estimate>,
    /// RDMA set-up inside the pause as a share of it.
    pub set_up_share: Option<Estimate>,
    /// Operations per second from the begin of the move to the pause, over those before.
    pub throughput_share: Option<Estimate>,
    /// Counts, the largest of any move.
    pub mappings: Option<u64>,
    pub transferred_bytes: Option<u64>,
    pub pre_copied_bytes: Option<u64>,
    pub made_in_pause: Option<u64>,
    /// Instructions inside the pause, millions.
    pub instructions_m: Option<Estimate>,
    /// By how many more than variant a just before and after it, as a share of those.
    pub extra_instructions: Option<Estimate>,
    /// Median length of each phase (of plain runc: each step), milliseconds, in order.
    pub phases: Vec<(String, f64)>,
    /// Largest error of [`Row::gap_ms`] by the hosts' clocks, milliseconds.
    pub clock_error_ms: f64,
}

impl Row {
    /// Whether the pause is known well enough.
    pub fn resolved(&self) -> bool {
        self.gap_ms.resolved_within(TOLERANCE)
    }
}

/// How a figure compares with what is to be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "verdict", content = "why")]
pub enum Verdict {
    /// And what it aims at.
    AimReached,
    Reached,
    NotReached,
    /// Why.
    NotResolved(String),
    /// Why.
    NotMeasured(String),
}

impl Verdict {
    /// As words.
    pub fn words(&self) -> String {
        match self {
            Verdict::AimReached => "reached, and the aim too".into(),
            Verdict::Reached => "reached".into(),
            Verdict::NotReached => "not reached".into(),
            Verdict::NotResolved(why) => format!("not resolved: {why}"),
            Verdict::NotMeasured(why) => format!("not measured: {why}"),
        }
    }
}

/// One line of the comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    pub name: String,
    /// Of the published MigrRDMA.
    pub published: String,
    pub to_reach: String,
    pub aim: String,
    pub measured: String,
    #[serde(flatten)]
    pub verdict: Verdict,
}

/// Everything.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub rows: Vec<Row>,
    pub figures: Vec<Figure>,
    /// Measurements used.
    pub measurements: usize,
    /// Measurements that are still missing.
    pub missing: usize,
    /// Measurements that failed, in words.
    pub failures: Vec<String>,
}

/// Measurements of one variant with one amount.
struct Group<'a> {
    variant: Variant,
    cell: Cell,
    all: Vec<One<'a>>,
}

/// One of them.
struct One<'a> {
    round: u32,
    /// When it was done, in seconds.
    at: f64,
    measured: &'a Measured,
}

impl Group<'_> {
    fn values(&self, of: impl Fn(&Seen) -> Option<f64>) -> Vec<(u32, f64)> {
        self.all.iter().filter_map(|o| Some((o.round, o.measured.median(&of)?))).collect()
    }

    /// By how much more this group has of something than the baseline, as a share of that: of each round the mean of the
    /// two that were measured next to it, which are the one before and the one after.
    fn above(&self, baseline: &Group, of: impl Fn(&Seen) -> Option<f64>) -> Option<Estimate> {
        let next_to = |one: &One| {
            let mut all: Vec<&One> = baseline.all.iter().filter(|a| a.round == one.round).collect();
            all.sort_by(|x, y| (x.at - one.at).abs().total_cmp(&(y.at - one.at).abs()));
            let near: Vec<f64> = all.iter().take(2).filter_map(|a| a.measured.median(&of)).collect();
            (!near.is_empty()).then(|| near.iter().sum::<f64>() / near.len() as f64)
        };
        let pairs: Vec<_> =
            self.all.iter().filter_map(|one| Some((next_to(one)?, one.measured.median(&of)?))).collect();
        statistics::relative_difference(&pairs)
    }

    fn estimate(&self, of: impl Fn(&Seen) -> Option<f64>) -> Option<Estimate> {
        let values: Vec<f64> = self.values(of).into_iter().map(|(_, v)| v).collect();
        statistics::estimate(&values)
    }

    /// Of the moves that do not count.
    fn apart(&self, of: impl Fn(&Seen) -> Option<f64>) -> Option<Estimate> {
        statistics::estimate(&self.all.iter().filter_map(|o| of(o.measured.apart()?)).collect::<Vec<_>>())
    }

    fn most(&self, of: impl Fn(&Seen) -> Option<u64>) -> Option<u64> {
        self.all.iter().filter_map(|o| o.measured.most(&of)).max()
    }
}

/// Length of a phase in milliseconds.
fn phase_ms(summary: &Value, name: &str) -> Option<f64> {
    if let Some(seconds) = summary["steps"][name].as_f64() {
        return Some(seconds * 1000.0);
    }
    let spans = summary["spans"].as_array()?.iter().filter(|s| s["phase"] == name);
    let all: Vec<f64> = spans.filter_map(|s| s["seconds"].as_f64()).collect();
    (!all.is_empty()).then(|| all.iter().sum::<f64>() * 1000.0)
}

fn phase_names(summary: &Value) -> Vec<String> {
    if summary["steps"].is_object() {
        return ["checkpoint", "copy", "restore"].map(str::to_owned).to_vec();
    }
    let spans = summary["spans"].as_array().into_iter().flatten();
    spans.filter_map(|s| Some(s["phase"].as_str()?.to_owned())).collect()
}

fn seconds_ms(summary: &Value, field: &str) -> Option<f64> {
    summary[field].as_f64().map(|s| s * 1000.0)
}

fn set_up_share(summary: &Value) -> Option<f64> {
    let pause = seconds_ms(summary, "pause_seconds").filter(|p| *p > 0.0)?;
    Some(SET_UP.iter().filter_map(|name| phase_ms(summary, name)).sum::<f64>() / pause)
}

/// Gathers everything. Measurements outside of `matrix` are left out.
pub fn build(matrix: &Matrix, paced: bool, samples: &[Sample]) -> Report {
    let items: BTreeSet<_> = matrix.items().into_iter().collect();
    let mine: Vec<&Sample> = samples.iter().filter(|s| items.contains(&s.item)).collect();
    let mut groups = Vec::new();
    for cell in matrix.cells() {
        for &variant in matrix.variants.iter().filter(|v| v.rdma() == (cell.qps > 0)) {
            let of_it = mine.iter().filter(|s| s.item.variant == variant && s.item.cell == cell);
            let all: Vec<_> = of_it
                .filter_map(|s| Some(One { round: s.item.round, at: s.at, measured: s.outcome.as_ref().ok()? }))
                .collect();
            if !all.is_empty() {
                groups.push(Group { variant, cell, all });
            }
        }
    }
    let rows: Vec<Row> = groups.iter().map(|g| row(g, &groups)).collect();
    let done = mine.iter().filter(|s| s.outcome.is_ok()).count();
    let failures = mine
        .iter()
        .filter_map(|s| {
            let why = s.outcome.as_ref().err()?;
            Some(format!("{}, {}, round {}: {why}", s.item.variant.letter(), s.item.cell, s.item.round + 1))
        })
        .collect();
    let figures = figures(&rows, &groups, paced);
    Report { rows, figures, measurements: done, missing: items.len() - done, failures }
}

fn find<'a>(groups: &'a [Group<'a>], variant: Variant, cell: Cell) -> Option<&'a Group<'a>> {
    groups.iter().find(|g| g.variant == variant && g.cell == cell)
}

fn gap(seen: &Seen) -> Option<f64> {
    Some(seen.gap_ms)
}

fn row(group: &Group, all: &[Group]) -> Row {
    let baseline = find(all, Variant::A, group.cell.baseline()).filter(|_| group.variant != Variant::A);
    let extra = baseline.and_then(|a| group.above(a, gap));
    let instructions = |s: &Seen| s.counts.instructions.map(|n| n as f64 / 1e6);
    let rdma = group.variant.rdma();
    let own = |field: &'static str| group.estimate(move |s| seconds_ms(&s.summary, field));
    let moves = || group.all.iter().flat_map(|o| o.measured.counted());
    let names = moves().next().map(|s| phase_names(&s.summary)).unwrap_or_default();
    let phases = names.into_iter().filter_map(|name| {
        let all: Vec<f64> = moves().filter_map(|s| phase_ms(&s.summary, &name)).collect();
        Some((name, statistics::median(&all)?))
    });
    Row {
        variant: group.variant,
        cell: group.cell,
        gap_ms: group.estimate(gap).unwrap_or(Estimate { median: f64::NAN, low: f64::NAN, high: f64::NAN, n: 0 }),
        extra_share: extra,
        first_ms: group.apart(gap),
        other_end_ms: group.estimate(|s| Some(s.other_end.as_ref()?.extra_ms())),
        own_pause_ms: own("pause_seconds").filter(|_| rdma),
        own_frozen_ms: own("frozen_seconds"),
        set_up_share: group.estimate(|s| set_up_share(&s.summary)).filter(|_| rdma),
        throughput_share: group.estimate(|s| {
            let end = s.other_end.as_ref().filter(|e| e.ops_before > 0.0)?;
            Some(end.ops_during / end.ops_before)
        }),
        mappings: group.most(|s| s.counts.mappings),
        transferred_bytes: group.most(|s| s.counts.transferred_bytes),
        pre_copied_bytes: group.most(|s| s.counts.pre_copied_bytes),
        made_in_pause: group.most(|s| s.counts.made_in_pause()),
        instructions_m: group.estimate(instructions),
        extra_instructions: baseline.and_then(|a| group.above(a, instructions)),
        phases: phases.collect(),
        clock_error_ms: moves().map(|s| s.clock_error_ms).fold(0.0, f64::max),
    }
}

/// Compares an estimate with an upper limit. `tolerance` is in its unit.
fn at_most(e: &Estimate, tolerance: f64, limit: f64, aim: f64) -> Verdict {
    if e.n < FEWEST {
        return Verdict::NotResolved(format!("{} rounds are too few for a 95 % interval, it takes {FEWEST}", e.n));
    }
    if !e.resolved(tolerance) {
        let side = match (e.high <= limit, e.low > limit) {
            (true, _) => ", though all of it is within the limit",
            (_, true) => ", though all of it is beyond the limit",
            _ => "",
        };
        return Verdict::NotResolved(format!("the interval is wider than ± 5 %{side}"));
    }
    match (e.high <= aim, e.high <= limit, e.low > limit) {
        (true, ..) => Verdict::AimReached,
        (_, true, _) => Verdict::Reached,
        (.., true) => Verdict::NotReached,
        _ => Verdict::NotResolved("the limit lies within the interval".into()),
    }
}

/// Compares an estimate with a lower limit that is the aim as well.
fn at_least(e: &Estimate, tolerance: f64, limit: f64) -> Verdict {
    let turned = Estimate { median: -e.median, low: -e.high, high: -e.low, n: e.n };
    at_most(&turned, tolerance, -limit, -limit)
}

/// `1.5 % [1.2, 1.8]`.
pub fn percent(e: &Estimate) -> String {
    format!("{:+.1} % [{:+.1}, {:+.1}]", e.median * 100.0, e.low * 100.0, e.high * 100.0)
}

fn plain_percent(e: &Estimate) -> String {
    percent(e).replace('+', "")
}

/// Published extra pause, limit and aim for a number of QPs.
fn extra_limits(qps: u16) -> (&'static str, f64, f64) {
    match qps {
        ..=8 => ("1.4 … 1.6 %", 0.016, 0.0),
        9..=32 => ("8.1 %", 0.08, 0.02),
        33..=64 => ("14.1 %", 0.10, 0.02),
        65..=128 => ("15.6 %", 0.12, 0.02),
        _ => ("–", 0.12, 0.02),
    }
}

fn figures(rows: &[Row], groups: &[Group], paced: bool) -> Vec<Figure> {
    let mut all = Vec::new();
    for row in rows.iter().filter(|r| r.variant == Variant::B) {
        all.extend(extra_pause(row));
    }
    for row in rows.iter().filter(|r| r.variant == Variant::B) {
        all.push(made_in_pause(row));
    }
    for row in rows.iter().filter(|r| r.variant == Variant::B && r.cell.qps >= 8) {
        all.push(saved(row, groups));
    }
    all.extend(by_memory(groups));
    for row in rows.iter().filter(|r| r.variant == Variant::B) {
        all.extend(throughput(row, paced));
    }
    all
}

fn extra_pause(row: &Row) -> Option<Figure> {
    let e = row.extra_share?;
    let (published, limit, aim) = extra_limits(row.cell.qps);
    Some(Figure {
        name: format!("extra pause (b)−(a) over (a), {}", row.cell),
        published: published.into(),
        to_reach: format!("≤ {} %", limit * 100.0),
        aim: if aim == 0.0 { "below 0".into() } else { format!("≤ {} %", aim * 100.0) },
        measured: percent(&e),
        verdict: at_most(&e, TOLERANCE, limit, aim),
    })
}

fn made_in_pause(row: &Row) -> Figure {
    let (measured, verdict) = match row.made_in_pause {
        None => ("–".into(), Verdict::NotMeasured("the nodes' kernels cannot count the driver's calls".into())),
        Some(0) => ("0".into(), Verdict::AimReached),
        Some(n) => (n.to_string(), Verdict::NotReached),
    };
    Figure {
        name: format!("kernel objects made inside the pause, {}", row.cell),
        published: "–".into(),
        to_reach: "0".into(),
        aim: "0".into(),
        measured,
        verdict,
    }
}

fn saved(row: &Row, groups: &[Group]) -> Figure {
    let pair = find(groups, Variant::C, row.cell).zip(find(groups, Variant::B, row.cell));
    let saved = pair.and_then(|(c, b)| {
        let pairs = statistics::pairs(&c.values(gap), &b.values(gap));
        statistics::relative_difference(&pairs)
    });
    let saved = saved.map_or("(c) not measured".to_owned(), |e| {
        let turned = Estimate { median: -e.median, low: -e.high, high: -e.low, n: e.n };
        format!("saved {}", plain_percent(&turned))
    });
    let (share, verdict) = match &row.set_up_share {
        Some(e) => (plain_percent(e), at_most(e, TOLERANCE, 0.05, 0.0)),
        None => ("–".into(), Verdict::NotMeasured("no phase times".into())),
    };
    Figure {
        name: format!("RDMA set-up inside the pause, and pause saved (c)→(b), {}", row.cell),
        published: "saved 57 … 61 %".into(),
        to_reach: "set-up ≤ 5 % of the pause".into(),
        aim: "0".into(),
        measured: format!("set-up {share}; {saved}"),
        verdict,
    }
}

/// Pause with much memory registered against that with little.
fn by_memory(groups: &[Group]) -> Vec<Figure> {
    let b = || groups.iter().filter(|g| g.variant == Variant::B);
    let small = b().map(|g| g.cell.registered).min().unwrap_or(0);
    b().filter(|g| g.cell.registered > small)
        .filter_map(|big| {
            let base = find(groups, Variant::B, Cell { registered: small, ..big.cell })?;
            let e = statistics::ratio(&statistics::pairs(&base.values(gap), &big.values(gap)))?;
            Some(Figure {
                name: format!("pause with {} against {small} MiB registered", big.cell),
                published: "copies it all".into(),
                to_reach: "≤ 1.3 ×".into(),
                aim: "≤ 1.05 ×".into(),
                measured: format!("{:.2} × [{:.2}, {:.2}]", e.median, e.low, e.high),
                verdict: at_most(&e, TOLERANCE * e.median, 1.3, 1.05),
            })
        })
        .collect()
}

fn throughput(row: &Row, paced: bool) -> Option<Figure> {
    let e = row.throughput_share?;
    let verdict = if paced {
        Verdict::NotMeasured("the load is paced; `--rate 0 --variants b` measures it".into())
    } else {
        at_least(&e, TOLERANCE * e.median, 0.9)
    };
    Some(Figure {
        name: format!("throughput from the begin of the move to the pause, {}", row.cell),
        published: "\"small brownout\"".into(),
        to_reach: "measured".into(),
        aim: "≥ 90 % of before".into(),
        measured: plain_percent(&e),
        verdict,
    })
}

#[cfg(test)]
mod tests {
    use super::super::plan::Item;
    use super::super::samples::Counts;
    use super::*;
    use serde_json::json;

    fn sample(round: u32, variant: Variant, qps: u16, gap_ms: f64) -> Sample {
        let cell = Cell { qps, registered: 16, peers: 1 };
        let summary = json!({"began": 1.0, "pause_seconds": 2.0, "frozen_seconds": 1.5, "spans": [
            {"phase": "suspend", "start": 0.0, "seconds": 0.5},
            {"phase": "converge", "start": 0.5, "seconds": 0.1},
            {"phase": "switch", "start": 1.5, "seconds": 0.1}]});
        let calls = [("dst qp".to_owned(), 0), ("dst modify-qp".to_owned(), 7)].into();
        let counts = Counts {
            mappings: Some(60),
            transferred_bytes: Some(1 << 20),
            driver_calls_in_pause: Some(calls),
            ..Counts::default()
        };
        let seen = Seen { gap_ms, clock_error_ms: 0.3, summary, counts, ..Seen::default() };
        let item = Item { round, variant, cell, nth: 0 };
        Sample { key: "k".into(), item, at: 0.0, took: 1.0, outcome: Ok(Measured { moves: vec![seen] }) }
    }

    fn matrix(repeats: u32) -> Matrix {
        Matrix { qps: vec![8], registered: vec![16], peers: vec![1], variants: Variant::ALL.to_vec(), repeats }
    }

    fn run(repeats: u32, extra: f64) -> Report {
        let samples: Vec<_> = (0..repeats)
            .flat_map(|r| {
                // The lab gets slower from round to round: only pairs tell the truth.
                let a = 1000.0 * (1.0 + f64::from(r) * 0.1);
                [(Variant::A, 0, 1.0), (Variant::B, 8, 1.0 + extra), (Variant::C, 8, 2.0)]
                    .map(|(v, qps, f)| sample(r, v, qps, a * f))
            })
            .collect();
        build(&matrix(repeats), true, &samples)
    }

    fn verdict_of(report: &Report, name: &str) -> Verdict {
        report.figures.iter().find(|f| f.name.starts_with(name)).expect(name).verdict.clone()
    }

    #[test]
    fn what_slows_all_of_a_round_does_not_hide_a_difference() {
        let report = run(8, 0.01);
        assert_eq!(verdict_of(&report, "extra pause"), Verdict::Reached);
        assert_eq!(verdict_of(&run(8, 0.2), "extra pause"), Verdict::NotReached);
        assert_eq!(verdict_of(&run(8, -0.1), "extra pause"), Verdict::AimReached);
        let b = report.rows.iter().find(|r| r.variant == Variant::B).unwrap();
        assert!(!b.resolved(), "the times themselves scatter");
        assert!((b.extra_share.unwrap().median - 0.01).abs() < 1e-9);
        assert!((b.set_up_share.unwrap().median - 0.1).abs() < 1e-9);
        assert_eq!(verdict_of(&report, "RDMA set-up"), Verdict::NotReached);
        assert_eq!(verdict_of(&report, "kernel objects"), Verdict::AimReached);
        // One (d) and the second (a) of every round were not made.
        assert_eq!((report.measurements, report.missing), (24, 16));
    }

    #[test]
    fn what_slows_the_lab_within_a_round_does_not_hide_a_difference_either() {
        let mut samples = Vec::new();
        for round in 0..8 {
            // A minute each: a, b, a, and a third a that belongs to something else; the lab gets slower all the time.
            let at = |minute: u32| f64::from(round * 10 + minute);
            let plan = [(Variant::A, 0, 0, 0), (Variant::B, 8, 0, 1), (Variant::A, 0, 1, 2), (Variant::A, 0, 2, 9)];
            for (variant, qps, nth, minute) in plan {
                let extra = if variant == Variant::B { 1.01 } else { 1.0 };
                let mut one = sample(round, variant, qps, 1000.0 * (1.0 + at(minute) * 0.05) * extra);
                (one.item.nth, one.at) = (nth, at(minute) * 60.0);
                samples.push(one);
            }
        }
        let more = Matrix { qps: vec![8, 32], ..matrix(8) };
        let report = build(&more, true, &samples);
        let b = report.rows.iter().find(|r| r.variant == Variant::B).unwrap();
        let extra = b.extra_share.unwrap();
        assert!((extra.low - 0.01).abs() < 1e-9 && (extra.high - 0.01).abs() < 1e-9, "{extra:?}");
        assert_eq!(report.rows.iter().find(|r| r.variant == Variant::A).unwrap().gap_ms.n, 24);
    }

    #[test]
    fn few_rounds_reach_nothing() {
        assert!(matches!(verdict_of(&run(5, -0.5), "extra pause"), Verdict::NotResolved(_)));
    }

    #[test]
    fn an_interval_wider_than_five_per_cent_is_never_reached() {
        let wide = Estimate { median: -0.5, low: -0.6, high: -0.4, n: 20 };
        assert!(matches!(at_most(&wide, TOLERANCE, 0.016, 0.0), Verdict::NotResolved(_)));
        let beyond = Estimate { median: 0.5, low: 0.4, high: 0.6, n: 20 };
        let Verdict::NotResolved(why) = at_most(&beyond, TOLERANCE, 0.016, 0.0) else { panic!() };
        assert!(why.contains("beyond"));
        let across = Estimate { median: 0.016, low: 0.01, high: 0.02, n: 20 };
        assert!(matches!(at_most(&across, TOLERANCE, 0.016, 0.0), Verdict::NotResolved(_)));
        let good = Estimate { median: 0.95, low: 0.93, high: 0.97, n: 20 };
        assert_eq!(at_least(&good, 0.05, 0.9), Verdict::AimReached);
        assert_eq!(at_least(&Estimate { median: 0.8, low: 0.79, high: 0.81, n: 9 }, 0.05, 0.9), Verdict::NotReached);
    }

    #[test]
    fn failures_are_told_and_not_counted() {
        let mut bad = sample(0, Variant::B, 8, 1.0);
        bad.outcome = Err("it fell over".into());
        let report = build(&matrix(1), true, &[bad]);
        assert_eq!((report.measurements, report.missing, report.rows.len()), (0, 5, 0));
        assert!(report.failures[0].contains("it fell over"));
    }
}
