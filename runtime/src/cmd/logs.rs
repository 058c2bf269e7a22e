//! `logs`: what a supervised container wrote, on the stream it wrote it to.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cli::Logs;
use crate::record::{self, Record, Stream};

const POLL: Duration = Duration::from_millis(100);

pub fn run(args: &Logs) -> Result<i32> {
    let record = Record::of(&args.id)?;
    // Says that there is no record, if so.
    record.exit()?;
    let mut pending = Vec::new();
    if let Ok(mut older) = File::open(record.older_log_path()) {
        record::read_on(&mut older, &mut pending)?;
        print(&mut pending)?;
    }
    let mut file = open(&record.log_path())?;
    loop {
        // Asked first: what is written before the end is then surely read.
        let ended = record.exit()?.is_some();
        record::read_on(&mut file, &mut pending)?;
        print(&mut pending)?;
        if let Some(next) = renamed(&file, &record.log_path()) {
            record::read_on(&mut file, &mut pending)?;
            print(&mut pending)?;
            file = next;
            continue;
        }
        if !args.follow || ended {
            return Ok(0);
        }
        std::thread::sleep(POLL);
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// The new log file, when the one we read has become the older one.
fn renamed(file: &File, path: &Path) -> Option<File> {
    let next = File::open(path).ok()?;
    let (a, b) = (file.metadata().ok()?, next.metadata().ok()?);
    (a.ino() != b.ino()).then_some(next)
}

fn print(pending: &mut Vec<u8>) -> Result<()> {
    let Some(end) = pending.iter().rposition(|byte| *byte == b'\n') else {
        return Ok(());
    };
    let rest = pending.split_off(end + 1);
    for line in pending.split(|byte| *byte == b'\n') {
        match record::parse_line(line) {
            Some((Stream::Stdout, text)) => std::io::stdout().write_all(&text)?,
            Some((Stream::Stderr, text)) => std::io::stderr().write_all(&text)?,
            None => {}
        }
    }
    std::io::stdout().flush()?;
    *pending = rest;
    Ok(())
}
