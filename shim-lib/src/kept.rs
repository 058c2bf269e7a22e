//! Asynchronous events that were taken from the kernel before the application asked for them, because the kernel object
//! that raised them is about to stay behind. They are handed out first, in order, and count as the application's only
//! then: an event that nobody read goes with its object, here as in the kernel.
//!
//! As long as there are any, the device's event file has to be readable, or who waits for it would not come to fetch them:
//! a [`Bell`] hangs there, until the last one is fetched. An event about the bell itself is nobody's.
//!
//! The memory of all this moves with the process; nothing of it is in an image.
#![expect(unsafe_code, reason = "events are C unions of pointers")]

use std::collections::VecDeque;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::abi::{event, ibv_async_event, ibv_qp};
use crate::bell::Bell;
use crate::context::ShadowContext;
use crate::control::note;
use crate::errno::Errno;
use crate::events::{self, Subject};
use crate::readable::{self, Impatience, Uncancelled};
use crate::real::verbs;

/// An event in the application's terms.
struct Event(ibv_async_event);

// SAFETY: a pointer the application gets back; it is looked at under the list's lock, which an end of the object passes.
unsafe impl Send for Event {}

/// Events in order, and what makes their file readable.
struct List<E, B> {
    /// Process they are for: a child of fork inherits the list, but the events are its parent's.
    owner: u32,
    events: VecDeque<E>,
    bell: Option<B>,
    /// Its event was read: it makes nothing readable any more.
    heard: bool,
}

impl<E, B> List<E, B> {
    const fn new() -> Self {
        Self { owner: 0, events: VecDeque::new(), bell: None, heard: false }
    }

    fn is_mine(&self) -> bool {
        self.owner == std::process::id()
    }

    fn push(&mut self, event: E) {
        if !self.is_mine() {
            // What a parent had; its bell is the parent's to take down.
            *self = Self { owner: std::process::id(), ..Self::new() };
        }
        self.events.push_back(event);
    }

    fn pop(&mut self) -> Option<E> {
        if self.is_mine() { self.events.pop_front() } else { None }
    }

    fn has_nothing(&self) -> bool {
        !self.is_mine() || (self.events.is_empty() && self.bell.is_none())
    }

    fn hear(&mut self) {
        self.heard = self.is_mine() && self.bell.is_some();
    }

    fn take_down(&mut self, take_down: impl FnOnce(B)) {
        if self.is_mine()
            && let Some(bell) = self.bell.take()
        {
            take_down(bell);
        }
        self.heard = false;
    }

    /// A bell that can be heard hangs there exactly as long as there are events.
    fn settle(&mut self, hang: impl FnOnce() -> Result<B, Errno>, take_down: impl FnOnce(B)) -> Result<(), Errno> {
        if self.has_nothing() {
            return Ok(());
        }
        if self.events.is_empty() || self.heard {
            self.take_down(take_down);
        }
        if !self.events.is_empty() && self.bell.is_none() {
            self.bell = Some(hang()?);
        }
        Ok(())
    }
}

/// What is kept of one device.
pub struct Kept {
    list: Mutex<List<Event, Bell>>,
    /// The bell's QP, for whoever reads its event: to be recognised without the lock, under which a bell is taken down.
    bell: AtomicPtr<ibv_qp>,
}

impl Kept {
    pub const fn new() -> Self {
        Self { list: Mutex::new(List::new()), bell: AtomicPtr::new(null_mut()) }
    }

    fn list(&self) -> MutexGuard<'_, List<Event, Bell>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hang(&self, ctx: &ShadowContext) -> Result<Bell, Errno> {
        let bell = Bell::hang(ctx.real())?;
        self.bell.store(bell.qp(), Ordering::Release);
        match bell.ring() {
            Ok(()) => Ok(bell),
            Err(e) => {
                self.take_down(bell);
                Err(e)
            }
        }
    }

    fn take_down(&self, bell: Bell) {
        bell.take_down();
        self.bell.store(null_mut(), Ordering::Release);
    }

    fn settle(&self, list: &mut List<Event, Bell>, ctx: &ShadowContext) {
        if let Err(e) = list.settle(|| self.hang(ctx), |bell| self.take_down(bell)) {
            // Who asks gets them all the same; and it is tried again.
            note(|| format!("{}: the events that are kept cannot be announced yet: {e}", ctx.device_name()));
        }
    }

    /// Acknowledges an event about the bell; false if it is not about that.
    fn hears(&self, theirs: &ibv_async_event) -> bool {
        let Subject::Qp(qp) = Subject::of(theirs) else { return false };
        if theirs.event_type != event::SQ_DRAINED || qp.is_null() || self.bell.load(Ordering::Acquire) != qp {
            return false;
        }
        let mut theirs = *theirs;
        // SAFETY: as the library filled it; the bell's end waits for this.
        let _ = unsafe { verbs::ack_async_event(&raw mut theirs) };
        true
    }
}

