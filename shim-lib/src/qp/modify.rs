//! State changes of queue pairs. What the application set is remembered in its own terms, and made physical on the way
//! to the library.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::sync::{Arc, PoisonError};

use libc::c_int;
use rdma_virt::id::{PGid, PQpn, VGid, VQpn};
use rdma_virt::saved::{QpAttr, QpPhase, Remote};

use super::ShadowQp;
use super::second::{bare, is_connected, modify};
use crate::abi::{ibv_ah_attr, ibv_qp, ibv_qp_attr, qp_mask, qp_state, qp_type};
use crate::entry::entry;
use crate::errno::Errno;
use crate::registry;
use crate::tables::RemoteKeys;
use crate::{control, gate};

/// Everything the application set on a QP, as it set it, and where its remote end is.
#[derive(Clone, Debug)]
pub struct Remembered {
    pub phase: QpPhase,
    pub attr: QpAttr,
    pub rq_psn: u32,
    pub sq_psn: u32,
    /// What the remote end expects first from a QP that was made anew in RTR: it was told before the application says.
    pub announced_psn: Option<u32>,
    pub remote: Option<Remote>,
}

impl Default for Remembered {
    fn default() -> Self {
        Self { phase: QpPhase::Reset, attr: QpAttr::default(), rq_psn: 0, sq_psn: 0, announced_psn: None, remote: None }
    }
}

fn phase(state: u32) -> QpPhase {
    match state {
        0 => QpPhase::Reset,
        1 => QpPhase::Init,
        2 => QpPhase::Rtr,
        3 => QpPhase::Rts,
        4 => QpPhase::Sqd,
        5 => QpPhase::Sqe,
        _ => QpPhase::Err,
    }
}

fn gid_of(ah: &ibv_ah_attr) -> [u8; 16] {
    // SAFETY: every bit pattern is a GID.
    unsafe { ah.grh.dgid.raw }
}

impl Remembered {
    fn merge(&mut self, attr: &ibv_qp_attr, mask: c_int) {
        let a = &mut self.attr;
        let on = |bit: c_int| mask & bit != 0;
        if on(qp_mask::PKEY_INDEX) {
            a.pkey_index = attr.pkey_index;
        }
        if on(qp_mask::PORT) {
            a.port_num = attr.port_num;
        }
        if on(qp_mask::ACCESS_FLAGS) {
            a.access = attr.qp_access_flags;
        }
        if on(qp_mask::PATH_MTU) {
            a.path_mtu = attr.path_mtu;
        }
        if on(qp_mask::AV) {
            let ah = &attr.ah_attr;
            a.is_global = ah.is_global != 0;
            a.sgid_index = ah.grh.sgid_index;
            a.flow_label = ah.grh.flow_label;
            a.hop_limit = ah.grh.hop_limit;
            a.traffic_class = ah.grh.traffic_class;
            a.dlid = ah.dlid;
            a.sl = ah.sl;
            a.src_path_bits = ah.src_path_bits;
            a.static_rate = ah.static_rate;
        }
        if on(qp_mask::MAX_DEST_RD_ATOMIC) {
            a.max_dest_rd_atomic = attr.max_dest_rd_atomic;
        }
        if on(qp_mask::MIN_RNR_TIMER) {
            a.min_rnr_timer = attr.min_rnr_timer;
        }
        if on(qp_mask::TIMEOUT) {
            a.timeout = attr.timeout;
        }
        if on(qp_mask::RETRY_CNT) {
            a.retry_cnt = attr.retry_cnt;
        }
        if on(qp_mask::RNR_RETRY) {
            a.rnr_retry = attr.rnr_retry;
        }
        if on(qp_mask::MAX_QP_RD_ATOMIC) {
            a.max_rd_atomic = attr.max_rd_atomic;
        }
        if on(qp_mask::RQ_PSN) {
            self.rq_psn = attr.rq_psn;
        }
        if on(qp_mask::SQ_PSN) {
            self.sq_psn = attr.sq_psn;
        }
        if on(qp_mask::STATE) {
            self.phase = phase(attr.qp_state);
        }
    }

    /// The attributes that do not concern a remote end, as a query gives them.
    fn fill(&self, attr: &mut ibv_qp_attr) {
        let a = &self.attr;
        (attr.pkey_index, attr.port_num, attr.qp_access_flags) = (a.pkey_index, a.port_num, a.access);
        (attr.max_dest_rd_atomic, attr.max_rd_atomic) = (a.max_dest_rd_atomic, a.max_rd_atomic);
        (attr.min_rnr_timer, attr.timeout) = (a.min_rnr_timer, a.timeout);
        (attr.retry_cnt, attr.rnr_retry) = (a.retry_cnt, a.rnr_retry);
        (attr.rq_psn, attr.sq_psn) = (self.rq_psn, self.sq_psn);
    }
}

