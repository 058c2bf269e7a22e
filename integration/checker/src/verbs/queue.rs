//! Completion queues and channels, RECVs, shared receive queues.
#![expect(unsafe_code, reason = "calls libibverbs")]

use super::device::set_nonblocking;
use super::{Context, Pd, Qp, Sge, check, last};
use rdma_sys as ib;
use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;

/// A completion channel.
#[derive(Clone, Copy, Debug)]
pub struct Channel {
    ptr: *mut ib::ibv_comp_channel,
}

// SAFETY: libibverbs objects may be used from any thread.
unsafe impl Send for Channel {}
// SAFETY: as above.
unsafe impl Sync for Channel {}

impl Channel {
    /// Makes a channel.
    ///
    /// # Errors
    /// As the library says.
    pub fn create(context: &Context, nonblocking: bool) -> io::Result<Self> {
        // SAFETY: the context is open.
        let ptr = unsafe { ib::ibv_create_comp_channel(context.ptr) };
        if ptr.is_null() {
            return Err(last("ibv_create_comp_channel"));
        }
        let c = Self { ptr };
        if nonblocking {
            set_nonblocking(c.fd())?;
        }
        Ok(c)
    }

    /// Its descriptor.
    #[must_use]
    pub fn fd(&self) -> RawFd {
        // SAFETY: the channel is alive.
        unsafe { (*self.ptr).fd }
    }

    /// Takes one event; blocks or says `WouldBlock` as the descriptor is set. Returns the value
    /// given to [`Cq::create`].
    ///
    /// # Errors
    /// As `read` on the descriptor.
    pub fn event(&self) -> io::Result<usize> {
        let mut cq = std::ptr::null_mut();
        let mut tag = std::ptr::null_mut();
        // SAFETY: the channel is alive, the out parameters valid.
        let rc = unsafe { ib::ibv_get_cq_event(self.ptr, &raw mut cq, &raw mut tag) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(tag as usize)
    }

    /// Destroys it.
    ///
    /// # Errors
    /// As the library says.
    pub fn destroy(self) -> io::Result<()> {
        // SAFETY: the caller does this once per channel.
        check("ibv_destroy_comp_channel", unsafe { ib::ibv_destroy_comp_channel(self.ptr) })
    }
}

/// A completion queue.
#[derive(Clone, Copy, Debug)]
pub struct Cq {
    pub(super) ptr: *mut ib::ibv_cq,
}

// SAFETY: libibverbs objects may be used from any thread.
unsafe impl Send for Cq {}
// SAFETY: as above.
unsafe impl Sync for Cq {}

/// Kind of a completed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WcOpcode {
    /// A SEND, with or without immediate.
    Send,
    /// An RDMA WRITE, with or without immediate.
    Write,
    /// An RDMA READ.
    Read,
    /// A CMP_SWP.
    CompareSwap,
    /// A FETCH_ADD.
    FetchAdd,
    /// A RECV consumed by a SEND.
    Recv,
    /// A RECV consumed by a WRITE WITH IMMEDIATE.
    RecvWriteImm,
    /// Anything else.
    Other(u32),
}

/// One completion.
#[derive(Clone, Copy, Debug)]
pub struct Wc {
    /// The number given when posting.
    pub wr_id: u64,
    /// `enum ibv_wc_status`; 0 is success.
    pub status: u32,
    /// Vendor's error code.
    pub vendor_err: u32,
    /// Kind; means nothing unless the status is success.
    pub opcode: WcOpcode,
    /// Bytes received, read or fetched.
    pub byte_len: u32,
    /// Number of the local QP.
    pub qp_num: u32,
    /// Immediate data in host order, if any.
    pub imm: Option<u32>,
}

impl Wc {
    /// The library's words for the status.
    #[must_use]
    pub fn status_text(&self) -> String {
        // SAFETY: the call accepts any number and returns a constant string.
        let p = unsafe { ib::ibv_wc_status_str(self.status) };
        // SAFETY: as above.
        let s = unsafe { CStr::from_ptr(p) };
        format!("{} ({}), vendor error {:#x}", s.to_string_lossy(), self.status, self.vendor_err)
    }

