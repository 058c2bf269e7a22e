//! `ibv_wr_*`: work requests built call by call. They are collected here and posted as a list when the batch is
//! complete, through the same path as every other send, so that all of translation, counting and holding applies.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::mem::zeroed;
use std::ptr::null_mut;

use libc::{c_int, c_void};

use super::ShadowQp;
use crate::abi::{
    ibv_ah, ibv_data_buf, ibv_mw, ibv_mw_bind_info, ibv_qp, ibv_qp_ex, ibv_send_wr, ibv_sge, send_flags, send_ops,
    wr_atomic, wr_bind_mw, wr_opcode, wr_rdma, wr_ud,
};
use crate::entry::boundary;

/// Builders that every request goes through one by one; what is not in here (TSO, flush, atomic write, XRC) has no form
/// that could be posted as a list, and a QP made for it stays the library's.
pub(crate) const SUPPORTED: u64 = send_ops::RDMA_WRITE
    | send_ops::RDMA_WRITE_WITH_IMM
    | send_ops::SEND
    | send_ops::SEND_WITH_IMM
    | send_ops::RDMA_READ
    | send_ops::ATOMIC_CMP_AND_SWP
    | send_ops::ATOMIC_FETCH_AND_ADD
    | send_ops::LOCAL_INV
    | send_ops::BIND_MW
    | send_ops::SEND_WITH_INV;

/// A batch being built.
#[derive(Default)]
pub(crate) struct Builder {
    installed: bool,
    /// From `wr_start` to `wr_complete` or `wr_abort` one thread's: the providers hold their queue's lock so long.
    busy: bool,
    wrs: Vec<ibv_send_wr>,
    /// SGEs of all requests; a request's `sg_list` is an index into it until the batch is posted.
    sges: Vec<ibv_sge>,
    /// Inline payloads; their SGEs' `addr` is an offset into it until then.
    inline: Vec<u8>,
    error: c_int,
}

// SAFETY: pointers to objects the application keeps alive while it builds.
unsafe impl Send for Builder {}

pub(crate) fn installed(qp: &ShadowQp) -> bool {
    qp.builder.lock().installed
}

/// Gives a QP that is not handed out yet the builders asked for.
pub(super) fn install(qp: &ShadowQp, ops: u64) {
    qp.builder.lock().installed = true;
    let ex = qp.visible_ex();
    let on = |bit: u64| ops & bit != 0;
    // SAFETY: not handed out yet.
    unsafe {
        (*ex).wr_rdma_write = on(send_ops::RDMA_WRITE).then_some(rdma_write as _);
        (*ex).wr_rdma_write_imm = on(send_ops::RDMA_WRITE_WITH_IMM).then_some(rdma_write_imm as _);
        (*ex).wr_send = on(send_ops::SEND).then_some(send as _);
        (*ex).wr_send_imm = on(send_ops::SEND_WITH_IMM).then_some(send_imm as _);
        (*ex).wr_send_inv = on(send_ops::SEND_WITH_INV).then_some(send_inv as _);
        (*ex).wr_rdma_read = on(send_ops::RDMA_READ).then_some(rdma_read as _);
        (*ex).wr_atomic_cmp_swp = on(send_ops::ATOMIC_CMP_AND_SWP).then_some(cmp_swp as _);
        (*ex).wr_atomic_fetch_add = on(send_ops::ATOMIC_FETCH_AND_ADD).then_some(fetch_add as _);
        (*ex).wr_local_inv = on(send_ops::LOCAL_INV).then_some(local_inv as _);
        (*ex).wr_bind_mw = on(send_ops::BIND_MW).then_some(bind_mw as _);
        (*ex).wr_set_ud_addr = Some(set_ud_addr);
        (*ex).wr_set_inline_data = Some(set_inline_data);
        (*ex).wr_set_inline_data_list = Some(set_inline_data_list);
        (*ex).wr_set_sge = Some(set_sge);
        (*ex).wr_set_sge_list = Some(set_sge_list);
        (*ex).wr_start = Some(start);
        (*ex).wr_complete = Some(complete);
        (*ex).wr_abort = Some(abort);
    }
}

/// # Safety
/// `qp` is a shadow that [`install`] was called on.
unsafe fn of<'a>(qp: *mut ibv_qp_ex) -> Option<&'a ShadowQp> {
    // SAFETY: the caller's promise; the plain QP is the first member.
    unsafe { ShadowQp::of(qp.cast::<ibv_qp>()) }
}

