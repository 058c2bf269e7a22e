//! Creation, query and end of queue pairs.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::mem::zeroed;
use std::ptr::{addr_of_mut, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex};

use libc::c_int;
use rdma_virt::gate::Gate;
use rdma_virt::id::PQpn;
use rdma_virt::saved::QpCap;
use rdma_virt::sendq::{Polled, SendQ};

use super::modify::Remembered;
use super::notices::Notices;
use super::send::Core;
use super::{Links, MAGIC, RealQp, ShadowQp, builder};
use crate::abi::{ibv_ece, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_ex, ibv_qp_init_attr, qp_mask, qp_type};
use crate::cq::{self, ShadowCq};
use crate::entry::entry;
use crate::events::Deliveries;
use crate::lock::Spin;
use crate::pd::{self, ShadowPd};
use crate::registry::{self, Shadow};
use crate::srq::{self, ShadowSrq};
use crate::{blockers, control, gate, kept, provider};

pub(crate) fn cap(c: &ibv_qp_cap) -> QpCap {
    QpCap {
        max_send_wr: c.max_send_wr,
        max_recv_wr: c.max_recv_wr,
        max_send_sge: c.max_send_sge,
        max_recv_sge: c.max_recv_sge,
        max_inline_data: c.max_inline_data,
    }
}

pub(crate) fn raw_cap(c: &QpCap) -> ibv_qp_cap {
    ibv_qp_cap {
        max_send_wr: c.max_send_wr,
        max_recv_wr: c.max_recv_wr,
        max_send_sge: c.max_send_sge,
        max_recv_sge: c.max_recv_sge,
        max_inline_data: c.max_inline_data,
    }
}

/// Send queue slots asked for beyond the application's wish, for a marker. The provider whose send ring we can look at
/// needs none, so there an application sees the very capacities it would see without us.
fn reserve(driver: &str) -> u32 {
    if driver == "rxe" { 0 } else { 2 }
}

/// The objects a new QP is to use, all ours, or none if any is not.
pub(crate) struct Parts {
    pub pd: Arc<ShadowPd>,
    pub send_cq: Arc<ShadowCq>,
    pub recv_cq: Arc<ShadowCq>,
    pub srq: Option<Arc<ShadowSrq>>,
}

impl Parts {
    pub fn find(pd: *mut ibv_pd, attr: &ibv_qp_init_attr) -> Option<Self> {
        let srq = if attr.srq.is_null() { None } else { Some(registry::find::<ShadowSrq>(attr.srq)?) };
        Some(Self {
            pd: registry::find(pd)?,
            send_cq: registry::find(attr.send_cq)?,
            recv_cq: registry::find(attr.recv_cq)?,
            srq,
        })
    }

    fn real(&self, attr: &mut ibv_qp_init_attr) {
        attr.send_cq = self.send_cq.real();
        attr.recv_cq = self.recv_cq.real();
        attr.srq = self.srq.as_ref().map_or(null_mut(), |s| s.real());
    }
}

/// Real objects in place of ours, whichever are ours.
pub(crate) fn unwrap_attr(attr: &mut ibv_qp_init_attr) {
    attr.send_cq = cq::unwrap(attr.send_cq);
    attr.recv_cq = cq::unwrap(attr.recv_cq);
    attr.srq = srq::unwrap(attr.srq);
}

type CreateQp = unsafe extern "C" fn(*mut ibv_pd, *mut ibv_qp_init_attr) -> *mut ibv_qp;

/// A QP made of our objects. `ops` are the `ibv_wr_*` builders asked for, 0 for a plain QP.
///
/// # Safety
/// `attr` is the application's, `real` the library's function.
pub(crate) unsafe fn create(parts: Parts, attr: *mut ibv_qp_init_attr, ops: u64, real: CreateQp) -> *mut ibv_qp {
    // SAFETY: the caller's promise.
    let wish = unsafe { *attr };
    let mut ask = wish;
    parts.real(&mut ask);
    let extra = reserve(parts.pd.ctx().driver());
    ask.cap.max_send_wr = wish.cap.max_send_wr.saturating_add(extra);
    let mut asked = cap(&ask.cap);
    provider::rxe::record_maps();
    // SAFETY: real objects of live shadows.
    let mut qp = unsafe { real(parts.pd.real(), &raw mut ask) };
    let mut got_extra = extra;
    if qp.is_null() && extra > 0 {
        // At the device's limit: without our reserve then.
        ask = wish;
        parts.real(&mut ask);
        asked = cap(&ask.cap);
        got_extra = 0;
        // SAFETY: as above.
        qp = unsafe { real(parts.pd.real(), &raw mut ask) };
    }
    let maps = provider::rxe::take_maps();
    if qp.is_null() {
        return null_mut();
    }
    let mut told = cap(&ask.cap);
    told.max_send_wr = told.max_send_wr.saturating_sub(got_extra).max(wish.cap.max_send_wr);
    // SAFETY: the caller's attributes are in-out.
    unsafe { (*attr).cap = raw_cap(&told) };

    // A queue pair without a receive queue of its own maps the send queue only; otherwise the receive queue is first.
    let (rq_map, sq_map) = match (maps.as_slice(), parts.srq.is_some()) {
        ([sq], true) => (None, Some(*sq)),
        ([rq, sq], false) => (Some(*rq), Some(*sq)),
        _ => (None, None),
    };
    let shadow = adopt(parts, qp, &wish, (asked, told), (sq_map, rq_map), ops);
    shadow.visible()
}

