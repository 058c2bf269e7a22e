//! The receiving half of a QP: RECVs in order, messages in order, contents right.

use crate::lane::immediate;
use crate::link::Link;
use crate::pattern::{self, HEADER, Kind, Side, Stamp};
use crate::sequence::SequenceChecker;
use crate::stats::Stats;
use crate::verbs::{Memory, Mr, RecvBatch, Sge, Srq, Wc, WcOpcode};
use crate::workload::Workload;
use crate::wrid::WrId;
use std::collections::VecDeque;
use std::sync::Mutex;

/// Buffers and RECVs of one receive queue, shared or not.
#[derive(Debug)]
pub struct Pool {
    owner: u16,
    /// The buffers.
    pub memory: Memory,
    /// Their registration.
    pub mr: Mr,
    /// The shared queue, if it is one.
    pub srq: Option<Srq>,
    stride: usize,
    len: u32,
    state: Mutex<PoolState>,
}

#[derive(Debug)]
struct PoolState {
    turns: Vec<u32>,
    /// wr_ids posted and not consumed, oldest first.
    posted: VecDeque<u64>,
    batch: RecvBatch,
}

impl Pool {
    /// `depth` buffers, none posted.
    #[must_use]
    pub fn new(owner: u16, depth: u32, memory: Memory, mr: Mr, srq: Option<Srq>, stride: usize, len: u32) -> Self {
        Self {
            owner,
            memory,
            mr,
            srq,
            stride,
            len,
            state: Mutex::new(PoolState {
                turns: vec![0; depth as usize],
                posted: VecDeque::new(),
                batch: RecvBatch::default(),
            }),
        }
    }

    /// Queues every buffer for posting.
    pub fn fill(&self) {
        let mut s = crate::failure::lock(&self.state);
        for slot in 0..s.turns.len() {
            self.queue(&mut s, u16::try_from(slot).unwrap_or(u16::MAX));
        }
    }

    fn queue(&self, s: &mut PoolState, slot: u16) {
        let at = usize::from(slot) * self.stride;
        self.memory.set(at, HEADER, 0xee);
        let turn = &mut s.turns[usize::from(slot)];
        *turn = (*turn + 1) & 0xff_ffff;
        let wr_id = WrId::Recv { owner: self.owner, slot, turn: *turn }.encode();
        let sge = Sge { addr: self.memory.addr(at), len: self.len, lkey: self.mr.fields().lkey };
        s.batch.push(wr_id, sge);
        s.posted.push_back(wr_id);
    }

    /// Posts what is queued.
    ///
    /// # Errors
    /// As the library says.
    pub fn post(&self, link: &Link) -> Result<(), String> {
        let mut s = crate::failure::lock(&self.state);
        s.batch.post(&link.qp, self.srq.as_ref()).map_err(|e| format!("{link}: {e}; {} RECVs posted", s.posted.len()))
    }

    /// RECVs posted and not consumed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        crate::failure::lock(&self.state).posted.len()
    }

    /// A RECV was consumed. Gives the place of its buffer.
    fn consumed(&self, wr_id: u64, slot: u16) -> Result<usize, String> {
        let mut s = crate::failure::lock(&self.state);
        let at = match s.posted.iter().position(|p| *p == wr_id) {
            // QPs that share a queue may finish out of turn; an own queue is strictly in order.
            Some(i) if i == 0 || self.srq.is_some() => i,
            Some(i) => {
                let due = s.posted[0];
                s.posted.remove(i);
                return Err(format!(
                    "RECV {wr_id:#x} completed while the older RECV {due:#x} has not: lost or overtaken"
                ));
            }
            None => {
                return Err(format!(
                    "completion of RECV {wr_id:#x}, which is not posted (completed before, or never posted)"
                ));
            }
        };
        s.posted.remove(at);
        Ok(usize::from(slot) * self.stride)
    }

    fn give_back(&self, slot: u16) {
        let mut s = crate::failure::lock(&self.state);
        self.queue(&mut s, slot);
    }
}

#[derive(Debug, Default)]
struct Stream {
    numbers: SequenceChecker,
    ring: u64,
}

/// What one QP has received.
#[derive(Debug)]
pub struct Receiver {
    side: Side,
    qp: u16,
    streams: Vec<Stream>,
    /// Messages consumed, over all lanes.
    pub consumed: u64,
}

impl Receiver {
    /// A receiver that has received nothing.
    #[must_use]
    pub fn new(side: Side, qp: u16, w: &Workload) -> Self {
        Self { side, qp, streams: (0..w.lanes()).map(|_| Stream::default()).collect(), consumed: 0 }
    }

    /// Numbers received of each lane.
    #[must_use]
    pub fn received(&self) -> Vec<u64> {
        self.streams.iter().map(|s| s.numbers.next()).collect()
    }

