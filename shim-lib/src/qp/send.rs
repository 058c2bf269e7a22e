//! Posting sends. What to do with one is decided by the QP's [`Gate`], under the lock that also covers the call into
//! the library: whoever changes the stage under it knows that every send of before is on the queue and counted, and
//! every later one goes by the new stage.
#![expect(unsafe_code, reason = "C lists of work requests")]

use std::mem::{MaybeUninit, zeroed};
use std::ptr::null_mut;
use std::sync::Arc;
use std::time::Instant;

use libc::c_int;
use rdma_virt::gate::{Flush, Gate, Passing, SendPath};
use rdma_virt::id::{VLkey, VRkey};
use rdma_virt::wr::MARKER_WR_ID;

use super::ShadowQp;
use crate::abi::{ibv_mr, ibv_qp, ibv_recv_wr, ibv_send_wr, ibv_sge, qp_state, send_flags, wr_opcode, wr_rdma};
use crate::convert::{hold, physical, release, sges};
use crate::entry::boundary;
use crate::errno::Errno;
use crate::tables::{LocalKeys, RemoteKeys};

/// Work requests posted by one call of the library when they have to be copied.
const CHUNK: usize = 16;
/// SGEs of all of these together, but for a first one that has more.
const ELEMENTS: usize = 64;

pub(crate) type PostSend = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_send_wr, *mut *mut ibv_send_wr) -> c_int;
pub(crate) type PostRecv = unsafe extern "C" fn(*mut ibv_qp, *mut ibv_recv_wr, *mut *mut ibv_recv_wr) -> c_int;

/// What the lock of a QP protects.
pub(crate) struct Core {
    pub gate: Gate,
    /// The library's QP that posts go to.
    pub real: *mut ibv_qp,
    pub post_send: Option<PostSend>,
    pub post_recv: Option<PostRecv>,
    pub remote_keys: Option<Arc<RemoteKeys>>,
}

// SAFETY: pointers to objects of the library, used under the lock.
unsafe impl Send for Core {}

fn is_signalled(wr: &ibv_send_wr, sig_all: bool) -> bool {
    sig_all || wr.send_flags & send_flags::SIGNALED != 0
}

/// Puts physical remote keys and objects into a send.
fn translate(remote: Option<&RemoteKeys>, keys: &LocalKeys, wr: &mut ibv_send_wr) {
    let abroad = |key: u32| remote.map_or(key, |r| r.physical(VRkey(key)).0);
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
            // A region's two keys are one number where they can be invalidated at all.
            wr_opcode::LOCAL_INV => wr.imm_data = keys.physical(VLkey(wr.imm_data)).0,
            wr_opcode::BIND_MW => {
                let mr: *mut ibv_mr = wr.tail.bind_mw.bind_info.mr;
                wr.tail.bind_mw.bind_info.mr = crate::mr::unwrap(mr);
            }
            _ => {}
        }
    }
}

impl ShadowQp {
    /// # Safety
    /// `wr` is a list of valid sends; `bad` has room for a pointer.
    #[inline]
    pub(crate) unsafe fn post_send(&self, wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
        let mut guard = self.core.lock();
        let core = &mut *guard;
        let mut passing = match core.gate.send() {
            SendPath::Pass(passing) => passing,
            SendPath::Hold(_) => {
                drop(guard);
                // SAFETY: the caller's promise.
                return unsafe { self.hold_sends(wr, bad) };
            }
        };
        let Some(post) = core.post_send else { return libc::EOPNOTSUPP };
        // SAFETY: the caller's list.
        let copy = core.remote_keys.is_some() || self.ctx().keys.is_translating() || unsafe { names_objects(wr) };
        if copy {
            let to = Target { real: core.real, post, remote: core.remote_keys.as_deref(), keys: &self.ctx().keys };
            // SAFETY: as above.
            return unsafe { post_copies(&to, &mut passing, self.sq_sig_all, wr, bad) };
        }
        let mut failed = null_mut();
        // SAFETY: the real QP of a live shadow; the caller's list.
        let answer = unsafe { post(core.real, wr, &raw mut failed) };
        // On failure `failed` is in the list, or null when all were taken but the doorbell failed.
        let end = if answer == 0 { null_mut() } else { failed };
        let mut each = wr;
        while !each.is_null() && each != end {
            // SAFETY: the caller's list.
            unsafe {
                passing.posted((*each).opcode, is_signalled(&*each, self.sq_sig_all));
                each = (*each).next;
            }
        }
        if answer != 0 && !failed.is_null() {
            // SAFETY: the caller's room.
            unsafe { *bad = failed };
        }
        answer
    }

