//! Draws what a run looked like: throughput over time, the phases of each migration beneath it, the pause marked.
//!
//! Input are numbers, output is text (one SVG; one self-contained page around it). It reads no file and knows no lab.

use std::fmt::Write;

/// Work done in one interval, as one end of the connection saw it.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Sample {
    /// End of the interval: milliseconds on the axis of the run.
    pub at_ms: f64,
    /// Megabytes per second in the interval.
    pub mb_per_s: f64,
    /// Longest time without a completion that ended in the interval, milliseconds.
    pub gap_ms: f64,
}

/// One phase of one migration on the same axis.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Phase {
    pub name: String,
    pub start_ms: f64,
    pub end_ms: f64,
}

/// One migration.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Move {
    /// For people: `src → dst`.
    pub title: String,
    pub phases: Vec<Phase>,
    /// From when to when the application stood still, if it is known.
    pub pause: Option<(f64, f64)>,
}

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 40.0;
const PLOT: f64 = 260.0;
const LANE: f64 = 18.0;
/// Phases are coloured in turn; neighbours differ in lightness as well, for readers who see no hue.
pub(crate) const COLOURS: [&str; 6] = ["#4269d0", "#97bbf5", "#3ca951", "#a3d5ac", "#9c6b4e", "#efb118"];

/// A step of 1, 2 or 5 times a power of ten that cuts `span` into at most `most` parts.
pub(crate) fn step(span: f64, most: f64) -> f64 {
    let raw = (span / most).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(raw.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= raw * 0.999).unwrap_or(10.0 * power)
}

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

pub(crate) fn number(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Maps run time to pixels.
struct Axis {
    start: f64,
    end: f64,
}

impl Axis {
    fn x(&self, ms: f64) -> f64 {
        let share = ((ms - self.start) / (self.end - self.start).max(1e-9)).clamp(0.0, 1.0);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }
}

/// The picture as one SVG document. Empty input gives an axis without a line.
pub fn svg(title: &str, samples: &[Sample], moves: &[Move]) -> String {
    let times = samples.iter().map(|s| s.at_ms).chain(moves.iter().flat_map(|m| m.phases.iter().map(|p| p.end_ms)));
    let end = times.fold(1.0, f64::max);
    let start = samples.first().map_or(0.0, |s| s.at_ms).min(end);
    let axis = Axis { start, end };
    let lanes = moves.iter().map(|m| m.phases.len()).max().unwrap_or(0);
    let base = TOP + PLOT;
    let height = base + 36.0 + lanes as f64 * LANE + 24.0;
    let mut out = String::new();
    let _ = write!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui,sans-serif" font-size="12" role="img" aria-label="{t}"><style>.bg{{fill:#fff}}.ink{{fill:#1b1e23}}.dim{{fill:#5c6370}}.grid{{stroke:#e3e6ea}}.line{{fill:none;stroke:#4269d0;stroke-width:1.6}}.area{{fill:#4269d0;opacity:.12}}.pause{{fill:#d1342f;opacity:.28}}.move{{fill:#efb118;opacity:.10}}@media(prefers-color-scheme:dark){{.bg{{fill:#16181d}}.ink{{fill:#eceef2}}.dim{{fill:#a4abb8}}.grid{{stroke:#2c3038}}}}</style><rect class="bg" width="100%" height="100%"/><text class="ink" x="{LEFT}" y="22" font-size="15" font-weight="600">{t}</text>"##,
        t = escape(title)
    );
    let top = samples.iter().map(|s| s.mb_per_s).fold(0.0, f64::max).max(1e-3);
    let unit = step(top, 5.0);
    let ceiling = (top / unit).ceil() * unit;
    let y = |value: f64| base - value / ceiling * PLOT;
    draw_grid(&mut out, &axis, unit, ceiling, base, &y);
    for (n, one) in moves.iter().enumerate() {
        draw_move(&mut out, &axis, one, base, n);
    }
    draw_line(&mut out, &axis, samples, base, &y);
    out.push_str("</svg>\n");
    out
}

