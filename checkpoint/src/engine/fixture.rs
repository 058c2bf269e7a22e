//! Small process states for tests.

use rdma_virt::id::{Handle, ObjId, PGid, PQpn, VGid, VQpn, Vpid};
use rdma_virt::saved::{ContextState, GidEntry, ProcessState, QpAttr, QpCap, QpPhase, QpState, Remote};

/// GID of the source, of the destination, of the peer's host.
pub const SRC: [u8; 16] = [1; 16];
pub const DST: [u8; 16] = [3; 16];
pub const PEER: [u8; 16] = [2; 16];

/// A QP that never moved; connected to a QP of that number on the peer's host, if any.
pub fn qp(id: u32, number: u32, remote: Option<u32>) -> QpState {
    let remote = remote.map(|n| Remote { vgid: VGid(PEER), vqpn: VQpn(n), pgid: PGid(PEER), pqpn: PQpn(n) });
    QpState {
        id: ObjId(id),
        handle: Handle(id),
        pd: ObjId(100),
        send_cq: ObjId(101),
        recv_cq: ObjId(101),
        srq: None,
        qp_type: 2,
        sq_sig_all: false,
        cap: QpCap { max_send_wr: 1, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 },
        user_handle: 0,
        vqpn: VQpn(number),
        pqpn: PQpn(number),
        sq_map: None,
        rq_map: None,
        phase: if remote.is_some() { QpPhase::Rts } else { QpPhase::Init },
        attr: QpAttr::default(),
        remote,
    }
}

/// A process with one context.
pub fn process(vpid: i32, qps: Vec<QpState>) -> ProcessState {
    ProcessState {
        vpid: Vpid(vpid),
        comm: "app".into(),
        builds: Vec::new(),
        contexts: vec![ContextState {
            id: ObjId(1),
            device: "rxe0".into(),
            driver: "rxe".into(),
            node_guid: 1,
            cmd_fd: 3,
            async_fd: 4,
            gids: vec![GidEntry { port: 1, index: 0, gid: VGid(SRC), kind: 2 }],
            pds: Vec::new(),
            channels: Vec::new(),
            cqs: Vec::new(),
            srqs: Vec::new(),
            qps,
            mrs: Vec::new(),
        }],
        blockers: Vec::new(),
        memory: Vec::new(),
    }
}
