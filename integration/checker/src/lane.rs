//! One posting stream on a QP: decides what to post next, remembers what every outstanding request
//! must bring back, and checks it when it completes.
//!
//! A lane belongs to one posting thread; several lanes of a QP post without a common lock, as
//! several threads of an ordinary program do. The lane's own lock is shared with the polling thread
//! only.

use crate::atomics::{Chain, Counter};
use crate::link::Link;
use crate::pattern::{self, HEADER, Kind, Side, Stamp};
use crate::region::RegionModel;
use crate::stats::Stats;
use crate::tracker::Tracker;
use crate::verbs::{SendBatch, Sge, Verb, Wc, WcOpcode, Wr};
use crate::workload::{Fault, Op, Workload};
use crate::wrid::WrId;
use std::sync::atomic::Ordering;

/// What an outstanding request is, and what is to be checked when it is known complete.
#[derive(Debug)]
pub struct Pending {
    opcode: WcOpcode,
    len: u32,
    buffer: Option<u16>,
    check: Check,
}

#[derive(Debug)]
enum Check {
    Sent,
    Written,
    ReadBack { slot: usize },
    Known,
    Fetched { expect: u64, chain: bool },
    Nothing,
}

/// State of one lane.
#[derive(Debug)]
pub struct Lane {
    side: Side,
    qp: u16,
    id: u8,
    free: Vec<u16>,
    tracker: Tracker<Pending>,
    next_wr: u64,
    since_signal: u32,
    /// Operations chosen so far.
    pub posted: u64,
    /// Two-sided messages numbered so far.
    pub two_sided: u64,
    ring: u64,
    cursor: usize,
    /// Model of the slots this lane writes.
    pub region: RegionModel,
    /// Model of the counter this lane adds to.
    pub counter: Counter,
    /// Model of the cell this lane swaps.
    pub chain: Chain,
    batch: SendBatch,
    scribble: Vec<(u16, u32)>,
    fault: Option<(Fault, u64)>,
}

/// What one attempt to post achieved.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pumped {
    /// Requests posted.
    pub posted: usize,
    /// Stopped for want of the peer's RECVs or by the rate limit: nothing local will tell when to
    /// go on.
    pub starved: bool,
}

/// What the caller of [`Lane::pump`] allows.
#[derive(Clone, Copy, Debug)]
pub struct Allowance<'a> {
    /// The workload.
    pub w: &'a Workload,
    /// No new work; only what makes everything outstanding complete.
    pub draining: bool,
    /// Operations the rate limit lets through now.
    pub budget: &'a std::sync::atomic::AtomicI64,
}

impl Lane {
    /// A lane that has posted nothing.
    #[must_use]
    pub fn new(side: Side, qp: u16, id: u8, w: &Workload) -> Self {
        let depth = u16::try_from(w.lane_depth()).unwrap_or(u16::MAX);
        let faulty = qp == 0 && id == 0 && side == Side::Client;
        Self {
            side,
            qp,
            id,
            free: (0..depth).rev().collect(),
            tracker: Tracker::default(),
            next_wr: 0,
            since_signal: 0,
            posted: 0,
            two_sided: 0,
            ring: 0,
            // Lanes start at different places of the mix, so that operations of all kinds meet.
            cursor: usize::from(qp) + usize::from(id),
            region: RegionModel::new(side, qp, id, usize::from(w.slots), w.msg_size as usize),
            counter: Counter::default(),
            chain: Chain::default(),
            batch: SendBatch::default(),
            scribble: Vec::new(),
            fault: w.self_test.filter(|_| faulty).map(|f| (f, w.self_test_at)),
        }
    }

    /// Whether nothing is outstanding.
    #[must_use]
    pub fn idle(&self) -> bool {
        self.tracker.is_empty()
    }

    /// Whether the operations asked for are all posted.
    #[must_use]
    pub fn reached(&self, w: &Workload) -> bool {
        w.count > 0 && self.posted >= w.count.div_ceil(u64::from(w.lanes()))
    }

    /// The oldest outstanding requests, in words.
    #[must_use]
    pub fn outstanding(&self) -> String {
        let n = self.tracker.len();
        let mut text = format!("lane {}: {n} outstanding", self.id);
        for (id, signalled, p) in self.tracker.outstanding().take(4) {
            text += &format!(", {:?} wr_id {id:#x}{}", p.opcode, if signalled { "" } else { " unsignalled" });
        }
        text
    }

