//! Records on disk that survive the agent: what became of each migration this host is the source of.
//!
//! The record in state [`State::Committed`] **is** the commit: it exists on disk, flushed, before anything that
//! cannot be undone is done. A migration without a record never committed.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rdma_virt::id::MigrationId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Longest file this program reads back, bytes: what it writes is far shorter.
const MAX_FILE: u64 = 64 << 20;

/// Version of the record's form.
const VERSION: u32 = 1;

/// How far a migration came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Something may have been changed that has to be undone.
    Started,
    /// The destination owns the container.
    Committed,
    /// Committed, and everything is done.
    Finished,
    /// Committed, and then given up by an administrator, who said that the destination is gone: the container belongs
    /// to this host again. [`Record::plan`] is there until it is restored.
    TakenBack,
    /// Undone.
    Aborted,
}

/// What the record is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A container goes to another host.
    #[default]
    Migration,
    /// A container goes to disk.
    Checkpoint,
    /// A container comes from disk.
    Restore,
    /// A container that came to this host belongs to it: its source is gone, an administrator said.
    TakeOver,
}

/// One migration, as its source remembers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub version: u32,
    /// 32 hexadecimal digits.
    pub id: String,
    pub container: String,
    #[serde(default)]
    pub kind: Kind,
    /// `host:port` of the other end's agent; this host's own sign where there is no other.
    pub to: String,
    pub state: State,
    /// `host:port` of the agents of all peers, and the containers there that take part.
    pub peers: Vec<(String, Vec<String>)>,
    /// What to tell each peer after commit, and before it, what the container was here: opaque to this module.
    pub plan: serde_json::Value,
    /// Seconds since 1970.
    pub began: u64,
    /// Everybody goes on already; only the cleaning is left, and the destination may have forgotten the migration.
    #[serde(default)]
    pub resumed: bool,
    /// The other end knows that the container was taken back, or over.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub told: bool,
    /// Why it was undone or taken back, if it was.
    pub why: Option<String>,
}

impl Record {
    pub fn new(id: MigrationId, container: &str, to: &str) -> Self {
        Record {
            version: VERSION,
            id: id.to_string(),
            container: container.into(),
            kind: Kind::Migration,
            to: to.into(),
            state: State::Started,
            peers: Vec::new(),
            plan: serde_json::Value::Null,
            began: now(),
            resumed: false,
            told: false,
            why: None,
        }
    }

    pub fn id(&self) -> Option<MigrationId> {
        self.id.parse().ok()
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A record that cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot write {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not what this program wrote; move it away once you know why", .path.display())]
    Form { path: PathBuf, source: serde_json::Error },
    #[error("{} is longer than any file this program writes", .0.display())]
    TooLong(PathBuf),
}

/// The directory of records.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// `state_dir/migrations`, made if missing.
    pub fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let dir = state_dir.join("migrations");
        make_dir(&dir)?;
        Ok(Records { dir })
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// On return the record is on disk. What was made ready before is void.
    pub fn write(&self, record: &Record) -> Result<(), RecordError> {
        self.write_aside(record)?.put()
    }

    /// Everything about writing a record that takes time or may fail, but for the last step.
    pub fn make_ready(&self, record: Record) -> Result<Ready, RecordError> {
        let file = self.write_aside(&record)?;
        Ok(Ready { record, file })
    }

    fn write_aside(&self, record: &Record) -> Result<Aside, RecordError> {
        let path = self.path(&record.id);
        let aside = path.with_extension("ready");
        let wrap = |source| RecordError::Write { path: aside.clone(), source };
        let text = serde_json::to_vec_pretty(record).map_err(|e| wrap(e.into()))?;
        write_out(&aside, &text, 0o600, File::sync_all).map_err(wrap)?;
        Ok(Aside { aside, path })
    }

    /// `None` if there is no such record.
    pub fn read(&self, id: MigrationId) -> Result<Option<Record>, RecordError> {
        read_json(&self.path(&id.to_string()))
    }

    /// All that can be read, oldest first, and what is wrong with the others.
    pub fn all(&self) -> Result<(Vec<Record>, Vec<RecordError>), RecordError> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        let wrap = |source| RecordError::Read { path: self.dir.clone(), source };
        for entry in fs::read_dir(&self.dir).map_err(wrap)? {
            let path = entry.map_err(wrap)?.path();
            if path.extension().is_some_and(|e| e == "json") {
                match read_json::<Record>(&path) {
                    Ok(record) => good.extend(record),
                    Err(e) => bad.push(e),
                }
            }
        }
        good.sort_by_key(|r| r.began);
        Ok((good, bad))
    }
}

