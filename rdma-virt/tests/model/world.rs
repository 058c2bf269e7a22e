//! Both ends, the network between them, and a migration that ends one way or the other.

use crate::broken::Broken;
use crate::end::{Check, Cqe, End, QPS};
use rdma_virt::gate::Stage;
use rdma_virt::srq::Srq;

#[derive(Clone, Copy, Debug)]
pub enum Op {
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

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Open,
    Committed,
    Aborted,
}

pub struct World {
    pub ends: [End; 2],
    pub fate: Fate,
    pub broken: Broken,
    /// Migrations that came to their end, one way or the other.
    pub committed: u32,
    pub aborted: u32,
}

impl World {
    pub fn new(srq: Option<usize>, broken: Broken) -> Self {
        let end = |i| End::new(i == 0, srq == Some(i));
        Self { ends: [end(0), end(1)], fate: Fate::Open, broken, committed: 0, aborted: 0 }
    }

    /// The oldest send of a queue takes effect at the other end; false if it cannot.
    pub fn deliver(&mut self, from: usize, qp: usize) -> bool {
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

    pub fn acknowledge(&mut self, from: usize, qp: usize) -> bool {
        let end = &mut self.ends[from];
        let Some(wire) = end.qps[qp].nic.unacknowledged.pop_front() else { return false };
        if wire.signalled {
            end.cq.push_back(Cqe { qp, wr_id: wire.wr_id, receive: false, number: 0 });
        }
        true
    }

    pub fn step(&mut self, op: Op) -> Check {
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
    pub fn exchange_counts(&mut self) {
        let suspended = [Stage::Suspended, Stage::Draining, Stage::Quiet];
        if self.ends.iter().all(|e| e.stage_is(&suspended)) {
            for end in 0..2 {
                let sent = self.ends[1 - end].qps.iter().map(|q| q.gate.sends().two_sided()).collect();
                self.ends[end].expected.get_or_insert(sent);
            }
        }
    }

    /// A migration that has ended at both ends makes room for the next.
    pub fn finish(&mut self) {
        if self.fate != Fate::Open && self.ends.iter().all(|e| e.stage_is(&[Stage::Running])) {
            let ended = if self.fate == Fate::Committed { &mut self.committed } else { &mut self.aborted };
            *ended += 1;
            self.fate = Fate::Open;
            self.ends.iter_mut().for_each(|e| e.expected = None);
        }
    }

    /// Everybody does what is to be done until nothing is left; then nothing may be missing.
    pub fn settle(&mut self) -> Check {
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

    pub fn verify(&self) -> Check {
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
