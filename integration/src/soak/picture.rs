//! A soak as a picture: the pause of every migration, what was done to it, and beneath it the memory and open files of
//! the agents. Input are the steps, output is one SVG.

use std::fmt::Write;

use super::Told;
use super::plan::NODES;
use crate::demo::picture::{COLOURS, escape, number, step};

const WIDTH: f64 = 1120.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
const PANEL: f64 = 220.0;
const GAP: f64 = 64.0;
const TOP: f64 = 72.0;

/// A panel's place and scale.
struct Panel {
    base: f64,
    ceiling: f64,
    last: f64,
}

impl Panel {
    /// Draws its grid; `row` counts from the top.
    fn open(out: &mut String, row: f64, title: &str, highest: f64, steps: usize) -> Panel {
        let base = TOP + row * (PANEL + GAP) + PANEL;
        let unit = step(highest.max(1.0), 6.0);
        let panel = Panel { base, ceiling: (highest.max(1.0) / unit).ceil() * unit, last: steps.max(1) as f64 };
        let _ = write!(
            out,
            r#"<text class="ink" x="{LEFT}" y="{:.1}" font-weight="600">{}</text>"#,
            base - PANEL - 10.0,
            escape(title)
        );
        let mut line = 0.0;
        while line <= panel.ceiling + unit / 2.0 {
            let _ = write!(
                out,
                r#"<line class="grid" x1="{LEFT}" x2="{:.1}" y1="{1:.1}" y2="{1:.1}"/><text class="dim" x="{2:.1}" y="{3:.1}" text-anchor="end">{4}</text>"#,
                WIDTH - RIGHT,
                panel.y(line),
                LEFT - 6.0,
                panel.y(line) + 4.0,
                number(line)
            );
            line += unit;
        }
        panel
    }

    fn x(&self, n: usize) -> f64 {
        LEFT + n as f64 / self.last * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        self.base - value / self.ceiling * PANEL
    }
}

/// The picture of a run.
pub fn svg(told: &[Told]) -> String {
    let height = TOP + 3.0 * (PANEL + GAP);
    let title = format!("{} migrations among three hosts", told.len());
    let mut out = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui,sans-serif" font-size="12" role="img" aria-label="{title}"><style>.bg{{fill:#fff}}.ink{{fill:#1b1e23}}.dim{{fill:#5c6370}}.grid{{stroke:#e3e6ea}}@media(prefers-color-scheme:dark){{.bg{{fill:#16181d}}.ink{{fill:#eceef2}}.dim{{fill:#a4abb8}}.grid{{stroke:#2c3038}}}}</style><rect class="bg" width="100%" height="100%"/><text class="ink" x="{LEFT}" y="22" font-size="15" font-weight="600">{title}</text>"##
    );
    pauses(&mut out, told);
    lines(&mut out, told, 1.0, "Resident memory of the agents, MiB", |v| v.agent_kib as f64 / 1024.0);
    lines(&mut out, told, 2.0, "Open files of the agents", |v| v.agent_files as f64);
    out.push_str("</svg>\n");
    out
}

/// A dot for each migration: filled when nothing was done to it, a ring when it was disturbed, and on the floor when it
/// went on where it was or nobody was left to tell its pause.
fn pauses(out: &mut String, told: &[Told]) {
    let highest = told.iter().filter_map(|t| t.pause_ms).fold(0.0, f64::max);
    let panel = Panel::open(out, 0.0, "Pause, ms (rings: disturbed; brown: went on where it was)", highest, told.len());
    for t in told {
        let colour = if t.moved { COLOURS[0] } else { COLOURS[4] };
        let fill = if t.fault.is_none() { colour } else { "none" };
        let what = format!(
            "{}: {} {} → {} {} {}",
            t.n,
            t.container,
            t.from,
            t.to,
            t.way,
            t.fault.as_deref().unwrap_or_default()
        );
        let _ = write!(
            out,
            r#"<circle cx="{:.1}" cy="{:.1}" r="3.5" stroke="{colour}" stroke-width="1.5" fill="{fill}"><title>{}</title></circle>"#,
            panel.x(t.n),
            panel.y(t.pause_ms.unwrap_or(0.0)),
            escape(what.trim_end())
        );
    }
}

fn lines(out: &mut String, told: &[Told], row: f64, title: &str, of: fn(&super::vitals::Vitals) -> f64) {
    let all: Vec<_> = told.iter().filter_map(|t| Some((t.n, t.vitals.as_ref()?))).collect();
    let highest = all.iter().flat_map(|(_, v)| v.iter()).map(of).fold(0.0, f64::max);
    let panel = Panel::open(out, row, title, highest, told.len());
    for (i, name) in NODES.into_iter().enumerate() {
        let colour = COLOURS[[0, 2, 5][i]];
        let points: Vec<String> =
            all.iter().filter_map(|(n, v)| Some(format!("{:.1},{:.1}", panel.x(*n), panel.y(of(v.get(i)?))))).collect();
        let _ = write!(
            out,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/><text x="{:.1}" y="{:.1}" fill="{colour}">{name}</text>"#,
            points.join(" "),
            WIDTH - RIGHT - 150.0 + 50.0 * i as f64,
            panel.base - PANEL - 10.0
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(n: usize) -> Told {
        Told {
            n,
            container: "a<b".into(),
            from: "src",
            to: "dst",
            way: String::new(),
            fault: n.is_multiple_of(2).then(|| "Ctrl-C in dump".into()),
            moved: !n.is_multiple_of(3),
            pause_ms: (!n.is_multiple_of(3)).then_some(1000.0 + n as f64),
            seconds: 1.0,
            vitals: None,
        }
    }

    #[test]
    fn every_migration_is_a_dot_inside_the_picture_and_names_are_escaped() {
        let steps: Vec<Told> = (1..=40).map(told).collect();
        let svg = svg(&steps);
        assert_eq!(svg.matches("<circle").count(), 40);
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"));
        let places = svg.split("cx=\"").skip(1).filter_map(|t| t.split('"').next()?.parse::<f64>().ok());
        assert!(places.clone().count() == 40 && places.into_iter().all(|x| (0.0..=WIDTH).contains(&x)));
    }

    #[test]
    fn a_run_without_a_step_is_a_picture_too() {
        assert!(svg(&[]).ends_with("</svg>\n"));
    }
}
