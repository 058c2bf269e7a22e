//! Reliable-connected queue pairs and what is posted to them.
#![expect(unsafe_code, reason = "calls libibverbs")]

use super::{Cq, Pd, Srq, check, last};
use rdma_sys as ib;
use serde::{Deserialize, Serialize};
use std::io;

/// A queue pair.
#[derive(Clone, Copy, Debug)]
pub struct Qp {
    pub(super) ptr: *mut ib::ibv_qp,
}

// SAFETY: libibverbs objects may be used from any thread.
unsafe impl Send for Qp {}
// SAFETY: as above.
unsafe impl Sync for Qp {}

/// What a queue pair is made with.
#[derive(Clone, Copy, Debug)]
pub struct QpOptions {
    /// Requests in the send queue.
    pub sends: u32,
    /// Requests in the receive queue; 0 with an SRQ.
    pub recvs: u32,
    /// Inline bytes wished for.
    pub inline: u32,
    /// IB port.
    pub port: u8,
    /// Local GID index.
    pub gid_index: u8,
    /// READs and atomics under way at once.
    pub rd_atomic: u8,
    /// Exponent of the retransmission timeout (4.096 µs × 2^n).
    pub timeout: u8,
    /// Retransmissions before the QP fails.
    pub retry: u8,
    /// Receiver-not-ready retries; 7 is for ever.
    pub rnr_retry: u8,
    /// `enum ibv_mtu`.
    pub mtu: u32,
}

/// A state an unused queue pair may rest in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestState {
    /// RESET.
    Reset,
    /// SQD.
    Drained,
    /// ERR.
    Error,
}

/// Where a queue pair is, for the other end to connect to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// QP number.
    pub qpn: u32,
    /// First packet sequence number.
    pub psn: u32,
    /// GID.
    pub gid: [u8; 16],
    /// Local identifier.
    pub lid: u16,
}

/// The attributes of a connected queue pair that never change by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QpView {
    /// The public field.
    pub qpn: u32,
    /// `enum ibv_qp_state`; 3 is RTS.
    pub state: u32,
    /// Number of the other end.
    pub dest_qpn: u32,
    /// Other end's GID.
    pub dgid: [u8; 16],
    /// Local GID index.
    pub sgid_index: u8,
    /// (port, timeout, retry, rnr_retry, rnr timer, rd_atomic out, rd_atomic in)
    pub small: [u8; 7],
    /// `enum ibv_mtu`.
    pub mtu: u32,
    /// Remote access allowed.
    pub access: u32,
    /// (send WRs, recv WRs, send SGEs, recv SGEs, inline bytes)
    pub cap: [u32; 5],
}

/// One piece of memory of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sge {
    /// Start.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// Local key.
    pub lkey: u32,
}

/// What a request does.
#[derive(Clone, Copy, Debug)]
pub enum Verb {
    /// SEND, with immediate data (host order) or without.
    Send(Option<u32>),
    /// RDMA WRITE to (address, rkey), with immediate data or without.
    Write(u64, u32, Option<u32>),
    /// RDMA READ from (address, rkey).
    Read(u64, u32),
    /// FETCH_ADD of one at (address, rkey).
    FetchAdd(u64, u32),
    /// CMP_SWP at (address, rkey): compare with, store.
    CompareSwap(u64, u32, u64, u64),
}

/// One request.
#[derive(Clone, Copy, Debug)]
pub struct Wr {
    /// Comes back in the completion.
    pub wr_id: u64,
    /// What to do.
    pub verb: Verb,
    /// Local memory; entries of length 0 are left out.
    pub sges: [Sge; 2],
    /// Wants a completion.
    pub signalled: bool,
    /// Copies the data at once.
    pub inline: bool,
    /// Raises a solicited event at the other end.
    pub solicited: bool,
}