    /// Posts as much as there is room and allowance for.
    ///
    /// # Errors
    /// When posting fails.
    pub fn pump(&mut self, link: &Link, a: Allowance<'_>, stats: &Stats) -> Result<Pumped, String> {
        let mut result = Pumped::default();
        loop {
            let n = self.gather(link, a, stats, &mut result.starved);
            if n == 0 {
                return Ok(result);
            }
            result.posted += n;
            self.batch.post(&link.qp).map_err(|e| format!("{link}: {e}; {}", self.outstanding()))?;
            // An inline payload belongs to the library once the call returned.
            for (buffer, len) in self.scribble.drain(..) {
                link.send_memory.set(link.buffer(self.id, buffer), len as usize, 0xdd);
            }
        }
    }

    fn gather(&mut self, link: &Link, a: Allowance<'_>, stats: &Stats, starved: &mut bool) -> usize {
        while self.batch.len() < a.w.batch as usize
            && !self.free.is_empty()
            && self.tracker.len() < a.w.lane_depth() as usize
        {
            if a.draining {
                if !self.tracker.ends_signalled() {
                    let wr = Verb::Write(link.remote().addr, link.remote().rkey, None);
                    self.push(link, a.w, wr, &[], true, false, Check::Nothing);
                }
                break;
            }
            if self.reached(a.w) {
                // Whatever is still unsignalled must complete, or the run never ends.
                if !self.tracker.ends_signalled() && self.batch.is_empty() {
                    let wr = Verb::Write(link.remote().addr, link.remote().rkey, None);
                    self.push(link, a.w, wr, &[], true, false, Check::Nothing);
                }
                break;
            }
            if a.w.rate > 0 && a.budget.fetch_sub(1, Ordering::Relaxed) <= 0 {
                a.budget.fetch_add(1, Ordering::Relaxed);
                *starved = true;
                break;
            }
            let op = a.w.mix.0[self.cursor % a.w.mix.0.len()];
            if !self.choose(op, link, a.w, stats) {
                *starved = true;
                break;
            }
            self.cursor += 1;
            self.posted += 1;
        }
        self.batch.len()
    }

    /// Prepares one operation. False when the peer has no RECV for it.
    fn choose(&mut self, op: Op, link: &Link, w: &Workload, stats: &Stats) -> bool {
        let lane = usize::from(self.id);
        let remote = link.remote();
        match op {
            Op::Send | Op::SendImm | Op::WriteImm => {
                let Some(turn) = link.take_credit(w) else {
                    return false;
                };
                self.message(op, link, w, turn);
                stats.sent.fetch_add(1, Ordering::Relaxed);
            }
            Op::Write => {
                let Some(plan) = self.region.plan_write() else {
                    self.read_known(link, w);
                    return true;
                };
                if self.fault == Some((Fault::LostWrite, plan.stamp.seq)) {
                    return true;
                }
                let at = remote.addr + link.layout.slot(lane, plan.slot) as u64;
                let mut content = vec![0; plan.len];
                pattern::fill(&mut content, &plan.stamp);
                self.push(link, w, Verb::Write(at, remote.rkey, None), &content, false, false, Check::Written);
            }
            Op::Read => match self.region.plan_read_back() {
                Some(slot) => {
                    let at = remote.addr + link.layout.slot(lane, slot) as u64;
                    let len = link.layout.slot_len;
                    self.fetch(link, w, Verb::Read(at, remote.rkey), len, Check::ReadBack { slot });
                }
                None => self.read_known(link, w),
            },
            Op::Faa => {
                let mut expect = self.counter.add();
                if self.fault == Some((Fault::LostAtomic, expect)) {
                    expect = self.counter.add();
                }
                let at = remote.addr + link.layout.counter(lane) as u64;
                let check = Check::Fetched { expect, chain: false };
                self.fetch(link, w, Verb::FetchAdd(at, remote.rkey), 8, check);
            }
            Op::Cas => {
                let (compare, swap) = self.chain.step();
                let at = remote.addr + link.layout.cell(lane) as u64;
                let check = Check::Fetched { expect: compare, chain: true };
                let verb = Verb::CompareSwap(at, remote.rkey, compare, swap);
                self.fetch(link, w, verb, 8, check);
            }
        }
        true
    }

