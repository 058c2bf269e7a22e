//! The destination of a migration: one state machine per migration, whose states own what they need.
//!
//! ```text
//!            Restore             Commit           Adopt
//!  Gathering ─────────▶ Prepared ─────────▶ Running ─────▶ Running
//!   ▲  │  │                │                                 │ Finish
//!   └──┘  └─── Abandon ────┘                                 ▼
//!  Incubate,      │                                         gone
//!  Join, files    ▼
//!               gone
//! ```
//!
//! Until [`State::Prepared`] this host may give up by itself: the source cannot have committed. In `Prepared` only the
//! source knows; this host waits, asks, and does nothing else. In `Running` there is no way back, unless the source has
//! been told that this host is gone ([`super::forsaken`]).

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, ObjId, Vpid};
use rdma_virt::msg::KeyTable;
use rdma_virt::saved::{AdoptedProcess, ProcessState, SgidMap};

use super::forsaken;
use super::host::{Held, Nursery, RestoreJob, Wire};
use super::landing::Landing;
use super::memory::Memory;
use super::newcomers::{adopt, alive};
use super::prepared::{self, Note};
use super::revive::ByHand;
use super::store::{Store, StoreError};
use crate::agent::metrics::Outcome;
use crate::agent::under_way::Role;
use crate::agent::{Agent, chain, is_plain_name, lock};
use crate::image::HandOver;
use crate::net::msg::{Answer, BornGid, BornQp, Fate, Offer, Order, Refusal};

/// A source that said nothing for this long is asked.
pub(super) const QUIET: Duration = Duration::from_secs(20);

/// A source decides at once when it hears that all is prepared. A decision that comes later than this may have been
/// on its way for so long that it is not true any more.
const STALE: Duration = Duration::from_secs(5);

/// Name of the incubator's socket in the container's directory; the plugin knows it.
const INCUBATOR: &str = "incubator.sock";

/// How far a migration has come here.
pub(super) enum State {
    /// Objects are made, memory, rounds of pre-copy and at last the image arrive, in any order.
    Gathering {
        nursery: Option<Box<dyn Nursery>>,
        store: Option<Store>,
    },
    Prepared {
        nursery: Option<Box<dyn Nursery>>,
        store: Store,
        held: Box<dyn Held>,
        wire: Option<Box<dyn Wire>>,
    },
    Running {
        nursery: Option<Box<dyn Nursery>>,
        store: Store,
        held: Box<dyn Held>,
        /// What the shims answered, once they did.
        keys: Option<Vec<(Vpid, KeyTable)>>,
    },
    /// Between two states, and after the last.
    Gone,
}

impl State {
    pub(super) fn name(&self) -> &'static str {
        match self {
            State::Gathering { nursery: None, store: None } => "offered",
            State::Gathering { nursery: Some(_), store: None } => "making objects",
            State::Gathering { .. } => "receiving",
            State::Prepared { .. } => "prepared, waiting for the decision",
            State::Running { keys: None, .. } => "running, not yet connected",
            State::Running { .. } => "running",
            State::Gone => "over",
        }
    }
}

/// One migration to this host.
pub(super) struct Arrival {
    /// `host:port` of the source's agent.
    pub source: String,
    pub(super) offer: Offer,
    states: Vec<ProcessState>,
    /// What the incubator made for them, once they hold it.
    pub(super) adopted: Vec<AdoptedProcess>,
    /// What the restored processes make by themselves; empty where an incubator does it.
    pub(super) rebuild: super::rebuild::Here,
    pub state: State,
    /// When it was reached.
    pub since: Instant,
    /// The bundle that comes along.
    pub(super) landing: Option<Landing>,
    /// Registered memory that comes along.
    memory: Option<Memory>,
    /// Something lies ready for its sysfs.
    pub(super) shown: bool,
    /// When the source last said something, or answered.
    pub heard: Instant,
    /// It comes from files.
    pub by_hand: Option<ByHand>,
}

impl Arrival {
    pub fn new(source: String, offer: Offer) -> Self {
        Arrival {
            source,
            offer,
            states: Vec::new(),
            adopted: Vec::new(),
            rebuild: Default::default(),
            state: State::Gathering { nursery: None, store: None },
            since: Instant::now(),
            landing: None,
            memory: None,
            shown: false,
            heard: Instant::now(),
            by_hand: None,
        }
    }
}

/// All migrations to this host.
#[derive(Default)]
pub struct Desk(pub(super) Mutex<HashMap<MigrationId, Entry>>);

