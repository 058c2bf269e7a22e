//! One end's run from first to last: connect, load, drain, compare, destroy.
//!
//! Client and server do the same but for who decides when to stop.

use crate::clock::{Clock, Reading};
use crate::failure::lock;
use crate::identity::Identity;
use crate::pattern::Side;
use crate::report::{self, Outcome};
use crate::rig::{Local, Rig};
use crate::signals;
use crate::timeline::say;
use crate::unread::Unread;
use crate::verbs::AsyncEvent;
use crate::wire::{LaneTotals, Message, VERSION, Wire};
use crate::workload::{Completions, Workload};
use crate::{churn, compare, timeline};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// Options of one end that do not concern the verbs objects.
#[derive(Clone, Debug)]
pub struct Watch {
    /// Where samples go: a path, `-`, or nowhere.
    pub timeline: Option<String>,
    /// Seconds without any progress after which the run fails.
    pub stall_timeout: f64,
    /// Milliseconds between two rounds of the identity check; 0 turns it off.
    pub identity_ms: u64,
    /// Milliseconds between two stamps.
    pub stamp_ms: u64,
    /// Seconds between two progress lines on standard output; 0 turns them off.
    pub progress: f64,
    /// Fork a child that sleeps beside the run.
    pub sleeping_child: bool,
}

/// Runs one end over an open connection. The outcome is everything there is to report.
///
/// # Errors
/// When the run could not take place. Violations are no errors but part of the outcome.
pub fn run(side: Side, mut wire: Wire, workload: Option<Workload>, local: &Local, watch: &Watch) -> Result<Outcome> {
    let patience = Duration::from_secs_f64(watch.stall_timeout);
    let w = match workload {
        Some(w) => {
            wire.send(&Message::Hello { version: VERSION, workload: Box::new(w.clone()) })?;
            w
        }
        None => match expect(&mut wire, patience, "the client's workload")? {
            Message::Hello { version, workload } if version == VERSION => *workload,
            Message::Hello { version, .. } => {
                bail!("the client speaks version {version}, this is {VERSION}")
            }
            other => bail!("expected the client's workload, got {other:?}"),
        },
    };
    let clock = Arc::new(Clock::new(Reading::now()));
    let rig = Arc::new(Rig::build(side, w, local, clock.clone())?);
    wire.send(&Message::Offers(rig.offers()?))?;
    let offers = match expect(&mut wire, patience, "the other end's QPs")? {
        Message::Offers(o) => o,
        Message::Abort(e) => bail!("the other end gave up: {e:?}"),
        other => bail!("expected the other end's QPs, got {other:?}"),
    };
    if !local.connect_late.is_zero() {
        say(&json!({"event": "exchanged"}).to_string())?;
        std::thread::sleep(local.connect_late);
    }
    rig.connect(&offers)?;
    let identity = Identity::of(&rig).map_err(anyhow::Error::msg)?;
    identity.plausible(&rig).map_err(anyhow::Error::msg)?;
    let mut unread = rig.w.async_events.then(|| Unread::leave(&rig, local)).transpose()?;
    let child = watch.sleeping_child.then(crate::processes::sleeping_child).transpose()?;
    wire.send(&Message::Ready)?;
    match expect(&mut wire, patience, "the other end to be ready")? {
        Message::Ready => {}
        other => bail!("expected the other end to be ready, got {other:?}"),
    }
    say(&json!({"event": "running", "side": side, "qps": rig.links.len(), "qpn": rig.links.iter().map(|l| l.qpn).collect::<Vec<_>>()}).to_string())?;

    let mut threads = rig.start()?;
    let stamp = {
        let (clock, period) = (clock.clone(), Duration::from_millis(watch.stamp_ms));
        std::thread::Builder::new().name("stamp".into()).spawn(move || clock.run(period))?
    };
    if let Some(path) = watch.timeline.clone() {
        let rig = rig.clone();
        threads.push(std::thread::Builder::new().name("timeline".into()).spawn(move || timeline::run(&rig, &path))?);
    }
    if rig.w.churn {
        let (rig, local) = (rig.clone(), local.clone());
        threads.push(std::thread::Builder::new().name("churn".into()).spawn(move || churn::run(&rig, &local))?);
    }
    if let Some(unread) = &mut unread {
        unread.wait()?;
    }
    let alive = Arc::new(AtomicU64::new(0));
    {
        // The main thread makes verbs calls too; one that never returns must not go unnoticed.
        let (alive, clock, limit) = (alive.clone(), clock.clone(), watch.stall_timeout + 10.0);
        std::thread::Builder::new().name("watchdog".into()).spawn(move || report::watch_main(&alive, &clock, limit))?;
    }
    let mut conduct = Conduct::new(rig.clone(), wire, watch.clone(), identity, alive.clone());
    if let Err(e) = conduct.conduct(&threads) {
        rig.failures.add(format!("{e:#}"));
    }
    let heartbeats = conduct.heard;
    conduct.abort_if_failed();
    drop(conduct);
    alive.store(u64::MAX, SeqCst);
    finish(rig, threads, stamp, child, unread, heartbeats)
}

