//! A bundle that arrives with its container: what the destination does about it. It is made where none was, or brought
//! up to date where an earlier copy of the same bundle lies, and what was made goes away again when the migration does.
//!
//! A note on disk says which bundles are not finished; an agent that starts removes those that no container uses.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use rdma_virt::id::MigrationId;
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, chain};
use crate::net::msg::{CopyOffer, Offer, Order, PIECE};
use crate::record::{make_dir, read_json, write_json};
use crate::tree::mark;
use crate::tree::unpack::Target;

/// What a running container may add to its files until it is frozen, bytes.
const SLACK: u64 = 1 << 30;

/// An unfinished bundle.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    bundle: PathBuf,
    /// It was made for the migration: without it there was nothing.
    fresh: bool,
}

/// Everything that speaks against a copy to there.
pub fn problems(agent: &Agent, bundle: &Path, copy: &CopyOffer) -> Vec<String> {
    let mut problems = Vec::new();
    if !bundle.is_absolute() || bundle.components().any(|c| matches!(c, std::path::Component::ParentDir)) {
        return vec![format!("{} is no place for a bundle", bundle.display())];
    }
    match fs::symlink_metadata(bundle) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => problems.push(format!("{}: {e}", bundle.display())),
        Ok(meta) if !meta.is_dir() => problems.push(format!("{} is no directory", bundle.display())),
        Ok(_) => match mark::lineage(bundle) {
            Ok(Some(lineage)) if lineage == copy.lineage => {}
            Ok(_) => problems.push(format!(
                "a bundle {} is here already and no copy of the container's; remove it, or leave --copy-rootfs out to \
                 use it",
                bundle.display()
            )),
            Err(e) => problems.push(chain(&e)),
        },
    }
    if let Ok(list) = agent.host.containers()
        && let Some(user) = list.iter().find(|c| c.bundle == bundle)
    {
        problems.push(format!("container {} runs from the bundle {}", user.id, bundle.display()));
    }
    let near = bundle.ancestors().find(|dir| dir.is_dir()).unwrap_or(Path::new("/"));
    problems.extend(super::check::room(near, copy.bytes, "bundle"));
    problems
}

/// A bundle in the making.
#[derive(Debug)]
pub struct Landing {
    bundle: PathBuf,
    fresh: bool,
    note: PathBuf,
    limit: u64,
    /// The first directory above the bundle that had to be made for it.
    made_above: Option<PathBuf>,
    worker: Option<Worker>,
}

#[derive(Debug)]
struct Worker {
    whole: bool,
    pieces: SyncSender<Vec<u8>>,
    thread: JoinHandle<io::Result<BTreeSet<PathBuf>>>,
}

