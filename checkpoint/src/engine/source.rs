//! The source of a migration: its list of phases, and the one epilogue that undoes.
//!
//! [`Run::phases`] is the whole migration, to be read aloud; what each phase does is in the sibling modules. Before
//! [`Phase::Commit`] has written its record, any error leads to [`Run::undo`], which can be called at every point and
//! undoes exactly what was done. After it there is no way back: an error then leaves the record as it is, and
//! [`super::recover`] goes on from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rdma_virt::id::{MigrationId, Vpid};
use rdma_virt::msg::{KeyTable, Reply, Request};
use rdma_virt::saved::ProcessState;

use super::attempts::Again;
use super::copy::Copied;
use super::handover::Dump;
use super::host::{Container, Wire};
use super::negotiate::Resident;
use super::plan::{PeerProcess, Plan};
use super::quiet::Counts;
use super::regmem::{self, Known};
use super::shipping::Sent;
use super::world::World;
use super::{Cancel, MigrateRequest, Progress};
use crate::agent::admin::Event;
use crate::agent::metrics::{Operation, Outcome};
use crate::agent::shims::ShimError;
use crate::agent::under_way::{Role, Seen, Stage};
use crate::agent::{LOCAL, chain};
use crate::at_once::at_once;
use crate::image::HandOver;
use crate::net::client::CallError;
use crate::net::msg::{Answer, DeviceFacts, Lease, Order, Refusal};
use crate::phase::Phase;
use crate::record::{Kind, Ready, Record, State};
use crate::timeline::{Summary, Timeline};

/// Why the list of phases ended early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// It cannot be done; nothing was changed.
    Refused(Vec<String>),
    /// Another migration has a container that is needed.
    Busy {
        by: MigrationId,
        text: String,
    },
    /// A process that takes part, or a QP of it, has ended, or it has lost its shim.
    Absent(String),
    /// A connection is in the making, known to its far end only.
    HalfOpen(String),
    Failed(String),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Stop::Refused(reasons) => f.write_str(&reasons.join("; ")),
            Stop::Busy { text, .. } | Stop::Absent(text) | Stop::HalfOpen(text) | Stop::Failed(text) => {
                f.write_str(text)
            }
        }
    }
}

impl From<CallError> for Stop {
    fn from(e: CallError) -> Self {
        match &e {
            CallError::Refused { refusal: Refusal::Busy { by, .. }, .. } => Stop::Busy { by: *by, text: chain(&e) },
            CallError::Refused { refusal: Refusal::Absent(_), .. } => Stop::Absent(chain(&e)),
            _ => Stop::Failed(chain(&e)),
        }
    }
}

impl From<ShimError> for Stop {
    fn from(e: ShimError) -> Self {
        match &e {
            ShimError::Busy { by, .. } => Stop::Busy { by: *by, text: chain(&e) },
            ShimError::Ended { .. } => Stop::Absent(chain(&e)),
            _ => Stop::Failed(chain(&e)),
        }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    Done(Summary),
    Refused(Vec<String>),
    Possible,
    Undone { phase: Phase, why: String, left: Vec<String>, again: Option<Again> },
    Unfinished { phase: Phase, why: String },
}

impl End {
    /// As it is counted; a dry run is not.
    pub(super) fn outcome(&self) -> Option<Outcome> {
        match self {
            End::Done(_) => Some(Outcome::Finished),
            End::Refused(_) => Some(Outcome::Refused),
            End::Possible => None,
            End::Undone { again: Some(Again::Busy(_) | Again::HalfOpen), .. } => Some(Outcome::Busy),
            End::Undone { .. } => Some(Outcome::Undone),
            End::Unfinished { .. } => Some(Outcome::Unfinished),
        }
    }
}

/// A shim to be asked.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Own(Vpid),
    Peer(PeerProcess),
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Side::Own(vpid) => write!(f, "pid {} of the container", vpid.0),
            Side::Peer(peer) => peer.fmt(f),
        }
    }
}

/// What has been done and may have to be undone.
#[derive(Default)]
pub(super) struct Effects {
    pub held: bool,
    /// Agents that were asked to hold containers.
    pub claimed: BTreeSet<String>,
    pub offered: bool,
    pub recorded: bool,
    pub suspended: bool,
    /// Shims that froze: they have no connection and wait for the epoch to change.
    pub frozen: BTreeSet<Vpid>,
    /// The cgroup's state was changed from what was found.
    pub cgroup: bool,
    pub wire: Option<Box<dyn Wire>>,
    pub dump: Option<Dump>,
    /// The tasks here are being ended, after the decision.
    pub ending: Option<thread::JoinHandle<Result<(), String>>>,
    /// Those who wait for the container were told that it goes.
    pub dumped: bool,
    pub images: Option<PathBuf>,
    pub committed: bool,
}

