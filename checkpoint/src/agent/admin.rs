//! The administrator's socket: `RUN/admin.sock`, for root only. One JSON line asks, JSON lines answer.
//!
//! A client that starts a migration stays connected to watch it; when it goes away, or sends [`Request::Abort`], the
//! migration is undone if it is not committed yet.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::{Deserialize, Serialize};

use super::metrics::{Door, Reason};
use super::status::Status;
use super::{Agent, StartError};
use crate::engine::by_hand::{Clerk, Word};
use crate::engine::park::{self, CheckpointRequest};
use crate::engine::revive::{self, RestoreRequest};
use crate::engine::take_back::{self, RecoverRequest};
use crate::engine::{Cancel, MigrateRequest, Progress, attempts};
use crate::phase::Phase;
use crate::timeline::Summary;

/// Longest line of a request, bytes.
const LINE: u64 = 64 << 10;

/// What a client can ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// The page of metrics.
    Metrics,
    Migrate(MigrateRequest),
    /// Checkpoint or pre-dump by the program at the other end, which runs CRIU when it is told to.
    Checkpoint(CheckpointRequest),
    /// Restore by the program at the other end.
    Restore(RestoreRequest),
    /// Give a committed migration up whose destination is gone, and have the program at the other end restore.
    Recover(RecoverRequest),
    /// Prepare a restore and wait for it.
    Partial(RestoreRequest),
    /// Drop what was prepared.
    DropPartial {
        container: String,
    },
    /// On a connection whose migration runs: undo it.
    Abort,
    /// On a connection whose checkpoint or restore runs: how far CRIU is.
    Word(Word),
}

/// What a client is told, one line each.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    Status {
        status: Box<Status>,
    },
    Metrics {
        text: String,
    },
    /// The migration has a name now.
    Begin {
        id: String,
        container: String,
        to: String,
    },
    /// A phase starts.
    Enter {
        phase: Phase,
    },
    /// It ended well; its length.
    Leave {
        phase: Phase,
        seconds: f64,
    },
    /// How far a phase is, in `unit`.
    Progress {
        phase: Phase,
        done: u64,
        total: u64,
        unit: String,
    },
    /// Worth knowing, changes nothing.
    Note {
        text: String,
    },
    /// It cannot be done; everything that stands against it. Nothing was changed.
    Refused {
        reasons: Vec<String>,
    },
    /// A dry run found nothing against it.
    Possible,
    /// Done. Last line.
    Done {
        summary: Summary,
    },
    /// It failed and was undone: the container runs here as before. Last line.
    Undone {
        phase: Phase,
        why: String,
        /// What could not be undone, if anything.
        left: Vec<String>,
    },
    /// It was decided, and the container belongs to the destination; this could not be finished. Last line.
    Unfinished {
        phase: Phase,
        why: String,
    },
    /// To a program that checkpoints: nothing of RDMA is in the container, go on alone. Last line.
    Plain,
    /// Dump now.
    Dump,
    /// Restore now; an incubator waits for the plugin, or the image needs none.
    Restore {
        incubator: bool,
        /// Where the next agent looks for the program, if this one goes away before its word at the gate.
        #[serde(default)]
        door: Option<PathBuf>,
    },
    /// To a program that recovers: what it will be told to restore, and from what bundle.
    Kept {
        container: String,
        images: PathBuf,
        bundle: PathBuf,
    },
    /// Past the gate.
    Go,
    /// Not past it: the tasks go on, or end if they were just restored.
    Refuse {
        why: String,
    },
    /// Whether there was a partial restore to drop. Last line.
    Dropped {
        was_there: bool,
    },
    /// The request itself was not understood. Last line.
    Error {
        text: String,
    },
}

/// Another agent that answers on the socket is an error; a socket left by one that died is not.
pub fn refuse_second(path: &Path) -> Result<(), StartError> {
    if UnixStream::connect(path).is_ok() {
        return Err(StartError::Running(path.into()));
    }
    Ok(())
}

/// Opens the socket and serves it until the process ends.
pub fn serve(agent: &Arc<Agent>) -> io::Result<()> {
    let path = agent.config.admin();
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    let agent = agent.clone();
    thread::Builder::new().name("admin".into()).spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let agent = agent.clone();
            let spawned = thread::Builder::new().name("admin-client".into()).spawn(move || converse(&agent, stream));
            if let Err(e) = spawned {
                eprintln!("no thread for an administrator: {e}");
            }
        }
    })?;
    Ok(())
}

