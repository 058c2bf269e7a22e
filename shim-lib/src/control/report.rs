//! Everything this process has, written down from the shadow objects. Changes nothing.
#![expect(unsafe_code, reason = "walking loaded objects and asking fds for their flags")]

use std::ffi::CStr;
use std::sync::PoisonError;

use libc::{c_int, c_void};
use rdma_virt::id::{Handle, PLkey, PRkey, VLkey, VRkey, Vpid};
use rdma_virt::saved::{Build, ChannelState, ContextState, CqState, MrState, PdState, ProcessState, QpState, SrqState};

use super::session::{Refused, alone};
use crate::context::{ShadowContext, View};
use crate::qp::ShadowQp;
use crate::registry;
use crate::{backing, blockers};

/// Libraries that must be equal on both hosts, by the beginning of their file names.
const LIBRARIES: [&str; 5] = ["libmigrrdma", "libibverbs", "librdmacm", "libc.so", "libc-"];

/// Short name of the process (of its main thread).
pub fn comm() -> String {
    let name = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
    name.trim_end().to_owned()
}

/// The whole process.
pub fn process() -> Result<ProcessState, Refused> {
    let _alone = alone()?;
    let contexts =
        registry::contexts().iter().filter(|c| !c.is_dead()).map(|c| context(c)).collect::<Result<_, _>>()?;
    Ok(ProcessState {
        vpid: Vpid(std::process::id() as i32),
        comm: comm(),
        builds: builds(),
        contexts,
        blockers: blockers::list(),
        memory: backing::list(),
    })
}

/// What the application was told about its device: as remembered since a move, or as the device says now.
pub fn view(ctx: &ShadowContext) -> Result<View, Refused> {
    let known = ctx.view.read().unwrap_or_else(PoisonError::into_inner).clone();
    match known {
        Some(view) => Ok(view),
        None => ctx
            .capture_view()
            .map_err(|e| Refused::new(format!("context {} cannot be queried: {e}", ctx.device_name()))),
    }
}

fn context(ctx: &ShadowContext) -> Result<ContextState, Refused> {
    let view = view(ctx)?;
    Ok(ContextState {
        id: ctx.id,
        device: ctx.device_name(),
        driver: ctx.driver_name(),
        node_guid: view.device.node_guid,
        cmd_fd: ctx.cmd_fd(),
        async_fd: ctx.async_fd(),
        gids: view.gids,
        pds: ctx
            .pds()
            .iter()
            .filter(|o| !o.is_dead())
            .map(|o| PdState { id: o.id, handle: Handle(o.handle()) })
            .collect(),
        channels: ctx
            .channels()
            .iter()
            .filter(|o| !o.is_dead())
            .map(|o| ChannelState { id: o.id, fd: o.fd(), nonblock: nonblock(o.fd()) })
            .collect(),
        cqs: ctx
            .cqs()
            .iter()
            .filter(|o| !o.is_dead())
            .map(|o| CqState {
                id: o.id,
                handle: Handle(o.handle()),
                cqe: o.cqe_asked(),
                comp_vector: o.comp_vector,
                channel: o.channel().map(|c| c.id),
                user_handle: o.user_handle(),
                map: o.map(),
                armed: o.armed(),
            })
            .collect(),
        srqs: ctx
            .srqs()
            .iter()
            .filter(|o| !o.is_dead())
            .map(|o| SrqState {
                id: o.id,
                handle: Handle(o.handle()),
                pd: o.pd().id,
                max_wr: o.max_wr(),
                max_sge: o.max_sge,
                limit: o.limit(),
                user_handle: o.user_handle(),
                map: o.map(),
            })
            .collect(),
        qps: ctx.qps().iter().filter(|o| !o.is_dead()).map(|o| qp(o)).collect(),
        mrs: ctx
            .mrs()
            .iter()
            .filter(|o| !o.is_dead())
            .map(|o| MrState {
                id: o.id,
                handle: Handle(o.handle()),
                pd: o.pd().id,
                addr: o.range().addr,
                length: o.range().length,
                iova: o.range().iova,
                access: o.range().access,
                vlkey: VLkey(o.vlkey().0),
                vrkey: VRkey(o.vrkey().0),
                plkey: PLkey(o.plkey().0),
                prkey: PRkey(o.prkey().0),
            })
            .collect(),
    })
}

