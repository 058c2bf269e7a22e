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
//! source knows; this host waits, asks, and does nothing else, unless it is told that the source is gone
//! ([`super::take_over`]). In `Running` there is no way back, unless the source has been told that this host is gone
//! ([`super::forsaken`]).
//!
//! Here it is decided which order fits which state; what each of them does is in [`super::steps`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, Vpid};
use rdma_virt::msg::KeyTable;
use rdma_virt::saved::{AdoptedProcess, ProcessState};

use super::host::{Held, Nursery, Wire};
use super::landing::Landing;
use super::memory::Incoming;
use super::revive::ByHand;
use super::store::Store;
use super::{forsaken, take_over};
use crate::agent::metrics::Outcome;
use crate::agent::under_way::Role;
use crate::agent::{Agent, chain, is_plain_name, lock};
use crate::net::msg::{Answer, Fate, Offer, Order, Refusal};

/// A source that said nothing for this long is asked.
pub(super) const QUIET: Duration = Duration::from_secs(20);

/// A source decides at once when it hears that all is prepared. A decision that comes later than this may have been
/// on its way for so long that it is not true any more.
const STALE: Duration = Duration::from_secs(5);

/// How far a migration has come here.
pub(super) enum State {
    /// Objects are made, memory, rounds of pre-copy and at last the image arrive, in any order.
    Gathering { nursery: Option<Box<dyn Nursery>>, store: Option<Store> },
    /// Restored. The last pages of registered memory may still arrive ([`Incoming`]).
    Prepared { nursery: Option<Box<dyn Nursery>>, store: Store, held: Box<dyn Held>, wire: Option<Box<dyn Wire>> },
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
    pub(super) states: Vec<ProcessState>,
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
    pub(super) memory: Incoming,
    /// Something lies ready for its sysfs.
    pub(super) shown: bool,
    /// When the source last said something, or answered.
    pub heard: Instant,
    /// It was asked, and did not.
    pub silent: bool,
    /// It belongs to this host, whatever its source says ([`take_over`]).
    pub(super) taken_over: bool,
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
            memory: Incoming::default(),
            shown: false,
            heard: Instant::now(),
            silent: false,
            taken_over: false,
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
    pub memory: Incoming,
    pub arrival: Arc<Mutex<Arrival>>,
}

impl Entry {
    pub fn new(arrival: Arrival) -> Self {
        Entry {
            container: arrival.offer.container.clone(),
            source: arrival.source.clone(),
            memory: arrival.memory.clone(),
            arrival: Arc::new(Mutex::new(arrival)),
        }
    }
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

pub(super) fn failed(why: impl Into<String>) -> Refusal {
    Refusal::Failed(why.into())
}

/// Does what the source asks of its destination.
pub fn obey(agent: &Agent, from: Option<SocketAddr>, id: MigrationId, order: Order) -> Result<Answer, Refusal> {
    if let Order::Offer { offer, dry_run } = order {
        return consider(agent, from, id, *offer, dry_run);
    }
    // What this host asks of itself it asks in the course of that.
    let happened = || from.is_some() && take_over::happened(agent, id);
    if matches!(order, Order::Holds) {
        return if happened() { Err(take_over::refusal()) } else { Ok(Answer::Has(forsaken::holds(agent, id))) };
    }
    let Some(entry) = agent.desk.get(id) else {
        return match order {
            Order::TakenBack { container } => {
                forsaken::remove_finished(agent, id, &container).map(|()| Answer::Done).map_err(failed)
            }
            _ if happened() => Err(take_over::refusal()),
            // What was never here, or is gone, need not be removed.
            Order::Abandon | Order::Finish => Ok(Answer::Done),
            other => Err(failed(format!("{} for a migration this host knows nothing of", other.name()))),
        };
    };
    if matches!(order, Order::Blocks(_)) {
        let answer = entry.memory.blocks(order).map(|()| Answer::Done).map_err(failed);
        // Whoever has the arrival now is at work for the same source, and notes that it was heard, too.
        if let Ok(mut arrival) = entry.arrival.try_lock() {
            (arrival.heard, arrival.silent) = (Instant::now(), false);
        }
        return answer;
    }
    let mut arrival = lock(&entry.arrival);
    let decides =
        matches!(order, Order::Commit | Order::Adopt | Order::Rebuild { .. } | Order::Finish | Order::Abandon);
    if decides && from.is_some() && arrival.taken_over {
        return Err(take_over::refusal());
    }
    let order = match order {
        Order::Commit if from.is_some() && arrival.heard.elapsed() > STALE => confirmed(agent, id, &arrival)?,
        order => order,
    };
    arrival.heard = Instant::now();
    arrival.silent = false;
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
        lock(&agent.desk.0).insert(id, Entry::new(Arrival::new(source, offer)));
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
            (state @ State::Gathering { .. }, order @ Order::Memory { .. }) => {
                (state, self.remember(agent, order).map_err(failed))
            }
            (State::Gathering { nursery, store: Some(store) }, Order::Restore { files, onward }) => {
                self.restore(agent, nursery, store, files, &onward)
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
}
