//! Two ends, a network between them, applications that go on posting and polling, and a migration that is committed or
//! aborted at any moment, every step interleaved at random. Claim: nothing is lost, repeated or reordered, and no drain
//! hangs.
//!
//! The NIC is modelled by what verbs promise: a send queue executes in order; a two-sided message waits for a receive;
//! its effect at the remote end comes before its completion at this one; unsignalled sends complete silently. The rules
//! under test are those of `rdma_virt`; the harness performs what they name, as the shim does. That the model can fail
//! is shown by breaking one rule at a time.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use rdma_virt::fakecq::{Completion, FakeCq};
use rdma_virt::gate::{Flush, Gate, RecvPath, SendPath, Stage};
use rdma_virt::id::{VQpn, VRkey};
use rdma_virt::quiesce::{Situation, Verdict};
use rdma_virt::recvq::RecvQ;
use rdma_virt::saved::QpPhase;
use rdma_virt::sendq::{Polled, SendQ};
use rdma_virt::srq::Srq;
use rdma_virt::wr::{HeldSend, MARKER_WR_ID, Payload, opcode};
use std::cell::Cell;
use std::collections::VecDeque;

const QPS: usize = 2;
const DEPTH: u32 = 4;
const SIGNALED: u32 = 2;
const RECV: u32 = 128;

/// One rule not kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// Trailing unsignalled sends count as done.
    NoMarker,
    /// The drain does not look at sends.
    CloseAtOnce,
    /// The drain does not wait for messages the other end has sent.
    IgnoreExpected,
    /// Receives are held back from the suspension on.
    HoldReceives,
    /// A resume lets new sends pass while held ones are still there.
    PassWhileFlushing,
    /// A resume forgets what was held.
    ForgetHeld,
    /// Receives are not posted again on the new queue.
    ForgetReceives,
    /// The application polls the real CQ before the fake one.
    RealFirst,
    /// Completions polled by the drain are not kept.
    DropPolled,
    /// An end sends as soon as it has switched, though the other has not.
    NoBarrier,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Send { end: usize, qp: usize, two_sided: bool, signalled: bool },
    Receive { end: usize, qp: usize },
    Poll { end: usize },
    Deliver { from: usize, qp: usize },
    Acknowledge { from: usize, qp: usize },
    Suspend { end: usize },
    Drain { end: usize },
    Switch { end: usize },
    Resume { end: usize },
    Flush { end: usize, qp: usize },
    Abort { end: usize },
}

/// A send as the NIC has it.
#[derive(Clone, Copy, Debug)]
struct Wire {
    wr_id: u64,
    two_sided: bool,
    signalled: bool,
    marker: bool,
}

#[derive(Clone, Copy, Debug)]
struct Cqe {
    qp: usize,
    wr_id: u64,
    receive: bool,
    number: u64,
}

/// The NIC's side of one QP.
#[derive(Default, Debug)]
struct Nic {
    sq: VecDeque<Wire>,
    /// Executed at the other end, completion not here yet.
    unacknowledged: VecDeque<Wire>,
    rq: VecDeque<u64>,
}

struct Qp {
    gate: Gate,
    polled: Polled,
    nic: Nic,
    // What the application knows.
    next_send: u64,
    next_receive: u64,
    expected_completions: VecDeque<u64>,
    two_sided_sent: Vec<u64>,
    two_sided_received: Vec<u64>,
    /// Every send executed here, in order, over all queues there ever were.
    executed: Vec<u64>,
    receives_completed: u64,
    app_outstanding: u32,
}

struct End {
    qps: Vec<Qp>,
    cq: VecDeque<Cqe>,
    fake: FakeCq,
    srq: Option<Srq>,
    nic_srq: VecDeque<u64>,
    next_srq: u64,
    srq_completed: Vec<u64>,
    moving: bool,
    expected: Option<Vec<u64>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Open,
    Committed,
    Aborted,
}

struct World {
    ends: [End; 2],
    fate: Fate,
    broken: Broken,
    /// Migrations that came to their end, one way or the other.
    committed: u32,
    aborted: u32,
}

type Check = Result<(), String>;

