//! What is kept of a supervised container beyond its life: its output and its
//! exit status, in `/var/lib/migrrdma/containers/ID/`.
//!
//! `log` has one line for each line the container wrote, in the form the
//! Kubernetes runtimes use: `TIME stdout|stderr F|P text`, where P marks a
//! piece of a longer line. When it has grown to [`LOG_CAP`] it becomes
//! `log.1` and a new one begins. `exit` is written once, whole.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::store;

/// Directory of all records.
pub const RECORDS: &str = "/var/lib/migrrdma/containers";
/// A log file is renamed when it has grown to this many bytes.
pub const LOG_CAP: u64 = 16 << 20;
/// A longer line is split.
const LINE_CAP: usize = 16 << 10;

/// How a supervised container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// As a shell gives it: 128 + signal for a killed process.
    pub status: i32,
    /// When, in RFC 3339.
    pub time: String,
    /// The host it moved to: it has not ended, it runs there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub moved_to: Option<String>,
}

/// The record of one container.
#[derive(Debug, Clone)]
pub struct Record {
    dir: PathBuf,
}

impl Record {
    /// The record of container `id`, whether it exists or not.
    pub fn of(id: &str) -> Result<Self> {
        Self::below(Path::new(RECORDS), id)
    }

    fn below(records: &Path, id: &str) -> Result<Self> {
        store::validate_id(id)?;
        Ok(Record { dir: records.join(id) })
    }

    /// Begins a new life: an earlier one's exit and log are removed.
    pub fn begin(&self) -> Result<()> {
        fs::create_dir_all(&self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
        for old in ["exit", "moved-to", "log", "log.1"] {
            let _ = fs::remove_file(self.dir.join(old));
        }
        File::create(self.log_path()).with_context(|| format!("cannot write {}", self.log_path().display()))?;
        Ok(())
    }

    /// Whether anything was ever recorded.
    pub fn exists(&self) -> bool {
        self.dir.is_dir()
    }

    /// A new file without a name on the record's disk.
    pub fn spool(&self) -> Result<File> {
        fs::create_dir_all(&self.dir).with_context(|| format!("cannot make {}", self.dir.display()))?;
        let path = self.dir.join(format!(".spool.{}", std::process::id()));
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create_new(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        fs::remove_file(&path)?;
        Ok(file)
    }

    /// The newest log file.
    pub fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The one before it.
    pub fn older_log_path(&self) -> PathBuf {
        self.dir.join("log.1")
    }

    /// Says that the container's coming end is its departure to `host`.
    /// Written before a migration commits.
    pub fn mark_moved(&self, host: &str) -> Result<()> {
        if !self.exists() {
            return Ok(());
        }
        store::write_atomically(&self.dir.join("moved-to"), host.as_bytes())
    }

    /// Takes [`Record::mark_moved`] back: the migration was undone.
    pub fn unmark_moved(&self) {
        let _ = fs::remove_file(self.dir.join("moved-to"));
    }

    /// Records the end.
    pub fn finish(&self, status: i32) -> Result<()> {
        let exit =
            Exit { status, time: clock::rfc3339_now(), moved_to: fs::read_to_string(self.dir.join("moved-to")).ok() };
        store::write_json(&self.dir.join("exit"), &exit)
    }

    /// The end, if it has come.
    pub fn exit(&self) -> Result<Option<Exit>> {
        let path = self.dir.join("exit");
        match path.exists() {
            true => store::read_json(&path).map(Some),
            false if self.exists() => Ok(None),
            false => bail!(
                "no record of container {}: it was not started with --supervise or by a migration",
                self.dir.file_name().unwrap_or_default().to_string_lossy()
            ),
        }
    }
}

/// Appends a container's output to its log.
#[derive(Debug)]
pub struct LogWriter {
    record: Record,
    file: File,
    size: u64,
    cap: u64,
    partial: [Vec<u8>; 2],
}

/// Which of a container's outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout = 0,
    Stderr = 1,
}

impl LogWriter {
    /// Continues the record's log.
    pub fn open(record: &Record) -> Result<Self> {
        let path = record.log_path();
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        let size = file.metadata()?.len();
        Ok(LogWriter { record: record.clone(), file, size, cap: LOG_CAP, partial: [Vec::new(), Vec::new()] })
    }

