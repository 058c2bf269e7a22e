//! The second QP a peer makes beside the first when its remote end moves, and the change-over. Both carry the same
//! completion queues, PD and SRQ, so that for the application there is one QP all the time.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdma_virt::id::{PGid, PQpn, VGid, VQpn};
use rdma_virt::saved::{QpAttr, QpPhase, Remote};

use super::life::raw_cap;
use super::{RealQp, ShadowQp};
use crate::abi::{ibv_qp, ibv_qp_attr, ibv_qp_init_attr, qp_mask, qp_state};
use crate::errno::Errno;
use crate::provider;
use crate::real::verbs;
use crate::tables::RemoteKeys;

/// The QP beside the first one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Second {
    real: RealQp,
    /// Where the first one led when this was made: if it leads elsewhere later, this one is of no use.
    beside: Option<(VGid, VQpn)>,
    /// How far it is.
    reached: QpPhase,
    /// The application's attributes it was brought there with.
    attr: QpAttr,
    link: Option<Link>,
}

/// What a QP is connected with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub gid: PGid,
    pub qpn: PQpn,
    /// First PSN this end sends with, and the one it expects. 24 bits.
    pub sq_psn: u32,
    pub rq_psn: u32,
}

/// What became of a change-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swapped {
    /// The second QP carries the traffic.
    Yes,
    /// The application has reset the QP, or it failed, or it is connected elsewhere by now: it stays as it is.
    NotConnected,
}

pub(super) fn is_connected(phase: QpPhase) -> bool {
    matches!(phase, QpPhase::Rtr | QpPhase::Rts | QpPhase::Sqd)
}

/// Attributes that only name a state.
pub(super) fn bare(state: u32) -> ibv_qp_attr {
    // SAFETY: all-zero is a valid attribute struct.
    let mut attr: ibv_qp_attr = unsafe { std::mem::zeroed() };
    attr.qp_state = state;
    attr
}

/// # Safety
/// A live QP of the library's.
pub(super) unsafe fn modify(qp: *mut ibv_qp, attr: &mut ibv_qp_attr, mask: i32) -> Result<(), Errno> {
    // SAFETY: the caller's promise; attributes of ours.
    unsafe { verbs::modify_qp(qp, attr, mask).and_then(Errno::check) }
}

impl Second {
    pub fn is(&self, real: *mut ibv_qp) -> bool {
        self.real.qp == real
    }

    /// Goes on from where it is to where the first one is, and as the first one has been set since.
    fn follow(&mut self, first: &ShadowQp) -> Result<(), Errno> {
        let known = first.attr();
        let Some(link) = self.link.filter(|_| is_connected(known.phase)) else { return Ok(()) };
        let [(mut init, init_mask), ..] = first.steps((PGid([0; 16]), PQpn(0)), 0, 0);
        if self.attr != known.attr || (known.phase as u8) < self.reached as u8 {
            // SAFETY: live as long as it is one of the links.
            unsafe {
                modify(self.real.qp, &mut bare(qp_state::RESET), qp_mask::STATE)?;
                self.reached = QpPhase::Reset;
            }
        }
        if self.reached == QpPhase::Reset {
            // SAFETY: as above.
            unsafe { modify(self.real.qp, &mut init, init_mask)? };
            self.reached = QpPhase::Init;
        }
        self.attr = known.attr;
        // SAFETY: as above.
        unsafe { first.climb(self.real.qp, &link, known.phase, &mut self.reached) }
    }
}

