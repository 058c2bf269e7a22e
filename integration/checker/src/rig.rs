//! One end of the run: every verbs object, made, connected and destroyed.

use crate::buffers::{Buffers, Way};
use crate::clock::Clock;
use crate::failure::{Failures, lock};
use crate::lane;
use crate::layout::Layout;
use crate::link::{Link, Offer, Parts};
use crate::pattern::{self, Side};
use crate::receive::{Pool, Receiver};
use crate::region;
use crate::stats::Stats;
use crate::verbs::{Channel, Context, Cq, Endpoint, Memory, Pd, Qp, QpOptions, RestState, Srq};
use crate::wake::Wake;
use crate::workload::{Completions, Workload};
use anyhow::{Context as _, Result, bail};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64};
use std::time::Duration;

/// Options of one end that the other has no say in.
#[derive(Clone, Debug)]
pub struct Local {
    /// Device name; the first one if none.
    pub device: Option<String>,
    /// IB port.
    pub port: u8,
    /// GID index; the first IPv4 one if none.
    pub gid_index: Option<u8>,
    /// Bytes to be registered in all: what the QPs leave of it is registered as well and lies idle.
    pub registered: usize,
    /// The memory of all QPs is one registration.
    pub one_registration: bool,
    /// So long after the exchange of numbers the QPs are connected.
    pub connect_late: Duration,
}

/// One CQ with its place in the polling threads.
#[derive(Debug)]
pub struct Queue {
    /// The CQ.
    pub cq: Cq,
    /// Entries the library said it has.
    pub entries: i32,
    /// Whether it is armed for solicited events only.
    pub solicited: bool,
    /// Times it was armed.
    pub arms: AtomicU64,
    /// Events it raised.
    pub events: AtomicU64,
    /// Events not acknowledged yet.
    pub unacked: AtomicU64,
}

/// The CQs one polling thread looks after.
#[derive(Debug)]
pub struct Unit {
    /// Channel of its CQs, if they raise events.
    pub channel: Option<Channel>,
    /// Indices of its CQs.
    pub queues: Vec<usize>,
    /// Links whose send CQ is here (for posting from the polling thread).
    pub links: Vec<usize>,
}

/// One end of the run.
#[derive(Debug)]
pub struct Rig {
    /// Which end.
    pub side: Side,
    /// What to do.
    pub w: Workload,
    /// IB port.
    pub port: u8,
    /// Local GID index.
    pub gid_index: u8,
    /// Open devices.
    pub contexts: Vec<Context>,
    pds: Vec<Pd>,
    /// CQs of all contexts.
    pub queues: Vec<Queue>,
    /// Polling threads to run.
    pub units: Vec<Unit>,
    pools: Vec<Arc<Pool>>,
    /// QPs.
    pub links: Vec<Link>,
    /// Unused QPs in various states.
    pub idle: Vec<Qp>,
    buffers: Buffers,
    /// Registered memory that nobody uses.
    ballast: Option<Memory>,
    /// Time.
    pub clock: Arc<Clock>,
    /// Violations.
    pub failures: Arc<Failures>,
    /// Counters.
    pub stats: Arc<Stats>,
    /// No new work.
    pub draining: AtomicBool,
    /// Threads shall end.
    pub stop: AtomicBool,
    /// What the rate limit lets through now.
    pub budget: AtomicI64,
    /// One for each posting thread.
    pub wakes: Vec<Wake>,
}

/// First packet sequence number of a QP; spread so that mixing QPs up is noticed.
fn psn(side: Side, index: u16) -> u32 {
    (pattern::mix(u64::from(index) << 1 | side as u64) & 0xff_ffff) as u32
}

