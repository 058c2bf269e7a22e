//! What one process' RDMA objects look like when written down: in an image, and in a shim's report to its agent.
//!
//! These types are apart from the run-time ones on purpose: an image outlives the program that wrote it. They hold
//! no pointer that anybody but the owning process follows; addresses are plain numbers.

use crate::id::{Handle, ObjId, PGid, PLkey, PQpn, PRkey, VGid, VLkey, VQpn, VRkey, Vpid};
use serde::{Deserialize, Serialize};

/// All RDMA state of one process. Object lists are in order of creation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessState {
    /// Its pid inside its own namespace: the same before and after a move.
    pub vpid: Vpid,
    /// Short name (`/proc/self/comm`), for messages to people.
    pub comm: String,
    /// Build ids of what must be equal on both sides: shim, libibverbs, provider, libc.
    pub builds: Vec<Build>,
    pub contexts: Vec<ContextState>,
    /// What this process uses that cannot be moved. Empty means it can.
    pub blockers: Vec<Blocker>,
    /// Registered memory that lies in files. Ranges do not overlap.
    pub memory: Vec<BackedMemory>,
}

/// A range of a process that is the beginning of a file in the directory of the container's memory files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackedMemory {
    /// Name in that directory.
    pub file: String,
    /// Address in the process, page-aligned.
    pub addr: u64,
    /// Bytes, whole pages.
    pub len: u64,
}

impl BackedMemory {
    /// Whether all of `[addr, addr + len)` lies in it.
    pub fn holds(&self, addr: u64, len: u64) -> bool {
        let end = addr.checked_add(len);
        addr >= self.addr && end.is_some_and(|end| end <= self.addr.saturating_add(self.len))
    }
}

/// A mapped file and its build id in hexadecimal (empty if it has none).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Build {
    pub file: String,
    pub id: String,
}

/// One reason why a process cannot be moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// Name of the verb that made the object, as in the manual page.
    pub verb: String,
    /// What it was called on, in words ("qp 17", "context rxe0").
    pub object: String,
}

/// One open device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContextState {
    pub id: ObjId,
    /// Device name the application sees, for example `rxe0`.
    pub device: String,
    /// Provider driver name, for example `rxe`.
    pub driver: String,
    /// Node GUID the application sees, network byte order.
    pub node_guid: u64,
    /// File descriptors in the owning process.
    pub cmd_fd: i32,
    pub async_fd: i32,
    /// GID table the application sees: on a move the shim goes on answering from it.
    pub gids: Vec<GidEntry>,
    pub pds: Vec<PdState>,
    pub channels: Vec<ChannelState>,
    pub cqs: Vec<CqState>,
    pub srqs: Vec<SrqState>,
    pub qps: Vec<QpState>,
    pub mrs: Vec<MrState>,
}

/// One non-empty entry of a port's GID table, as the application sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GidEntry {
    pub port: u8,
    pub index: u16,
    pub gid: VGid,
    /// `enum ibv_gid_type` (0 IB/RoCE v1 … 2 RoCE v2 as in `ibv_gid_entry.gid_type`).
    pub kind: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PdState {
    pub id: ObjId,
    pub handle: Handle,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    pub id: ObjId,
    pub fd: i32,
    pub nonblock: bool,
}

/// A queue shared with the kernel: where the process maps it, and at which file offset it asked for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueMap {
    /// Address in the process.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
    /// `mmap` offset in bytes on the context's cmd_fd.
    pub offset: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CqState {
    pub id: ObjId,
    pub handle: Handle,
    /// Entries asked of the kernel (application's wish plus our reserve).
    pub cqe: u32,
    pub comp_vector: u32,
    pub channel: Option<ObjId>,
    /// Pointer the kernel hands back in events: that of libibverbs' own `ibv_cq`.
    pub user_handle: u64,
    pub map: Option<QueueMap>,
    /// Armed by the application and no event delivered since: `Some(solicited_only)`.
    pub armed: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SrqState {
    pub id: ObjId,
    pub handle: Handle,
    pub pd: ObjId,
    /// As asked of the kernel.
    pub max_wr: u32,
    pub max_sge: u32,
    pub limit: u32,
    pub user_handle: u64,
    pub map: Option<QueueMap>,
}

/// `struct ibv_qp_cap`, as asked of the kernel (with our reserve).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpCap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

/// A QP's state; numbers as in `enum ibv_qp_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum QpPhase {
    Reset = 0,
    Init = 1,
    Rtr = 2,
    Rts = 3,
    Sqd = 4,
    Sqe = 5,
    Err = 6,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpState {
    pub id: ObjId,
    pub handle: Handle,
    pub pd: ObjId,
    pub send_cq: ObjId,
    pub recv_cq: ObjId,
    pub srq: Option<ObjId>,
    /// `enum ibv_qp_type` (2 RC, 3 UC, 4 UD).
    pub qp_type: u32,
    pub sq_sig_all: bool,
    pub cap: QpCap,
    pub user_handle: u64,
    pub vqpn: VQpn,
    pub pqpn: PQpn,
    pub sq_map: Option<QueueMap>,
    pub rq_map: Option<QueueMap>,
    pub phase: QpPhase,
    pub attr: QpAttr,
    /// Where a connected QP's packets go now; known once it is in RTR or later.
    pub remote: Option<Remote>,
}

/// The other end of a connected QP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remote {
    /// What the application asked for in `ibv_modify_qp(RTR)`.
    pub vgid: VGid,
    pub vqpn: VQpn,
    /// Where that is now.
    pub pgid: PGid,
    pub pqpn: PQpn,
}