/// Starts a new request of the batch.
fn add(qp: *mut ibv_qp_ex, opcode: u32, fill: impl FnOnce(&mut ibv_send_wr)) {
    boundary(
        // SAFETY: called through a builder we installed.
        || unsafe {
            let Some(shadow) = of(qp) else { return };
            let mut wr: ibv_send_wr = zeroed();
            wr.wr_id = (*qp).wr_id;
            wr.send_flags = (*qp).wr_flags;
            wr.opcode = opcode;
            fill(&mut wr);
            let mut b = shadow.builder.lock();
            wr.sg_list = std::ptr::without_provenance_mut(b.sges.len());
            b.wrs.push(wr);
        },
        || (),
    );
}

/// Changes the request started last.
fn change(qp: *mut ibv_qp_ex, with: impl FnOnce(&mut Builder, &mut ibv_send_wr, &ShadowQp)) {
    boundary(
        // SAFETY: called through a builder we installed.
        || unsafe {
            let Some(shadow) = of(qp) else { return };
            let mut b = shadow.builder.lock();
            if let Some(mut wr) = b.wrs.pop() {
                with(&mut b, &mut wr, shadow);
                b.wrs.push(wr);
            }
        },
        || (),
    );
}

unsafe extern "C" fn rdma_write(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64) {
    add(qp, wr_opcode::RDMA_WRITE, |wr| wr.wr.rdma = wr_rdma { remote_addr, rkey });
}

unsafe extern "C" fn rdma_write_imm(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64, imm: u32) {
    add(qp, wr_opcode::RDMA_WRITE_WITH_IMM, |wr| {
        wr.wr.rdma = wr_rdma { remote_addr, rkey };
        wr.imm_data = imm;
    });
}

unsafe extern "C" fn rdma_read(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64) {
    add(qp, wr_opcode::RDMA_READ, |wr| wr.wr.rdma = wr_rdma { remote_addr, rkey });
}

unsafe extern "C" fn send(qp: *mut ibv_qp_ex) {
    add(qp, wr_opcode::SEND, |_| ());
}

unsafe extern "C" fn send_imm(qp: *mut ibv_qp_ex, imm: u32) {
    add(qp, wr_opcode::SEND_WITH_IMM, |wr| wr.imm_data = imm);
}

unsafe extern "C" fn send_inv(qp: *mut ibv_qp_ex, rkey: u32) {
    add(qp, wr_opcode::SEND_WITH_INV, |wr| wr.imm_data = rkey);
}

unsafe extern "C" fn local_inv(qp: *mut ibv_qp_ex, rkey: u32) {
    add(qp, wr_opcode::LOCAL_INV, |wr| wr.imm_data = rkey);
}

unsafe extern "C" fn cmp_swp(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64, compare_add: u64, swap: u64) {
    add(qp, wr_opcode::ATOMIC_CMP_AND_SWP, |wr| wr.wr.atomic = wr_atomic { remote_addr, compare_add, swap, rkey });
}

unsafe extern "C" fn fetch_add(qp: *mut ibv_qp_ex, rkey: u32, remote_addr: u64, compare_add: u64) {
    add(qp, wr_opcode::ATOMIC_FETCH_AND_ADD, |wr| {
        wr.wr.atomic = wr_atomic { remote_addr, compare_add, swap: 0, rkey };
    });
}

unsafe extern "C" fn bind_mw(qp: *mut ibv_qp_ex, mw: *mut ibv_mw, rkey: u32, info: *const ibv_mw_bind_info) {
    add(qp, wr_opcode::BIND_MW, |wr| {
        // SAFETY: the caller's info.
        wr.tail.bind_mw = wr_bind_mw { mw, rkey, bind_info: unsafe { *info } };
    });
}

unsafe extern "C" fn set_ud_addr(qp: *mut ibv_qp_ex, ah: *mut ibv_ah, remote_qpn: u32, remote_qkey: u32) {
    change(qp, |_, wr, _| wr.wr.ud = wr_ud { ah, remote_qpn, remote_qkey });
}

unsafe extern "C" fn set_sge(qp: *mut ibv_qp_ex, lkey: u32, addr: u64, length: u32) {
    change(qp, |b, wr, _| {
        b.sges.push(ibv_sge { addr, length, lkey });
        wr.num_sge = 1;
    });
}