fn converse(agent: &Arc<Agent>, stream: UnixStream) {
    let is_root = getsockopt(&stream.as_fd(), PeerCredentials).is_ok_and(|c| c.uid() == 0);
    let Ok(reading) = stream.try_clone() else { return };
    let mut reader = BufReader::new(reading);
    let (words, heard) = channel();
    let talk = Arc::new(Talk { stream: Mutex::new(stream), heard: Mutex::new(heard) });
    let clerk: Arc<dyn Clerk> = talk.clone();
    let tell = |event: Event| talk.send(&event);
    if !is_root {
        agent.metrics.rejected(Door::Admin, Reason::Rights);
        tell(Event::Error { text: "only root may ask".into() });
        return;
    }
    match next(&mut reader) {
        Ok(Some(Request::Status)) => tell(Event::Status { status: Box::new(agent.status()) }),
        Ok(Some(Request::Metrics)) => tell(Event::Metrics { text: agent.metrics_page() }),
        Ok(Some(Request::Migrate(request))) => {
            let cancel = Arc::new(Cancel::default());
            watch(reader, cancel.clone(), words);
            attempts::migrate(agent, &request, &cancel, &*talk);
        }
        Ok(Some(Request::Checkpoint(request))) => {
            let cancel = Arc::new(Cancel::default());
            watch(reader, cancel.clone(), words);
            park::checkpoint(agent, &request, &cancel, &clerk, &*talk);
        }
        Ok(Some(Request::Restore(request))) => {
            let cancel = Arc::new(Cancel::default());
            watch(reader, cancel.clone(), words);
            revive::restore(agent, &request, &cancel, &clerk, &*talk);
        }
        Ok(Some(Request::Recover(request))) => {
            let cancel = Arc::new(Cancel::default());
            watch(reader, cancel.clone(), words);
            take_back::recover(agent, &request, &cancel, &clerk, &*talk);
        }
        Ok(Some(Request::Partial(request))) => {
            let cancel = Arc::new(Cancel::default());
            watch(reader, cancel.clone(), words);
            revive::partial(agent, &request, &cancel, &*talk);
        }
        Ok(Some(Request::DropPartial { container })) => {
            tell(Event::Dropped { was_there: revive::drop_partial(agent, &container) });
        }
        Ok(Some(Request::Abort | Request::Word(_))) => {
            tell(Event::Error { text: "nothing runs on this connection".into() });
        }
        Ok(None) => {}
        Err(text) => {
            agent.metrics.rejected(Door::Admin, Reason::Malformed);
            tell(Event::Error { text });
        }
    }
}

/// Sets the flag when the client says so or goes away.
fn watch(mut reader: BufReader<UnixStream>, cancel: Arc<Cancel>, words: Sender<Word>) {
    let watching = move || {
        let why = loop {
            match next(&mut reader) {
                // Nobody waits for it if the conversation is over.
                Ok(Some(Request::Word(word))) => drop(words.send(word)),
                Ok(Some(Request::Abort)) => break "the administrator asked for it",
                _ => break "the administrator's program went away",
            }
        };
        cancel.set(why);
    };
    // Without the thread nobody can cancel, but the migration itself is none the worse.
    if let Err(e) = thread::Builder::new().name("admin-watch".into()).spawn(watching) {
        eprintln!("no thread to watch the administrator: {e}");
    }
}

fn next(reader: &mut impl BufRead) -> Result<Option<Request>, String> {
    let mut line = String::new();
    reader.take(LINE).read_line(&mut line).map_err(|e| e.to_string())?;
    if line.is_empty() {
        return Ok(None);
    }
    serde_json::from_str(&line).map(Some).map_err(|e| format!("the request cannot be read: {e}"))
}

struct Talk {
    stream: Mutex<UnixStream>,
    heard: Mutex<Receiver<Word>>,
}

impl Talk {
    fn send(&self, event: &Event) {
        let Ok(mut line) = serde_json::to_vec(event) else { return };
        line.push(b'\n');
        // A client that is gone is noticed by the watcher.
        let _ = super::lock(&self.stream).write_all(&line);
    }
}

impl Clerk for Talk {
    fn tell(&self, event: Event) {
        self.send(&event);
    }

    fn word(&self, deadline: Duration) -> Result<Word, String> {
        super::lock(&self.heard).recv_timeout(deadline).map_err(|e| match e {
            RecvTimeoutError::Timeout => format!("the command said nothing for {} s", deadline.as_secs()),
            RecvTimeoutError::Disconnected => "the command went away".into(),
        })
    }
}

impl Progress for Talk {
    fn event(&self, event: Event) {
        self.send(&event);
    }
}
