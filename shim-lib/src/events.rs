//! Completion and asynchronous events: from the library's objects back to the shadows, and the count of those the
//! application has taken but not acknowledged.
//!
//! Towards the library every event is acknowledged as soon as it is read, so that its count always equals the
//! kernel's; the application's acknowledgements are counted on the shadow, whose end waits for them. The two blocking
//! calls have no panic boundary and no destructor around the wait: a thread may be cancelled there.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::ptr::addr_of_mut;
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_uint, c_void, pthread_cond_t, pthread_mutex_t};

use crate::abi::{event, ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_qp, ibv_srq};
use crate::channel::ShadowChannel;
use crate::context::ShadowContext;
use crate::cq::ShadowCq;
use crate::entry::{boundary, entry};
use crate::errno::{Errno, set_errno};
use crate::qp::ShadowQp;
use crate::real::{self, Symbol};
use crate::srq::ShadowSrq;
use crate::{readers, registry};

/// Events handed to the application about one object.
#[derive(Debug)]
pub struct Deliveries {
    completion: AtomicU32,
    asynchronous: AtomicU32,
}

impl Deliveries {
    pub const fn new() -> Self {
        Self { completion: AtomicU32::new(0), asynchronous: AtomicU32::new(0) }
    }

    /// Returns when every event of this CQ was acknowledged.
    ///
    /// # Safety
    /// `cq` is the live visible part this counts for.
    pub unsafe fn wait_for_cq(&self, cq: *mut ibv_cq) {
        // SAFETY: the caller's promise; the members are only touched under the mutex.
        unsafe {
            wait(addr_of_mut!((*cq).mutex), addr_of_mut!((*cq).cond), || {
                (*cq).comp_events_completed == self.completion.load(Ordering::Acquire)
                    && (*cq).async_events_completed == self.asynchronous.load(Ordering::Acquire)
            });
        }
    }

    /// Returns when every event of this QP or SRQ was acknowledged.
    ///
    /// # Safety
    /// The three are members of the live visible part this counts for.
    pub unsafe fn wait_for(&self, mutex: *mut pthread_mutex_t, cond: *mut pthread_cond_t, completed: *const u32) {
        // SAFETY: the caller's promise.
        unsafe { wait(mutex, cond, || *completed == self.asynchronous.load(Ordering::Acquire)) }
    }
}

/// # Safety
/// Mutex and condition are initialised and live.
unsafe fn wait(mutex: *mut pthread_mutex_t, cond: *mut pthread_cond_t, done: impl Fn() -> bool) {
    // SAFETY: the caller's promise.
    unsafe {
        libc::pthread_mutex_lock(mutex);
        while !done() {
            libc::pthread_cond_wait(cond, mutex);
        }
        libc::pthread_mutex_unlock(mutex);
    }
}

/// # Safety
/// Mutex, condition and counter belong to one live object.
unsafe fn acknowledge(mutex: *mut pthread_mutex_t, cond: *mut pthread_cond_t, counter: *mut u32, n: u32) {
    // SAFETY: the caller's promise.
    unsafe {
        libc::pthread_mutex_lock(mutex);
        *counter = (*counter).wrapping_add(n);
        libc::pthread_cond_signal(cond);
        libc::pthread_mutex_unlock(mutex);
    }
}

type GetCqEvent = unsafe extern "C-unwind" fn(*mut ibv_comp_channel, *mut *mut ibv_cq, *mut *mut c_void) -> c_int;
type GetAsyncEvent = unsafe extern "C-unwind" fn(*mut ibv_context, *mut ibv_async_event) -> c_int;

