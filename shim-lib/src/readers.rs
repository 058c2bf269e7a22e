//! Threads inside the two verbs that wait for an event. They are not gated, because they may wait for ever; but one
//! that has taken its event from the kernel and not yet booked it must not be moved in between: the event would be
//! counted for the new kernel object, which never reported it, and the object's end would wait for ever.
//!
//! Nothing here has a destructor: a thread may be cancelled while it waits, or leave by a jump. It stays on the list
//! then, which costs the next freeze a moment of waiting and nothing else.

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks at threads that are under way.
const STEP: Duration = Duration::from_millis(1);

static INSIDE: Mutex<Vec<libc::pid_t>> = Mutex::new(Vec::new());

fn inside() -> MutexGuard<'static, Vec<libc::pid_t>> {
    INSIDE.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The process and thread this is; another process after fork.
    static SELF: Cell<(u32, libc::pid_t)> = const { Cell::new((0, 0)) };
}

fn tid() -> libc::pid_t {
    let process = std::process::id();
    // At a thread's very end there are no thread locals any more.
    let known = SELF.try_with(Cell::get).unwrap_or_default();
    if known.0 == process {
        return known.1;
    }
    let tid = gettid();
    let _ = SELF.try_with(|c| c.set((process, tid)));
    tid
}

#[expect(unsafe_code, reason = "gettid has no safe interface here")]
fn gettid() -> libc::pid_t {
    // SAFETY: no arguments, always succeeds.
    unsafe { libc::gettid() }
}

/// This thread is about to wait for an event.
pub fn enter() {
    let (tid, mut list) = (tid(), inside());
    if !list.contains(&tid) {
        list.push(tid);
    }
}

/// It has booked what it got.
pub fn leave() {
    let tid = tid();
    inside().retain(|t| *t != tid);
}

/// Whether this thread waits in the kernel for something to read, or is not there any more.
fn waits(tid: libc::pid_t) -> bool {
    match std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")) {
        Ok(line) => line.split(' ').next().and_then(|n| n.parse().ok()) == Some(libc::SYS_read),
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Returns when every thread inside waits in the kernel, where it will wait again after a move. A thread that is
/// stopped, or left without a word, is waited for until `deadline`.
pub fn settle(deadline: Instant) {
    let mut open: Vec<libc::pid_t> = inside().clone();
    loop {
        open.retain(|tid| !waits(*tid) && inside().contains(tid));
        if open.is_empty() || Instant::now() >= deadline {
            return;
        }
        std::thread::sleep(STEP);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::channel;

    #[test]
    fn a_reader_that_waits_is_settled_and_one_that_works_is_waited_for() {
        let (mut out, mut input) = std::os::unix::net::UnixStream::pair().unwrap();
        let (told, tell) = channel();
        let working = std::sync::Arc::new(AtomicBool::new(true));
        let goes_on = working.clone();
        let reader = std::thread::spawn(move || {
            enter();
            told.send(()).unwrap();
            out.read_exact(&mut [0]).unwrap();
            told.send(()).unwrap();
            while goes_on.load(Ordering::SeqCst) {
                std::hint::spin_loop();
            }
            leave();
        });
        tell.recv().unwrap();
        let long = Duration::from_secs(20);
        let start = Instant::now();
        // UnixStream reads with recv; what counts as waiting is the call that libibverbs makes.
        settle(start + Duration::from_millis(20));
        assert!(start.elapsed() >= Duration::from_millis(20));
        input.write_all(&[1]).unwrap();
        tell.recv().unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            working.store(false, Ordering::SeqCst);
        });
        settle(Instant::now() + long);
        assert!(start.elapsed() < long, "it ended and was still waited for");
        reader.join().unwrap();
    }

    #[test]
    fn a_reader_in_read_is_settled_at_once() {
        let (out, input) = std::io::pipe().unwrap();
        let (told, tell) = channel();
        let reader = std::thread::spawn(move || {
            enter();
            told.send(()).unwrap();
            let _ = (&out).read(&mut [0]);
            leave();
        });
        tell.recv().unwrap();
        let start = Instant::now();
        settle(start + Duration::from_secs(20));
        assert!(start.elapsed() < Duration::from_secs(10), "a thread in read was waited for");
        drop(input);
        reader.join().unwrap();
    }
}