impl End {
    fn new(moving: bool, srq: bool) -> Self {
        let qp = || Qp {
            gate: Gate::new(SendQ::new(DEPTH), (!srq).then(|| RecvQ::new(DEPTH, 1)), false),
            polled: Polled::default(),
            nic: Nic::default(),
            next_send: 0,
            next_receive: 0,
            expected_completions: VecDeque::new(),
            two_sided_sent: vec![],
            two_sided_received: vec![],
            executed: vec![],
            receives_completed: 0,
            app_outstanding: 0,
        };
        Self {
            qps: (0..QPS).map(|_| qp()).collect(),
            cq: VecDeque::new(),
            fake: FakeCq::new(),
            srq: srq.then(|| Srq::new(DEPTH, 1)),
            nic_srq: VecDeque::new(),
            next_srq: 0,
            srq_completed: vec![],
            moving,
            expected: None,
        }
    }

    fn stage_is(&self, wanted: &[Stage]) -> bool {
        self.qps.iter().all(|q| wanted.contains(&q.gate.stage()))
    }

    /// One completion of the real queue: counted, and in the application's terms; `None` for a marker's.
    fn take_real(&mut self) -> Option<Option<Completion>> {
        let cqe = self.cq.pop_front()?;
        let qp = &mut self.qps[cqe.qp];
        if cqe.wr_id == MARKER_WR_ID {
            qp.polled.marker_completed();
            return Some(None);
        }
        let mut wr_id = cqe.wr_id;
        if cqe.receive {
            qp.polled.message_received(self.srq.is_none());
            if let Some(srq) = &mut self.srq {
                wr_id = srq.completed(wr_id).expect("an SRQ's completion names its slot");
            }
        } else {
            qp.polled.send_completed();
        }
        Some(Some(Completion {
            wr_id,
            status: 0,
            opcode: if cqe.receive { RECV } else { 0 },
            vendor_err: 0,
            byte_len: cqe.number as u32,
            imm: 0,
            qpn: VQpn(cqe.qp as u32),
            src_qp: 0,
            flags: 0,
            pkey_index: 0,
            slid: 0,
            sl: 0,
            dlid_path_bits: 0,
        }))
    }

    /// What the application does with a completion: check everything about it.
    fn consume(&mut self, c: Completion) -> Check {
        let qp = &mut self.qps[c.qpn.0 as usize];
        if c.opcode & RECV != 0 {
            qp.two_sided_received.push(u64::from(c.byte_len));
            if self.srq.is_some() {
                if self.srq_completed.contains(&c.wr_id) || c.wr_id >= self.next_srq {
                    return Err(format!("SRQ receive {} completed twice or was never posted", c.wr_id));
                }
                self.srq_completed.push(c.wr_id);
            } else {
                if c.wr_id != qp.receives_completed {
                    return Err(format!("receive {} completed, {} was the oldest", c.wr_id, qp.receives_completed));
                }
                qp.receives_completed += 1;
            }
        } else {
            let expected = qp.expected_completions.pop_front();
            if expected != Some(c.wr_id) {
                return Err(format!("send {} completed, expected {expected:?}", c.wr_id));
            }
        }
        Ok(())
    }

    fn app_poll(&mut self, broken: Broken) -> Check {
        if broken == Broken::RealFirst
            && let Some(Some(c)) = self.take_real()
        {
            return self.consume(c);
        }
        if let Some(c) = self.fake.pop() {
            return self.consume(c);
        }
        match self.take_real() {
            Some(Some(c)) => self.consume(c),
            _ => Ok(()),
        }
    }

    fn post_send(&mut self, qp: usize, two_sided: bool, signalled: bool, broken: Broken) {
        let q = &mut self.qps[qp];
        // An application in its right mind does not have more under way than its queue takes; it learns of unsignalled
        // sends by later signalled ones.
        let signalled = signalled || q.app_outstanding + 1 >= DEPTH;
        if q.next_send - q.expected_completions.front().copied().unwrap_or(q.next_send) >= u64::from(DEPTH) {
            return;
        }
        let number = q.next_send;
        let op = if two_sided { opcode::SEND } else { opcode::RDMA_WRITE };
        let flags = if signalled { SIGNALED } else { 0 };
        let race = broken == Broken::PassWhileFlushing && q.gate.stage() == Stage::Flushing;
        match q.gate.send() {
            SendPath::Pass(mut pass) => {
                q.nic.sq.push_back(Wire { wr_id: number, two_sided, signalled, marker: false });
                pass.posted(op, signalled);
            }
            SendPath::Hold(_) if race => {
                q.nic.sq.push_back(Wire { wr_id: number, two_sided, signalled, marker: false });
            }
            SendPath::Hold(mut ledger) => {
                let held = HeldSend {
                    wr_id: number,
                    opcode: op,
                    flags,
                    imm: 0,
                    payload: Payload::Sges(vec![]),
                    remote_addr: 0,
                    rkey: VRkey(0),
                    compare_add: 0,
                    swap: 0,
                    datagram: None,
                };
                if ledger.hold(held).is_err() {
                    return; // ENOMEM: the application knows
                }
            }
        }
        q.next_send += 1;
        q.app_outstanding = if signalled { 0 } else { q.app_outstanding + 1 };
        if signalled {
            q.expected_completions.push_back(number);
        }
        if two_sided {
            q.two_sided_sent.push(number);
        }
    }

