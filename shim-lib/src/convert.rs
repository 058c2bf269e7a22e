//! Work requests and completions between their C form and the form `rdma-virt` remembers them in.
#![expect(unsafe_code, reason = "work requests arrive as C lists")]

use std::mem::zeroed;
use std::ptr::null_mut;

use libc::c_int;
use rdma_virt::fakecq::Completion;
use rdma_virt::id::{VQpn, VRkey};
use rdma_virt::keys::LocalKeys;
use rdma_virt::wr::{Datagram, HeldSend, Payload, Sge};

use crate::abi::{ibv_ah, ibv_send_wr, ibv_sge, ibv_wc, send_flags, wr_atomic, wr_opcode, wr_rdma, wr_ud};

/// The SGE list of a request as a slice.
///
/// # Safety
/// `list` has `count` entries, as the poster promised.
pub unsafe fn sges<'a>(list: *const ibv_sge, count: c_int) -> &'a [ibv_sge] {
    if count <= 0 || list.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(list, count as usize) }
}

/// SGEs on the stack for nearly every request there is.
const FEW: usize = 8;

/// Gives `with` a list as the ledgers want it.
#[inline]
pub fn with_sges<R>(list: &[ibv_sge], with: impl FnOnce(&[Sge]) -> R) -> R {
    let copy = |s: &ibv_sge| Sge { addr: s.addr, length: s.length, lkey: s.lkey };
    if list.len() <= FEW {
        let mut few = [Sge::default(); FEW];
        few.iter_mut().zip(list).for_each(|(to, from)| *to = copy(from));
        with(&few[..list.len()])
    } else {
        with(&list.iter().map(copy).collect::<Vec<_>>())
    }
}

/// A remembered list as the NIC wants it.
pub fn physical(keys: &LocalKeys, list: &[Sge]) -> Vec<ibv_sge> {
    list.iter().map(|s| ibv_sge { addr: s.addr, length: s.length, lkey: keys.physical(s.vlkey()).0 }).collect()
}

/// A deep copy of a send: everything its poster may change or free after the post returned.
///
/// # Safety
/// `wr` is a valid send; if it is inline its buffers are readable.
pub unsafe fn hold(wr: &ibv_send_wr, datagram: bool) -> HeldSend {
    // SAFETY: the caller's promise. All members of the union start with an address and are plain numbers.
    unsafe {
        let list = sges(wr.sg_list, wr.num_sge);
        let payload = if wr.send_flags & send_flags::INLINE != 0 {
            let mut bytes = Vec::with_capacity(list.iter().map(|s| s.length as usize).sum());
            for s in list.iter().filter(|s| s.length > 0) {
                bytes.extend_from_slice(std::slice::from_raw_parts(s.addr as *const u8, s.length as usize));
            }
            Payload::Inline(bytes)
        } else {
            Payload::Sges(list.iter().map(|s| Sge { addr: s.addr, length: s.length, lkey: s.lkey }).collect())
        };
        let atomic = matches!(wr.opcode, wr_opcode::ATOMIC_CMP_AND_SWP | wr_opcode::ATOMIC_FETCH_AND_ADD);
        HeldSend {
            wr_id: wr.wr_id,
            opcode: wr.opcode,
            flags: wr.send_flags,
            imm: wr.imm_data,
            payload,
            remote_addr: wr.wr.rdma.remote_addr,
            rkey: VRkey(if atomic { wr.wr.atomic.rkey } else { wr.wr.rdma.rkey }),
            compare_add: wr.wr.atomic.compare_add,
            swap: wr.wr.atomic.swap,
            datagram: datagram.then_some(Datagram {
                ah: wr.wr.ud.ah as u64,
                remote_qpn: wr.wr.ud.remote_qpn,
                remote_qkey: wr.wr.ud.remote_qkey,
            }),
        }
    }
}