    /// Adds what was read from one output.
    pub fn add(&mut self, stream: Stream, bytes: &[u8]) -> Result<()> {
        let mut pending = std::mem::take(&mut self.partial[stream as usize]);
        pending.extend_from_slice(bytes);
        let mut rest = pending.as_slice();
        while !rest.is_empty() {
            match rest.iter().take(LINE_CAP).position(|byte| *byte == b'\n') {
                Some(end) => {
                    self.line(stream, 'F', &rest[..end])?;
                    rest = &rest[end + 1..];
                }
                None if rest.len() >= LINE_CAP => {
                    self.line(stream, 'P', &rest[..LINE_CAP])?;
                    rest = &rest[LINE_CAP..];
                }
                None => break,
            }
        }
        self.partial[stream as usize] = rest.to_vec();
        Ok(())
    }

    /// Writes out an unfinished last line.
    pub fn finish(&mut self) -> Result<()> {
        for stream in [Stream::Stdout, Stream::Stderr] {
            let rest = std::mem::take(&mut self.partial[stream as usize]);
            if !rest.is_empty() {
                self.line(stream, 'P', &rest)?;
            }
        }
        Ok(())
    }

    fn line(&mut self, stream: Stream, tag: char, text: &[u8]) -> Result<()> {
        let name = match stream {
            Stream::Stdout => "stdout",
            Stream::Stderr => "stderr",
        };
        let mut line = format!("{} {name} {tag} ", clock::rfc3339_now()).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        if self.size + line.len() as u64 > self.cap && self.size > 0 {
            fs::rename(self.record.log_path(), self.record.older_log_path())?;
            self.file = File::create(self.record.log_path())?;
            self.size = 0;
        }
        self.file.write_all(&line).context("cannot write the container's log")?;
        self.size += line.len() as u64;
        Ok(())
    }
}

/// One line of a log, back in the form the container wrote it.
pub fn parse_line(line: &[u8]) -> Option<(Stream, Vec<u8>)> {
    let mut parts = line.splitn(4, |byte| *byte == b' ');
    parts.next()?;
    let stream = match parts.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    let whole = parts.next()? == b"F";
    let mut text = parts.next()?.to_vec();
    if whole {
        text.push(b'\n');
    }
    Some((stream, text))
}

/// Reads a file to its end from where it is, growing `into`.
pub fn read_on(file: &mut File, into: &mut Vec<u8>) -> std::io::Result<usize> {
    file.read_to_end(into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> (tempfile::TempDir, Record) {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::below(dir.path(), "x").unwrap();
        record.begin().unwrap();
        (dir, record)
    }

    fn read_back(record: &Record) -> (Vec<u8>, Vec<u8>) {
        let mut out = (Vec::new(), Vec::new());
        let text = fs::read(record.log_path()).unwrap();
        for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
            match parse_line(line).unwrap() {
                (Stream::Stdout, text) => out.0.extend(text),
                (Stream::Stderr, text) => out.1.extend(text),
            }
        }
        out
    }

    #[test]
    fn output_comes_back_byte_for_byte() {
        let (_dir, record) = record();
        let mut log = LogWriter::open(&record).unwrap();
        let long = vec![b'x'; LINE_CAP * 2 + 7];
        log.add(Stream::Stdout, b"one\ntw").unwrap();
        log.add(Stream::Stderr, b"err\n").unwrap();
        log.add(Stream::Stdout, b"o\n\n").unwrap();
        log.add(Stream::Stdout, &long).unwrap();
        log.finish().unwrap();
        let (out, err) = read_back(&record);
        assert_eq!(err, b"err\n");
        assert_eq!(out[..9], *b"one\ntwo\n\n");
        assert_eq!(out[9..], long);
    }

    #[test]
    fn a_full_log_becomes_the_older_one() {
        let (_dir, record) = record();
        let mut log = LogWriter::open(&record).unwrap();
        log.cap = 200;
        for n in 0..10 {
            log.add(Stream::Stdout, format!("line {n}\n").as_bytes()).unwrap();
        }
        assert!(fs::metadata(record.log_path()).unwrap().len() <= 200);
        assert!(record.older_log_path().exists());
    }

    #[test]
    fn the_end_is_recorded_and_a_departure_is_told_from_it() {
        let (_dir, record) = record();
        assert_eq!(record.exit().unwrap(), None);
        record.mark_moved("dst").unwrap();
        record.finish(137).unwrap();
        let exit = record.exit().unwrap().unwrap();
        assert_eq!((exit.status, exit.moved_to.as_deref()), (137, Some("dst")));
        record.begin().unwrap();
        record.finish(3).unwrap();
        assert_eq!(record.exit().unwrap().unwrap().moved_to, None);
    }

    #[test]
    fn a_container_without_record_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::below(dir.path(), "gone").unwrap();
        assert!(record.exit().unwrap_err().to_string().contains("no record of container gone"));
    }
}
