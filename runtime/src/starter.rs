//! What a monitor is told and what it says, and the side of whoever started it: one line of JSON each way.
//!
//! The monitor itself is in [`crate::monitor`]. Whoever starts one may go away; the next one finds it at its door
//! ([`crate::door`]).

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A longer line is not one of ours.
const LINE_CAP: u64 = 1 << 20;
/// For the question of a monitor at whose door somebody knocked.
const DOOR: Duration = Duration::from_secs(10);

/// What the monitor shall do.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Create and start a container.
    Run(RunOrder),
    /// Restore one.
    Restore(RestoreOrder),
}

/// See [`Order::Run`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunOrder {
    pub root: PathBuf,
    pub id: String,
    pub bundle: PathBuf,
    pub systemd_cgroup: bool,
    pub no_pivot: bool,
    pub pid_file: Option<PathBuf>,
}

/// See [`Order::Restore`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RestoreOrder {
    pub root: PathBuf,
    pub id: String,
    pub bundle: PathBuf,
    pub image_path: PathBuf,
    pub work_path: Option<PathBuf>,
    #[serde(default)]
    pub systemd_cgroup: bool,
    #[serde(default)]
    pub tcp_established: bool,
    #[serde(default)]
    pub file_locks: bool,
    #[serde(default)]
    pub ext_unix_sk: bool,
    /// CRIU's network lock is left out: the caller's link is down.
    #[serde(default)]
    pub skip_network_lock: bool,
    /// Leave createRuntime hooks out; the caller connects the network at its commit.
    #[serde(default)]
    pub skip_create_hooks: bool,
    /// A program other than the installed criu.
    #[serde(default)]
    pub criu: Option<PathBuf>,
    /// See [`Common::log_level`](crate::criu_plan::Common).
    pub criu_log_level: u32,
    #[serde(default)]
    pub plugin_dir: Option<PathBuf>,
    /// Environment of criu, for its plugins.
    #[serde(default)]
    pub plugin_env: BTreeMap<String, String>,
    /// Ask before going on; without it nothing is held.
    #[serde(default)]
    pub hold: bool,
    /// Where the monitor listens while it waits for the word on its last
    /// question. Its directory's rights guard it; when the path is gone, so
    /// is whoever could answer, and the answer is no.
    #[serde(default)]
    pub door: Option<PathBuf>,
    /// Seconds CRIU may be silent; 600 when absent.
    #[serde(default)]
    pub deadline_s: Option<u64>,
    #[serde(default)]
    pub pid_file: Option<PathBuf>,
}

/// What the monitor reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A question: namespaces exist, mounts do not.
    SetupNamespaces { pid: i32 },
    /// The last question: all is restored, nothing runs yet.
    PostRestore { pid: i32 },
    /// The container runs; the monitor is on its own now.
    Running { pid: i32 },
    /// It does not, and nothing of it is left; the monitor is gone.
    Failed { error: String },
}

/// The starter's word on a question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    Go,
    Refuse { why: String },
}

impl Answer {
    /// A refusal is an error, in the words of whoever refused.
    pub fn passes(self) -> Result<()> {
        match self {
            Answer::Go => Ok(()),
            Answer::Refuse { why } => bail!("{why}"),
        }
    }
}

/// The starter's side: a monitor that was started and may still ask.
#[derive(Debug)]
pub struct Starter {
    stream: BufReader<UnixStream>,
}

impl Starter {
    /// Starts a monitor in its own session and gives it its order.
    pub fn start(order: &Order) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().context("cannot make a socket pair")?;
        let stdin: OwnedFd = theirs.into();
        let mut child = Command::new("/proc/self/exe")
            .arg("monitor")
            .stdin(Stdio::from(stdin))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .current_dir("/")
            .spawn()
            .context("cannot start the monitor")?;
        // The child forks away at once, so that nobody has to reap the monitor.
        let status = child.wait().context("waiting for the monitor's start")?;
        if !status.success() {
            bail!("the monitor did not start: {status}");
        }
        let mut starter = Starter { stream: BufReader::new(ours) };
        starter.send(order)?;
        Ok(starter)
    }

    /// The monitor that waits at this door; `None` if none does.
    pub fn at(door: &Path) -> Result<Option<(Self, i32)>> {
        let stream = match UnixStream::connect(door) {
            Ok(stream) => stream,
            Err(err) if matches!(err.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => return Ok(None),
            Err(err) => return Err(err).with_context(|| format!("cannot knock at {}", door.display())),
        };
        let mut starter = Starter { stream: BufReader::new(stream) };
        match starter.next(DOOR)? {
            Event::PostRestore { pid } => Ok(Some((starter, pid))),
            other => bail!("the monitor at {} says {other:?}", door.display()),
        }
    }

    /// The next event, or an error after `deadline`.
    pub fn next(&mut self, deadline: Duration) -> Result<Event> {
        self.stream.get_ref().set_read_timeout(Some(deadline))?;
        match read_line(&mut self.stream) {
            Ok(Some(line)) => serde_json::from_str(&line).with_context(|| format!("the monitor said {line:?}")),
            Ok(None) => bail!("the monitor ended without a word"),
            Err(err) => Err(err).with_context(|| format!("the monitor said nothing for {} s", deadline.as_secs())),
        }
    }

    /// Answers a question.
    pub fn answer(&mut self, answer: &Answer) -> Result<()> {
        self.send(answer)
    }

    /// Waits until the container runs, for orders that hold nothing.
    pub fn running(mut self, deadline: Duration) -> Result<i32> {
        match self.next(deadline)? {
            Event::Running { pid } => Ok(pid),
            Event::Failed { error } => bail!("{error}"),
            question => bail!("unexpected question of the monitor: {question:?}"),
        }
    }

    fn send<T: Serialize>(&mut self, message: &T) -> Result<()> {
        send(self.stream.get_mut(), message)
    }
}

pub fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("cannot write to the monitor's socket")
}

pub fn read_line(stream: &mut BufReader<UnixStream>) -> Result<Option<String>> {
    use std::io::Read;
    let mut line = Vec::new();
    stream.by_ref().take(LINE_CAP).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() != Some(&b'\n') {
        bail!("a message was cut short or is longer than {LINE_CAP} bytes");
    }
    Ok(Some(String::from_utf8(line)?))
}