fn qp(qp: &ShadowQp) -> QpState {
    let known = qp.attr();
    QpState {
        id: qp.id,
        handle: Handle(qp.handle()),
        pd: qp.pd().id,
        send_cq: qp.send_cq().id,
        recv_cq: qp.recv_cq().id,
        srq: qp.srq().map(|s| s.id),
        qp_type: qp.qp_type,
        sq_sig_all: qp.sq_sig_all,
        cap: qp.cap_asked,
        user_handle: qp.user_handle(),
        vqpn: qp.vqpn(),
        pqpn: qp.pqpn(),
        sq_map: qp.sq_map(),
        rq_map: qp.rq_map(),
        phase: known.phase,
        attr: known.attr,
        remote: known.remote,
    }
}

fn nonblock(fd: c_int) -> bool {
    // SAFETY: asks for flags; any number may be asked about.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    flags >= 0 && flags & libc::O_NONBLOCK != 0
}

// ---- build ids -----------------------------------------------------------------------------------------------------

/// The libraries of [`LIBRARIES`] and every provider that are loaded, with their build ids.
pub fn builds() -> Vec<Build> {
    let mut found: Vec<Build> = Vec::new();
    // SAFETY: the callback gets `found` and uses it for the time of the call only.
    unsafe { libc::dl_iterate_phdr(Some(each), (&raw mut found).cast()) };
    found
}

unsafe extern "C" fn each(info: *mut libc::dl_phdr_info, _size: usize, found: *mut c_void) -> c_int {
    // SAFETY: the loader passes a valid description; `found` is what `builds` passed.
    unsafe {
        let found = &mut *found.cast::<Vec<Build>>();
        if (*info).dlpi_name.is_null() {
            return 0;
        }
        let file = CStr::from_ptr((*info).dlpi_name).to_string_lossy().into_owned();
        let name = file.rsplit('/').next().unwrap_or_default();
        if !LIBRARIES.iter().any(|l| name.starts_with(l)) && !name.contains("-rdmav") {
            return 0;
        }
        let headers = std::slice::from_raw_parts((*info).dlpi_phdr, (*info).dlpi_phnum.into());
        let id = headers
            .iter()
            .filter(|h| h.p_type == libc::PT_NOTE)
            .find_map(|h| {
                let start = ((*info).dlpi_addr + h.p_vaddr) as *const u8;
                build_id(std::slice::from_raw_parts(start, h.p_memsz as usize), h.p_align as usize)
            })
            .unwrap_or_default();
        found.push(Build { file, id });
    }
    0
}

/// The build id in a notes segment, in hexadecimal.
fn build_id(mut notes: &[u8], align: usize) -> Option<String> {
    const NT_GNU_BUILD_ID: u32 = 3;
    let pad = |n: usize| n.next_multiple_of(if align == 8 { 8 } else { 4 });
    let word = |b: &[u8], at: usize| Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?));
    loop {
        let (name, desc, kind) = (word(notes, 0)? as usize, word(notes, 4)? as usize, word(notes, 8)?);
        let value_at = 12 + pad(name);
        let value = notes.get(value_at..value_at.checked_add(desc)?)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..12 + name)? == b"GNU\0" {
            return Some(value.iter().map(|b| format!("{b:02x}")).collect());
        }
        notes = notes.get(value_at + pad(desc)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_id_is_found_behind_other_notes() {
        let mut notes = Vec::new();
        for (kind, name, value) in [(1u32, &b"GNU\0"[..], &[1u8, 2, 3][..]), (3, b"GNU\0", &[0xab, 0xcd])] {
            notes.extend_from_slice(&(name.len() as u32).to_ne_bytes());
            notes.extend_from_slice(&(value.len() as u32).to_ne_bytes());
            notes.extend_from_slice(&kind.to_ne_bytes());
            notes.extend_from_slice(name);
            notes.extend_from_slice(value);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert_eq!(build_id(&notes, 4).as_deref(), Some("abcd"));
        assert_eq!(build_id(&notes[..20], 4), None);
        assert_eq!(build_id(&[0xff; 64], 4), None);
    }

    #[test]
    fn libc_is_listed_with_its_build_id() {
        let builds = builds();
        assert!(builds.iter().any(|b| b.file.contains("libc") && b.id.len() == 40), "{builds:?}");
    }
}
