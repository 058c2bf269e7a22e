//! One connected QP with its memory, its lanes and its receiver.

use crate::failure::lock;
use crate::lane::Lane;
use crate::layout::Layout;
use crate::receive::{Pool, Receiver};
use crate::tracker::Tracker;
use crate::verbs::{Endpoint, Memory, Mr, Qp, SendBatch, Sge, Verb, Wc, Wr};
use crate::workload::{CONTROL_DEPTH, Workload};
use crate::wrid::{CONTROL, WrId};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

/// What the other end needs to know of a QP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Where the QP is.
    pub endpoint: Endpoint,
    /// Start of its shared memory.
    pub addr: u64,
    /// Key of its shared memory.
    pub rkey: u32,
}

/// One QP and everything that belongs to it.
#[derive(Debug)]
pub struct Link {
    /// Index in the run.
    pub index: u16,
    /// The QP.
    pub qp: Qp,
    /// Its number, as first seen.
    pub qpn: u32,
    /// Inline bytes it has.
    pub inline: u32,
    /// Context it belongs to.
    pub context: usize,
    /// Indices of its CQs.
    pub cqs: (usize, usize),
    /// Where things are in shared memory.
    pub layout: Layout,
    /// Source of sends, destination of what is fetched.
    pub send_memory: Memory,
    /// Its registration.
    pub send_mr: Mr,
    /// A second registration of the same memory.
    pub second_mr: Mr,
    /// Memory the peer accesses.
    pub shared_memory: Memory,
    /// Its registration.
    pub shared_mr: Mr,
    /// Its RECVs.
    pub pool: Arc<Pool>,
    /// The posting streams.
    pub lanes: Vec<Mutex<Lane>>,
    /// The receiving half.
    pub receiver: Mutex<Receiver>,
    /// The credit updates.
    pub control: Mutex<Control>,
    /// Process time of the last completion.
    pub progress_ns: AtomicU64,
    lane_depth: usize,
    credits_taken: AtomicU64,
    remote: OnceLock<Offer>,
}

/// Updates of the peer's view of how much we have consumed: 8-byte WRITEs on the same QP.
#[derive(Debug)]
pub struct Control {
    tracker: Tracker<u16>,
    free: Vec<u16>,
    next_wr: u64,
    told: u64,
    batch: SendBatch,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "QP {} (number {:#x})", self.index, self.qpn)
    }
}

/// Parts of a link that are made with verbs calls.
#[derive(Debug)]
pub struct Parts {
    /// The QP in INIT.
    pub qp: Qp,
    /// Inline bytes it has.
    pub inline: u32,
    /// Context it belongs to.
    pub context: usize,
    /// Indices of its CQs.
    pub cqs: (usize, usize),
    /// Send memory and its two registrations.
    pub send: (Memory, Mr, Mr),
    /// Shared memory and its registration.
    pub shared: (Memory, Mr),
    /// RECVs.
    pub pool: Arc<Pool>,
}

impl Link {
    /// Puts a link together.
    #[must_use]
    pub fn new(index: u16, side: crate::pattern::Side, w: &Workload, p: Parts) -> Self {
        Self {
            index,
            qpn: p.qp.qpn(),
            qp: p.qp,
            inline: p.inline.min(w.inline),
            context: p.context,
            cqs: p.cqs,
            layout: Layout::new(w),
            send_memory: p.send.0,
            send_mr: p.send.1,
            second_mr: p.send.2,
            shared_memory: p.shared.0,
            shared_mr: p.shared.1,
            pool: p.pool,
            lanes: (0..w.lanes()).map(|l| Mutex::new(Lane::new(side, index, l, w))).collect(),
            receiver: Mutex::new(Receiver::new(side, index, w)),
            control: Mutex::new(Control {
                tracker: Tracker::default(),
                free: (0..CONTROL_DEPTH as u16).collect(),
                next_wr: 0,
                told: 0,
                batch: SendBatch::default(),
            }),
            progress_ns: AtomicU64::new(0),
            lane_depth: w.lane_depth() as usize,
            credits_taken: AtomicU64::new(0),
            remote: OnceLock::new(),
        }
    }

    /// Bytes of send memory a link needs.
    #[must_use]
    pub fn send_bytes(w: &Workload) -> usize {
        let stride = Layout::new(w).stride();
        stride * w.lane_depth() as usize * usize::from(w.lanes()) + 64 * CONTROL_DEPTH as usize
    }

