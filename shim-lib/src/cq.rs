//! Completion queues: polling with translation and counting, the fake CQ, arming, and creation and end.
//!
//! The lock of a CQ covers taking completions out of the real queue *and* accounting for them: whoever holds it knows
//! that no completion is on its way between the two.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::mem::zeroed;
use std::ptr::{addr_of_mut, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libc::{c_int, c_void};
use rdma_virt::fakecq::{Completion, FakeCq};
use rdma_virt::id::ObjId;
use rdma_virt::saved::QueueMap;

use crate::abi::{ibv_comp_channel, ibv_context, ibv_cq, ibv_cq_ex, ibv_wc};
use crate::channel::{self, ShadowChannel};
use crate::context::ShadowContext;
use crate::cq_ex::Reader;
use crate::entry::{boundary, entry};
use crate::errno::Errno;
use crate::events::Deliveries;
use crate::lock::{Spin, SpinGuard};
use crate::provider;
use crate::qp::Settled;
use crate::real::verbs;
use crate::registry;
use crate::tables::Owner;
use crate::{blockers, gate, kept};

const MAGIC: u64 = 0x6d69_6772_6371_0001;

/// Completions taken from the real queue at a time while draining.
const BATCH: usize = 32;

/// A completion queue as the application sees it.
#[repr(C)]
pub struct ShadowCq {
    visible: UnsafeCell<ibv_cq_ex>,
    magic: u64,
    pub id: ObjId,
    ctx: Arc<ShadowContext>,
    channel: Option<Arc<ShadowChannel>>,
    real: AtomicPtr<ibv_cq>,
    /// Entries asked of the library; changes on resize.
    cqe_asked: AtomicU32,
    pub comp_vector: u32,
    core: Spin<Core>,
    /// 0 not armed, 1 for solicited completions, 2 for all.
    armed: AtomicU8,
    pub(crate) events: Deliveries,
    map: Mutex<Option<QueueMap>>,
    pub(crate) reader: Spin<Reader>,
    dead: AtomicBool,
}

// SAFETY: the visible part is the application's to lock; ours is atomic or locked.
unsafe impl Send for ShadowCq {}
// SAFETY: as above.
unsafe impl Sync for ShadowCq {}

type PollOp = unsafe extern "C" fn(*mut ibv_cq, c_int, *mut ibv_wc) -> c_int;

struct Core {
    /// Completions a drain took, oldest first, as the application will see them.
    fake: FakeCq,
    poll: Option<PollOp>,
    /// The real queue is not to be touched: its kernel object is being replaced.
    frozen: bool,
}

/// A CQ's lock; proves that nobody is inside a poll of it.
pub struct Held<'a>(#[expect(dead_code, reason = "held for its drop")] SpinGuard<'a, Core>);

impl ShadowCq {
    /// The shadow behind a pointer that came through our op table.
    ///
    /// # Safety
    /// `cq` is a live CQ, ours or the library's.
    #[inline]
    pub(crate) unsafe fn of<'a>(cq: *mut ibv_cq) -> Option<&'a Self> {
        // SAFETY: every CQ, real ones included, is at least an ibv_cq_ex long (libibverbs' verbs_cq is a union of the
        // two), and what follows is inside the provider's own struct.
        unsafe {
            let shadow = cq.cast::<Self>();
            ((&raw const (*shadow).magic).read() == MAGIC).then(|| &*shadow)
        }
    }

    pub(crate) fn adopt(
        ctx: Arc<ShadowContext>,
        channel: Option<Arc<ShadowChannel>>,
        real: *mut ibv_cq,
        asked: u32,
        vector: u32,
        app: *mut c_void,
    ) -> Arc<Self> {
        // SAFETY: the real context and the CQ the library just returned.
        let poll = unsafe { (*ctx.real()).ops.poll_cq };
        let this = Arc::new(Self {
            // SAFETY: all-zero is a valid value of the C struct.
            visible: UnsafeCell::new(unsafe { zeroed() }),
            magic: MAGIC,
            id: registry::next_id(),
            real: AtomicPtr::new(real),
            cqe_asked: AtomicU32::new(asked),
            comp_vector: vector,
            core: Spin::new(Core { fake: FakeCq::new(), poll, frozen: false }),
            armed: AtomicU8::new(0),
            events: Deliveries::new(),
            map: Mutex::new(provider::rxe::take_maps().into_iter().next()),
            reader: Spin::new(Reader::default()),
            dead: AtomicBool::new(false),
            ctx,
            channel,
        });
        let visible = this.visible();
        // SAFETY: not handed out yet; `real` is live.
        unsafe {
            (*visible).context = this.ctx.visible();
            (*visible).channel = this.channel.as_ref().map_or(null_mut(), |c| c.visible());
            (*visible).cq_context = app;
            (*visible).handle = (*real).handle;
            (*visible).cqe = (*real).cqe;
            libc::pthread_mutex_init(addr_of_mut!((*visible).mutex), std::ptr::null());
            libc::pthread_cond_init(addr_of_mut!((*visible).cond), std::ptr::null());
            // Events of the real CQ lead back here.
            (*real).cq_context = Arc::as_ptr(&this).cast_mut().cast();
        }
        if let Some(channel) = &this.channel {
            channel.sync_refcnt();
        }
        registry::add(&this);
        this
    }