/// Attributes the application set through `ibv_modify_qp`, in its own (virtual) terms; zero where never set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QpAttr {
    pub pkey_index: u16,
    pub port_num: u8,
    /// `enum ibv_access_flags`.
    pub access: u32,
    /// `enum ibv_mtu`.
    pub path_mtu: u32,
    pub is_global: bool,
    /// Index into the GID table the application sees.
    pub sgid_index: u8,
    pub flow_label: u32,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub dlid: u16,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub max_rd_atomic: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MrState {
    pub id: ObjId,
    pub handle: Handle,
    pub pd: ObjId,
    pub addr: u64,
    pub length: u64,
    pub iova: u64,
    /// `enum ibv_access_flags`.
    pub access: u32,
    pub vlkey: VLkey,
    pub vrkey: VRkey,
    pub plkey: PLkey,
    pub prkey: PRkey,
}

// ---- what the destination made of it -------------------------------------------------------------------------------

/// The kernel objects made on the destination for one process: what its shim must point its objects at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedProcess {
    pub vpid: Vpid,
    pub contexts: Vec<AdoptedContext>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedContext {
    pub id: ObjId,
    /// Device name on the destination.
    pub device: String,
    /// For each GID entry of the application's table that QPs use: index on the destination's port.
    pub sgid_index: Vec<SgidMap>,
    pub pds: Vec<(ObjId, Handle)>,
    pub cqs: Vec<(ObjId, Handle)>,
    pub srqs: Vec<(ObjId, Handle)>,
    pub qps: Vec<AdoptedQp>,
    /// MRs registered before the process existed; those missing here the shim registers itself.
    pub mrs: Vec<AdoptedMr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SgidMap {
    pub port: u8,
    pub virtual_index: u8,
    pub physical_index: u8,
    pub physical: PGid,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedQp {
    pub id: ObjId,
    pub handle: Handle,
    pub vqpn: VQpn,
    pub pqpn: PQpn,
    /// Where the new QP is connected to (`None`: not connected before the move either).
    pub remote: Option<Remote>,
    /// The first PSN its remote end was told to expect; 0 if there is none. 24 bits.
    pub sq_psn: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AdoptedMr {
    pub id: ObjId,
    pub handle: Handle,
    pub plkey: PLkey,
    pub prkey: PRkey,
}

// ---- what a process makes by itself on the destination --------------------------------------------------------------

/// What one process needs to make its kernel objects again by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildProcess {
    pub vpid: Vpid,
    pub contexts: Vec<RebuildContext>,
    /// QPs whose remote ends are known. Those that are missing are connected by a later request.
    pub links: Vec<RebuildLink>,
}

/// Where one of its devices is opened again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildContext {
    pub id: ObjId,
    /// Device name on the destination.
    pub device: String,
    /// As in [`AdoptedContext::sgid_index`].
    pub sgid_index: Vec<SgidMap>,
}

/// How one of its new QPs is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuildLink {
    pub context: ObjId,
    pub qp: ObjId,
    pub remote: Remote,
    /// First PSN this end sends with, and the one it expects. 24 bits.
    pub sq_psn: u32,
    pub rq_psn: u32,
}

/// The number of a QP that was made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RebuiltQp {
    pub context: ObjId,
    pub qp: ObjId,
    pub vqpn: VQpn,
    pub pqpn: PQpn,
}
