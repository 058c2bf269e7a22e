//! The kernel's user interface of `/dev/infiniband/uverbsN`, as far as the incubator speaks it: structures and numbers
//! of `rdma/rdma_user_ioctl_cmds.h`, `rdma/ib_user_ioctl_cmds.h`, `rdma/ib_user_verbs.h`, `rdma/ib_user_ioctl_verbs.h`
//! and `rdma/rdma_user_rxe.h`. A test compiles a C program against the real headers and compares every number here.
//!
//! Deliberately not here: anything that makes a system call.

/// `RDMA_VERBS_IOCTL`: `_IOWR(0x1b, 1, struct ib_uverbs_ioctl_hdr)`.
pub const RDMA_VERBS_IOCTL: u64 = 0xc018_1b01;

/// `struct ib_uverbs_ioctl_hdr` without its trailing attributes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IoctlHdr {
    pub length: u16,
    pub object_id: u16,
    pub method_id: u16,
    pub num_attrs: u16,
    pub reserved1: u64,
    pub driver_id: u32,
    pub reserved2: u32,
}

/// `struct ib_uverbs_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Attr {
    pub attr_id: u16,
    pub len: u16,
    pub flags: u16,
    /// Element id of an enum attribute in the low byte.
    pub attr_data: u16,
    /// Inline value, pointer, handle or file descriptor.
    pub data: u64,
}

/// `enum rdma_driver_id`.
pub const DRIVER_UNKNOWN: u32 = 0;
pub const DRIVER_RXE: u32 = 14;

pub const ATTR_F_MANDATORY: u16 = 1;

pub const OBJECT_DEVICE: u16 = 0;
pub const OBJECT_PD: u16 = 1;
pub const OBJECT_CQ: u16 = 3;
pub const OBJECT_QP: u16 = 4;
pub const OBJECT_SRQ: u16 = 5;
pub const OBJECT_MR: u16 = 7;
pub const OBJECT_ASYNC_EVENT: u16 = 16;

pub const ATTR_UHW_IN: u16 = 0x1000;
pub const ATTR_UHW_OUT: u16 = 0x1001;

pub const METHOD_INVOKE_WRITE: u16 = 0;
pub const METHOD_GET_CONTEXT: u16 = 3;
pub const ATTR_CORE_IN: u16 = 0;
pub const ATTR_CORE_OUT: u16 = 1;
pub const ATTR_WRITE_CMD: u16 = 2;
pub const ATTR_GET_CONTEXT_NUM_COMP_VECTORS: u16 = 0;
pub const ATTR_GET_CONTEXT_CORE_SUPPORT: u16 = 1;

pub const METHOD_QUERY_GID_TABLE: u16 = 5;
pub const ATTR_QUERY_GID_TABLE_ENTRY_SIZE: u16 = 0;
pub const ATTR_QUERY_GID_TABLE_FLAGS: u16 = 1;
pub const ATTR_QUERY_GID_TABLE_ENTRIES: u16 = 2;
pub const ATTR_QUERY_GID_TABLE_COUNT: u16 = 3;

pub const METHOD_ASYNC_EVENT_ALLOC: u16 = 0;
pub const ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE: u16 = 0;

pub const METHOD_PD_DESTROY: u16 = 0;
pub const ATTR_DESTROY_PD_HANDLE: u16 = 0;

pub const METHOD_CQ_CREATE: u16 = 0;
pub const METHOD_CQ_DESTROY: u16 = 1;
pub const ATTR_CREATE_CQ_HANDLE: u16 = 0;
pub const ATTR_CREATE_CQ_CQE: u16 = 1;
pub const ATTR_CREATE_CQ_USER_HANDLE: u16 = 2;
pub const ATTR_CREATE_CQ_COMP_CHANNEL: u16 = 3;
pub const ATTR_CREATE_CQ_COMP_VECTOR: u16 = 4;
pub const ATTR_CREATE_CQ_RESP_CQE: u16 = 6;
pub const ATTR_CREATE_CQ_EVENT_FD: u16 = 7;
pub const ATTR_DESTROY_CQ_HANDLE: u16 = 0;
pub const ATTR_DESTROY_CQ_RESP: u16 = 1;