/// Nothing of this waits for a reader of events; readers wait for it.
impl ShadowContext {
    /// Hands the oldest event out: from now on its object's end waits for the acknowledgement.
    pub fn next_kept(&self) -> Option<ibv_async_event> {
        let mut list = self.kept.list();
        if list.has_nothing() {
            return None;
        }
        let next = list.pop();
        if let Some(Event(next)) = &next {
            // SAFETY: on the list, so its object has not passed `forget_kept` yet.
            unsafe { events::count(next) };
        }
        self.kept.settle(&mut list, self);
        next.map(|event| event.0)
    }

    /// Whether an event that was just read is the bell's. If so it is acknowledged, and the reader asks again. To be
    /// called before anything that may wait.
    pub fn heard_bell(&self, theirs: &ibv_async_event) -> bool {
        let ours = self.kept.hears(theirs);
        if ours {
            self.kept.list().hear();
        }
        ours
    }

    /// Whether who asks for an event waits until there is one.
    pub fn waits_for_events(&self) -> bool {
        // Not while the events are being kept: nobody waits then.
        let _list = self.kept.list();
        readable::blocks(self.async_fd())
    }

    /// Takes everything from the kernel that nobody has read, and keeps what is `wanted` of it. Returns how many events
    /// were consequences of what we did ourselves; nobody hears of those.
    pub fn keep_unread(&self, wanted: impl Fn(&ibv_async_event) -> bool) -> usize {
        let mut ours = 0;
        let _through = Uncancelled::new();
        if !readable::is_readable(self.async_fd()) {
            return ours;
        }
        let mut list = self.kept.list();
        let _moment = match Impatience::with(self.async_fd()) {
            Ok(moment) => moment,
            Err(e) => {
                note(|| format!("{}: its events cannot be read: {e}", self.device_name()));
                return ours;
            }
        };
        // SAFETY: the real context of a live shadow.
        while let Some(theirs) = unsafe { events::read(self.real()) } {
            if self.kept.hears(&theirs) {
                list.hear();
                continue;
            }
            let keep = |mine: &ibv_async_event| {
                if wanted(mine) {
                    list.push(Event(*mine));
                }
            };
            // SAFETY: as the library filled it just now.
            if !unsafe { events::receive(theirs, keep) } {
                ours += 1;
            }
        }
        ours
    }

    /// Keeps one more event, which the kernel will not raise.
    pub fn keep(&self, mine: ibv_async_event) {
        self.kept.list().push(Event(mine));
    }

    /// Sees to it that who waits for what is kept is told. Tries again what did not work before.
    pub fn announce_kept(&self) {
        self.kept.settle(&mut self.kept.list(), self);
    }

    /// What is kept is announced no longer: the kernel objects for it would be in the way of a dump.
    pub fn silence_kept(&self) {
        self.kept.list().take_down(|bell| self.kept.take_down(bell));
    }

    /// The object with this visible part is gone, and with it what nobody has read about it. Returns those events.
    pub fn forget_kept(&self, address: usize) -> Vec<ibv_async_event> {
        let mut list = self.kept.list();
        if list.has_nothing() {
            return Vec::new();
        }
        let about = |event: &Event| Subject::of(&event.0).address() == Some(address);
        let (gone, rest) = std::mem::take(&mut list.events).into_iter().partition(about);
        list.events = rest;
        self.kept.settle(&mut list, self);
        let gone: VecDeque<Event> = gone;
        gone.into_iter().map(|event| event.0).collect()
    }