    /// Keeps sends for later. Full, it answers as a full queue does.
    #[cold]
    unsafe fn hold_sends(&self, mut wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
        let mut core = self.core.lock();
        let SendPath::Hold(mut holding) = core.gate.send() else {
            drop(core);
            // It was resumed in between.
            // SAFETY: the caller's promise.
            return unsafe { self.post_send(wr, bad) };
        };
        let datagram = self.qp_type == UD;
        while !wr.is_null() {
            // SAFETY: the caller's list.
            let answer = unsafe {
                match self.check(&*wr) {
                    0 => holding.hold(hold(&*wr, datagram)).map_or(libc::ENOMEM, |()| 0),
                    error => error,
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
        match wr.opcode {
            wr_opcode::ATOMIC_CMP_AND_SWP | wr_opcode::ATOMIC_FETCH_AND_ADD => {
                // SAFETY: the opcode says so.
                let address = unsafe { wr.wr.atomic.remote_addr };
                if length < 8 || address & 7 != 0 { libc::EINVAL } else { 0 }
            }
            // Names an object that may be gone by then. A full queue is something every poster copes with.
            wr_opcode::BIND_MW => libc::ENOMEM,
            _ => 0,
        }
    }

    /// A verb other than `ibv_post_send` that posts one send. It cannot be held: while suspended the queue is full.
    pub(crate) fn post_foreign(&self, opcode: u32, flags: u32, op: impl FnOnce(*mut ibv_qp) -> c_int) -> c_int {
        let mut guard = self.core.lock();
        let core = &mut *guard;
        let SendPath::Pass(mut passing) = core.gate.send() else { return libc::ENOMEM };
        let answer = op(core.real);
        if answer == 0 {
            passing.posted(opcode, self.sq_sig_all || flags & send_flags::SIGNALED != 0);
        }
        answer
    }

    // ---- suspension ------------------------------------------------------------------------------------------------

    /// From now on sends are held. Returns when no thread is inside a post that saw the QP unsuspended.
    pub fn suspend(&self, deadline: Instant) -> Result<(), Errno> {
        let mut core = self.core.lock_until(deadline).ok_or(Errno(libc::ETIMEDOUT))?;
        core.gate.suspend().map_err(|_| Errno(libc::EBUSY))
    }

    /// Lets held sends go out in order, then ends the suspension. `Ok` is how many went; `Err` is how many are left
    /// because the queue is full, with the QP still suspended: call again when some have completed.
    pub fn resume(&self) -> Result<usize, usize> {
        let mut core = self.core.lock();
        // Switched, or else not begun; one that is flushing already goes on.
        let _ = core.gate.resume().or_else(|_| core.gate.abort());
        match self.flush(&mut core, true) {
            Ok(sent) => Ok(sent),
            Err(_) => Err(core.gate.sends().held().max(1)),
        }
    }

    /// Gives the NIC what the gate names next: receives, and if `sends` also held sends, each oldest first.
    pub(crate) fn flush(&self, core: &mut Core, sends: bool) -> Result<usize, Errno> {
        let keys = &self.ctx().keys;
        let mut given = 0;
        loop {
            let answer = match core.gate.next_flush() {
                Flush::Done => return Ok(given),
                Flush::Receive(receive) => {
                    let post = core.post_recv.ok_or(Errno(libc::EOPNOTSUPP))?;
                    let mut list = physical(keys, receive.sges);
                    let (sg_list, num_sge) = (list.as_mut_ptr(), list.len() as c_int);
                    let mut wr = ibv_recv_wr { wr_id: receive.wr_id, next: null_mut(), sg_list, num_sge };
                    let mut failed = null_mut();
                    // SAFETY: built above; the real QP of a live shadow.
                    let answer = unsafe { post(core.real, &raw mut wr, &raw mut failed) };
                    Errno::check(answer)?;
                    core.gate.receive_flushed();
                    answer
                }
                Flush::Send(_) if !sends => return Ok(given),
                Flush::Send(held) => {
                    let post = core.post_send.ok_or(Errno(libc::EOPNOTSUPP))?;
                    let (mut wr, mut list) = release(held, keys);
                    wr.sg_list = list.as_mut_ptr();
                    translate(core.remote_keys.as_deref(), keys, &mut wr);
                    let mut failed = null_mut();
                    // SAFETY: built above; an inline payload is alive in the ledger until `send_flushed`.
                    let answer = unsafe { post(core.real, &raw mut wr, &raw mut failed) };
                    if answer == libc::ENOMEM {
                        return Err(Errno(answer));
                    }
                    core.gate.send_flushed();
                    answer
                }
            };
            if answer != 0 {
                // Refused for good, but its poster was told that it was accepted: the QP fails, as it does for a
                // request the NIC finds wrong.
                self.fail(core.real);
            }
            given += 1;
        }
    }

    #[cold]
    fn fail(&self, real: *mut ibv_qp) {
        // SAFETY: all-zero is a valid attribute struct; the real QP of a live shadow.
        unsafe {
            let mut attr: crate::abi::ibv_qp_attr = zeroed();
            attr.qp_state = qp_state::ERR;
            let _ = crate::real::verbs::modify_qp(real, &raw mut attr, crate::abi::qp_mask::STATE);
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
        let mut core = self.core.lock();
        let sends = core.gate.sends();
        if sends.trailing_unsignalled() == 0 || sends.markers_outstanding(&self.polled) > 0 {
            return Ok(false);
        }
        let post = core.post_send.ok_or(Errno(libc::EOPNOTSUPP))?;
        // SAFETY: all-zero is a valid work request.
        let mut wr: ibv_send_wr = unsafe { zeroed() };
        wr.wr_id = MARKER_WR_ID;
        wr.opcode = wr_opcode::RDMA_WRITE;
        wr.send_flags = send_flags::SIGNALED;
        wr.wr.rdma = wr_rdma { remote_addr: 0, rkey: 0 };
        let mut failed = null_mut();
        // SAFETY: built above; the real QP of a live shadow.
        Errno::check(unsafe { post(core.real, &raw mut wr, &raw mut failed) })?;
        core.gate.marker_posted();
        Ok(true)
    }

    /// Remote keys that changed, for this QP's remote end.
    pub fn set_remote_keys(&self, keys: Option<Arc<RemoteKeys>>) {
        self.core.lock().remote_keys = keys.filter(|k| !k.is_identity());
    }
}

/// `enum ibv_qp_type`.
const UD: u32 = 4;

/// Whether something in the list names an object of ours and cannot be passed on as it is.
unsafe fn names_objects(mut wr: *const ibv_send_wr) -> bool {
    while !wr.is_null() {
        // SAFETY: the caller's list.
        unsafe {
            if (*wr).opcode == wr_opcode::BIND_MW {
                return true;
            }
            wr = (*wr).next;
        }
    }
    false
}

/// Where copies go, and what is translated on the way.
struct Target<'a> {
    real: *mut ibv_qp,
    post: PostSend,
    remote: Option<&'a RemoteKeys>,
    keys: &'a LocalKeys,
}

/// Posts translated copies, a chunk at a time. They lie on the stack: memory of each QP's own would be written by every
/// post, and a process with many QPs would have all of it to copy when it moves.
#[cold]
unsafe fn post_copies(
    to: &Target<'_>,
    passing: &mut Passing<'_>,
    sig_all: bool,
    mut wr: *mut ibv_send_wr,
    bad: *mut *mut ibv_send_wr,
) -> c_int {
    let mut copies = [const { MaybeUninit::<ibv_send_wr>::uninit() }; CHUNK];
    let mut elements = [const { MaybeUninit::<ibv_sge>::uninit() }; ELEMENTS];
    let element: *mut ibv_sge = elements.as_mut_ptr().cast();
    // Of a first request that has more.
    let mut many: Vec<ibv_sge> = Vec::new();
    while !wr.is_null() {
        let mut originals = [null_mut(); CHUNK];
        let (mut n, mut used) = (0, 0);
        while n < CHUNK && !wr.is_null() {
            // SAFETY: the caller's list.
            let mut copy = unsafe { *wr };
            // SAFETY: the caller's SGEs.
            let list = unsafe { sges(copy.sg_list, copy.num_sge) };
            let translated = list.iter().map(|s| ibv_sge { lkey: to.keys.physical(VLkey(s.lkey)).0, ..*s });
            if list.len() <= ELEMENTS - used {
                // SAFETY: there is room for so many from here on.
                copy.sg_list = unsafe { element.add(used) };
                for one in translated {
                    // SAFETY: as above.
                    unsafe { element.add(used).write(one) };
                    used += 1;
                }
            } else if n == 0 {
                many.clear();
                many.extend(translated);
                copy.sg_list = many.as_mut_ptr();
            } else {
                break;
            }
            translate(to.remote, to.keys, &mut copy);
            copies[n].write(copy);
            originals[n] = wr;
            n += 1;
            // SAFETY: the caller's list.
            wr = unsafe { (*wr).next };
        }
        let wrs: *mut ibv_send_wr = copies.as_mut_ptr().cast();
        for i in 0..n {
            // SAFETY: i < n, and n were written above.
            unsafe { (*wrs.add(i)).next = if i + 1 < n { wrs.add(i + 1) } else { null_mut() } };
        }
        let mut failed = null_mut();
        // SAFETY: a list just built; the real QP of a live shadow.
        let answer = unsafe { (to.post)(to.real, wrs, &raw mut failed) };
        let taken = if answer == 0 || failed.is_null() {
            n
        } else {
            // SAFETY: the library names an entry of the list it was given.
            usize::try_from(unsafe { failed.offset_from(wrs) }).unwrap_or(0).min(n)
        };
        // SAFETY: taken <= n, and n were written.
        for wr in unsafe { std::slice::from_raw_parts(wrs, taken) } {
            passing.posted(wr.opcode, is_signalled(wr, sig_all));
        }
        if answer != 0 {
            if taken < n {
                // SAFETY: the caller's room.
                unsafe { *bad = originals[taken] };
            }
            return answer;
        }
    }
    0
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use rdma_virt::id::{PLkey, PRkey};
    use rdma_virt::sendq::{Polled, SendQ};

    use super::*;

    /// What came of one call: `wr_id`, and of each SGE address and key.
    type Posted = Vec<(u64, Vec<(u64, u32)>)>;

    thread_local! {
        static CALLS: RefCell<Vec<Posted>> = const { RefCell::new(Vec::new()) };
    }

    const REFUSED: u64 = 1000;

    /// Takes everything up to the request with that number.
    unsafe extern "C" fn take(_: *mut ibv_qp, mut wr: *mut ibv_send_wr, bad: *mut *mut ibv_send_wr) -> c_int {
        let mut posted = Posted::new();
        let mut answer = 0;
        while !wr.is_null() {
            // SAFETY: the list and the room of whoever calls.
            unsafe {
                if (*wr).wr_id == REFUSED {
                    *bad = wr;
                    answer = libc::ENOMEM;
                    break;
                }
                let list = sges((*wr).sg_list, (*wr).num_sge);
                posted.push(((*wr).wr_id, list.iter().map(|s| (s.addr, s.lkey)).collect()));
                wr = (*wr).next;
            }
        }
        CALLS.with_borrow_mut(|calls| calls.push(posted));
        answer
    }

    /// Posts requests with these numbers, and so many SGEs each. What was posted, call by call, how many were counted, and
    /// which request was told to be refused.
    fn post(requests: &[(u64, usize)]) -> (Vec<Posted>, u64, Option<usize>) {
        let keys = LocalKeys::new();
        keys.insert(VLkey(7 << 8), PLkey(9 << 8), VRkey(7 << 8), PRkey(9 << 8));
        let mut lists: Vec<Vec<ibv_sge>> = requests
            .iter()
            .map(|(id, n)| (0..*n as u64).map(|i| ibv_sge { addr: id * 100 + i, length: 1, lkey: 7 << 8 }).collect())
            .collect();
        // SAFETY: all-zero is a valid work request.
        let mut wrs: Vec<ibv_send_wr> = requests.iter().map(|_| unsafe { zeroed() }).collect();
        let first = wrs.as_mut_ptr();
        for (i, (wr, list)) in wrs.iter_mut().zip(&mut lists).enumerate() {
            wr.wr_id = requests[i].0;
            wr.opcode = wr_opcode::SEND;
            wr.sg_list = list.as_mut_ptr();
            wr.num_sge = list.len() as c_int;
            // SAFETY: the next one is in the vector.
            wr.next = if i + 1 < requests.len() { unsafe { first.add(i + 1) } } else { null_mut() };
        }
        let mut gate = Gate::new(SendQ::new(64), None, false);
        let to = Target { real: null_mut(), post: take, remote: None, keys: &keys };
        let mut bad = null_mut();
        let SendPath::Pass(mut passing) = gate.send() else { panic!("it is not suspended") };
        CALLS.take();
        // SAFETY: a valid list and room for a pointer.
        let answer = unsafe { post_copies(&to, &mut passing, true, first, &raw mut bad) };
        assert_eq!(answer != 0, !bad.is_null());
        let refused = (0..requests.len()).find(|i| std::ptr::eq(first.wrapping_add(*i), bad));
        (CALLS.take(), gate.sends().outstanding(&Polled::default()), refused)
    }

    /// As [`post`] is to hand it on.
    fn copy((id, n): (u64, usize)) -> (u64, Vec<(u64, u32)>) {
        (id, (0..n as u64).map(|i| (id * 100 + i, 9 << 8)).collect())
    }

    #[test]
    fn copies_are_all_of_what_was_posted_in_order_with_physical_keys_however_many_sges_there_are() {
        for lens in [vec![1; 40], vec![0], vec![70], vec![1, 70, 2, 64, 3, 65, 65, 1], vec![30; 9]] {
            let requests: Vec<(u64, usize)> = (1..).zip(lens).collect();
            let (calls, counted, refused) = post(&requests);
            assert!(calls.iter().all(|call| (1..=CHUNK).contains(&call.len())));
            assert_eq!(calls.concat(), requests.iter().map(|r| copy(*r)).collect::<Posted>());
            assert_eq!((counted, refused), (requests.len() as u64, None));
        }
    }

    #[test]
    fn the_application_is_told_its_own_request_that_was_refused_and_those_before_are_counted() {
        for before in [0, 3, CHUNK, CHUNK + 5] {
            let mut requests: Vec<(u64, usize)> = (1..=before as u64).map(|id| (id, 2)).collect();
            requests.extend([(REFUSED, 1), (REFUSED + 1, 1)]);
            let (calls, counted, refused) = post(&requests);
            assert_eq!(calls.concat(), requests[..before].iter().map(|r| copy(*r)).collect::<Posted>());
            assert_eq!((counted, refused), (before as u64, Some(before)));
        }
    }
}
