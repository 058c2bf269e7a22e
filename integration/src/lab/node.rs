//! Talking to one running node: run programs, move files.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use super::topology::NodeSpec;
use super::wire::{self, Done, Exec, Hello, Request, Tag, WIRE_VERSION};

/// Time limit of helper commands that no caller gave one for.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(120);

/// A node of the running lab.
#[derive(Debug, Clone)]
pub struct Node {
    /// Name, addresses and devices.
    pub spec: &'static NodeSpec,
    port: u16,
    token: String,
}

/// What a finished program left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub done: Done,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether it exited with status 0.
    pub fn success(&self) -> bool {
        self.done.code == Some(0)
    }

    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Exit status as a shell would show it.
    pub fn status(&self) -> i32 {
        shell_status(&self.done)
    }
}

/// Exit status as a shell would show it: 128+n for a signal, 124 for a
/// time limit.
pub fn shell_status(done: &Done) -> i32 {
    match (done.timed_out, done.code, done.signal) {
        (true, ..) => 124,
        (_, Some(code), _) => code,
        (_, None, Some(signal)) => 128 + signal,
        _ => 255,
    }
}

/// The same on several nodes at once, results in their order. They are machines of their own: one after the other, each
/// would wait while the others idle.
pub fn each<'a, T: Sync + 'a, R: Send>(
    nodes: impl IntoIterator<Item = &'a T>,
    f: impl Fn(&'a T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    thread::scope(|scope| {
        let f = &f;
        let running: Vec<_> = nodes.into_iter().map(|node| scope.spawn(move || f(node))).collect();
        running.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).collect()
    })
}

impl Node {
    pub(super) fn new(spec: &'static NodeSpec, port: u16, token: String) -> Node {
        Node { spec, port, token }
    }

