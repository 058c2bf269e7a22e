//! A queue pair made again where the process lives now. The library's old one belongs to another host: it is forgotten,
//! not destroyed.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::sync::atomic::Ordering;

use rdma_virt::id::{PGid, PQpn};
use rdma_virt::saved::{QpPhase, QueueMap, Remote};

use super::second::{Link, bare, is_connected, modify};
use super::{RealQp, ShadowQp};
use crate::abi::{qp_mask, qp_state};
use crate::errno::Errno;
use crate::real::verbs;

impl ShadowQp {
    /// Stands for a new QP of the present device from now on, as far up as it gets without a remote end. Returns where
    /// the old one's queues were mapped.
    pub fn rebuild(&self) -> Result<[Option<QueueMap>; 2], Errno> {
        let made = self.make_equal()?;
        if let Err(e) = self.settle_alone(&made) {
            // SAFETY: just made, known to nobody else.
            let _ = unsafe { verbs::destroy_qp(made.qp) };
            return Err(e);
        }
        self.made_anew();
        let (before, this) = (self.pqpn(), std::ptr::from_ref(self));
        let old = {
            let mut links = self.links();
            links.second = None;
            links.old.clear();
            std::mem::replace(&mut links.now, made)
        };
        {
            let mut core = self.core.lock();
            self.real.store(made.qp, Ordering::Release);
            core.real = made.qp;
            // SAFETY: the real context of a live shadow.
            let ops = unsafe { &(*self.ctx().real()).ops };
            (core.post_send, core.post_recv) = (ops.post_send, ops.post_recv);
        }
        self.ctx().qpns.remove(before, this, self.vqpn());
        self.ctx().qpns.insert(self.pqpn(), this);
        Ok([old.sq_map, old.rq_map])
    }

    fn settle_alone(&self, made: &RealQp) -> Result<(), Errno> {
        let phase = self.attr().phase;
        if phase == QpPhase::Reset {
            return Ok(());
        }
        let (mut init, mask) = self.steps((PGid([0; 16]), PQpn(0)), 0, 0)[0];
        // One that failed in RESET was never given a port.
        init.port_num = init.port_num.max(1);
        // SAFETY: just made.
        unsafe {
            modify(made.qp, &mut init, mask)?;
            match phase {
                QpPhase::Err => modify(made.qp, &mut bare(qp_state::ERR), qp_mask::STATE),
                // A way out of SQE is known for UD only.
                QpPhase::Sqe => Err(Errno(libc::EOPNOTSUPP)),
                _ => Ok(()),
            }
        }
    }

    /// Connects the QP that [`Self::rebuild`] made, as far up as the old one was; `reached` as in [`Self::climb`].
    pub fn join(&self, remote: Remote, sq_psn: u32, rq_psn: u32, reached: &mut QpPhase) -> Result<(), Errno> {
        let phase = self.attr().phase;
        if !is_connected(phase) {
            return Err(Errno(libc::EINVAL));
        }
        let link = Link { gid: remote.pgid, qpn: remote.pqpn, sq_psn, rq_psn };
        // SAFETY: the real QP of a shadow that is not dead.
        unsafe { self.climb(self.real(), &link, phase, reached)? };
        self.set_remote(Some(remote));
        self.announce_psn((phase == QpPhase::Rtr).then_some(sq_psn));
        Ok(())
    }
}