#[derive(Clone)]
pub(super) struct Entry {
    pub container: String,
    /// As in [`Arrival`], for those who do not want to wait for it.
    pub source: String,
    pub arrival: Arc<Mutex<Arrival>>,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(lock(&self.0).keys()).finish()
    }
}

impl Desk {
    /// The migration that brings this container, if any.
    pub fn bringing(&self, container: &str) -> Option<MigrationId> {
        lock(&self.0).iter().find(|(_, e)| e.container == container).map(|(id, _)| *id)
    }

    /// Whether anything is known of this migration.
    pub(super) fn has(&self, id: MigrationId) -> bool {
        lock(&self.0).contains_key(&id)
    }

    pub(super) fn get(&self, id: MigrationId) -> Option<Entry> {
        lock(&self.0).get(&id).cloned()
    }
}

fn failed(why: impl Into<String>) -> Refusal {
    Refusal::Failed(why.into())
}

/// Does what the source asks of its destination.
pub fn obey(agent: &Agent, from: Option<SocketAddr>, id: MigrationId, order: Order) -> Result<Answer, Refusal> {
    if let Order::Offer { offer, dry_run } = order {
        return consider(agent, from, id, *offer, dry_run);
    }
    if matches!(order, Order::Holds) {
        return Ok(Answer::Has(forsaken::holds(agent, id)));
    }
    let Some(entry) = agent.desk.get(id) else {
        return match order {
            Order::TakenBack { container } => {
                forsaken::remove_finished(agent, id, &container).map(|()| Answer::Done).map_err(failed)
            }
            // What was never here, or is gone, need not be removed.
            Order::Abandon | Order::Finish => Ok(Answer::Done),
            other => Err(failed(format!("{} for a migration this host knows nothing of", other.name()))),
        };
    };
    let mut arrival = lock(&entry.arrival);
    let order = match order {
        Order::Commit if from.is_some() && arrival.heard.elapsed() > STALE => confirmed(agent, id, &arrival)?,
        order => order,
    };
    arrival.heard = Instant::now();
    let (before, finishes) = (arrival.state.name(), matches!(order, Order::Finish));
    let step = agent.under_way.step_here(id, &order);
    let answer = arrival.step(agent, id, order);
    drop(step);
    arrival.heard = Instant::now();
    if arrival.state.name() != before {
        arrival.since = arrival.heard;
    }
    if matches!(arrival.state, State::Gone) {
        if arrival.by_hand.is_none() {
            agent.metrics.migration(Role::Destination, if finishes { Outcome::Finished } else { Outcome::Undone });
        }
        lock(&agent.desk.0).remove(&id);
    }
    answer
}

/// What has become of a decision that was long on its way: the line may have been cut, or this host have stood still,
/// for longer than anybody believed in it.
fn confirmed(agent: &Agent, id: MigrationId, arrival: &Arrival) -> Result<Order, Refusal> {
    match agent.call(&arrival.source, Some(id), Order::Fate, Duration::from_secs(10)) {
        Ok(Answer::Fate(Fate::Committed | Fate::Finished)) => Ok(Order::Commit),
        Ok(Answer::Fate(Fate::TakenBack)) => Ok(Order::TakenBack { container: arrival.offer.container.clone() }),
        Ok(_) => Err(failed("a decision that its source does not confirm")),
        Err(e) => Err(failed(format!("a decision came late, and its source does not confirm it: {}", chain(&e)))),
    }
}

fn consider(
    agent: &Agent,
    from: Option<SocketAddr>,
    id: MigrationId,
    offer: Offer,
    dry_run: bool,
) -> Result<Answer, Refusal> {
    if !is_plain_name(&offer.container) {
        return Err(failed("a container's id with a slash or a leading dot"));
    }
    let Some(from) = from else { return Err(failed("a container cannot move to the host it is on")) };
    if let Some(by) = agent.desk.bringing(&offer.container).filter(|other| *other != id) {
        agent.metrics.migration(Role::Destination, Outcome::Busy);
        return Err(Refusal::Busy { container: offer.container, by });
    }
    let problems = super::check::problems(agent, &offer, false);
    if problems.is_empty() && !dry_run {
        let source = SocketAddr::new(from.ip(), offer.from_port).to_string();
        agent.meet(&source);
        let container = offer.container.clone();
        let arrival = Arc::new(Mutex::new(Arrival::new(source.clone(), offer)));
        lock(&agent.desk.0).insert(id, Entry { container, source, arrival });
    } else if !dry_run {
        agent.metrics.migration(Role::Destination, Outcome::Refused);
    }
    Ok(Answer::Offered { problems })
}