impl Landing {
    /// Makes the directory, if there is none, and remembers that it is unfinished.
    pub fn begin(agent: &Agent, id: MigrationId, offer: &Offer) -> Result<Self, String> {
        let copy = offer.copy.as_ref().ok_or("the migration brings no bundle")?;
        let bundle = offer.bundle.clone();
        let said = |e: &(dyn std::error::Error + 'static)| chain(e);
        let notes = notes(agent);
        make_dir(&notes).map_err(|e| said(&e))?;
        let note = notes.join(format!("{id}.json"));
        let fresh = !bundle.exists();
        write_json(&note, &Note { version: 1, bundle: bundle.clone(), fresh }).map_err(|e| said(&e))?;
        let mut made_above = None;
        if fresh {
            made_above = bundle.ancestors().skip(1).take_while(|dir| !dir.exists()).last().map(Path::to_owned);
            fs::create_dir_all(&bundle).map_err(|e| format!("cannot make {}: {e}", bundle.display()))?;
        }
        let landing = Landing {
            bundle,
            fresh,
            note,
            limit: copy.bytes.saturating_mul(2).saturating_add(SLACK),
            made_above,
            worker: None,
        };
        match mark::set(&landing.bundle, &copy.lineage) {
            Ok(()) => Ok(landing),
            Err(e) => {
                landing.remove();
                Err(said(&e))
            }
        }
    }

    /// The complete bundle that an agent before this one received, if the container's bundle came along and nobody has
    /// decided yet that it stays.
    pub fn again(agent: &Agent, id: MigrationId) -> Option<Self> {
        let note = notes(agent).join(format!("{id}.json"));
        let Note { bundle, fresh, .. } = read_json(&note).ok().flatten()?;
        Some(Landing { bundle, fresh, note, limit: 0, made_above: None, worker: None })
    }

    /// One order about the tree. `true` at the end of the whole bundle.
    pub fn take(&mut self, agent: &Agent, order: Order) -> Result<bool, String> {
        match order {
            Order::TreeStart { whole, gone } => self.start(whole, &gone).map(|()| false),
            Order::TreePiece { bytes } => self.piece(bytes).map(|()| false),
            Order::TreeEnd => self.end(agent),
            other => Err(format!("{} is no order about a bundle", other.name())),
        }
    }

    fn start(&mut self, whole: bool, gone: &[Vec<u8>]) -> Result<(), String> {
        if self.worker.is_some() {
            return Err("a second tree before the end of the first".into());
        }
        let open = |e: io::Error| format!("{}: {e}", self.bundle.display());
        let target = Target::open(&self.bundle).map_err(open)?;
        for path in gone {
            target.remove(Path::new(std::ffi::OsStr::from_bytes(path))).map_err(open)?;
        }
        // One piece is worked on while the next one arrives.
        let (pieces, arriving) = sync_channel::<Vec<u8>>(1);
        let limit = self.limit;
        let work = move || {
            let mut input = Arriving { pieces: arriving, now: Vec::new(), at: 0 };
            let seen = target.unpack(&mut input, limit)?;
            // Padding after the archive's end.
            io::copy(&mut input, &mut io::sink())?;
            Ok(seen)
        };
        let thread = thread::Builder::new().name("unpack".into()).spawn(work);
        let thread = thread.map_err(|e| format!("no thread to unpack the bundle: {e}"))?;
        self.worker = Some(Worker { whole, pieces, thread });
        Ok(())
    }

    fn piece(&mut self, bytes: Vec<u8>) -> Result<(), String> {
        let Some(worker) = self.worker.as_ref().filter(|_| bytes.len() <= PIECE) else {
            return Err("a piece of a tree out of turn".into());
        };
        if worker.pieces.send(bytes).is_ok() {
            return Ok(());
        }
        // It gave up; its own words say why.
        Err(self.joined().err().unwrap_or_else(|| "the bundle went on after its end".into()))
    }

    fn joined(&mut self) -> Result<(bool, BTreeSet<PathBuf>), String> {
        let Some(Worker { whole, pieces, thread }) = self.worker.take() else {
            return Err("the end of a tree out of turn".into());
        };
        drop(pieces);
        match thread.join() {
            Ok(Ok(seen)) => Ok((whole, seen)),
            Ok(Err(e)) => Err(format!("unpacking the bundle: {e}")),
            Err(_) => Err("the thread that unpacks the bundle panicked".into()),
        }
    }

    fn end(&mut self, agent: &Agent) -> Result<bool, String> {
        let (whole, seen) = self.joined()?;
        let config = seen.contains(Path::new("config.json"));
        if whole {
            let rootfs = agent.host.rootfs(&self.bundle).map_err(|e| e.to_string())?;
            let inner = rootfs.strip_prefix(&self.bundle).map_err(|_| "its root file system lies elsewhere")?;
            let target =
                Target::open(&self.bundle).and_then(|t| if self.fresh { Ok(()) } else { t.prune(&seen, inner) });
            target.map_err(|e| format!("{}: {e}", self.bundle.display()))?;
        }
        if config {
            agent.host.localise(&self.bundle).map_err(|e| e.to_string())?;
        }
        Ok(whole)
    }

    /// The container runs from it: it stays.
    pub fn keep(self) {
        let _ = fs::remove_file(&self.note);
    }

    /// The migration is off: what was made for it goes.
    pub fn remove(mut self) {
        if self.worker.is_some() {
            let _ = self.joined();
        }
        if self.fresh {
            clear(&self.bundle);
            // Only what is empty: others may have used the directories meanwhile.
            if let Some(top) = &self.made_above {
                let mut dir = self.bundle.parent();
                while let Some(at) = dir.filter(|at| at.starts_with(top)) {
                    if fs::remove_dir(at).is_err() {
                        break;
                    }
                    dir = at.parent();
                }
            }
        }
        let _ = fs::remove_file(&self.note);
    }
}

fn notes(agent: &Agent) -> PathBuf {
    agent.config.state_dir.join("copying")
}

fn clear(bundle: &Path) {
    match fs::remove_dir_all(bundle) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => eprintln!("{}: {e}", bundle.display()),
        _ => {}
    }
}

/// Bundles that were in the making when the agent ended: those that no container uses, and no migration that goes on,
/// are removed.
pub fn recover(agent: &Agent) {
    let Ok(entries) = fs::read_dir(notes(agent)) else { return };
    let used: Vec<PathBuf> = match agent.host.containers() {
        Ok(list) => list.into_iter().map(|c| c.bundle).collect(),
        // Without knowing who uses what, nothing may go.
        Err(e) => return eprintln!("unfinished bundles stay: {e}"),
    };
    for path in entries.flatten().map(|e| e.path()) {
        let id = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        if id.is_some_and(|id| agent.desk.has(id)) {
            continue;
        }
        match read_json::<Note>(&path) {
            Ok(Some(note)) => {
                if note.fresh && !used.contains(&note.bundle) {
                    eprintln!("the bundle {} was not finished: removed", note.bundle.display());
                    clear(&note.bundle);
                }
                let _ = fs::remove_file(&path);
            }
            Ok(None) => {}
            Err(e) => eprintln!("{}", chain(&e)),
        }
    }
}

/// The pieces as one stream; ends when the sender does.
struct Arriving {
    pieces: Receiver<Vec<u8>>,
    now: Vec<u8>,
    at: usize,
}

impl Read for Arriving {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.now.len() {
            match self.pieces.recv() {
                Ok(piece) => (self.now, self.at) = (piece, 0),
                Err(_) => return Ok(0),
            }
        }
        let n = buf.len().min(self.now.len() - self.at);
        buf[..n].copy_from_slice(&self.now[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}
