//! Queue pairs.
//!
//! | module | subject |
//! |---|---|
//! | [`send`] | posting sends: translation, counting, holding while suspended |
//! | [`recv`] | posting receives and the ledger of those that have not completed |
//! | [`life`] | creation, query, end |
//! | [`modify`] | state changes, remembered so that an equal QP can be made |
//! | [`second`] | the QP beside the first one, and changing over to it |
//! | [`rebuild`] | a QP in the place of one that stayed behind on another host |
//! | [`notices`] | which of its kernel object's events are the application's |
//! | [`builder`] | `ibv_wr_*` |
#![expect(unsafe_code, reason = "C objects by pointer")]

pub mod builder;
pub mod life;
pub mod modify;
pub mod notices;
pub mod rebuild;
pub mod recv;
pub mod second;
pub mod send;

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rdma_virt::gate::Side;
use rdma_virt::id::{ObjId, PQpn, VQpn};
use rdma_virt::msg::Count;
use rdma_virt::quiesce::{Situation, Verdict};
use rdma_virt::recvq::RecvQ;
use rdma_virt::saved::{QpCap, QpPhase, QueueMap};
use rdma_virt::sendq::Polled;
use rdma_virt::wr::MARKER_WR_ID;

use crate::abi::{ibv_qp, ibv_qp_ex, ibv_wc, wc};
use crate::context::ShadowContext;
use crate::cq::ShadowCq;
use crate::events::Deliveries;
use crate::lock::Spin;
use crate::pd::ShadowPd;
use crate::provider;
use crate::srq::ShadowSrq;

pub use modify::Remembered;

const MAGIC: u64 = 0x6d69_6772_7170_0001;

/// A queue pair as the application sees it.
#[repr(C)]
pub struct ShadowQp {
    visible: UnsafeCell<ibv_qp_ex>,
    magic: u64,
    pub id: ObjId,
    ctx: Arc<ShadowContext>,
    pd: Arc<ShadowPd>,
    send_cq: Arc<ShadowCq>,
    recv_cq: Arc<ShadowCq>,
    srq: Option<Arc<ShadowSrq>>,
    /// `enum ibv_qp_type`.
    pub qp_type: u32,
    pub sq_sig_all: bool,
    /// As asked of the kernel, reserve included.
    pub cap_asked: QpCap,
    /// As told to the application.
    pub cap_app: QpCap,
    vqpn: VQpn,
    real: AtomicPtr<ibv_qp>,
    links: Mutex<Links>,
    core: Spin<send::Core>,
    /// What polling found; written under the CQs' locks.
    polled: Polled,
    remembered: Mutex<Remembered>,
    builder: Spin<builder::Builder>,
    pub(crate) events: Deliveries,
    notices: notices::Notices,
    dead: AtomicBool,
}

// SAFETY: the visible part is the application's to lock; ours is atomic or locked.
unsafe impl Send for ShadowQp {}
// SAFETY: as above.
unsafe impl Sync for ShadowQp {}

/// One real QP and where its queues are mapped.
#[derive(Clone, Copy, Debug)]
pub struct RealQp {
    pub qp: *mut ibv_qp,
    pub sq_map: Option<QueueMap>,
    pub rq_map: Option<QueueMap>,
}

// SAFETY: a pointer to an object of libibverbs, which locks its own.
unsafe impl Send for RealQp {}

struct Links {
    now: RealQp,
    /// Made for a peer that moves; not used for traffic yet.
    second: Option<second::Second>,
    /// Left behind by the change-over.
    old: Vec<RealQp>,
}

/// Whose a completion was.
pub enum Settled {
    App,
    Ours,
}

/// How far a QP's work is, for waiting and for messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub signalled_posted: u64,
    pub signalled_completed: u64,
    /// Sends posted after the last signalled one.
    pub trailing_unsignalled: u64,
    pub markers: u64,
    pub recvs_unconsumed: usize,
    pub held: usize,
    /// The provider's send ring is empty; `None` if it cannot be looked at.
    pub sq_empty: Option<bool>,
    /// The QP has failed: its completions are flushes and prove nothing.
    pub error: bool,
}

impl ShadowQp {
    /// The shadow behind a pointer that came through our op table, or an event.
    ///
    /// # Safety
    /// `qp` is a live QP, ours or the library's.
    #[inline]
    pub(crate) unsafe fn of<'a>(qp: *mut ibv_qp) -> Option<&'a Self> {
        // SAFETY: every real QP is at least an ibv_qp_ex long (libibverbs' verbs_qp), and what follows is inside the
        // provider's own struct.
        unsafe {
            let shadow = qp.cast::<Self>();
            ((&raw const (*shadow).magic).read() == MAGIC).then(|| &*shadow)
        }
    }

    pub fn ctx(&self) -> &Arc<ShadowContext> {
        &self.ctx
    }

    pub fn pd(&self) -> &Arc<ShadowPd> {
        &self.pd
    }

    pub fn send_cq(&self) -> &Arc<ShadowCq> {
        &self.send_cq
    }

    pub fn recv_cq(&self) -> &Arc<ShadowCq> {
        &self.recv_cq
    }

    pub fn srq(&self) -> Option<&Arc<ShadowSrq>> {
        self.srq.as_ref()
    }

    pub fn visible(&self) -> *mut ibv_qp {
        self.visible.get().cast()
    }

    pub(crate) fn visible_ex(&self) -> *mut ibv_qp_ex {
        self.visible.get()
    }

