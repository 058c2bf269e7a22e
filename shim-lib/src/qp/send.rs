//! Posting sends. The lock of the send side covers [is it suspended; translate; post; count]: whoever sets the flag
//! and then gets the lock once knows that every send of before is on the queue and counted, and every later one is
//! held.
#![expect(unsafe_code, reason = "C lists of work requests")]

use std::collections::VecDeque;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use libc::c_int;
use rdma_virt::id::{VLkey, VRkey};

use super::{MARKER, ShadowQp};
use crate::abi::{ibv_mr, ibv_qp, ibv_send_wr, ibv_sge, qp_state, send_flags, wr_opcode, wr_rdma};
use crate::entry::boundary;
use crate::errno::Errno;
use crate::ledger::{Held, sges};
use crate::tables::RemoteKeys;

/// Work requests posted by one call of the library when they have to be copied.
const CHUNK: usize = 16;

type PostOp = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;

/// What the lock of the send side protects.
pub(crate) struct SendSide {
    pub real: *mut ibv_qp,
    pub post: Option<PostOp>,
    pub suspended: bool,
    pub held: VecDeque<Held>,
    /// Signalled sends posted.
    pub signalled: u64,
    /// Sends posted since the last signalled one.
    pub trailing: u32,
    /// Sends that consume a receive at the other end.
    pub two_sided: u64,
    pub remote_keys: Option<Arc<RemoteKeys>>,
    scratch: Scratch,
}

// SAFETY: pointers to objects of the library, used under the lock.
unsafe impl Send for SendSide {}

/// Room for translated copies, so that posting allocates only the first time a QP needs them.
#[derive(Default)]
struct Scratch {
    wrs: Vec<ibv_send_wr>,
    sges: Vec<ibv_sge>,
}

/// What a list of sends adds to the counts.
#[derive(Clone, Copy, Default)]
struct Tally {
    signalled: u64,
    two_sided: u64,
    /// Unsignalled sends after the last signalled one.
    trailing: u32,
    any_signalled: bool,
    /// Something in it names an object of ours and cannot be passed on as it is.
    names_objects: bool,
}

impl Tally {
    #[inline]
    fn add(&mut self, wr: &ibv_send_wr, all_signalled: bool) {
        if all_signalled || wr.send_flags & send_flags::SIGNALED != 0 {
            self.signalled += 1;
            self.any_signalled = true;
            self.trailing = 0;
        } else {
            self.trailing += 1;
        }
        self.two_sided += u64::from(is_two_sided(wr.opcode));
        self.names_objects |= wr.opcode == wr_opcode::BIND_MW;
    }

    /// Of the list from `wr` up to `end`, which is not in it; null for all.
    #[inline]
    unsafe fn of(mut wr: *const ibv_send_wr, end: *const ibv_send_wr, all_signalled: bool) -> Self {
        let mut tally = Self::default();
        while !wr.is_null() && wr != end {
            // SAFETY: the caller's list.
            unsafe {
                tally.add(&*wr, all_signalled);
                wr = (*wr).next;
            }
        }
        tally
    }
}

/// Whether a send consumes a receive of the other end.
pub(crate) fn is_two_sided(opcode: u32) -> bool {
    matches!(
        opcode,
        wr_opcode::SEND | wr_opcode::SEND_WITH_IMM | wr_opcode::SEND_WITH_INV | wr_opcode::RDMA_WRITE_WITH_IMM
    )
}

impl SendSide {
    pub fn new(real: *mut ibv_qp, post: Option<PostOp>) -> Self {
        Self {
            real,
            post,
            suspended: false,
            held: VecDeque::new(),
            signalled: 0,
            trailing: 0,
            two_sided: 0,
            remote_keys: None,
            scratch: Scratch::default(),
        }
    }

    #[inline]
    fn count(&mut self, tally: &Tally) {
        self.signalled += tally.signalled;
        self.two_sided += tally.two_sided;
        self.trailing = if tally.any_signalled { tally.trailing } else { self.trailing + tally.trailing };
    }

    /// The QP starts a new life.
    pub fn reset(&mut self) {
        self.held.clear();
        self.signalled = 0;
        self.trailing = 0;
        self.two_sided = 0;
    }
}