    fn post_receive(&mut self, qp: usize, broken: Broken) {
        if let Some(srq) = &mut self.srq {
            if srq.outstanding() + srq.remembered().len() >= DEPTH as usize {
                return;
            }
            let real = srq.passes();
            if let Ok(name) = srq.post(self.next_srq, &[]) {
                self.next_srq += 1;
                if real {
                    self.nic_srq.push_back(name);
                }
            }
            return;
        }
        let q = &mut self.qps[qp];
        let wr_id = q.next_receive;
        if wr_id - q.receives_completed >= u64::from(DEPTH) {
            return;
        }
        let early = broken == Broken::HoldReceives && matches!(q.gate.stage(), Stage::Suspended | Stage::Draining);
        match q.gate.recv() {
            RecvPath::Real if !early => {
                q.nic.rq.push_back(wr_id);
                q.gate.recv_posted(wr_id, &[], &q.polled);
            }
            _ => {
                if q.gate.recv_remember(wr_id, &[], &q.polled).is_err() {
                    return;
                }
            }
        }
        q.next_receive += 1;
    }

    /// One round of wait-before-stop.
    fn drain(&mut self, broken: Broken) -> Check {
        while let Some(taken) = self.take_real() {
            if let Some(c) = taken
                && broken != Broken::DropPolled
            {
                self.fake.push(c);
            }
        }
        let srq = self.srq.as_ref().map_or(0, |s| s.outstanding() as u64);
        let expected = self.expected.clone().expect("counts are exchanged before a drain");
        for (i, q) in self.qps.iter_mut().enumerate() {
            q.gate.drain().map_err(|e| e.to_string())?;
            let expected = (broken != Broken::IgnoreExpected).then_some(expected[i]);
            let mut now = Situation::of(&q.gate, &q.polled, QpPhase::Rts, expected, srq);
            if broken == Broken::NoMarker {
                now.trailing_unsignalled = 0;
            }
            if broken == Broken::CloseAtOnce {
                (now.trailing_unsignalled, now.sends) = (0, 0);
            }
            match now.verdict() {
                Verdict::Wait => {}
                Verdict::PostMarker => {
                    let marker = Wire { wr_id: MARKER_WR_ID, two_sided: false, signalled: true, marker: true };
                    q.nic.sq.push_back(marker);
                    q.gate.marker_posted();
                }
                Verdict::Quiet => q.gate.close().or_else(|e| match e.from {
                    Stage::Quiet => Ok(()),
                    _ => Err(e.to_string()),
                })?,
            }
        }
        if self.moving
            && self.stage_is(&[Stage::Quiet])
            && let Some(srq) = &mut self.srq
        {
            srq.close();
        }
        Ok(())
    }

    fn switch(&mut self, broken: Broken) -> Check {
        for q in &mut self.qps {
            q.nic = Nic::default();
            q.gate.switch(&q.polled).map_err(|e| e.to_string())?;
        }
        if self.moving {
            self.nic_srq.clear();
            if let Some(srq) = &mut self.srq {
                srq.switched();
            }
        }
        if broken != Broken::ForgetReceives {
            self.repost_srq();
        }
        Ok(())
    }

    fn repost_srq(&mut self) {
        if let Some(srq) = &mut self.srq
            && !srq.is_closed()
        {
            for name in srq.remembered() {
                self.nic_srq.push_back(name);
                srq.remembered_posted(name);
            }
        }
    }

