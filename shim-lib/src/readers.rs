//! Threads inside the two verbs that wait for an event. They are not gated like others, because they may wait for ever;
//! but an event and the booking of it must not have a move between them: it would be counted for a kernel object that
//! never reported it, and the object's end would wait for ever. So around a move
//!
//! * nobody begins to wait, and whoever has taken an event books it ([`close`]),
//! * whoever was waiting in the kernel goes on there, on the new file, and books what it gets only once its objects
//!   count for the new kernel objects ([`open`]).
//!
//! Nothing here has a destructor: a thread may be cancelled while it waits, or leave by a jump. It stays on the list
//! then, which costs the next freeze a moment of waiting and nothing else.

use std::cell::Cell;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks at threads that are under way.
const STEP: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Door {
    Open,
    /// Nobody comes in.
    Closing,
    /// Nor does anybody book.
    Closed,
}

struct State {
    door: Door,
    /// Process that closed it: a child of fork inherits the state, but nobody to open it again.
    owner: u32,
    inside: Vec<libc::pid_t>,
}

impl State {
    fn door(&self) -> Door {
        if self.owner == std::process::id() { self.door } else { Door::Open }
    }
}

static STATE: Mutex<State> = Mutex::new(State { door: Door::Open, owner: 0, inside: Vec::new() });
static OPENED: Condvar = Condvar::new();

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait_while(closed: impl Fn(Door) -> bool) -> MutexGuard<'static, State> {
    let mut state = state();
    while closed(state.door()) {
        state = OPENED.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    state
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
    let tid = tid();
    let mut state = wait_while(|door| door != Door::Open);
    if !state.inside.contains(&tid) {
        state.inside.push(tid);
    }
}

/// It is about to book what it got.
pub fn book() {
    drop(wait_while(|door| door == Door::Closed));
}

/// It has booked it, or got nothing.
pub fn leave() {
    let tid = tid();
    state().inside.retain(|t| *t != tid);
}

/// Whether this thread waits in the kernel for something to read, or is not there any more.
fn waits(tid: libc::pid_t) -> bool {
    match std::fs::read_to_string(format!("/proc/self/task/{tid}/syscall")) {
        Ok(line) => line.split(' ').next().and_then(|n| n.parse().ok()) == Some(libc::SYS_read),
        Err(e) => e.kind() == std::io::ErrorKind::NotFound,
    }
}

/// Nobody takes an event from here on, until [`open`], but `take`, which gets what is there to be read. Returns when every
/// thread inside waits in the kernel, where it will wait again after a move. A thread that is stopped, or left without a
/// word, is waited for until `deadline`. Who was quicker than `take` books what it got, and `take` looks once more.
pub fn close(deadline: Instant, mut take: impl FnMut()) {
    loop {
        let mut under_way = set(Door::Closing);
        loop {
            under_way.retain(|tid| !waits(*tid) && state().inside.contains(tid));
            if under_way.is_empty() || Instant::now() >= deadline {
                break;
            }
            std::thread::sleep(STEP);
        }
        let inside = set(Door::Closed);
        take();
        if inside.iter().all(|tid| waits(*tid)) || Instant::now() >= deadline {
            return;
        }
    }
}

/// Who is inside then.
fn set(door: Door) -> Vec<libc::pid_t> {
    let mut state = state();
    (state.door, state.owner) = (door, std::process::id());
    OPENED.notify_all();
    state.inside.clone()
}

/// Everybody goes on.
pub fn open() {
    state().door = Door::Open;
    OPENED.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::sync::mpsc::channel;

    /// One test, because the door is the process'.
    #[test]
    fn whoever_waits_in_the_kernel_books_after_the_move_and_whoever_has_an_event_before_it() {
        let (pipe, mut input) = std::io::pipe().unwrap();
        let (told, tell) = channel();
        let reader = std::thread::spawn(move || {
            for _ in 0..3 {
                enter();
                told.send("waits").unwrap();
                (&pipe).read_exact(&mut [0]).unwrap();
                book();
                told.send("books").unwrap();
                // Long enough to be found between the two.
                std::thread::sleep(Duration::from_millis(30));
                leave();
                told.send("left").unwrap();
            }
        });
        let long = Duration::from_secs(20);
        let next = |what| assert_eq!(tell.recv_timeout(long), Ok(what));
        let silent = || assert!(tell.recv_timeout(Duration::from_millis(60)).is_err());

        // It has an event: closing waits until that is booked, and then it does not come in again.
        next("waits");
        input.write_all(&[1]).unwrap();
        next("books");
        let start = Instant::now();
        close(start + long, || ());
        assert!(start.elapsed() < long, "it left and was still waited for");
        next("left");
        silent();
        open();

        // It waits in the kernel: closing does not wait for it, and what it gets then is booked after the opening.
        next("waits");
        let everybody_waits = || state().inside.clone().iter().all(|tid| waits(*tid));
        while !everybody_waits() {
            std::thread::sleep(STEP);
        }
        close(Instant::now() + long, || ());
        input.write_all(&[1]).unwrap();
        silent();
        open();
        next("books");
        next("left");

        // It is quicker than who takes the rest: it books what it has, and that one looks once more.
        next("waits");
        while !everybody_waits() {
            std::thread::sleep(STEP);
        }
        let mut takes = 0;
        close(Instant::now() + long, || {
            takes += 1;
            if takes == 1 {
                input.write_all(&[1]).unwrap();
                while everybody_waits() {
                    std::thread::sleep(STEP);
                }
            }
        });
        assert_eq!(takes, 2);
        next("books");
        next("left");
        open();
        reader.join().unwrap();
    }
}
