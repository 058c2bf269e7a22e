//! `ibv_start_poll` and its readers. A CQ whose readers tell no more than a plain completion holds is a plain CQ
//! underneath; completions come through the same path as those of `ibv_poll_cq`.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::sync::Arc;

use libc::{c_int, c_uint};

use crate::abi::{cq_init, ibv_cq, ibv_cq_ex, ibv_poll_cq_attr, ibv_wc};
use crate::cq::ShadowCq;
use crate::entry::boundary;

/// The completion under the reader.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// From `start_poll` to `end_poll` one thread's.
    busy: bool,
    wc: ibv_wc,
}

/// Gives a CQ that is not handed out yet its readers.
pub(crate) fn install(cq: &Arc<ShadowCq>, wc_flags: u64) {
    let ex = cq.visible_ex();
    let on = |bit: u64| wc_flags & bit != 0;
    // SAFETY: not handed out yet.
    unsafe {
        (*ex).start_poll = Some(start_poll);
        (*ex).next_poll = Some(next_poll);
        (*ex).end_poll = Some(end_poll);
        (*ex).read_opcode = Some(read_opcode);
        (*ex).read_vendor_err = Some(read_vendor_err);
        (*ex).read_wc_flags = Some(read_wc_flags);
        (*ex).read_byte_len = on(cq_init::WITH_BYTE_LEN).then_some(read_byte_len as _);
        (*ex).read_imm_data = on(cq_init::WITH_IMM).then_some(read_imm_data as _);
        (*ex).read_qp_num = on(cq_init::WITH_QP_NUM).then_some(read_qp_num as _);
        (*ex).read_src_qp = on(cq_init::WITH_SRC_QP).then_some(read_src_qp as _);
        (*ex).read_slid = on(cq_init::WITH_SLID).then_some(read_slid as _);
        (*ex).read_sl = on(cq_init::WITH_SL).then_some(read_sl as _);
        (*ex).read_dlid_path_bits = on(cq_init::WITH_DLID_PATH_BITS).then_some(read_dlid_path_bits as _);
    }
}

/// # Safety
/// `cq` is a CQ that [`install`] was called on.
unsafe fn of<'a>(cq: *mut ibv_cq_ex) -> Option<&'a ShadowCq> {
    // SAFETY: the caller's promise; the plain CQ is the first member.
    unsafe { ShadowCq::of(cq.cast::<ibv_cq>()) }
}

/// Fetches one completion into the reader: 0, or ENOENT when there is none.
///
/// # Safety
/// `cq` is `shadow`'s visible part.
unsafe fn fetch(shadow: &ShadowCq, cq: *mut ibv_cq_ex) -> c_int {
    let mut wc = ibv_wc::default();
    // SAFETY: room for one.
    match unsafe { shadow.poll(1, &raw mut wc) } {
        1 => {
            shadow.reader.lock().wc = wc;
            // SAFETY: the reading thread's, by the verbs' contract.
            unsafe {
                (*cq).wr_id = wc.wr_id;
                (*cq).status = wc.status;
            }
            0
        }
        0 => libc::ENOENT,
        _ => libc::EIO,
    }
}

unsafe extern "C" fn start_poll(cq: *mut ibv_cq_ex, attr: *mut ibv_poll_cq_attr) -> c_int {
    boundary(
        // SAFETY: called through a reader we installed; the caller's attributes.
        || unsafe {
            let Some(shadow) = of(cq) else { return libc::EINVAL };
            if !attr.is_null() && (*attr).comp_mask != 0 {
                return libc::EINVAL;
            }
            loop {
                let mut reader = shadow.reader.lock();
                if !reader.busy {
                    reader.busy = true;
                    break;
                }
                drop(reader);
                std::thread::yield_now();
            }
            let answer = fetch(shadow, cq);
            if answer != 0 {
                shadow.reader.lock().busy = false;
            }
            answer
        },
        || libc::EIO,
    )
}

unsafe extern "C" fn next_poll(cq: *mut ibv_cq_ex) -> c_int {
    // SAFETY: called through a reader we installed.
    boundary(|| unsafe { of(cq).map_or(libc::EINVAL, |s| fetch(s, cq)) }, || libc::EIO)
}

unsafe extern "C" fn end_poll(cq: *mut ibv_cq_ex) {
    boundary(
        || {
            // SAFETY: called through a reader we installed.
            if let Some(shadow) = unsafe { of(cq) } {
                shadow.reader.lock().busy = false;
            }
        },
        || (),
    );
}

fn read<T>(cq: *mut ibv_cq_ex, none: T, what: impl FnOnce(&ibv_wc) -> T) -> T {
    // SAFETY: called through a reader we installed.
    match unsafe { of(cq) } {
        Some(shadow) => what(&shadow.reader.lock().wc),
        None => none,
    }
}

macro_rules! readers {
    ($($name:ident -> $ty:ty, |$wc:ident| $value:expr;)*) => {$(
        unsafe extern "C" fn $name(cq: *mut ibv_cq_ex) -> $ty {
            read(cq, 0, |$wc| $value)
        }
    )*};
}
readers! {
    read_opcode -> u32, |wc| wc.opcode;
    read_vendor_err -> u32, |wc| wc.vendor_err;
    read_wc_flags -> c_uint, |wc| wc.wc_flags;
    read_byte_len -> u32, |wc| wc.byte_len;
    read_imm_data -> u32, |wc| wc.imm_data;
    read_qp_num -> u32, |wc| wc.qp_num;
    read_src_qp -> u32, |wc| wc.src_qp;
    read_slid -> u32, |wc| u32::from(wc.slid);
    read_sl -> u8, |wc| wc.sl;
    read_dlid_path_bits -> u8, |wc| wc.dlid_path_bits;
}