/// Ends the threads, destroys everything, gathers the outcome.
fn finish(
    rig: Arc<Rig>,
    threads: Vec<JoinHandle<()>>,
    stamp: JoinHandle<()>,
    child: Option<crate::processes::Child>,
    unread: Option<Unread>,
    heartbeats: u64,
) -> Result<Outcome> {
    let (clock, failures) = (rig.clock.clone(), rig.failures.clone());
    rig.stop.store(true, SeqCst);
    for t in &threads {
        if !signals::nudge_until_done(t, Duration::from_secs(10)) {
            failures
                .add(format!("thread {} does not end: it is stuck in a verbs call", t.thread().name().unwrap_or("?")));
        }
    }
    if let Some(unread) = unread
        && failures.count() == 0
    {
        // Waiting for an event may hang, and so may destroying what one is about.
        let done = report::watchdog("reading the asynchronous events", Duration::from_secs(60));
        match unread.judge() {
            Ok(events) => rig.stats.unread_events.store(events, Relaxed),
            Err(e) => failures.add(format!("asynchronous events left unread: {e:#}")),
        }
        done.store(true, SeqCst);
    }
    let mut outcome = report::gather(&rig, heartbeats);
    if failures.count() > 0 {
        // Objects in an unknown state are left to the end of the process.
        outcome.errors = failures.first();
        outcome.error_count = failures.count();
        return Ok(outcome);
    }
    for t in threads {
        if t.join().is_err() {
            failures.add("a thread panicked");
        }
    }
    // Destroying may hang (on events never acknowledged, for instance); a watchdog would rather fail.
    let done = report::watchdog("destroying all verbs objects", Duration::from_secs(60));
    match Arc::into_inner(rig) {
        Some(rig) => {
            if let Err(e) = rig.destroy() {
                failures.add(format!("{e:#}"));
            }
        }
        None => bail!("verbs objects are still in use by a thread"),
    }
    done.store(true, SeqCst);
    if let Some(c) = child
        && let Err(e) = c.end()
    {
        failures.add(format!("sleeping child: {e:#}"));
    }
    clock.stop();
    let _ = stamp.join();
    outcome.errors = failures.first();
    outcome.error_count = failures.count();
    Ok(outcome)
}

fn expect(wire: &mut Wire, patience: Duration, what: &str) -> Result<Message> {
    for _ in 0..patience.as_millis() / 100 + 1 {
        if let Some(m) = wire.poll(100)? {
            return Ok(m);
        }
    }
    bail!("waited {} s for {what}", patience.as_secs())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Load,
    Drain,
    Compare,
    Judge,
    Over,
}

/// What the main thread does while the others work.
struct Conduct {
    rig: Arc<Rig>,
    wire: Wire,
    watch: Watch,
    identity: Identity,
    phase: Phase,
    beat: u64,
    heard: u64,
    next_beat: f64,
    next_identity: f64,
    next_progress: f64,
    refilled: f64,
    peer_count_reached: bool,
    count_told: bool,
    peer_asks_stop: bool,
    stop_asked: bool,
    peer_totals: Option<Vec<Vec<LaneTotals>>>,
    peer_verdict: Option<(bool, Vec<String>)>,
    drained: u64,
    last_heard: f64,
    phase_since: f64,
    alive: Arc<AtomicU64>,
}

