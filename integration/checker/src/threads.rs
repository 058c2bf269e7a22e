//! The posting and polling threads.

use crate::failure::lock;
use crate::lane::Allowance;
use crate::link::Link;
use crate::rig::{Rig, Unit};
use crate::verbs::{Wc, WcOpcode};
use crate::wake::Epoll;
use crate::workload::Completions;
use crate::wrid::{CONTROL, WrId};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// Empty polls in a row before a polling thread sleeps for a moment, and that moment.
const PATIENCE: u32 = 32;
const MOMENT: Duration = Duration::from_micros(100);

/// The same under a paced load, which leaves time to sleep: an emulated node pays much for waking up, and for each poll.
const PACED_PATIENCE: u32 = 2;

/// For about two operations of such a load.
fn paced_moment(rate: u64) -> Duration {
    Duration::from_millis((2000 / rate.max(1)).clamp(10, 100))
}

impl Rig {
    fn posting(&self) -> bool {
        !self.w.one_way || self.side == crate::pattern::Side::Client
    }

    /// Posts what there is to post on one lane. True when the lane waits for something that rings
    /// no bell.
    fn pump(&self, link: &Link, lane: usize) -> (usize, bool) {
        if !self.posting() || self.failures.count() > 0 {
            return (0, false);
        }
        let allowance = Allowance { w: &self.w, draining: self.draining.load(Relaxed), budget: &self.budget };
        match lock(&link.lanes[lane]).pump(link, allowance, &self.stats) {
            Ok(p) => (p.posted, p.starved),
            Err(e) => {
                self.failures.add(e);
                (0, false)
            }
        }
    }

    /// Body of posting thread `n`: lane `n` of every QP.
    fn post_loop(&self, n: usize) {
        let wake = &self.wakes[n];
        let starving = if self.w.rate > 0 { 10 } else { 1 };
        // What a paced load allows goes to whoever comes first: each in turn.
        for turn in (0..self.links.len()).cycle() {
            if self.stop.load(SeqCst) {
                break;
            }
            wake.announce();
            let (mut posted, mut starved) = (0, false);
            for l in self.links[turn..].iter().chain(&self.links[..turn]) {
                let (p, s) = self.pump(l, n);
                posted += p;
                starved |= s;
            }
            if posted == 0 {
                wake.wait(if starved { starving } else { 20 });
            }
        }
    }

    /// Body of the polling thread of one unit.
    fn poll_loop(&self, unit: &Unit) {
        if let Err(e) = self.poll_until_stopped(unit) {
            self.failures.add(format!("completion channel or CQ: {e}"));
        }
    }