impl Rig {
    /// Makes every object of one end, QPs in INIT.
    ///
    /// # Errors
    /// Naming the object that could not be made.
    pub fn build(side: Side, w: Workload, local: &Local, clock: Arc<Clock>) -> Result<Self> {
        let mut contexts = Vec::new();
        for _ in 0..w.contexts {
            contexts.push(Context::open(local.device.as_deref()).context("open the RDMA device")?);
        }
        let state = contexts[0].port(local.port).context("query the port")?;
        if state.state != 4 {
            bail!("port {} of the RDMA device is not active (state {})", local.port, state.state);
        }
        let gid_index = match local.gid_index {
            Some(i) => i,
            None => contexts[0].usable_gid(local.port).context("find a GID")?,
        };
        let mut rig = Self {
            side,
            port: local.port,
            gid_index,
            contexts,
            pds: Vec::new(),
            queues: Vec::new(),
            units: Vec::new(),
            pools: Vec::new(),
            links: Vec::new(),
            idle: Vec::new(),
            buffers: Buffers::default(),
            ballast: None,
            clock,
            failures: Arc::default(),
            stats: Arc::default(),
            draining: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            budget: AtomicI64::new(0),
            wakes: (0..w.threads_per_qp).map(|_| Wake::new()).collect::<std::io::Result<_>>().context("eventfd")?,
            w,
        };
        rig.make_pds()?;
        rig.make_queues()?;
        if local.one_registration {
            if rig.w.contexts != 1 || rig.w.pds != 1 || rig.w.srq {
                bail!("one registration for all QPs needs one context and one protection domain, and no SRQ");
            }
            rig.buffers.share(&rig.pds[0], &rig.w, local.registered).context("register memory for all QPs")?;
        }
        rig.make_links()?;
        if rig.w.idle_qps {
            rig.make_idle().context("make unused QPs")?;
        }
        rig.ballast = rig.buffers.idle(&rig.pds[0], local.registered).context("register idle memory")?;
        Ok(rig)
    }

    /// Bytes registered.
    #[must_use]
    pub fn registered(&self) -> usize {
        self.buffers.bytes()
    }

    fn context_of(&self, qp: u16) -> usize {
        usize::from(qp % self.w.contexts)
    }

    fn pd_of(&self, qp: u16) -> usize {
        let within = qp / self.w.contexts % self.w.pds;
        self.context_of(qp) * usize::from(self.w.pds) + usize::from(within)
    }

    /// Index of the send CQ; the receive CQ is the next one when they are split.
    fn cq_of(&self, qp: u16) -> (usize, usize) {
        let per = if self.w.split_cq { 2 } else { 1 };
        let within = usize::from(qp / self.w.contexts % self.w.cqs);
        let at = (self.context_of(qp) * usize::from(self.w.cqs) + within) * per;
        (at, at + per - 1)
    }

    fn make_pds(&mut self) -> Result<()> {
        for c in &self.contexts {
            for _ in 0..self.w.pds {
                self.pds.push(c.alloc_pd().context("make a protection domain")?);
            }
        }
        Ok(())
    }

    /// RECVs that can complete into the CQs of a QP.
    fn recvs_of(&self, qp: u16) -> u32 {
        let sharing = if self.w.srq {
            let mine = self.pd_of(qp);
            (0..self.w.qps).filter(|q| self.pd_of(*q) == mine).count()
        } else {
            1
        };
        self.w.recv_depth * u32::try_from(sharing).unwrap_or(1)
    }

    fn make_queues(&mut self) -> Result<()> {
        let per = if self.w.split_cq { 2 } else { 1 };
        let total = usize::from(self.w.contexts) * usize::from(self.w.cqs) * per;
        // Exactly as deep as what can complete: a CQE too many overruns the queue and is seen.
        let mut depth = vec![0; total];
        let mut srqs_seen = vec![std::collections::HashSet::new(); total];
        for qp in 0..self.w.qps {
            let (s, r) = self.cq_of(qp);
            depth[s] += self.w.send_queue();
            if !self.w.srq {
                depth[r] += self.w.recv_depth;
            } else if srqs_seen[r].insert(self.pd_of(qp)) {
                depth[r] += self.recvs_of(qp);
            }
        }
        let events = self.w.completions != Completions::Poll;
        for c in 0..usize::from(self.w.contexts) {
            let queues: Vec<usize> = (0..total).filter(|q| q / (usize::from(self.w.cqs) * per) == c).collect();
            let groups: Vec<Vec<usize>> =
                if self.w.thread_per_cq { queues.iter().map(|q| vec![*q]).collect() } else { vec![queues] };
            for group in groups {
                let channel = if events {
                    let nonblocking = self.w.completions == Completions::Epoll;
                    Some(Channel::create(&self.contexts[c], nonblocking).context("make a completion channel")?)
                } else {
                    None
                };
                for &q in &group {
                    let cq = Cq::create(&self.contexts[c], depth[q].max(1), channel.as_ref(), q)
                        .with_context(|| format!("make CQ {q} of {} entries", depth[q]))?;
                    self.queues.push(Queue {
                        cq,
                        entries: cq.entries(),
                        solicited: self.w.solicited && q % per == 1,
                        arms: AtomicU64::new(0),
                        events: AtomicU64::new(0),
                        unacked: AtomicU64::new(0),
                    });
                }
                self.units.push(Unit { channel, queues: group, links: Vec::new() });
            }
        }
        Ok(())
    }

