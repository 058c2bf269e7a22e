//! A report as tables: aligned text for a terminal, markdown for a file.

use super::plan::Variant;
use super::report::{Report, Row, TOLERANCE, percent};
use super::statistics::Estimate;
use std::fmt::Write;

/// A table.
#[derive(Debug, Clone, Default)]
pub struct Grid {
    head: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Grid {
    fn new(head: &[&str]) -> Grid {
        Grid { head: head.iter().map(ToString::to_string).collect(), rows: Vec::new() }
    }

    /// Whether it has no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    fn widths(&self) -> Vec<usize> {
        let lines = || std::iter::once(&self.head).chain(&self.rows);
        (0..self.head.len()).map(|i| lines().map(|l| l[i].chars().count()).max().unwrap_or(0)).collect()
    }

    fn line(cells: &[String], widths: &[usize], between: &str) -> String {
        let padded: Vec<String> =
            cells.iter().zip(widths).map(|(c, w)| format!("{c}{}", " ".repeat(w - c.chars().count()))).collect();
        padded.join(between)
    }

    /// Aligned with spaces.
    pub fn text(&self) -> String {
        let widths = self.widths();
        let lines = std::iter::once(&self.head).chain(&self.rows);
        lines.map(|l| format!("{}\n", Self::line(l, &widths, "  ").trim_end())).collect()
    }

    /// For a markdown file, aligned as well.
    pub fn markdown(&self) -> String {
        let widths = self.widths();
        let rule: Vec<String> = widths.iter().map(|w| "-".repeat(*w)).collect();
        let lines = [&self.head, &rule].into_iter().chain(&self.rows);
        lines.map(|l| format!("| {} |\n", Self::line(l, &widths, " | "))).collect()
    }

    /// For a page.
    pub fn html(&self) -> String {
        let row = |cells: &[String], tag: &str| {
            let cells: String =
                cells.iter().map(|c| format!("<{tag}>{}</{tag}>", crate::demo::picture::escape(c))).collect();
            format!("<tr>{cells}</tr>")
        };
        let body: String = self.rows.iter().map(|r| row(r, "td")).collect();
        format!("<table>{}{body}</table>", row(&self.head, "th"))
    }
}

fn ms(e: &Estimate) -> String {
    let mark = if e.resolved_within(TOLERANCE) { "" } else { " (not resolved)" };
    format!("{:.0} [{:.0}, {:.0}]{mark}", e.median, e.low, e.high)
}

fn short_ms(e: &Option<Estimate>) -> String {
    e.as_ref().map_or("–".into(), |e| format!("{:.0} [{:.0}, {:.0}]", e.median, e.low, e.high))
}

fn or_dash<T: ToString>(value: Option<T>) -> String {
    value.map_or("–".into(), |v| v.to_string())
}

fn amounts(row: &Row) -> [String; 3] {
    let qps = if row.cell.qps == 0 { "–".into() } else { row.cell.qps.to_string() };
    [qps, row.cell.registered.to_string(), row.cell.peers.to_string()]
}

/// Pauses and counts.
pub fn pauses(report: &Report) -> Grid {
    let mut grid = Grid::new(&[
        "variant",
        "QPs",
        "MiB",
        "peers",
        "n",
        "pause by stamps, ms",
        "against (a)",
        "first move, ms",
        "other end, ms",
        "own pause, ms",
        "own frozen, ms",
        "mappings",
        "pre-copied, MiB",
        "sent in pause, MiB",
        "made in pause",
        "instructions in pause, M",
        "against (a)",
    ]);
    for row in &report.rows {
        let [qps, mib, peers] = amounts(row);
        let mib_of = |bytes: Option<u64>| bytes.map(|b| format!("{:.1}", b as f64 / f64::from(1 << 20)));
        grid.rows.push(vec![
            format!("({}) {}", row.variant.letter(), row.variant.title()),
            qps,
            mib,
            peers,
            row.gap_ms.n.to_string(),
            ms(&row.gap_ms),
            row.extra_share.as_ref().map_or("–".into(), percent),
            short_ms(&row.first_ms),
            short_ms(&row.other_end_ms),
            short_ms(&row.own_pause_ms),
            short_ms(&row.own_frozen_ms),
            or_dash(row.mappings),
            or_dash(mib_of(row.pre_copied_bytes)),
            or_dash(mib_of(row.transferred_bytes)),
            or_dash(row.made_in_pause),
            short_ms(&row.instructions_m),
            row.extra_instructions.as_ref().map_or("–".into(), percent),
        ]);
    }
    grid
}

