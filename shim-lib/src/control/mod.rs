//! The shim's control thread: the agent of the host asks, it reports, suspends, drains, freezes, adopts, switches and
//! resumes. What these mean for a queue is in the shadow objects and in `rdma_virt`; here is the conversation.
//!
//! One thread for each process that opened a device, if the directory of the agent's socket exists: named `migrrdma`,
//! all signals blocked, little stack. Nothing here runs on the data path. A forked child has no control thread until
//! it opens a device itself: verbs it calls on inherited objects work, but it is not known to any agent, so that a
//! migration sees a process with RDMA files and no shim, and refuses with its name.
//!
//! | module | subject |
//! |---|---|
//! | [`wire`] | frames, deadlines, the fd |
//! | [`rpc`] | questions of application threads |
//! | [`session`] | which migration this process takes part in; request → answer |
//! | [`report`] | everything the process has, written down |
//! | [`peer`] | second QPs: make, connect, switch |
//! | [`suspend`], [`drain`] | wait-before-stop |
//! | [`freeze`], [`adopt`], [`rebuild`] | of the moving process |
//! | [`unread`] | asynchronous events around all that |
//! | [`resume`] | the end, good or bad |
#![expect(unsafe_code, reason = "signal masks and what a fork leaves behind")]

mod adopt;
mod drain;
mod freeze;
mod peer;
mod rebuild;
mod report;
mod resume;
mod rpc;
mod session;
mod suspend;
mod unread;
mod wire;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use rdma_virt::id::{PQpn, VGid, VQpn};
use rdma_virt::msg::Role;

pub use rpc::Resolved;

use crate::context::ShadowContext;
use crate::errno::Errno;
use session::{Next, Session};

/// Enough for decoding and for the verbs called from here.
const STACK: usize = 512 << 10;

/// Process that has a control thread; 0: none. A child of fork has another number.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// The control connection's fd, for a child of fork to close: it inherits the file.
static SOCKET: Mutex<Option<(i32, wire::FileId)>> = Mutex::new(None);

/// Starts the control thread of this process, once. Called when a device is opened; never fails the application.
pub fn start() {
    let me = std::process::id();
    if STARTED.load(Ordering::Acquire) == me || !std::path::Path::new(wire::SOCKET).parent().is_some_and(|d| d.exists())
    {
        return;
    }
    if STARTED.swap(me, Ordering::AcqRel) == me {
        return;
    }
    static AT_FORK: Once = Once::new();
    // SAFETY: a function of this library, which is never unloaded.
    AT_FORK.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(in_child));
    });
    // The thread inherits the mask of its maker: no signal of the application may ever be delivered to it.
    // SAFETY: two masks of ours; the caller's own is put back.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let made = std::thread::Builder::new().name("migrrdma".into()).stack_size(STACK).spawn(run);
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        if let Err(error) = made {
            STARTED.store(0, Ordering::Release);
            note(|| format!("no control thread: {error}; this process cannot be migrated"));
        }
    }
}

/// In the child, after fork: the thread is not there, and the socket is the parent's. Async-signal-safe but for the
/// lock, which is only tried.
extern "C" fn in_child() {
    STARTED.store(0, Ordering::Release);
    if let Ok(mut socket) = SOCKET.try_lock()
        && let Some((fd, id)) = socket.take()
    {
        wire::close(fd, id);
    }
}

/// The number the application shall see for a QP just made on this device.
pub fn register_qp(_ctx: &ShadowContext, pqpn: PQpn) -> VQpn {
    rpc::register_qp(pqpn)
}

/// A QP is gone. Its number is the agent's to remember: it sees the QP missing in the next report.
pub fn qp_gone(_vqpn: VQpn) {}

/// Where the remote end is that a QP is about to be connected to.
pub fn resolve_remote(vgid: VGid, vqpn: VQpn) -> Result<Resolved, Errno> {
    Ok(rpc::resolve(vgid, vqpn))
}

/// Says something to whoever set `MIGRRDMA_LOG`: the application's own stderr is not ours to write to.
pub(crate) fn note(text: impl FnOnce() -> String) {
    if std::env::var_os("MIGRRDMA_LOG").is_some() {
        eprintln!("migrrdma[{}]: {}", std::process::id(), text());
    }
}

fn remember_socket(conn: Option<&wire::Conn>) {
    *SOCKET.lock().unwrap_or_else(PoisonError::into_inner) = conn.map(wire::Conn::number);
}

/// The control thread. A panic in a request ends neither the thread nor the application.
fn run() {
    let mut session = Session::default();
    let mut pause = Duration::from_millis(20);
    loop {
        match wire::Conn::open(Role::Control, Instant::now() + Duration::from_secs(5)) {
            Ok(conn) => {
                pause = Duration::from_millis(20);
                remember_socket(Some(&conn));
                let next = serve(&conn, &mut session);
                remember_socket(None);
                drop(conn);
                if let Next::AwaitEpoch(epoch) = next {
                    epoch.await_change();
                }
            }
            Err(error) => {
                note(|| error.to_string());
                session.tick();
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_secs(1));
            }
        }
    }
}

/// Answers requests until the connection ends.
fn serve(conn: &wire::Conn, session: &mut Session) -> Next {
    loop {
        while !conn.is_ready(session.tick()) {}
        let request = match conn.receive(Some(Instant::now() + Duration::from_secs(30))) {
            Ok(request) => request,
            Err(error) => {
                note(|| error.to_string());
                return Next::Reconnect;
            }
        };
        match session.answer(request, conn) {
            Ok(Next::Serve) => {}
            Ok(next) => return next,
            Err(error) => {
                note(|| error.to_string());
                return Next::Reconnect;
            }
        }
    }
}