    /// One step of what is to be given to the NIC; false if there is nothing.
    fn flush(&mut self, qp: usize, broken: Broken) -> bool {
        let q = &mut self.qps[qp];
        match q.gate.next_flush() {
            Flush::Done => false,
            Flush::Receive(r) => {
                if broken != Broken::ForgetReceives {
                    q.nic.rq.push_back(r.wr_id);
                }
                q.gate.receive_flushed();
                true
            }
            Flush::Send(wr) => {
                if q.nic.sq.len() + q.nic.unacknowledged.len() > DEPTH as usize {
                    return false; // no room: later
                }
                let wire = Wire {
                    wr_id: wr.wr_id,
                    two_sided: opcode::is_two_sided(wr.opcode),
                    signalled: wr.flags & SIGNALED != 0,
                    marker: false,
                };
                if broken != Broken::ForgetHeld {
                    q.nic.sq.push_back(wire);
                }
                q.gate.send_flushed();
                true
            }
        }
    }
}

impl World {
    fn new(srq: Option<usize>, broken: Broken) -> Self {
        let end = |i| End::new(i == 0, srq == Some(i));
        Self { ends: [end(0), end(1)], fate: Fate::Open, broken, committed: 0, aborted: 0 }
    }

    /// The oldest send of a queue takes effect at the other end; false if it cannot.
    fn deliver(&mut self, from: usize, qp: usize) -> bool {
        // One end's queue is the new one, the other's still the old: they are not connected to each other. Packets are
        // retried until they are, and the NIC gives up if there are any by then.
        let switched = |end: &End| end.stage_is(&[Stage::Switched, Stage::Flushing, Stage::Running]);
        if self.fate == Fate::Committed && !(switched(&self.ends[0]) && switched(&self.ends[1])) {
            if self.broken == Broken::NoBarrier {
                self.ends[from].qps[qp].nic.sq.pop_front();
            }
            return false;
        }
        let Some(wire) = self.ends[from].qps[qp].nic.sq.front().copied() else { return false };
        let to = &mut self.ends[1 - from];
        if wire.two_sided {
            let queue = if to.srq.is_some() { &mut to.nic_srq } else { &mut to.qps[qp].nic.rq };
            let Some(wr_id) = queue.pop_front() else { return false };
            to.cq.push_back(Cqe { qp, wr_id, receive: true, number: wire.wr_id });
        }
        if !wire.marker {
            to.qps[qp].executed.push(wire.wr_id);
        }
        let nic = &mut self.ends[from].qps[qp].nic;
        nic.sq.pop_front();
        nic.unacknowledged.push_back(wire);
        true
    }

    fn acknowledge(&mut self, from: usize, qp: usize) -> bool {
        let end = &mut self.ends[from];
        let Some(wire) = end.qps[qp].nic.unacknowledged.pop_front() else { return false };
        if wire.signalled {
            end.cq.push_back(Cqe { qp, wr_id: wire.wr_id, receive: false, number: 0 });
        }
        true
    }

    fn step(&mut self, op: Op) -> Check {
        let broken = self.broken;
        match op {
            Op::Send { end, qp, two_sided, signalled } => self.ends[end].post_send(qp, two_sided, signalled, broken),
            Op::Receive { end, qp } => self.ends[end].post_receive(qp, broken),
            Op::Poll { end } => self.ends[end].app_poll(broken)?,
            Op::Deliver { from, qp } => drop(self.deliver(from, qp)),
            Op::Acknowledge { from, qp } => drop(self.acknowledge(from, qp)),
            Op::Suspend { end } => {
                if self.fate == Fate::Open {
                    for q in &mut self.ends[end].qps {
                        q.gate.suspend().map_err(|e| e.to_string())?;
                    }
                    self.exchange_counts();
                }
            }
            Op::Drain { end } => {
                if self.fate == Fate::Open && self.ends[end].expected.is_some() {
                    self.ends[end].drain(broken)?;
                }
            }
            Op::Switch { end } => {
                let quiet = self.ends.iter().all(|e| e.stage_is(&[Stage::Quiet]));
                if self.fate == Fate::Open && quiet {
                    self.fate = Fate::Committed;
                }
                if self.fate == Fate::Committed && self.ends[end].stage_is(&[Stage::Quiet]) {
                    self.ends[end].switch(broken)?;
                }
            }
            Op::Resume { end } => {
                let others = self.ends.iter().all(|e| e.stage_is(&[Stage::Switched, Stage::Flushing, Stage::Running]));
                let receives = self.ends.iter().all(|e| {
                    e.qps.iter().all(|q| q.gate.recvs().is_none_or(|r| r.remembered() == 0))
                        && e.srq.as_ref().is_none_or(Srq::passes)
                });
                let here = self.ends[end].stage_is(&[Stage::Switched]);
                let barrier = (others && receives) || (broken == Broken::NoBarrier && here);
                if self.fate == Fate::Committed && barrier {
                    for q in &mut self.ends[end].qps {
                        q.gate.resume().map_err(|e| e.to_string())?;
                    }
                }
            }
            Op::Flush { end, qp } => drop(self.ends[end].flush(qp, broken)),
            Op::Abort { end } => {
                let under_way = self.fate == Fate::Aborted
                    || self.fate == Fate::Open && self.ends.iter().any(|e| !e.stage_is(&[Stage::Running]));
                if under_way {
                    self.fate = Fate::Aborted;
                    for q in &mut self.ends[end].qps {
                        q.gate.abort().or_else(|e| match e.from {
                            Stage::Flushing | Stage::Running => Ok(()),
                            _ => Err(e.to_string()),
                        })?;
                    }
                    self.ends[end].expected = None;
                    if let Some(srq) = &mut self.ends[end].srq {
                        srq.reopen();
                    }
                    self.ends[end].repost_srq();
                }
            }
        }
        self.finish();
        Ok(())
    }