    fn message(&mut self, op: Op, link: &Link, w: &Workload, turn: u64) {
        let mut seq = self.two_sided;
        self.two_sided += 1;
        match self.fault {
            Some((Fault::Drop, at)) if seq == at => {
                seq += 1;
                self.two_sided += 1;
            }
            Some((Fault::Dup, at)) if seq == at => {
                seq = seq.saturating_sub(1);
                self.two_sided -= 1;
                self.fault = None;
            }
            Some((Fault::Reorder, at)) if seq == at => seq += 1,
            Some((Fault::Reorder, at)) if seq == at + 1 => seq -= 1,
            _ => {}
        }
        let kind = match op {
            Op::Send => Kind::Message,
            Op::SendImm => Kind::MessageImm,
            _ => Kind::WriteImm,
        };
        let stamp = Stamp { from: self.side, kind, qp: self.qp, lane: self.id, seq };
        let mut content = vec![0; pattern::message_len(seq, w.msg_size as usize)];
        pattern::fill(&mut content, &stamp);
        if self.fault == Some((Fault::Corrupt, seq)) {
            let last = content.len() - 1;
            content[last] ^= 0x10;
        }
        let imm = immediate(self.id, seq);
        let remote = link.remote();
        let verb = match op {
            Op::Send => Verb::Send(None),
            Op::SendImm => Verb::Send(Some(imm)),
            _ => {
                let at = link.layout.ring(usize::from(self.id), self.ring);
                self.ring += 1;
                Verb::Write(remote.addr + at as u64, remote.rkey, Some(imm))
            }
        };
        let solicited = w.solicited && turn % w.solicit_every() == w.solicit_every() - 1;
        self.push(link, w, verb, &content, false, solicited, Check::Sent);
    }

    fn read_known(&mut self, link: &Link, w: &Workload) {
        let remote = link.remote();
        let at = remote.addr + link.layout.known(usize::from(self.id)) as u64;
        let len = link.layout.slot_len;
        self.fetch(link, w, Verb::Read(at, remote.rkey), len, Check::Known);
    }

    /// Queues an operation that brings `len` bytes back.
    fn fetch(&mut self, link: &Link, w: &Workload, verb: Verb, len: usize, check: Check) {
        let Some(&buffer) = self.free.last() else { return };
        // What is there must come from the operation, not from the one before.
        link.send_memory.set(link.buffer(self.id, buffer), len.min(HEADER), 0xaa);
        self.enqueue(link, w, verb, len, false, false, false, check);
    }

    /// Queues an operation that carries `content` (or nothing).
    #[expect(clippy::too_many_arguments, reason = "one private call that spells a request out")]
    fn push(
        &mut self,
        link: &Link,
        w: &Workload,
        verb: Verb,
        content: &[u8],
        last: bool,
        solicited: bool,
        check: Check,
    ) {
        if let Some(&buffer) = self.free.last() {
            link.send_memory.write(link.buffer(self.id, buffer), content);
        }
        let inline = !content.is_empty() && content.len() <= link.inline as usize;
        self.enqueue(link, w, verb, content.len(), inline, last, solicited, check);
    }

    #[expect(clippy::too_many_arguments, reason = "one private call that spells a request out")]
    fn enqueue(
        &mut self,
        link: &Link,
        w: &Workload,
        verb: Verb,
        len: usize,
        inline: bool,
        last: bool,
        solicited: bool,
        check: Check,
    ) {
        let Some(buffer) = self.free.pop() else { return };
        let seq = self.next_wr;
        self.next_wr += 1;
        let full = self.tracker.len() + 1 >= w.lane_depth() as usize || self.free.is_empty();
        self.since_signal += 1;
        // The lane's last free place is always signalled, or nothing would ever free one again.
        let signalled = last || full || self.since_signal >= w.signal_every;
        if signalled {
            self.since_signal = 0;
        }
        let wr_id = WrId::Send { qp: self.qp, lane: self.id, seq }.encode();
        let len32 = u32::try_from(len).unwrap_or(u32::MAX);
        let addr = link.send_memory.addr(link.buffer(self.id, buffer));
        let whole = Sge { addr, len: len32, lkey: link.send_mr.fields().lkey };
        let split = w.two_sge && !inline && len > 2 * HEADER && seq.is_multiple_of(3);
        let sges = if split {
            let head = HEADER as u32;
            [
                Sge { len: head, ..whole },
                Sge { addr: addr + u64::from(head), len: len32 - head, lkey: link.second_mr.fields().lkey },
            ]
        } else {
            [whole, Sge::default()]
        };
        self.batch.push(&Wr { wr_id, verb, sges, signalled, inline, solicited });
        if inline {
            self.scribble.push((buffer, len32));
        }
        let opcode = match verb {
            Verb::Send(_) => WcOpcode::Send,
            Verb::Write(..) => WcOpcode::Write,
            Verb::Read(..) => WcOpcode::Read,
            Verb::FetchAdd(..) => WcOpcode::FetchAdd,
            Verb::CompareSwap(..) => WcOpcode::CompareSwap,
        };
        let pending = Pending { opcode, len: len32, buffer: Some(buffer), check };
        self.tracker.post(wr_id, signalled, pending);
    }