/// One attempt.
pub struct Run<'a> {
    pub(super) world: &'a dyn World,
    pub(super) id: MigrationId,
    pub(super) request: &'a MigrateRequest,
    pub(super) cancel: &'a Cancel,
    pub(super) progress: &'a dyn Progress,
    pub(super) timeline: Timeline,
    pub(super) effects: Effects,
    pub(super) record: Record,
    /// The one that will decide.
    pub(super) ready: Option<Ready>,
    /// Address of the destination's agent.
    pub(super) to: String,
    pub(super) container: Option<Container>,
    /// As reported last.
    pub(super) states: Vec<ProcessState>,
    /// Host pids of the RDMA processes.
    pub(super) pids: BTreeMap<Vpid, i32>,
    /// Whose agents GIDs belong to, as far as it was asked.
    pub(super) homes: BTreeMap<[u8; 16], String>,
    /// A link whose far end is not connected to it is kept as it is.
    pub(super) takes_half_open: bool,
    /// This host's RDMA devices, looked up before the pause: a look opens them.
    pub(super) devices: Vec<DeviceFacts>,
    pub(super) plan: Plan,
    /// Peers' containers that are held for us: agent and container.
    pub(super) held_peers: BTreeSet<(String, String)>,
    /// What the destination has made and connected objects for.
    pub(super) set_up_for: Option<(Vec<ProcessState>, Plan)>,
    pub(super) hand_over: HandOver,
    /// Final, once everybody is suspended.
    pub(super) counts: Counts,
    pub(super) lease: Lease,
    pub(super) copied: Option<Copied>,
    /// Memory of the container's processes when it was looked at, bytes.
    pub(super) resident: Resident,
    /// Rounds of pre-copy that were made.
    pub(super) rounds: u32,
    pub(super) sent: Sent,
    /// Registered memory that the destination has.
    pub(super) known: Known,
    /// Registered memory that was sent, and that part of it which was sent inside the pause, bytes.
    pub(super) sent_memory: u64,
    /// The round that sent most of it.
    pub(super) largest: Option<regmem::Round>,
    pub(super) late_memory: u64,
    /// With these keys peers have changed over, before the moved processes had anything to say.
    pub(super) changed_over: Option<Vec<(Vpid, KeyTable)>>,
    /// Bytes of the image itself.
    pub(super) bytes: u64,
    /// The image, once parts of it go while others are still written.
    pub(super) voyage: Option<super::shipping::Voyage>,
    /// One that was taken up again is shown by itself; others by whoever began them.
    seen: Option<Seen<'a>>,
}

impl From<End> for Event {
    fn from(end: End) -> Self {
        match end {
            End::Done(summary) => Event::Done { summary },
            End::Refused(reasons) => Event::Refused { reasons },
            End::Possible => Event::Possible,
            End::Undone { phase, why, left, .. } => Event::Undone { phase, why, left },
            End::Unfinished { phase, why } => Event::Unfinished { phase, why },
        }
    }
}

impl std::fmt::Debug for Run<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("id", &self.id).field("request", self.request).finish_non_exhaustive()
    }
}

impl<'a> Run<'a> {
    pub fn new(
        world: &'a dyn World,
        id: MigrationId,
        request: &'a MigrateRequest,
        cancel: &'a Cancel,
        progress: &'a dyn Progress,
    ) -> Self {
        Run {
            world,
            id,
            request,
            cancel,
            progress,
            timeline: Timeline::begin(),
            effects: Effects::default(),
            record: Record::new(id, &request.container, &request.to),
            ready: None,
            to: request.to.clone(),
            container: None,
            states: Vec::new(),
            pids: BTreeMap::new(),
            homes: BTreeMap::new(),
            takes_half_open: false,
            devices: Vec::new(),
            plan: Plan::default(),
            held_peers: BTreeSet::new(),
            set_up_for: None,
            hand_over: HandOver::default(),
            counts: Counts::default(),
            lease: Lease { first: 0, count: 0 },
            copied: None,
            resident: Resident::default(),
            rounds: 0,
            sent: Sent::default(),
            known: Known::default(),
            sent_memory: 0,
            largest: None,
            late_memory: 0,
            changed_over: None,
            bytes: 0,
            voyage: None,
            seen: None,
        }
    }

