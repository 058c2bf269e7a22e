//! The monitor: a small process, one for each supervised container, that owns
//! its stdio, reaps it and records how it ended.
//!
//! It is started with one end of a stream socket pair as stdin. The starter
//! writes one JSON line, an [`Order`]; the monitor answers with JSON lines,
//! [`Event`]s. Two of them are questions ([`Event::SetupNamespaces`],
//! [`Event::PostRestore`]) and wait for a [`Answer`] line: this is how an
//! agent in another process holds a restore before its commit. A socket that
//! closes while a question is open means *no*, unless the order names a
//! [`RestoreOrder::door`]: then the monitor puts its last question again to
//! whoever knocks there. After [`Event::Running`] it needs its starter no
//! more: the agent may come and go.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::foreground;
use crate::gate::Gate;
use crate::launch::{self, Console, CreateOptions};
use crate::record::{LogWriter, Record, Stream};
use crate::restore::{self, FileMaker, RestoreOptions};

/// A longer line is not one of ours.
const LINE_CAP: u64 = 1 << 20;
/// For the question of a monitor at whose door somebody knocked.
const DOOR: Duration = Duration::from_secs(10);
/// How long output may still arrive after init ended, from processes that
/// hold the pipes although they should be gone.
const DRAIN: Duration = Duration::from_secs(2);

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

fn send<T: Serialize>(stream: &mut UnixStream, message: &T) -> Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("cannot write to the monitor's socket")
}

fn read_line(stream: &mut BufReader<UnixStream>) -> Result<Option<String>> {
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

/// The hidden verb: forks away, takes its order from stdin and stays until
/// the container has ended.
pub fn main() -> Result<()> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned()?;
    detach()?;
    let mut stream = BufReader::new(UnixStream::from(stdin));
    let line = read_line(&mut stream)?.context("no order on stdin")?;
    let order: Order = serde_json::from_str(&line).context("malformed order on stdin")?;
    match supervise(&order, &mut stream) {
        Ok(()) => Ok(()),
        Err(err) => {
            let error = format!("{err:#}");
            let _ = send(stream.get_mut(), &Event::Failed { error });
            Err(err)
        }
    }
}

/// Leaves the starter: a process of its own, leader of its own session, heir
/// of the container's processes, with nothing but /dev/null for stdio.
#[expect(unsafe_code, reason = "fork has no safe interface")]
fn detach() -> Result<()> {
    // SAFETY: this process has a single thread; the child goes on as it.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { .. } => std::process::exit(0),
        nix::unistd::ForkResult::Child => {}
    }
    nix::unistd::setsid()?;
    nix::sys::prctl::set_child_subreaper(true)?;
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    nix::unistd::dup2_stdin(&null)?;
    nix::unistd::dup2_stdout(&null)?;
    nix::unistd::dup2_stderr(&null)?;
    Ok(())
}

/// The container's three descriptors and our ends of two of them.
struct Pipes {
    container: [Option<OwnedFd>; 3],
    ours: [OwnedFd; 2],
}

/// Where a restored container writes whose output was a regular file: a file
/// without a name, read as it grows.
struct Spool {
    file: File,
    read: u64,
    stream: Stream,
}

/// Read parts of a spool are given back to the disk in steps of this size.
const SPOOL_STEP: u64 = 1 << 20;

impl Spool {
    /// CRIU insists on the size the file had; what is read begins there.
    fn new(record: &Record, stream: Stream, size: u64) -> Result<Spool> {
        let file = record.spool()?;
        file.set_len(size).context("cannot size the output file")?;
        Ok(Spool { file, read: size, stream })
    }

    /// Its writing end for the container.
    fn writer(&self) -> Result<OwnedFd> {
        // Opened anew: the reader's position is not the writer's.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file));
        let file = File::options().read(true).append(true).open(path).context("cannot open the output file")?;
        Ok(file.into())
    }

    fn copy(&mut self, log: &mut LogWriter) {
        use std::os::unix::fs::FileExt;
        let mut buf = [0u8; 65536];
        while let Ok(len @ 1..) = self.file.read_at(&mut buf, self.read) {
            drop(log.add(self.stream, &buf[..len]));
            let before = self.read / SPOOL_STEP;
            self.read += len as u64;
            if self.read / SPOOL_STEP > before {
                let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let _ = fallocate(&self.file, hole, 0, self.read as i64);
            }
        }
    }
}