impl Arrival {
    /// One order. An order that does not fit the state changes nothing.
    fn step(&mut self, agent: &Agent, id: MigrationId, order: Order) -> Result<Answer, Refusal> {
        if matches!(order, Order::TreeStart { .. } | Order::TreePiece { .. } | Order::TreeEnd) {
            return self.land(agent, id, order).map_err(failed);
        }
        let state = std::mem::replace(&mut self.state, State::Gone);
        let name = order.name();
        let (state, answer) = match (state, order) {
            (state @ State::Gathering { .. }, Order::Show { devices }) => {
                (state, self.show(agent, &devices).map(|()| Answer::Done).map_err(failed))
            }
            (State::Gathering { mut nursery, store }, Order::Incubate { states }) => {
                let answer = self.incubate(agent, &mut nursery, states);
                (State::Gathering { nursery, store }, answer)
            }
            (State::Gathering { nursery: Some(mut nursery), store }, Order::Join { links }) => {
                let joined = nursery.connect(&links).map(|()| Answer::Done).map_err(|e| failed(e.to_string()));
                (State::Gathering { nursery: Some(nursery), store }, joined)
            }
            (
                State::Gathering { nursery, mut store },
                order @ (Order::Round { .. }
                | Order::Files(_)
                | Order::FileStart { .. }
                | Order::FilePiece { .. }
                | Order::FileEnd { .. }),
            ) => {
                let answer = self.receive(agent, id, &mut store, order);
                (State::Gathering { nursery, store }, answer)
            }
            (state @ State::Gathering { .. }, order @ (Order::Memory { .. } | Order::Pages(_))) => {
                (state, self.remember(agent, order).map_err(failed))
            }
            (State::Gathering { nursery, store: Some(store) }, Order::Restore { files }) => {
                self.restore(agent, nursery, store, files)
            }
            (State::Prepared { nursery, store, held, wire }, Order::Commit) => {
                self.commit(agent, id, nursery, store, held, wire)
            }
            (running @ State::Running { .. }, Order::Commit) => (running, Ok(Answer::Done)),
            (State::Running { nursery, store, held, keys: None }, Order::Adopt) => {
                self.adopt(agent, id, nursery, store, held)
            }
            (State::Running { nursery, store, held, keys: Some(keys) }, Order::Adopt) => {
                let answer = Answer::Adopted { keys: keys.clone() };
                (State::Running { nursery, store, held, keys: Some(keys) }, Ok(answer))
            }
            (State::Running { nursery, store, held, keys }, Order::Rebuild { links }) => {
                match self.rebuild.run(agent, id, &self.offer.container, held.init(), &links) {
                    Ok((qps, keys)) => {
                        let answer = Answer::Rebuilt { qps, gids: self.rebuild.gids(), keys: keys.clone() };
                        (State::Running { nursery, store, held, keys: Some(keys) }, Ok(answer))
                    }
                    Err(why) => (State::Running { nursery, store, held, keys }, Err(failed(why))),
                }
            }
            (State::Running { nursery, store, held, keys }, Order::Finish) => {
                self.finish(agent, id, nursery, store);
                drop((held, keys));
                (State::Gone, Ok(Answer::Done))
            }
            (state, Order::TakenBack { .. }) => {
                let (state, ended) = self.forsake(agent, id, state);
                (state, ended.map(|()| Answer::Done).map_err(failed))
            }
            (running @ State::Running { .. }, Order::Abandon) => {
                (running, Err(failed("the container runs here already: its source had committed")))
            }
            (state, Order::Abandon) => {
                self.abandon(agent, state);
                (State::Gone, Ok(Answer::Done))
            }
            (state, _) => {
                let why = format!("{name} does not fit: the migration is {} here", state.name());
                (state, Err(failed(why)))
            }
        };
        self.state = state;
        answer
    }

    /// The bundle, before anything needs it.
    fn land(&mut self, agent: &Agent, id: MigrationId, order: Order) -> Result<Answer, String> {
        if !matches!(self.state, State::Gathering { .. }) {
            return Err(format!("tree does not fit: the migration is {} here", self.state.name()));
        }
        let landing = match &mut self.landing {
            Some(landing) => landing,
            none => none.insert(Landing::begin(agent, id, &self.offer)?),
        };
        let complete = landing.take(agent, order)?;
        let problems = || super::check::problems(agent, &self.offer, true);
        Ok(if complete { Answer::Offered { problems: problems() } } else { Answer::Done })
    }

