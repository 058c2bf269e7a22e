//! Posting receives. Each is remembered until its completion is seen, so that those the NIC never used can be given to
//! another one.
#![expect(unsafe_code, reason = "C lists of work requests")]

use std::ptr::null_mut;

use libc::c_int;
use rdma_virt::id::VLkey;

use super::ShadowQp;
use crate::abi::{ibv_qp, ibv_recv_wr, ibv_sge};
use crate::entry::boundary;
use crate::errno::Errno;
use crate::ledger::{Recv, RecvQueue};
use crate::tables::KeyMaps;

type PostOp = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;

/// What the lock of the receive side protects.
pub(crate) struct RecvSide {
    pub real: *mut ibv_qp,
    pub post: Option<PostOp>,
    /// Receives are only remembered: the real queue is at its end.
    pub closed: bool,
    pub ledger: RecvQueue,
}

// SAFETY: pointers to objects of the library, used under the lock.
unsafe impl Send for RecvSide {}

/// A receive's SGEs with the keys the NIC knows.
pub(crate) fn physical(keys: &KeyMaps, list: &[ibv_sge]) -> Vec<ibv_sge> {
    list.iter().map(|s| ibv_sge { lkey: keys.lkey(VLkey(s.lkey)).0, ..*s }).collect()
}

impl ShadowQp {
    /// # Safety
    /// `wr` is a list of valid receives; `bad` has room for a pointer.
    #[inline]
    pub(crate) unsafe fn post_recv(&self, wr: *mut ibv_recv_wr, bad: *mut *mut ibv_recv_wr) -> c_int {
        let mut rq = self.rq.lock();
        let Some(post) = rq.post else { return libc::EOPNOTSUPP };
        if rq.closed || self.srq().is_some() || self.ctx().keys.moved() {
            // SAFETY: the caller's promise.
            return unsafe { self.post_recv_one_by_one(&mut rq, post, wr, bad) };
        }
        let mut added = 0;
        let mut each = wr;
        while !each.is_null() {
            // SAFETY: the caller's list.
            unsafe {
                if (*each).num_sge > self.cap_app.max_recv_sge as c_int {
                    // The library will refuse it; do not copy what may not be there.
                    break;
                }
                rq.ledger.push_posted(Recv::new(each));
                each = (*each).next;
            }
            added += 1;
        }
        let mut failed = null_mut();
        // SAFETY: the real QP of a live shadow; the caller's list.
        let answer = unsafe { post(rq.real, wr, &raw mut failed) };
        if answer != 0 && !failed.is_null() {
            let mut taken = 0;
            let mut each = wr;
            while !each.is_null() && each != failed {
                taken += 1;
                // SAFETY: the caller's list.
                each = unsafe { (*each).next };
            }
            rq.ledger.take_back(added - taken.min(added));
            // SAFETY: the caller's room.
            unsafe { *bad = failed };
        }
        answer
    }

    #[cold]
    unsafe fn post_recv_one_by_one(
        &self,
        rq: &mut RecvSide,
        post: PostOp,
        mut wr: *mut ibv_recv_wr,
        bad: *mut *mut ibv_recv_wr,
    ) -> c_int {
        while !wr.is_null() {
            // SAFETY: the caller's list and room.
            let answer = unsafe {
                if self.srq().is_some() || (*wr).num_sge > self.cap_app.max_recv_sge as c_int {
                    libc::EINVAL
                } else if rq.closed {
                    if rq.ledger.len() >= self.cap_app.max_recv_wr as usize {
                        libc::ENOMEM
                    } else {
                        rq.ledger.push_waiting(Recv::new(wr));
                        0
                    }
                } else {
                    let recv = Recv::new(wr);
                    let answer = self.give(rq.real, post, &recv);
                    if answer == 0 {
                        rq.ledger.push_posted(recv);
                    }
                    answer
                }
            };
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

    /// Gives one receive to a real QP.
    fn give(&self, real: *mut ibv_qp, post: PostOp, recv: &Recv) -> c_int {
        let mut list = physical(&self.ctx().keys, recv.sges.as_slice());
        let mut wr = ibv_recv_wr {
            wr_id: recv.wr_id,
            next: null_mut(),
            sg_list: list.as_mut_ptr(),
            num_sge: list.len() as c_int,
        };
        let mut failed = null_mut();
        // SAFETY: built above; a live real QP.
        unsafe { post(real, &raw mut wr, &raw mut failed) }
    }

    /// Receives from now on are only remembered.
    pub fn close_rq(&self) {
        self.rq.lock().closed = true;
    }

    /// Gives every receive that has not completed to the present real QP, which has none yet, and opens again.
    pub fn repost_recvs(&self) -> Result<usize, Errno> {
        self.rq.lock().ledger.forget_posting();
        self.reopen_rq()
    }

    /// Gives the receives that were only remembered to the present real QP, and opens again.
    pub fn reopen_rq(&self) -> Result<usize, Errno> {
        let mut rq = self.rq.lock();
        let post = rq.post.ok_or(Errno(libc::EOPNOTSUPP))?;
        let mut given = 0;
        while let Some(recv) = rq.ledger.next_waiting().cloned() {
            Errno::check(self.give(rq.real, post, &recv))?;
            rq.ledger.mark_posted();
            given += 1;
        }
        rq.closed = false;
        Ok(given)
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