    /// When every end is suspended, each learns what the other has sent.
    fn exchange_counts(&mut self) {
        let suspended = [Stage::Suspended, Stage::Draining, Stage::Quiet];
        if self.ends.iter().all(|e| e.stage_is(&suspended)) {
            for end in 0..2 {
                let sent = self.ends[1 - end].qps.iter().map(|q| q.gate.sends().two_sided()).collect();
                self.ends[end].expected.get_or_insert(sent);
            }
        }
    }

    /// A migration that has ended at both ends makes room for the next.
    fn finish(&mut self) {
        if self.fate != Fate::Open && self.ends.iter().all(|e| e.stage_is(&[Stage::Running])) {
            let ended = if self.fate == Fate::Committed { &mut self.committed } else { &mut self.aborted };
            *ended += 1;
            self.fate = Fate::Open;
            self.ends.iter_mut().for_each(|e| e.expected = None);
        }
    }

    /// Everybody does what is to be done until nothing is left; then nothing may be missing.
    fn settle(&mut self) -> Check {
        let commit = self.fate != Fate::Aborted;
        let started = self.ends.iter().any(|e| !e.stage_is(&[Stage::Running]));
        for round in 0..2000 {
            for end in 0..2 {
                let begun = self.fate != Fate::Aborted && !self.ends[end].stage_is(&[Stage::Running]);
                if started && commit && (begun || round == 0) {
                    self.step(Op::Suspend { end })?;
                }
                if self.fate == Fate::Aborted {
                    self.step(Op::Abort { end })?;
                }
                if self.ends[end].stage_is(&[Stage::Suspended, Stage::Draining, Stage::Quiet]) {
                    self.step(Op::Drain { end })?;
                    self.step(Op::Switch { end })?;
                }
                if self.ends[end].stage_is(&[Stage::Switched]) {
                    self.step(Op::Resume { end })?;
                }
                for qp in 0..QPS {
                    self.step(Op::Receive { end, qp })?;
                    self.step(Op::Flush { end, qp })?;
                    self.step(Op::Deliver { from: end, qp })?;
                    self.step(Op::Acknowledge { from: end, qp })?;
                    self.step(Op::Poll { end })?;
                }
            }
        }
        self.verify()
    }