fn adopt(
    parts: Parts,
    real: *mut ibv_qp,
    wish: &ibv_qp_init_attr,
    (cap_asked, cap_app): (QpCap, QpCap),
    (sq_map, rq_map): (Option<rdma_virt::saved::QueueMap>, Option<rdma_virt::saved::QueueMap>),
    ops: u64,
) -> Arc<ShadowQp> {
    let Parts { pd, send_cq, recv_cq, srq } = parts;
    let ctx = pd.ctx().clone();
    // SAFETY: live real objects.
    let (pqpn, real_ops) = unsafe { (PQpn((*real).qp_num), &(*ctx.real()).ops) };
    let vqpn = control::register_qp(&ctx, pqpn);
    let shadow = Arc::new(ShadowQp {
        // SAFETY: all-zero is a valid value of the C struct.
        visible: UnsafeCell::new(unsafe { zeroed::<ibv_qp_ex>() }),
        magic: MAGIC,
        id: registry::next_id(),
        qp_type: wish.qp_type,
        sq_sig_all: wish.sq_sig_all != 0,
        cap_asked,
        cap_app,
        vqpn,
        real: AtomicPtr::new(real),
        links: Mutex::new(Links { now: RealQp { qp: real, sq_map, rq_map }, second: None, old: Vec::new() }),
        core: Spin::new(Core {
            gate: Gate::new(
                SendQ::new(cap_app.max_send_wr),
                ShadowQp::new_recvs(srq.is_some(), &cap_app),
                wish.sq_sig_all != 0,
            ),
            real,
            post_send: real_ops.post_send,
            post_recv: real_ops.post_recv,
            remote_keys: None,
        }),
        polled: Polled::default(),
        remembered: Mutex::new(Remembered::default()),
        builder: Spin::new(builder::Builder::default()),
        events: Deliveries::new(),
        notices: Notices::default(),
        dead: AtomicBool::new(false),
        ctx,
        pd,
        send_cq,
        recv_cq,
        srq,
    });
    let visible = shadow.visible();
    // SAFETY: not handed out yet; `real` is live.
    unsafe {
        (*visible).context = shadow.ctx.visible();
        (*visible).qp_context = wish.qp_context;
        (*visible).pd = shadow.pd.visible();
        (*visible).send_cq = shadow.send_cq.visible();
        (*visible).recv_cq = shadow.recv_cq.visible();
        (*visible).srq = shadow.srq.as_ref().map_or(null_mut(), |s| s.visible());
        (*visible).handle = (*real).handle;
        (*visible).qp_num = vqpn.0;
        (*visible).state = (*real).state;
        (*visible).qp_type = (*real).qp_type;
        libc::pthread_mutex_init(addr_of_mut!((*visible).mutex), std::ptr::null());
        libc::pthread_cond_init(addr_of_mut!((*visible).cond), std::ptr::null());
        // Events of the real QP lead back here.
        (*real).qp_context = Arc::as_ptr(&shadow).cast_mut().cast();
    }
    if ops != 0 {
        builder::install(&shadow, ops);
    }
    shadow.ctx.qpns.insert(pqpn, Arc::as_ptr(&shadow));
    registry::add(&shadow);
    if shadow.qp_type != qp_type::RC {
        blockers::note("ibv_create_qp", format!("qp {} of type {}", vqpn.0, shadow.qp_type), shadow.address());
    }
    shadow
}

