//! Questions about the device. On the host the device was opened on the library answers; after a move the application
//! goes on being told what it was told there.
#![expect(unsafe_code, reason = "answers go into the caller's memory")]

use std::mem::{size_of, zeroed};
use std::sync::{Arc, PoisonError};

use libc::{c_int, c_void, ssize_t};
use rdma_virt::id::VGid;
use rdma_virt::saved::GidEntry;

use crate::abi::{ibv_ah, ibv_ah_attr, ibv_context, ibv_dm, ibv_gid, ibv_gid_entry, ibv_pd, ibv_wc};
use crate::context::{self, ShadowContext, View};
use crate::entry::entry;
use crate::errno::Errno;
use crate::real::verbs;
use crate::{blockers, gate, pd, registry};

/// Asks the real device everything a [`View`] holds.
pub(crate) fn capture(ctx: &ShadowContext) -> Result<View, Errno> {
    let real = ctx.real();
    // SAFETY: plain data; the library fills it.
    unsafe {
        let mut device: rdma_sys::ibv_device_attr = zeroed();
        Errno::check(verbs::query_device(real, (&raw mut device).cast())?)?;
        let mut ports = Vec::new();
        for port in 1..=device.phys_port_cnt {
            let mut attr: rdma_sys::ibv_port_attr = zeroed();
            Errno::check(verbs::query_port(real, port, (&raw mut attr).cast())?)?;
            ports.push(attr);
        }
        let gids = match gid_table(real) {
            Some(gids) => gids,
            None => gids_one_by_one(real, &ports)?,
        };
        Ok(View { gids, sgid: Vec::new(), device, ports })
    }
}

/// Entries asked for at once: more than any device has filled, less than one ioctl attribute can carry (64 KiB).
const GIDS: usize = 2000;

/// The filled entries in one question; `None` if this library or kernel cannot be asked so.
///
/// # Safety
/// `real` is a real context.
unsafe fn gid_table(real: *mut ibv_context) -> Option<Vec<GidEntry>> {
    let mut entries = vec![ibv_gid_entry::default(); GIDS];
    let size = size_of::<ibv_gid_entry>();
    // SAFETY: room for that many entries of that size; the caller's promise.
    let count = unsafe { verbs::query_gid_table(real, entries.as_mut_ptr().cast(), GIDS, 0, size) };
    entries.truncate(usize::try_from(count.ok()?).ok()?);
    entries.iter().map(|e| Some(gid_entry(e.port_num.try_into().ok()?, e))).collect()
}

/// Every place of every table, most of them empty.
///
/// # Safety
/// `real` is a real context.
unsafe fn gids_one_by_one(real: *mut ibv_context, ports: &[rdma_sys::ibv_port_attr]) -> Result<Vec<GidEntry>, Errno> {
    let mut gids = Vec::new();
    for (port, attr) in (1u8..).zip(ports) {
        for index in 0..u32::try_from(attr.gid_tbl_len).unwrap_or(0) {
            let mut entry = ibv_gid_entry::default();
            let size = size_of::<ibv_gid_entry>();
            // SAFETY: room for one entry; the caller's promise.
            let answer =
                unsafe { verbs::query_gid_ex(real, u32::from(port), index, (&raw mut entry).cast(), 0, size) }?;
            if answer == 0 {
                entry.gid_index = index;
                gids.push(gid_entry(port, &entry));
            }
        }
    }
    Ok(gids)
}

fn gid_entry(port: u8, entry: &ibv_gid_entry) -> GidEntry {
    // SAFETY: 16 bytes either way.
    let gid = VGid(unsafe { std::mem::transmute::<[u64; 2], [u8; 16]>(entry.gid) });
    GidEntry { port, index: entry.gid_index as u16, gid, kind: entry.gid_type }
}

/// Waits at the gate, if the question is the application's: while the process moves only the new host could answer. A
/// question that the library asks itself, inside a verb that has passed the gate, names a real context and goes on.
pub(crate) fn pass(context: *mut ibv_context, verb: &'static str) -> Option<gate::Pass> {
    registry::find::<ShadowContext>(context).map(|_| gate::enter(verb))
}

fn with_view<R>(context: *mut ibv_context, what: impl FnOnce(&View) -> R) -> Option<R> {
    let ctx: Arc<ShadowContext> = registry::find(context)?;
    ctx.view.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(what)
}

/// Puts what the application was told about its device over the answer in `attr`.
///
/// # Safety
/// `attr` holds an answer whose first member is `struct ibv_device_attr`.
pub(crate) unsafe fn remembered_device(context: *mut ibv_context, attr: *mut c_void) {
    // SAFETY: the caller's promise.
    with_view(context, |view| unsafe { attr.cast::<rdma_sys::ibv_device_attr>().write(view.device) });
}