    pub fn ctx(&self) -> &Arc<ShadowContext> {
        &self.ctx
    }

    pub fn channel(&self) -> Option<&Arc<ShadowChannel>> {
        self.channel.as_ref()
    }

    pub fn visible(&self) -> *mut ibv_cq {
        self.visible.get().cast()
    }

    pub(crate) fn visible_ex(&self) -> *mut ibv_cq_ex {
        self.visible.get()
    }

    pub fn real(&self) -> *mut ibv_cq {
        self.real.load(Ordering::Acquire)
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub fn handle(&self) -> u32 {
        // SAFETY: the real CQ of a shadow that is not dead.
        unsafe { (*self.real()).handle }
    }

    /// What the kernel hands back in this CQ's events.
    pub fn user_handle(&self) -> u64 {
        self.real() as u64
    }

    /// Entries asked of the library, last.
    pub fn cqe_asked(&self) -> u32 {
        self.cqe_asked.load(Ordering::Relaxed)
    }

    pub fn map(&self) -> Option<QueueMap> {
        *self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Armed by the application and no event delivered since: `Some(solicited_only)`.
    pub fn armed(&self) -> Option<bool> {
        match self.armed.load(Ordering::Acquire) {
            0 => None,
            n => Some(n == 1),
        }
    }

    pub(crate) fn disarm(&self) {
        self.armed.store(0, Ordering::Release);
    }

    /// Waits until nobody is inside a poll, and keeps it so.
    pub fn hold(&self) -> Held<'_> {
        Held(self.core.lock())
    }

    /// While frozen, polls see the fake CQ only and arming is only remembered.
    pub fn set_frozen(&self, frozen: bool) {
        self.core.lock().frozen = frozen;
    }

    pub fn fake_len(&self) -> usize {
        self.core.lock().fake.len()
    }

    // ---- polling ---------------------------------------------------------------------------------------------------

    /// What `ibv_poll_cq` answers.
    ///
    /// # Safety
    /// `out` has room for `n` completions.
    #[inline]
    pub(crate) unsafe fn poll(&self, n: c_int, out: *mut ibv_wc) -> c_int {
        let mut core = self.core.lock();
        let mut got = 0;
        while got < n
            && let Some(completion) = core.fake.pop()
        {
            // SAFETY: got < n.
            unsafe { out.add(got as usize).write(completion.into()) };
            got += 1;
        }
        if core.frozen || (got > 0 && got == n) {
            return got;
        }
        // SAFETY: room for n - got is left behind the first got.
        match unsafe { self.poll_real(&core, n - got, out.add(got as usize)) } {
            more if more >= 0 => got + more,
            // What the fake CQ had has to reach the application; the error comes again.
            _ if got > 0 => got,
            error => error,
        }
    }

    /// # Safety
    /// `out` has room for `n` completions.
    #[inline]
    unsafe fn poll_real(&self, core: &Core, n: c_int, out: *mut ibv_wc) -> c_int {
        let Some(poll) = core.poll else { return -1 };
        loop {
            // SAFETY: the real CQ of a live shadow, polled under its lock.
            let got = unsafe { poll(self.real(), n, out) };
            if got <= 0 {
                return got;
            }
            let mut kept = 0;
            for i in 0..got as usize {
                // SAFETY: the library filled `got` of them.
                if self.settle(unsafe { &mut *out.add(i) }) {
                    if kept < i {
                        // SAFETY: both are among them.
                        unsafe { out.add(kept).write(out.add(i).read()) };
                    }
                    kept += 1;
                }
            }
            if kept > 0 {
                return kept as c_int;
            }
        }
    }

    /// Accounts for one completion and makes it what the application expects; false if it is none of its own.
    #[inline]
    fn settle(&self, wc: &mut ibv_wc) -> bool {
        match self.ctx.qpns.owner(wc.qp_num) {
            Owner::Qp(qp) => {
                if let Settled::Ours = qp.settle(self, wc) {
                    return false;
                }
                wc.qp_num = qp.vqpn().0;
                true
            }
            Owner::Gone(vqpn) => {
                wc.qp_num = vqpn.0;
                true
            }
            Owner::Ours => false,
            Owner::Unknown => true,
        }
    }

    /// Takes up to `max` completions from the real queue into the fake one; how many were there.
    pub fn drain_into_fake(&self, max: usize) -> Result<usize, Errno> {
        let mut core = self.core.lock();
        let mut buffer = [ibv_wc::default(); BATCH];
        let mut taken = 0;
        while taken < max {
            let n = BATCH.min(max - taken) as c_int;
            // SAFETY: the buffer has room for n.
            let got = unsafe { self.poll_real(&core, n, buffer.as_mut_ptr()) };
            if got < 0 {
                return Err(Errno::last());
            }
            if got == 0 {
                break;
            }
            buffer[..got as usize].iter().for_each(|wc| core.fake.push(Completion::from(wc)));
            taken += got as usize;
        }
        Ok(taken)
    }

    // ---- events ----------------------------------------------------------------------------------------------------

    fn req_notify(&self, solicited_only: c_int) -> c_int {
        let core = self.core.lock();
        let before = self.armed.swap(if solicited_only != 0 { 1 } else { 2 }, Ordering::AcqRel);
        if before == 2 {
            // Armed for all stays so, as with the real thing.
            self.armed.store(2, Ordering::Release);
        }
        if core.frozen {
            return 0;
        }
        // SAFETY: the real CQ of a live shadow.
        let answer = unsafe { self.arm_real(solicited_only) };
        if answer != 0 {
            self.armed.store(before, Ordering::Release);
        }
        answer
    }

    /// # Safety
    /// The shadow is live.
    unsafe fn arm_real(&self, solicited_only: c_int) -> c_int {
        let real = self.real();
        // SAFETY: the caller's promise.
        match unsafe { (*self.ctx.real()).ops.req_notify_cq } {
            // SAFETY: as above.
            Some(op) => unsafe { op(real, solicited_only) },
            None => libc::EOPNOTSUPP,
        }
    }

    /// Arms the real CQ again as the application last did, if no event reached it since.
    pub fn rearm(&self) -> Result<(), Errno> {
        match self.armed() {
            // SAFETY: an object somebody holds an Arc of and that is not dead.
            Some(solicited) => Errno::check(unsafe { self.arm_real(c_int::from(solicited)) }),
            None => Ok(()),
        }
    }

    /// Points the library's object at another, new kernel object.
    pub fn patch(&self, handle: u32) {
        let _held = self.core.lock();
        let real = self.real();
        // SAFETY: the real CQ of a shadow that is not dead; nobody polls, control verbs are gated.
        unsafe {
            (*real).handle = handle;
            libc::pthread_mutex_lock(addr_of_mut!((*real).mutex));
            (*real).comp_events_completed = 0;
            (*real).async_events_completed = 0;
            libc::pthread_mutex_unlock(addr_of_mut!((*real).mutex));
        }
    }

    /// Stands for a new CQ of the present device from now on. Returns where the old one was mapped.
    pub fn rebuild(&self) -> Result<Option<QueueMap>, Errno> {
        let this: *const Self = self;
        let channel = self.channel.as_ref().map_or(null_mut(), |c| c.real());
        let ctx = self.ctx.real();
        provider::rxe::record_maps();
        // SAFETY: real objects of live shadows.
        let made = unsafe {
            // Another NIC may have fewer vectors; which one it is makes no difference but to speed.
            let vector = self.comp_vector as c_int % (*ctx).num_comp_vectors.max(1);
            verbs::create_cq(ctx, self.cqe_asked() as c_int, this.cast_mut().cast(), channel, vector)
        };
        let maps = provider::rxe::take_maps();
        let made = made?;
        if made.is_null() {
            return Err(Errno::last());
        }
        let mut core = self.core.lock();
        // SAFETY: the real context and the CQ the library just returned; nobody polls while the lock is held.
        unsafe {
            (*made).cq_context = this.cast_mut().cast();
            core.poll = (*ctx).ops.poll_cq;
        }
        self.real.store(made, Ordering::Release);
        Ok(std::mem::replace(&mut *self.map.lock().unwrap_or_else(PoisonError::into_inner), maps.into_iter().next()))
    }

    /// Raises an event on this CQ's channel, for a program that waits for one the old kernel object owed it.
    pub fn raise_event(&self) -> Result<(), Errno> {
        crate::helper_qp::raise_event(self)
    }
}

/// The real CQ behind whatever the caller holds.
pub(crate) fn unwrap(cq: *mut ibv_cq) -> *mut ibv_cq {
    registry::find::<ShadowCq>(cq).map_or(cq, |c| c.real())
}

/// `context->ops.poll_cq`.
pub(crate) unsafe extern "C" fn poll_cq(cq: *mut ibv_cq, n: c_int, wc: *mut ibv_wc) -> c_int {
    boundary(
        // SAFETY: the caller's promise of a live CQ and room for n completions.
        || unsafe {
            match ShadowCq::of(cq) {
                Some(shadow) => shadow.poll(n, wc),
                None => (*crate::context::unwrap((*cq).context)).ops.poll_cq.map_or(-1, |op| op(cq, n, wc)),
            }
        },
        || -1,
    )
}

/// `context->ops.req_notify_cq`.
pub(crate) unsafe extern "C" fn req_notify_cq(cq: *mut ibv_cq, solicited_only: c_int) -> c_int {
    boundary(
        // SAFETY: the caller's promise of a live CQ.
        || unsafe {
            match ShadowCq::of(cq) {
                Some(shadow) => shadow.req_notify(solicited_only),
                None => (*crate::context::unwrap((*cq).context))
                    .ops
                    .req_notify_cq
                    .map_or(libc::EOPNOTSUPP, |op| op(cq, solicited_only)),
            }
        },
        || libc::EIO,
    )
}

entry! {
    "IBVERBS_1.1" fn ibv_create_cq(context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, comp_channel: *mut ibv_comp_channel, comp_vector: c_int) -> *mut ibv_cq, fail null, |real| {
        let Some(ctx) = registry::find::<ShadowContext>(context) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(context, cqe, cq_context, comp_channel, comp_vector) };
        };
        let _pass = gate::enter("ibv_create_cq");
        let shadow_channel = registry::find::<ShadowChannel>(comp_channel);
        provider::rxe::record_maps();
        // SAFETY: real objects of live shadows.
        let cq = unsafe { real(ctx.real(), cqe, cq_context, channel::unwrap(comp_channel), comp_vector) };
        if cq.is_null() {
            provider::rxe::take_maps();
            return null_mut();
        }
        ShadowCq::adopt(ctx, shadow_channel, cq, cqe as u32, comp_vector as u32, cq_context).visible()
    }

    "IBVERBS_1.1" fn ibv_resize_cq(cq: *mut ibv_cq, cqe: c_int) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowCq>(cq) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(cq, cqe) };
        };
        let _pass = gate::enter("ibv_resize_cq");
        let _nobody_polls = shadow.hold();
        provider::rxe::record_maps();
        // SAFETY: the real CQ of a live shadow.
        let answer = unsafe { real(shadow.real(), cqe) };
        let maps = provider::rxe::take_maps();
        if answer == 0 {
            shadow.cqe_asked.store(cqe as u32, Ordering::Relaxed);
            if let Some(map) = maps.first() {
                *shadow.map.lock().unwrap_or_else(PoisonError::into_inner) = Some(*map);
            }
            // SAFETY: both are live; the visible member is read by the application after this call only.
            unsafe { (*shadow.visible()).cqe = (*shadow.real()).cqe };
        }
        answer
    }

    "IBVERBS_1.1" fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowCq>(cq) else {
            blockers::forget(cq as usize);
            kept::forget_foreign(cq as usize);
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(cq) };
        };
        {
            let _pass = gate::enter("ibv_destroy_cq");
            // SAFETY: the real CQ of a live shadow. It returns when every event the kernel reported is accounted for,
            // which ours are as soon as they are read.
            let answer = unsafe { real(shadow.real()) };
            if answer != 0 { return answer }
            shadow.dead.store(true, Ordering::Release);
            registry::remove(&*shadow);
            blockers::forget(shadow.visible() as usize);
            shadow.ctx().forget_kept(shadow.visible() as usize);
            if let Some(channel) = shadow.channel() {
                channel.sync_refcnt();
            }
        }
        // SAFETY: the visible part lives as long as the Arc we hold.
        unsafe { shadow.events.wait_for_cq(shadow.visible()) };
        0
    }
}
