//! SIGTERM and SIGINT end a run gracefully; a silent signal gets threads out of blocking calls.
#![expect(unsafe_code, reason = "installs signal handlers")]

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_term(_: i32) {
    ASKED.store(true, Ordering::SeqCst);
}

extern "C" fn on_nudge(_: i32) {}

/// Installs the handlers. Without SA_RESTART, so that blocking calls return.
pub fn install() {
    let set = |signal, handler: extern "C" fn(i32)| {
        // SAFETY: the handlers only store to an atomic, or do nothing.
        unsafe {
            let mut a: libc::sigaction = std::mem::zeroed();
            a.sa_sigaction = handler as *const () as usize;
            libc::sigaction(signal, &raw const a, std::ptr::null_mut());
        }
    };
    set(libc::SIGTERM, on_term);
    set(libc::SIGINT, on_term);
    set(libc::SIGUSR1, on_nudge);
}

/// Whether somebody asked for the end.
#[must_use]
pub fn asked_to_stop() -> bool {
    ASKED.load(Ordering::SeqCst)
}

/// Gets a thread out of the blocking call it is in, once. The thread must not be joined yet.
pub fn nudge(thread: &JoinHandle<()>) {
    if !thread.is_finished() {
        // SAFETY: the handle is not joined yet, so the thread id is valid.
        unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR1) };
    }
}

/// Gets a thread out of whatever it blocks in, until it ends. False when it does not end in time.
#[must_use]
pub fn nudge_until_done(thread: &JoinHandle<()>, patience: Duration) -> bool {
    for _ in 0..patience.as_millis() / 5 {
        if thread.is_finished() {
            return true;
        }
        nudge(thread);
        std::thread::sleep(Duration::from_millis(5));
    }
    thread.is_finished()
}