impl Qp {
    /// Makes a queue pair and brings it to INIT. Also returns the inline bytes it really has.
    ///
    /// # Errors
    /// As the library says.
    pub fn create(pd: &Pd, send_cq: &Cq, recv_cq: &Cq, srq: Option<&Srq>, o: &QpOptions) -> io::Result<(Self, u32)> {
        // SAFETY: plain C data.
        let mut attr: ib::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        attr.send_cq = send_cq.ptr;
        attr.recv_cq = recv_cq.ptr;
        attr.srq = srq.map_or(std::ptr::null_mut(), |s| s.ptr);
        attr.qp_type = ib::ibv_qp_type::IBV_QPT_RC;
        attr.cap.max_send_wr = o.sends;
        attr.cap.max_recv_wr = o.recvs;
        attr.cap.max_send_sge = 2;
        attr.cap.max_recv_sge = u32::from(srq.is_none());
        attr.cap.max_inline_data = o.inline;
        // SAFETY: every object given is alive.
        let ptr = unsafe { ib::ibv_create_qp(pd.ptr, &raw mut attr) };
        if ptr.is_null() {
            return Err(last("ibv_create_qp"));
        }
        let qp = Self { ptr };
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        a.qp_state = ib::ibv_qp_state::IBV_QPS_INIT;
        a.port_num = o.port;
        use ib::ibv_access_flags as f;
        a.qp_access_flags = f::IBV_ACCESS_REMOTE_WRITE.0 | f::IBV_ACCESS_REMOTE_READ.0 | f::IBV_ACCESS_REMOTE_ATOMIC.0;
        use ib::ibv_qp_attr_mask as m;
        let mask = m::IBV_QP_STATE | m::IBV_QP_PKEY_INDEX | m::IBV_QP_PORT | m::IBV_QP_ACCESS_FLAGS;
        qp.modify("ibv_modify_qp to INIT", &mut a, mask)?;
        Ok((qp, attr.cap.max_inline_data))
    }

    fn modify(&self, what: &'static str, attr: &mut ib::ibv_qp_attr, mask: ib::ibv_qp_attr_mask) -> io::Result<()> {
        // SAFETY: the queue pair is alive, the attribute of the library's type.
        check(what, unsafe { ib::ibv_modify_qp(self.ptr, attr, mask.0.cast_signed()) })
    }

    /// INIT to RTR to RTS against `peer`.
    ///
    /// # Errors
    /// As the library says.
    pub fn connect(&self, psn: u32, peer: &Endpoint, o: &QpOptions) -> io::Result<()> {
        self.to_rtr(peer, o)?;
        self.to_rts(psn, o)
    }

    /// INIT to RTR against `peer`.
    ///
    /// # Errors
    /// As the library says.
    pub fn to_rtr(&self, peer: &Endpoint, o: &QpOptions) -> io::Result<()> {
        use ib::ibv_qp_attr_mask as m;
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        a.qp_state = ib::ibv_qp_state::IBV_QPS_RTR;
        a.path_mtu = o.mtu;
        a.dest_qp_num = peer.qpn;
        a.rq_psn = peer.psn;
        a.max_dest_rd_atomic = o.rd_atomic;
        a.min_rnr_timer = 12;
        a.ah_attr.is_global = 1;
        a.ah_attr.dlid = peer.lid;
        a.ah_attr.port_num = o.port;
        a.ah_attr.grh.dgid.raw = peer.gid;
        a.ah_attr.grh.sgid_index = o.gid_index;
        a.ah_attr.grh.hop_limit = 64;
        let rtr = m::IBV_QP_STATE
            | m::IBV_QP_AV
            | m::IBV_QP_PATH_MTU
            | m::IBV_QP_DEST_QPN
            | m::IBV_QP_RQ_PSN
            | m::IBV_QP_MAX_DEST_RD_ATOMIC
            | m::IBV_QP_MIN_RNR_TIMER;
        self.modify("ibv_modify_qp to RTR", &mut a, rtr)
    }

    /// RTR to RTS.
    ///
    /// # Errors
    /// As the library says.
    pub fn to_rts(&self, psn: u32, o: &QpOptions) -> io::Result<()> {
        use ib::ibv_qp_attr_mask as m;
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        a.qp_state = ib::ibv_qp_state::IBV_QPS_RTS;
        a.sq_psn = psn;
        a.timeout = o.timeout;
        a.retry_cnt = o.retry;
        a.rnr_retry = o.rnr_retry;
        a.max_rd_atomic = o.rd_atomic;
        let rts = m::IBV_QP_STATE
            | m::IBV_QP_TIMEOUT
            | m::IBV_QP_RETRY_CNT
            | m::IBV_QP_RNR_RETRY
            | m::IBV_QP_SQ_PSN
            | m::IBV_QP_MAX_QP_RD_ATOMIC;
        self.modify("ibv_modify_qp to RTS", &mut a, rts)
    }

