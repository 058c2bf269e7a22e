//! From disk: restores a container with RDMA by command. This host is destination and coordinator at once: it shows the
//! peers that it has their image, makes and connects the objects, has the command restore up to the last gate, and
//! decides. Everything is done by the phases of a migration whose other end is this same agent.
//!
//! A *partial restore* does the first half while the container still runs where the image came from: its objects are
//! made, and connected to the peers' second QPs. It waits for its restore, which only makes the differences, and is
//! dropped by command, with the source's session, or when its time is over.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use rdma_virt::msg::Request;
use rdma_virt::saved::ProcessState;
use serde::{Deserialize, Serialize};

use super::by_hand::{ByHand as Surroundings, Clerk};
use super::dest::{Arrival, Entry};
use super::forward::{Forward, FromImage};
use super::negotiate::offered;
use super::plan::{PeerProcess, Plan};
use super::source::{End, Run, Side, Stop, confused};
use super::store::Store;
use super::world::World;
use super::{Cancel, MigrateRequest, Progress, check, dest};
use crate::agent::admin::Event;
use crate::agent::metrics::{Operation, Outcome};
use crate::agent::under_way::Role;
use crate::agent::{Agent, LOCAL, chain, is_plain_name, lock};
use crate::image::{self, HandOver, RdmaImage, Secret};
use crate::net::msg::{Answer, Fate, Lease, Offer, Order};
use crate::phase::Phase;
use crate::record::Kind;

/// A source of a partial restore is asked this often whether there will be a checkpoint.
const ASK: Duration = Duration::from_secs(20);

/// What an administrator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    pub container: String,
    /// Both absolute.
    pub images: PathBuf,
    pub bundle: PathBuf,
    /// Without its peers, whether or not they wait: connections that lead out of the container are broken.
    #[serde(default)]
    pub disconnected: bool,
}

/// How a container that comes from files differs from one that another host sends.
pub(super) enum ByHand {
    /// Its objects are made; there is nothing to restore yet.
    Partial { plan: Plan, until: Instant },
    /// The command restores it.
    Restore(Arc<dyn Clerk>),
    /// The command has restored it, and spoke to an agent before this one.
    TakenUp,
}

impl Arrival {
    /// Until when the partial restore waits, if it is one.
    pub fn partial(&self) -> Option<(&Plan, Instant)> {
        match &self.by_hand {
            Some(ByHand::Partial { plan, until }) => Some((plan, *until)),
            _ => None,
        }
    }
}

/// An image that can be worked with.
pub(super) struct Found {
    id: MigrationId,
    /// As the container's shims know it.
    series: MigrationId,
    /// Addresses of agents that learn where the container is: of the host it came from, and of others that looked for
    /// it elsewhere.
    origins: Vec<String>,
    /// Of the host it was made on.
    host: String,
    generation: u64,
    secret: Secret,
    whole: bool,
    /// Nobody waits for it.
    alone: bool,
    /// The container was paused, and will be.
    paused: bool,
    lease: Lease,
    plan: Plan,
    states: Vec<ProcessState>,
    hand_over: HandOver,
}

impl Found {
    /// The image of a migration that had committed, which its source has kept: the record knows what the session of an
    /// image on disk would say.
    pub fn kept(
        images: &Path,
        id: MigrationId,
        forward: Forward,
        origins: Vec<String>,
        host: &str,
    ) -> Result<Found, String> {
        let image = image::read(images).map_err(|e| format!("{}: {}", images.display(), chain(&e)))?;
        // Without one nothing of RDMA was in use.
        let states = image.map_or(Vec::new(), |i| i.processes.into_iter().map(|p| p.state).collect());
        Found {
            id,
            series: id,
            origins,
            host: host.into(),
            generation: 0,
            secret: Secret([0; 32]),
            whole: true,
            alone: false,
            paused: forward.container.is_some_and(|c| c.paused),
            lease: forward.lease,
            plan: forward.plan.bare(),
            states,
            hand_over: forward.hand_over,
        }
        .alone(images)
    }