impl ShadowQp {
    /// Takes a QP of ours from INIT or later up to `phase`. `reached` is how far it is, and is kept up to date also when
    /// a step fails; the next try goes on from there.
    ///
    /// # Safety
    /// A live QP of the library's, equal to this one.
    pub(super) unsafe fn climb(
        &self,
        qp: *mut ibv_qp,
        link: &Link,
        phase: QpPhase,
        reached: &mut QpPhase,
    ) -> Result<(), Errno> {
        let [_, (rtr, rtr_mask), (rts, rts_mask)] = self.steps((link.gid, link.qpn), link.sq_psn, link.rq_psn);
        let steps = [
            (QpPhase::Rtr, rtr, rtr_mask),
            (QpPhase::Rts, rts, rts_mask),
            (QpPhase::Sqd, bare(qp_state::SQD), qp_mask::STATE),
        ];
        for (step, mut attr, mask) in steps {
            if (*reached as u8) < step as u8 && step as u8 <= phase as u8 {
                // SAFETY: the caller's promise.
                unsafe { modify(qp, &mut attr, mask)? };
                *reached = step;
            }
        }
        Ok(())
    }

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
            return Ok(PQpn(unsafe { (*second.real.qp).qp_num }));
        }
        let made = self.make_equal()?;
        let (mut init, mask) = self.steps((PGid([0; 16]), PQpn(0)), 0, 0)[0];
        // SAFETY: the QP just made.
        unsafe {
            if let Err(e) = modify(made.qp, &mut init, mask) {
                let _ = verbs::destroy_qp(made.qp);
                return Err(e);
            }
            let pqpn = (*made.qp).qp_num;
            // Its completions, should there be any, are this QP's.
            self.ctx().qpns.insert(PQpn(pqpn), self);
            let known = self.attr();
            let beside = known.remote.map(|r| (r.vgid, r.vqpn));
            let second = Second { real: made, beside, reached: QpPhase::Init, attr: known.attr, link: None };
            self.links().second = Some(second);
            Ok(PQpn(pqpn))
        }
    }

    /// Connects the second QP, as far as the first one is.
    pub fn connect_second(&self, gid: PGid, qpn: PQpn, sq_psn: u32, rq_psn: u32) -> Result<(), Errno> {
        let mut second = self.links().second.ok_or(Errno(libc::ENOENT))?;
        second.link = Some(Link { gid, qpn, sq_psn, rq_psn });
        let done = second.follow(self);
        self.links().second = Some(second);
        done
    }

    /// The second QP carries the traffic from now on; the first is kept until [`Self::destroy_old`]. The caller has
    /// this QP suspended and drained, keeps the application out of control verbs, and re-posts receives afterwards.
    pub fn swap_to_second(&self, remote: Remote, keys: Option<Arc<RemoteKeys>>) -> Result<Swapped, Errno> {
        let mut second = self.links().second.ok_or(Errno(libc::ENOENT))?;
        let known = self.attr();
        if !is_connected(known.phase) || known.remote.map(|r| (r.vgid, r.vqpn)) != second.beside {
            self.drop_second();
            return Ok(Swapped::NotConnected);
        }
        // What the application did with the first one meanwhile is done with this one, too.
        let followed = second.follow(self);
        {
            let mut links = self.links();
            links.second = Some(second);
            followed?;
        }
        // Before its reports are taken for those of the first one.
        self.made_anew();
        {
            let mut links = self.links();
            links.second = None;
            let old = std::mem::replace(&mut links.now, second.real);
            links.old.push(old);
        }
        {
            let mut core = self.core.lock();
            self.real.store(second.real.qp, Ordering::Release);
            core.real = second.real.qp;
        }
        self.set_remote_keys(keys);
        self.set_remote(Some(remote));
        let announced = second.link.filter(|_| known.phase == QpPhase::Rtr).map(|l| l.sq_psn);
        self.announce_psn(announced);
        Ok(Swapped::Yes)
    }

    /// Gives the second QP up.
    pub fn drop_second(&self) {
        let second = self.links().second;
        if let Some(second) = second {
            self.end(second.real);
            self.links().second = None;
        }
    }

    /// Destroys QPs left behind by change-overs. Their completions and events have been taken before.
    pub fn destroy_old(&self) {
        let old = self.links().old.clone();
        for one in old {
            self.end(one);
        }
        self.links().old.clear();
    }

    /// It is one of the links until it is gone: whoever has just read an event about it finds whose it is.
    fn end(&self, one: RealQp) {
        // SAFETY: nobody but the caller ends it; its end waits for an event that was read.
        unsafe {
            let pqpn = (*one.qp).qp_num;
            // Directly, never through ERR: that would flush completions into the application's CQ.
            if verbs::destroy_qp(one.qp).and_then(Errno::check).is_ok() {
                self.ctx().qpns.remove(PQpn(pqpn), self, self.vqpn());
            }
        }
    }
}