    /// From INIT (or RTS, for SQD) to a state an unused QP may rest in.
    ///
    /// # Errors
    /// As the library says.
    pub fn rest_in(&self, state: RestState) -> io::Result<()> {
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        a.qp_state = match state {
            RestState::Reset => ib::ibv_qp_state::IBV_QPS_RESET,
            RestState::Drained => ib::ibv_qp_state::IBV_QPS_SQD,
            RestState::Error => ib::ibv_qp_state::IBV_QPS_ERR,
        };
        self.modify("ibv_modify_qp to a resting state", &mut a, ib::ibv_qp_attr_mask::IBV_QP_STATE)
    }

    /// From RTS to SQD, asking for the event that says that the send queue is drained.
    ///
    /// # Errors
    /// As the library says.
    pub fn drain(&self) -> io::Result<()> {
        use ib::ibv_qp_attr_mask as m;
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        a.qp_state = ib::ibv_qp_state::IBV_QPS_SQD;
        a.en_sqd_async_notify = 1;
        self.modify("ibv_modify_qp to SQD", &mut a, m::IBV_QP_STATE | m::IBV_QP_EN_SQD_ASYNC_NOTIFY)
    }

    /// From SQD back to RTS.
    ///
    /// # Errors
    /// As the library says; also while the send queue is not drained.
    pub fn go_on(&self) -> io::Result<()> {
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        a.qp_state = ib::ibv_qp_state::IBV_QPS_RTS;
        self.modify("ibv_modify_qp back to RTS", &mut a, ib::ibv_qp_attr_mask::IBV_QP_STATE)
    }

    /// What events about it carry.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.ptr as u64
    }

    /// The QP number, read from the public field.
    #[must_use]
    pub fn qpn(&self) -> u32 {
        // SAFETY: the queue pair is alive.
        unsafe { (*self.ptr).qp_num }
    }

    /// What `ibv_query_qp` answers now.
    ///
    /// # Errors
    /// As the library says.
    pub fn query(&self) -> io::Result<QpView> {
        // SAFETY: plain C data.
        let mut a: ib::ibv_qp_attr = unsafe { std::mem::zeroed() };
        // SAFETY: plain C data.
        let mut init: ib::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        use ib::ibv_qp_attr_mask as m;
        let mask = m::IBV_QP_STATE
            | m::IBV_QP_AV
            | m::IBV_QP_PATH_MTU
            | m::IBV_QP_DEST_QPN
            | m::IBV_QP_TIMEOUT
            | m::IBV_QP_RETRY_CNT
            | m::IBV_QP_RNR_RETRY
            | m::IBV_QP_CAP
            | m::IBV_QP_ACCESS_FLAGS;
        // SAFETY: the queue pair is alive, both structures of the library's types.
        check("ibv_query_qp", unsafe { ib::ibv_query_qp(self.ptr, &raw mut a, mask.0.cast_signed(), &raw mut init) })?;
        Ok(QpView {
            qpn: self.qpn(),
            state: a.qp_state,
            dest_qpn: a.dest_qp_num,
            // SAFETY: every bit pattern is a valid byte array.
            dgid: unsafe { a.ah_attr.grh.dgid.raw },
            sgid_index: a.ah_attr.grh.sgid_index,
            small: [
                a.port_num,
                a.timeout,
                a.retry_cnt,
                a.rnr_retry,
                a.min_rnr_timer,
                a.max_rd_atomic,
                a.max_dest_rd_atomic,
            ],
            mtu: a.path_mtu,
            access: a.qp_access_flags,
            cap: [
                init.cap.max_send_wr,
                init.cap.max_recv_wr,
                init.cap.max_send_sge,
                init.cap.max_recv_sge,
                init.cap.max_inline_data,
            ],
        })
    }

    /// Destroys it.
    ///
    /// # Errors
    /// As the library says.
    pub fn destroy(self) -> io::Result<()> {
        // SAFETY: the caller does this once per queue pair.
        check("ibv_destroy_qp", unsafe { ib::ibv_destroy_qp(self.ptr) })
    }
}