    /// Registered memory, into files that the container will find.
    fn remember(&mut self, agent: &Agent, order: Order) -> Result<Answer, String> {
        let memory = match &mut self.memory {
            Some(memory) => memory,
            none => {
                let dir = agent.host.make_memory_files(&self.offer.container).map_err(|e| e.to_string())?;
                none.insert(Memory::begin(dir, self.offer.image_bytes).map_err(|e| chain(&e))?)
            }
        };
        memory.take(order).map(|()| Answer::Done).map_err(|e| chain(&e))
    }

    /// The container's directory is made by its runtime when it restores; the incubator needs it earlier.
    fn nursery(&self, agent: &Agent) -> Result<Box<dyn Nursery>, Refusal> {
        let Offer { container, bundle, .. } = &self.offer;
        let dir = agent.doors.of(container);
        fs::create_dir_all(&dir).map_err(|e| failed(format!("cannot make {}: {e}", dir.display())))?;
        agent.host.incubate(container, bundle, &dir.join(INCUBATOR)).map_err(|e| failed(format!("the incubator: {e}")))
    }

    fn incubate(
        &mut self,
        agent: &Agent,
        nursery: &mut Option<Box<dyn Nursery>>,
        states: Vec<ProcessState>,
    ) -> Result<Answer, Refusal> {
        let nursery = match nursery {
            Some(nursery) => nursery,
            none => none.insert(self.nursery(agent)?),
        };
        let made = nursery.converge(&states).map_err(|e| failed(format!("making the RDMA objects: {e}")))?;
        let qps = born(&made, &states).map_err(failed)?;
        let contexts = made.iter().flat_map(|p| p.contexts.iter().map(|c| (p.vpid, c.id, &c.sgid_index[..])));
        let gids = gids(contexts, &states);
        self.states = states;
        let mrs = made.iter().flat_map(|p| &p.contexts).map(|c| c.mrs.len()).sum::<usize>();
        Ok(Answer::Incubated { qps, gids, mrs: u32::try_from(mrs).unwrap_or(u32::MAX) })
    }

    fn receive(
        &mut self,
        agent: &Agent,
        id: MigrationId,
        store: &mut Option<Store>,
        order: Order,
    ) -> Result<Answer, Refusal> {
        let wrap = |e: StoreError| failed(chain(&e));
        let store = match store {
            Some(store) => store,
            none => {
                let dir = Store::place(&agent.config.state_dir, id);
                none.insert(Store::make(dir, self.offer.image_bytes).map_err(wrap)?)
            }
        };
        store.take(order).map_err(wrap)?;
        Ok(Answer::Done)
    }

    fn restore(
        &mut self,
        agent: &Agent,
        mut nursery: Option<Box<dyn Nursery>>,
        store: Store,
        files: u32,
    ) -> (State, Result<Answer, Refusal>) {
        match self.try_restore(agent, &mut nursery, &store, files) {
            Ok((held, wire)) => (State::Prepared { nursery, store, held, wire }, Ok(Answer::Done)),
            Err(why) => (State::Gathering { nursery, store: Some(store) }, Err(failed(why))),
        }
    }

    /// Everything that can fail happens here, not after the decision.
    #[expect(clippy::type_complexity, reason = "the two things a prepared container is made of, named by the caller")]
    fn try_restore(
        &mut self,
        agent: &Agent,
        nursery: &mut Option<Box<dyn Nursery>>,
        store: &Store,
        files: u32,
    ) -> Result<(Box<dyn Held>, Option<Box<dyn Wire>>), String> {
        store.is_complete(files).map_err(|e| chain(&e))?;
        let Offer { container, bundle, .. } = &self.offer;
        // Read by the restored tasks later; what is wrong with it is better said here.
        crate::image::read(&store.images()).map_err(|e| chain(&e))?;
        let mut wire = agent.host.wire(bundle, None).map_err(|e| format!("the container's network: {e}"))?;
        if let Some(wire) = &mut wire {
            wire.down().map_err(|e| format!("the container's network: {e}"))?;
        }
        if let Some(nursery) = nursery {
            nursery.arm().map_err(|e| format!("the incubator: {e}"))?;
        }
        let job = RestoreJob {
            id: container.clone(),
            bundle: bundle.clone(),
            images: store.images(),
            work: store.work(),
            incubator: nursery.is_some().then(|| agent.doors.of(container).join(INCUBATOR)),
            deadline: Duration::from_secs(agent.config.deadlines.restore),
            door: prepared::door(store.dir()),
        };
        let held = match &self.by_hand {
            Some(ByHand::Restore(clerk)) => super::by_hand::restore(clerk, &job),
            _ => {
                prepared::begins(store.dir(), container)?;
                agent.host.restore(&job)
            }
        };
        let held = held.map_err(|e| format!("restoring the container: {e}"));
        let missing = match (nursery.as_mut(), &held) {
            (Some(nursery), Ok(_)) => nursery.disarm().and_then(|()| nursery.missing()),
            (Some(nursery), Err(_)) => nursery.disarm().map(|()| Vec::new()),
            (None, _) => Ok(Vec::new()),
        };
        let held = held?;
        match self.settle(agent, nursery, store, held.init(), missing) {
            Ok(()) => Ok((held, wire)),
            Err(why) => {
                give_up(held);
                Err(why)
            }
        }
    }

