//! One run of `criu swrk`: start, place, ask, answer notifications, reap.

use std::ffi::{CString, OsString};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair};
use protobuf::{Message, MessageField};

use super::child::Child;
use super::rpc::{Criu_features, Criu_notify, Criu_opts, Criu_req, Criu_req_type, Criu_resp};
use super::{CriuError, Features, Notify, Result, Verdict, Version, log};

/// The number the socket has in criu; inherited descriptors follow.
const SOCKET_FD: RawFd = 3;
/// CRIU's answers are far smaller; a longer one is not CRIU's.
const MAX_ANSWER: usize = 256 * 1024;
/// Where programs are looked for when the caller's PATH is poor: engines start
/// runtimes with next to no environment, and CRIU itself runs iptables and tar.
const SYSTEM_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How soon it is noticed that CRIU is no more.
const ALIVE: Duration = Duration::from_millis(500);
/// How long CRIU may take to go once it was told to or has answered.
const GRACE: Duration = Duration::from_secs(10);

/// Puts the freshly started criu (its pid) where the restored tasks shall be
/// born, before it is asked for anything, and may complete the options with
/// what only then is known (the cgroup's path).
pub type Placement<'a> = Box<dyn FnOnce(i32, &mut Criu_opts) -> std::result::Result<(), String> + 'a>;

/// A criu process to be started for one request.
pub struct Criu<'a> {
    program: PathBuf,
    plugin_dir: Option<PathBuf>,
    env: Vec<(OsString, OsString)>,
    stdio: [Option<OwnedFd>; 3],
    inherited: Vec<OwnedFd>,
    placement: Option<Placement<'a>>,
    deadline: Duration,
    log: Option<PathBuf>,
}

impl std::fmt::Debug for Criu<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Criu")
            .field("program", &self.program)
            .field("plugin_dir", &self.plugin_dir)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

impl Default for Criu<'_> {
    fn default() -> Self {
        Self::new("criu")
    }
}