/// Requests to be posted as one chain. It gives its storage back with every post, so that a program with many queue pairs
/// uses the same for all of them, and writes on few pages.
#[derive(Default)]
pub struct SendBatch {
    wrs: Vec<ib::ibv_send_wr>,
    sges: Vec<[ib::ibv_sge; 2]>,
}

// SAFETY: the pointers inside are set and used within one call of `post`.
unsafe impl Send for SendBatch {}

impl std::fmt::Debug for SendBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SendBatch({})", self.wrs.len())
    }
}

impl SendBatch {
    /// Adds one request.
    pub fn push(&mut self, wr: &Wr) {
        use ib::ibv_send_flags as f;
        use ib::ibv_wr_opcode as o;
        // SAFETY: plain C data.
        let mut raw: ib::ibv_send_wr = unsafe { std::mem::zeroed() };
        raw.wr_id = wr.wr_id;
        for (flag, bit) in [
            (wr.signalled, f::IBV_SEND_SIGNALED.0),
            (wr.inline, f::IBV_SEND_INLINE.0),
            (wr.solicited, f::IBV_SEND_SOLICITED.0),
        ] {
            if flag {
                raw.send_flags |= bit;
            }
        }
        let set_imm = |raw: &mut ib::ibv_send_wr, imm: Option<u32>| {
            raw.imm_data_invalidated_rkey_union.imm_data = imm.unwrap_or(0).to_be();
        };
        match wr.verb {
            Verb::Send(imm) => {
                raw.opcode = if imm.is_some() { o::IBV_WR_SEND_WITH_IMM } else { o::IBV_WR_SEND };
                set_imm(&mut raw, imm);
            }
            Verb::Write(remote_addr, rkey, imm) => {
                raw.opcode = if imm.is_some() { o::IBV_WR_RDMA_WRITE_WITH_IMM } else { o::IBV_WR_RDMA_WRITE };
                set_imm(&mut raw, imm);
                raw.wr.rdma = ib::rdma_t { remote_addr, rkey };
            }
            Verb::Read(remote_addr, rkey) => {
                raw.opcode = o::IBV_WR_RDMA_READ;
                raw.wr.rdma = ib::rdma_t { remote_addr, rkey };
            }
            Verb::FetchAdd(remote_addr, rkey) => {
                raw.opcode = o::IBV_WR_ATOMIC_FETCH_AND_ADD;
                raw.wr.atomic = ib::atomic_t { remote_addr, compare_add: 1, swap: 0, rkey };
            }
            Verb::CompareSwap(remote_addr, rkey, compare_add, swap) => {
                raw.opcode = o::IBV_WR_ATOMIC_CMP_AND_SWP;
                raw.wr.atomic = ib::atomic_t { remote_addr, compare_add, swap, rkey };
            }
        }
        let n = wr.sges.iter().take_while(|s| s.len > 0).count();
        raw.num_sge = i32::try_from(n).unwrap_or(0);
        self.wrs.push(raw);
        self.sges.push(wr.sges.map(|s| ib::ibv_sge { addr: s.addr, length: s.len, lkey: s.lkey }));
    }

    /// Requests waiting to be posted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.wrs.len()
    }

    /// Whether there is nothing to post.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wrs.is_empty()
    }

    /// Posts the chain and empties it.
    ///
    /// # Errors
    /// As the library says, with the index of the first request it refused.
    pub fn post(&mut self, qp: &Qp) -> io::Result<()> {
        let n = self.wrs.len();
        if n == 0 {
            return Ok(());
        }
        for i in 0..n {
            self.wrs[i].sg_list = self.sges[i].as_mut_ptr();
            self.wrs[i].next = if i + 1 < n { &raw mut self.wrs[i + 1] } else { std::ptr::null_mut() };
        }
        let mut bad: *mut ib::ibv_send_wr = std::ptr::null_mut();
        let first = self.wrs.as_mut_ptr();
        // SAFETY: the chain lives in vectors not touched until the call returns.
        let rc = unsafe { ib::ibv_post_send(qp.ptr, first, &raw mut bad) };
        let refused = self.wrs.iter().position(|w| std::ptr::eq(w, bad));
        *self = Self::default();
        check("ibv_post_send", rc)
            .map_err(|e| io::Error::new(e.kind(), format!("{e} (request {refused:?} of a chain of {n})")))
    }
}