    /// The whole attempt. Postcondition: the container runs at exactly one place, here unless the record says
    /// committed.
    pub fn run(mut self) -> End {
        let ended = self.phases();
        if ended.is_ok() && self.request.dry_run {
            self.undo("dry run");
            return End::Possible;
        }
        self.end(ended)
    }

    /// What became of an attempt, whose effects are undone if it was not decided.
    pub(super) fn end(&mut self, ended: Result<(), Stop>) -> End {
        let Err(stop) = ended else { return End::Done(self.summary()) };
        let phase = self.timeline.current().unwrap_or(Phase::Negotiate);
        if self.effects.committed {
            return End::Unfinished { phase, why: stop.to_string() };
        }
        let left = self.undo(&stop.to_string());
        match stop {
            Stop::Refused(reasons) => End::Refused(reasons),
            Stop::Busy { by, text } => End::Undone { phase, why: text, left, again: Some(Again::Busy(by)) },
            Stop::Absent(why) => End::Undone { phase, why, left, again: Some(Again::Ended) },
            Stop::HalfOpen(why) => End::Undone { phase, why, left, again: Some(Again::HalfOpen) },
            Stop::Failed(why) => End::Undone { phase, why, left, again: None },
        }
    }

    /// The migration.
    fn phases(&mut self) -> Result<(), Stop> {
        self.phase(Phase::Negotiate, Self::negotiate)?;
        if self.request.dry_run {
            return Ok(());
        }
        if self.request.copy_rootfs {
            self.phase(Phase::Copy, Self::copy)?;
        }
        if self.request.pre_setup {
            self.phase(Phase::PreSetup, Self::set_up)?;
        }
        if self.request.pre_copy_rounds != Some(0) {
            self.phase(Phase::PreCopy, Self::pre_copy)?;
        }
        self.phase(Phase::Suspend, Self::suspend)?;
        self.phase(Phase::WaitBeforeStop, Self::drain)?;
        let mut memory = None;
        self.phase(Phase::Freeze, |run| {
            run.freeze()?;
            memory = run.find_memory()?;
            Ok(())
        })?;
        // CRIU leaves registered memory out; nobody writes to it any more.
        self.last_round_beside(memory, |run, round| {
            run.phase(Phase::Dump, Self::dump)?;
            run.phase(Phase::Converge, Self::converge)?;
            run.phase(Phase::Transfer, Self::transfer)?;
            round.hurry();
            run.phase(Phase::Restore, |run| {
                run.restore()?;
                round.arrive(run)
            })
        })?;
        self.phase(Phase::Commit, Self::commit)?;
        self.phase(Phase::Switch, Self::switch)?;
        self.phase(Phase::Resume, Self::resume)?;
        self.phase(Phase::Finish, Self::finish)
    }

    /// Takes up a committed migration whose agent was restarted.
    pub(super) fn go_on(&mut self, record: Record, forward: super::forward::Forward) {
        let super::forward::Forward { plan, states, lease, hand_over, container, .. } = forward;
        self.hand_over = hand_over;
        self.effects.committed = true;
        self.effects.claimed = record.peers.iter().map(|(agent, _)| agent.clone()).collect();
        self.effects.images = Some(self.world.config().state_dir.join("outgoing").join(&record.id));
        self.container = container;
        self.to = if record.kind == Kind::TakeOver { LOCAL.to_owned() } else { record.to.clone() };
        let (role, other) = match record.kind {
            Kind::Restore => (Role::Destination, "an image"),
            Kind::TakeOver => (Role::Destination, record.to.as_str()),
            Kind::Migration | Kind::Checkpoint => (Role::Source, record.to.as_str()),
        };
        self.seen = Some(self.world.under_way().begin(self.id, &record.container, role, other));
        (self.record, self.plan, self.states, self.lease) = (record, plan, states, lease);
    }