impl<'a> Criu<'a> {
    /// `program` is a path, or a name looked up in PATH and the system's usual directories.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Criu {
            program: program.into(),
            plugin_dir: None,
            env: Vec::new(),
            stdio: [None, None, None],
            inherited: Vec::new(),
            placement: None,
            deadline: Duration::from_secs(600),
            log: None,
        }
    }

    /// Directory CRIU loads its plugins from (`CRIU_LIBS_DIR`). A CRIU
    /// configuration file may still override it.
    pub fn plugin_dir(&mut self, dir: impl Into<PathBuf>) -> &mut Self {
        self.plugin_dir = Some(dir.into());
        self
    }

    /// One more variable of criu's environment, which plugins see too.
    pub fn env(&mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> &mut Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// criu's own stdin, stdout or stderr (0, 1, 2); `/dev/null` unless set.
    pub fn stdio(&mut self, n: usize, fd: OwnedFd) -> &mut Self {
        self.stdio[n] = Some(fd);
        self
    }

    /// Hands `fd` to criu and returns its number there, for `inherit_fd`.
    pub fn pass_fd(&mut self, fd: OwnedFd) -> i32 {
        self.inherited.push(fd);
        SOCKET_FD + self.inherited.len() as i32
    }

    /// Runs before the request is sent, with criu's pid.
    pub fn place(&mut self, placement: Placement<'a>) -> &mut Self {
        self.placement = Some(placement);
        self
    }

    /// Longest wait between two words of CRIU. Time spent in the notify
    /// closure does not count: the closure has its own deadlines.
    pub fn deadline(&mut self, deadline: Duration) -> &mut Self {
        self.deadline = deadline;
        self
    }

    /// The log file CRIU will write, read for the root cause on failure.
    pub fn log_at(&mut self, path: impl Into<PathBuf>) -> &mut Self {
        self.log = Some(path.into());
        self
    }

    /// CRIU's version.
    pub fn version(self) -> Result<Version> {
        let answer = self.ask("version", request(Criu_req_type::VERSION), &mut go)?;
        let v = answer.version.unwrap_or_default();
        let part = |n: i32| u32::try_from(n).unwrap_or(0).min(99);
        Ok(Version(part(v.major_number()) * 10_000 + part(v.minor_number()) * 100 + part(v.sublevel())))
    }

    /// Asks whether CRIU and kernel can do what incremental dumps need.
    pub fn features(self) -> Result<Features> {
        let mut req = request(Criu_req_type::FEATURE_CHECK);
        let mut ask = Criu_features::new();
        ask.set_mem_track(true);
        ask.set_lazy_pages(true);
        req.features = MessageField::some(ask);
        let answer = self.ask("feature check", req, &mut go)?;
        let got = answer.features.unwrap_or_default();
        Ok(Features { mem_track: got.mem_track(), lazy_pages: got.lazy_pages() })
    }

    /// `criu check`: whether this kernel can be checkpointed on at all.
    pub fn check(self) -> Result<()> {
        let mut req = request(Criu_req_type::CHECK);
        let mut opts = Criu_opts::new();
        opts.set_images_dir_fd(-1);
        req.opts = MessageField::some(opts);
        self.ask("check", req, &mut go).map(drop)
    }

    /// Dumps the tree under `opts.pid`. On `Ok` the tasks are gone, or still
    /// running with `leave_running`; on `Err` they run (or are frozen by the
    /// caller's cgroup) as before.
    pub fn dump(self, opts: Criu_opts, notify: &mut dyn FnMut(Notify) -> Verdict) -> Result<()> {
        self.ask("dump", with_opts(Criu_req_type::DUMP, opts), notify).map(drop)
    }

    /// Dumps memory pages only and lets the tasks go on, in one step.
    pub fn pre_dump(self, opts: Criu_opts, notify: &mut dyn FnMut(Notify) -> Verdict) -> Result<()> {
        let req = with_opts(Criu_req_type::SINGLE_PRE_DUMP, opts);
        self.ask("pre-dump", req, notify).map(drop)
    }

    /// Restores the tree in the images and returns its root's pid. With
    /// `rst_sibling` that task is a child of the calling process.
    pub fn restore(self, opts: Criu_opts, notify: &mut dyn FnMut(Notify) -> Verdict) -> Result<i32> {
        let answer = self.ask("restore", with_opts(Criu_req_type::RESTORE, opts), notify)?;
        match answer.restore.as_ref() {
            Some(restored) if restored.pid() > 0 => Ok(restored.pid()),
            _ => Err(CriuError::Protocol("restore answered without a pid".into())),
        }
    }

    fn ask(
        mut self,
        op: &'static str,
        mut req: Criu_req,
        notify: &mut dyn FnMut(Notify) -> Verdict,
    ) -> Result<Criu_resp> {
        let expected = req.type_();
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|err| io_error("socketpair", err.into()))?;
        let mut child = self.start(theirs)?;
        if let Some(place) = self.placement.take()
            && let Err(why) = place(child.pid(), req.opts.mut_or_insert_default())
        {
            child.kill();
            return Err(CriuError::Placement(why));
        }
        let outcome = self.converse(op, &ours, &mut child, &req, notify);
        let refused = match &outcome {
            Ok(conversation) => conversation.refused.clone(),
            Err(_) => None,
        };
        // Without our end CRIU cannot wait for us any more.
        drop(ours);
        self.reap(&mut child, matches!(outcome, Err(CriuError::Deadline { .. })));
        let answer = outcome?.answer;
        if let Some((script, why)) = refused
            && !answer.as_ref().is_some_and(Criu_resp::success)
        {
            return Err(CriuError::Refused { op, script, why });
        }
        let Some(answer) = answer else {
            return Err(CriuError::Failed { op, cause: self.cause("it ended without an answer", ""), errno: 0 });
        };
        if !answer.success() {
            return Err(CriuError::Failed {
                op,
                cause: self.cause("no reason given", answer.cr_errmsg()),
                errno: answer.cr_errno(),
            });
        }
        if answer.type_() != expected {
            return Err(CriuError::Protocol(format!("asked {expected:?}, answered {:?}", answer.type_())));
        }
        Ok(answer)
    }

    fn converse(
        &self,
        op: &'static str,
        socket: &OwnedFd,
        child: &mut Child,
        req: &Criu_req,
        notify: &mut dyn FnMut(Notify) -> Verdict,
    ) -> Result<Conversation> {
        let mut refused = None;
        if let Err(err) = say(socket, req) {
            // A criu that died at once is told by the missing answer.
            if err.raw_os_error() != Some(libc::EPIPE) {
                return Err(io_error("sending the request", err));
            }
        }
        loop {
            let Some((answer, fd)) = self.hear(op, socket, child)? else {
                return Ok(Conversation { answer: None, refused });
            };
            if answer.type_() != Criu_req_type::NOTIFY {
                return Ok(Conversation { answer: Some(answer), refused });
            }
            // A failed operation may arrive as a NOTIFY without success.
            if !answer.success() {
                return Ok(Conversation { answer: Some(answer), refused });
            }
            let told: Criu_notify = answer.notify.unwrap_or_default();
            let script = told.script().to_owned();
            let verdict = notify(Notify { script: script.clone(), pid: told.has_pid().then(|| told.pid()), fd });
            let mut reply = request(Criu_req_type::NOTIFY);
            reply.set_notify_success(matches!(verdict, Verdict::Go));
            if let Verdict::Refuse(why) = verdict {
                refused.get_or_insert((script, why));
            }
            match say(socket, &reply) {
                Ok(()) => {}
                // The final answer, if any, is still in the queue.
                Err(err) if err.raw_os_error() == Some(libc::EPIPE) => {}
                Err(err) => return Err(io_error("answering a notification", err)),
            }
        }
    }

    /// The next message, or `None` when CRIU has closed its end or is no more: tasks it was restoring may hold that end,
    /// too.
    fn hear(
        &self,
        op: &'static str,
        socket: &OwnedFd,
        child: &mut Child,
    ) -> Result<Option<(Criu_resp, Option<OwnedFd>)>> {
        let end = Instant::now() + self.deadline;
        let mut ended = false;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CriuError::Deadline { op, after: self.deadline });
            }
            let timeout = PollTimeout::try_from(left.min(ALIVE)).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, timeout) {
                // What it said before its end has been read by now.
                Ok(0) if ended => return Ok(None),
                Ok(0) => ended = child.ended().unwrap_or(true),
                Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => break,
                Err(err) => return Err(io_error("waiting for CRIU", err.into())),
            }
        }
        let (bytes, fd) = receive(socket).map_err(|err| io_error("receiving", err))?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let answer = Criu_resp::parse_from_bytes(&bytes)
            .map_err(|err| CriuError::Protocol(format!("undecodable message: {err}")))?;
        Ok(Some((answer, fd)))
    }

    fn reap(&self, child: &mut Child, now: bool) {
        let end = Instant::now() + if now { Duration::ZERO } else { GRACE };
        loop {
            match child.ended() {
                Ok(true) | Err(_) => return,
                Ok(false) if Instant::now() >= end => return child.kill(),
                Ok(false) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    fn cause(&self, otherwise: &str, errmsg: &str) -> String {
        let from_log = self.log.as_deref().and_then(log::root_cause);
        let errmsg = errmsg.trim();
        match (from_log, errmsg.is_empty()) {
            (Some(cause), _) => cause,
            (None, false) => log::soften_errno_texts(errmsg.lines().next().unwrap_or(errmsg)),
            (None, true) => otherwise.to_owned(),
        }
    }

    fn start(&mut self, socket: OwnedFd) -> Result<Child> {
        let path = find_program(&self.program)?;
        let spawn_error = |source: io::Error| CriuError::Spawn { path: path.clone(), source };
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").map_err(spawn_error)?;
        let mut fds: Vec<RawFd> =
            self.stdio.iter().map(|fd| fd.as_ref().map_or(null.as_raw_fd(), AsRawFd::as_raw_fd)).collect();
        fds.push(socket.as_raw_fd());
        fds.extend(self.inherited.iter().map(AsRawFd::as_raw_fd));
        let argv = ["criu".into(), "swrk".into(), SOCKET_FD.to_string()]
            .map(|arg: String| CString::new(arg).expect("no NUL in a literal"));
        let program = CString::new(path.as_os_str().as_bytes()).map_err(|err| spawn_error(io::Error::other(err)))?;
        let child = Child::start(&program, &argv, &self.environment(), &fds).map_err(|err| match err.kind() {
            io::ErrorKind::NotFound => CriuError::Missing(path.clone()),
            _ => spawn_error(err),
        });
        // criu has its copies now.
        self.inherited.clear();
        self.stdio = [None, None, None];
        child
    }

    fn environment(&self) -> Vec<CString> {
        let mut vars: Vec<(OsString, OsString)> =
            std::env::vars_os().filter(|(key, _)| key != "NOTIFY_SOCKET" && key != "PATH").collect();
        let path = match std::env::var_os("PATH") {
            Some(mut path) if !path.is_empty() => {
                path.push(":");
                path.push(SYSTEM_PATH);
                path
            }
            _ => SYSTEM_PATH.into(),
        };
        vars.push(("PATH".into(), path));
        if let Some(dir) = &self.plugin_dir {
            vars.retain(|(key, _)| key != "CRIU_LIBS_DIR");
            vars.push(("CRIU_LIBS_DIR".into(), dir.clone().into()));
        }
        for (key, value) in &self.env {
            vars.retain(|(old, _)| old != key);
            vars.push((key.clone(), value.clone()));
        }
        vars.iter()
            .filter_map(|(key, value)| {
                let mut var = key.as_bytes().to_vec();
                var.push(b'=');
                var.extend_from_slice(value.as_bytes());
                CString::new(var).ok()
            })
            .collect()
    }
}

struct Conversation {
    answer: Option<Criu_resp>,
    refused: Option<(String, String)>,
}

fn go(_: Notify) -> Verdict {
    Verdict::Go
}

fn request(kind: Criu_req_type) -> Criu_req {
    let mut req = Criu_req::new();
    req.set_type(kind);
    req
}

fn with_opts(kind: Criu_req_type, opts: Criu_opts) -> Criu_req {
    let mut req = request(kind);
    req.opts = MessageField::some(opts);
    req
}

fn io_error(what: &'static str, source: io::Error) -> CriuError {
    CriuError::Io { what, source }
}

fn say(socket: &OwnedFd, req: &Criu_req) -> io::Result<()> {
    let bytes = req.write_to_bytes().map_err(io::Error::other)?;
    loop {
        match send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(n) if n == bytes.len() => return Ok(()),
            Ok(_) => return Err(io::Error::other("message cut short")),
            Err(nix::errno::Errno::EINTR) => {}
            Err(err) => return Err(err.into()),
        }
    }
}

#[expect(unsafe_code, reason = "received descriptors arrive as numbers and need an owner")]
fn receive(socket: &OwnedFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut buf = vec![0u8; MAX_ANSWER];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let (len, truncated, fds) = loop {
        let mut iov = [IoSliceMut::new(&mut buf)];
        match recvmsg::<()>(socket.as_raw_fd(), &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
            Ok(msg) => {
                let mut fds = Vec::new();
                for cmsg in msg.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(numbers) = cmsg {
                        // SAFETY: the kernel just made these descriptors for us.
                        fds.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                break (msg.bytes, msg.flags.contains(MsgFlags::MSG_TRUNC), fds);
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(nix::errno::Errno::ECONNRESET) => return Ok((Vec::new(), None)),
            Err(err) => return Err(err.into()),
        }
    };
    if truncated {
        return Err(io::Error::other("message longer than any CRIU sends"));
    }
    buf.truncate(len);
    Ok((buf, fds.into_iter().next()))
}

/// A path is taken as it is; a bare name is searched for.
fn find_program(program: &Path) -> Result<PathBuf> {
    if program.components().count() > 1 {
        return match program.exists() {
            true => Ok(program.to_owned()),
            false => Err(CriuError::Missing(program.to_owned())),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(std::env::split_paths(SYSTEM_PATH))
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| CriuError::Missing(program.to_owned()))
}