    /// The node's name.
    pub fn name(&self) -> &'static str {
        self.spec.name
    }

    fn open(&self, request: Request, idle: Option<Duration>) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))
            .with_context(|| format!("connect to {}'s control channel", self.name()))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(idle)?;
        let hello = Hello { version: WIRE_VERSION, token: self.token.clone(), request };
        wire::send(&mut stream, Tag::Hello, &serde_json::to_vec(&hello)?)?;
        Ok(stream)
    }

    /// Reads frames to the end, handing output to `sink`.
    fn conclude(&self, stream: &mut TcpStream, mut sink: impl FnMut(Tag, &[u8]) -> Result<()>) -> Result<Done> {
        loop {
            match wire::receive(stream).with_context(|| format!("{}: control channel", self.name()))? {
                Some((Tag::Stdout, b)) => sink(Tag::Stdout, &b)?,
                Some((Tag::Stderr, b)) => sink(Tag::Stderr, &b)?,
                Some((Tag::Done, b)) => return Ok(serde_json::from_slice(&b)?),
                Some((Tag::Failed, b)) => {
                    bail!("{}: {}", self.name(), String::from_utf8_lossy(&b))
                }
                Some((tag, _)) => bail!("{}: unexpected frame {tag:?}", self.name()),
                None => bail!("{}: the control channel was closed", self.name()),
            }
        }
    }

    /// Whether the node answers within `wait`.
    pub fn ping(&self, wait: Duration) -> Result<()> {
        let mut stream = self.open(Request::Ping, Some(wait))?;
        self.conclude(&mut stream, |_, _| Ok(())).map(|_| ())
    }

    /// Sets the node's clock to this machine's.
    pub fn set_clock(&self) -> Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let request = Request::SetClock { unix_nanos: now.as_nanos() as u64 };
        let mut stream = self.open(request, Some(Duration::from_secs(10)))?;
        self.conclude(&mut stream, |_, _| Ok(())).map(|_| ())
    }

    /// Runs a program to its end and returns what it said, whatever its exit
    /// status. Its time limit is 120 s; see [`Node::run`] for others.
    pub fn exec<S: AsRef<str>>(&self, argv: &[S]) -> Result<Output> {
        self.run(Exec {
            argv: argv.iter().map(|s| s.as_ref().to_owned()).collect(),
            timeout_ms: Some(DEFAULT_TIMEOUT.as_millis() as u64),
            ..Exec::default()
        })
    }

    /// Runs a shell script (`sh -c`); must succeed. Returns standard output.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.check(&["sh", "-c", script])
    }

    /// Runs a program that must exit with 0. Returns standard output.
    pub fn check<S: AsRef<str>>(&self, argv: &[S]) -> Result<String> {
        let out = self.exec(argv)?;
        if !out.success() {
            let line: Vec<&str> = argv.iter().map(|s| s.as_ref()).collect();
            bail!(
                "{}: `{}` ended with status {}\n{}{}",
                self.name(),
                line.join(" "),
                out.status(),
                out.text(),
                out.errors()
            );
        }
        Ok(out.text())
    }

    /// Runs a program to its end and collects its output.
    pub fn run(&self, exec: Exec) -> Result<Output> {
        let mut stream = self.open(Request::Exec(exec), None)?;
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let done = self.conclude(&mut stream, |tag, bytes| {
            match tag {
                Tag::Stdout => stdout.extend_from_slice(bytes),
                _ => stderr.extend_from_slice(bytes),
            }
            Ok(())
        })?;
        Ok(Output { done, stdout, stderr })
    }

    /// Runs a program with this process's own standard streams.
    pub fn run_attached(&self, mut exec: Exec) -> Result<Done> {
        exec.stdin = true;
        let mut stream = self.open(Request::Exec(exec), None)?;
        let mut input = stream.try_clone()?;
        // Not joined: it may sit in a read of a terminal for ever.
        thread::spawn(move || {
            let mut buf = [0u8; 64 * 1024];
            let mut stdin = std::io::stdin();
            loop {
                match stdin.read(&mut buf) {
                    Ok(0) | Err(_) => break,
                    Ok(n) if wire::send(&mut input, Tag::Input, &buf[..n]).is_err() => return,
                    Ok(_) => {}
                }
            }
            let _ = wire::send(&mut input, Tag::InputEnd, b"");
        });
        self.conclude(&mut stream, |tag, bytes| {
            if tag == Tag::Stdout {
                let mut out = std::io::stdout();
                out.write_all(bytes)?;
                out.flush()?;
            } else {
                std::io::stderr().write_all(bytes)?;
            }
            Ok(())
        })
    }

    /// Starts a program and returns at once; it is ended when the returned
    /// value is dropped.
    pub fn spawn<S: AsRef<str>>(&self, argv: &[S]) -> Result<Running> {
        self.spawn_exec(Exec { argv: argv.iter().map(|s| s.as_ref().to_owned()).collect(), ..Exec::default() })
    }

    /// [`Node::spawn`] with every option.
    pub fn spawn_exec(&self, exec: Exec) -> Result<Running> {
        let what = exec.argv.join(" ");
        let mut stream = self.open(Request::Exec(exec), None)?;
        let control = stream.try_clone()?;
        let shared = Arc::new((Mutex::new(Progress::default()), Condvar::new()));
        let (node, to) = (self.clone(), shared.clone());
        thread::spawn(move || {
            let end = node.conclude(&mut stream, |tag, bytes| {
                let mut p = to.0.lock().unwrap_or_else(|e| e.into_inner());
                match tag {
                    Tag::Stdout => p.stdout.extend_from_slice(bytes),
                    _ => p.stderr.extend_from_slice(bytes),
                }
                to.1.notify_all();
                Ok(())
            });
            let mut p = to.0.lock().unwrap_or_else(|e| e.into_inner());
            p.end = Some(end.map_err(|e| format!("{e:#}")));
            to.1.notify_all();
        });
        Ok(Running { what: format!("{}: `{what}`", self.name()), control, shared })
    }

    /// Writes a file on the node, replacing it whole.
    pub fn write(&self, remote: &str, mode: u32, bytes: &[u8]) -> Result<()> {
        self.write_from(remote, mode, &mut &bytes[..])
    }

    fn write_from(&self, remote: &str, mode: u32, from: &mut impl Read) -> Result<()> {
        let request = Request::Write { path: remote.to_owned(), mode };
        let mut stream = self.open(request, Some(DEFAULT_TIMEOUT))?;
        let mut buf = vec![0u8; 256 * 1024];
        let mut sent = Ok(());
        loop {
            let n = from.read(&mut buf)?;
            if n == 0 {
                break;
            }
            sent = wire::send(&mut stream, Tag::Input, &buf[..n]);
            if sent.is_err() {
                break; // The node's own reason follows.
            }
        }
        if sent.is_ok() {
            sent = wire::send(&mut stream, Tag::InputEnd, b"");
        }
        self.conclude(&mut stream, |_, _| Ok(()))?;
        sent.with_context(|| format!("{}: write {remote}", self.name()))
    }

    /// Reads a regular file from the node; returns bytes and mode.
    pub fn read(&self, remote: &str) -> Result<(Vec<u8>, u32)> {
        let request = Request::Read { path: remote.to_owned() };
        let mut stream = self.open(request, Some(DEFAULT_TIMEOUT))?;
        let mut bytes = Vec::new();
        let done = self.conclude(&mut stream, |_, b| {
            bytes.extend_from_slice(b);
            Ok(())
        })?;
        Ok((bytes, done.mode.unwrap_or(0o644)))
    }

    /// Copies a file to the path `remote`, or a directory's content into the
    /// directory `remote`, keeping modes.
    pub fn push(&self, local: &Path, remote: &str) -> Result<()> {
        let meta = fs::metadata(local).with_context(|| format!("read {}", local.display()))?;
        if !meta.is_dir() {
            let mut file = fs::File::open(local)?;
            return self.write_from(remote, meta.permissions().mode() & 0o7777, &mut file);
        }
        let mut tar = Command::new("tar")
            .args(["-C"])
            .arg(local)
            .args(["--numeric-owner", "-cf", "-", "."])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("run tar")?;
        let mut from = tar.stdout.take().context("tar's output")?;
        let unpack = Exec {
            argv: ["sh", "-c", "mkdir -p \"$1\" && exec tar -C \"$1\" -xpf -", "sh", remote].map(String::from).to_vec(),
            stdin: true,
            ..Exec::default()
        };
        let mut stream = self.open(Request::Exec(unpack), None)?;
        let mut buf = vec![0u8; 256 * 1024];
        loop {
            let n = from.read(&mut buf)?;
            if n == 0 || wire::send(&mut stream, Tag::Input, &buf[..n]).is_err() {
                break;
            }
        }
        let _ = wire::send(&mut stream, Tag::InputEnd, b"");
        drop(from);
        let mut errors = Vec::new();
        let done = self.conclude(&mut stream, |_, b| {
            errors.extend_from_slice(b);
            Ok(())
        })?;
        let packed = tar.wait()?;
        if done.code != Some(0) || !packed.success() {
            bail!(
                "{}: copying {} to {remote} failed: {}",
                self.name(),
                local.display(),
                String::from_utf8_lossy(&errors)
            );
        }
        Ok(())
    }

    /// The reverse of [`Node::push`].
    pub fn pull(&self, remote: &str, local: &Path) -> Result<()> {
        if !self.exec(&["test", "-d", remote])?.success() {
            let (bytes, mode) = self.read(remote)?;
            fs::write(local, bytes).with_context(|| format!("write {}", local.display()))?;
            fs::set_permissions(local, fs::Permissions::from_mode(mode))?;
            return Ok(());
        }
        fs::create_dir_all(local)?;
        let mut tar = Command::new("tar")
            .arg("-C")
            .arg(local)
            .args(["-xpf", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("run tar")?;
        let mut to = tar.stdin.take().context("tar's input")?;
        let pack = Exec {
            argv: ["tar", "-C", remote, "--numeric-owner", "-cf", "-", "."].map(String::from).to_vec(),
            ..Exec::default()
        };
        let mut stream = self.open(Request::Exec(pack), None)?;
        let mut errors = Vec::new();
        let done = self.conclude(&mut stream, |tag, b| {
            if tag == Tag::Stdout {
                to.write_all(b)?;
            } else {
                errors.extend_from_slice(b);
            }
            Ok(())
        })?;
        drop(to);
        if !tar.wait()?.success() || done.code != Some(0) {
            bail!(
                "{}: copying {remote} to {} failed: {}",
                self.name(),
                local.display(),
                String::from_utf8_lossy(&errors)
            );
        }
        Ok(())
    }
}

#[derive(Debug, Default)]
struct Progress {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<Result<Done, String>>,
}

/// A program running on a node.
#[derive(Debug)]
pub struct Running {
    what: String,
    control: TcpStream,
    shared: Arc<(Mutex<Progress>, Condvar)>,
}

impl Running {
    /// Sends a signal to its process group.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        wire::send(&mut &self.control, Tag::Signal, &[signal as i32 as u8])?;
        Ok(())
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> String {
        let p = self.shared.0.lock().unwrap_or_else(|e| e.into_inner());
        String::from_utf8_lossy(&p.stdout).into_owned()
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> String {
        let p = self.shared.0.lock().unwrap_or_else(|e| e.into_inner());
        String::from_utf8_lossy(&p.stderr).into_owned()
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        let p = self.shared.0.lock().unwrap_or_else(|e| e.into_inner());
        p.end.is_none()
    }

    /// Waits until standard output contains `text`; an error when the program
    /// ends first or `wait` passes.
    pub fn wait_for(&self, text: &str, wait: Duration) -> Result<()> {
        self.wait_until(wait, |p| {
            String::from_utf8_lossy(&p.stdout)
                .contains(text)
                .then_some(Ok(()))
                .or_else(|| p.end.is_some().then_some(Err(())))
        })
        .with_context(|| format!("{}: waited for {text:?}", self.what))?
        .map_err(|()| {
            anyhow::anyhow!("{} ended before it said {text:?}\n{}{}", self.what, self.stdout(), self.stderr())
        })
    }

    /// Waits for its end; an error when `wait` passes first.
    pub fn wait(&self, wait: Duration) -> Result<Output> {
        let end =
            self.wait_until(wait, |p| p.end.clone()).with_context(|| format!("{}: waited for its end", self.what))?;
        let done = end.map_err(|e| anyhow::anyhow!("{}: {e}", self.what))?;
        let p = self.shared.0.lock().unwrap_or_else(|e| e.into_inner());
        Ok(Output { done, stdout: p.stdout.clone(), stderr: p.stderr.clone() })
    }

    fn wait_until<T>(&self, wait: Duration, mut ready: impl FnMut(&Progress) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + wait;
        let mut p = self.shared.0.lock().unwrap_or_else(|e| e.into_inner());
        loop {
            if let Some(value) = ready(&p) {
                return Ok(value);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "not within {wait:?}; so far it said:\n{}{}",
                    String::from_utf8_lossy(&p.stdout),
                    String::from_utf8_lossy(&p.stderr)
                );
            }
            p = self.shared.1.wait_timeout(p, left).unwrap_or_else(|e| e.into_inner()).0;
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The node ends the process group when the connection goes.
        let _ = self.control.shutdown(Shutdown::Both);
    }
}
