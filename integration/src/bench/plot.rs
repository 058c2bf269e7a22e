//! A report as pictures: one SVG per question, one page that needs nothing but itself.

use super::plan::{Cell, Variant};
use super::report::{Report, Row};
use super::statistics::Estimate;
use super::table;
use crate::demo::picture::{COLOURS, escape, number, step};
use std::fmt::Write;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 64.0;
const PLOT: f64 = 280.0;

/// A point with its interval, in a column.
#[derive(Debug, Clone, Copy)]
struct Mark {
    column: usize,
    at: Estimate,
}

/// Points of one colour.
struct Series {
    name: String,
    colour: &'static str,
    marks: Vec<Mark>,
}

/// Picture with columns: points and their intervals.
struct Chart<'a> {
    title: &'a str,
    unit: &'a str,
    columns: Vec<String>,
    series: Vec<Series>,
    /// Per column: what is to be reached.
    limits: Vec<Option<f64>>,
}

fn open(title: &str, height: f64) -> String {
    format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui,sans-serif" font-size="12" role="img" aria-label="{t}"><style>.bg{{fill:#fff}}.ink{{fill:#1b1e23}}.dim{{fill:#5c6370}}.grid{{stroke:#e3e6ea}}.limit{{stroke:#d1342f;stroke-dasharray:5 3}}@media(prefers-color-scheme:dark){{.bg{{fill:#16181d}}.ink{{fill:#eceef2}}.dim{{fill:#a4abb8}}.grid{{stroke:#2c3038}}}}</style><rect class="bg" width="100%" height="100%"/><text class="ink" x="{LEFT}" y="22" font-size="15" font-weight="600">{t}</text>"##,
        t = escape(title)
    )
}

/// Names of the series in a row beneath the title.
fn key(out: &mut String, names: &[(String, &str)]) {
    let mut x = LEFT;
    for (name, colour) in names {
        let _ = write!(
            out,
            r#"<rect x="{x:.1}" y="34" width="10" height="10" fill="{colour}"/><text class="dim" x="{:.1}" y="43">{}</text>"#,
            x + 15.0,
            escape(name)
        );
        x += 30.0 + 6.6 * name.chars().count() as f64;
    }
}

impl Chart<'_> {
    fn svg(&self) -> String {
        let base = TOP + PLOT;
        let mut out = open(self.title, base + 44.0);
        let names: Vec<_> = self.series.iter().map(|s| (s.name.clone(), s.colour)).collect();
        key(&mut out, &names);
        let ends = self.series.iter().flat_map(|s| &s.marks).flat_map(|m| [m.at.low, m.at.high]);
        let (low, high) = ends
            .chain(self.limits.iter().flatten().copied())
            .filter(|v| v.is_finite())
            .fold((0.0_f64, 1e-6_f64), |(l, h), v| (l.min(v), h.max(v)));
        let unit = step(high - low, 7.0);
        let (floor, ceiling) = ((low / unit).floor() * unit, (high / unit).ceil() * unit);
        let y = |v: f64| base - (v - floor) / (ceiling - floor) * PLOT;
        let mut line = floor;
        while line <= ceiling + unit / 2.0 {
            let _ = write!(
                out,
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{1:.1}" y2="{1:.1}"/><text class="dim" x="{2:.1}" y="{3:.1}" text-anchor="end">{4}</text>"#,
                WIDTH - RIGHT,
                y(line),
                LEFT - 6.0,
                y(line) + 4.0,
                number(line)
            );
            line += unit;
        }
        let _ = write!(out, r#"<text class="dim" x="8" y="{:.1}">{}</text>"#, TOP - 8.0, escape(self.unit));
        self.columns(&mut out, base, &y);
        out.push_str("</svg>\n");
        out
    }

    fn columns(&self, out: &mut String, base: f64, y: &dyn Fn(f64) -> f64) {
        let width = (WIDTH - LEFT - RIGHT) / self.columns.len().max(1) as f64;
        for (i, name) in self.columns.iter().enumerate() {
            let x = LEFT + width * i as f64;
            let _ = write!(
                out,
                r#"<text class="dim" x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>"#,
                x + width / 2.0,
                base + 18.0,
                escape(name)
            );
            if let Some(Some(limit)) = self.limits.get(i) {
                let _ = write!(
                    out,
                    r#"<line class="limit" x1="{:.1}" x2="{:.1}" y1="{2:.1}" y2="{2:.1}"><title>to reach: {3}</title></line>"#,
                    x + 4.0,
                    x + width - 4.0,
                    y(*limit),
                    number(*limit)
                );
            }
        }
        let lane = width / (self.series.len() + 1) as f64;
        for (n, series) in self.series.iter().enumerate() {
            for mark in &series.marks {
                let x = LEFT + width * mark.column as f64 + lane * (n + 1) as f64;
                let e = mark.at;
                let _ = write!(
                    out,
                    r#"<g stroke="{c}" stroke-width="2"><title>{t}: {} [{}, {}], n = {}</title><line x1="{x:.1}" x2="{x:.1}" y1="{:.1}" y2="{:.1}"/><circle cx="{x:.1}" cy="{:.1}" r="4" fill="{c}"/></g>"#,
                    number(e.median),
                    number(e.low),
                    number(e.high),
                    e.n,
                    y(e.low),
                    y(e.high),
                    y(e.median),
                    c = series.colour,
                    t = escape(&series.name)
                );
            }
        }
    }
}

