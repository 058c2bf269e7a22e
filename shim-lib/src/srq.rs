//! Shared receive queues. Receives complete in any order, so each travels under the number of its slot in our book and
//! gets the application's wr_id back when its completion is polled.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::mem::zeroed;
use std::ptr::{addr_of_mut, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libc::c_int;
use rdma_virt::id::ObjId;
use rdma_virt::saved::QueueMap;
use rdma_virt::srq::Srq;
use rdma_virt::wr::Receive;

use crate::abi::{ibv_pd, ibv_recv_wr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr, srq_mask};
use crate::convert::{physical, sges, with_sges};
use crate::entry::{boundary, entry};
use crate::errno::Errno;
use crate::events::Deliveries;
use crate::lock::Spin;
use crate::pd::ShadowPd;
use crate::real::verbs;
use crate::registry;
use crate::{blockers, gate, kept, provider};

const MAGIC: u64 = 0x6d69_6772_7372_0001;

type PostOp = unsafe extern "C" fn(*mut ibv_srq, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;

/// A shared receive queue as the application sees it.
#[repr(C)]
pub struct ShadowSrq {
    visible: UnsafeCell<ibv_srq>,
    magic: u64,
    pub id: ObjId,
    pd: Arc<ShadowPd>,
    real: AtomicPtr<ibv_srq>,
    max_wr: AtomicU32,
    pub max_sge: u32,
    limit: AtomicU32,
    side: Spin<Side>,
    map: Mutex<Option<QueueMap>>,
    pub(crate) events: Deliveries,
    dead: AtomicBool,
}

// SAFETY: the visible part is the application's to lock; ours is atomic or locked.
unsafe impl Send for ShadowSrq {}
// SAFETY: as above.
unsafe impl Sync for ShadowSrq {}

struct Side {
    post: Option<PostOp>,
    book: Srq,
}

impl ShadowSrq {
    /// The shadow behind a pointer that came through our op table, or an event.
    ///
    /// # Safety
    /// `srq` is a live SRQ, ours or the library's.
    #[inline]
    pub(crate) unsafe fn of<'a>(srq: *mut ibv_srq) -> Option<&'a Self> {
        // SAFETY: behind every real SRQ lie the rest of libibverbs' verbs_srq and the provider's own members.
        unsafe {
            let shadow = srq.cast::<Self>();
            ((&raw const (*shadow).magic).read() == MAGIC).then(|| &*shadow)
        }
    }

    pub fn pd(&self) -> &Arc<ShadowPd> {
        &self.pd
    }

    pub fn visible(&self) -> *mut ibv_srq {
        self.visible.get()
    }

    pub fn real(&self) -> *mut ibv_srq {
        self.real.load(Ordering::Acquire)
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub fn handle(&self) -> u32 {
        // SAFETY: the real SRQ of a shadow that is not dead.
        unsafe { (*self.real()).handle }
    }

    /// What the kernel hands back in this SRQ's events.
    pub fn user_handle(&self) -> u64 {
        self.real() as u64
    }

    /// Requests asked of the kernel, last.
    pub fn max_wr(&self) -> u32 {
        self.max_wr.load(Ordering::Relaxed)
    }

    /// The limit as the application set it last, or 0 if the kernel had reported it when it was last asked.
    pub fn limit(&self) -> u32 {
        self.limit.load(Ordering::Relaxed)
    }

    pub fn map(&self) -> Option<QueueMap> {
        *self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Receives the NIC has and has not used up, as far as completions show.
    pub fn unconsumed(&self) -> usize {
        self.side.lock().book.outstanding()
    }

    /// A completion names this: the application's wr_id, if it is a slot in use.
    #[inline]
    pub(crate) fn complete(&self, wr_id: u64) -> Option<u64> {
        self.side.lock().book.completed(wr_id)
    }

    /// Gives one receive to the NIC under the name of its slot.
    fn give(&self, post: PostOp, name: u64, receive: Receive<'_>) -> c_int {
        let mut list = physical(&self.pd.ctx().keys, receive.sges);
        let (sg_list, num_sge) = (list.as_mut_ptr(), list.len() as c_int);
        let mut wr = ibv_recv_wr { wr_id: name, next: null_mut(), sg_list, num_sge };
        let mut failed = null_mut();
        // SAFETY: built above; the real SRQ of a live shadow.
        unsafe { post(self.real(), &raw mut wr, &raw mut failed) }
    }

    /// # Safety
    /// `wr` is a list of valid receives; `bad` has room for a pointer.
    unsafe fn post_recv(&self, mut wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
        let mut side = self.side.lock();
        let Some(post) = side.post else { return libc::EOPNOTSUPP };
        while !wr.is_null() {
            // SAFETY: the caller's list.
            let answer = unsafe { self.post_one(&mut side.book, post, &*wr) };
            if answer != 0 {
                // SAFETY: the caller's room.
                unsafe { *bad = wr };
                return answer;
            }
            // SAFETY: the caller's list.
            wr = unsafe { (*wr).next };
        }
        0
    }

    /// # Safety
    /// A valid receive.
    unsafe fn post_one(&self, book: &mut Srq, post: PostOp, wr: &ibv_recv_wr) -> c_int {
        if wr.num_sge < 0 || wr.num_sge as u32 > self.max_sge {
            return libc::EINVAL;
        }
        // SAFETY: the caller's promise.
        let list = unsafe { sges(wr.sg_list, wr.num_sge) };
        let passes = book.passes();
        with_sges(list, |l| {
            let Ok(name) = book.post(wr.wr_id, l) else { return libc::ENOMEM };
            if !passes {
                return 0;
            }
            let answer = self.give(post, name, Receive { wr_id: wr.wr_id, sges: l });
            if answer != 0 {
                book.unpost(name);
            }
            answer
        })
    }

    /// Receives from now on are only remembered.
    pub fn close(&self) {
        self.side.lock().book.close();
    }

    /// The NIC's queue was replaced by a new, empty one: gives it every receive that has not completed.
    pub fn repost(&self) -> Result<usize, Errno> {
        let mut side = self.side.lock();
        side.book.switched();
        self.give_remembered(&mut side)
    }

    /// The stop led nowhere: gives the NIC the receives that were only remembered.
    pub fn reopen(&self) -> Result<usize, Errno> {
        let mut side = self.side.lock();
        side.book.reopen();
        self.give_remembered(&mut side)
    }

    fn give_remembered(&self, side: &mut Side) -> Result<usize, Errno> {
        let post = side.post.ok_or(Errno(libc::EOPNOTSUPP))?;
        let names = side.book.remembered();
        for name in &names {
            Errno::check(self.give(post, *name, side.book.receive(*name)))?;
            side.book.remembered_posted(*name);
        }
        Ok(names.len())
    }

    /// Stands for a new SRQ of the present device from now on. Returns where the old one was mapped.
    pub fn rebuild(&self) -> Result<Option<QueueMap>, Errno> {
        let this: *const Self = self;
        let attr = ibv_srq_attr { max_wr: self.max_wr(), max_sge: self.max_sge, srq_limit: self.limit() };
        let mut ask = ibv_srq_init_attr { srq_context: this.cast_mut().cast(), attr };
        provider::rxe::record_maps();
        // SAFETY: a real PD; attributes of ours.
        let made = unsafe { verbs::create_srq(self.pd.real(), &raw mut ask) };
        let maps = provider::rxe::take_maps();
        let made = made?;
        if made.is_null() {
            return Err(Errno::last());
        }
        let mut side = self.side.lock();
        // SAFETY: live real objects; nobody posts while the lock is held.
        unsafe {
            (*made).srq_context = this.cast_mut().cast();
            side.post = (*self.pd.ctx().real()).ops.post_srq_recv;
        }
        self.real.store(made, Ordering::Release);
        Ok(std::mem::replace(&mut *self.map.lock().unwrap_or_else(PoisonError::into_inner), maps.into_iter().next()))
    }

    /// Asks the kernel how much of the limit is left: it is over once it was reported, whether the application has read
    /// that or not, and a new kernel object must not report it once more. Of a device that cannot be asked it stays what
    /// the application set.
    pub fn refresh_limit(&self) -> Result<(), Errno> {
        let mut now = ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: 0 };
        // SAFETY: the real SRQ of a shadow that is not dead; control verbs are gated.
        match unsafe { verbs::query_srq(self.real(), &raw mut now).and_then(Errno::check) } {
            Ok(()) => {
                self.limit.store(now.srq_limit, Ordering::Relaxed);
                Ok(())
            }
            Err(Errno(libc::ENOSYS | libc::EOPNOTSUPP)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Points the library's object at another, new kernel object.
    pub fn patch(&self, handle: u32) {
        // SAFETY: the real SRQ of a shadow that is not dead; control verbs are gated.
        unsafe {
            (*self.real()).handle = handle;
            (*self.real()).events_completed = 0;
        }
    }
}

/// The real SRQ behind whatever the caller holds.
pub(crate) fn unwrap(srq: *mut ibv_srq) -> *mut ibv_srq {
    registry::find::<ShadowSrq>(srq).map_or(srq, |s| s.real())
}

/// `context->ops.post_srq_recv`.
pub(crate) unsafe extern "C" fn post_srq_recv(
    srq: *mut ibv_srq,
    wr: *mut ibv_recv_wr,
    bad: *mut *mut ibv_recv_wr,
) -> c_int {
    boundary(
        // SAFETY: the caller's promise of a live SRQ, a list and room for a pointer.
        || unsafe {
            match ShadowSrq::of(srq) {
                Some(shadow) => shadow.post_recv(wr, bad),
                None => (*crate::context::unwrap((*srq).context))
                    .ops
                    .post_srq_recv
                    .map_or(libc::EOPNOTSUPP, |op| op(srq, wr, bad)),
            }
        },
        || libc::EIO,
    )
}

entry! {
    "IBVERBS_1.1" fn ibv_create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq, fail null, |real| {
        let Some(pd_shadow) = registry::find::<ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, attr) };
        };
        let _pass = gate::enter("ibv_create_srq");
        // SAFETY: the caller's attributes.
        let wish = unsafe { *attr };
        provider::rxe::record_maps();
        // SAFETY: as above; a real PD.
        let srq = unsafe { real(pd_shadow.real(), attr) };
        let maps = provider::rxe::take_maps();
        if srq.is_null() { return null_mut() }
        // SAFETY: all-zero is a valid value; live real objects.
        let (visible, post, told) = unsafe { (zeroed(), (*pd_shadow.ctx().real()).ops.post_srq_recv, (*attr).attr) };
        let shadow = Arc::new(ShadowSrq {
            visible: UnsafeCell::new(visible),
            magic: MAGIC,
            id: registry::next_id(),
            real: AtomicPtr::new(srq),
            max_wr: AtomicU32::new(told.max_wr.max(wish.attr.max_wr)),
            max_sge: told.max_sge.max(wish.attr.max_sge),
            limit: AtomicU32::new(0),
            side: Spin::new(Side {
                post,
                book: Srq::new(told.max_wr.max(wish.attr.max_wr), told.max_sge.max(wish.attr.max_sge)),
            }),
            map: Mutex::new(maps.into_iter().next()),
            events: Deliveries::new(),
            dead: AtomicBool::new(false),
            pd: pd_shadow,
        });
        let visible = shadow.visible();
        // SAFETY: not handed out yet; `srq` is live.
        unsafe {
            (*visible).context = shadow.pd.ctx().visible();
            (*visible).srq_context = wish.srq_context;
            (*visible).pd = shadow.pd.visible();
            (*visible).handle = (*srq).handle;
            libc::pthread_mutex_init(addr_of_mut!((*visible).mutex), std::ptr::null());
            libc::pthread_cond_init(addr_of_mut!((*visible).cond), std::ptr::null());
            // Events of the real SRQ lead back here.
            (*srq).srq_context = Arc::as_ptr(&shadow).cast_mut().cast();
        }
        registry::add(&shadow) as *mut ibv_srq
    }

    "IBVERBS_1.1" fn ibv_modify_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr, mask: c_int) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowSrq>(srq) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(srq, attr, mask) };
        };
        let _pass = gate::enter("ibv_modify_srq");
        provider::rxe::record_maps();
        // SAFETY: the real SRQ of a live shadow, the caller's attributes.
        let (answer, wish) = unsafe { (real(shadow.real(), attr, mask), *attr) };
        let maps = provider::rxe::take_maps();
        if answer == 0 {
            if mask & srq_mask::MAX_WR != 0 {
                shadow.max_wr.store(wish.max_wr, Ordering::Relaxed);
                shadow.side.lock().book.set_capacity(wish.max_wr);
                if let Some(map) = maps.first() {
                    *shadow.map.lock().unwrap_or_else(PoisonError::into_inner) = Some(*map);
                }
            }
            if mask & srq_mask::LIMIT != 0 {
                shadow.limit.store(wish.srq_limit, Ordering::Relaxed);
            }
        }
        answer
    }

    "IBVERBS_1.1" fn ibv_query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int, fail errno, |real| {
        let _pass = gate::enter("ibv_query_srq");
        // SAFETY: the caller's promise; a real SRQ.
        unsafe { real(unwrap(srq), attr) }
    }

    "IBVERBS_1.1" fn ibv_destroy_srq(srq: *mut ibv_srq) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowSrq>(srq) else {
            blockers::forget(srq as usize);
            kept::forget_foreign(srq as usize);
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(srq) };
        };
        {
            let _pass = gate::enter("ibv_destroy_srq");
            // SAFETY: the real SRQ of a live shadow.
            let answer = unsafe { real(shadow.real()) };
            if answer != 0 { return answer }
            shadow.dead.store(true, Ordering::Release);
            registry::remove(&*shadow);
            shadow.pd().ctx().forget_kept(shadow.visible() as usize);
        }
        let visible = shadow.visible();
        // SAFETY: the visible part lives as long as the Arc we hold.
        unsafe {
            shadow.events.wait_for(
                addr_of_mut!((*visible).mutex),
                addr_of_mut!((*visible).cond),
                &raw const (*visible).events_completed,
            );
        }
        0
    }
}