    /// The same without whoever is connected to it.
    fn alone(mut self, images: &Path) -> Result<Found, String> {
        if self.hand_over == HandOver::Rebuild && !self.states.is_empty() {
            let images = images.display();
            return Err(format!("{images}: without its peers only what was made by an incubator can be restored"));
        }
        self.plan.sever(self.states.iter_mut());
        // Whatever else was, or will be, made of this image is another matter.
        (self.alone, self.id) = (true, MigrationId(super::forward::random()));
        Ok(self)
    }

    /// Names of the files that hold its registered memory.
    pub fn memory_files(&self) -> BTreeSet<String> {
        self.states.iter().flat_map(|s| &s.memory).map(|m| m.file.clone()).collect()
    }

    /// Everything that speaks against it here.
    pub fn problems(&self, agent: &Agent, request: &RestoreRequest) -> Vec<String> {
        check::problems(agent, &offer(request, self), false)
    }
}

fn look(agent: &Agent, request: &RestoreRequest) -> Result<Found, String> {
    let images = request.images.display();
    if !is_plain_name(&request.container) {
        return Err(format!("{:?} is no container id", request.container));
    }
    let mut image: RdmaImage = image::read(&request.images)
        .map_err(|e| format!("{images}: {}", chain(&e)))?
        .ok_or_else(|| format!("{images} holds no RDMA image ({} is missing)", image::FILE))?;
    let session = image.session.take().ok_or_else(|| {
        format!("{images} is the image of a migration, which only its source can go on with; take a checkpoint")
    })?;
    let mut plan: Plan =
        serde_json::from_slice(&session.plan).map_err(|e| format!("{} of {images}: its plan: {e}", image::FILE))?;
    plan = plan.bare();
    plan.relocate(|gid| agent.agent_of(gid));
    let (first, count) = session.lease;
    let found = Found {
        id: session.migration,
        series: session.migration,
        origins: Some(session.source).filter(|at| !at.is_empty()).into_iter().collect(),
        host: image.host,
        generation: image.generation,
        secret: image.secret,
        whole: session.whole,
        alone: false,
        paused: false,
        lease: Lease { first, count },
        plan,
        states: image.processes.into_iter().map(|p| p.state).collect(),
        hand_over: image.hand_over,
    };
    if session.left_running || request.disconnected { found.alone(&request.images) } else { Ok(found) }
}

/// As the destination of a migration is asked.
fn offer(request: &RestoreRequest, found: &Found) -> Offer {
    Offer {
        container: request.container.clone(),
        bundle: request.bundle.clone(),
        from: found.host.clone(),
        from_port: 0,
        criu: 0,
        cpu_flags: Vec::new(),
        processes: found.states.iter().map(offered).collect(),
        image_bytes: 0,
        paused: found.paused,
        lease: found.lease,
        hand_over: found.hand_over,
        copy: None,
    }
}

/// A partial restore that waits for this container.
fn waiting(agent: &Agent, container: &str) -> Option<(MigrationId, Entry)> {
    let desk = lock(&agent.desk.0);
    let (id, entry) = desk.iter().find(|(_, e)| e.container == container)?;
    Some((*id, entry.clone()))
}

/// Puts a container on the list of those that arrive, if nothing speaks against it.
fn admit(agent: &Agent, request: &RestoreRequest, found: &Found, by_hand: ByHand, source: &str) -> Result<(), Stop> {
    let offer = offer(request, found);
    let problems = found.problems(agent, request);
    if !problems.is_empty() {
        return Err(Stop::Refused(problems));
    }
    let mut arrival = Arrival::new(source.into(), offer);
    if matches!(by_hand, ByHand::Restore(_)) {
        arrival.state = dest::State::Gathering { nursery: None, store: Some(store(agent, request, found)?) };
    }
    arrival.by_hand = Some(by_hand);
    lock(&agent.desk.0).insert(found.id, Entry::new(arrival));
    Ok(())
}

fn store(agent: &Agent, request: &RestoreRequest, found: &Found) -> Result<Store, Stop> {
    let dir = Store::place(&agent.config.state_dir, found.id);
    Store::given(request.images.clone(), dir).map_err(|e| Stop::Failed(chain(&e)))
}