/// The C form of a held send, with virtual rkeys still in it, and its SGEs with physical lkeys, which the caller links.
pub fn release(held: &HeldSend, keys: &LocalKeys) -> (ibv_send_wr, Vec<ibv_sge>) {
    // SAFETY: all-zero is a valid work request.
    let mut wr: ibv_send_wr = unsafe { zeroed() };
    wr.wr_id = held.wr_id;
    wr.opcode = held.opcode;
    wr.send_flags = held.flags;
    wr.imm_data = held.imm;
    wr.next = null_mut();
    match (held.opcode, held.datagram) {
        (_, Some(d)) => {
            let ah = d.ah as *mut ibv_ah;
            wr.wr.ud = wr_ud { ah, remote_qpn: d.remote_qpn, remote_qkey: d.remote_qkey };
        }
        (wr_opcode::ATOMIC_CMP_AND_SWP | wr_opcode::ATOMIC_FETCH_AND_ADD, None) => {
            wr.wr.atomic = wr_atomic {
                remote_addr: held.remote_addr,
                compare_add: held.compare_add,
                swap: held.swap,
                rkey: held.rkey.0,
            };
        }
        _ => wr.wr.rdma = wr_rdma { remote_addr: held.remote_addr, rkey: held.rkey.0 },
    }
    let list = match &held.payload {
        Payload::Sges(list) => physical(keys, list),
        Payload::Inline(bytes) if bytes.is_empty() => Vec::new(),
        Payload::Inline(bytes) => vec![ibv_sge { addr: bytes.as_ptr() as u64, length: bytes.len() as u32, lkey: 0 }],
    };
    wr.num_sge = list.len() as c_int;
    (wr, list)
}

impl From<&ibv_wc> for Completion {
    fn from(wc: &ibv_wc) -> Self {
        Self {
            wr_id: wc.wr_id,
            status: wc.status,
            opcode: wc.opcode,
            vendor_err: wc.vendor_err,
            byte_len: wc.byte_len,
            imm: wc.imm_data,
            qpn: VQpn(wc.qp_num),
            src_qp: wc.src_qp,
            flags: wc.wc_flags,
            pkey_index: wc.pkey_index,
            slid: wc.slid,
            sl: wc.sl,
            dlid_path_bits: wc.dlid_path_bits,
        }
    }
}

impl From<Completion> for ibv_wc {
    fn from(c: Completion) -> Self {
        Self {
            wr_id: c.wr_id,
            status: c.status,
            opcode: c.opcode,
            vendor_err: c.vendor_err,
            byte_len: c.byte_len,
            imm_data: c.imm,
            qp_num: c.qpn.0,
            src_qp: c.src_qp,
            wc_flags: c.flags,
            pkey_index: c.pkey_index,
            slid: c.slid,
            sl: c.sl,
            dlid_path_bits: c.dlid_path_bits,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_inline_send_does_not_see_later_changes_of_its_buffer() {
        let mut buffer = *b"before";
        let mut sge = ibv_sge { addr: buffer.as_mut_ptr() as u64, length: 6, lkey: 0 };
        // SAFETY: all-zero is a valid work request.
        let mut wr: ibv_send_wr = unsafe { zeroed() };
        wr.sg_list = &raw mut sge;
        wr.num_sge = 1;
        wr.send_flags = send_flags::INLINE;
        // SAFETY: built above.
        let held = unsafe { hold(&wr, false) };
        buffer.copy_from_slice(b"after!");
        assert_eq!(held.payload, Payload::Inline(b"before".to_vec()));
        let (wr, list) = release(&held, &LocalKeys::new());
        assert_eq!((wr.num_sge, list[0].length), (1, 6));
        assert_ne!(list[0].addr, buffer.as_ptr() as u64);
    }

    #[test]
    fn a_held_atomic_keeps_its_operands() {
        // SAFETY: all-zero is a valid work request.
        let mut wr: ibv_send_wr = unsafe { zeroed() };
        wr.opcode = wr_opcode::ATOMIC_CMP_AND_SWP;
        wr.wr.atomic = wr_atomic { remote_addr: 8, compare_add: 1, swap: 2, rkey: 3 };
        // SAFETY: built above; no SGEs.
        let (back, _) = release(&unsafe { hold(&wr, false) }, &LocalKeys::new());
        // SAFETY: the opcode says so.
        let a = unsafe { back.wr.atomic };
        assert_eq!((a.remote_addr, a.compare_add, a.swap, a.rkey), (8, 1, 2, 3));
    }
}