impl ShadowQp {
    /// # Safety
    /// `wr` is a list of valid sends; `bad` has room for a pointer.
    #[inline]
    pub(crate) unsafe fn post_send(&self, wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
        let mut sq = self.sq.lock();
        if sq.suspended {
            // SAFETY: the caller's promise.
            return unsafe { self.hold(&mut sq, wr, bad) };
        }
        // SAFETY: the caller's list.
        let tally = unsafe { Tally::of(wr, null_mut(), self.sq_sig_all) };
        if tally.names_objects || sq.remote_keys.is_some() || self.ctx().keys.moved() {
            // SAFETY: as above.
            return unsafe { self.post_copies(&mut sq, wr, bad) };
        }
        let Some(post) = sq.post else { return libc::EOPNOTSUPP };
        let mut failed = null_mut();
        // SAFETY: the real QP of a live shadow; the caller's list.
        let answer = unsafe { post(sq.real, wr, &raw mut failed) };
        if answer == 0 {
            sq.count(&tally);
        } else {
            // SAFETY: `failed` is in the list, or null when all were posted but the doorbell failed.
            let part = unsafe { Tally::of(wr, failed, self.sq_sig_all) };
            sq.count(&part);
            if !failed.is_null() {
                // SAFETY: the caller's room.
                unsafe { *bad = failed };
            }
        }
        answer
    }

    /// Posts translated copies, a chunk at a time.
    #[cold]
    unsafe fn post_copies(&self, sq: &mut SendSide, mut wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
        while !wr.is_null() {
            let mut originals = [null_mut(); CHUNK];
            let mut n = 0;
            while n < CHUNK && !wr.is_null() {
                originals[n] = wr;
                n += 1;
                // SAFETY: the caller's list.
                wr = unsafe { (*wr).next };
            }
            // SAFETY: n entries of the caller's list.
            let items = originals[..n].iter().map(|o| unsafe { (**o, sges((**o).sg_list, (**o).num_sge)) });
            let (posted, answer) = self.post_chunk(sq, items);
            if answer != 0 {
                if posted < n {
                    // SAFETY: the caller's room.
                    unsafe { *bad = originals[posted] };
                }
                return answer;
            }
        }
        0
    }

    /// Posts up to [`CHUNK`] sends with keys and objects made physical. How many the library took, and its answer.
    fn post_chunk<'a>(
        &self,
        sq: &mut SendSide,
        items: impl Iterator<Item = (ibv_send_wr, &'a [ibv_sge])>,
    ) -> (usize, c_int) {
        let Some(post) = sq.post else { return (0, libc::EOPNOTSUPP) };
        let mut scratch = std::mem::take(&mut sq.scratch);
        scratch.wrs.clear();
        scratch.sges.clear();
        for (mut wr, list) in items.take(CHUNK) {
            // Offsets for now: the list of SGEs may still move while it grows.
            wr.sg_list = std::ptr::without_provenance_mut(scratch.sges.len());
            wr.num_sge = list.len() as c_int;
            scratch.sges.extend(list.iter().map(|s| ibv_sge { lkey: self.ctx().keys.lkey(VLkey(s.lkey)).0, ..*s }));
            self.translate(sq.remote_keys.as_deref(), &mut wr);
            scratch.wrs.push(wr);
        }
        let (wrs, list) = (scratch.wrs.as_mut_ptr(), scratch.sges.as_mut_ptr());
        let n = scratch.wrs.len();
        for i in 0..n {
            // SAFETY: i < n; offsets were taken from the length of the list.
            unsafe {
                (*wrs.add(i)).sg_list = list.add((*wrs.add(i)).sg_list.addr());
                (*wrs.add(i)).next = if i + 1 < n { wrs.add(i + 1) } else { null_mut() };
            }
        }
        let mut failed = null_mut();
        // SAFETY: a list just built; the real QP of a live shadow.
        let answer = if n == 0 { 0 } else { unsafe { post(sq.real, wrs, &raw mut failed) } };
        let posted = if answer == 0 || failed.is_null() {
            n
        } else {
            // SAFETY: the library names an entry of the list it was given.
            usize::try_from(unsafe { failed.offset_from(wrs) }).unwrap_or(0).min(n)
        };
        for wr in &scratch.wrs[..posted] {
            let mut tally = Tally::default();
            tally.add(wr, self.sq_sig_all);
            sq.count(&tally);
        }
        sq.scratch = scratch;
        (posted, answer)
    }

