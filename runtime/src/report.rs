//! How this program talks to engines: one error line on stderr, the same in
//! the log file, in the form logrus gives it, and exit status 1.
//!
//! podman parses the whole log file as one JSON object and containerd takes
//! the last line of level error, so exactly one line is written per failure.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use crate::clock;

/// `println!` whose failure is an error: a reader that went away is no panic.
macro_rules! outln {
    ($($text:tt)*) => {
        std::io::Write::write_fmt(&mut std::io::stdout(), format_args!("{}\n", format_args!($($text)*)))?
    };
}
pub(crate) use outln;

/// Writes the error to `log` (when there is one) and to stderr.
pub fn failure(err: &anyhow::Error, log: Option<&Path>, json: bool) {
    let text = format!("{err:#}");
    let text = one_line(&text);
    if let Some(path) = log
        && let Err(why) = append(path, &line("error", &text, json))
    {
        eprintln!("{text}");
        eprintln!("cannot write the log {}: {why}", path.display());
        return;
    }
    eprintln!("{text}");
}

fn append(path: &Path, line: &str) -> std::io::Result<()> {
    OpenOptions::new().append(true).create(true).open(path)?.write_all(line.as_bytes())
}

fn line(level: &str, text: &str, json: bool) -> String {
    let time = clock::rfc3339_now();
    match json {
        true => format!("{{\"level\":{},\"msg\":{},\"time\":{}}}\n", quoted(level), quoted(text), quoted(&time)),
        false => format!("time={} level={level} msg={}\n", quoted(&time), quoted(text)),
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_log_is_one_logrus_object_even_for_multi_line_errors() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let err = anyhow::anyhow!("the \"cause\"\nand more").context("checkpoint of x");
        failure(&err, Some(&log), true);
        let text = std::fs::read_to_string(&log).unwrap();
        assert_eq!(text.lines().count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "checkpoint of x: the \"cause\"; and more");
        assert!(value["time"].as_str().unwrap().contains('T'));
    }
}