/// Waits for a completion event.
///
/// # Safety
/// As the manual page: a live channel and room for both answers.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn ibv_get_cq_event(
    channel: *mut ibv_comp_channel,
    cq: *mut *mut ibv_cq,
    cq_context: *mut *mut c_void,
) -> c_int {
    static SYMBOL: Symbol = Symbol::new("ibv_get_cq_event\0", "IBVERBS_1.1\0");
    // First: what is real may be another thing after waiting.
    boundary(readers::enter, || ());
    let prepared =
        boundary(|| Some((SYMBOL.address()?, registry::find::<ShadowChannel>(channel).map(|c| c.real()))), || None);
    let Some((address, shadow)) = prepared else {
        boundary(readers::leave, || ());
        set_errno(libc::ENOSYS);
        return -1;
    };
    // SAFETY: libibverbs' function of this name has this signature.
    let real = unsafe { std::mem::transmute::<*mut c_void, GetCqEvent>(address) };
    // SAFETY: the caller's promise; a real channel.
    let answer = unsafe { real(shadow.unwrap_or(channel), cq, cq_context) };
    if answer != 0 {
        let errno = Errno::last();
        boundary(readers::leave, || ());
        set_errno(errno.0);
        return answer;
    }
    boundary(readers::book, || ());
    // SAFETY: on success the library filled both.
    boundary(|| unsafe { translate_cq_event(cq, cq_context) }, || ());
    boundary(readers::leave, || ());
    answer
}

/// # Safety
/// Both point at the library's answer.
unsafe fn translate_cq_event(cq: *mut *mut ibv_cq, cq_context: *mut *mut c_void) {
    // SAFETY: the caller's promise; the CQ is live, its destruction waits for our acknowledgement.
    unsafe {
        let real_cq = *cq;
        let Some(shadow) = registry::find::<ShadowCq>(*cq_context).filter(|s| s.real() == real_cq) else { return };
        shadow.disarm();
        shadow.events.completion.fetch_add(1, Ordering::AcqRel);
        *cq = shadow.visible();
        *cq_context = (*shadow.visible()).cq_context;
        let _ = real::verbs::ack_cq_events(real_cq, 1);
    }
}

/// What an event is about: the objects whose ends wait for acknowledgements.
pub(crate) enum Subject {
    Cq(*mut ibv_cq),
    Srq(*mut ibv_srq),
    Qp(*mut ibv_qp),
    /// The device, a port, or something that is never moved.
    Other,
}

impl Subject {
    pub fn of(event: &ibv_async_event) -> Self {
        let element = event.element;
        // SAFETY: the kind says which member was written; pointers are only copied.
        unsafe {
            match event.event_type {
                event::CQ_ERR => Self::Cq(element.cq),
                event::SRQ_ERR | event::SRQ_LIMIT_REACHED => Self::Srq(element.srq),
                event::QP_FATAL
                | event::QP_REQ_ERR
                | event::QP_ACCESS_ERR
                | event::COMM_EST
                | event::SQ_DRAINED
                | event::PATH_MIG
                | event::PATH_MIG_ERR
                | event::QP_LAST_WQE_REACHED => Self::Qp(element.qp),
                _ => Self::Other,
            }
        }
    }

    pub fn address(&self) -> Option<usize> {
        match self {
            Self::Cq(cq) => Some(*cq as usize),
            Self::Srq(srq) => Some(*srq as usize),
            Self::Qp(qp) => Some(*qp as usize),
            Self::Other => None,
        }
    }
}

fn get_async_event() -> Option<GetAsyncEvent> {
    static SYMBOL: Symbol = Symbol::new("ibv_get_async_event\0", "IBVERBS_1.1\0");
    // SAFETY: libibverbs' function of this name has this signature.
    SYMBOL.address().map(|address| unsafe { std::mem::transmute::<*mut c_void, GetAsyncEvent>(address) })
}

/// The next event of a context of the library's. If its file waits for one, so does this.
///
/// # Safety
/// A live context of the library's.
pub(crate) unsafe fn read(real: *mut ibv_context) -> Option<ibv_async_event> {
    let get = get_async_event()?;
    // SAFETY: all-zero is a valid event; the caller's promise.
    unsafe {
        let mut event: ibv_async_event = std::mem::zeroed();
        (get(real, &raw mut event) == 0).then_some(event)
    }
}