pub const METHOD_QP_CREATE: u16 = 0;
pub const METHOD_QP_DESTROY: u16 = 1;
pub const ATTR_CREATE_QP_HANDLE: u16 = 0;
pub const ATTR_CREATE_QP_PD_HANDLE: u16 = 2;
pub const ATTR_CREATE_QP_SRQ_HANDLE: u16 = 3;
pub const ATTR_CREATE_QP_SEND_CQ_HANDLE: u16 = 4;
pub const ATTR_CREATE_QP_RECV_CQ_HANDLE: u16 = 5;
pub const ATTR_CREATE_QP_USER_HANDLE: u16 = 7;
pub const ATTR_CREATE_QP_CAP: u16 = 8;
pub const ATTR_CREATE_QP_TYPE: u16 = 9;
pub const ATTR_CREATE_QP_FLAGS: u16 = 10;
pub const ATTR_CREATE_QP_EVENT_FD: u16 = 12;
pub const ATTR_CREATE_QP_RESP_CAP: u16 = 13;
pub const ATTR_CREATE_QP_RESP_QP_NUM: u16 = 14;
pub const ATTR_DESTROY_QP_HANDLE: u16 = 0;
pub const ATTR_DESTROY_QP_RESP: u16 = 1;
pub const QP_CREATE_SQ_SIG_ALL: u32 = 1 << 12;

pub const METHOD_SRQ_CREATE: u16 = 0;
pub const METHOD_SRQ_DESTROY: u16 = 1;
pub const ATTR_CREATE_SRQ_HANDLE: u16 = 0;
pub const ATTR_CREATE_SRQ_PD_HANDLE: u16 = 1;
pub const ATTR_CREATE_SRQ_USER_HANDLE: u16 = 4;
pub const ATTR_CREATE_SRQ_MAX_WR: u16 = 5;
pub const ATTR_CREATE_SRQ_MAX_SGE: u16 = 6;
pub const ATTR_CREATE_SRQ_LIMIT: u16 = 7;
pub const ATTR_CREATE_SRQ_TYPE: u16 = 9;
pub const ATTR_CREATE_SRQ_EVENT_FD: u16 = 10;
pub const ATTR_CREATE_SRQ_RESP_MAX_WR: u16 = 11;
pub const ATTR_CREATE_SRQ_RESP_MAX_SGE: u16 = 12;
pub const ATTR_DESTROY_SRQ_HANDLE: u16 = 0;
pub const ATTR_DESTROY_SRQ_RESP: u16 = 1;
pub const SRQT_BASIC: u64 = 0;

pub const METHOD_MR_DESTROY: u16 = 1;
pub const ATTR_DESTROY_MR_HANDLE: u16 = 0;

pub const CMD_QUERY_DEVICE: u64 = 1;
pub const CMD_ALLOC_PD: u64 = 3;
pub const CMD_REG_MR: u64 = 9;
pub const CMD_CREATE_COMP_CHANNEL: u64 = 17;
pub const CMD_MODIFY_QP: u64 = 26;
pub const CMD_MODIFY_SRQ: u64 = 33;

/// `struct ib_uverbs_query_device`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct QueryDevice {
    pub response: u64,
}

/// `struct ib_uverbs_query_device_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct QueryDeviceResp {
    pub fw_ver: u64,
    pub node_guid: u64,
    pub sys_image_guid: u64,
    pub max_mr_size: u64,
    pub page_size_cap: u64,
    pub vendor_id: u32,
    pub vendor_part_id: u32,
    pub hw_ver: u32,
    pub max_qp: u32,
    pub max_qp_wr: u32,
    pub device_cap_flags: u32,
    pub max_sge: u32,
    pub max_sge_rd: u32,
    pub max_cq: u32,
    pub max_cqe: u32,
    pub max_mr: u32,
    pub max_pd: u32,
    /// From `max_qp_rd_atom` to `max_map_per_fmr`: not looked at.
    pub between: [u32; 17],
    pub max_srq: u32,
    pub max_srq_wr: u32,
    pub max_srq_sge: u32,
    pub max_pkeys: u16,
    pub local_ca_ack_delay: u8,
    pub phys_port_cnt: u8,
    pub reserved: [u8; 4],
}

/// `struct ib_uverbs_alloc_pd`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AllocPd {
    pub response: u64,
}

/// `struct ib_uverbs_alloc_pd_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct AllocPdResp {
    pub pd_handle: u32,
}

/// `struct ib_uverbs_reg_mr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RegMr {
    pub response: u64,
    pub start: u64,
    pub length: u64,
    pub hca_va: u64,
    pub pd_handle: u32,
    pub access_flags: u32,
}

