//! The side of the control channel that runs inside a node.
//!
//! It runs programs, moves file contents and sets the clock. It holds no
//! knowledge of migration, and no state between connections.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::wire::{self, Done, Exec, Hello, Request, Tag, WIRE_VERSION};

/// Part of the node image's key: count up when this side changes in a way an
/// older image must not be used with.
pub const GUEST_REVISION: u32 = 1;

/// Where the node image keeps the channel's token.
pub const TOKEN_PATH: &str = "/etc/lab-token";

/// Time between SIGTERM and SIGKILL when a client goes away.
const TERM_GRACE: Duration = Duration::from_secs(3);

/// Serves the control channel for ever.
pub fn serve() -> Result<()> {
    let token = fs::read_to_string(TOKEN_PATH).with_context(|| format!("read {TOKEN_PATH}"))?.trim().to_owned();
    let listener = TcpListener::bind(("0.0.0.0", wire::GUEST_PORT))
        .with_context(|| format!("listen on port {}", wire::GUEST_PORT))?;
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let token = token.clone();
        thread::spawn(move || {
            let mut reply = match stream.try_clone() {
                Ok(s) => s,
                Err(_) => return,
            };
            if let Err(e) = answer(stream, &token) {
                // The client may be gone; there is nobody else to tell.
                let _ = wire::send(&mut reply, Tag::Failed, format!("{e:#}").as_bytes());
            }
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream, token: &str) -> Result<()> {
    stream.set_nodelay(true)?;
    let Some((Tag::Hello, payload)) = wire::receive(&mut stream)? else {
        bail!("control channel: the first frame was not a greeting");
    };
    let hello: Hello = serde_json::from_slice(&payload).context("control channel: greeting")?;
    if hello.version != WIRE_VERSION {
        bail!(
            "control channel: the node speaks version {WIRE_VERSION}, the caller {}; run `cargo xtask lab down` and `up`",
            hello.version
        );
    }
    if hello.token != token {
        bail!("control channel: wrong token, this node belongs to another lab");
    }
    let done = match hello.request {
        Request::Ping => Done::ok(),
        Request::Exec(exec) => return run(stream, exec),
        Request::Write { path, mode } => write_file(&mut stream, Path::new(&path), mode)?,
        Request::Read { path } => read_file(&mut stream, Path::new(&path))?,
        Request::SetClock { unix_nanos } => set_clock(unix_nanos)?,
    };
    finish(&mut stream, &done)
}

fn finish(stream: &mut TcpStream, done: &Done) -> Result<()> {
    wire::send(stream, Tag::Done, &serde_json::to_vec(done)?)?;
    Ok(())
}

fn set_clock(unix_nanos: u64) -> Result<Done> {
    let ts = nix::sys::time::TimeSpec::new((unix_nanos / 1_000_000_000) as i64, (unix_nanos % 1_000_000_000) as i64);
    nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, ts).context("set the clock")?;
    Ok(Done::ok())
}

fn write_file(stream: &mut TcpStream, path: &Path, mode: u32) -> Result<Done> {
    let parent = path.parent().context("write: path has no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
    let name = path.file_name().context("write: path has no name")?;
    let temp = parent.join(format!(".{}.lab-push", name.to_string_lossy()));
    // A rename replaces the file whole, also one that is being executed.
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&temp)
        .with_context(|| format!("create {}", temp.display()))?;
    let outcome = loop {
        match wire::receive(stream)? {
            Some((Tag::Input, bytes)) => {
                if let Err(e) = file.write_all(&bytes) {
                    break Err(e).with_context(|| format!("write {}", temp.display()));
                }
            }
            Some((Tag::InputEnd, _)) => break Ok(()),
            Some((tag, _)) => break Err(anyhow::anyhow!("write: unexpected frame {tag:?}")),
            None => break Err(anyhow::anyhow!("write: the caller went away")),
        }
    };
    let outcome = outcome.and_then(|()| {
        fs::set_permissions(&temp, fs::Permissions::from_mode(mode))?;
        fs::rename(&temp, path).with_context(|| format!("rename to {}", path.display()))
    });
    if let Err(e) = outcome {
        let _ = fs::remove_file(&temp);
        return Err(e);
    }
    Ok(Done::ok())
}

fn read_file(stream: &mut TcpStream, path: &Path) -> Result<Done> {
    let mut file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        bail!("{} is not a regular file", path.display());
    }
    let mut buf = vec![0u8; 256 * 1024];
    loop {
        let n = file.read(&mut buf).with_context(|| format!("read {}", path.display()))?;
        if n == 0 {
            break;
        }
        wire::send(stream, Tag::Stdout, &buf[..n])?;
    }
    Ok(Done { mode: Some(meta.permissions().mode() & 0o7777), ..Done::ok() })
}

