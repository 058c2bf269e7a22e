//! To disk: pre-dump and checkpoint of a container with RDMA by command. The phases are those of a migration up to the
//! dump; then, instead of a transfer, the image lies where the administrator wanted it, the container ends here, and its
//! peers are parked: suspended, until somebody shows that it restores this image ([`super::revive`]), or their time is
//! over.
//!
//! A pre-dump leaves a session ([`crate::agent::sessions`]) behind that holds the peers for the checkpoint to come, so
//! that a partial restore elsewhere can connect to them meanwhile.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, PGid, Vpid};
use rdma_virt::saved::ProcessState;
use serde::{Deserialize, Serialize};

use super::attempts::Attempts;
use super::by_hand::{ByHand, Clerk};
use super::handover::Dump;
use super::host::{DumpJob, PreDumpJob};
use super::plan::Plan;
use super::source::{End, Run, Stop};
use super::world::World;
use super::{Cancel, MigrateRequest, Progress};
use crate::agent::admin::Event;
use crate::agent::metrics::Operation;
use crate::agent::sessions::{Init, Session};
use crate::agent::under_way::Role;
use crate::agent::{Agent, LOCAL, chain, facts, lock};
use crate::at_once::at_once;
use crate::image::{self, ImagedSession, Secret};
use crate::net::msg::{BornQp, Lease, MovedProcess, Order};
use crate::phase::Phase;
use crate::record::{Kind, Record, State, now};

/// Between two tries of telling a peer.
const PAUSE: Duration = Duration::from_millis(500);

/// What an administrator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    pub container: String,
    /// Directory of the image, absolute.
    pub images: PathBuf,
    /// Memory and the RDMA image only; the container goes on, and its checkpoint follows.
    #[serde(default)]
    pub pre_dump: bool,
    #[serde(default)]
    pub leave_running: bool,
}

/// How it ended.
enum Outcome {
    Ended(End),
    /// Nothing of RDMA is in it: the container's runtime needs nobody.
    Plain,
}

/// The record's plan: whom to tell what, if the agent is restarted after the decision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Parking {
    peers: Vec<(String, Vec<String>)>,
    generation: u64,
    secret: Secret,
    seconds: u64,
    /// Pid of the container's init, so that no later container of the same name is taken for it.
    init: i32,
}

/// The whole conversation with the program that asked.
pub fn checkpoint(
    agent: &Arc<Agent>,
    request: &CheckpointRequest,
    cancel: &Arc<Cancel>,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) {
    let before = agent.sessions.take(&request.container);
    let mut session = before.unwrap_or_else(|| Session::new(&request.container));
    let id = session.id;
    lock(&agent.running).insert(id, cancel.clone());
    let seen = agent.under_way.begin(id, &request.container, Role::Source, "an image");
    let outcome = attempts(agent, request, &mut session, cancel, clerk, progress);
    if let Outcome::Ended(end) = &outcome
        && let Some(outcome) = end.outcome()
    {
        agent.metrics.image(if request.pre_dump { Operation::PreDump } else { Operation::Checkpoint }, outcome);
    }
    let goes_on = request.pre_dump && matches!(outcome, Outcome::Ended(End::Done(_)));
    if goes_on {
        session.until = Instant::now() + Duration::from_secs(agent.config.deadlines.session);
        if let Err(e) = agent.sessions.keep(session) {
            progress.event(Event::Note { text: format!("this series will not outlive the agent: {}", chain(&e)) });
        }
    }
    lock(&agent.running).remove(&id);
    drop(seen);
    progress.event(match outcome {
        Outcome::Plain => Event::Plain,
        Outcome::Ended(end) => end.into(),
    });
}

fn attempts(
    agent: &Arc<Agent>,
    request: &CheckpointRequest,
    session: &mut Session,
    cancel: &Cancel,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) -> Outcome {
    let world = ByHand::new(agent, clerk.clone());
    let asked = MigrateRequest::plain(&request.container, LOCAL);
    let mut attempts = Attempts::new(&agent.config);
    loop {
        let mut run = Run::new(&world, session.id, &asked, cancel, progress);
        run.record.kind = Kind::Checkpoint;
        run.plan = session.plan.clone();
        run.effects.claimed = session.claimed.clone();
        run.takes_half_open = attempts.take_half_open();
        let ended = run.park(request, session);
        if matches!(ended, Ok(true)) {
            run.undo("nothing of RDMA is in use");
            return Outcome::Plain;
        }
        let end = run.end(ended.map(drop));
        if !attempts.another(&end, session.id, cancel, progress, &agent.under_way) {
            return Outcome::Ended(end);
        }
        // Undone, so nobody is held any more.
        session.claimed.clear();
    }
}