    fn translate(&self, remote: Option<&RemoteKeys>, wr: &mut ibv_send_wr) {
        let keys = &self.ctx().keys;
        let abroad = |key: u32| remote.map_or(key, |r| r.translate(VRkey(key)).0);
        // SAFETY: the opcode says which member of the union is in use.
        unsafe {
            match wr.opcode {
                wr_opcode::RDMA_WRITE | wr_opcode::RDMA_WRITE_WITH_IMM | wr_opcode::RDMA_READ => {
                    wr.wr.rdma.rkey = abroad(wr.wr.rdma.rkey);
                }
                wr_opcode::ATOMIC_CMP_AND_SWP | wr_opcode::ATOMIC_FETCH_AND_ADD => {
                    wr.wr.atomic.rkey = abroad(wr.wr.atomic.rkey);
                }
                wr_opcode::SEND_WITH_INV => wr.imm_data = abroad(wr.imm_data),
                wr_opcode::LOCAL_INV => wr.imm_data = keys.rkey(VRkey(wr.imm_data)).0,
                wr_opcode::BIND_MW => {
                    let mr: *mut ibv_mr = wr.tail.bind_mw.bind_info.mr;
                    wr.tail.bind_mw.bind_info.mr = crate::mr::unwrap(mr);
                }
                _ => {}
            }
        }
    }

    /// Keeps sends for later. Full, it answers as a full queue does.
    #[cold]
    unsafe fn hold(&self, sq: &mut SendSide, mut wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
        while !wr.is_null() {
            let in_flight = sq.signalled.saturating_sub(self.send_completed.load(Ordering::Acquire));
            // SAFETY: the caller's list and room.
            let answer = unsafe {
                if sq.held.len() as u64 + in_flight >= u64::from(self.cap_app.max_send_wr) {
                    libc::ENOMEM
                } else {
                    self.check(&*wr)
                }
            };
            if answer != 0 {
                // SAFETY: the caller's room.
                unsafe { *bad = wr };
                return answer;
            }
            // SAFETY: the caller's list.
            unsafe {
                let mut held = Held::new(wr);
                held.wr.next = null_mut();
                held.wr.sg_list = null_mut();
                sq.held.push_back(held);
                wr = (*wr).next;
            }
        }
        0
    }

    /// What a provider refuses at posting time has to be refused now: later nobody can be told.
    fn check(&self, wr: &ibv_send_wr) -> c_int {
        if wr.num_sge < 0 || wr.num_sge as u32 > self.cap_app.max_send_sge {
            return libc::EINVAL;
        }
        // SAFETY: num_sge was checked; the poster's list.
        let list = unsafe { sges(wr.sg_list, wr.num_sge) };
        let length: u64 = list.iter().map(|s| u64::from(s.length)).sum();
        if wr.send_flags & send_flags::INLINE != 0 && length > u64::from(self.cap_app.max_inline_data) {
            return libc::EINVAL;
        }
        if matches!(wr.opcode, wr_opcode::ATOMIC_CMP_AND_SWP | wr_opcode::ATOMIC_FETCH_AND_ADD) {
            // SAFETY: the opcode says so.
            let address = unsafe { wr.wr.atomic.remote_addr };
            if length < 8 || address & 7 != 0 {
                return libc::EINVAL;
            }
        }
        0
    }

    // ---- suspension ------------------------------------------------------------------------------------------------

    /// From now on sends are held. Returns when no thread is inside a post that saw the QP unsuspended.
    pub fn suspend(&self, deadline: Instant) -> Result<(), Errno> {
        self.sq.lock_until(deadline).ok_or(Errno(libc::ETIMEDOUT))?.suspended = true;
        Ok(())
    }

    pub fn is_suspended(&self) -> bool {
        self.sq.lock().suspended
    }