/// Runs one program; see [`Request::Exec`].
fn run(stream: TcpStream, exec: Exec) -> Result<()> {
    let Some(program) = exec.argv.first() else {
        bail!("exec: empty command");
    };
    let mut command = Command::new(program);
    command
        .args(&exec.argv[1..])
        .envs(exec.env.iter().cloned())
        .current_dir(exec.cwd.as_deref().unwrap_or("/root"))
        .stdin(if exec.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(e) => bail!("cannot run {program}: {e}"),
    };
    let group = Pid::from_raw(child.id() as i32);
    let writer = Arc::new(Mutex::new(stream.try_clone()?));
    let exited = Arc::new(AtomicBool::new(false));
    let timed_out = Arc::new(AtomicBool::new(false));

    let pumps: Vec<_> = [
        (child.stdout.take().map(|o| Box::new(o) as Box<dyn Output + Send>), Tag::Stdout),
        (child.stderr.take().map(|o| Box::new(o) as Box<dyn Output + Send>), Tag::Stderr),
    ]
    .into_iter()
    .filter_map(|(pipe, tag)| Some((pipe?, tag)))
    .map(|(pipe, tag)| {
        let (writer, exited) = (writer.clone(), exited.clone());
        thread::spawn(move || pump(pipe, tag, &writer, &exited))
    })
    .collect();

    // The caller's frames: input, signals, and its disappearance.
    let stdin = child.stdin.take();
    let (input, exited_in) = (stream, exited.clone());
    thread::spawn(move || serve_input(input, stdin, group, &exited_in));

    let (done_tx, done_rx) = mpsc::channel::<()>();
    if let Some(ms) = exec.timeout_ms {
        let timed_out = timed_out.clone();
        thread::spawn(move || {
            if done_rx.recv_timeout(Duration::from_millis(ms)) == Err(mpsc::RecvTimeoutError::Timeout) {
                timed_out.store(true, Ordering::SeqCst);
                let _ = killpg(group, Signal::SIGKILL);
            }
        });
    }

    let status = child.wait().context("wait for the program")?;
    exited.store(true, Ordering::SeqCst);
    drop(done_tx);
    for p in pumps {
        let _ = p.join();
    }
    let mut out = writer.lock().unwrap_or_else(|e| e.into_inner());
    finish(
        &mut out,
        &Done { code: status.code(), signal: status.signal(), timed_out: timed_out.load(Ordering::SeqCst), mode: None },
    )?;
    let _ = out.shutdown(std::net::Shutdown::Both);
    Ok(())
}

trait Output: Read + AsFd {}
impl<T: Read + AsFd> Output for T {}

/// Copies one output pipe to the caller. Descendants may keep the pipe open
/// after the program itself has exited; what is already there is still sent,
/// what they write later is not waited for.
fn pump(mut pipe: Box<dyn Output + Send>, tag: Tag, writer: &Mutex<TcpStream>, exited: &AtomicBool) {
    let mut buf = vec![0u8; 64 * 1024];
    loop {
        let was_over = exited.load(Ordering::SeqCst);
        let ready = {
            let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::from(if was_over { 0u8 } else { 20u8 }))
        };
        match ready {
            Ok(0) if was_over => return,
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        match pipe.read(&mut buf) {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                let mut out = writer.lock().unwrap_or_else(|e| e.into_inner());
                // A vanished caller is seen by `serve_input`, which ends the
                // program; keep draining so that it can end by itself.
                let _ = wire::send(&mut *out, tag, &buf[..n]);
            }
        }
    }
}

fn serve_input(mut input: TcpStream, mut stdin: Option<std::process::ChildStdin>, group: Pid, exited: &AtomicBool) {
    loop {
        match wire::receive(&mut input) {
            Ok(Some((Tag::Input, bytes))) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).is_err()
                {
                    stdin = None;
                }
            }
            Ok(Some((Tag::InputEnd, _))) => stdin = None,
            Ok(Some((Tag::Signal, bytes))) => {
                let signal = bytes.first().map(|&n| Signal::try_from(i32::from(n)));
                if let Some(Ok(signal)) = signal
                    && !exited.load(Ordering::SeqCst)
                {
                    let _ = killpg(group, signal);
                }
            }
            Ok(Some(_)) | Ok(None) | Err(_) => break,
        }
    }
    if exited.load(Ordering::SeqCst) {
        return;
    }
    drop(stdin);
    let _ = killpg(group, Signal::SIGTERM);
    let deadline = Instant::now() + TERM_GRACE;
    while Instant::now() < deadline {
        if exited.load(Ordering::SeqCst) {
            return;
        }
        thread::sleep(Duration::from_millis(50));
    }
    let _ = killpg(group, Signal::SIGKILL);
}