entry! {
    "IBVERBS_1.1" fn ibv_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp, fail null, |real| {
        if registry::find::<ShadowPd>(pd).is_none() {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, attr) };
        }
        let _pass = gate::enter("ibv_create_qp");
        // SAFETY: the caller's attributes.
        let wish = unsafe { *attr };
        match Parts::find(pd, &wish) {
            // SAFETY: as above.
            Some(parts) => unsafe { create(parts, attr, 0, real) },
            None => {
                // Made of something we do not stand in for: the library's QP as it is.
                let mut ask = wish;
                unwrap_attr(&mut ask);
                // SAFETY: as above.
                unsafe {
                    let qp = real(pd::unwrap(pd), &raw mut ask);
                    if !qp.is_null() {
                        (*attr).cap = ask.cap;
                        blockers::note("ibv_create_qp", format!("qp {} on objects of extended verbs", (*qp).qp_num), qp as usize);
                    }
                    qp
                }
            }
        }
    }

    "IBVERBS_1.1" fn ibv_query_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int, init: *mut ibv_qp_init_attr) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowQp>(qp) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(qp, attr, mask, init) };
        };
        let _pass = gate::enter("ibv_query_qp");
        // SAFETY: the real QP of a live shadow.
        let answer = unsafe { real(shadow.real(), attr, mask, init) };
        if answer != 0 { return answer }
        // SAFETY: the library filled both; the visible part is live.
        unsafe {
            shadow.virtual_attr(&mut *attr);
            if mask & qp_mask::STATE != 0 {
                (*shadow.visible()).state = (*attr).qp_state;
            }
            let visible = shadow.visible();
            (*init).qp_context = (*visible).qp_context;
            (*init).send_cq = (*visible).send_cq;
            (*init).recv_cq = (*visible).recv_cq;
            (*init).srq = (*visible).srq;
            let extra = shadow.cap_asked.max_send_wr.saturating_sub(shadow.cap_app.max_send_wr);
            if extra > 0 {
                (*init).cap.max_send_wr = shadow.cap_app.max_send_wr;
                (*attr).cap.max_send_wr = shadow.cap_app.max_send_wr;
            }
        }
        0
    }

    "IBVERBS_1.1" fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowQp>(qp) else {
            blockers::forget(qp as usize);
            kept::forget_foreign(qp as usize);
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(qp) };
        };
        {
            let _pass = gate::enter("ibv_destroy_qp");
            let pqpn = shadow.pqpn();
            // SAFETY: the real QP of a live shadow.
            let answer = unsafe { real(shadow.real()) };
            if answer != 0 { return answer }
            shadow.dead.store(true, Ordering::Release);
            shadow.drop_second();
            shadow.destroy_old();
            registry::remove(&*shadow);
            blockers::forget(shadow.address());
            shadow.ctx.qpns.remove(pqpn, Arc::as_ptr(&shadow), shadow.vqpn());
            // A poll that found this QP before it left the table is over when its CQ's lock was had once.
            drop(shadow.send_cq.hold());
            drop(shadow.recv_cq.hold());
            shadow.ctx.forget_kept(shadow.visible() as usize);
            control::qp_gone(shadow.vqpn());
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

    /// The builders of a QP made with `send_ops_flags`.
    "IBVERBS_1.6" fn ibv_qp_to_qp_ex(qp: *mut ibv_qp) -> *mut ibv_qp_ex, fail null, |real| {
        match registry::find::<ShadowQp>(qp) {
            Some(shadow) if builder::installed(&shadow) => shadow.visible_ex(),
            Some(_) => null_mut(),
            // SAFETY: not ours, the caller's promise.
            None => unsafe { real(qp) },
        }
    }

    "IBVERBS_1.14" fn ibv_query_qp_data_in_order(qp: *mut ibv_qp, op: u32, flags: u32) -> c_int, fail zero, |real| {
        // SAFETY: the caller's promise; real object.
        unsafe { real(super::unwrap(qp), op, flags) }
    }

    "IBVERBS_1.10" fn ibv_set_ece(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int, fail errno, |real| {
        let _pass = gate::enter("ibv_set_ece");
        // SAFETY: the caller's promise; real object.
        unsafe {
            let answer = real(super::unwrap(qp), ece);
            if answer == 0 {
                blockers::note("ibv_set_ece", format!("qp {}", (*qp).qp_num), qp as usize);
            }
            answer
        }
    }

    "IBVERBS_1.10" fn ibv_query_ece(qp: *mut ibv_qp, ece: *mut ibv_ece) -> c_int, fail errno, |real| {
        let _pass = gate::enter("ibv_query_ece");
        // SAFETY: the caller's promise; real object.
        unsafe { real(super::unwrap(qp), ece) }
    }

    "IBVERBS_1.1" fn ibv_attach_mcast(qp: *mut ibv_qp, gid: *const crate::abi::ibv_gid, lid: u16) -> c_int, fail errno, |real| {
        let _pass = gate::enter("ibv_attach_mcast");
        // SAFETY: the caller's promise; real object.
        let answer = unsafe { real(super::unwrap(qp), gid, lid) };
        if answer == 0 {
            // SAFETY: as above.
            blockers::note("ibv_attach_mcast", format!("qp {}", unsafe { (*qp).qp_num }), qp as usize);
        }
        answer
    }

    "IBVERBS_1.1" fn ibv_detach_mcast(qp: *mut ibv_qp, gid: *const crate::abi::ibv_gid, lid: u16) -> c_int, fail errno, |real| {
        let _pass = gate::enter("ibv_detach_mcast");
        // SAFETY: the caller's promise; real object.
        unsafe { real(super::unwrap(qp), gid, lid) }
    }
}