    /// Lets held sends go out in order, then ends the suspension. `Ok` is how many went; `Err` is how many are left
    /// because the queue is full, with the QP still suspended: call again when some have completed.
    pub fn resume(&self) -> Result<usize, usize> {
        let mut sq = self.sq.lock();
        let mut sent = 0;
        while !sq.held.is_empty() {
            let mut held = std::mem::take(&mut sq.held);
            let outgoing: Vec<_> = held.iter().take(CHUNK).map(|h| (h.wr, h.outgoing())).collect();
            let (posted, answer) = self.post_chunk(&mut sq, outgoing.iter().map(|(wr, s)| (*wr, s.as_slice())));
            held.drain(..posted);
            sent += posted;
            if answer == libc::ENOMEM && posted == 0 {
                let left = held.len();
                sq.held = held;
                return Err(left);
            }
            if answer != 0 && answer != libc::ENOMEM && posted == 0 {
                // Refused for good: the poster was told it was accepted, so the QP fails as it does for a request
                // the NIC finds wrong.
                held.pop_front();
                self.fail_hard();
            }
            sq.held = held;
        }
        sq.suspended = false;
        Ok(sent)
    }

    #[cold]
    fn fail_hard(&self) {
        // SAFETY: all-zero is a valid attribute struct; the real QP of a live shadow.
        unsafe {
            let mut attr: crate::abi::ibv_qp_attr = zeroed();
            attr.qp_state = qp_state::ERR;
            let _ = crate::real::verbs::modify_qp(self.real(), &raw mut attr, crate::abi::qp_mask::STATE);
        }
    }

    /// Posts a request of our own that completes after all before it, if one is needed to know that the unsignalled
    /// ones are done. `Ok(false)`: none is. `ENOMEM`: the queue is full, poll and try again.
    ///
    /// It is an empty RDMA WRITE, which the other end must allow; where the provider's send ring can be looked at
    /// ([`super::Progress::sq_empty`]) no marker is needed.
    pub fn post_marker(&self) -> Result<bool, Errno> {
        if self.progress().sq_empty.is_some() {
            return Ok(false);
        }
        let mut sq = self.sq.lock();
        if sq.trailing == 0 || self.markers.load(Ordering::Acquire) > 0 {
            return Ok(false);
        }
        let post = sq.post.ok_or(Errno(libc::EOPNOTSUPP))?;
        // SAFETY: all-zero is a valid work request.
        let mut wr: ibv_send_wr = unsafe { zeroed() };
        wr.wr_id = MARKER;
        wr.opcode = wr_opcode::RDMA_WRITE;
        wr.send_flags = send_flags::SIGNALED;
        wr.wr.rdma = wr_rdma { remote_addr: 0, rkey: 0 };
        let mut failed = null_mut();
        self.markers.fetch_add(1, Ordering::AcqRel);
        // SAFETY: built above; the real QP of a live shadow.
        let answer = unsafe { post(sq.real, &raw mut wr, &raw mut failed) };
        if answer != 0 {
            self.markers.fetch_sub(1, Ordering::AcqRel);
            return Err(Errno(answer));
        }
        sq.trailing = 0;
        Ok(true)
    }

    /// A verb other than `ibv_post_send` that posts one send. It cannot be held: while suspended the queue is full.
    pub(crate) fn post_foreign(&self, flags: u32, op: impl FnOnce(*mut ibv_qp) -> c_int) -> c_int {
        let mut sq = self.sq.lock();
        if sq.suspended {
            return libc::ENOMEM;
        }
        let answer = op(sq.real);
        if answer == 0 {
            if self.sq_sig_all || flags & send_flags::SIGNALED != 0 {
                sq.signalled += 1;
                sq.trailing = 0;
            } else {
                sq.trailing += 1;
            }
        }
        answer
    }

    /// Remote keys that changed, for this QP's remote end.
    pub fn set_remote_keys(&self, keys: Option<Arc<RemoteKeys>>) {
        self.sq.lock().remote_keys = keys;
    }
}

/// `context->ops.post_send`.
pub(crate) unsafe extern "C" fn post_send(qp: *mut ibv_qp, wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
    boundary(
        // SAFETY: the caller's promise of a live QP, a list and room for a pointer.
        || unsafe {
            match ShadowQp::of(qp) {
                Some(shadow) => shadow.post_send(wr, bad),
                None => (*crate::context::unwrap((*qp).context))
                    .ops
                    .post_send
                    .map_or(libc::EOPNOTSUPP, |op| op(qp, wr, bad)),
            }
        },
        || libc::EIO,
    )
}
