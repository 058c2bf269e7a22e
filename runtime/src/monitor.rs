//! The monitor: a small process, one for each supervised container, that owns
//! its stdio, reaps it and records how it ended.
//!
//! It is started with one end of a stream socket pair as stdin. The starter
//! writes one JSON line, an [`Order`]; the monitor answers with JSON lines,
//! [`Event`]s. Two of them are questions ([`Event::SetupNamespaces`],
//! [`Event::PostRestore`]): this is how an agent in another process holds a
//! restore before its commit ([`crate::door`]). After [`Event::Running`] it
//! needs its starter no more: the agent may come and go.

use std::cell::RefCell;
use std::fs::File;
use std::io::BufReader;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::door::SocketGate;
use crate::foreground;
use crate::launch::{self, Console, CreateOptions};
use crate::record::{LogWriter, Record, Stream};
use crate::restore::{self, FileMaker, RestoreOptions};
use crate::starter::{Event, Order, RestoreOrder, RunOrder, read_line, send};

/// How long output may still arrive after init ended, from processes that
/// hold the pipes although they should be gone.
const DRAIN: Duration = Duration::from_secs(2);

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
    common.log_level = order.criu_log_level;
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