fn pipes() -> Result<Pipes> {
    // stdin is a pipe whose far end is closed: empty, as /dev/null is, but of
    // the kind that is found again after a restore.
    let (stdin, _) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (out, out_container) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let (err, err_container) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    Ok(Pipes { container: [Some(stdin), Some(out_container), Some(err_container)], ours: [out, err] })
}

fn supervise(order: &Order, stream: &mut BufReader<UnixStream>) -> Result<()> {
    let id = match order {
        Order::Run(order) => &order.id,
        Order::Restore(order) => &order.id,
    };
    let record = Record::of(id)?;
    let Pipes { container, ours } = pipes()?;
    let spools = Rc::new(RefCell::new(Vec::new()));
    let pid = match order {
        Order::Run(order) => run(order, container, &record)?,
        Order::Restore(order) => {
            let made = Rc::clone(&spools);
            let of = record.clone();
            let files = FileMaker(Box::new(move |n, size| {
                let stream = if n == 1 { Stream::Stdout } else { Stream::Stderr };
                let spool = Spool::new(&of, stream, size)?;
                let writer = spool.writer()?;
                made.borrow_mut().push(spool);
                Ok(writer)
            }));
            restore_held(order, container, files, &record, stream)?
        }
    };
    let running = send(stream.get_mut(), &Event::Running { pid });
    // The starter may be gone; the container is not.
    drop(running);
    usual_priority();
    stream.get_ref().shutdown(std::net::Shutdown::Both).ok();
    let spools = spools.take();
    watch(pid, ours, spools, &record)
}

/// The agent is urgent, and so is a restore, which happens in a container's pause. Watching one is not. (CRIU gives the
/// container's own processes the priority they had.)
#[expect(unsafe_code, reason = "setpriority has no safe interface")]
fn usual_priority() {
    // SAFETY: two calls with numbers only, about this process.
    unsafe {
        if nix::libc::getpriority(nix::libc::PRIO_PROCESS, 0) < 0 {
            nix::libc::setpriority(nix::libc::PRIO_PROCESS, 0, 0);
        }
    }
}

fn run(order: &RunOrder, stdio: [Option<OwnedFd>; 3], record: &Record) -> Result<i32> {
    let options = CreateOptions {
        console: Console::None,
        detached: true,
        no_pivot: order.no_pivot,
        preserve_fds: 0,
        systemd_cgroup: order.systemd_cgroup,
        stdio,
    };
    let mut handle = launch::create(&order.root, &order.id, &order.bundle, options)?;
    let mut start = || -> Result<i32> {
        record.begin()?;
        let pid = handle.init_pid().context("the container's process ended at once")?;
        launch::start(&mut handle)?;
        if let Some(path) = &order.pid_file {
            launch::write_pid_file(path, pid)?;
        }
        Ok(pid)
    };
    start().inspect_err(|_| {
        if let Ok(handle) = crate::store::ContainerHandle::load(&order.root, &order.id) {
            let _ = crate::destroy::delete(handle, true);
        }
    })
}

fn restore_held(
    order: &RestoreOrder,
    stdio: [Option<OwnedFd>; 3],
    files: FileMaker,
    record: &Record,
    stream: &mut BufReader<UnixStream>,
) -> Result<i32> {
    let mut options = RestoreOptions::new(&order.root, &order.id, &order.bundle, &order.image_path);
    let common = &mut options.common;
    common.work_path = order.work_path.clone();
    common.tcp_established = order.tcp_established;
    common.file_locks = order.file_locks;
    common.ext_unix_sk = order.ext_unix_sk;
    common.plugin_dir = order.plugin_dir.clone();
    common.plugin_env = order.plugin_env.clone().into_iter().collect();
    if order.skip_network_lock {
        common.network_lock = Some(checkpoint::criu::rpc::Criu_network_lock_method::SKIP);
    }
    if let Some(criu) = &order.criu {
        common.criu = criu.clone();
    }
    if let Some(seconds) = order.deadline_s {
        common.deadline = Duration::from_secs(seconds);
    }
    options.systemd_cgroup = order.systemd_cgroup;
    options.create_hooks = !order.skip_create_hooks;
    options.pid_file = order.pid_file.clone();
    options.stdio = stdio;
    options.files = Some(files);
    let mut gate = SocketGate { stream, hold: order.hold, door: order.door.as_deref(), record };
    Ok(restore::restore(options, &mut gate)?.pid)
}