    fn options(&self) -> QpOptions {
        QpOptions {
            sends: self.w.send_queue(),
            recvs: if self.w.srq { 0 } else { self.w.recv_depth },
            inline: self.w.inline,
            port: self.port,
            gid_index: self.gid_index,
            rd_atomic: self.w.rd_atomic,
            timeout: self.w.timeout,
            retry: self.w.retry,
            rnr_retry: self.w.rnr_retry,
            mtu: self.w.mtu_code().unwrap_or(3),
        }
    }

    /// Options of a QP beside those that carry the load.
    #[must_use]
    pub fn small_qp(&self) -> QpOptions {
        QpOptions { sends: 8, recvs: 8, inline: 0, rd_atomic: 1, ..self.options() }
    }

    /// QPs among the unused ones that were taken to SQD, and report once that they are drained.
    #[must_use]
    pub fn drained_once(&self) -> u64 {
        u64::from(self.w.idle_qps)
    }

    fn pool(&mut self, owner: u16, pd: usize, depth: u32, srq: Option<Srq>) -> Result<Arc<Pool>> {
        let stride = Layout::new(&self.w).stride();
        // Registrations that start within a page exist as well as aligned ones.
        let skew = if owner % 2 == 1 { 64 } else { 0 };
        let way = Way { remote: false, by_iova: owner % 2 == 1 };
        let (memory, mr) =
            self.buffers.take(&self.pds[pd], stride * depth as usize, skew, way).context("receive memory")?;
        Ok(Arc::new(Pool::new(owner, depth, memory, mr, srq, stride, self.w.msg_size)))
    }

    fn make_links(&mut self) -> Result<()> {
        let mut shared = vec![None; self.pds.len()];
        for qp in 0..self.w.qps {
            let pd = self.pd_of(qp);
            let pool = if self.w.srq {
                if shared[pd].is_none() {
                    let depth = self.recvs_of(qp);
                    let srq = Srq::create(&self.pds[pd], depth).with_context(|| format!("make an SRQ of {depth}"))?;
                    let owner = u16::try_from(pd)?;
                    let p = self.pool(owner, pd, depth, Some(srq))?;
                    self.pools.push(p.clone());
                    shared[pd] = Some(p);
                }
                shared[pd].clone().context("SRQ made above")?
            } else {
                let p = self.pool(qp, pd, self.w.recv_depth, None)?;
                self.pools.push(p.clone());
                p
            };
            let link = self.make_link(qp, pd, pool).with_context(|| format!("make QP {qp}"))?;
            let unit = self.units.iter_mut().find(|u| u.queues.contains(&link.cqs.0));
            unit.context("every CQ is in a unit")?.links.push(usize::from(qp));
            self.links.push(link);
        }
        Ok(())
    }

    fn make_link(&mut self, index: u16, pd: usize, pool: Arc<Pool>) -> Result<Link> {
        let cqs = self.cq_of(index);
        let domain = self.pds[pd];
        let (qp, inline) =
            Qp::create(&domain, &self.queues[cqs.0].cq, &self.queues[cqs.1].cq, pool.srq.as_ref(), &self.options())?;
        let way = |remote, by_iova| Way { remote, by_iova };
        let (send, send_mr) = self.buffers.take(&domain, Link::send_bytes(&self.w), 0, way(false, index % 2 == 1))?;
        let second_mr = self.buffers.again(&domain, &send, way(false, false))?;
        let total = Layout::new(&self.w).total();
        let (shared, shared_mr) = self.buffers.take(&domain, total, 0, way(true, index.is_multiple_of(2)))?;
        self.initialise(&shared, index);
        let parts = Parts {
            qp,
            inline,
            context: self.context_of(index),
            cqs,
            send: (send, send_mr, second_mr),
            shared: (shared, shared_mr),
            pool,
        };
        Ok(Link::new(index, self.side, &self.w, parts))
    }

