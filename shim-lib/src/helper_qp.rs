//! A QP of our own that raises an event on a CQ of the application: in INIT, one receive posted, then taken to ERR,
//! its flushed completion fires the CQ's event. The completion itself is swallowed when it is polled.
#![expect(unsafe_code, reason = "real verbs on real objects")]

use std::mem::zeroed;
use std::ptr::null_mut;
use std::time::Duration;

use rdma_virt::id::PQpn;

use crate::abi::{ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, ibv_recv_wr, qp_mask, qp_state, qp_type};
use crate::cq::ShadowCq;
use crate::errno::Errno;
use crate::pd::ShadowPd;
use crate::provider;
use crate::real::verbs;
use crate::registry;

/// Raises an event on `cq`'s channel. The caller has emptied the real CQ, and arms it for the application's next event
/// only after this one was read.
pub(crate) fn raise_event(cq: &ShadowCq) -> Result<(), Errno> {
    let pd = registry::all::<ShadowPd>(Some(cq.ctx())).into_iter().next().ok_or(Errno(libc::ENOENT))?;
    // SAFETY: real objects of live shadows; a QP made here and known to nobody else.
    unsafe {
        // The flush is posted as an unsolicited completion: arm for all.
        let arm = (*cq.ctx().real()).ops.req_notify_cq.ok_or(Errno(libc::EOPNOTSUPP))?;
        Errno::check(arm(cq.real(), 0))?;
        let mut ask = ibv_qp_init_attr {
            qp_context: null_mut(),
            send_cq: cq.real(),
            recv_cq: cq.real(),
            srq: null_mut(),
            cap: ibv_qp_cap { max_send_wr: 1, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 },
            qp_type: qp_type::RC,
            sq_sig_all: 0,
        };
        let qp = verbs::create_qp(pd.real(), &raw mut ask)?;
        if qp.is_null() {
            return Err(Errno::last());
        }
        cq.ctx().qpns.insert_helper(PQpn((*qp).qp_num));
        let raised = fire(cq, qp).and_then(|()| await_flush(cq));
        let _ = verbs::destroy_qp(qp);
        raised
    }
}

/// The NIC flushes in its own time, and a QP destroyed before that flushes nothing. The caller keeps the application
/// from polling meanwhile.
fn await_flush(cq: &ShadowCq) -> Result<(), Errno> {
    const STEP: Duration = Duration::from_micros(200);
    let Some(map) = cq.map().filter(|_| cq.ctx().driver() == "rxe") else {
        // Nowhere to look: long enough for any NIC.
        std::thread::sleep(STEP * 100);
        return Ok(());
    };
    for _ in 0..10_000 {
        if !provider::rxe::ring_is_empty(&map) {
            return Ok(());
        }
        std::thread::sleep(STEP);
    }
    Err(Errno(libc::ETIMEDOUT))
}

/// # Safety
/// `qp` is a new QP on `cq`.
unsafe fn fire(cq: &ShadowCq, qp: *mut crate::abi::ibv_qp) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    unsafe {
        let mut attr: ibv_qp_attr = zeroed();
        attr.qp_state = qp_state::INIT;
        attr.port_num = 1;
        let init = qp_mask::STATE | qp_mask::PKEY_INDEX | qp_mask::PORT | qp_mask::ACCESS_FLAGS;
        Errno::check(verbs::modify_qp(qp, &raw mut attr, init)?)?;
        let mut wr = ibv_recv_wr { wr_id: 0, next: null_mut(), sg_list: null_mut(), num_sge: 0 };
        let mut bad = null_mut();
        let post = (*cq.ctx().real()).ops.post_recv.ok_or(Errno(libc::EOPNOTSUPP))?;
        Errno::check(post(qp, &raw mut wr, &raw mut bad))?;
        attr.qp_state = qp_state::ERR;
        Errno::check(verbs::modify_qp(qp, &raw mut attr, qp_mask::STATE)?)
    }
}