impl Run<'_> {
    /// All phases; true if there is nothing of RDMA in the container.
    fn park(&mut self, request: &CheckpointRequest, session: &mut Session) -> Result<bool, Stop> {
        if self.world.host().container(&request.container).is_err() {
            // Of another root directory than the agent's, or gone: its runtime knows better.
            return Ok(true);
        }
        let mut plain = false;
        self.phase(Phase::Negotiate, |run| {
            plain = run.look_before_disk()?;
            Ok(())
        })?;
        if plain {
            return Ok(true);
        }
        self.lease = match session.lease {
            Some(lease) => lease,
            None => self.world.lease(&request.container).map_err(Stop::Failed)?,
        };
        session.lease = Some(self.lease);
        session.generation += 1;
        fs::create_dir_all(&request.images)
            .map_err(|e| Stop::Failed(format!("cannot make {}: {e}", request.images.display())))?;
        if request.pre_dump {
            self.phase(Phase::PreCopy, |run| run.pre_dump(&request.images, session))?;
            // What was claimed stays so, for the session.
            session.claimed = std::mem::take(&mut self.effects.claimed);
            session.plan = self.plan.clone();
            session.init = Init::of(self.container()?);
            return Ok(false);
        }
        self.phase(Phase::Suspend, Self::suspend)?;
        self.phase(Phase::WaitBeforeStop, Self::drain)?;
        self.phase(Phase::Freeze, Self::freeze)?;
        let left_running = request.leave_running;
        self.phase(Phase::Dump, |run| run.dump_to(&request.images, session, left_running))
            .inspect_err(|_| spoil(&request.images))?;
        if left_running {
            self.phase(Phase::Resume, Self::go_on_here).inspect_err(|_| spoil(&request.images))?;
            return Ok(false);
        }
        self.phase(Phase::Commit, |run| run.leave_for_disk(session)).inspect_err(|_| spoil(&request.images))?;
        self.phase(Phase::Finish, Self::finish_on_disk)?;
        Ok(false)
    }

    /// True if there is nothing of RDMA.
    fn look_before_disk(&mut self) -> Result<bool, Stop> {
        let mut reasons = self.look_around()?;
        if self.states.is_empty() && reasons.is_empty() {
            return Ok(true);
        }
        reasons.extend(self.world.host().tools());
        if reasons.is_empty() { Ok(false) } else { Err(Stop::Refused(reasons)) }
    }

    fn pre_dump(&mut self, images: &Path, session: &Session) -> Result<(), Stop> {
        let container = self.container()?.clone();
        let job = PreDumpJob { images: images.into(), work: images.into(), parent: None };
        self.world.host().pre_dump(&container, &job).map_err(|e| Stop::Failed(e.to_string()))?;
        self.write_image(images, session, Kept::PreDump)?;
        if container.paused {
            // As it was found.
            self.world.host().freeze(&container).map_err(|e| Stop::Failed(e.to_string()))?;
        }
        if self.effects.recorded {
            // There is nothing to undo any more.
            close(self.world, &mut self.record)?;
        }
        Ok(())
    }

    /// Our own image first: the plugin in CRIU reads it.
    fn dump_to(&mut self, images: &Path, session: &Session, left_running: bool) -> Result<(), Stop> {
        self.write_image(images, session, if left_running { Kept::LeftRunning } else { Kept::Whole })?;
        self.hold_dump(DumpJob { images: images.into(), work: images.into(), parent: None })
    }

    fn write_image(&self, images: &Path, session: &Session, kept: Kept) -> Result<(), Stop> {
        let plan = serde_json::to_vec(&self.plan.bare());
        let plan = plan.map_err(|e| Stop::Failed(format!("the plan cannot be written down: {e}")))?;
        let mut image = self.rdma_image();
        image.generation = session.generation;
        image.secret = session.secret;
        image.session = Some(ImagedSession {
            migration: self.id,
            source: own_address(self.world.config().port()),
            whole: kept != Kept::PreDump,
            left_running: kept == Kept::LeftRunning,
            lease: (self.lease.first, self.lease.count),
            plan,
        });
        image::write(images, &image).map_err(|e| Stop::Failed(chain(&e)))?;
        self.show_in(images)
    }

    /// The image is complete, and the container goes on with its peers as if nothing had been.
    fn go_on_here(&mut self) -> Result<(), Stop> {
        if let Some(dump) = self.effects.dump.take() {
            dump.accept().map_err(Stop::Failed)?;
        }
        for left in self.undo("it was left running") {
            self.note(left);
        }
        Ok(())
    }

    /// The point of no return: from the record on the container is the image.
    fn leave_for_disk(&mut self, session: &Session) -> Result<(), Stop> {
        self.record.peers = self.plan.peer_containers();
        let parking = Parking {
            peers: self.plan.peer_containers(),
            generation: session.generation,
            secret: session.secret,
            seconds: self.world.config().deadlines.parked,
            init: self.container()?.init,
        };
        self.decide(&parking)?;
        if let Some(Err(why)) = self.effects.dump.take().map(Dump::accept) {
            self.note(format!("the command, after the decision: {why}"));
            self.kill_what_is_left();
            let container = self.container()?.clone();
            if let Err(e) = self.world.host().forget(&container) {
                self.note(format!("cleaning up here: {e}"));
            }
        }
        Ok(())
    }

    fn finish_on_disk(&mut self) -> Result<(), Stop> {
        let parking: Parking = serde_json::from_value(self.record.plan.clone())
            .map_err(|e| Stop::Failed(format!("the record's plan: {e}")))?;
        let news = stays_shown(&self.request.container, &self.states, self.lease);
        if let Err(why) = self.world.left(&self.request.container, &news) {
            self.note(format!("remembering the container's numbers: {why}"));
        }
        tell_peers(self.world, self.id, &parking).map_err(Stop::Failed)?;
        self.effects.wire = None;
        self.world.let_go(self.id);
        close(self.world, &mut self.record)
    }
}