/// Puts what the application was told about a port over the answer of `length` bytes in `attr`.
///
/// # Safety
/// `attr` holds an answer of that length.
pub(crate) unsafe fn remembered_port(context: *mut ibv_context, port: u8, attr: *mut c_void, length: usize) {
    with_view(context, |view| {
        if let Some(told) = view.ports.get(usize::from(port).wrapping_sub(1)) {
            let n = length.min(size_of::<rdma_sys::ibv_port_attr>());
            // SAFETY: the caller's promise.
            unsafe { std::ptr::copy_nonoverlapping(std::ptr::from_ref(told).cast::<u8>(), attr.cast(), n) };
        }
    });
}

/// Bytes of the port attributes that programs older than the extended query make room for.
const OLD_PORT_ATTR: usize = 48;

entry! {
    "IBVERBS_1.1" fn ibv_query_device(context: *mut ibv_context, attr: *mut c_void) -> c_int, fail errno, |real| {
        let _pass = pass(context, "ibv_query_device");
        // SAFETY: the caller's room for the answer.
        unsafe {
            let answer = real(context::unwrap(context), attr);
            if answer == 0 { remembered_device(context, attr); }
            answer
        }
    }

    "IBVERBS_1.1" fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut c_void) -> c_int, fail errno, |real| {
        let _pass = pass(context, "ibv_query_port");
        // SAFETY: the caller's room for the answer.
        unsafe {
            let answer = real(context::unwrap(context), port, attr);
            if answer == 0 { remembered_port(context, port, attr, OLD_PORT_ATTR); }
            answer
        }
    }

    "IBVERBS_1.1" fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int, fail minus_one, |real| {
        let _pass = pass(context, "ibv_query_gid");
        if let Some(ctx) = registry::find::<ShadowContext>(context)
            && let Some(told) = ctx.virtual_gid(port, index as u32)
        {
            // SAFETY: the caller's room. An empty entry is all zero, as the library has it.
            unsafe { (*gid).raw = told.map_or([0; 16], |g| g.0) };
            return 0;
        }
        // SAFETY: the caller's room.
        unsafe { real(context::unwrap(context), port, index, gid) }
    }

    "IBVERBS_1.11" fn _ibv_query_gid_ex(context: *mut ibv_context, port: u32, index: u32, out: *mut c_void, flags: u32, size: usize) -> c_int, fail errno, |real| {
        let _pass = pass(context, "_ibv_query_gid_ex");
        if let Some(told) = with_view(context, |v| v.gids.iter().find(|g| u32::from(g.port) == port && u32::from(g.index) == index).copied()) {
            let Some(told) = told else { return libc::ENODATA };
            // SAFETY: the caller's room of `size` bytes.
            unsafe { write_gid(out, size, &told) };
            return 0;
        }
        // SAFETY: the caller's room.
        unsafe { real(context::unwrap(context), port, index, out, flags, size) }
    }

    "IBVERBS_1.11" fn _ibv_query_gid_table(context: *mut ibv_context, out: *mut c_void, max: usize, flags: u32, size: usize) -> ssize_t, fail minus_one, |real| {
        let _pass = pass(context, "_ibv_query_gid_table");
        if let Some(told) = with_view(context, |v| v.gids.clone()) {
            if told.len() > max { return -(libc::EINVAL as ssize_t) }
            for (i, entry) in told.iter().enumerate() {
                // SAFETY: the caller's room for `max` entries of `size` bytes.
                unsafe { write_gid(out.byte_add(i * size), size, entry) };
            }
            return told.len() as ssize_t;
        }
        // SAFETY: the caller's room.
        unsafe { real(context::unwrap(context), out, max, flags, size) }
    }

    /// Of libibverbs' private interface, but programs use it.
    "IBVERBS_PRIVATE_34" fn ibv_query_gid_type(context: *mut ibv_context, port: u8, index: u32, kind: *mut u32) -> c_int, fail minus_one, |real| {
        let _pass = pass(context, "ibv_query_gid_type");
        if let Some(told) = with_view(context, |v| v.gids.iter().find(|g| g.port == port && u32::from(g.index) == index).map(|g| g.kind)) {
            // SAFETY: the caller's room. 0 is IB or RoCE v1, also for an empty entry; 1 is RoCE v2.
            unsafe { *kind = u32::from(told.is_some_and(|k| k >= 2)) };
            return 0;
        }
        // SAFETY: the caller's room.
        unsafe { real(context::unwrap(context), port, index, kind) }
    }

    "IBVERBS_1.1" fn ibv_query_pkey(context: *mut ibv_context, port: u8, index: c_int, pkey: *mut u16) -> c_int, fail minus_one, |real| {
        let _pass = pass(context, "ibv_query_pkey");
        // SAFETY: the caller's room.
        unsafe { real(context::unwrap(context), port, index, pkey) }
    }

    "IBVERBS_1.5" fn ibv_get_pkey_index(context: *mut ibv_context, port: u8, pkey: u16) -> c_int, fail minus_one, |real| {
        let _pass = pass(context, "ibv_get_pkey_index");
        // SAFETY: the caller's promise.
        unsafe { real(context::unwrap(context), port, pkey) }
    }

    "IBVERBS_1.1" fn ibv_resolve_eth_l2_from_gid(context: *mut ibv_context, attr: *mut ibv_ah_attr, mac: *mut u8, vid: *mut u16) -> c_int, fail errno, |real| {
        let _pass = pass(context, "ibv_resolve_eth_l2_from_gid");
        // SAFETY: the caller's promise.
        unsafe { real(context::unwrap(context), attr, mac, vid) }
    }

    "IBVERBS_1.1" fn ibv_init_ah_from_wc(context: *mut ibv_context, port: u8, wc: *mut ibv_wc, grh: *mut c_void, attr: *mut ibv_ah_attr) -> c_int, fail errno, |real| {
        let _pass = pass(context, "ibv_init_ah_from_wc");
        // SAFETY: the caller's promise.
        unsafe { real(context::unwrap(context), port, wc, grh, attr) }
    }

    "IBVERBS_1.1" fn ibv_create_ah(pd: *mut ibv_pd, attr: *mut ibv_ah_attr) -> *mut ibv_ah, fail null, |real| {
        let Some(shadow) = registry::find::<pd::ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, attr) };
        };
        let _pass = gate::enter("ibv_create_ah");
        // SAFETY: a real PD, the caller's attributes.
        let ah = unsafe { real(shadow.real(), attr) };
        note_ah(ah, "ibv_create_ah")
    }

    "IBVERBS_1.1" fn ibv_create_ah_from_wc(pd: *mut ibv_pd, wc: *mut ibv_wc, grh: *mut c_void, port: u8) -> *mut ibv_ah, fail null, |real| {
        let Some(shadow) = registry::find::<pd::ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, wc, grh, port) };
        };
        let _pass = gate::enter("ibv_create_ah_from_wc");
        // SAFETY: a real PD, the caller's completion.
        let ah = unsafe { real(shadow.real(), wc, grh, port) };
        note_ah(ah, "ibv_create_ah_from_wc")
    }

    "IBVERBS_1.1" fn ibv_destroy_ah(ah: *mut ibv_ah) -> c_int, fail errno, |real| {
        let _pass = gate::enter("ibv_destroy_ah");
        blockers::forget(ah as usize);
        // SAFETY: address handles are the library's own.
        unsafe { real(ah) }
    }

    "IBVERBS_1.13" fn ibv_import_dm(context: *mut ibv_context, handle: u32) -> *mut ibv_dm, fail null, |real| {
        let _pass = gate::enter("ibv_import_dm");
        // SAFETY: the caller's promise.
        let dm = unsafe { real(context::unwrap(context), handle) };
        if !dm.is_null() {
            blockers::note("ibv_import_dm", "device memory", dm as usize);
        }
        dm
    }

    "IBVERBS_1.13" fn ibv_unimport_dm(dm: *mut ibv_dm), fail nothing, |real| {
        let _pass = gate::enter("ibv_unimport_dm");
        blockers::forget(dm as usize);
        // SAFETY: device memory is the library's own.
        unsafe { real(dm) }
    }
}

fn note_ah(ah: *mut ibv_ah, verb: &str) -> *mut ibv_ah {
    if !ah.is_null() {
        blockers::note(verb, "address handle", ah as usize);
    }
    ah
}

/// # Safety
/// `out` has room for `size` bytes.
unsafe fn write_gid(out: *mut c_void, size: usize, told: &GidEntry) {
    let entry = ibv_gid_entry {
        // SAFETY: 16 bytes either way.
        gid: unsafe { std::mem::transmute::<[u8; 16], [u64; 2]>(told.gid.0) },
        gid_index: u32::from(told.index),
        port_num: u32::from(told.port),
        gid_type: told.kind,
        ndev_ifindex: 0,
    };
    // SAFETY: the caller's promise.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (&raw const entry).cast::<u8>(),
            out.cast(),
            size.min(size_of::<ibv_gid_entry>()),
        );
    }
}