    /// Everything after the decision, once more: each step is harmless where it was done before.
    pub(super) fn forward_again(&mut self) -> Result<(), Stop> {
        self.kill_what_is_left();
        if !self.record.resumed {
            self.tell_destination(|| (), || ())?;
            self.phase(Phase::Switch, Self::switch)?;
            self.phase(Phase::Resume, Self::resume)?;
        }
        self.phase(Phase::Finish, Self::finish)?;
        match self.record.kind {
            Kind::Restore => self.world.metrics().image(Operation::Restore, Outcome::FinishedLater),
            // It has arrived, as after any migration.
            Kind::TakeOver => {}
            Kind::Migration | Kind::Checkpoint => {
                self.world.metrics().migration(Role::Source, Outcome::FinishedLater);
            }
        }
        Ok(())
    }

    /// Brackets one phase: told, timed, and not begun when somebody wants to stop.
    pub(super) fn phase(&mut self, phase: Phase, run: impl FnOnce(&mut Self) -> Result<(), Stop>) -> Result<(), Stop> {
        self.wanted()?;
        self.timeline.enter(phase);
        self.world.under_way().at(self.id, Stage::In(phase));
        self.progress.event(Event::Enter { phase });
        run(self)?;
        let seconds = self.timeline.leave().unwrap_or_default();
        self.world.metrics().phase(phase, seconds);
        self.progress.event(Event::Leave { phase, seconds });
        Ok(())
    }

    /// Undoes everything, whatever that is; goes on when a step fails. Returns what could not be undone.
    pub(super) fn undo(&mut self, why: &str) -> Vec<String> {
        self.world.under_way().at(self.id, Stage::Undoing);
        let mut left = Vec::new();
        let effects = std::mem::take(&mut self.effects);
        let host = self.world.host();
        // The tasks first: CRIU still holds them. They stand still in their cgroup until the thaw below.
        if let Some(dump) = effects.dump
            && let Err(e) = dump.refuse(why)
        {
            left.push(format!("CRIU: {e}"));
        }
        if let Some(mut wire) = effects.wire
            && let Err(e) = wire.up()
        {
            left.push(format!("the container's network: {e}"));
        }
        if let Some(container) = &self.container {
            let found_paused = container.paused;
            if effects.cgroup
                && let Err(e) = host.thaw(container)
            {
                left.push(format!("thawing the container: {e}"));
            }
            if effects.suspended {
                left.extend(self.wake(&effects.frozen));
            }
            if effects.cgroup
                && found_paused
                && let Err(e) = host.freeze(container)
            {
                left.push(format!("pausing the container again, as it was found: {e}"));
            }
        }
        let release = |agent: &String| {
            let order = Order::Release { committed: false };
            self.world.call(agent, self.id, order, self.answer_time()).err()
        };
        for e in self.fan_out(effects.claimed.into_iter().collect(), release).into_iter().filter_map(|(_, e)| e) {
            left.push(format!("a peer could not be told and will find out by itself: {}", chain(&e)));
        }
        // After everybody who waits: it may be what fell silent.
        if effects.offered
            && let Err(e) = self.world.call(&self.to, self.id, Order::Abandon, self.answer_time())
        {
            // It will ask, and hear that this migration was aborted.
            left.push(format!("the destination could not be told and will find out by itself: {}", chain(&e)));
        }
        if effects.dumped {
            host.gone_to(&self.request.container, None);
        }
        if effects.held {
            self.world.let_go(self.id);
        }
        if let Some(dir) = effects.images {
            let _ = fs::remove_dir_all(dir);
        }
        if effects.recorded {
            (self.record.state, self.record.why) = (State::Aborted, Some(why.into()));
            if let Err(e) = self.world.records().write(&self.record) {
                left.push(chain(&e));
            }
        }
        left
    }

    /// Lets the container's shims go on: those that froze connect again first.
    fn wake(&self, frozen: &BTreeSet<Vpid>) -> Vec<String> {
        let mut left = Vec::new();
        let name = &self.request.container;
        if !frozen.is_empty() {
            if let Err(e) = self.world.bump(name) {
                left.push(format!("telling the container's shims to connect again: {e}"));
            }
            let vpids: Vec<Vpid> = frozen.iter().copied().collect();
            let deadline = Duration::from_secs(self.world.config().deadlines.reconnect);
            if let Err(missing) = self.world.reconnected(name, &vpids, deadline) {
                let missing: Vec<String> = missing.iter().map(|v| v.0.to_string()).collect();
                left.push(format!("the shims of pids {} did not come back", missing.join(", ")));
            }
        }
        let all = self.states.iter().map(|s| (Side::Own(s.vpid), Request::Abort)).collect();
        for (side, reply) in self.ask_all(all, self.answer_time()) {
            if let Err(stop) = reply {
                left.push(format!("{side} was not told to go on: {stop}"));
            }
        }
        left
    }