    /// Place of a buffer of a lane in send memory.
    #[must_use]
    pub fn buffer(&self, lane: u8, buffer: u16) -> usize {
        (usize::from(lane) * self.lane_depth + usize::from(buffer)) * self.layout.stride()
    }

    /// The other end, once connected.
    ///
    /// # Panics
    /// Before that.
    #[must_use]
    pub fn remote(&self) -> &Offer {
        self.remote.get().expect("links are connected before use")
    }

    /// Remembers the other end.
    pub fn set_remote(&self, o: Offer) {
        let _ = self.remote.set(o);
    }

    /// Takes one of the peer's RECVs, if it has one for us. Returns the message's number over all
    /// lanes.
    #[must_use]
    pub fn take_credit(&self, w: &Workload) -> Option<u64> {
        if w.no_credits {
            return Some(self.credits_taken.fetch_add(1, Ordering::Relaxed));
        }
        let consumed = self.shared_memory.load(self.layout.credit());
        let limit = consumed + u64::from(w.recv_depth);
        self.credits_taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| (n < limit).then_some(n + 1)).ok()
    }

    /// Messages sent, and messages the peer said it consumed.
    #[must_use]
    pub fn credits(&self) -> (u64, u64) {
        (self.credits_taken.load(Ordering::Relaxed), self.shared_memory.load(self.layout.credit()))
    }

    /// Tells the peer how many of its messages were consumed, when it is worth telling and there is
    /// room.
    ///
    /// # Errors
    /// When posting fails.
    pub fn tell(&self, consumed: u64, w: &Workload) -> Result<(), String> {
        if w.no_credits {
            return Ok(());
        }
        let mut c = lock(&self.control);
        let worth = u64::from(w.recv_depth / 4).max(1);
        if consumed < c.told + worth {
            return Ok(());
        }
        let Some(buffer) = c.free.pop() else {
            return Ok(());
        };
        let at = Self::send_bytes(w) - 64 * (usize::from(buffer) + 1);
        self.send_memory.write(at, &consumed.to_le_bytes());
        let wr_id = WrId::Send { qp: self.index, lane: CONTROL, seq: c.next_wr }.encode();
        c.next_wr += 1;
        c.told = consumed;
        c.tracker.post(wr_id, true, buffer);
        let inline = self.inline >= 8;
        c.batch.push(&Wr {
            wr_id,
            verb: Verb::Write(self.remote().addr + self.layout.credit() as u64, self.remote().rkey, None),
            sges: [Sge { addr: self.send_memory.addr(at), len: 8, lkey: self.send_mr.fields().lkey }, Sge::default()],
            signalled: true,
            inline,
            solicited: false,
        });
        let posted = c.batch.post(&self.qp);
        if inline {
            self.send_memory.set(at, 8, 0xdd);
        }
        posted.map_err(|e| format!("{self}: credit update: {e}"))
    }

    /// Takes the completion of a credit update.
    ///
    /// # Errors
    /// When it is not the one due.
    pub fn told(&self, wc: &Wc) -> Result<(), String> {
        let mut c = lock(&self.control);
        let freed: Vec<u16> = match c.tracker.complete(wc.wr_id) {
            Ok(all) => all.collect(),
            Err(e) => return Err(format!("{self}: credit update: {e}")),
        };
        c.free.extend(freed);
        Ok(())
    }

    /// Whether no credit update is under way.
    #[must_use]
    pub fn control_idle(&self) -> bool {
        lock(&self.control).tracker.is_empty()
    }

    /// What is under way, in words.
    #[must_use]
    pub fn describe(&self) -> String {
        let lanes: Vec<_> = self.lanes.iter().map(|l| lock(l).outstanding()).collect();
        let (taken, consumed) = self.credits();
        let control = lock(&self.control).tracker.len();
        format!(
            "{self}: {}; {control} credit updates outstanding; {taken} messages sent, peer consumed {consumed}; {} messages received, {} RECVs posted",
            lanes.join("; "),
            lock(&self.receiver).consumed,
            self.pool.outstanding()
        )
    }

    /// Whether a completion is due, or the peer owes us room.
    #[must_use]
    pub fn busy(&self, w: &Workload) -> bool {
        let (taken, consumed) = self.credits();
        self.lanes.iter().any(|l| !lock(l).idle())
            || !self.control_idle()
            || (!w.no_credits && taken >= consumed + u64::from(w.recv_depth))
    }
}