/// A record that lies on disk beside the one that holds, and is gone when this is dropped.
#[derive(Debug)]
pub struct Ready {
    record: Record,
    file: Aside,
}

impl Ready {
    /// From now on it is the one that holds; on return on disk, too. After an error nobody knows which one that will be
    /// but who reads it.
    pub fn put(self) -> Result<Record, RecordError> {
        self.file.put().map(|()| self.record)
    }
}

#[derive(Debug)]
struct Aside {
    aside: PathBuf,
    path: PathBuf,
}

impl Aside {
    fn put(self) -> Result<(), RecordError> {
        let put = fs::rename(&self.aside, &self.path).and_then(|()| flush_parent(&self.path));
        put.map_err(|source| RecordError::Write { path: self.path.clone(), source })
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        // Nothing is there once it was put.
        let _ = fs::remove_file(&self.aside);
    }
}

/// Makes a directory only its owner may enter, and its parents.
pub fn make_dir(dir: &Path) -> Result<(), RecordError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| RecordError::Write { path: dir.into(), source })
}

/// Replaces `path` in one step; on return the new content is on disk.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<(), RecordError> {
    let wrap = |source| RecordError::Write { path: path.into(), source };
    let text = serde_json::to_vec_pretty(value).map_err(|e| wrap(e.into()))?;
    replace(path, &text, 0o600).map_err(wrap)
}

/// Replaces a file in one step and flushes it and its directory.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    swap(path, bytes, mode, File::sync_all)?;
    flush_parent(path)
}

fn flush_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// Replaces a file in one step, for what need not outlive this host's uptime: nothing is flushed.
pub fn replace_json_unflushed<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    swap(path, &serde_json::to_vec(value)?, 0o600, |_| Ok(()))
}

fn swap(path: &Path, bytes: &[u8], mode: u32, flush: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let mut tmp = path.as_os_str().to_owned();
    tmp.push(".new");
    let tmp = PathBuf::from(tmp);
    write_out(&tmp, bytes, mode, flush)?;
    fs::rename(&tmp, path)
}

fn write_out(path: &Path, bytes: &[u8], mode: u32, flush: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    flush(&file)
}

/// `None` if there is no such file.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, RecordError> {
    let Some(text) = read_bytes(path)? else { return Ok(None) };
    serde_json::from_slice(&text).map(Some).map_err(|source| RecordError::Form { path: path.into(), source })
}

/// The content of a file that is no longer than any this program writes; `None` if there is no such file.
pub fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>, RecordError> {
    let wrap = |source| RecordError::Read { path: path.into(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(wrap(e)),
    };
    let mut text = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(wrap)?;
    if text.len() as u64 > MAX_FILE {
        return Err(RecordError::TooLong(path.into()));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back_and_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let id = MigrationId([1; 16]);
        assert_eq!(records.read(id).unwrap(), None);
        let mut record = Record::new(id, "c", "dst:7477");
        records.write(&record).unwrap();
        record.state = State::Committed;
        records.write(&record).unwrap();
        assert_eq!(records.read(id).unwrap(), Some(record.clone()));
        assert_eq!(records.all().unwrap().0, vec![record]);
    }

    #[test]
    fn a_record_that_is_ready_holds_when_it_is_put_and_any_other_one_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        let id = MigrationId([1; 16]);
        let started = Record::new(id, "c", "dst:7477");
        records.write(&started).unwrap();
        let committed = Record { state: State::Committed, ..started.clone() };
        let ready = records.make_ready(committed.clone()).unwrap();
        assert_eq!(records.read(id).unwrap().as_ref(), Some(&started));
        assert_eq!(ready.put().unwrap(), committed);
        assert_eq!(records.read(id).unwrap().as_ref(), Some(&committed));
        let left = || fs::read_dir(dir.path().join("migrations")).unwrap().count();
        // An agent that was killed has left one; the next one has undone the migration.
        std::mem::forget(records.make_ready(committed.clone()).unwrap());
        assert_eq!(left(), 2);
        records.write(&started).unwrap();
        assert_eq!((left(), records.read(id).unwrap()), (1, Some(started)));
        drop(records.make_ready(committed.clone()).unwrap());
        assert_eq!(left(), 1, "nobody wants it any more");
    }

    #[test]
    fn a_damaged_record_is_reported_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        records.write(&Record::new(MigrationId([1; 16]), "c", "d")).unwrap();
        fs::write(dir.path().join("migrations/x.json"), "{\"version\":").unwrap();
        let (good, bad) = records.all().unwrap();
        assert_eq!((good.len(), bad.len()), (1, 1));
    }
}