/// `restore --partial`, from beginning to end.
pub fn partial(agent: &Arc<Agent>, request: &RestoreRequest, cancel: &Arc<Cancel>, progress: &dyn Progress) {
    let ended = try_partial(agent, request, cancel, progress);
    let outcome = if ended.is_ok() { Outcome::Finished } else { Outcome::Refused };
    agent.metrics.image(Operation::PartialRestore, outcome);
    progress.event(match ended {
        Ok(summary) => Event::Done { summary },
        Err(Stop::Refused(reasons)) => Event::Refused { reasons },
        Err(stop) => Event::Refused { reasons: vec![stop.to_string()] },
    });
}

fn try_partial(
    agent: &Arc<Agent>,
    request: &RestoreRequest,
    cancel: &Cancel,
    progress: &dyn Progress,
) -> Result<crate::timeline::Summary, Stop> {
    let refuse = |why: String| Stop::Refused(vec![why]);
    let found = look(agent, request).map_err(refuse)?;
    let name = &request.container;
    if waiting(agent, name).is_some() {
        return Err(refuse(format!(
            "container {name} has a partial restore here already, or is on its way; `migrrdma delete {name}` drops it"
        )));
    }
    if lock(&agent.desk.0).contains_key(&found.id) {
        return Err(refuse("another container is restored from this image here already".into()));
    }
    let until = Instant::now() + Duration::from_secs(agent.config.deadlines.session);
    let by_hand = ByHand::Partial { plan: found.plan.clone(), until };
    let origin = found.origins.first().map_or("", String::as_str);
    admit(agent, request, &found, by_hand, origin)?;
    let asked = MigrateRequest::plain(name, LOCAL);
    let _seen = agent.under_way.begin(found.id, name, Role::Destination, "an image");
    let mut run = Run::new(&**agent, found.id, &asked, cancel, progress);
    take_over(&mut run, &found);
    let made = run.phase(Phase::PreSetup, |run| {
        run.leave_out_departed()?;
        run.make_with_those_left()
    });
    let plan = run.plan.clone();
    let entry = lock(&agent.desk.0).get(&found.id).cloned();
    if let Some(entry) = &entry {
        lock(&entry.arrival).by_hand = Some(ByHand::Partial { plan, until });
    }
    match made.and_then(|()| run.wanted()) {
        Ok(()) => Ok(run.summary()),
        Err(stop) => {
            drop_one(agent, found.id);
            Err(stop)
        }
    }
}

/// What the image says, in the place of what processes say.
fn take_over(run: &mut Run<'_>, found: &Found) {
    run.plan = found.plan.clone();
    run.states.clone_from(&found.states);
    run.hand_over = found.hand_over;
    run.lease = found.lease;
}

/// Drops the partial restore of a container; false if there is none.
pub fn drop_partial(agent: &Agent, container: &str) -> bool {
    let Some((id, entry)) = waiting(agent, container) else { return false };
    if lock(&entry.arrival).partial().is_none() {
        return false;
    }
    drop_one(agent, id);
    true
}

/// Its objects here, and the second QPs made for it.
fn drop_one(agent: &Agent, id: MigrationId) {
    let Some(entry) = lock(&agent.desk.0).get(&id).cloned() else { return };
    let peers: Vec<PeerProcess> =
        lock(&entry.arrival).partial().map(|(plan, _)| plan.peers().into_keys().collect()).unwrap_or_default();
    for peer in peers {
        let order = Order::Relay { container: peer.container, vpid: peer.vpid, request: Request::Unprepare };
        // One that cannot be told drops them with its session.
        if let Err(e) = agent.call(&peer.agent, Some(id), order, Duration::from_secs(agent.config.deadlines.answer)) {
            eprintln!("{id}: {}", chain(&e));
        }
    }
    if let Err(e) = dest::obey(agent, None, id, Order::Abandon) {
        eprintln!("{id}: {e}");
    }
}

