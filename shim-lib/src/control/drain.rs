//! Wait-before-stop: polls every CQ concerned until nothing of the suspended QPs is under way. The rules are in
//! `rdma_virt::quiesce`; polling, the marker, the deadline and being told to stop are here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_virt::id::VQpn;
use rdma_virt::msg::StuckQp;

use super::note;
use super::session::{Migration, alone};
use super::wire::Conn;
use crate::cq::ShadowCq;
use crate::qp::ShadowQp;

/// Completions taken from one CQ in one go.
const BATCH: usize = 1024;

/// How long flush completions of a failed QP may take: the NIC promises each of them, but not when.
const FLUSH_TIME: Duration = Duration::from_millis(200);

/// How a drain ended.
#[derive(Debug)]
pub enum Drained {
    Done,
    /// The deadline passed; these are not quiet.
    Stuck(Vec<StuckQp>),
    /// The agent has something else to say (or is gone).
    Interrupted,
}

/// The CQs these QPs complete on, each once.
pub fn cqs_of(qps: &[Arc<ShadowQp>]) -> Vec<Arc<ShadowCq>> {
    let mut found: Vec<Arc<ShadowCq>> = Vec::new();
    for cq in qps.iter().flat_map(|q| [q.send_cq(), q.recv_cq()]) {
        if !found.iter().any(|f| Arc::ptr_eq(f, cq)) {
            found.push(cq.clone());
        }
    }
    found
}

/// Takes everything that is in the CQs.
pub fn empty(cqs: &[Arc<ShadowCq>]) {
    for cq in cqs.iter().filter(|c| !c.is_dead()) {
        loop {
            match cq.drain_into_fake(BATCH) {
                Ok(n) if n == BATCH => {}
                Ok(_) => break,
                Err(e) => {
                    note(|| format!("{:?} cannot be polled: {e}", cq.id));
                    break;
                }
            }
        }
    }
}

/// See [`rdma_virt::msg::Request::Drain`].
pub fn drain(migration: &mut Migration, expect: &[(VQpn, u64)], time: Duration, conn: &Conn) -> Drained {
    let began = Instant::now();
    let cqs = cqs_of(&migration.qps);
    let expected = |qp: &ShadowQp| expect.iter().find(|(v, _)| *v == qp.vqpn()).map_or(0, |(_, n)| *n);
    let mut waiting: Vec<Arc<ShadowQp>> = migration.qps.clone();
    let mut pause = Duration::from_micros(100);
    loop {
        // While a control verb runs long the next round has to wait; the deadline below still counts.
        if let Ok(_alone) = alone() {
            empty(&cqs);
            waiting.retain(|qp| !qp.is_dead() && !is_quiet(qp, expected(qp), began));
            if waiting.is_empty() {
                // From here on receives stay ours; nothing can arrive for those that are with the NIC.
                migration.qps.iter().filter(|q| !q.is_dead()).for_each(|q| q.close_rq());
                migration.drained = true;
                return Drained::Done;
            }
        }
        if began.elapsed() >= time {
            let _alone = alone();
            waiting.retain(|qp| !qp.is_dead());
            let why = |qp: &ShadowQp| qp.is_drained(expected(qp)).err().unwrap_or_else(|| "flushes missing".into());
            return Drained::Stuck(waiting.iter().map(|q| StuckQp { vqpn: q.vqpn(), why: why(q) }).collect());
        }
        if conn.is_ready(pause) {
            return Drained::Interrupted;
        }
        pause = (pause * 2).min(Duration::from_millis(1));
    }
}

fn is_quiet(qp: &ShadowQp, expected: u64, began: Instant) -> bool {
    let progress = qp.progress();
    if progress.error {
        let flushes = progress.signalled_posted.saturating_sub(progress.signalled_completed)
            + if qp.srq().is_none() { progress.recvs_unconsumed as u64 } else { 0 };
        return flushes == 0 || began.elapsed() > FLUSH_TIME;
    }
    if let Err(e) = qp.post_marker() {
        // The queue is full until the next round of polling; anything else shows as not getting quiet.
        note(|| format!("{}: no marker: {e}", qp.vqpn()));
    }
    qp.is_drained(expected).is_ok()
}