    /// Takes one successful RECV completion. Violations go to `fail`.
    pub fn take(
        &mut self,
        link: &Link,
        pool: &Pool,
        wc: &Wc,
        w: &Workload,
        stats: &Stats,
        fail: &mut impl FnMut(String),
    ) {
        let WrId::Recv { slot, .. } = WrId::decode(wc.wr_id) else {
            return fail(format!("{link}: receive completion with the wr_id {:#x} of a send", wc.wr_id));
        };
        let at = match pool.consumed(wc.wr_id, slot) {
            Ok(at) => at,
            Err(e) => return fail(format!("{link}: {e}")),
        };
        match wc.opcode {
            WcOpcode::Recv => self.message(link, pool, at, wc, w, fail),
            WcOpcode::RecvWriteImm => self.write_imm(link, wc, w, fail),
            other => fail(format!("{link}: RECV {:#x} completed as {other:?}", wc.wr_id)),
        }
        pool.give_back(slot);
        self.consumed += 1;
        stats.op(&stats.received, u64::from(wc.byte_len));
    }

    fn message(&mut self, link: &Link, pool: &Pool, at: usize, wc: &Wc, w: &Workload, fail: &mut impl FnMut(String)) {
        let len = wc.byte_len as usize;
        if len > w.msg_size as usize || len < HEADER {
            return fail(format!("{link}: message of {len} bytes; they have {HEADER} to {}", w.msg_size));
        }
        let mut content = vec![0; len];
        pool.memory.read(at, &mut content);
        let Some((lane, seq)) = pattern::claimed_seq(&content) else {
            return fail(format!(
                "{link}: message after {} others is no message: {}",
                self.consumed,
                pattern::describe(&content)
            ));
        };
        let kind = if wc.imm.is_some() { Kind::MessageImm } else { Kind::Message };
        if let Some(imm) = wc.imm.filter(|imm| *imm != immediate(lane, seq)) {
            fail(format!(
                "{link}: message {seq} of lane {lane} came with immediate {imm:#x} instead of {:#x}",
                immediate(lane, seq)
            ));
        }
        if self.number(link, lane, seq, fail) {
            self.content_is(&content, self.stamp(kind, lane, seq), link, w, fail);
        }
    }

    fn write_imm(&mut self, link: &Link, wc: &Wc, w: &Workload, fail: &mut impl FnMut(String)) {
        let Some(imm) = wc.imm else {
            return fail(format!("{link}: WRITE WITH IMMEDIATE without immediate data"));
        };
        let lane = (imm >> 28) as u8;
        let Some(stream) = self.streams.get_mut(usize::from(lane)) else {
            return fail(format!("{link}: immediate {imm:#x} names a lane that does not exist"));
        };
        // The immediate carries 28 bits; the rest is that of the number due.
        let due = stream.numbers.next();
        let near = (u64::from(imm) & 0x0fff_ffff).wrapping_sub(due) & 0x0fff_ffff;
        let seq = if near < 1 << 27 { due + near } else { (due + near).saturating_sub(1 << 28) };
        let at = link.layout.ring(usize::from(lane), stream.ring);
        stream.ring += 1;
        let len = pattern::message_len(seq, w.msg_size as usize);
        if wc.byte_len as usize != len {
            fail(format!(
                "{link}: WRITE WITH IMMEDIATE number {seq} of lane {lane} has byte_len {} instead of {len}",
                wc.byte_len
            ));
        }
        let mut content = vec![0; len];
        link.shared_memory.read(at, &mut content);
        link.shared_memory.set(at, HEADER, 0xee);
        if self.number(link, lane, seq, fail) {
            self.content_is(&content, self.stamp(Kind::WriteImm, lane, seq), link, w, fail);
        }
    }

    fn number(&mut self, link: &Link, lane: u8, seq: u64, fail: &mut impl FnMut(String)) -> bool {
        let Some(stream) = self.streams.get_mut(usize::from(lane)) else {
            fail(format!("{link}: message claims lane {lane}, which does not exist"));
            return false;
        };
        if let Err(e) = stream.numbers.accept(seq) {
            fail(format!("{link}: lane {lane}: {e}"));
        }
        true
    }

    fn stamp(&self, kind: Kind, lane: u8, seq: u64) -> Stamp {
        Stamp { from: self.side.other(), kind, qp: self.qp, lane, seq }
    }

    fn content_is(&self, content: &[u8], stamp: Stamp, link: &Link, w: &Workload, fail: &mut impl FnMut(String)) {
        let due = pattern::message_len(stamp.seq, w.msg_size as usize);
        if content.len() != due {
            fail(format!("{link}: {stamp} came with byte_len {} instead of {due}", content.len()));
        }
        if let Err(m) = pattern::verify(content, &stamp) {
            fail(format!("{link}: {stamp}: {m}"));
        }
    }
}
