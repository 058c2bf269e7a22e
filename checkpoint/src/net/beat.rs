//! Signs of life: while a call is worked on its caller hears every two seconds that somebody is there. Without them a
//! caller could not tell a long restore from a dead host, and a container would stand still for as long as a restore
//! may take.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::{ServerConnection, StreamOwned};

use super::client::Deadlined;
use super::frame::AGENT;
use super::msg::{BEAT, Back};

/// For writing one; a caller that takes none is not listening.
const WRITE: Duration = Duration::from_secs(10);

/// What the connection's own thread is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// It waits for a call.
    #[default]
    Idle,
    /// It works on one since then.
    Works(Instant),
    /// The connection is over.
    Over,
}

#[derive(Debug, Default)]
struct Inner {
    state: State,
    /// The beating thread waits without an end: only then a call has to wake it, and short ones cost nothing.
    asleep: bool,
}

/// See [`Beat::ends`].
#[derive(Debug)]
pub struct Ends<'a>(&'a Beat);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.set(State::Over);
    }
}

/// Beats for one connection. The stream is written to under the state's lock, and only while the connection's own
/// thread works on a call: it writes nothing then.
#[derive(Debug, Default)]
pub struct Beat {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl Beat {
    /// A call came.
    pub fn begin(&self) {
        self.set(State::Works(Instant::now()));
    }

    /// Its answer is about to be written: nothing is sent in between any more.
    pub fn pause(&self) {
        self.lock().state = State::Idle;
    }

    /// [`Beat::run`] ends when this is dropped.
    pub fn ends(&self) -> Ends<'_> {
        Ends(self)
    }

    fn set(&self, state: State) {
        let mut inner = self.lock();
        inner.state = state;
        if inner.asleep || state == State::Over {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Beats until [`Beat::end`].
    pub fn run(&self, stream: &Mutex<StreamOwned<ServerConnection, Deadlined>>) {
        self.every(BEAT, || {
            let mut stream = stream.lock().unwrap_or_else(PoisonError::into_inner);
            stream.sock.until = Some(Instant::now() + WRITE);
            // Whoever does not take it will be told so when its answer is written.
            let _ = AGENT.write(&mut *stream, &Back::Working);
        });
    }

    fn every(&self, interval: Duration, mut beat: impl FnMut()) {
        let mut inner = self.lock();
        loop {
            match inner.state {
                State::Over => return,
                State::Idle => {
                    inner.asleep = true;
                    inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
                    inner.asleep = false;
                }
                State::Works(since) => {
                    let left = (since + interval).saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        beat();
                        inner.state = State::Works(Instant::now());
                    } else {
                        inner = self.changed.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    const SHORT: Duration = Duration::from_millis(5);

    #[test]
    fn a_heart_beats_while_there_is_work_and_only_then() {
        let (beat, count) = (Beat::default(), AtomicU32::new(0));
        let beats = || count.load(Ordering::SeqCst);
        thread::scope(|scope| {
            let _ends = beat.ends();
            scope.spawn(|| {
                beat.every(SHORT, || {
                    count.fetch_add(1, Ordering::SeqCst);
                })
            });
            thread::sleep(SHORT * 4);
            assert_eq!(beats(), 0, "nothing to do yet");
            beat.begin();
            let until = Instant::now() + Duration::from_secs(30);
            while beats() < 3 && Instant::now() < until {
                thread::sleep(SHORT);
            }
            beat.pause();
            let then = beats();
            assert!(then >= 3);
            thread::sleep(SHORT * 6);
            assert_eq!(beats(), then, "none after the work was done");
        });
    }
}
