//! The agent: one process per host, the only one that speaks to other hosts.
//!
//! | module | subject |
//! |---|---|
//! | [`config`] | its settings |
//! | [`doors`] | per container: a directory shared with it, a socket, an epoch |
//! | [`shims`] | which shims are connected, and asking one |
//! | [`ask`] | what application threads want to know |
//! | [`connecting`] | connections in the making |
//! | [`procs`] | which processes really use RDMA |
//! | [`facts`] | what this host is, and whose agent a GID belongs to |
//! | [`peer`] | this host as the host of a peer |
//! | `complaints` | lines in the log about containers, not too many |
//! | `claims` | what is held for other hosts, across restarts |
//! | [`parking`] | peers that wait for an image to be restored |
//! | [`sessions`] | containers of this host that were pre-dumped |
//! | [`tidy`] | forgetting containers that are no more |
//! | [`admin`] | the local administrator's socket |
//! | [`under_way`], [`taking_part`] | what goes on: noted while it does, and told as one list |
//! | [`status`] | what `migrrdma status` shows |
//! | [`metrics`], [`exporter`] | what is counted (as [`prometheus`] text), and where it can be fetched |
//!
//! The engine ([`crate::engine`]) runs inside, as source or as destination. An agent may stop and start at any time:
//! containers go on, shims connect again, and what was under way is decided by the records on disk.
//!
//! Threads, no async runtime: a host has few migrations at a time, and each wait has its own deadline.

pub mod admin;
pub mod ask;
mod claims;
mod complaints;
pub mod config;
pub mod connecting;
pub mod doors;
pub mod exporter;
pub mod facts;
pub mod metrics;
pub mod parking;
pub mod peer;
pub mod procs;
mod prometheus;
pub mod sessions;
pub mod shims;
pub mod status;
pub mod taking_part;
pub mod tidy;
pub mod under_way;

use std::collections::{HashMap, HashSet};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, PGid, VQpn};

use crate::engine;
use crate::engine::dest::Desk;
use crate::engine::host::Host;
use crate::moved::Moved;
use crate::net::client::{CallError, Client};
use crate::net::msg::{Answer, BEAT, Call, Order, Refusal, Return};
use crate::net::server;
use crate::net::tls::Identity;
use crate::record::{RecordError, Records, make_dir};
use config::Config;
use doors::Doors;
use exporter::Limits;
use metrics::{Door, Metrics, Reason};
use shims::Shims;
use under_way::UnderWay;

/// Stands for this host wherever an agent's address is expected: no network between.
pub const LOCAL: &str = "local";

/// How often quiet migrations are looked after.
const ROUND: Duration = Duration::from_secs(5);

/// Every how many rounds records on disk are looked through.
const SELDOM: u64 = 6;

/// And every how many rounds those who left are asked after.
const TIDY: u64 = 720;

/// For the word of an agent that somebody else cannot reach.
const REACH: Duration = Duration::from_secs(6);