/// Median phase times; one grid for `migrrdma`, one for plain runc.
pub fn phases(report: &Report, plain: bool) -> Grid {
    let rows: Vec<&Row> = report.rows.iter().filter(|r| (r.variant == Variant::D) == plain).collect();
    // In the order of whoever has most of them: (c) has no pre-setup.
    let names: Vec<&str> = rows
        .iter()
        .map(|r| &r.phases)
        .max_by_key(|p| p.len())
        .map(|p| p.iter().map(|(n, _)| n.as_str()).collect())
        .unwrap_or_default();
    let mut grid = Grid::new(&[&["variant", "QPs", "MiB", "peers"][..], &names].concat());
    for row in rows {
        let [qps, mib, peers] = amounts(row);
        let mut cells = vec![format!("({})", row.variant.letter()), qps, mib, peers];
        cells.extend(
            names
                .iter()
                .map(|name| or_dash(row.phases.iter().find(|(n, _)| n == name).map(|(_, v)| format!("{v:.0}")))),
        );
        grid.rows.push(cells);
    }
    grid
}

/// The comparison with what was published.
pub fn figures(report: &Report) -> Grid {
    let mut grid = Grid::new(&["figure", "published", "to reach", "aim", "measured", "verdict"]);
    for f in &report.figures {
        grid.rows.push(vec![
            f.name.clone(),
            f.published.clone(),
            f.to_reach.clone(),
            f.aim.clone(),
            f.measured.clone(),
            f.verdict.words(),
        ]);
    }
    grid
}

/// What the numbers mean.
pub fn legend(report: &Report) -> Vec<String> {
    let error = report.rows.iter().map(|r| r.clock_error_ms).fold(0.0, f64::max);
    vec![
        "Median [bootstrap 95 % interval] over rounds, of each measurement the median of its moves but the first, which is \
         told in a column of its own; against (a): with the mean of the (a) measured before and after it. A time whose interval is \
         wider than ± 5 %, or that has fewer than 6 rounds, is marked as not resolved."
            .into(),
        format!(
            "pause by stamps: longest gap of a thread that stamps every millisecond, source's stamps against \
             destination's, offset of the two wall clocks measured around every move and taken out (error ≤ {error:.2} ms)."
        ),
        "other end: its longest time without a completion around the move, less its normal one (median over windows of \
         100 ms before)."
            .into(),
        "own pause: first held send until all are free again. own frozen: freeze until the tasks run again.".into(),
        "made in pause: driver calls on destination and peer that make a context, PD, CQ, QP, SRQ or MR between the \
         first held send and the last release, counted by the nodes' kernels; most of any move, the first ones included."
            .into(),
        "mappings: lines of /proc/PID/maps before the move. pre-copied, sent: bytes of image that went over before the pause and in it, the most of any move, the first ones included.".into(),
        "instructions in pause: what the source executes from the freeze until the image is there, and the destination from \
         then on until the container runs, counted by QEMU. A busy machine does not change it; but not all instructions \
         take equally long."
            .into(),
        "RDMA set-up inside the pause: phases converge and switch, which also hold what is not set-up: an upper bound."
            .into(),
    ]
}

/// Everything as text.
pub fn text(report: &Report) -> String {
    document(report, Grid::text, |t| format!("\n{t}\n"), |l| format!("  {l}\n"))
}

/// Everything as markdown.
pub fn markdown(report: &Report) -> String {
    document(report, Grid::markdown, |t| format!("\n## {t}\n\n"), |l| format!("- {l}\n"))
}

fn document(report: &Report, grid: fn(&Grid) -> String, title: fn(&str) -> String, item: fn(&str) -> String) -> String {
    let mut out = title("Pauses") + &grid(&pauses(report));
    for (name, plain) in [("Phases, ms (median)", false), ("Steps of plain runc, ms (median)", true)] {
        let phases = phases(report, plain);
        if !phases.is_empty() {
            out += &(title(name) + &grid(&phases));
        }
    }
    let figures = figures(report);
    if !figures.is_empty() {
        out += &(title("Against the published figures") + &grid(&figures));
    }
    out += &title("How to read this");
    for line in legend(report) {
        out += &item(&line);
    }
    let _ = write!(out, "{}", item(&format!("{} measurements, {} missing", report.measurements, report.missing)));
    for failure in &report.failures {
        out += &item(&format!("failed: {}", failure.lines().next().unwrap_or_default()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_nothing_is_cut() {
        let mut grid = Grid::new(&["a", "long head"]);
        grid.rows.push(vec!["± 5 %".into(), "x".into()]);
        assert_eq!(grid.text(), "a      long head\n± 5 %  x\n");
        let md = grid.markdown();
        assert!(md.lines().all(|l| l.chars().count() == md.lines().next().unwrap().chars().count()), "{md}");
        assert!(grid.html().contains("<th>long head</th>"));
    }

    #[test]
    fn an_empty_report_is_a_document_too() {
        let report =
            Report { rows: vec![], figures: vec![], measurements: 0, missing: 4, failures: vec!["x\ny".into()] };
        assert!(markdown(&report).contains("4 missing") && text(&report).contains("failed: x\n"));
    }
}