unsafe extern "C" fn set_sge_list(qp: *mut ibv_qp_ex, num: usize, list: *const ibv_sge) {
    change(qp, |b, wr, shadow| {
        if num > shadow.cap_app.max_send_sge as usize {
            b.error = libc::ENOSPC;
            return;
        }
        // SAFETY: the caller's list.
        b.sges.extend_from_slice(unsafe { crate::convert::sges(list, num as c_int) });
        wr.num_sge = num as c_int;
    });
}

/// # Safety
/// The pieces are readable.
unsafe fn inline(qp: *mut ibv_qp_ex, pieces: impl Iterator<Item = (*const c_void, usize)>) {
    change(qp, |b, wr, shadow| {
        let start = b.inline.len();
        for (addr, length) in pieces.filter(|(_, n)| *n > 0) {
            // SAFETY: the caller's promise.
            b.inline.extend_from_slice(unsafe { std::slice::from_raw_parts(addr.cast::<u8>(), length) });
        }
        let length = b.inline.len() - start;
        if length > shadow.cap_app.max_inline_data as usize {
            b.error = libc::ENOSPC;
            return;
        }
        if length > 0 {
            b.sges.push(ibv_sge { addr: start as u64, length: length as u32, lkey: 0 });
            wr.num_sge = 1;
        }
        wr.send_flags |= send_flags::INLINE;
    });
}

unsafe extern "C" fn set_inline_data(qp: *mut ibv_qp_ex, addr: *mut c_void, length: usize) {
    // SAFETY: the caller's buffer.
    unsafe { inline(qp, std::iter::once((addr.cast_const(), length))) }
}

unsafe extern "C" fn set_inline_data_list(qp: *mut ibv_qp_ex, num: usize, list: *const ibv_data_buf) {
    // SAFETY: the caller's list.
    unsafe {
        let list = if num == 0 { &[] } else { std::slice::from_raw_parts(list, num) };
        inline(qp, list.iter().map(|b| (b.addr.cast_const(), b.length)));
    }
}

unsafe extern "C" fn start(qp: *mut ibv_qp_ex) {
    boundary(
        || {
            // SAFETY: called through a builder we installed.
            let Some(shadow) = (unsafe { of(qp) }) else { return };
            loop {
                let mut b = shadow.builder.lock();
                if !b.busy {
                    b.busy = true;
                    b.clear();
                    return;
                }
                drop(b);
                std::thread::yield_now();
            }
        },
        || (),
    );
}

unsafe extern "C" fn abort(qp: *mut ibv_qp_ex) {
    boundary(
        || {
            // SAFETY: called through a builder we installed.
            if let Some(shadow) = unsafe { of(qp) } {
                let mut b = shadow.builder.lock();
                b.clear();
                b.busy = false;
            }
        },
        || (),
    );
}

unsafe extern "C" fn complete(qp: *mut ibv_qp_ex) -> c_int {
    boundary(
        || {
            // SAFETY: called through a builder we installed.
            let Some(shadow) = (unsafe { of(qp) }) else { return libc::EINVAL };
            let mut b = shadow.builder.lock();
            b.busy = false;
            if b.error != 0 || b.wrs.is_empty() {
                return b.error;
            }
            let list = b.link();
            let mut bad = null_mut();
            // SAFETY: a list just linked, alive while the builder's lock is held.
            unsafe { shadow.post_send(list, &raw mut bad) }
        },
        || libc::EIO,
    )
}

impl Builder {
    fn clear(&mut self) {
        self.wrs.clear();
        self.sges.clear();
        self.inline.clear();
        self.error = 0;
    }

    /// Makes a list of the batch: indices and offsets become pointers.
    fn link(&mut self) -> *mut ibv_send_wr {
        let (wrs, sges, inline) = (self.wrs.as_mut_ptr(), self.sges.as_mut_ptr(), self.inline.as_mut_ptr());
        let n = self.wrs.len();
        for i in 0..n {
            // SAFETY: i < n; indices and offsets were taken from the lengths of these lists.
            unsafe {
                let wr = wrs.add(i);
                (*wr).sg_list = sges.add((*wr).sg_list.addr());
                if (*wr).send_flags & send_flags::INLINE != 0 && (*wr).num_sge == 1 {
                    let sge = (*wr).sg_list;
                    (*sge).addr = inline.add((*sge).addr as usize) as u64;
                }
                (*wr).next = if i + 1 < n { wrs.add(i + 1) } else { null_mut() };
            }
        }
        wrs
    }
}