/// What an image on disk is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// A partial restore.
    PreDump,
    /// The container is in it, and nowhere else.
    Whole,
    /// A copy of a container that went on.
    LeftRunning,
}

fn close(world: &dyn World, record: &mut Record) -> Result<(), Stop> {
    record.state = State::Finished;
    record.plan = serde_json::Value::Null;
    world.records().write(record).map_err(|e| Stop::Failed(chain(&e)))
}

/// An image that was not completed must not look as if it were.
fn spoil(images: &Path) {
    let _ = fs::remove_file(images.join(image::FILE));
}

/// Every peer's agent, at the same time, until it has heard it or its time is over.
fn tell_peers(world: &dyn World, id: MigrationId, parking: &Parking) -> Result<(), String> {
    let deadlines = world.config().deadlines;
    let until = Instant::now() + Duration::from_secs(deadlines.forward);
    let tell = |(at, containers): &(String, Vec<String>)| {
        loop {
            let order = Order::Park {
                containers: containers.clone(),
                generation: parking.generation,
                secret: parking.secret,
                seconds: parking.seconds,
            };
            match world.call(at, id, order, Duration::from_secs(deadlines.answer)) {
                Ok(_) => return None,
                Err(e) if Instant::now() >= until => return Some(chain(&e)),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    };
    let failed: Vec<String> = at_once(&parking.peers, tell).into_iter().flatten().collect();
    if failed.is_empty() {
        Ok(())
    } else {
        Err(format!("peers that do not know that they wait: {}", failed.join("; ")))
    }
}

/// What the container shows to its peers goes on being shown: no other on this host gets these numbers.
fn stays_shown(container: &str, states: &[ProcessState], lease: Lease) -> Vec<MovedProcess> {
    let born = |s: &ProcessState| -> Vec<BornQp> {
        let contexts = s.contexts.iter();
        contexts
            .flat_map(|c| {
                let pgid = PGid(c.gids.first().map_or([0; 16], |g| g.gid.0));
                c.qps.iter().map(move |q| (c.id, q, pgid))
            })
            .map(|(context, q, pgid)| BornQp {
                vpid: Vpid(s.vpid.0),
                context,
                qp: q.id,
                vqpn: q.vqpn,
                pqpn: q.pqpn,
                pgid,
            })
            .collect()
    };
    let plan = Plan { born: states.iter().flat_map(born).collect(), ..Plan::default() };
    plan.moved(container, states, &[], lease, LOCAL, now())
}

/// An address other agents may call this one by.
fn own_address(port: u16) -> String {
    let others = |ip: &std::net::IpAddr| match ip {
        std::net::IpAddr::V4(_) => true,
        std::net::IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    let found = facts::gids().into_iter().map(|g| g.ip()).find(others);
    found.map_or(String::new(), |ip| SocketAddr::new(ip, port).to_string())
}

/// After a restart of the agent: the container is an image, whatever has been done about that.
pub(super) fn finish_parked(agent: &Arc<Agent>, mut record: Record) {
    let Some(id) = record.id() else { return };
    let parking: Parking = match serde_json::from_value(record.plan.clone()) {
        Ok(parking) => parking,
        Err(e) => {
            eprintln!("{id}: its record is damaged: {e}");
            return;
        }
    };
    if let Ok(container) = agent.host.container(&record.container)
        && container.init == parking.init
    {
        let _ = fs::write(container.cgroup.join("cgroup.kill"), "1");
        if let Err(e) = agent.host.forget(&container) {
            eprintln!("{id}: {e}");
        }
    }
    let told = tell_peers(&**agent, id, &parking);
    agent.let_go_of(id);
    match told {
        Ok(()) => {
            if let Err(stop) = close(&**agent, &mut record) {
                eprintln!("{id}: {stop}");
            }
        }
        Err(why) => eprintln!("{id}: {why}; it will be tried again"),
    }
}