impl Conduct {
    fn new(rig: Arc<Rig>, wire: Wire, watch: Watch, identity: Identity, alive: Arc<AtomicU64>) -> Self {
        Self {
            rig,
            wire,
            watch,
            identity,
            phase: Phase::Load,
            beat: 0,
            heard: 0,
            next_beat: 0.0,
            next_identity: 0.0,
            next_progress: 0.0,
            refilled: 0.0,
            peer_count_reached: false,
            count_told: false,
            peer_asks_stop: false,
            stop_asked: false,
            peer_totals: None,
            peer_verdict: None,
            drained: 0,
            last_heard: 0.0,
            phase_since: 0.0,
            alive,
        }
    }

    fn conduct(&mut self, threads: &[JoinHandle<()>]) -> Result<()> {
        while self.phase != Phase::Over {
            let wait = if self.rig.w.rate > 0 { 5 } else { 20 };
            // After its verdict the other end may close at any time.
            while !(self.phase == Phase::Judge && self.peer_verdict.is_some())
                && let Some(m) = self.wire.poll(wait)?
            {
                self.on_message(m)?;
            }
            let now = self.rig.clock.seconds();
            self.alive.store(self.rig.clock.now_ns(), SeqCst);
            self.rig.refill(now - self.refilled);
            self.refilled = now;
            self.regular(now)?;
            if self.phase != Phase::Load && self.rig.w.solicited && self.rig.w.completions == Completions::Events {
                // The last messages may raise no solicited event; their threads must look once more.
                threads.iter().for_each(signals::nudge);
            }
            if self.rig.failures.count() > 0 {
                // A moment for what follows from it to show as well.
                std::thread::sleep(Duration::from_millis(200));
                return Ok(());
            }
            let before = self.phase;
            self.advance(now)?;
            if self.phase != before {
                self.phase_since = now;
            }
        }
        Ok(())
    }

    fn on_message(&mut self, m: Message) -> Result<()> {
        self.last_heard = self.rig.clock.seconds();
        match m {
            Message::Heartbeat(n) => {
                if n != self.heard {
                    bail!("heartbeat {n} came when {} was due: the TCP connection lost or repeated data", self.heard);
                }
                self.heard += 1;
            }
            Message::CountReached => self.peer_count_reached = true,
            Message::PleaseStop => self.peer_asks_stop = true,
            Message::Stop => self.drain(),
            Message::Drained(t) => self.peer_totals = Some(t),
            Message::Verdict { ok, errors } => self.peer_verdict = Some((ok, errors)),
            Message::Abort(errors) => bail!("the other end found: {}", errors.join(" | ")),
            other => bail!("unexpected {other:?}"),
        }
        Ok(())
    }

    fn drain(&mut self) {
        if self.phase == Phase::Load {
            self.phase = Phase::Drain;
            self.rig.draining.store(true, SeqCst);
        }
    }

    /// Heartbeats, identity, progress lines, stalls.
    fn regular(&mut self, now: f64) -> Result<()> {
        if now >= self.next_beat && self.phase != Phase::Judge {
            self.next_beat = now + 1.0;
            self.wire.send(&Message::Heartbeat(self.beat))?;
            self.beat += 1;
        }
        if self.watch.identity_ms > 0 && now >= self.next_identity {
            self.identity.check(&self.rig);
            self.next_identity = self.rig.clock.seconds() + self.watch.identity_ms as f64 / 1000.0;
        }
        if self.watch.progress > 0.0 && now >= self.next_progress {
            self.next_progress = now + self.watch.progress;
            let s = &self.rig.stats;
            let line = json!({
                "event": "progress", "t_ms": (now * 1000.0) as u64, "ops": s.ops.load(Relaxed), "bytes": s.bytes.load(Relaxed),
                "sent": s.sent.load(Relaxed), "received": s.received.load(Relaxed),
            });
            // Nobody reading is no violation.
            let _ = say(&line.to_string());
        }
        for c in &self.rig.contexts {
            while let Some(e) = c.async_event() {
                let (name, broken) = e.meaning();
                if broken {
                    self.rig.failures.add(format!("asynchronous event: {name} ({}) on {:#x}", e.kind, e.element));
                }
                self.drained += u64::from(e.kind == AsyncEvent::SQ_DRAINED);
                if self.drained > self.rig.drained_once() {
                    let (times, due) = (self.drained, self.rig.drained_once());
                    self.rig.failures.add(format!("{times} events say that a send queue is drained, not {due}"));
                }
                self.rig.stats.async_events.fetch_add(1, Relaxed);
            }
        }
        self.look_for_stalls(now);
        Ok(())
    }