    /// The device is closed.
    pub fn drop_kept(&self) {
        let mut list = self.kept.list();
        list.take_down(|bell| self.kept.take_down(bell));
        list.events.clear();
    }
}

/// Before a QP, CQ or SRQ of the library's own is destroyed, which the application holds as it is: the library waits until
/// what it has given out is acknowledged, and what we kept of that nobody will acknowledge.
pub fn forget_foreign(address: usize) {
    for ctx in crate::registry::contexts() {
        for mut event in ctx.forget_kept(address) {
            // SAFETY: as the library filled it; the object is live, it is about to be destroyed.
            let _ = unsafe { verbs::ack_async_event(&raw mut event) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// A list whose bells are numbers, and what was done with them.
    #[derive(Default)]
    struct Belfry {
        hung: RefCell<Vec<u32>>,
        taken_down: RefCell<Vec<u32>>,
    }

    impl Belfry {
        fn settle(&self, list: &mut List<&'static str, u32>) {
            let hang = || {
                let next = self.hung.borrow().len() as u32 + 1;
                self.hung.borrow_mut().push(next);
                Ok(next)
            };
            list.settle(hang, |bell| self.taken_down.borrow_mut().push(bell)).expect("can be hung");
        }
    }

    #[test]
    fn a_bell_hangs_from_the_first_event_to_the_last() {
        let (belfry, mut list) = (Belfry::default(), List::new());
        belfry.settle(&mut list);
        assert!(belfry.hung.borrow().is_empty() && list.has_nothing());
        for event in ["one", "two", "three"] {
            list.push(event);
            belfry.settle(&mut list);
        }
        assert_eq!(*belfry.hung.borrow(), [1], "one for all");
        for (event, silent) in [("one", false), ("two", false), ("three", true)] {
            assert_eq!(list.pop(), Some(event));
            belfry.settle(&mut list);
            assert_eq!(!belfry.taken_down.borrow().is_empty(), silent, "after {event}");
        }
        assert!(list.has_nothing() && list.pop().is_none());
    }

    #[test]
    fn one_that_was_heard_is_replaced_while_there_are_events_and_only_then() {
        let (belfry, mut list) = (Belfry::default(), List::new());
        list.push("one");
        list.push("two");
        belfry.settle(&mut list);
        // Somebody who waited read its event, comes back and fetches the first.
        list.hear();
        assert_eq!(list.pop(), Some("one"));
        belfry.settle(&mut list);
        assert_eq!((belfry.taken_down.borrow().clone(), belfry.hung.borrow().clone()), (vec![1], vec![1, 2]));
        belfry.settle(&mut list);
        assert_eq!(belfry.hung.borrow().len(), 2, "the new one has not been heard");
        list.hear();
        assert_eq!(list.pop(), Some("two"));
        belfry.settle(&mut list);
        assert_eq!((belfry.taken_down.borrow().clone(), belfry.hung.borrow().clone()), (vec![1, 2], vec![1, 2]));
    }

    #[test]
    fn a_bell_that_cannot_be_hung_loses_no_event_and_is_tried_again() {
        let (belfry, mut list) = (Belfry::default(), List::new());
        list.push("one");
        let none: Result<u32, _> = Err(Errno(libc::ENOMEM));
        assert_eq!(list.settle(|| none, |_| ()), Err(Errno(libc::ENOMEM)));
        belfry.settle(&mut list);
        assert_eq!(*belfry.hung.borrow(), [1]);
        list.take_down(|bell| belfry.taken_down.borrow_mut().push(bell));
        assert_eq!(list.pop(), Some("one"), "silenced, not forgotten");
    }

    #[test]
    fn a_child_of_fork_gets_nothing_of_its_parents() {
        let (belfry, mut list) = (Belfry::default(), List::new());
        list.push("the parent's");
        belfry.settle(&mut list);
        list.owner += 1;
        assert_eq!(list.pop(), None);
        belfry.settle(&mut list);
        list.take_down(|bell| belfry.taken_down.borrow_mut().push(bell));
        assert!(belfry.taken_down.borrow().is_empty(), "the bell is the parent's");
        list.push("its own");
        belfry.settle(&mut list);
        assert_eq!(*belfry.hung.borrow(), [1, 2]);
        assert_eq!((list.pop(), list.pop()), (Some("its own"), None));
    }
}
