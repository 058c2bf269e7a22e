//! One end: an application, its queues, and the NIC below them. What a rule of `rdma_virt` names is performed here, as the
//! shim does it.

use crate::broken::Broken;
use rdma_virt::fakecq::{Completion, FakeCq};
use rdma_virt::gate::{Flush, Gate, RecvPath, SendPath, Stage};
use rdma_virt::id::{VQpn, VRkey};
use rdma_virt::quiesce::{Situation, Verdict};
use rdma_virt::recvq::RecvQ;
use rdma_virt::saved::QpPhase;
use rdma_virt::sendq::{Polled, SendQ};
use rdma_virt::srq::Srq;
use rdma_virt::wr::{HeldSend, MARKER_WR_ID, Payload, opcode};
use std::collections::VecDeque;

pub const QPS: usize = 2;
pub const DEPTH: u32 = 4;
pub const SIGNALED: u32 = 2;
pub const RECV: u32 = 128;

/// A send as the NIC has it.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    pub wr_id: u64,
    pub two_sided: bool,
    pub signalled: bool,
    pub marker: bool,
}

#[derive(Clone, Copy, Debug)]
pub struct Cqe {
    pub qp: usize,
    pub wr_id: u64,
    pub receive: bool,
    pub number: u64,
}

/// The NIC's side of one QP.
#[derive(Default, Debug)]
pub struct Nic {
    pub sq: VecDeque<Wire>,
    /// Executed at the other end, completion not here yet.
    pub unacknowledged: VecDeque<Wire>,
    pub rq: VecDeque<u64>,
}

pub struct Qp {
    pub gate: Gate,
    pub polled: Polled,
    pub nic: Nic,
    // What the application knows.
    pub next_send: u64,
    pub next_receive: u64,
    pub expected_completions: VecDeque<u64>,
    pub two_sided_sent: Vec<u64>,
    pub two_sided_received: Vec<u64>,
    /// Every send executed here, in order, over all queues there ever were.
    pub executed: Vec<u64>,
    pub receives_completed: u64,
    pub app_outstanding: u32,
}

pub struct End {
    pub qps: Vec<Qp>,
    pub cq: VecDeque<Cqe>,
    pub fake: FakeCq,
    pub srq: Option<Srq>,
    pub nic_srq: VecDeque<u64>,
    pub next_srq: u64,
    pub srq_completed: Vec<u64>,
    pub moving: bool,
    pub expected: Option<Vec<u64>>,
}

pub type Check = Result<(), String>;

impl End {
    pub fn new(moving: bool, srq: bool) -> Self {
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

    pub fn stage_is(&self, wanted: &[Stage]) -> bool {
        self.qps.iter().all(|q| wanted.contains(&q.gate.stage()))
    }

    /// One completion of the real queue: counted, and in the application's terms; `None` for a marker's.
    pub fn take_real(&mut self) -> Option<Option<Completion>> {
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
    pub fn consume(&mut self, c: Completion) -> Check {
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

    pub fn app_poll(&mut self, broken: Broken) -> Check {
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

    pub fn post_send(&mut self, qp: usize, two_sided: bool, signalled: bool, broken: Broken) {
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

    pub fn post_receive(&mut self, qp: usize, broken: Broken) {
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
    pub fn drain(&mut self, broken: Broken) -> Check {
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

    pub fn switch(&mut self, broken: Broken) -> Check {
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

    pub fn repost_srq(&mut self) {
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
    pub fn flush(&mut self, qp: usize, broken: Broken) -> bool {
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