    /// Nothing is missing, and an agent that is started after this one will know what to do.
    fn settle(
        &mut self,
        agent: &Agent,
        nursery: &mut Option<Box<dyn Nursery>>,
        store: &Store,
        init: i32,
        missing: super::host::Result<Vec<String>>,
    ) -> Result<(), String> {
        let incubator = |e: super::host::HostError| format!("the incubator: {e}");
        if self.offer.hand_over == HandOver::Rebuild {
            self.rebuild = super::rebuild::Here::look(&store.images(), init)?;
        }
        let missing = missing.map_err(incubator)?;
        if !missing.is_empty() {
            return Err(format!("restored processes did not take all their RDMA objects: {}", missing.join(", ")));
        }
        self.adopted = nursery.as_mut().map_or(Ok(Vec::new()), |n| n.report()).map_err(incubator)?;
        self.write_down(store, init, |note| note)?;
        // Its later QPs get numbers of its own range from the first moment on.
        agent.moved.host_guest(&self.offer.container, self.offer.lease).map_err(|e| chain(&e))
    }

    /// For the next agent.
    fn write_down(&self, store: &Store, init: i32, stage: impl FnOnce(Note) -> Note) -> Result<(), String> {
        let note = Note::new(&self.source, &self.offer, init, &self.adopted).given(store.somebody_elses());
        stage(note).write(store.dir())
    }

    fn commit(
        &mut self,
        agent: &Agent,
        id: MigrationId,
        nursery: Option<Box<dyn Nursery>>,
        store: Store,
        mut held: Box<dyn Held>,
        mut wire: Option<Box<dyn Wire>>,
    ) -> (State, Result<Answer, Refusal>) {
        let container = self.offer.container.clone();
        let mut run = || -> Result<(), String> {
            if let Some(wire) = &mut wire {
                wire.up().map_err(|e| format!("the container's network: {e}"))?;
            }
            agent.doors.bump(&container).map_err(|e| format!("the container's directory: {e}"))?;
            self.write_down(&store, held.init(), Note::decided)?;
            held.release().map_err(|e| format!("letting the tasks run: {e}"))
        };
        if let Err(why) = run() {
            return (State::Prepared { nursery, store, held, wire }, Err(failed(why)));
        }
        if let Some(landing) = self.landing.take() {
            landing.keep();
        }
        agent.take_over(id, &container, &self.source);
        if let Some(wire) = &mut wire
            && let Err(e) = wire.announce()
        {
            // Neighbours find out by themselves, a little later.
            eprintln!("container {container}: announcing its address: {e}");
        }
        (State::Running { nursery, store, held, keys: None }, Ok(Answer::Done))
    }

    fn adopt(
        &mut self,
        agent: &Agent,
        id: MigrationId,
        mut nursery: Option<Box<dyn Nursery>>,
        store: Store,
        held: Box<dyn Held>,
    ) -> (State, Result<Answer, Refusal>) {
        let container = self.offer.container.clone();
        let there = alive(agent, &container, held.init(), self.adopted.clone(), |a| a.vpid);
        let keys = adopt(agent, id, &container, there).and_then(|keys| {
            self.write_down(&store, held.init(), |note| note.with_keys(&keys))?;
            Ok(keys)
        });
        match keys {
            Ok(keys) => {
                if let Some(nursery) = nursery.take()
                    && let Err(e) = nursery.release()
                {
                    eprintln!("container {container}: the incubator's end: {e}");
                }
                let answer = Answer::Adopted { keys: keys.clone() };
                (State::Running { nursery, store, held, keys: Some(keys) }, Ok(answer))
            }
            Err(why) => (State::Running { nursery, store, held, keys: None }, Err(failed(why))),
        }
    }