    fn of(w: &ib::ibv_wc) -> Self {
        use ib::ibv_wc_opcode as o;
        let opcode = match w.opcode {
            o::IBV_WC_SEND => WcOpcode::Send,
            o::IBV_WC_RDMA_WRITE => WcOpcode::Write,
            o::IBV_WC_RDMA_READ => WcOpcode::Read,
            o::IBV_WC_COMP_SWAP => WcOpcode::CompareSwap,
            o::IBV_WC_FETCH_ADD => WcOpcode::FetchAdd,
            o::IBV_WC_RECV => WcOpcode::Recv,
            o::IBV_WC_RECV_RDMA_WITH_IMM => WcOpcode::RecvWriteImm,
            other => WcOpcode::Other(other),
        };
        let with_imm = w.wc_flags & ib::ibv_wc_flags::IBV_WC_WITH_IMM.0 != 0;
        // SAFETY: both members of the union are plain 32-bit numbers.
        let imm = with_imm.then(|| u32::from_be(unsafe { w.imm_data_invalidated_rkey_union.imm_data }));
        Self {
            wr_id: w.wr_id,
            status: w.status,
            vendor_err: w.vendor_err,
            opcode,
            byte_len: w.byte_len,
            qp_num: w.qp_num,
            imm,
        }
    }
}

/// Completions taken in one poll at most.
const POLL: usize = 32;

impl Cq {
    /// Makes a queue of at least `entries` that raises events carrying `tag` on `channel`.
    ///
    /// # Errors
    /// As the library says.
    pub fn create(context: &Context, entries: u32, channel: Option<&Channel>, tag: usize) -> io::Result<Self> {
        let entries = i32::try_from(entries).map_err(io::Error::other)?;
        let channel = channel.map_or(std::ptr::null_mut(), |c| c.ptr);
        // SAFETY: context and channel are alive; the tag is never dereferenced.
        let ptr = unsafe { ib::ibv_create_cq(context.ptr, entries, tag as *mut _, channel, 0) };
        if ptr.is_null() {
            return Err(last("ibv_create_cq"));
        }
        Ok(Self { ptr })
    }

    /// Entries the library says the queue has.
    #[must_use]
    pub fn entries(&self) -> i32 {
        // SAFETY: the queue is alive.
        unsafe { (*self.ptr).cqe }
    }

    /// Takes up to 32 completions and appends them to `out`; says how many.
    ///
    /// # Errors
    /// When the library reports a broken queue.
    pub fn poll(&self, out: &mut Vec<Wc>) -> io::Result<usize> {
        // SAFETY: plain C data of which only the filled entries are read.
        let mut wcs: [ib::ibv_wc; POLL] = unsafe { std::mem::zeroed() };
        // SAFETY: the queue is alive; the array has POLL entries.
        let n = unsafe { ib::ibv_poll_cq(self.ptr, POLL as i32, wcs.as_mut_ptr()) };
        let n = usize::try_from(n)
            .ok()
            .filter(|n| *n <= POLL)
            .ok_or_else(|| io::Error::other(format!("ibv_poll_cq returned {n}")))?;
        out.extend(wcs[..n].iter().map(Wc::of));
        Ok(n)
    }

    /// Asks for one event at the next completion (at the next solicited one).
    ///
    /// # Errors
    /// As the library says.
    pub fn arm(&self, solicited_only: bool) -> io::Result<()> {
        // SAFETY: the queue is alive.
        check("ibv_req_notify_cq", unsafe { ib::ibv_req_notify_cq(self.ptr, i32::from(solicited_only)) })
    }

    /// Acknowledges `n` events.
    pub fn ack(&self, n: u32) {
        // SAFETY: the queue is alive.
        unsafe { ib::ibv_ack_cq_events(self.ptr, n) }
    }

    /// Destroys it. Waits until every event delivered was acknowledged.
    ///
    /// # Errors
    /// As the library says; a QP that still uses it makes it fail.
    pub fn destroy(self) -> io::Result<()> {
        // SAFETY: the caller does this once per queue.
        check("ibv_destroy_cq", unsafe { ib::ibv_destroy_cq(self.ptr) })
    }
}