/// An error and its causes in one line.
pub fn chain(e: &(dyn std::error::Error + 'static)) -> String {
    let mut text = e.to_string();
    let mut next = e.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        // Some libraries put the cause into their own text as well.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("cannot use {}", .path.display())]
    Dir { path: PathBuf, source: std::io::Error },
    #[error("an agent runs already: {} answers", .0.display())]
    Running(PathBuf),
    #[error("cannot listen on {listen} for other agents")]
    Listen { listen: String, source: std::io::Error },
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// One host's agent.
pub struct Agent {
    pub config: Config,
    pub host: Arc<dyn Host>,
    /// For those who look on.
    pub under_way: Arc<UnderWay>,
    pub metrics: Metrics,
    pub shims: Shims,
    pub doors: Doors,
    pub moved: Moved,
    pub records: Records,
    pub client: Client,
    /// What this host has in the making as a destination.
    pub desk: Desk,
    /// Migrations this host is the source of, that run now.
    pub running: Mutex<HashMap<MigrationId, Arc<engine::Cancel>>>,
    /// Containers of this host that were pre-dumped.
    pub sessions: sessions::Sessions,
    claims: Mutex<HashMap<String, peer::Claim>>,
    /// Containers whose migration was undone just now.
    let_go: Mutex<claims::AllLetGo>,
    /// When this agent was started.
    pub began: Instant,
    /// Images whose peers here wait no longer.
    spent: Mutex<HashSet<MigrationId>>,
    cgroups: Mutex<HashMap<String, PathBuf>>,
    registered: Mutex<HashMap<VQpn, ask::Registered>>,
    pub connecting: Mutex<connecting::Connecting>,
    silent: Mutex<HashMap<String, Instant>>,
    complaints: Mutex<complaints::Complaints>,
    owners: Mutex<HashMap<PGid, String>>,
    /// Agents that called us, or that we called in a migration.
    pub met: Mutex<Vec<String>>,
    /// Why there is no network half, if there is none.
    identity: Result<Identity, String>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("name", &self.config.name).finish_non_exhaustive()
    }
}

impl Agent {
    /// Reads what is on disk; starts nothing.
    pub fn new(config: Config, host: Arc<dyn Host>) -> Result<Arc<Self>, StartError> {
        let wrap = |path: &PathBuf, source| StartError::Dir { path: path.clone(), source };
        make_dir(&config.state_dir)?;
        let doors = Doors::open(&config.run_dir).map_err(|e| wrap(&config.run_dir, e))?;
        let identity = Identity::load(&config.tls).map_err(|e| chain(&e));
        let silence = silence(&config);
        let client =
            Client::new(identity.as_ref().map(|i| i.client.clone()).map_err(Clone::clone), config.port(), silence);
        let under_way = Arc::new(UnderWay::default());
        Ok(Arc::new(Agent {
            moved: Moved::open(&config.state_dir)?,
            records: Records::open(&config.state_dir)?,
            sessions: sessions::Sessions::open(&config.state_dir)?,
            desk: Desk::default(),
            client,
            doors,
            host,
            identity,
            config,
            shims: Shims::new(under_way.clone()),
            under_way,
            metrics: Metrics::default(),
            running: Mutex::default(),
            claims: Mutex::default(),
            let_go: Mutex::default(),
            began: Instant::now(),
            spent: Mutex::default(),
            cgroups: Mutex::default(),
            registered: Mutex::default(),
            connecting: Mutex::default(),
            silent: Mutex::default(),
            complaints: Mutex::default(),
            owners: Mutex::default(),
            met: Mutex::default(),
        }))
    }

    /// Starts everything; returns once all sockets are open.
    pub fn start(self: &Arc<Self>) -> Result<(), StartError> {
        let wrap = |source| StartError::Dir { path: self.config.run_dir.clone(), source };
        admin::refuse_second(&self.config.admin())?;
        self.forget_lost_guests();
        self.doors.serve(self.clone()).map_err(wrap)?;
        let held = self.held_before();
        engine::prepared::take_up(self);
        self.recall_claims(held);
        self.recall_parked();
        self.recall_sessions();
        engine::recover::run(self);
        match &self.identity {
            Ok(identity) => {
                let listen = self.config.listen.clone();
                let failed = |source| StartError::Listen { listen: listen.clone(), source };
                let listener = TcpListener::bind(&listen).map_err(failed)?;
                server::serve(listener, identity.server.clone(), silence(&self.config), self.clone())
                    .map_err(failed)?;
                eprintln!("listening on {listen} for other agents");
            }
            Err(why) => eprintln!("no migration from or to this host until it has certificates: {why}"),
        }
        if let Some(at) = self.config.metrics {
            let served = TcpListener::bind(at).and_then(|l| exporter::serve(l, self.clone(), Limits::default()));
            match served {
                Ok(()) => eprintln!("metrics at http://{at}/metrics"),
                // Containers need the agent, with or without them.
                Err(e) => eprintln!("no metrics at {at}: {e}"),
            }
        }
        admin::serve(self).map_err(wrap)?;
        let agent = self.clone();
        let rounds = move || {
            for round in 1_u64.. {
                thread::sleep(ROUND);
                agent.client.tidy();
                agent.look_after_claims();
                agent.look_after_latecomers();
                agent.look_after_parked();
                agent.look_after_sessions();
                engine::orphans::look_after(&agent);
                if round.is_multiple_of(SELDOM) {
                    engine::recover::run(&agent);
                }
                if round.is_multiple_of(TIDY) {
                    agent.tidy_moved();
                }
            }
        };
        thread::Builder::new().name("rounds".into()).spawn(rounds).map_err(wrap)?;
        Ok(())
    }

    /// Why other agents cannot be reached, if they cannot.
    pub fn no_network(&self) -> Option<&str> {
        self.identity.as_ref().err().map(String::as_str)
    }

    /// Answers [`Order::Reaches`].
    fn reaches(&self, at: &str) -> bool {
        self.client.call(at, None, Order::Describe, REACH).is_ok()
    }

    /// Puts an order to an agent, this one included.
    pub fn call(
        &self,
        at: &str,
        migration: Option<MigrationId>,
        order: Order,
        deadline: Duration,
    ) -> Result<Answer, CallError> {
        self.call_and_meanwhile(at, migration, order, deadline, &mut || ())
    }

    /// As [`Agent::call`]; `sent` is run when the order is on its way to another agent.
    pub fn call_and_meanwhile(
        &self,
        at: &str,
        migration: Option<MigrationId>,
        order: Order,
        deadline: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Answer, CallError> {
        if at == LOCAL {
            let name = order.name();
            return self.obey(None, migration, order).map_err(|refusal| CallError::Refused {
                at: "this host".into(),
                order: name,
                refusal,
            });
        }
        let _wait = self.under_way.wait_for_agent(migration, at, &order, deadline);
        self.client.call_and_meanwhile(at, migration, order, deadline, sent)
    }

    /// Does what another agent (`from`) or this one asks.
    pub fn obey(
        &self,
        from: Option<SocketAddr>,
        migration: Option<MigrationId>,
        order: Order,
    ) -> Result<Answer, Refusal> {
        match &order {
            Order::Describe => return Ok(Answer::Host(self.describe())),
            Order::Resolve { vgid, vqpn, asker } => {
                let caller = from.map(|from| SocketAddr::new(from.ip(), self.config.port()).to_string());
                let passed_on = asker.is_some();
                let asker = asker.clone().or(caller).unwrap_or(LOCAL.into());
                return self.resolve_for_other(*vgid, *vqpn, &asker, passed_on).map(Answer::Resolved);
            }
            Order::Connected { vgid, vqpn } => return Ok(Answer::Connected(self.connected_to(*vgid, *vqpn))),
            Order::Has { process } if !is_plain_name(&process.container) => return Ok(Answer::Has(false)),
            Order::Reaches { at } => return Ok(Answer::Has(self.reaches(at))),
            Order::Has { process } => return Ok(Answer::Has(self.has(&process.container, process))),
            _ => {}
        }
        let name = order.name();
        let id = migration.ok_or_else(|| Refusal::Failed(format!("{name} belongs to a migration, but names none")))?;
        match order {
            Order::Describe
            | Order::Resolve { .. }
            | Order::Connected { .. }
            | Order::Reaches { .. }
            | Order::Has { .. } => {
                unreachable!("answered above")
            }
            Order::Moved(mut news) => {
                // Who restored a container itself need not know how others call it.
                for process in news.iter_mut().filter(|p| p.at == LOCAL) {
                    if let Some(from) = from {
                        process.at = SocketAddr::new(from.ip(), self.config.port()).to_string();
                    }
                }
                if news.iter().any(|p| !is_plain_name(&p.container)) {
                    return Err(Refusal::Failed("a container's id with a slash or a leading dot".into()));
                }
                self.moved.learn(&news).map_err(|e| Refusal::Failed(chain(&e)))?;
                Ok(Answer::Done)
            }
            Order::Fate => Ok(Answer::Fate(engine::recover::fate(self, id))),
            Order::Find { links } => Ok(Answer::Found(self.find(&links))),
            Order::Claim { containers, port } => self.claim(id, from, port, &containers),
            Order::Relay { container, vpid, request } => self.relay(id, &container, vpid, request),
            Order::Park { containers, generation, secret, seconds } => {
                self.park(id, &containers, generation, secret, seconds)
            }
            Order::Unpark { containers, port, generation, secret } => {
                self.unpark(id, from, port, &containers, generation, &secret)
            }
            Order::Release { committed } => Ok(self.release(id, committed)),
            Order::TakenOver { container } => engine::superseded::obey(self, id, &container),
            order @ Order::TakenBack { .. } => {
                self.forsake(id);
                let answer = engine::dest::obey(self, from, id, order)?;
                engine::take_over::was_ended(self, id);
                Ok(answer)
            }
            order => engine::dest::obey(self, from, id, order),
        }
    }
}

/// How long another agent may say nothing. One that is at work says so every [`BEAT`].
fn silence(config: &Config) -> Duration {
    Duration::from_secs(config.deadlines.silence).max(BEAT * 2)
}

impl server::Handler for Agent {
    fn handle(&self, from: SocketAddr, call: Call) -> Return {
        let name = call.order.name();
        let answer = self.obey(Some(from), call.migration, call.order);
        self.metrics.order(
            name,
            match &answer {
                Ok(_) => "done",
                Err(Refusal::Busy { .. }) => "busy",
                Err(Refusal::Absent(_)) => "absent",
                Err(Refusal::Failed(_)) => "failed",
            },
        );
        Return { seq: call.seq, answer }
    }

    fn rejected(&self, reason: Reason) {
        self.metrics.rejected(Door::Agents, reason);
    }
}

impl exporter::Source for Agent {
    fn page(&self) -> String {
        self.metrics_page()
    }

    fn rejected(&self, reason: Reason) {
        self.metrics.rejected(Door::Metrics, reason);
    }
}

/// Usable as a file name: what container runtimes allow as an id.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.+-".contains(c))
}