    /// The library's QP that carries the traffic now.
    pub fn real(&self) -> *mut ibv_qp {
        self.real.load(Ordering::Acquire)
    }

    fn links(&self) -> std::sync::MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this real QP is one of ours.
    pub(crate) fn owns(&self, real: *mut ibv_qp) -> bool {
        let links = self.links();
        links.now.qp == real || links.second.is_some_and(|s| s.is(real)) || links.old.iter().any(|o| o.qp == real)
    }

    /// Whether this real QP is one that is not used for traffic yet: what it reports is nobody's.
    pub(crate) fn is_beside(&self, real: *mut ibv_qp) -> bool {
        self.links().second.is_some_and(|s| s.is(real))
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// The number the application knows; never changes.
    pub fn vqpn(&self) -> VQpn {
        self.vqpn
    }

    /// The number the NIC uses now.
    pub fn pqpn(&self) -> PQpn {
        // SAFETY: the real QP of a shadow that is not dead.
        PQpn(unsafe { (*self.real()).qp_num })
    }

    pub fn handle(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.real()).handle }
    }

    /// What the kernel hands back in this QP's events.
    pub fn user_handle(&self) -> u64 {
        self.real() as u64
    }

    pub fn sq_map(&self) -> Option<QueueMap> {
        self.links().now.sq_map
    }

    pub fn rq_map(&self) -> Option<QueueMap> {
        self.links().now.rq_map
    }

    // ---- accounting ------------------------------------------------------------------------------------------------

    /// Accounts for one completion of this QP, found on `cq` under its lock.
    #[inline]
    pub(crate) fn settle(&self, cq: &ShadowCq, entry: &mut ibv_wc) -> Settled {
        if entry.wr_id == MARKER_WR_ID {
            self.polled.marker_completed();
            return Settled::Ours;
        }
        let success = entry.status == wc::SUCCESS;
        let received = if success { entry.opcode & wc::RECV != 0 } else { self.failed_receive(cq, entry) };
        if !received {
            self.polled.send_completed();
            return Settled::App;
        }
        if let Some(srq) = &self.srq
            && let Some(wr_id) = srq.complete(entry.wr_id)
        {
            entry.wr_id = wr_id;
        }
        match (success, self.srq.is_none()) {
            (true, own_queue) => self.polled.message_received(own_queue),
            (false, true) => self.polled.receive_failed(),
            (false, false) => {}
        }
        Settled::App
    }

    /// A failed completion's opcode means nothing: which queue was it of?
    #[cold]
    fn failed_receive(&self, cq: &ShadowCq, entry: &ibv_wc) -> bool {
        self.polled.set_failed();
        if !std::ptr::eq(&*self.send_cq, cq) {
            return true;
        }
        if !std::ptr::eq(&*self.recv_cq, cq) {
            return false;
        }
        match &self.srq {
            Some(_) => rdma_virt::srq::is_slot(entry.wr_id),
            None => self.core.lock().gate.side_of_error(entry.wr_id, &self.polled) == Side::Receive,
        }
    }

    /// Two-sided messages so far.
    pub fn counts(&self) -> Count {
        let sent = self.core.lock().gate.sends().two_sided();
        Count { vqpn: self.vqpn, sent, received: self.polled.messages() }
    }

    pub fn progress(&self) -> Progress {
        let sq_map = self.sq_map();
        let phase = self.attr().phase;
        let core = self.core.lock();
        let sends = core.gate.sends();
        let completed = self.polled.sends();
        Progress {
            signalled_posted: completed + sends.outstanding(&self.polled),
            signalled_completed: completed,
            trailing_unsignalled: sends.trailing_unsignalled(),
            markers: sends.markers_outstanding(&self.polled),
            recvs_unconsumed: core.gate.recvs().map_or(0, |r| r.outstanding(&self.polled) as usize),
            held: sends.held(),
            sq_empty: if self.ctx.driver() == "rxe" { sq_map.map(|m| provider::rxe::ring_is_empty(&m)) } else { None },
            error: self.polled.has_failed() || phase == QpPhase::Err,
        }
    }

    /// Whether nothing of this QP is in flight any more, `expect_received` messages having been sent to it in all.
    /// Otherwise says what is missing. Right only while suspended and right after its CQs were drained.
    pub fn is_drained(&self, expect_received: u64) -> Result<(), String> {
        let ring_is_empty = self.progress().sq_empty;
        if ring_is_empty == Some(false) {
            return Err("sends not completed".to_owned());
        }
        let srq = self.srq.as_ref().map_or(0, |s| s.unconsumed() as u64);
        let phase = self.attr().phase;
        let core = self.core.lock();
        let mut situation = Situation::of(&core.gate, &self.polled, phase, Some(expect_received), srq);
        if ring_is_empty == Some(true) {
            // The kernel has finished with every send, so the unsignalled ones are done too.
            situation.trailing_unsignalled = 0;
        }
        match situation.verdict() {
            Verdict::Quiet => Ok(()),
            Verdict::PostMarker | Verdict::Wait => Err(situation.why()),
        }
    }

    /// A new ledger for the receives of a QP with these capacities; none if it uses an SRQ.
    pub(crate) fn new_recvs(has_srq: bool, cap: &QpCap) -> Option<RecvQ> {
        (!has_srq).then(|| RecvQ::new(cap.max_recv_wr, cap.max_recv_sge))
    }
}

/// The real QP behind whatever the caller holds.
pub(crate) fn unwrap(qp: *mut ibv_qp) -> *mut ibv_qp {
    crate::registry::find::<ShadowQp>(qp).map_or(qp, |q| q.real())
}
