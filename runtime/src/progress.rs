//! How a migration is shown: bars on a terminal, plain lines elsewhere, JSON lines on request.

use std::time::Duration;

use checkpoint::agent::admin::Event;
use checkpoint::phase::Phase;
use checkpoint::timeline::Summary;
use indicatif::{ProgressBar, ProgressStyle};

/// What the user gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Bars,
    Plain,
    Json,
}

/// Shows events as they come.
#[derive(Debug)]
pub struct Display {
    form: Form,
    bar: Option<ProgressBar>,
}

impl Display {
    pub fn new(form: Form) -> Self {
        Display { form, bar: None }
    }

    pub fn show(&mut self, event: &Event) {
        match self.form {
            Form::Json => {
                if let Ok(line) = serde_json::to_string(event) {
                    println!("{line}");
                }
            }
            Form::Plain => plain(event),
            Form::Bars => self.bars(event),
        }
    }

    fn bars(&mut self, event: &Event) {
        match event {
            Event::Enter { phase } => {
                let style = ProgressStyle::with_template("{spinner} {msg} {elapsed}");
                let bar = ProgressBar::new_spinner().with_message(format!("{phase:<18}"));
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
                bar.enable_steady_tick(Duration::from_millis(80));
                self.bar = Some(bar);
            }
            Event::Progress { phase, done, total, .. } => {
                if let Some(bar) = &self.bar {
                    if bar.length() != Some(*total) {
                        let text = "{spinner} {msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec}";
                        let style = ProgressStyle::with_template(text);
                        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                        bar.set_length(*total);
                        bar.set_message(format!("{phase:<18}"));
                    }
                    bar.set_position(*done);
                }
            }
            Event::Leave { phase, seconds } => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                println!("✔ {phase:<18} {}", time(*seconds));
            }
            Event::Note { text } => match &self.bar {
                Some(bar) => bar.println(format!("  note: {text}")),
                None => println!("  note: {text}"),
            },
            other => {
                if let Some(bar) = self.bar.take() {
                    bar.finish_and_clear();
                }
                plain(other);
            }
        }
    }
}

fn plain(event: &Event) {
    match event {
        Event::Begin { id, container, to } => println!("migration {id}: container {container} to {to}"),
        Event::Leave { phase, seconds } => println!("{phase:<18} {}", time(*seconds)),
        Event::Note { text } => println!("note: {text}"),
        Event::Possible => println!("it could be done"),
        Event::Done { summary } => done(summary),
        Event::Enter { .. } | Event::Progress { .. } | Event::Status { .. } => {}
        // Of conversations that have no display.
        Event::Plain
        | Event::Dump
        | Event::Restore { .. }
        | Event::Kept { .. }
        | Event::Go
        | Event::Refuse { .. }
        | Event::Dropped { .. }
        | Event::Metrics { .. } => {}
        // These become the program's error message.
        Event::Refused { .. } | Event::Undone { .. } | Event::Unfinished { .. } | Event::Error { .. } => {}
    }
}

fn done(s: &Summary) {
    let how = s.hand_over.map_or(String::new(), |how| format!(" (hand-over: {how})"));
    println!("done: {} QPs moved, {} QPs of peers changed over{how}", s.qps_moved, s.qps_switched);
    let sent = s.spans.iter().find(|span| span.phase == Phase::Transfer).map_or(0.0, |span| span.seconds);
    println!("image {:.1} MiB, sent in {}", s.image_bytes as f64 / f64::from(1 << 20), time(sent));
    if let Some(pause) = s.pause_seconds {
        println!("pause {} (from the first held send until all were free again)", time(pause));
    }
    if let Some(frozen) = s.frozen_seconds {
        println!("frozen {} (from the freeze here until the tasks ran there)", time(frozen));
    }
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.0} ms", seconds * 1000.0) } else { format!("{seconds:.2} s") }
}