/// The amounts with RDMA, one column each; baselines go into every column they belong to.
fn columns(report: &Report) -> Vec<Cell> {
    let mut all: Vec<Cell> = report.rows.iter().filter(|r| r.cell.qps > 0).map(|r| r.cell).collect();
    if all.is_empty() {
        all = report.rows.iter().map(|r| r.cell).collect();
    }
    all.sort_by_key(|c| (c.peers, c.registered, c.qps));
    all.dedup();
    all
}

fn labels(cells: &[Cell]) -> Vec<String> {
    let one = |of: fn(&Cell) -> u32| cells.windows(2).all(|w| of(&w[0]) == of(&w[1]));
    let (memory, peers) = (one(|c| c.registered), one(|c| u32::from(c.peers)));
    cells
        .iter()
        .map(|c| {
            let mut text = format!("{} QP{}", c.qps, if c.qps == 1 { "" } else { "s" });
            if !memory {
                text += &format!(" {} MiB", c.registered);
            }
            if !peers {
                text += &format!(" {}p", c.peers);
            }
            text
        })
        .collect()
}

fn series(report: &Report, cells: &[Cell], variants: &[Variant], of: fn(&Row) -> Option<Estimate>) -> Vec<Series> {
    let one = |v: &Variant| {
        let marks = cells.iter().enumerate().filter_map(|(column, cell)| {
            let cell = if v.rdma() { *cell } else { cell.baseline() };
            let row = report.rows.iter().find(|r| r.variant == *v && r.cell == cell)?;
            Some(Mark { column, at: of(row)? })
        });
        Series {
            name: format!("({}) {}", v.letter(), v.title()),
            // Neighbours in lightness as well as in hue.
            colour: [COLOURS[4], COLOURS[0], COLOURS[5], COLOURS[2]]
                [Variant::ALL.iter().position(|x| x == v).unwrap_or(0)],
            marks: marks.collect(),
        }
    };
    variants.iter().map(one).filter(|s| !s.marks.is_empty()).collect()
}

fn scaled(e: Option<Estimate>, by: f64) -> Option<Estimate> {
    e.map(|e| Estimate { median: e.median * by, low: e.low * by, high: e.high * by, n: e.n })
}

/// File name and picture of everything there is to show.
pub fn pictures(report: &Report) -> Vec<(&'static str, String)> {
    let cells = columns(report);
    if cells.is_empty() {
        return Vec::new();
    }
    let chart = |title, unit, series, limits| Chart { title, unit, columns: labels(&cells), series, limits }.svg();
    let limit = |c: &Cell| {
        Some(match c.qps {
            ..=8 => 1.6,
            9..=32 => 8.0,
            33..=64 => 10.0,
            _ => 12.0,
        })
    };
    let pause = series(report, &cells, &Variant::ALL, |r| Some(r.gap_ms));
    let extra = series(report, &cells, &[Variant::B, Variant::C], |r| scaled(r.extra_share, 100.0));
    let other = series(report, &cells, &[Variant::B, Variant::C], |r| r.other_end_ms);
    let mut all = vec![("pause.svg", chart("Pause by the container's own stamps", "ms", pause, vec![]))];
    if !extra.is_empty() {
        let limits = cells.iter().map(limit).collect();
        all.push(("extra.svg", chart("Extra pause against no RDMA in use, in pairs", "%", extra, limits)));
    }
    if !other.is_empty() {
        all.push(("other-end.svg", chart("What the other end sees above its normal gap", "ms", other, vec![])));
    }
    all.push(("phases.svg", phases(report)));
    all
}