/// What a thread that asks for an event does.
enum Asks {
    /// It has one: of those that were kept.
    HasOne,
    /// It asks the library.
    Library(GetAsyncEvent, *mut ibv_context),
    Fails,
}

/// # Safety
/// The caller's context, and room for an event.
unsafe fn ask(context: *mut ibv_context, out: *mut ibv_async_event) -> Asks {
    let shadow = registry::find::<ShadowContext>(context);
    if let Some(kept) = shadow.as_ref().and_then(|s| s.next_kept()) {
        // SAFETY: the caller's promise.
        unsafe { out.write(kept) };
        return Asks::HasOne;
    }
    get_async_event().map_or(Asks::Fails, |get| Asks::Library(get, shadow.map_or(context, |s| s.real())))
}

/// Waits for an asynchronous event.
///
/// # Safety
/// As the manual page: a live context and room for the event.
#[unsafe(no_mangle)]
pub unsafe extern "C-unwind" fn ibv_get_async_event(context: *mut ibv_context, out: *mut ibv_async_event) -> c_int {
    loop {
        // First: what is real, and what is kept, may be another thing after waiting.
        boundary(readers::enter, || ());
        // SAFETY: the caller's promise.
        let (real, its_context) = match boundary(|| unsafe { ask(context, out) }, || Asks::Fails) {
            Asks::HasOne => {
                boundary(readers::leave, || ());
                return 0;
            }
            Asks::Library(real, its_context) => (real, its_context),
            Asks::Fails => {
                boundary(readers::leave, || ());
                set_errno(libc::ENOSYS);
                return -1;
            }
        };
        // SAFETY: the caller's promise; a real context.
        let answer = unsafe { real(its_context, out) };
        if answer != 0 {
            let errno = Errno::last();
            boundary(readers::leave, || ());
            if errno.0 == libc::EAGAIN && boundary(|| was_to_wait(context), || false) {
                continue;
            }
            set_errno(errno.0);
            return answer;
        }
        // Before anything that may wait.
        // SAFETY: on success the library filled it.
        if boundary(|| unsafe { is_bell(context, out) }, || false) {
            boundary(readers::leave, || ());
            continue;
        }
        boundary(readers::book, || ());
        // SAFETY: as above.
        let theirs = boundary(|| unsafe { translate_async_event(out) }, || true);
        boundary(readers::leave, || ());
        if theirs {
            return answer;
        }
    }
}

/// A thread that would have waited was told that there is nothing, because somebody was just taking what there was.
fn was_to_wait(context: *mut ibv_context) -> bool {
    registry::find::<ShadowContext>(context).is_some_and(|s| s.waits_for_events())
}

/// # Safety
/// `out` is an event the library filled in.
unsafe fn is_bell(context: *mut ibv_context, out: *const ibv_async_event) -> bool {
    // SAFETY: the caller's promise.
    registry::find::<ShadowContext>(context).is_some_and(|s| s.heard_bell(unsafe { &*out }))
}

/// Whether it is the application's.
///
/// # Safety
/// `out` is an event the library filled in.
unsafe fn translate_async_event(out: *mut ibv_async_event) -> bool {
    // SAFETY: the caller's promise.
    unsafe {
        receive(*out, |mine| {
            out.write(*mine);
            count(mine);
        })
    }
}

