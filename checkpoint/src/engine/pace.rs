//! Work that lets the rest of the program go first for a while: with what CPU is left as long as others are in a hurry,
//! like everybody else afterwards. What the work is, is not known here.
#![expect(unsafe_code, reason = "the priority of a thread has no safe interface")]

use std::sync::atomic::{AtomicBool, Ordering};

use nix::unistd::gettid;

/// The least urgent there is.
const LAST: i32 = 19;

/// How fast a piece of work is to be done, for the threads that do it.
#[derive(Debug, Default)]
pub(super) struct Pace {
    fast: AtomicBool,
    stop: AtomicBool,
}

impl Pace {
    /// Like everybody else, from the beginning.
    pub fn fast() -> Self {
        Pace { fast: AtomicBool::new(true), ..Pace::default() }
    }

    /// Nobody need be let go first any more.
    pub fn hurry(&self) {
        self.fast.store(true, Ordering::Relaxed);
    }

    /// What comes of it is not wanted any more.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What the thread that calls this says between two parts of the work, to the end of its life.
    pub fn keeper(&self) -> Keeper<'_> {
        let mut keeper = Keeper { pace: self, usual: None };
        if !self.fast.load(Ordering::Relaxed) {
            keeper.usual = give_way();
        }
        keeper
    }
}

/// One thread's part in it.
pub(super) struct Keeper<'a> {
    pace: &'a Pace,
    /// The priority to return to.
    usual: Option<i32>,
}

impl Keeper<'_> {
    /// Goes on as fast as is wanted by now.
    pub fn keep(&mut self) {
        if self.pace.fast.load(Ordering::Relaxed)
            && let Some(usual) = self.usual.take()
        {
            set(usual);
        }
    }
}

/// Makes the calling thread the last in line, if it can come back: who is not allowed to would do the rest of the work with
/// what CPU is left, and on a host that is full that is none. Returns the priority it had.
fn give_way() -> Option<i32> {
    let usual = get();
    if usual >= LAST || !set(usual + 1) {
        return None;
    }
    set(usual).then(|| set(LAST)).map(|_| usual)
}

fn me() -> u32 {
    gettid().as_raw().cast_unsigned()
}

fn get() -> i32 {
    // SAFETY: asks for a number. -1 is a priority as well as an error, of which there is none for one's own thread.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, me()) }
}

fn set(priority: i32) -> bool {
    // SAFETY: concerns the scheduling of the calling thread only.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, me(), priority) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_gives_way_until_there_is_a_hurry_if_it_can_come_back() {
        let usual = get();
        let seen = std::thread::spawn(|| {
            let pace = Pace::default();
            let mut keeper = pace.keeper();
            let slow = get();
            keeper.keep();
            let still = get();
            pace.hurry();
            keeper.keep();
            (slow, still, get())
        });
        // Without the privilege it never gives way, but for the one step that it tried.
        let (slow, still, fast) = seen.join().unwrap();
        assert_eq!(slow, still);
        let privileged = [(LAST, usual), (usual + 1, usual + 1)];
        assert!(privileged.contains(&(slow, fast)), "{slow} {fast}, {usual} before");
        assert_eq!(get(), usual, "other threads are not concerned");
        let at_once = std::thread::spawn(|| {
            let pace = Pace::fast();
            pace.keeper().keep();
            get()
        });
        assert_eq!(at_once.join().unwrap(), usual);
    }
}
