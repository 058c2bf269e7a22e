//! What a destination does with each order that fits its state. Which one fits, and what state comes of it, is the business
//! of [`super::dest`].

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use rdma_virt::id::MigrationId;
use rdma_virt::saved::ProcessState;

use super::born::{born, gids, mrs};
use super::dest::{Arrival, State, failed};
use super::host::{Held, Nursery, RestoreJob, Wire};
use super::landing::Landing;
use super::memory::Memory;
use super::newcomers::{adopt, alive};
use super::prepared::{self, Note};
use super::revive::ByHand;
use super::store::{Store, StoreError};
use super::take_over;
use crate::agent::{Agent, chain, is_plain_name};
use crate::image::HandOver;
use crate::net::msg::{Answer, Offer, Order, Refusal};

/// Name of the incubator's socket in the container's directory; the plugin knows it.
const INCUBATOR: &str = "incubator.sock";

impl Arrival {
    /// The bundle, before anything needs it.
    pub(super) fn land(&mut self, agent: &Agent, id: MigrationId, order: Order) -> Result<Answer, String> {
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
    pub(super) fn remember(&mut self, agent: &Agent, files: Order) -> Result<Answer, String> {
        let begin = || {
            let dir = agent.host.make_memory_files(&self.offer.container).map_err(|e| e.to_string())?;
            Memory::begin(dir, self.offer.image_bytes).map_err(|e| chain(&e))
        };
        self.memory.announce(files, begin).map(|()| Answer::Done)
    }

    /// The container's directory is made by its runtime when it restores; the incubator needs it earlier.
    fn nursery(&self, agent: &Agent) -> Result<Box<dyn Nursery>, Refusal> {
        let Offer { container, bundle, .. } = &self.offer;
        let dir = agent.doors.of(container);
        let mark = mark(agent, container);
        fs::write(&mark, "").map_err(|e| failed(format!("cannot write {}: {e}", mark.display())))?;
        fs::create_dir_all(&dir).map_err(|e| failed(format!("cannot make {}: {e}", dir.display())))?;
        agent.host.incubate(container, bundle, &dir.join(INCUBATOR)).map_err(|e| failed(format!("the incubator: {e}")))
    }

    pub(super) fn incubate(
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
        Ok(Answer::Incubated { qps, gids, mrs: mrs(&made) })
    }

    pub(super) fn receive(
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

    pub(super) fn restore(
        &mut self,
        agent: &Agent,
        mut nursery: Option<Box<dyn Nursery>>,
        store: Store,
        files: u32,
        onward: &[u8],
    ) -> (State, Result<Answer, Refusal>) {
        let restored =
            take_over::keep(store.dir(), onward).and_then(|()| self.try_restore(agent, &mut nursery, &store, files));
        match restored {
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

    pub(super) fn commit(
        &mut self,
        agent: &Agent,
        id: MigrationId,
        nursery: Option<Box<dyn Nursery>>,
        store: Store,
        mut held: Box<dyn Held>,
        mut wire: Option<Box<dyn Wire>>,
    ) -> (State, Result<Answer, Refusal>) {
        let container = self.offer.container.clone();
        self.memory.close();
        let mut run = || -> Result<(), String> {
            if let Some(wire) = &mut wire {
                wire.up().map_err(|e| format!("the container's network: {e}"))?;
            }
            agent.doors.bump(&container).map_err(|e| format!("the container's directory: {e}"))?;
            match store.somebody_elses() {
                // That is flushed.
                Some(_) => self.write_down(&store, held.init(), Note::decided)?,
                None => prepared::mark_decided(store.dir())?,
            }
            held.release().map_err(|e| format!("letting the tasks run: {e}"))
        };
        if let Err(why) = run() {
            return (State::Prepared { nursery, store, held, wire }, Err(failed(why)));
        }
        if let Some(landing) = self.landing.take() {
            landing.keep();
        }
        agent.take_over(id, &container, &self.source);
        if let Some(wire) = wire {
            announce(container, wire);
        }
        (State::Running { nursery, store, held, keys: None }, Ok(Answer::Done))
    }

    pub(super) fn adopt(
        &mut self,
        agent: &Agent,
        id: MigrationId,
        nursery: Option<Box<dyn Nursery>>,
        store: Store,
        held: Box<dyn Held>,
    ) -> (State, Result<Answer, Refusal>) {
        let container = self.offer.container.clone();
        let there = alive(agent, &container, held.init(), self.adopted.clone(), |a| a.vpid);
        // An agent that has to answer this again asks the shims again: they answer the same.
        match adopt(agent, id, &container, there) {
            Ok(keys) => {
                // The incubator ends with the migration: that takes time, and everybody waits for this answer.
                let answer = Answer::Adopted { keys: keys.clone() };
                (State::Running { nursery, store, held, keys: Some(keys) }, Ok(answer))
            }
            Err(why) => (State::Running { nursery, store, held, keys: None }, Err(failed(why))),
        }
    }

    pub(super) fn finish(&mut self, agent: &Agent, id: MigrationId, nursery: Option<Box<dyn Nursery>>, store: Store) {
        let container = &self.offer.container;
        if let Some(Err(e)) = nursery.map(|nursery| nursery.release()) {
            eprintln!("container {container}: the incubator's end: {e}");
        }
        let _ = fs::remove_file(agent.doors.of(container).join(INCUBATOR));
        unmark(agent, container);
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
        if nursed {
            if agent.host.container(container).is_err() {
                remove_dir(agent.doors.of(container));
            }
            unmark(agent, container);
        }
        let nobody = agent.host.container(container).is_err();
        if self.memory.close() && nobody {
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

/// Tells the neighbours, while the migration goes on. They find out by themselves otherwise, a little later.
fn announce(container: String, mut wire: Box<dyn Wire>) {
    let run = move || {
        if let Err(e) = wire.announce() {
            eprintln!("container {container}: announcing its address: {e}");
        }
    };
    if let Err(e) = thread::Builder::new().name("announce".into()).spawn(run) {
        eprintln!("no thread to announce an address: {e}");
    }
}

const MARK: &str = "incubates-";

/// Says that a container's directory was made for an incubator, should the agent end before there is a container.
pub(super) fn mark(agent: &Agent, container: &str) -> PathBuf {
    agent.config.run_dir.join(format!("{MARK}{container}"))
}

/// There is one, or none is to come.
pub(super) fn unmark(agent: &Agent, container: &str) {
    let _ = fs::remove_file(mark(agent, container));
}

/// Removes directories of containers that never came: the agent that made them has ended.
pub(super) fn remove_unused(agent: &Agent) {
    for entry in fs::read_dir(&agent.config.run_dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(container) = name.to_str().and_then(|name| name.strip_prefix(MARK)) else { continue };
        if is_plain_name(container) && agent.host.container(container).is_err() {
            remove_dir(agent.doors.of(container));
        }
        let _ = fs::remove_file(entry.path());
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