    /// Takes one successful completion and checks everything it proves complete. Violations go to
    /// `fail`.
    pub fn complete(&mut self, link: &Link, wc: &Wc, stats: &Stats, mut fail: impl FnMut(String)) {
        if matches!(self.fault, Some((Fault::LostCompletion, at)) if wc.wr_id & 0xff_ffff_ffff >= at) {
            self.fault = None;
            return;
        }
        self.retire(link, wc, stats, &mut fail);
        if matches!(self.fault, Some((Fault::DupCompletion, at)) if wc.wr_id & 0xff_ffff_ffff >= at) {
            self.fault = None;
            self.retire(link, wc, stats, &mut fail);
        }
    }

    fn retire(&mut self, link: &Link, wc: &Wc, stats: &Stats, fail: &mut impl FnMut(String)) {
        let done: Vec<Pending> = match self.tracker.complete(wc.wr_id) {
            Ok(all) => all.collect(),
            Err(e) => {
                fail(format!("{link}: {e}"));
                Vec::new()
            }
        };
        if let Some(own) = done.last() {
            if own.opcode != wc.opcode {
                fail(format!(
                    "{link}: wr_id {:#x} was posted as {:?} and completed as {:?}",
                    wc.wr_id, own.opcode, wc.opcode
                ));
            }
            // The length is defined for operations that bring data back.
            let brings = matches!(own.opcode, WcOpcode::Read | WcOpcode::FetchAdd | WcOpcode::CompareSwap);
            if brings && own.len != wc.byte_len {
                fail(format!(
                    "{link}: {:?} wr_id {:#x} of {} bytes completed with byte_len {}",
                    own.opcode, wc.wr_id, own.len, wc.byte_len
                ));
            }
        }
        for p in done {
            self.verify(link, &p, stats, fail);
            self.free.extend(p.buffer);
        }
    }

    fn verify(&mut self, link: &Link, p: &Pending, stats: &Stats, fail: &mut impl FnMut(String)) {
        let bytes = u64::from(p.len);
        let at = p.buffer.map_or(0, |b| link.buffer(self.id, b));
        match p.check {
            Check::Nothing => {}
            Check::Sent => stats.op(&stats.delivered, bytes),
            Check::Written => stats.op(&stats.writes, bytes),
            Check::ReadBack { slot } => {
                let mut content = vec![0; p.len as usize];
                link.send_memory.read(at, &mut content);
                if let Err(m) = self.region.read_back(slot, &content) {
                    fail(format!(
                        "{link}: READ of slot {slot} of lane {} does not bring what was written: {m}; expected {}",
                        self.id,
                        pattern::describe(&self.region.expected(slot))
                    ));
                }
                stats.op(&stats.reads, bytes);
            }
            Check::Known => {
                let stamp = known(self.side.other(), self.qp, self.id);
                let mut content = vec![0; p.len as usize];
                link.send_memory.read(at, &mut content);
                if let Err(m) = pattern::verify(&content, &stamp) {
                    fail(format!("{link}: READ of memory that never changes: {m}"));
                }
                stats.op(&stats.reads, bytes);
            }
            Check::Fetched { expect, chain } => {
                let got = link.send_memory.load(at);
                if got != expect {
                    let what = if chain { "CMP_SWP" } else { "FETCH_ADD" };
                    fail(format!("{link}: {what} of lane {} fetched {got:#x} instead of {expect:#x}", self.id));
                }
                stats.op(&stats.atomics, bytes);
            }
        }
    }
}

/// Stamp of the slot that never changes.
#[must_use]
pub fn known(owner: Side, qp: u16, lane: u8) -> Stamp {
    Stamp { from: owner, kind: Kind::Known, qp, lane, seq: 0 }
}

/// Immediate data of a message: the lane in the upper 4 bits, then the number.
#[must_use]
pub fn immediate(lane: u8, seq: u64) -> u32 {
    u32::from(lane) << 28 | (seq & 0x0fff_ffff) as u32
}
