//! Work that lets everybody else go first for a while: with what CPU is left as long as others are in a hurry, like
//! everybody else afterwards. What the work is, is not known here.
//!
//! It is the policy for idle time that does it. A thread that is merely nice keeps a CPU it got while the one in a hurry
//! waited for a moment, until its slice is over.
#![expect(unsafe_code, reason = "how a thread is scheduled has no safe interface")]

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::thread;

use nix::unistd::gettid;

use crate::agent::lock;

/// The least urgent that a thread can be by its priority.
const LAST: i32 = 19;

/// How fast a piece of work is to be done, for the threads that do it.
#[derive(Debug, Default)]
pub(super) struct Pace {
    fast: AtomicBool,
    /// Threads that give way, and the policy each is to return to. Nobody holds this while he gives way: others would wait
    /// for a thread that gets no CPU.
    slow: Mutex<Vec<(i32, i32)>>,
    /// Told that there is a hurry.
    hurried: Condvar,
    stop: AtomicBool,
}

impl Pace {
    /// Like everybody else, from the beginning.
    pub fn fast() -> Self {
        Pace { fast: AtomicBool::new(true), ..Pace::default() }
    }

    /// Nobody need be let go first any more. (A thread that gets no CPU could not find that out by itself.)
    pub fn hurry(&self) {
        let mut slow = lock(&self.slow);
        self.fast.store(true, Ordering::SeqCst);
        for (thread, policy) in slow.drain(..) {
            set_policy(thread, policy);
        }
        self.hurried.notify_all();
    }

    /// Where there is one CPU only, nothing goes on beside anything else: work that gives way there still takes its turns,
    /// and the caches. It begins when there is a hurry, and at once anywhere else.
    pub fn begin(&self) {
        if thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1) {
            self.wait();
        }
    }

    /// Until there is a hurry. That those who come first end, and within which time, is their business.
    fn wait(&self) {
        let slow = lock(&self.slow);
        let waited = self.hurried.wait_while(slow, |_| !self.fast.load(Ordering::SeqCst));
        drop(waited.unwrap_or_else(std::sync::PoisonError::into_inner));
    }

    /// What comes of it is not wanted any more: now everybody waits for its end.
    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.hurry();
    }

    /// Stops it when it is dropped, however that comes about: somebody may wait for a hurry.
    pub fn stopped_at_last(&self) -> Stopped<'_> {
        Stopped(self)
    }

    pub fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// While this exists the thread that calls it goes at this pace.
    pub fn keeper(&self) -> Keeper<'_> {
        if self.fast.load(Ordering::SeqCst) {
            return Keeper { pace: self, usual: None };
        }
        let keeper = Keeper { pace: self, usual: can_come_back() };
        if let Some(policy) = keeper.usual {
            lock(&self.slow).push((me(), policy));
            set_policy(me(), libc::SCHED_IDLE);
            if self.fast.load(Ordering::SeqCst) {
                set_policy(me(), policy);
            }
        }
        keeper
    }
}

/// See [`Pace::stopped_at_last`].
#[must_use]
pub(super) struct Stopped<'a>(&'a Pace);

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// One thread's part in it.
#[must_use]
pub(super) struct Keeper<'a> {
    pace: &'a Pace,
    /// The policy to return to.
    usual: Option<i32>,
}

impl Drop for Keeper<'_> {
    fn drop(&mut self) {
        if let Some(policy) = self.usual {
            set_policy(me(), policy);
            lock(&self.pace.slow).retain(|(thread, _)| *thread != me());
        }
    }
}

/// The policy that the calling thread has, if it can give way and come back: who is not allowed to would do the rest of the
/// work with what CPU is left, and on a host that is full that is none.
fn can_come_back() -> Option<i32> {
    // Whoever may take back a step of priority may leave the policy for idle time, too.
    let usual = priority();
    if usual >= LAST || !set_priority(usual + 1) || !set_priority(usual) {
        return None;
    }
    let policy = policy();
    let ordinary = matches!(policy & !libc::SCHED_RESET_ON_FORK, libc::SCHED_OTHER | libc::SCHED_BATCH);
    ordinary.then_some(policy)
}

fn me() -> i32 {
    gettid().as_raw()
}

fn priority() -> i32 {
    // SAFETY: asks for a number. -1 is a priority as well as an error, of which there is none for one's own thread.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, me().cast_unsigned()) }
}

fn set_priority(priority: i32) -> bool {
    // SAFETY: concerns the scheduling of the calling thread only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, me().cast_unsigned(), priority) == 0 }
}

fn policy() -> i32 {
    // SAFETY: asks for a number; 0 is the calling thread.
    unsafe { libc::sched_getscheduler(0) }
}

fn set_policy(thread: i32, policy: i32) -> bool {
    let none = libc::sched_param { sched_priority: 0 };
    // SAFETY: concerns the scheduling of a thread of ours only; the structure lives across the call.
    unsafe { libc::sched_setscheduler(thread, policy, &raw const none) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_way_until_there_is_a_hurry_if_it_can_come_back() {
        let (usual, nice) = (policy(), priority());
        let seen = std::thread::spawn(|| {
            let pace = Pace::default();
            let keeper = pace.keeper();
            let slow = policy();
            drop(keeper);
            let back = policy();
            let _keeper = pace.keeper();
            let again = policy();
            // By another thread: this one might get no CPU.
            std::thread::scope(|s| s.spawn(|| pace.hurry()).join()).unwrap();
            (slow, back, again, policy(), priority())
        });
        // Without the privilege it never gives way, but for the step that it tried each time.
        let (slow, back, again, fast, left) = seen.join().unwrap();
        assert_eq!((slow, back, fast), (again, usual, usual));
        let privileged = [(libc::SCHED_IDLE, nice), (usual, nice + 2)];
        assert!(privileged.contains(&(slow, left)), "{slow} {left}, {usual} {nice}");
        assert_eq!(policy(), usual, "other threads are not concerned");
        let at_once = std::thread::spawn(|| {
            let pace = Pace::fast();
            pace.begin();
            let _keeper = pace.keeper();
            policy()
        });
        assert_eq!(at_once.join().unwrap(), usual);
    }
    #[test]
    fn who_waits_for_a_hurry_goes_on_when_there_is_one_or_when_nothing_comes_of_it() {
        for end in [Pace::hurry, |pace: &Pace| drop(pace.stopped_at_last())] {
            let pace = Pace::default();
            let early = thread::scope(|scope| {
                let waits = scope.spawn(|| pace.wait());
                thread::sleep(std::time::Duration::from_millis(20));
                let early = waits.is_finished();
                end(&pace);
                early
            });
            assert!(!early);
        }
    }
}