    fn verify(&self) -> Check {
        for (i, end) in self.ends.iter().enumerate() {
            if !end.stage_is(&[Stage::Running]) {
                let why: Vec<_> = end.qps.iter().map(|q| q.gate.stage()).collect();
                return Err(format!("end {i} never came to its end: {why:?}"));
            }
            for (k, q) in end.qps.iter().enumerate() {
                let other = &self.ends[1 - i].qps[k];
                if other.executed != (0..q.next_send).collect::<Vec<_>>() {
                    return Err(format!("of {} sends of end {i} qp {k} arrived {:?}", q.next_send, other.executed));
                }
                if other.two_sided_received != q.two_sided_sent {
                    let (got, sent) = (&other.two_sided_received, &q.two_sided_sent);
                    return Err(format!("messages {sent:?} of end {i} qp {k}, received {got:?}"));
                }
                if !q.expected_completions.is_empty() {
                    return Err(format!("end {i} qp {k} misses completions {:?}", q.expected_completions));
                }
                let posted: Vec<u64> = (q.receives_completed..q.next_receive).collect();
                if !posted.iter().eq(&q.nic.rq) {
                    return Err(format!("end {i} qp {k} has posted {posted:?}, its NIC has {:?}", q.nic.rq));
                }
            }
            if let Some(srq) = &end.srq {
                let posted: Vec<u64> = (0..end.next_srq).filter(|w| !end.srq_completed.contains(w)).collect();
                let nic: Vec<u64> = end.nic_srq.iter().map(|name| srq.receive(*name).wr_id).collect();
                if posted != nic {
                    return Err(format!("the SRQ of end {i} has {posted:?}, its NIC has {nic:?}"));
                }
            }
        }
        Ok(())
    }
}

fn op() -> impl Strategy<Value = Op> {
    let end = || 0..2usize;
    let qp = || 0..QPS;
    prop_oneof![
        6 => (end(), qp(), any::<bool>(), any::<bool>())
            .prop_map(|(end, qp, two_sided, signalled)| Op::Send { end, qp, two_sided, signalled }),
        5 => (end(), qp()).prop_map(|(end, qp)| Op::Receive { end, qp }),
        4 => end().prop_map(|end| Op::Poll { end }),
        6 => (end(), qp()).prop_map(|(from, qp)| Op::Deliver { from, qp }),
        5 => (end(), qp()).prop_map(|(from, qp)| Op::Acknowledge { from, qp }),
        1 => end().prop_map(|end| Op::Suspend { end }),
        3 => end().prop_map(|end| Op::Drain { end }),
        2 => end().prop_map(|end| Op::Switch { end }),
        2 => end().prop_map(|end| Op::Resume { end }),
        4 => (end(), qp()).prop_map(|(end, qp)| Op::Flush { end, qp }),
        1 => prop_oneof![9 => Just(None), 1 => end().prop_map(Some)]
            .prop_map(|end| end.map_or(Op::Poll { end: 0 }, |end| Op::Abort { end })),
    ]
}

/// How many migrations were committed and aborted in all cases, or what went wrong.
fn check(broken: Broken, cases: u32) -> Result<(u32, u32), String> {
    let ended = Cell::new((0, 0));
    let config = Config { cases, max_shrink_iters: 2000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let strategy =
        (prop_oneof![2 => Just(None), 1 => Just(Some(0)), 1 => Just(Some(1))], prop::collection::vec(op(), 0..250));
    let result = runner.run(&strategy, |(srq, ops)| {
        let mut world = World::new(srq, broken);
        ops.into_iter().try_for_each(|op| world.step(op)).map_err(TestCaseError::fail)?;
        world.settle().map_err(TestCaseError::fail)?;
        let (committed, aborted) = ended.get();
        ended.set((committed + world.committed, aborted + world.aborted));
        Ok(())
    });
    match result {
        Ok(()) => Ok(ended.get()),
        Err(TestError::Fail(why, (srq, ops))) => Err(format!("{why}\n  SRQ at {srq:?}, after {ops:?}")),
        Err(TestError::Abort(why)) => panic!("the model gave up: {why}"),
    }
}

#[test]
fn nothing_is_lost_repeated_or_reordered_in_any_interleaving() {
    match check(Broken::Nothing, 3000) {
        Err(why) => panic!("{why}"),
        Ok((committed, aborted)) => {
            assert!(committed > 1000 && aborted > 300, "{committed} commits and {aborted} aborts prove little");
        }
    }
}

#[test]
fn the_model_notices_every_broken_rule() {
    for broken in [
        Broken::NoMarker,
        Broken::CloseAtOnce,
        Broken::IgnoreExpected,
        Broken::HoldReceives,
        Broken::PassWhileFlushing,
        Broken::ForgetHeld,
        Broken::ForgetReceives,
        Broken::RealFirst,
        Broken::DropPolled,
        Broken::NoBarrier,
    ] {
        assert!(check(broken, 1500).is_err(), "nobody noticed that a rule was broken: {broken:?}");
    }
}