impl ShadowQp {
    /// What the application set so far.
    pub fn attr(&self) -> Remembered {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it has a remote end and has not failed.
    pub fn is_connected(&self) -> bool {
        is_connected(self.attr().phase)
    }

    /// Notes where the remote end is now; the application is not told.
    pub fn set_remote(&self, remote: Option<Remote>) {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).remote = remote;
    }

    /// Notes what a remote end was told about the first PSN of a QP that is not sending yet.
    pub(crate) fn announce_psn(&self, psn: Option<u32>) {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).announced_psn = psn;
    }

    /// Makes the attributes of a query virtual again.
    pub(crate) fn virtual_attr(&self, attr: &mut ibv_qp_attr) {
        let r = self.attr();
        let moved = self.pd().ctx().view.read().unwrap_or_else(PoisonError::into_inner).is_some();
        if moved && r.remote.is_some() {
            attr.ah_attr.grh.sgid_index = r.attr.sgid_index;
        }
        if moved && r.phase == QpPhase::Reset {
            // A new QP in RESET remembers nothing of what this one was before it was reset.
            r.fill(attr);
        }
        if let Some(remote) = r.remote {
            if attr.dest_qp_num == remote.pqpn.0 {
                attr.dest_qp_num = remote.vqpn.0;
            }
            if gid_of(&attr.ah_attr) == remote.pgid.0 {
                attr.ah_attr.grh.dgid.raw = remote.vgid.0;
            }
            if remote.vqpn.0 != remote.pqpn.0 || remote.vgid.0 != remote.pgid.0 || self.pqpn().0 != self.vqpn().0 {
                // Made anew on the way: the sequence numbers it really started with are not the application's.
                attr.rq_psn = r.rq_psn;
                attr.sq_psn = r.sq_psn;
            }
        }
    }

    /// What `ibv_modify_qp` does.
    fn modify(&self, wish: &ibv_qp_attr, mask: c_int, real: impl FnOnce(*mut ibv_qp_attr) -> c_int) -> c_int {
        let mut ask = *wish;
        let mut remote = None;
        let port = if mask & qp_mask::PORT != 0 { wish.port_num } else { self.attr().attr.port_num };
        if mask & qp_mask::AV != 0 {
            ask.ah_attr.grh.sgid_index = self.ctx().physical_sgid(port, wish.ah_attr.grh.sgid_index);
        }
        if mask & qp_mask::SQ_PSN != 0
            && let Some(psn) = self.attr().announced_psn
        {
            ask.sq_psn = psn;
        }
        if mask & qp_mask::ALT_PATH != 0 {
            ask.alt_ah_attr.grh.sgid_index = self.ctx().physical_sgid(port, wish.alt_ah_attr.grh.sgid_index);
        }
        if mask & qp_mask::DEST_QPN != 0 && mask & qp_mask::AV != 0 && self.qp_type == qp_type::RC {
            let (vgid, vqpn) = (VGid(gid_of(&wish.ah_attr)), VQpn(wish.dest_qp_num));
            match control::resolve_remote(vgid, vqpn) {
                Ok(found) => {
                    ask.ah_attr.grh.dgid.raw = found.pgid.0;
                    ask.dest_qp_num = found.pqpn.0;
                    remote = Some(Remote { vgid, vqpn, pgid: found.pgid, pqpn: found.pqpn });
                    let keys = (!found.keys.is_empty()).then(|| Arc::new(RemoteKeys::new(&found.keys)));
                    self.set_remote_keys(keys);
                }
                Err(e) => return Errno::answer(Err(e)),
            }
        }
        let before = (mask & qp_mask::STATE != 0).then(|| {
            if self.notices.in_the_way(wish.qp_state) {
                self.ctx().keep_unread(|_| true);
                self.ctx().announce_kept();
            }
            let on_request = mask & qp_mask::EN_SQD_ASYNC_NOTIFY != 0 && wish.en_sqd_async_notify != 0;
            self.notices.asked(wish.qp_state, on_request || self.ctx().driver() == "rxe")
        });
        let answer = real(&raw mut ask);
        if answer != 0 {
            if let Some(before) = before {
                self.notices.refused(before);
            }
            return answer;
        }
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.merge(wish, mask);
        if remote.is_some() {
            remembered.remote = remote;
        }
        if mask & qp_mask::STATE != 0 {
            // SAFETY: a live visible part; only this call writes the member.
            unsafe { (*self.visible()).state = wish.qp_state };
            if wish.qp_state == qp_state::RESET {
                // The kernel goes on answering queries with the attributes; where they led to is over.
                (remembered.remote, remembered.announced_psn) = (None, None);
                drop(remembered);
                self.forget_work();
            }
        }
        0
    }

    /// After a reset nothing that was posted will ever complete.
    fn forget_work(&self) {
        let _nobody_polls = self.send_cq().hold();
        let _nor_here = (!Arc::ptr_eq(self.send_cq(), self.recv_cq())).then(|| self.recv_cq().hold());
        self.core.lock().gate.reset(&self.polled);
    }

    /// Points the library's object at another kernel object, and the tables with it. The caller has the gate shut.
    pub fn patch(&self, handle: u32, pqpn: PQpn, remote: Option<Remote>) {
        let before = self.pqpn();
        let this: *const Self = self;
        self.ctx().qpns.remove(before, this, self.vqpn());
        // SAFETY: the real QP of a shadow that is not dead.
        unsafe {
            (*self.real()).handle = handle;
            (*self.real()).qp_num = pqpn.0;
            (*self.real()).events_completed = 0;
        }
        self.ctx().qpns.insert(pqpn, this);
        if remote.is_some() {
            self.set_remote(remote);
        }
    }

    /// Its far end is gone for good: what is posted, and what will be, is flushed. The caller has the gate shut.
    pub fn break_off(&self) -> Result<(), Errno> {
        // SAFETY: the real QP of a shadow that is not dead.
        unsafe { modify(self.real(), &mut bare(qp_state::ERR), qp_mask::STATE)? };
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).phase = QpPhase::Err;
        Ok(())
    }

    /// Attributes for taking an equal QP through its states: `(INIT, RTR, RTS)` with their masks, towards `remote`.
    pub(crate) fn steps(&self, remote: (PGid, PQpn), sq_psn: u32, rq_psn: u32) -> [(ibv_qp_attr, c_int); 3] {
        let r = self.attr();
        let a = &r.attr;
        // SAFETY: all-zero is a valid attribute struct.
        let blank: ibv_qp_attr = unsafe { std::mem::zeroed() };
        let mut init = blank;
        init.qp_state = qp_state::INIT;
        init.pkey_index = a.pkey_index;
        init.port_num = a.port_num;
        init.qp_access_flags = a.access;
        let mut rtr = blank;
        rtr.qp_state = qp_state::RTR;
        rtr.path_mtu = a.path_mtu;
        rtr.dest_qp_num = remote.1.0;
        rtr.rq_psn = rq_psn;
        rtr.max_dest_rd_atomic = a.max_dest_rd_atomic;
        rtr.min_rnr_timer = a.min_rnr_timer;
        let ah = &mut rtr.ah_attr;
        ah.is_global = u8::from(a.is_global);
        ah.grh.dgid.raw = remote.0.0;
        ah.grh.sgid_index = self.ctx().physical_sgid(a.port_num, a.sgid_index);
        ah.grh.flow_label = a.flow_label;
        ah.grh.hop_limit = a.hop_limit;
        ah.grh.traffic_class = a.traffic_class;
        ah.dlid = a.dlid;
        ah.sl = a.sl;
        ah.src_path_bits = a.src_path_bits;
        ah.static_rate = a.static_rate;
        ah.port_num = a.port_num;
        let mut rts = blank;
        rts.qp_state = qp_state::RTS;
        rts.timeout = a.timeout;
        rts.retry_cnt = a.retry_cnt;
        rts.rnr_retry = a.rnr_retry;
        rts.sq_psn = sq_psn;
        rts.max_rd_atomic = a.max_rd_atomic;
        [
            (init, qp_mask::STATE | qp_mask::PKEY_INDEX | qp_mask::PORT | qp_mask::ACCESS_FLAGS),
            (
                rtr,
                qp_mask::STATE
                    | qp_mask::AV
                    | qp_mask::PATH_MTU
                    | qp_mask::DEST_QPN
                    | qp_mask::RQ_PSN
                    | qp_mask::MAX_DEST_RD_ATOMIC
                    | qp_mask::MIN_RNR_TIMER,
            ),
            (
                rts,
                qp_mask::STATE
                    | qp_mask::TIMEOUT
                    | qp_mask::RETRY_CNT
                    | qp_mask::RNR_RETRY
                    | qp_mask::SQ_PSN
                    | qp_mask::MAX_QP_RD_ATOMIC,
            ),
        ]
    }
}

entry! {
    "IBVERBS_1.1" fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowQp>(qp) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(qp, attr, mask) };
        };
        let _pass = gate::enter("ibv_modify_qp");
        // SAFETY: the caller's attributes; the real QP of a live shadow.
        unsafe { shadow.modify(&*attr, mask, |ask| real(shadow.real(), ask, mask)) }
    }
}