/// Takes an event over from the library: `book` gets it in the application's terms, and after that the library's object
/// is told that it is acknowledged. False for a consequence of what we did ourselves, of which the application is not to
/// hear; that is not booked.
///
/// # Safety
/// `theirs` is an event the library filled in and nobody has acknowledged.
pub(crate) unsafe fn receive(mut theirs: ibv_async_event, book: impl FnOnce(&ibv_async_event)) -> bool {
    let mut mine = theirs;
    // SAFETY: the caller's promise; an object with an unacknowledged event is live, and so is its shadow.
    let known = unsafe {
        match Subject::of(&theirs) {
            Subject::Cq(cq) => registry::find::<ShadowCq>((*cq).cq_context).filter(|s| s.real() == cq).map(|s| {
                mine.element.cq = s.visible();
                true
            }),
            Subject::Srq(srq) => registry::find::<ShadowSrq>((*srq).srq_context).filter(|s| s.real() == srq).map(|s| {
                mine.element.srq = s.visible();
                true
            }),
            Subject::Qp(qp) => registry::find::<ShadowQp>((*qp).qp_context).filter(|s| s.owns(qp)).map(|s| {
                mine.element.qp = s.visible();
                s.hears(qp, theirs.event_type)
            }),
            Subject::Other => None,
        }
    };
    let wanted = known != Some(false);
    if wanted {
        book(&mine);
    }
    if known.is_some() {
        // SAFETY: as above.
        let _ = unsafe { real::verbs::ack_async_event(&raw mut theirs) };
    }
    wanted
}

/// The application is given this event: from now on the end of its object waits for the acknowledgement.
///
/// # Safety
/// An event in the application's terms, about a live object.
pub(crate) unsafe fn count(mine: &ibv_async_event) {
    // SAFETY: the caller's promise; what is not ours is the library's and long enough to be asked.
    let deliveries = unsafe {
        match Subject::of(mine) {
            Subject::Cq(cq) => ShadowCq::of(cq).map(|s| &s.events),
            Subject::Srq(srq) => ShadowSrq::of(srq).map(|s| &s.events),
            Subject::Qp(qp) => ShadowQp::of(qp).map(|s| &s.events),
            Subject::Other => None,
        }
    };
    if let Some(deliveries) = deliveries {
        deliveries.asynchronous.fetch_add(1, Ordering::AcqRel);
    }
}

entry! {
    "IBVERBS_1.1" fn ibv_ack_cq_events(cq: *mut ibv_cq, nevents: c_uint), fail nothing, |real| {
        if registry::find::<ShadowCq>(cq).is_some() {
            // SAFETY: a live shadow's visible part.
            return unsafe {
                acknowledge(addr_of_mut!((*cq).mutex), addr_of_mut!((*cq).cond), addr_of_mut!((*cq).comp_events_completed), nevents)
            };
        }
        // A CQ whose end waits for this call is no longer registered; it is still ours.
        // SAFETY: the caller holds an event of it, so it is live; see ShadowCq::of.
        match unsafe { ShadowCq::of(cq) } {
            // SAFETY: as above.
            Some(_) => unsafe {
                acknowledge(addr_of_mut!((*cq).mutex), addr_of_mut!((*cq).cond), addr_of_mut!((*cq).comp_events_completed), nevents)
            },
            // SAFETY: not ours, the caller's promise.
            None => unsafe { real(cq, nevents) },
        }
    }

    "IBVERBS_1.1" fn ibv_ack_async_event(event: *mut ibv_async_event), fail nothing, |real| {
        // SAFETY: the caller's event, as we or the library filled it; objects with unacknowledged events are live.
        unsafe {
            match Subject::of(&*event) {
                Subject::Cq(cq) if ShadowCq::of(cq).is_some() => {
                    acknowledge(addr_of_mut!((*cq).mutex), addr_of_mut!((*cq).cond), addr_of_mut!((*cq).async_events_completed), 1);
                }
                Subject::Srq(srq) if ShadowSrq::of(srq).is_some() => {
                    acknowledge(addr_of_mut!((*srq).mutex), addr_of_mut!((*srq).cond), addr_of_mut!((*srq).events_completed), 1);
                }
                Subject::Qp(qp) if ShadowQp::of(qp).is_some() => {
                    acknowledge(addr_of_mut!((*qp).mutex), addr_of_mut!((*qp).cond), addr_of_mut!((*qp).events_completed), 1);
                }
                _ => real(event),
            }
        }
    }
}