/// A shared receive queue.
#[derive(Clone, Copy, Debug)]
pub struct Srq {
    pub(super) ptr: *mut ib::ibv_srq,
}

// SAFETY: libibverbs objects may be used from any thread.
unsafe impl Send for Srq {}
// SAFETY: as above.
unsafe impl Sync for Srq {}

impl Srq {
    /// Asks for one event when fewer than `limit` RECVs are left.
    ///
    /// # Errors
    /// As the library says.
    pub fn set_limit(&self, limit: u32) -> io::Result<()> {
        let mut attr = ib::ibv_srq_attr { max_wr: 0, max_sge: 0, srq_limit: limit };
        let mask = ib::ibv_srq_attr_mask::IBV_SRQ_LIMIT.0.cast_signed();
        // SAFETY: the queue is alive, the attribute of the library's type.
        check("ibv_modify_srq", unsafe { ib::ibv_modify_srq(self.ptr, &raw mut attr, mask) })
    }

    /// What events about it carry.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.ptr as u64
    }

    /// Makes a queue for `depth` RECVs of one SGE each.
    ///
    /// # Errors
    /// As the library says.
    pub fn create(pd: &Pd, depth: u32) -> io::Result<Self> {
        // SAFETY: plain C data.
        let mut attr: ib::ibv_srq_init_attr = unsafe { std::mem::zeroed() };
        attr.attr.max_wr = depth;
        attr.attr.max_sge = 1;
        // SAFETY: the domain is alive, the attribute of the library's type.
        let ptr = unsafe { ib::ibv_create_srq(pd.ptr, &raw mut attr) };
        if ptr.is_null() {
            return Err(last("ibv_create_srq"));
        }
        Ok(Self { ptr })
    }

    /// Destroys it.
    ///
    /// # Errors
    /// As the library says.
    pub fn destroy(self) -> io::Result<()> {
        // SAFETY: the caller does this once per queue.
        check("ibv_destroy_srq", unsafe { ib::ibv_destroy_srq(self.ptr) })
    }
}

/// RECVs to be posted as one chain. It gives its storage back with every post, as [`super::SendBatch`] does.
#[derive(Default)]
pub struct RecvBatch {
    wrs: Vec<ib::ibv_recv_wr>,
    sges: Vec<ib::ibv_sge>,
}

// SAFETY: the pointers inside are set and used within one call of `post`.
unsafe impl Send for RecvBatch {}

impl std::fmt::Debug for RecvBatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "RecvBatch({})", self.wrs.len())
    }
}

impl RecvBatch {
    /// Adds one RECV.
    pub fn push(&mut self, wr_id: u64, sge: Sge) {
        self.sges.push(ib::ibv_sge { addr: sge.addr, length: sge.len, lkey: sge.lkey });
        self.wrs.push(ib::ibv_recv_wr { wr_id, next: std::ptr::null_mut(), sg_list: std::ptr::null_mut(), num_sge: 1 });
    }

    /// Whether there is nothing to post.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.wrs.is_empty()
    }

    /// Posts the chain to the SRQ, or to the QP, and empties it.
    ///
    /// # Errors
    /// As the library says; the first request it refused is named.
    pub fn post(&mut self, qp: &Qp, srq: Option<&Srq>) -> io::Result<()> {
        if self.wrs.is_empty() {
            return Ok(());
        }
        let n = self.wrs.len();
        for i in 0..n {
            self.wrs[i].sg_list = &raw mut self.sges[i];
            self.wrs[i].next = if i + 1 < n { &raw mut self.wrs[i + 1] } else { std::ptr::null_mut() };
        }
        let mut bad = std::ptr::null_mut();
        let first = self.wrs.as_mut_ptr();
        let rc = match srq {
            // SAFETY: the chain lives in vectors not touched until the call returns.
            Some(s) => unsafe { ib::ibv_post_srq_recv(s.ptr, first, &raw mut bad) },
            // SAFETY: as above.
            None => unsafe { ib::ibv_post_recv(qp.ptr, first, &raw mut bad) },
        };
        *self = Self::default();
        check("ibv_post_recv", rc)
    }
}