    fn poll_until_stopped(&self, unit: &Unit) -> io::Result<()> {
        let mut round = Round::default();
        let epoll = match (&unit.channel, self.w.completions) {
            (Some(c), Completions::Epoll) => Some(Epoll::of(c.fd())?),
            _ => None,
        };
        if unit.channel.is_some() {
            for &q in &unit.queues {
                self.arm(q)?;
            }
            // What completed before raises no event any more.
            self.sweep(&unit.queues, &mut round)?;
        }
        let mut empty = 0;
        let (patience, moment) = match self.w.rate {
            0 => (PATIENCE, MOMENT),
            rate => (PACED_PATIENCE, paced_moment(rate)),
        };
        while !self.stop.load(SeqCst) {
            let Some(channel) = &unit.channel else {
                let n = self.sweep(&unit.queues, &mut round)?;
                empty = if n == 0 { empty + 1 } else { 0 };
                self.post_here(unit);
                if empty > patience {
                    std::thread::sleep(moment);
                } else if n == 0 {
                    std::thread::yield_now();
                }
                continue;
            };
            if let Some(set) = &epoll {
                self.post_here(unit);
                let tick = if self.w.threads_per_qp == 0 { 1 } else { 50 };
                if !set.wait(tick) {
                    self.sweep_when_draining(unit, &mut round)?;
                    continue;
                }
            }
            match channel.event() {
                Ok(q) => self.on_event(q, unit, &mut round)?,
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    self.sweep_when_draining(unit, &mut round)?;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn post_here(&self, unit: &Unit) {
        if self.w.threads_per_qp == 0 {
            for &l in &unit.links {
                self.pump(&self.links[l], 0);
            }
        }
    }

    fn arm(&self, q: usize) -> io::Result<()> {
        let queue = &self.queues[q];
        queue.arms.fetch_add(1, SeqCst);
        queue.cq.arm(queue.solicited)
    }

    fn on_event(&self, q: usize, unit: &Unit, round: &mut Round) -> io::Result<()> {
        self.stats.cq_events.fetch_add(1, Relaxed);
        if !unit.queues.contains(&q) {
            self.failures.add(format!("event of CQ {q:#x}, which is not on this channel"));
            return Ok(());
        }
        let queue = &self.queues[q];
        let events = queue.events.fetch_add(1, SeqCst) + 1;
        let arms = queue.arms.load(SeqCst);
        if events > arms {
            self.failures.add(format!("CQ {q} raised {events} events and was armed {arms} times"));
        }
        let unacked = queue.unacked.fetch_add(1, SeqCst) + 1;
        if !self.w.ack_at_end && unacked >= u64::from(self.w.ack_every) {
            queue.cq.ack(u32::try_from(unacked).unwrap_or(u32::MAX));
            queue.unacked.fetch_sub(unacked, SeqCst);
        }
        self.arm(q)?;
        self.sweep(&[q], round)?;
        Ok(())
    }

    /// With solicited events only, the last messages of a run may raise none.
    fn sweep_when_draining(&self, unit: &Unit, round: &mut Round) -> io::Result<()> {
        if self.w.solicited && self.draining.load(SeqCst) {
            self.sweep(&unit.queues, round)?;
        }
        Ok(())
    }

    /// Takes completions until there are none.
    fn sweep(&self, queues: &[usize], round: &mut Round) -> io::Result<usize> {
        let mut total = 0;
        for &q in queues {
            loop {
                round.wcs.clear();
                let n = self.queues[q].cq.poll(&mut round.wcs)?;
                if n == 0 {
                    break;
                }
                total += n;
                let now = self.clock.now_ns();
                self.stats.progress(now);
                let wcs = std::mem::take(&mut round.wcs);
                for wc in &wcs {
                    self.on_completion(q, wc, now, round);
                }
                round.wcs = wcs;
                self.settle(round);
            }
        }
        if !round.received.is_empty() {
            self.settle(round);
        }
        Ok(total)
    }

    /// Whether this end plays a receiver that does not post RECVs anew for a while.
    fn starving(&self) -> bool {
        let w = &self.w;
        let since = self.clock.seconds() - 3.0;
        self.side == crate::pattern::Side::Server && (0.0..w.starve).contains(&since) && !self.draining.load(Relaxed)
    }

    /// Posts RECVs anew, tells the peer, wakes the posting threads.
    fn settle(&self, round: &mut Round) {
        for l in round.received.split_off(if self.starving() { round.received.len() } else { 0 }) {
            let link = &self.links[l];
            if let Err(e) = link.pool.post(link) {
                self.failures.add(e);
            }
            round.tell.push(l);
        }
        for l in round.tell.drain(..) {
            let link = &self.links[l];
            let consumed = lock(&link.receiver).consumed;
            if let Err(e) = link.tell(consumed, &self.w) {
                self.failures.add(e);
            }
        }
        if std::mem::take(&mut round.freed) {
            for w in &self.wakes {
                w.ring();
            }
        }
    }

    fn on_completion(&self, q: usize, wc: &Wc, now: u64, round: &mut Round) {
        let fail = |what: String| self.failures.add(what);
        let id = WrId::decode(wc.wr_id);
        // An SRQ's RECV does not say which QP consumed it; the number in the completion does.
        let found = match id {
            WrId::Send { qp, .. } => self.links.get(usize::from(qp)),
            WrId::Recv { .. } => self.links.iter().find(|l| l.qpn == wc.qp_num && l.cqs.1 == q),
        };
        let Some(link) = found else {
            return fail(format!(
                "CQ {q}: completion of wr_id {:#x} on QP number {:#x} is none of this queue's ({})",
                wc.wr_id,
                wc.qp_num,
                wc.status_text()
            ));
        };
        if wc.qp_num != link.qpn {
            fail(format!("{link}: completion of wr_id {:#x} says QP number {:#x}", wc.wr_id, wc.qp_num));
        }
        if wc.status != 0 {
            return fail(format!("{link}: wr_id {:#x} ({id:x?}) completed with: {}", wc.wr_id, wc.status_text()));
        }
        link.progress_ns.store(now, Relaxed);
        let here = usize::from(link.index);
        match id {
            WrId::Recv { .. } => {
                let mut r = lock(&link.receiver);
                r.take(link, &link.pool, wc, &self.w, &self.stats, &mut { fail });
                if !round.received.contains(&here) {
                    round.received.push(here);
                }
            }
            WrId::Send { lane: CONTROL, .. } => {
                if wc.opcode != WcOpcode::Write {
                    fail(format!("{link}: credit update completed as {:?}", wc.opcode));
                }
                match link.told(wc) {
                    Ok(()) => {
                        self.stats.credit_updates.fetch_add(1, Relaxed);
                    }
                    Err(e) => fail(e),
                }
                round.tell.push(here);
            }
            WrId::Send { lane, .. } => match link.lanes.get(usize::from(lane)) {
                Some(l) => {
                    lock(l).complete(link, wc, &self.stats, fail);
                    round.freed = true;
                }
                None => fail(format!("{link}: completion of lane {lane}, which does not exist")),
            },
        }
        if link.cqs.0 != q && matches!(id, WrId::Send { .. }) {
            fail(format!("{link}: completion of a send came through CQ {q} instead of {}", link.cqs.0));
        }
    }

    /// Starts all threads.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(self: &Arc<Self>) -> io::Result<Vec<JoinHandle<()>>> {
        let mut all = Vec::new();
        for n in 0..self.wakes.len() {
            let rig = self.clone();
            let name = format!("post{n}");
            all.push(std::thread::Builder::new().name(name).spawn(move || rig.post_loop(n))?);
        }
        for u in 0..self.units.len() {
            let rig = self.clone();
            let name = format!("poll{u}");
            all.push(std::thread::Builder::new().name(name).spawn(move || rig.poll_loop(&rig.units[u]))?);
        }
        Ok(all)
    }

    /// Refills the rate limit after `seconds`.
    pub fn refill(&self, seconds: f64) {
        if self.w.rate > 0 {
            let more = (self.w.rate as f64 * seconds) as i64;
            let limit = i64::try_from(self.w.rate).unwrap_or(i64::MAX) / 5 + 1;
            let now = self.budget.load(Relaxed);
            self.budget.fetch_add(more.min(limit - now).max(0), Relaxed);
        }
    }

    /// Completions lying in the CQs that no thread has taken: with events, a sign of a lost event.
    /// For the report of a stall only, since it takes them.
    #[must_use]
    pub fn untaken(&self) -> String {
        let mut wcs = Vec::new();
        let mut text = String::new();
        for (i, q) in self.queues.iter().enumerate() {
            wcs.clear();
            if q.cq.poll(&mut wcs).is_ok() && !wcs.is_empty() {
                text += &format!(
                    "; CQ {i} holds {} completions nobody was told of (armed {}, events {})",
                    wcs.len(),
                    q.arms.load(SeqCst),
                    q.events.load(SeqCst)
                );
            }
        }
        text
    }
}

/// Scratch of one polling thread.
#[derive(Debug, Default)]
struct Round {
    wcs: Vec<Wc>,
    received: Vec<usize>,
    tell: Vec<usize>,
    freed: bool,
}