/// Ends partial restores whose time is over or whose source will not finish them.
pub(super) fn look_after(agent: &Agent, id: MigrationId, entry: &Entry) {
    let (source, over, quiet) = {
        let arrival = lock(&entry.arrival);
        let Some((_, until)) = arrival.partial() else { return };
        (arrival.source.clone(), until <= Instant::now(), arrival.heard.elapsed() > ASK)
    };
    let why = if over {
        "nobody restored it in time"
    } else if quiet && !source.is_empty() {
        let fate = agent.call(&source, Some(id), Order::Fate, Duration::from_secs(10));
        lock(&entry.arrival).heard = Instant::now();
        match fate {
            Ok(Answer::Fate(Fate::Aborted)) => "its source has given the checkpoint up",
            // A source that is silent may have been switched off after its checkpoint.
            _ => return,
        }
    } else {
        return;
    };
    eprintln!("the partial restore of container {} is dropped: {why}", entry.container);
    drop_one(agent, id);
}

/// The whole conversation with the program that restores.
pub fn restore(
    agent: &Arc<Agent>,
    request: &RestoreRequest,
    cancel: &Arc<Cancel>,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) {
    let end = match look(agent, request) {
        Ok(found) => conduct(agent, request, &found, cancel, clerk, progress),
        Err(why) => End::Refused(vec![why]),
    };
    progress.event(end.into());
}

/// All of it but for how it ended, which whoever asked is still to be told.
pub(super) fn conduct(
    agent: &Arc<Agent>,
    request: &RestoreRequest,
    found: &Found,
    cancel: &Arc<Cancel>,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) -> End {
    let id = found.id;
    let free = match lock(&agent.running).entry(id) {
        std::collections::hash_map::Entry::Vacant(free) => {
            free.insert(cancel.clone());
            true
        }
        std::collections::hash_map::Entry::Occupied(_) => false,
    };
    let end = if free {
        let seen = agent.under_way.begin(id, &request.container, Role::Destination, "an image");
        if found.alone {
            agent.shims.known_as.insert(id, found.series);
            agent.forget_undone(&request.container);
        }
        let end = try_restore(agent, request, found, cancel, clerk, progress);
        drop(seen);
        agent.shims.known_as.remove(id);
        lock(&agent.running).remove(&id);
        end
    } else {
        End::Refused(vec!["a checkpoint or restore of this image is under way on this host".into()])
    };
    if let Some(outcome) = end.outcome() {
        agent.metrics.image(Operation::Restore, outcome);
    }
    end
}

fn try_restore(
    agent: &Arc<Agent>,
    request: &RestoreRequest,
    found: &Found,
    cancel: &Cancel,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) -> End {
    let mut world = Surroundings::new(agent, clerk.clone());
    let elsewhere = |at: &&String| agent.client.normalise(at).is_ok() && World::destination(&**agent, at).is_ok();
    world.origins = found.origins.iter().filter(elsewhere).cloned().collect();
    let (asked, origins) = (MigrateRequest::plain(&request.container, LOCAL), world.origins.clone());
    let mut run = Run::new(&world, found.id, &asked, cancel, progress);
    run.record.kind = Kind::Restore;
    take_over(&mut run, found);
    let ended = run.read_image(agent, request, found, clerk, origins);
    run.end(ended)
}