    fn look_for_stalls(&self, now: f64) {
        let limit = self.watch.stall_timeout;
        if now - self.last_heard > limit {
            self.rig
                .failures
                .add(format!("nothing came over the TCP connection for {limit} s (phase {:?})", self.phase));
        }
        let mut stuck = Vec::new();
        for l in &self.rig.links {
            let last = Duration::from_nanos(l.progress_ns.load(Relaxed)).as_secs_f64();
            if now - last > limit && l.busy(&self.rig.w) {
                stuck.push(l.describe());
            }
        }
        if self.phase == Phase::Compare && now - self.phase_since > limit {
            let totals = self.peer_totals.as_deref();
            let missing = totals.map_or("the other end's totals".to_owned(), |t| compare::missing(&self.rig, t));
            self.rig.failures.add(format!("waited {limit} s after the load for {missing}"));
        }
        if !stuck.is_empty() {
            let extra = self.rig.untaken();
            self.rig.failures.add(format!(
                "no progress for {limit} s on {} of {} QPs{extra}: {}",
                stuck.len(),
                self.rig.links.len(),
                stuck.into_iter().take(4).collect::<Vec<_>>().join(" || ")
            ));
        }
    }

    fn advance(&mut self, now: f64) -> Result<()> {
        match self.phase {
            Phase::Load => self.load(now)?,
            Phase::Drain => {
                let idle = self.rig.links.iter().all(|l| l.lanes.iter().all(|x| lock(x).idle()));
                if idle {
                    self.wire.send(&Message::Drained(compare::totals(&self.rig)))?;
                    self.phase = Phase::Compare;
                } else {
                    self.rig.wakes.iter().for_each(crate::wake::Wake::ring);
                }
            }
            Phase::Compare => {
                if let Some(t) = &self.peer_totals
                    && compare::all_received(&self.rig, t)
                    && self.rig.links.iter().all(|l| l.control_idle())
                {
                    compare::check(&self.rig, t);
                    self.identity.check(&self.rig);
                    let errors = self.rig.failures.first();
                    self.wire.send(&Message::Verdict { ok: errors.is_empty(), errors })?;
                    self.phase = Phase::Judge;
                }
            }
            Phase::Judge => {
                if let Some((ok, errors)) = self.peer_verdict.take() {
                    if !ok {
                        bail!("the other end found: {}", errors.join(" | "));
                    }
                    self.phase = Phase::Over;
                }
            }
            Phase::Over => {}
        }
        Ok(())
    }

    fn load(&mut self, now: f64) -> Result<()> {
        let w = &self.rig.w;
        let posts = !w.one_way || self.rig.side == Side::Client;
        if w.count > 0 && !self.count_told {
            let reached = !posts || self.rig.links.iter().all(|l| l.lanes.iter().all(|x| lock(x).reached(w)));
            if reached {
                self.wire.send(&Message::CountReached)?;
                self.count_told = true;
            }
        }
        if self.rig.side == Side::Server {
            if signals::asked_to_stop() && !self.stop_asked {
                self.stop_asked = true;
                self.wire.send(&Message::PleaseStop)?;
            }
            return Ok(());
        }
        let counted = w.count > 0 && self.count_told && self.peer_count_reached;
        let timed = w.count == 0 && w.duration > 0.0 && now >= w.duration;
        if counted || timed || self.peer_asks_stop || signals::asked_to_stop() {
            self.wire.send(&Message::Stop).context("ask the other end to stop")?;
            self.drain();
        }
        Ok(())
    }

    /// Tells the other end, so that its message names the cause instead of a closed connection.
    fn abort_if_failed(&mut self) {
        if self.rig.failures.count() > 0 {
            let _ = self.wire.send(&Message::Abort(self.rig.failures.first()));
        }
    }
}