/// Puts CRIU's gates to the starter.
struct SocketGate<'a> {
    stream: &'a mut BufReader<UnixStream>,
    hold: bool,
    door: Option<&'a Path>,
    record: &'a Record,
}

/// Where the next agent knocks.
struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    fn open(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        Ok(Door { listener, path: path.to_owned() })
    }

    /// Waits as long as somebody may come: only the source knows the decision, however long it is silent.
    fn next(&self) -> Result<BufReader<UnixStream>> {
        while self.path.exists() {
            let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(1000u16)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(BufReader::new(self.listener.accept()?.0)),
                Err(err) => return Err(err).context("waiting at the door"),
            }
        }
        bail!("nobody knows of this restore any more")
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl SocketGate<'_> {
    fn ask(&mut self, question: &Event, door: Option<&Door>) -> Result<()> {
        if !self.hold {
            return Ok(());
        }
        loop {
            // The starter has the deadline: whoever holds a commit decides when
            // it is over, and its death closes the socket.
            match (self.word(question), door) {
                (Ok(Some(Answer::Go)), _) => return Ok(()),
                (Ok(Some(Answer::Refuse { why })), _) => bail!("{why}"),
                (Ok(None) | Err(_), Some(door)) => *self.stream = door.next()?,
                (Ok(None), None) => bail!("the starter went away before its word on {question:?}"),
                (Err(err), None) => return Err(err),
            }
        }
    }

    /// `None`: nobody is there any more.
    fn word(&mut self, question: &Event) -> Result<Option<Answer>> {
        send(self.stream.get_mut(), question)?;
        let Some(line) = read_line(self.stream)? else { return Ok(None) };
        Ok(Some(serde_json::from_str(&line).context("malformed answer")?))
    }
}

impl Gate for SocketGate<'_> {
    fn post_dump(&mut self) -> Result<()> {
        bail!("a monitor never dumps")
    }

    fn setup_namespaces(&mut self, pid: i32) -> Result<()> {
        self.ask(&Event::SetupNamespaces { pid }, None)
    }

    fn post_restore(&mut self, pid: i32) -> Result<()> {
        // Whatever can fail comes before the last gate.
        self.record.begin()?;
        // Closed again before the tasks run.
        let door = self.door.map(Door::open).transpose()?;
        self.ask(&Event::PostRestore { pid }, door.as_ref())
    }
}

/// Until the container's init ends: output to the log, zombies to their rest.
fn watch(pid: i32, outputs: [OwnedFd; 2], mut spools: Vec<Spool>, record: &Record) -> Result<()> {
    let signals = foreground::block_signals()?;
    let mut log = LogWriter::open(record)?;
    let mut open = [true, true];
    let mut ended: Option<(i32, Instant)> = reap(pid)?.map(|status| (status, Instant::now()));
    loop {
        let done = match ended {
            Some((_, since)) => open == [false, false] || since.elapsed() >= DRAIN,
            None => false,
        };
        if let (true, Some((status, _))) = (done, ended) {
            spools.iter_mut().for_each(|spool| spool.copy(&mut log));
            let _ = log.finish();
            return record.finish(status);
        }
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let mut streams = Vec::new();
        for (n, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            if open[n] {
                fds.push(PollFd::new(outputs[n].as_fd(), PollFlags::POLLIN));
                streams.push(stream);
            }
        }
        let timeout = match ended {
            Some(_) => PollTimeout::from(50u8),
            None if !spools.is_empty() => PollTimeout::from(250u8),
            None => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return Err(err).context("waiting for the container"),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().is_some_and(|r| !r.is_empty())).collect();
        drop(fds);
        spools.iter_mut().for_each(|spool| spool.copy(&mut log));
        for (stream, ready) in streams.iter().zip(&ready[1..]) {
            if *ready {
                let n = *stream as usize;
                let mut buf = [0u8; 65536];
                match nix::unistd::read(&outputs[n], &mut buf) {
                    Ok(0) | Err(_) => open[n] = false,
                    // A full disk must not stop the container.
                    Ok(len) => drop(log.add(*stream, &buf[..len])),
                }
            }
        }
        while let Some(info) = signals.read_signal()? {
            let signal = info.ssi_signo as i32;
            match Signal::try_from(signal) {
                Ok(Signal::SIGCHLD | Signal::SIGPIPE | Signal::SIGHUP) => {}
                Ok(Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT) => {
                    let _ = crate::cgroup::send_signal(pid, signal);
                }
                _ => {}
            }
        }
        if ended.is_none() {
            ended = reap(pid)?.map(|status| (status, Instant::now()));
        }
    }
}

