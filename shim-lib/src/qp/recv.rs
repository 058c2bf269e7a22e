//! Posting receives. Each is remembered until its completion is seen, so that those the NIC never used can be given to
//! another one.
#![expect(unsafe_code, reason = "C lists of work requests")]

use std::ptr::null_mut;

use libc::c_int;
use rdma_virt::gate::RecvPath;

use super::ShadowQp;
use super::send::Core;
use crate::abi::{ibv_qp, ibv_recv_wr, ibv_sge};
use crate::convert::{sges, with_sges};
use crate::entry::boundary;
use crate::errno::Errno;

impl ShadowQp {
    /// # Safety
    /// `wr` is a list of valid receives; `bad` has room for a pointer.
    #[inline]
    pub(crate) unsafe fn post_recv(&self, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
        let mut core = self.core.lock();
        let Some(post) = core.post_recv else { return libc::EOPNOTSUPP };
        if self.srq().is_some() {
            // It has no receive queue: the library says how that is answered.
            // SAFETY: the real QP of a live shadow; the caller's promise.
            return unsafe { post(core.real, wr, bad) };
        }
        if core.gate.recv() == RecvPath::LedgerOnly || self.ctx().keys.is_translating() {
            // SAFETY: the caller's promise.
            return unsafe { self.post_recv_one_by_one(&mut core, wr, bad) };
        }
        let mut failed = null_mut();
        // SAFETY: the real QP of a live shadow; the caller's list.
        let answer = unsafe { post(core.real, wr, &raw mut failed) };
        let mut each = wr;
        while !each.is_null() && (answer == 0 || each != failed) {
            // SAFETY: the caller's list; the library took this one.
            unsafe {
                let list = sges((*each).sg_list, (*each).num_sge);
                with_sges(list, |list| core.gate.recv_posted((*each).wr_id, list, &self.polled));
                each = (*each).next;
            }
        }
        if answer != 0 && !failed.is_null() {
            // SAFETY: the caller's room.
            unsafe { *bad = failed };
        }
        answer
    }

    #[cold]
    unsafe fn post_recv_one_by_one(
        &self,
        core: &mut Core,
        mut wr: *mut ibv_recv_wr,
        bad: *mut *mut ibv_recv_wr,
    ) -> c_int {
        while !wr.is_null() {
            // SAFETY: the caller's list.
            let answer = unsafe { self.post_one_recv(core, &*wr) };
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
    unsafe fn post_one_recv(&self, core: &mut Core, wr: &ibv_recv_wr) -> c_int {
        if wr.num_sge < 0 || wr.num_sge as u32 > self.cap_app.max_recv_sge {
            return libc::EINVAL;
        }
        // SAFETY: the caller's promise.
        let list = unsafe { sges(wr.sg_list, wr.num_sge) };
        if core.gate.recv() == RecvPath::LedgerOnly {
            let kept = with_sges(list, |l| core.gate.recv_remember(wr.wr_id, l, &self.polled));
            return kept.map_or(libc::ENOMEM, |()| 0);
        }
        let Some(post) = core.post_recv else { return libc::EOPNOTSUPP };
        let keys = &self.ctx().keys;
        let mut translated: Vec<ibv_sge> =
            list.iter().map(|s| ibv_sge { lkey: keys.physical(rdma_virt::id::VLkey(s.lkey)).0, ..*s }).collect();
        let mut copy = ibv_recv_wr {
            wr_id: wr.wr_id,
            next: null_mut(),
            sg_list: translated.as_mut_ptr(),
            num_sge: translated.len() as c_int,
        };
        let mut failed = null_mut();
        // SAFETY: built above; the real QP of a live shadow.
        let answer = unsafe { post(core.real, &raw mut copy, &raw mut failed) };
        if answer == 0 {
            with_sges(list, |l| core.gate.recv_posted(wr.wr_id, l, &self.polled));
        }
        answer
    }

    /// Nothing is under way any more: receives from now on are only remembered.
    pub fn close_rq(&self) {
        let mut core = self.core.lock();
        // Legal from every stage a drained QP can be in; a repetition changes nothing.
        let _ = core.gate.drain();
        let _ = core.gate.close();
    }

    /// The NIC's queues were replaced by new, empty ones: gives them every receive that has not completed.
    pub fn repost_recvs(&self) -> Result<usize, Errno> {
        let mut core = self.core.lock();
        core.gate.switch(&self.polled).map_err(|_| Errno(libc::EBUSY))?;
        self.flush(&mut core, false)
    }

    /// The stop led nowhere, the NIC's queues are the old ones: gives them the receives that were only remembered.
    /// Held sends go out with [`Self::resume`].
    pub fn reopen_rq(&self) -> Result<usize, Errno> {
        let mut core = self.core.lock();
        core.gate.abort().map_err(|_| Errno(libc::EBUSY))?;
        self.flush(&mut core, false)
    }
}

/// `context->ops.post_recv`.
pub(crate) unsafe extern "C" fn post_recv(qp: *mut ibv_qp, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
    boundary(
        // SAFETY: the caller's promise of a live QP, a list and room for a pointer.
        || unsafe {
            match ShadowQp::of(qp) {
                Some(shadow) => shadow.post_recv(wr, bad),
                None => (*crate::context::unwrap((*qp).context))
                    .ops
                    .post_recv
                    .map_or(libc::EOPNOTSUPP, |op| op(qp, wr, bad)),
            }
        },
        || libc::EIO,
    )
}