/// `struct ib_uverbs_reg_mr_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct RegMrResp {
    pub mr_handle: u32,
    pub lkey: u32,
    pub rkey: u32,
}

/// `struct ib_uverbs_create_comp_channel`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateCompChannel {
    pub response: u64,
}

/// `struct ib_uverbs_create_comp_channel_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateCompChannelResp {
    pub fd: u32,
}

/// `struct ib_uverbs_destroy_cq_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DestroyCqResp {
    pub comp_events_reported: u32,
    pub async_events_reported: u32,
}

/// `struct ib_uverbs_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QpCap {
    pub max_send_wr: u32,
    pub max_recv_wr: u32,
    pub max_send_sge: u32,
    pub max_recv_sge: u32,
    pub max_inline_data: u32,
}

/// `struct ib_uverbs_qp_dest`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct QpDest {
    pub dgid: [u8; 16],
    pub flow_label: u32,
    pub dlid: u16,
    pub reserved: u16,
    pub sgid_index: u8,
    pub hop_limit: u8,
    pub traffic_class: u8,
    pub sl: u8,
    pub src_path_bits: u8,
    pub static_rate: u8,
    pub is_global: u8,
    pub port_num: u8,
}

/// `struct ib_uverbs_modify_qp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ModifyQp {
    pub dest: QpDest,
    pub alt_dest: QpDest,
    pub qp_handle: u32,
    pub attr_mask: u32,
    pub qkey: u32,
    pub rq_psn: u32,
    pub sq_psn: u32,
    pub dest_qp_num: u32,
    pub qp_access_flags: u32,
    pub pkey_index: u16,
    pub alt_pkey_index: u16,
    pub qp_state: u8,
    pub cur_qp_state: u8,
    pub path_mtu: u8,
    pub path_mig_state: u8,
    pub en_sqd_async_notify: u8,
    pub max_rd_atomic: u8,
    pub max_dest_rd_atomic: u8,
    pub min_rnr_timer: u8,
    pub port_num: u8,
    pub timeout: u8,
    pub retry_cnt: u8,
    pub rnr_retry: u8,
    pub alt_port_num: u8,
    pub alt_timeout: u8,
    pub reserved: [u8; 2],
}

/// `struct ib_uverbs_modify_srq`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ModifySrq {
    pub srq_handle: u32,
    pub attr_mask: u32,
    pub max_wr: u32,
    pub srq_limit: u32,
}

/// Bits of `attr_mask` of [`ModifyQp`]: `enum ibv_qp_attr_mask`.
pub mod qp_mask {
    pub const STATE: u32 = 1 << 0;
    pub const ACCESS_FLAGS: u32 = 1 << 3;
    pub const PKEY_INDEX: u32 = 1 << 4;
    pub const PORT: u32 = 1 << 5;
    pub const AV: u32 = 1 << 7;
    pub const PATH_MTU: u32 = 1 << 8;
    pub const TIMEOUT: u32 = 1 << 9;
    pub const RETRY_CNT: u32 = 1 << 10;
    pub const RNR_RETRY: u32 = 1 << 11;
    pub const RQ_PSN: u32 = 1 << 12;
    pub const MAX_QP_RD_ATOMIC: u32 = 1 << 13;
    pub const MIN_RNR_TIMER: u32 = 1 << 15;
    pub const SQ_PSN: u32 = 1 << 16;
    pub const MAX_DEST_RD_ATOMIC: u32 = 1 << 17;
    pub const DEST_QPN: u32 = 1 << 20;
}

/// Bit of `attr_mask` of [`ModifySrq`]: `IBV_SRQ_LIMIT`.
pub const SRQ_ATTR_LIMIT: u32 = 1 << 1;

/// `struct mminfo` of rxe: where to `mmap` one queue.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxeMminfo {
    /// Byte offset for `mmap`.
    pub offset: u64,
    /// Bytes to map.
    pub size: u32,
    pub pad: u32,
}

/// `struct rxe_create_qp_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxeCreateQpResp {
    pub rq: RxeMminfo,
    pub sq: RxeMminfo,
}

/// `struct rxe_create_srq_resp`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RxeCreateSrqResp {
    pub mi: RxeMminfo,
    pub srq_num: u32,
    pub reserved: u32,
}