fn reap(pid: i32) -> Result<Option<i32>> {
    let mut found = None;
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(who, code)) if who == Pid::from_raw(pid) => found = Some(code),
            Ok(WaitStatus::Signaled(who, signal, _)) if who == Pid::from_raw(pid) => {
                found = Some(128 + signal as i32);
            }
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(found),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(err) => return Err(err).context("waiting for the container's process"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_socket_answers_no() {
        let dir = tempfile::tempdir().unwrap();
        let _ = dir;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let record = Record::of("unused").unwrap();
        let mut stream = BufReader::new(theirs);
        let mut gate = SocketGate { stream: &mut stream, hold: true, door: None, record: &record };
        drop(ours);
        assert!(gate.setup_namespaces(7).is_err());
    }

    #[test]
    fn a_refusal_carries_its_reason_and_a_go_is_a_go() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let record = Record::of("unused").unwrap();
        let mut stream = BufReader::new(theirs);
        let mut gate = SocketGate { stream: &mut stream, hold: true, door: None, record: &record };
        send(&mut ours, &Answer::Go).unwrap();
        send(&mut ours, &Answer::Refuse { why: "peer lost".into() }).unwrap();
        gate.setup_namespaces(7).unwrap();
        let err = gate.setup_namespaces(7).unwrap_err();
        assert_eq!(err.to_string(), "peer lost");
        let mut reader = BufReader::new(ours);
        let line = read_line(&mut reader).unwrap().unwrap();
        assert_eq!(line, "{\"event\":\"setup-namespaces\",\"pid\":7}\n");
    }

    /// A monitor's gate with a door, whose starter has gone; what the last question led to.
    fn without_starter(door: &Path) -> std::thread::JoinHandle<Result<()>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        let path = door.to_owned();
        std::thread::spawn(move || {
            let record = Record::of("unused").unwrap();
            let mut stream = BufReader::new(theirs);
            let mut gate = SocketGate { stream: &mut stream, hold: true, door: Some(&path), record: &record };
            let door = Door::open(&path)?;
            gate.ask(&Event::PostRestore { pid: 7 }, Some(&door))
        })
    }

    fn knock(door: &Path) -> Starter {
        let until = Instant::now() + DRAIN * 5;
        loop {
            if let Some((starter, 7)) = Starter::at(door).unwrap() {
                return starter;
            }
            assert!(Instant::now() < until, "nobody is at the door");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn whoever_knocks_after_the_starter_went_away_decides_and_may_go_away_too() {
        let dir = tempfile::tempdir().unwrap();
        let door = dir.path().join("door.sock");
        let waits = without_starter(&door);
        drop(knock(&door));
        knock(&door).answer(&Answer::Go).unwrap();
        waits.join().unwrap().unwrap();
        assert!(!door.exists() && Starter::at(&door).unwrap().is_none());
    }

    #[test]
    fn a_door_that_was_removed_answers_no() {
        let dir = tempfile::tempdir().unwrap();
        let door = dir.path().join("door.sock");
        let waits = without_starter(&door);
        drop(knock(&door));
        std::fs::remove_file(&door).unwrap();
        let err = waits.join().unwrap().unwrap_err();
        assert!(err.to_string().contains("nobody knows"), "{err}");
    }
}
