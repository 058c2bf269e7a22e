//! The second QP a peer makes beside the first when its remote end moves, and the change-over. Both carry the same
//! completion queues, PD and SRQ, so that for the application there is one QP all the time.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_virt::id::{PGid, PQpn};
use rdma_virt::saved::{QpPhase, Remote};

use super::life::raw_cap;
use super::{RealQp, ShadowQp};
use crate::abi::ibv_qp_init_attr;
use crate::errno::Errno;
use crate::provider;
use crate::real::verbs;
use crate::tables::RemoteKeys;

impl ShadowQp {
    /// A new QP like this one, on the present CQs, PD and SRQ, in RESET. Its events lead here.
    pub(super) fn make_equal(&self) -> Result<RealQp, Errno> {
        let mut ask = ibv_qp_init_attr {
            qp_context: std::ptr::from_ref(self).cast_mut().cast(),
            send_cq: self.send_cq().real(),
            recv_cq: self.recv_cq().real(),
            srq: self.srq().map_or(null_mut(), |s| s.real()),
            cap: raw_cap(&self.cap_asked),
            qp_type: self.qp_type,
            sq_sig_all: i32::from(self.sq_sig_all),
        };
        provider::rxe::record_maps();
        // SAFETY: real objects of live shadows.
        let made = unsafe { verbs::create_qp(self.pd().real(), &raw mut ask) };
        let maps = provider::rxe::take_maps();
        let qp = made?;
        if qp.is_null() {
            return Err(Errno::last());
        }
        let (rq_map, sq_map) = match (maps.as_slice(), self.srq().is_some()) {
            ([sq], true) => (None, Some(*sq)),
            ([rq, sq], false) => (Some(*rq), Some(*sq)),
            _ => (None, None),
        };
        // SAFETY: the QP just made.
        unsafe { (*qp).qp_context = std::ptr::from_ref(self).cast_mut().cast() };
        Ok(RealQp { qp, sq_map, rq_map })
    }

    /// Makes the second QP, in INIT, if there is none yet; its number.
    pub fn make_second(&self) -> Result<PQpn, Errno> {
        if let Some(second) = self.links().second {
            // SAFETY: live until drop_second.
            return Ok(PQpn(unsafe { (*second.qp).qp_num }));
        }
        let made = self.make_equal()?;
        let (mut init, mask) = self.steps((PGid([0; 16]), PQpn(0)), 0, 0)[0];
        // SAFETY: the QP just made.
        unsafe {
            if let Err(e) = verbs::modify_qp(made.qp, &raw mut init, mask).and_then(Errno::check) {
                let _ = verbs::destroy_qp(made.qp);
                return Err(e);
            }
            let pqpn = (*made.qp).qp_num;
            // Its completions, should there be any, are this QP's.
            self.ctx().qpns.insert(PQpn(pqpn), self);
            self.links().second = Some(made);
            Ok(PQpn(pqpn))
        }
    }

    pub fn second(&self) -> Option<RealQp> {
        self.links().second
    }

    /// Connects the second QP, as far as the first one is.
    pub fn connect_second(&self, gid: PGid, qpn: PQpn, sq_psn: u32, rq_psn: u32) -> Result<(), Errno> {
        let second = self.second().ok_or(Errno(libc::ENOENT))?;
        let [_, (mut rtr, rtr_mask), (mut rts, rts_mask)] = self.steps((gid, qpn), sq_psn, rq_psn);
        // SAFETY: the second QP lives until drop_second, which control calls after this.
        unsafe {
            verbs::modify_qp(second.qp, &raw mut rtr, rtr_mask).and_then(Errno::check)?;
            if self.attr().phase == QpPhase::Rts {
                verbs::modify_qp(second.qp, &raw mut rts, rts_mask).and_then(Errno::check)?;
            }
        }
        Ok(())
    }

    /// The second QP carries the traffic from now on; the first is kept until [`Self::destroy_old`]. The caller has
    /// this QP suspended and drained, and re-posts receives afterwards.
    pub fn swap_to_second(&self, remote: Remote, keys: Option<Arc<RemoteKeys>>) -> Result<(), Errno> {
        let second = {
            let mut links = self.links();
            let second = links.second.take().ok_or(Errno(libc::ENOENT))?;
            let old = std::mem::replace(&mut links.now, second);
            links.old.push(old);
            second
        };
        {
            let mut core = self.core.lock();
            self.real.store(second.qp, Ordering::Release);
            core.real = second.qp;
        }
        self.set_remote_keys(keys);
        self.set_remote(Some(remote));
        Ok(())
    }

    /// Gives the second QP up.
    pub fn drop_second(&self) {
        let second = self.links().second.take();
        if let Some(second) = second {
            self.end(second);
        }
    }

    /// Destroys QPs left behind by change-overs. Their completions have been taken before.
    pub fn destroy_old(&self) {
        let old = std::mem::take(&mut self.links().old);
        for one in old {
            self.end(one);
        }
    }

    fn end(&self, one: RealQp) {
        // SAFETY: taken out of the links, so nobody else knows it any more.
        unsafe {
            let pqpn = (*one.qp).qp_num;
            // Directly, never through ERR: that would flush completions into the application's CQ.
            if verbs::destroy_qp(one.qp).and_then(Errno::check).is_ok() {
                self.ctx().qpns.remove(PQpn(pqpn), self, self.vqpn());
            }
        }
    }
}