    fn finish(&mut self, agent: &Agent, id: MigrationId, nursery: Option<Box<dyn Nursery>>, store: Store) {
        let container = &self.offer.container;
        if let Some(nursery) = nursery {
            let _ = nursery.release();
        }
        let _ = fs::remove_file(agent.doors.of(container).join(INCUBATOR));
        if let Err(e) = store.remove() {
            eprintln!("{id}: {}", chain(&e));
        }
        agent.let_go_of(id);
        if self.offer.paused {
            // As it was found on the source.
            let frozen = agent.host.container(container).and_then(|c| agent.host.freeze(&c));
            if let Err(e) = frozen {
                eprintln!("container {container} could not be paused again: {e}");
            }
        }
    }

    pub(super) fn abandon(&mut self, agent: &Agent, state: State) {
        let container = &self.offer.container;
        let (nursery, store) = match state {
            State::Prepared { nursery, store, held, wire } => {
                give_up(held);
                agent.moved.forget_guest(container);
                drop(wire);
                (nursery, Some(store))
            }
            State::Gathering { nursery, store } => (nursery, store),
            State::Running { .. } | State::Gone => (None, None),
        };
        // Its objects vanish with it.
        let nursed = nursery.is_some();
        drop(nursery);
        if let Some(store) = store
            && let Err(e) = store.remove()
        {
            eprintln!("{}", chain(&e));
        }
        if nursed && agent.host.container(container).is_err() {
            remove_dir(agent.doors.of(container));
        }
        let nobody = agent.host.container(container).is_err();
        if self.memory.take().is_some() && nobody {
            agent.host.drop_memory_files(container);
        }
        if std::mem::take(&mut self.shown) && nobody {
            agent.host.show_no_more(container);
        }
        if let Some(landing) = self.landing.take() {
            landing.remove();
        }
    }
}

pub(super) fn remove_dir(dir: PathBuf) {
    match fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => eprintln!("{}: {e}", dir.display()),
        _ => {}
    }
}

fn give_up(held: Box<dyn Held>) {
    if let Err(e) = held.abandon() {
        eprintln!("removing what was restored: {e}");
    }
}

/// What each GID of the processes' tables is here.
pub(super) fn gids<'a>(
    contexts: impl Iterator<Item = (Vpid, ObjId, &'a [SgidMap])>,
    states: &[ProcessState],
) -> Vec<BornGid> {
    let mut gids = Vec::new();
    for (vpid, id, maps) in contexts {
        let state = states.iter().filter(|s| s.vpid == vpid).flat_map(|s| &s.contexts).find(|c| c.id == id);
        for entry in state.iter().flat_map(|c| &c.gids) {
            let map = maps.iter().find(|m| m.port == entry.port && u16::from(m.virtual_index) == entry.index);
            let born = map.map(|m| BornGid { vpid, vgid: entry.gid, pgid: m.physical });
            gids.extend(born.filter(|b| !gids.contains(b)));
        }
    }
    gids
}

/// QP numbers and addresses for the source's plan. A QP's packets come from the GID its application chose, at that
/// entry's place on this host.
fn born(made: &[AdoptedProcess], states: &[ProcessState]) -> Result<Vec<BornQp>, String> {
    let mut qps = Vec::new();
    for process in made {
        let of = |c: ObjId| states.iter().find(|s| s.vpid == process.vpid)?.contexts.iter().find(|x| x.id == c);
        for context in &process.contexts {
            for qp in &context.qps {
                let asked = of(context.id).and_then(|c| c.qps.iter().find(|q| q.id == qp.id));
                let entry = asked.and_then(|q| {
                    let fits = |s: &&SgidMap| s.port == q.attr.port_num && s.virtual_index == q.attr.sgid_index;
                    context.sgid_index.iter().find(fits)
                });
                // One that is not connected sends from nowhere yet: whoever connects to it goes by the GID it was told.
                let Some(pgid) = entry.or(context.sgid_index.first()).map(|s| s.physical) else {
                    return Err(format!("device {} has no GID of the kind its QPs use", context.device));
                };
                qps.push(BornQp {
                    vpid: process.vpid,
                    context: context.id,
                    qp: qp.id,
                    vqpn: qp.vqpn,
                    pqpn: qp.pqpn,
                    pgid,
                });
            }
        }
    }
    Ok(qps)
}