fn draw_grid(out: &mut String, axis: &Axis, unit: f64, ceiling: f64, base: f64, y: &dyn Fn(f64) -> f64) {
    let mut value = 0.0;
    while value <= ceiling * 1.001 {
        let _ = write!(
            out,
            r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{2:.1}" y2="{2:.1}"/><text class="dim" x="{3:.1}" y="{4:.1}" text-anchor="end">{1}</text>"#,
            WIDTH - RIGHT,
            number(value),
            y(value),
            LEFT - 6.0,
            y(value) + 4.0
        );
        value += unit;
    }
    let _ = write!(out, r#"<text class="dim" x="{LEFT}" y="{:.1}">MB/s</text>"#, TOP - 6.0);
    let tick = step(axis.end - axis.start, 12.0);
    let mut at = (axis.start / tick).ceil() * tick;
    while at <= axis.end {
        let _ = write!(
            out,
            r#"<text class="dim" x="{:.1}" y="{:.1}" text-anchor="middle">{} s</text>"#,
            axis.x(at),
            base + 16.0,
            number(at / 1000.0)
        );
        at += tick;
    }
}

fn draw_move(out: &mut String, axis: &Axis, one: &Move, base: f64, n: usize) {
    let (Some(first), Some(last)) = (one.phases.first(), one.phases.last()) else { return };
    let (x0, x1) = (axis.x(first.start_ms), axis.x(last.end_ms));
    let _ = write!(
        out,
        r#"<rect class="move" x="{x0:.1}" y="{TOP}" width="{:.1}" height="{PLOT}"/><text class="ink" x="{:.1}" y="{:.1}">{}</text>"#,
        (x1 - x0).max(1.0),
        x0 + 4.0,
        TOP + 14.0,
        escape(&one.title)
    );
    if let Some((from, to)) = one.pause {
        let _ = write!(
            out,
            r#"<rect class="pause" x="{:.1}" y="{TOP}" width="{:.1}" height="{PLOT}"><title>pause {} ms</title></rect>"#,
            axis.x(from),
            (axis.x(to) - axis.x(from)).max(1.5),
            number(to - from)
        );
    }
    for (lane, phase) in one.phases.iter().enumerate() {
        let (p0, p1) = (axis.x(phase.start_ms), axis.x(phase.end_ms));
        let y = base + 30.0 + lane as f64 * LANE;
        let label = format!("{} {} ms", phase.name, number((phase.end_ms - phase.start_ms).round()));
        let room_right = WIDTH - RIGHT - p1 > 7.0 * label.len() as f64;
        let (x, anchor) = if room_right { (p1 + 5.0, "start") } else { (p0 - 5.0, "end") };
        let _ = write!(
            out,
            r#"<rect x="{p0:.1}" y="{y:.1}" width="{:.1}" height="{:.1}" rx="2" fill="{}"/><text class="dim" x="{x:.1}" y="{:.1}" font-size="11" text-anchor="{anchor}">{}</text>"#,
            (p1 - p0).max(1.5),
            LANE - 6.0,
            COLOURS[(lane + n) % COLOURS.len()],
            y + 10.0,
            escape(&label)
        );
    }
}

fn draw_line(out: &mut String, axis: &Axis, samples: &[Sample], base: f64, y: &dyn Fn(f64) -> f64) {
    let (Some(first), Some(last)) = (samples.first(), samples.last()) else { return };
    let mut path = String::new();
    for (i, s) in samples.iter().enumerate() {
        let _ = write!(path, "{}{:.1},{:.1}", if i == 0 { "M" } else { "L" }, axis.x(s.at_ms), y(s.mb_per_s));
    }
    let _ = write!(
        out,
        r#"<path class="area" d="{path}L{:.1},{base:.1}L{:.1},{base:.1}Z"/><path class="line" d="{path}"/>"#,
        axis.x(last.at_ms),
        axis.x(first.at_ms)
    );
}

/// A page that needs nothing but itself: the picture, a line per migration, the report as data.
pub fn page(title: &str, picture: &str, moves: &[Move], verdict: &str, report_json: &str) -> String {
    let mut rows = String::new();
    for one in moves {
        let total = one.phases.last().map_or(0.0, |p| p.end_ms) - one.phases.first().map_or(0.0, |p| p.start_ms);
        let pause = one.pause.map_or_else(|| "–".to_owned(), |(a, b)| format!("{} ms", number(b - a)));
        let phases: Vec<_> = one
            .phases
            .iter()
            .map(|p| format!("{} {} ms", escape(&p.name), number((p.end_ms - p.start_ms).round())))
            .collect();
        let _ = write!(
            rows,
            "<tr><td>{}</td><td>{} ms</td><td>{pause}</td><td>{}</td></tr>",
            escape(&one.title),
            number(total.round()),
            phases.join(" · ")
        );
    }
    format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>{t}</title><style>:root{{color-scheme:light dark}}body{{font:15px/1.5 system-ui,sans-serif;max-width:1160px;\
         margin:2rem auto;padding:0 1rem}}svg{{width:100%;height:auto}}table{{border-collapse:collapse;width:100%}}\
         td,th{{text-align:left;padding:.3rem .6rem;border-bottom:1px solid #8884;vertical-align:top}}\
         pre{{overflow:auto;max-height:24rem;background:#8881;padding:1rem}}</style>\
         <h1>{t}</h1><p><strong>{v}</strong></p>{picture}\
         <table><tr><th>migration</th><th>in all</th><th>pause</th><th>phases</th></tr>{rows}</table>\
         <details><summary>report.json</summary><pre>{j}</pre></details></html>\n",
        t = escape(title),
        v = escape(verdict),
        j = escape(report_json)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> (Vec<Sample>, Vec<Move>) {
        let samples = (0..600)
            .map(|i| {
                let at_ms = f64::from(i) * 100.0;
                let still = (20_000.0..24_000.0).contains(&at_ms);
                Sample { at_ms, mb_per_s: if still { 0.0 } else { 38.0 + f64::from(i % 7) }, gap_ms: 3.0 }
            })
            .collect();
        let names = ["Negotiate", "PreSetup", "Suspend", "Dump", "Transfer", "Restore", "Commit", "Switch", "Resume"];
        let phases = names
            .iter()
            .enumerate()
            .map(|(i, n)| Phase {
                name: (*n).to_owned(),
                start_ms: 17_000.0 + i as f64 * 900.0,
                end_ms: 17_900.0 + i as f64 * 900.0,
            })
            .collect();
        (samples, vec![Move { title: "src → <dst>".to_owned(), phases, pause: Some((20_000.0, 24_000.0)) }])
    }

    #[test]
    fn a_picture_shows_every_phase_and_the_pause_and_escapes_names() {
        let (samples, moves) = run();
        let text = svg("Throughput & phases", &samples, &moves);
        for phase in &moves[0].phases {
            assert!(text.contains(&phase.name), "{} is missing", phase.name);
        }
        assert!(text.contains("pause 4000 ms") && text.contains("src → &lt;dst&gt;") && text.contains("&amp; phases"));
        assert_eq!(text.matches("<svg").count(), text.matches("</svg>").count());
        let page = page("t", &text, &moves, "nothing lost", "{\"a\":\"<b>\"}");
        assert!(page.contains("&quot;&lt;b&gt;") && !page.contains("http:") || page.matches("http:").count() == 1);
    }

    #[test]
    fn an_empty_run_still_gives_a_picture() {
        assert!(svg("nothing", &[], &[]).ends_with("</svg>\n"));
    }

    #[test]
    fn steps_are_round_and_few() {
        for span in [0.3, 1.0, 7.0, 42.0, 1234.0] {
            let s = step(span, 5.0);
            assert!(span / s <= 5.01, "{span} / {s}");
        }
    }
}
