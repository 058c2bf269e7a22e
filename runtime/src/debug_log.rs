//! `--debug`: what libcontainer and libcgroups say about their work, as text
//! lines in the log file or on stderr. Not a logging system: nothing of ours
//! is written through it, and without `--debug` it is not installed.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::clock;

struct DebugLog(Option<File>);

/// From here on everything is told.
pub fn install(path: Option<&Path>) {
    let file = path.and_then(|path| OpenOptions::new().append(true).create(true).open(path).ok());
    // Fails only when somebody was first, whose log it then is.
    let _ = tracing::subscriber::set_global_default(DebugLog(file));
}

/// Whether it was asked for.
pub fn is_installed() -> bool {
    tracing::dispatcher::has_been_set()
}

impl Subscriber for DebugLog {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let level = event.metadata().level().as_str().to_lowercase();
        let mut text = Text(String::new());
        event.record(&mut text);
        let text = serde_json::Value::from(text.0);
        let line = format!("time=\"{}\" level={level} msg={text}\n", clock::rfc3339_now());
        let _ = match &self.0 {
            Some(file) => {
                let mut file: &File = file;
                file.write_all(line.as_bytes())
            }
            None => std::io::stderr().write_all(line.as_bytes()),
        };
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// The event's message first, its other fields after it.
struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = match field.name() {
            "message" => {
                let rest = std::mem::take(&mut self.0);
                write!(self.0, "{value:?}{rest}")
            }
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