    // ---- what the phases share -------------------------------------------------------------------------------------

    /// An error if somebody wants to stop.
    pub(super) fn wanted(&self) -> Result<(), Stop> {
        if let Some(why) = self.cancel.given_up() {
            return Err(Stop::Failed(why));
        }
        match self.cancel.why() {
            Some(why) if !self.effects.committed => Err(Stop::Failed(why)),
            _ => Ok(()),
        }
    }

    pub(super) fn answer_time(&self) -> Duration {
        Duration::from_secs(self.world.config().deadlines.answer)
    }

    pub(super) fn container(&self) -> Result<&Container, Stop> {
        self.container.as_ref().ok_or_else(|| Stop::Failed("the container was not looked up yet".into()))
    }

    pub(super) fn note(&self, text: impl Into<String>) {
        self.progress.event(Event::Note { text: text.into() });
    }

    pub(super) fn summary(&self) -> Summary {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Summary {
            image_bytes: self.bytes,
            pre_copied_bytes: self.sent.bytes - self.bytes.min(self.sent.bytes),
            pre_copy_rounds: self.rounds,
            memory_bytes: self.sent_memory,
            memory_bytes_in_pause: self.late_memory,
            mrs_moved: count(self.states.iter().flat_map(|s| &s.contexts).map(|c| c.mrs.len()).sum()),
            mrs_registered_early: count(self.plan.mrs.len()),
            qps_moved: count(self.states.iter().flat_map(|s| &s.contexts).map(|c| c.qps.len()).sum()),
            hand_over: (!self.states.is_empty()).then_some(self.hand_over),
            qps_switched: count(self.plan.peer_qps().iter().map(|(_, q)| q.len()).sum()),
            ..self.timeline.summary()
        }
    }

    /// A question to the destination.
    pub(super) fn ask_destination(&self, order: Order, deadline: Duration) -> Result<Answer, Stop> {
        Ok(self.world.call(&self.to, self.id, order, deadline)?)
    }

    /// Does `f` for all at the same time.
    pub(super) fn fan_out<T: Send + Sync, R: Send>(&self, items: Vec<T>, f: impl Fn(&T) -> R + Sync) -> Vec<(T, R)> {
        let results = at_once(&items, f);
        items.into_iter().zip(results).collect()
    }

    /// Asks shims of both kinds at the same time.
    pub(super) fn ask_all(&self, asks: Vec<(Side, Request)>, deadline: Duration) -> Vec<(Side, Result<Reply, Stop>)> {
        let ask = |(side, request): &(Side, Request)| match side {
            Side::Own(vpid) => self
                .world
                .shim(&self.request.container, *vpid, Some(self.id), request.clone(), deadline)
                .map_err(Stop::from),
            Side::Peer(peer) => self.relay(&peer.agent, &peer.container, peer.vpid, request.clone(), deadline),
        };
        self.fan_out(asks, ask).into_iter().map(|((side, _), reply)| (side, reply)).collect()
    }

    /// Asks one shim through its host's agent.
    pub(super) fn relay(
        &self,
        agent: &str,
        container: &str,
        vpid: Vpid,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, Stop> {
        let order = Order::Relay { container: container.into(), vpid, request };
        // The agent there has its own deadline and names the process; ours only guards against its silence.
        match self.world.call(agent, self.id, order, deadline * 2 + Duration::from_secs(5))? {
            Answer::Shim(reply) => Ok(reply),
            _ => Err(Stop::Failed(format!("the agent at {agent} answered with something else"))),
        }
    }
}

/// Splits answers in good ones and the first bad one, which decides. [`Stop::Busy`] counts more than others: it is
/// worth another try.
pub(super) fn all_good<T>(answers: Vec<(T, Result<Reply, Stop>)>) -> Result<Vec<(T, Reply)>, Stop> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for (who, answer) in answers {
        match answer {
            Ok(reply) => good.push((who, reply)),
            Err(stop) => bad.push(stop),
        }
    }
    bad.sort_by_key(|stop| !matches!(stop, Stop::Busy { .. }));
    match bad.into_iter().next() {
        Some(stop) => Err(stop),
        None => Ok(good),
    }
}

/// An answer of the wrong kind.
pub(super) fn confused(who: impl std::fmt::Display, what: &str) -> Stop {
    Stop::Failed(format!("{who} answered {what} with something else"))
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