impl Run<'_> {
    fn read_image(
        &mut self,
        agent: &Agent,
        request: &RestoreRequest,
        found: &Found,
        clerk: &Arc<dyn Clerk>,
        origins: Vec<String>,
    ) -> Result<(), Stop> {
        self.phase(Phase::Negotiate, |run| run.may_come(agent, request, found, clerk))?;
        self.phase(Phase::PreSetup, |run| {
            run.write_record()?;
            // Without RDMA in use there is nothing to make.
            if run.states.is_empty() { Ok(()) } else { run.make_with_those_left() }
        })?;
        self.phase(Phase::Restore, Self::restore)?;
        self.phase(Phase::Commit, |run| run.stay_here(found.series, origins))?;
        self.phase(Phase::Switch, Self::switch)?;
        self.phase(Phase::Resume, Self::resume)?;
        self.phase(Phase::Finish, Self::finish)
    }

    /// Nothing here speaks against it, and every peer believes that this is the image it waits for.
    fn may_come(
        &mut self,
        agent: &Agent,
        request: &RestoreRequest,
        found: &Found,
        clerk: &Arc<dyn Clerk>,
    ) -> Result<(), Stop> {
        let name = &request.container;
        let refuse = |why: String| Err(Stop::Refused(vec![why]));
        if !found.whole {
            return refuse(format!(
                "{} was made by a pre-dump: its container went on; use it for a partial restore, and restore the \
                 checkpoint that follows",
                request.images.display()
            ));
        }
        match waiting(agent, name) {
            None => {}
            Some((id, _)) if id != found.id => {
                return refuse(format!(
                    "the partial restore of {name} here belongs to another series of images than {}; \
                     `migrrdma delete {name}` drops it",
                    request.images.display()
                ));
            }
            Some((_, entry)) if lock(&entry.arrival).partial().is_none() => {
                return refuse(format!("container {name} is being restored already"));
            }
            Some(_) => {}
        }
        self.world.hold(self.id, name).map_err(|by| {
            let text = format!("container {name} takes part in {by} already");
            Stop::Busy { by, text }
        })?;
        self.effects.held = true;
        if !found.alone {
            self.unpark(found)?;
            self.leave_out_departed()?;
        }
        let prepared = waiting(agent, name);
        // From here on there is something to abandon.
        self.effects.offered = true;
        match prepared {
            None => {
                self.drop_second_qps();
                admit(agent, request, found, ByHand::Restore(clerk.clone()), LOCAL)
            }
            Some((_, entry)) => {
                let mut arrival = lock(&entry.arrival);
                let state = std::mem::replace(&mut arrival.state, dest::State::Gone);
                let dest::State::Gathering { nursery, .. } = state else {
                    return Err(Stop::Failed("the partial restore has ended meanwhile; try again".into()));
                };
                let (fresh, store) = (offer(request, found), Some(store(agent, request, found)?));
                *arrival = Arrival::new(LOCAL.into(), fresh);
                arrival.by_hand = Some(ByHand::Restore(clerk.clone()));
                arrival.state = dest::State::Gathering { nursery, store };
                drop(arrival);
                self.note("the partial restore made before is used");
                Ok(())
            }
        }
    }

    /// Nothing was prepared here: second QPs that the peers may have made lead to a partial restore that was elsewhere, or
    /// ended with its agent.
    fn drop_second_qps(&self) {
        let asks = self.plan.peers().into_keys().map(|peer| (Side::Peer(peer), Request::Unprepare)).collect();
        for (side, reply) in self.ask_all(asks, self.answer_time()) {
            if let Err(stop) = reply {
                self.note(format!("{side} was not told to drop its second QPs: {stop}"));
            }
        }
    }

    fn unpark(&mut self, found: &Found) -> Result<(), Stop> {
        let port = self.world.config().port();
        for (at, containers) in self.plan.peer_containers() {
            let (generation, secret) = (found.generation, found.secret);
            let order = Order::Unpark { containers, port, generation, secret };
            match self.world.call(&at, self.id, order, self.answer_time()) {
                Ok(Answer::Done) => {}
                Ok(_) => return Err(confused(&at, "unpark")),
                Err(e) => return Err(Stop::Refused(vec![chain(&e)])),
            }
            // Only one that has agreed may be told that it was for nothing.
            self.effects.claimed.insert(at);
        }
        Ok(())
    }

    /// The point of no return: from the record on the container is here.
    fn stay_here(&mut self, series: MigrationId, origins: Vec<String>) -> Result<(), Stop> {
        let forward = Forward {
            plan: self.plan.clone(),
            states: self.states.clone(),
            lease: self.lease,
            hand_over: self.hand_over,
            container: None,
            image: Some(FromImage { series, origins }),
        };
        self.decide(&forward)?;
        self.tell_destination(|| (), || ())?;
        self.timeline.released(Instant::now());
        Ok(())
    }
}