/// Where the time of a move goes: one bar per row, phases after each other.
fn phases(report: &Report) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in report.rows.iter().flat_map(|r| &r.phases) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let colour = |name: &str| COLOURS[names.iter().position(|n| *n == name).unwrap_or(0) % COLOURS.len()];
    let lane = 26.0;
    let height = TOP + 20.0 + lane * report.rows.len() as f64 + 40.0;
    let mut out = open("Phases, medians, one after the other", height);
    let longest = report.rows.iter().map(|r| r.phases.iter().map(|p| p.1).sum::<f64>()).fold(1.0, f64::max);
    let left = LEFT + 110.0;
    let x = |ms: f64| left + ms / longest * (WIDTH - left - RIGHT);
    for (i, row) in report.rows.iter().enumerate() {
        let y = TOP + lane * i as f64;
        let qps = if row.cell.qps > 0 { format!("{} QPs ", row.cell.qps) } else { String::new() };
        let _ = write!(
            out,
            r#"<text class="dim" x="{:.1}" y="{:.1}" text-anchor="end">({}) {qps}{} MiB {}p</text>"#,
            left - 8.0,
            y + 13.0,
            row.variant.letter(),
            row.cell.registered,
            row.cell.peers
        );
        let mut at = 0.0;
        for (name, ms) in &row.phases {
            let width = (x(at + ms) - x(at)).max(0.5);
            let _ = write!(
                out,
                r#"<rect x="{:.1}" y="{y:.1}" width="{width:.1}" height="{:.1}" fill="{}"><title>{} {ms:.0} ms</title></rect>"#,
                x(at),
                lane - 8.0,
                colour(name),
                escape(name)
            );
            if width > 7.0 * name.len() as f64 {
                let _ = write!(
                    out,
                    r##"<text x="{:.1}" y="{:.1}" font-size="10" fill="#10131a">{}</text>"##,
                    x(at) + 3.0,
                    y + 12.5,
                    escape(name)
                );
            }
            at += ms;
        }
    }
    let tick = step(longest, 10.0);
    let mut ms = 0.0;
    while ms <= longest {
        let _ = write!(
            out,
            r#"<text class="dim" x="{:.1}" y="{:.1}" text-anchor="middle">{} s</text>"#,
            x(ms),
            height - 20.0,
            number(ms / 1000.0)
        );
        ms += tick;
    }
    out.push_str("</svg>\n");
    out
}

/// A page that needs nothing but itself.
pub fn page(title: &str, report: &Report, pictures: &[(String, String)], json: &str) -> String {
    let shown: String = pictures.iter().map(|(_, svg)| svg.as_str()).collect();
    let legend: String = table::legend(report).iter().map(|l| format!("<li>{}</li>", escape(l))).collect();
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{t}</title><style>:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:1160px;\
         margin:2rem auto;padding:0 1rem}}svg{{width:100%;height:auto}}table{{border-collapse:collapse;font-size:13px;\
         display:block;overflow:auto}}td,th{{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #8884}}\
         pre{{overflow:auto;max-height:24rem;background:#8881;padding:1rem}}</style>\
         <h1>{t}</h1>{figures}{shown}<h2>Pauses</h2>{pauses}<h2>Phases, ms</h2>{phases}{steps}<ul>{legend}</ul>\
         <details><summary>report.json</summary><pre>{j}</pre></details></html>\n",
        t = escape(title),
        figures = table::figures(report).html(),
        pauses = table::pauses(report).html(),
        phases = table::phases(report, false).html(),
        steps = table::phases(report, true).html(),
        j = escape(json)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(variant: Variant, qps: u16, gap: f64) -> Row {
        let e = |v: f64| Estimate { median: v, low: v * 0.9, high: v * 1.1, n: 6 };
        Row {
            variant,
            cell: Cell { qps, registered: 16, peers: 1 },
            gap_ms: e(gap),
            extra_share: variant.rdma().then(|| e(-0.1)),
            first_ms: None,
            other_end_ms: None,
            own_pause_ms: None,
            own_frozen_ms: None,
            set_up_share: None,
            throughput_share: None,
            mappings: Some(3),
            transferred_bytes: None,
            pre_copied_bytes: None,
            made_in_pause: None,
            instructions_m: None,
            extra_instructions: None,
            phases: vec![("dump & more".into(), gap / 2.0), ("restore".into(), gap / 2.0)],
            clock_error_ms: 0.2,
        }
    }

    #[test]
    fn every_variant_is_in_every_column_it_belongs_to() {
        let rows = vec![row(Variant::A, 0, 1000.0), row(Variant::B, 1, 900.0), row(Variant::B, 8, 950.0)];
        let report = Report { rows, figures: vec![], measurements: 3, missing: 0, failures: vec![] };
        let all = pictures(&report);
        let pause = &all[0].1;
        // (a) twice, (b) once in each of two columns.
        assert_eq!(pause.matches("<circle").count(), 4);
        assert!(all.iter().any(|(n, svg)| *n == "phases.svg" && svg.contains("dump &amp; more")));
        assert!(all.iter().all(|(_, svg)| svg.ends_with("</svg>\n") && !svg.contains("NaN")));
        let named: Vec<_> = all.into_iter().map(|(n, s)| (n.to_owned(), s)).collect();
        let page = page("t", &report, &named, "{\"a\":\"<b>\"}");
        assert!(page.contains("&lt;b&gt;") && page.matches("http").count() == named.len());
    }

    #[test]
    fn nothing_measured_draws_nothing() {
        let report = Report { rows: vec![], figures: vec![], measurements: 0, missing: 1, failures: vec![] };
        assert!(pictures(&report).is_empty());
    }
}
