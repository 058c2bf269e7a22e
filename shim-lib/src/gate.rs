//! The gate every control verb passes: open in normal life, shut while the process' objects are written down and
//! replaced. Data path verbs have their queues' locks instead; verbs that wait for events are not gated, because they
//! may wait for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

struct State {
    shut: bool,
    /// Verbs inside, by name, with how often.
    inside: Vec<(&'static str, u32)>,
    /// Process whose control thread shut it: a child of fork inherits the flag, but nobody to open it again.
    owner: u32,
}

static STATE: Mutex<State> = Mutex::new(State { shut: false, inside: Vec::new(), owner: 0 });
static CHANGED: Condvar = Condvar::new();

fn state() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Permission to be inside a control verb; given back on drop.
#[derive(Debug)]
#[must_use]
pub struct Pass(&'static str);

/// Waits until the gate is open. `verb` is what a message says is still running when a freeze comes to nothing.
pub fn enter(verb: &'static str) -> Pass {
    let mut s = state();
    while s.shut && s.owner == std::process::id() {
        s = CHANGED.wait(s).unwrap_or_else(PoisonError::into_inner);
    }
    match s.inside.iter_mut().find(|(name, _)| *name == verb) {
        Some((_, n)) => *n += 1,
        None => s.inside.push((verb, 1)),
    }
    Pass(verb)
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut s = state();
        if let Some((_, n)) = s.inside.iter_mut().find(|(name, _)| *name == self.0) {
            *n = n.saturating_sub(1);
        }
        if s.shut {
            CHANGED.notify_all();
        }
    }
}

/// Shuts the gate and waits until nobody is inside. On failure it is open again and the names of the verbs that were
/// still running are returned.
pub fn freeze(deadline: Instant) -> Result<(), Vec<&'static str>> {
    let mut s = state();
    s.shut = true;
    s.owner = std::process::id();
    loop {
        let running: Vec<_> = s.inside.iter().filter(|(_, n)| *n > 0).map(|(name, _)| *name).collect();
        if running.is_empty() {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            s.shut = false;
            CHANGED.notify_all();
            return Err(running);
        }
        s = CHANGED.wait_timeout(s, left).unwrap_or_else(PoisonError::into_inner).0;
    }
}

/// Opens the gate; verbs that waited go on.
pub fn thaw() {
    state().shut = false;
    CHANGED.notify_all();
}

/// Whether verbs wait now.
pub fn is_frozen() -> bool {
    state().shut
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};
    use std::time::Duration;

    /// For tests that shut the gate, of which there is one.
    pub static ONE: Mutex<()> = Mutex::new(());

    #[test]
    fn a_freeze_names_the_verb_it_waited_for_and_leaves_the_gate_open() {
        let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        let pass = enter("ibv_reg_mr");
        assert_eq!(freeze(Instant::now() + Duration::from_millis(5)), Err(vec!["ibv_reg_mr"]));
        assert!(!is_frozen());
        drop(pass);
        freeze(Instant::now() + Duration::from_secs(5)).expect("nobody is inside");
        let waiter = std::thread::spawn(|| drop(enter("ibv_alloc_pd")));
        std::thread::sleep(Duration::from_millis(5));
        assert!(!waiter.is_finished());
        thaw();
        waiter.join().expect("goes on after thaw");
    }
}