    /// One unused QP in each state a QP can rest in; those that have a peer have themselves.
    fn make_idle(&mut self) -> Result<()> {
        let cq = &self.queues[0].cq;
        let o = self.options();
        let gid = self.contexts[0].gid(self.port, i32::from(self.gid_index))?;
        for rest in [None, Some(RestState::Reset), Some(RestState::Error)] {
            let (qp, _) = Qp::create(&self.pds[0], cq, cq, None, &o)?;
            if let Some(state) = rest {
                qp.rest_in(state)?;
            }
            self.idle.push(qp);
        }
        for drained in [false, true] {
            let (qp, _) = Qp::create(&self.pds[0], cq, cq, None, &o)?;
            let own = Endpoint { qpn: qp.qpn(), psn: 7, gid, lid: 0 };
            qp.to_rtr(&own, &o)?;
            if drained {
                qp.to_rts(7, &o)?;
                qp.rest_in(RestState::Drained)?;
            }
            self.idle.push(qp);
        }
        Ok(())
    }

    fn initialise(&self, shared: &Memory, qp: u16) {
        let layout = Layout::new(&self.w);
        let mut content = vec![0; layout.slot_len];
        for l in 0..self.w.lanes() {
            let lane = usize::from(l);
            pattern::fill(&mut content, &lane::known(self.side, qp, l));
            shared.write(layout.known(lane), &content);
            for s in 0..usize::from(self.w.slots) {
                region::initial(&mut content, self.side, qp, l, s);
                shared.write(layout.slot(lane, s), &content);
            }
        }
    }

    /// What the other end needs to know.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn offers(&self) -> Result<Vec<Offer>> {
        let mut all = Vec::new();
        for l in &self.links {
            let c = &self.contexts[l.context];
            all.push(Offer {
                endpoint: Endpoint {
                    qpn: l.qpn,
                    psn: psn(self.side, l.index),
                    gid: c.gid(self.port, i32::from(self.gid_index))?,
                    lid: c.port(self.port)?.lid,
                },
                addr: l.shared_memory.addr(0),
                rkey: l.shared_mr.fields().rkey,
            });
        }
        Ok(all)
    }

    /// Posts the RECVs and connects every QP.
    ///
    /// # Errors
    /// Naming the QP that could not be connected.
    pub fn connect(&self, offers: &[Offer]) -> Result<()> {
        if offers.len() != self.links.len() {
            bail!("the other end offers {} QPs, not {}", offers.len(), self.links.len());
        }
        for (l, o) in self.links.iter().zip(offers) {
            l.set_remote(*o);
        }
        let mut filled = std::collections::HashSet::new();
        for (l, o) in self.links.iter().zip(offers) {
            if filled.insert(Arc::as_ptr(&l.pool)) {
                l.pool.fill();
                l.pool.post(l).map_err(anyhow::Error::msg)?;
            }
            l.qp.connect(psn(self.side, l.index), &o.endpoint, &self.options())
                .with_context(|| format!("connect {l} with number {:#x}", o.endpoint.qpn))?;
        }
        Ok(())
    }

    /// Receiver of a link, locked.
    pub fn receiver<'a>(&self, l: &'a Link) -> std::sync::MutexGuard<'a, Receiver> {
        lock(&l.receiver)
    }

    /// Destroys everything, in the order the library demands. Every call must succeed.
    ///
    /// # Errors
    /// Naming the object that could not be destroyed.
    pub fn destroy(self) -> Result<()> {
        for qp in &self.idle {
            qp.destroy().context("destroy an unused QP")?;
        }
        for l in &self.links {
            l.qp.destroy().with_context(|| format!("destroy {l}"))?;
        }
        for p in &self.pools {
            if let Some(srq) = p.srq {
                srq.destroy().context("destroy an SRQ")?;
            }
        }
        if let Some(idle) = self.ballast
            && let Some(at) = idle.first_unlike(|_| 0)
        {
            bail!("idle memory of {} bytes has changed at byte {at}", idle.len());
        }
        self.buffers.dereg().context("deregister memory")?;
        for (i, q) in self.queues.iter().enumerate() {
            let left = q.unacked.load(std::sync::atomic::Ordering::SeqCst);
            q.cq.ack(u32::try_from(left).unwrap_or(u32::MAX));
            q.cq.destroy().with_context(|| format!("destroy CQ {i}"))?;
        }
        for c in self.units.iter().filter_map(|u| u.channel) {
            c.destroy().context("destroy a completion channel")?;
        }
        for p in self.pds {
            p.dealloc().context("free a protection domain")?;
        }
        for c in self.contexts {
            c.close().context("close the device")?;
        }
        Ok(())
    }
}
