//! Commit, and everything after it: only forward. Each step may be repeated, and is, until it succeeds or the time for
//! it is over; a peer that ended meanwhile is passed over, as if its host had died.

use std::fs::{self, File};
use std::io::Read;
use std::ops::Deref;
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, Vpid};
use rdma_virt::msg::{KeyTable, Reply, Request};
use rdma_virt::saved::ProcessState;
use serde::{Deserialize, Serialize};

use super::host::Container;
use super::plan::Plan;
use super::source::{Run, Stop, confused};
use crate::agent::{LOCAL, chain, procs};
use crate::image::HandOver;
use crate::net::msg::{Answer, Lease, MovedProcess, Order, VERSION};
use crate::record::{Ready, Record, State, now};

/// Between two tries of one step.
const PAUSE: Duration = Duration::from_millis(500);

/// What has to be known to go on after the source's agent was restarted: the record's plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Forward {
    pub plan: Plan,
    pub states: Vec<ProcessState>,
    pub lease: Lease,
    #[serde(default)]
    pub hand_over: HandOver,
    /// What ends here; `None` where nothing does.
    #[serde(default)]
    pub container: Option<Container>,
    /// Of a container that comes from files.
    #[serde(default)]
    pub image: Option<FromImage>,
}

impl Forward {
    /// As it goes to the destination: a tenth of what JSON takes, for it goes inside the pause.
    pub fn to_bytes(&self) -> Result<Vec<u8>, String> {
        postcard::to_stdvec(&(VERSION, self)).map_err(|e| format!("the plan cannot be written down: {e}"))
    }

    /// Of the same version only: an agent that was updated in between says so instead of misreading it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        match postcard::take_from_bytes::<u16>(bytes) {
            Ok((VERSION, rest)) => match postcard::take_from_bytes(rest) {
                Ok((forward, [])) => Ok(forward),
                Ok((_, rest)) => Err(format!("{} bytes follow it", rest.len())),
                Err(e) => Err(format!("it cannot be read: {e}")),
            },
            Ok((theirs, _)) => Err(format!("it is of version {theirs} of the protocol, this program of {VERSION}")),
            Err(e) => Err(format!("it cannot be read: {e}")),
        }
    }
}

/// What a restore by command knows of its image beside the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct FromImage {
    /// What the container's shims know the restore as.
    pub series: MigrationId,
    /// Addresses of agents that can be told where the container is: of the host it came from, and of others that looked
    /// for it elsewhere.
    pub origins: Vec<String>,
}

/// 16 random bytes.
pub fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    // A kernel without it could not run containers either; the pid and the clock still tell two apart.
    if File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes)).is_err() {
        let nanos = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_nanos());
        bytes = (nanos ^ (u128::from(std::process::id()) << 96)).to_le_bytes();
    }
    bytes
}

/// A random number.
pub fn random_u32() -> u32 {
    let r = random();
    u32::from_le_bytes([r[0], r[1], r[2], r[3]])
}

/// The tasks that a container had here when it left.
pub(super) fn kill_what_is_left(container: &Container) {
    // A new container may have the name, and the cgroup, of one that moved long ago.
    if procs::in_cgroup(container.init, &container.cgroup) {
        // The cgroup may be gone with its last task.
        let _ = fs::write(container.cgroup.join("cgroup.kill"), "1");
    }
}

impl Run<'_> {
    /// What whoever goes on from the decision needs, on any host.
    pub(super) fn onward(&self) -> Forward {
        Forward {
            plan: self.plan.clone(),
            states: self.states.clone(),
            lease: self.lease,
            hand_over: self.hand_over,
            container: None,
            image: None,
        }
    }

    /// What this host needs for it.
    pub(super) fn decision(&self) -> Forward {
        Forward { container: self.container.clone(), ..self.onward() }
    }

    /// The point of no return: a record on disk. Then the tasks here end, and the destination lets its own run.
    pub(super) fn commit(&mut self) -> Result<(), Stop> {
        self.world.host().gone_to(&self.request.container, Some(&self.to));
        self.effects.dumped = true;
        match self.ready.take() {
            Some(ready) => self.put(ready)?,
            None => self.decide(&self.decision())?,
        }

        // Where every MR has its keys already, peers need not wait for the shims of the moved processes.
        let early = match self.hand_over {
            HandOver::Adopt if !self.states.is_empty() => self.plan.keys(&self.states),
            _ => None,
        };
        let dump = self.effects.dump.take();
        let accept = move || dump.map_or(Ok(()), super::handover::Dump::accept);
        // The container stands still until the destination hears of it: everything else begins behind that.
        let (told, released, ending) = thread::scope(|scope| {
            let mut ending = None;
            let change_over = || {
                if let Some(keys) = &early {
                    scope.spawn(|| self.change_over(keys));
                }
            };
            // Our tasks stand still in their cgroup and end there. That is work, all of the kernel's objects go with them,
            // and nobody waits for it.
            let end = || ending = thread::Builder::new().name("end".into()).spawn(accept).ok();
            let told = self.tell_destination(change_over, end);
            (told, Instant::now(), ending)
        });
        self.effects.ending = ending;
        if self.effects.ending.is_none() {
            // Without its thread CRIU was refused, and let go of tasks that only their cgroup holds.
            self.kill_what_is_left();
        }
        self.changed_over = early;
        told?;
        self.timeline.released(released);
        Ok(())
    }

    /// The tasks here have ended.
    fn ended_here(&mut self) {
        match self.effects.ending.take().map(std::thread::JoinHandle::join) {
            Some(Ok(Err(why))) => self.note(format!("CRIU, after the decision: {why}")),
            Some(Ok(Ok(()))) => {}
            // Its thread could not be started, or an agent that died since had it.
            Some(Err(_)) | None => {}
        }
        self.kill_what_is_left();
    }

    /// Writes the record that decides, with what has to be known to go on from it.
    pub(super) fn decide(&mut self, plan: &impl Serialize) -> Result<(), Stop> {
        let ready = self.make_ready(plan)?;
        self.put(ready)
    }

    /// The record that will decide, on disk but for its last step.
    pub(super) fn make_ready(&self, plan: &impl Serialize) -> Result<Ready, Stop> {
        let plan =
            serde_json::to_value(plan).map_err(|e| Stop::Failed(format!("the plan cannot be written down: {e}")))?;
        let peers = self.plan.peer_containers();
        let record = Record { plan, peers, state: State::Committed, ..self.record.clone() };
        self.world.records().make_ready(record).map_err(|e| Stop::Failed(chain(&e)))
    }

    /// Decides.
    fn put(&mut self, ready: Ready) -> Result<(), Stop> {
        self.cancel.seal().map_err(Stop::Failed)?;
        self.record = match ready.put() {
            Ok(record) => record,
            // Did it reach the disk or not? What a reader finds decides, here as everywhere.
            Err(e) => match self.world.records().read(self.id).ok().flatten() {
                Some(found) if found.state == State::Committed => found,
                _ => return Err(Stop::Failed(chain(&e))),
            },
        };
        self.effects.committed = true;
        Ok(())
    }

    /// `behind` is run once: when the order is on its way, or could not be sent the first time. So is `then`: when it was
    /// answered, or was not the first time.
    pub(super) fn tell_destination(&self, behind: impl FnOnce(), then: impl FnOnce()) -> Result<(), Stop> {
        let (mut behind, mut then) = (Some(behind), Some(then));
        let mut begin = || behind.take().into_iter().for_each(|behind| behind());
        Self::again(self, "letting the tasks run on the destination", |run| {
            let deadline = run.answer_time() * 2;
            let told = run.world.call_and_meanwhile(&run.to, run.id, Order::Commit, deadline, &mut begin);
            begin();
            then.take().into_iter().for_each(|then| then());
            told.map(drop).map_err(Stop::from)
        })
    }

    /// Whatever became of CRIU: nothing of the container may ever run here again.
    pub(super) fn kill_what_is_left(&self) {
        self.container.iter().for_each(kill_what_is_left);
    }

    /// The moved processes take their new objects; peers change over; everybody who resolves learns the new place.
    pub(super) fn switch(&mut self) -> Result<(), Stop> {
        if self.states.is_empty() {
            return Ok(());
        }
        let early = self.changed_over.take();
        let keys = match self.hand_over {
            HandOver::Adopt => thread::scope(|scope| {
                if let Some(keys) = &early {
                    scope.spawn(|| self.tell(vec![self.to.clone()], &self.news(keys)));
                }
                self.adopt()
            })?,
            HandOver::Rebuild => self.rebuild()?,
        };
        let name = &self.request.container;
        let inside = self.plan.switches(&keys).inside;
        let inside = inside.into_iter().map(|(vpid, r)| (self.to.clone(), name.clone(), vpid, r)).collect();
        let known = early.is_some_and(|early| keys.iter().all(|one| early.contains(one)));
        // All come before the barrier, and none needs another.
        thread::scope(|scope| {
            if !known {
                scope.spawn(|| self.change_over(&keys));
                scope.spawn(|| self.tell(vec![self.to.clone()], &self.news(&keys)));
            }
            self.all_forward("switch", inside);
        });
        Ok(())
    }

    /// Peers use their second QPs, and all hosts but the destination know where the container is.
    fn change_over(&self, keys: &[(Vpid, KeyTable)]) {
        let peers = self.plan.switches(keys).peers;
        let peers = peers.into_iter().map(|(p, r)| (p.agent, p.container, p.vpid, r)).collect();
        let news = self.news(keys);
        let mut agents: Vec<String> = self.plan.peer_containers().into_iter().map(|(agent, _)| agent).collect();
        agents.retain(|a| *a != LOCAL && *a != self.to);
        thread::scope(|scope| {
            scope.spawn(|| {
                if let Err(why) = self.world.left(&self.request.container, &news) {
                    self.note(format!("remembering where the container went: {why}"));
                }
            });
            scope.spawn(|| self.tell(agents, &news));
            self.all_forward("switch", peers);
        });
    }

    /// The new location, for tables of agents.
    fn news(&self, keys: &[(Vpid, KeyTable)]) -> Vec<MovedProcess> {
        self.plan.moved(&self.request.container, &self.states, keys, self.lease, &self.to, now())
    }

    /// One that misses it asks its way through.
    fn tell(&self, agents: Vec<String>, news: &[MovedProcess]) {
        let tell = |at: &String| self.world.call(at, self.id, Order::Moved(news.to_vec()), self.answer_time()).err();
        for e in self.fan_out(agents, tell).into_iter().filter_map(|(_, e)| e) {
            self.note(format!("an agent did not learn the new place: {}", chain(&e)));
        }
    }

    fn adopt(&self) -> Result<Vec<(Vpid, KeyTable)>, Stop> {
        let adopt = Duration::from_secs(self.world.config().deadlines.reconnect) + self.answer_time() * 2;
        let mut keys: Vec<(Vpid, KeyTable)> = Vec::new();
        Self::again(self, "handing the new objects to the moved processes", |run| {
            match run.ask_destination(Order::Adopt, adopt)? {
                Answer::Adopted { keys: got } => keys = got,
                _ => return Err(confused("the destination", "adopt")),
            }
            Ok(())
        })?;
        Ok(keys)
    }

    /// Held sends go out everywhere. Only now, when every end has its receives posted.
    pub(super) fn resume(&mut self) -> Result<(), Stop> {
        let name = self.request.container.clone();
        let own = self.states.iter().map(|s| (self.to.clone(), name.clone(), s.vpid, Request::Resume));
        let peers = self.plan.peers().into_keys().map(|p| (p.agent, p.container, p.vpid, Request::Resume));
        let all = own.chain(peers).collect();
        self.all_forward("resume", all);
        Ok(())
    }

    /// One request to many shims; each is repeated until it succeeds, the shim has ended, or the time is over. Nothing
    /// that fails here stops the others.
    pub(super) fn all_forward(&self, what: &str, asks: Vec<(String, String, Vpid, Request)>) {
        let until = self.until();
        let ask = |(agent, container, vpid, request): &(String, String, Vpid, Request)| {
            loop {
                let why = match self.relay(agent, container, *vpid, request.clone(), self.answer_time()) {
                    Ok(Reply::Done | Reply::GoesOn { .. }) => return None,
                    Ok(_) => "it answered with something else".to_owned(),
                    Err(Stop::Absent(why)) => return Some(why),
                    Err(stop) => stop.to_string(),
                };
                if Instant::now() >= until || self.cancel.is_given_up() {
                    return Some(why);
                }
                thread::sleep(PAUSE);
            }
        };
        for ((agent, container, vpid, _), why) in self.fan_out(asks, ask) {
            if let Some(why) = why {
                let who = format!("pid {} of container {container} at {agent}", vpid.0);
                self.note(format!("{who} was passed over at {what}: {why}"));
            }
        }
    }

    fn until(&self) -> Instant {
        Instant::now() + Duration::from_secs(self.world.config().deadlines.forward)
    }

    /// Repeats one step.
    pub(super) fn again<R: Deref<Target = Self>>(
        mut run: R,
        what: &str,
        mut step: impl FnMut(&mut R) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let until = run.until();
        let mut told = false;
        loop {
            let stop = match step(&mut run) {
                Ok(()) => return Ok(()),
                Err(stop) => stop,
            };
            run.wanted()?;
            if Instant::now() >= until {
                return Err(Stop::Failed(format!("{what}: {stop}")));
            }
            if !told {
                run.note(format!("{what}: {stop}; trying again"));
                told = true;
            }
            thread::sleep(PAUSE);
        }
    }

    /// A host that was restarted meanwhile answers like one that has finished; but the container ended with it, and
    /// what is kept here is all there is.
    fn still_there(&self) -> Result<(), Stop> {
        let mut holds = false;
        Self::again(self, "asking the destination whether it has the container", |run| {
            match run.ask_destination(Order::Holds, run.answer_time())? {
                Answer::Has(has) => holds = has,
                _ => return Err(confused("the destination", "holds")),
            }
            Ok(())
        })?;
        if holds {
            return Ok(());
        }
        let (to, name) = (&self.to, &self.request.container);
        Err(Stop::Failed(format!(
            "{to} has lost the container: that host was restarted; `migrrdma recover {name}` brings it back here"
        )))
    }

    /// Nothing of the container stays here; everybody forgets the migration.
    pub(super) fn finish(&mut self) -> Result<(), Stop> {
        if !self.record.resumed {
            self.still_there()?;
        }
        if !std::mem::replace(&mut self.record.resumed, true)
            && let Err(e) = self.world.records().write(&self.record)
        {
            // An agent that has to finish this after us would do everything once more, and ask in vain.
            self.note(crate::agent::chain(&e));
        }
        Self::again(&*self, "telling the destination that all is done", |run| {
            run.ask_destination(Order::Finish, run.answer_time()).map(drop)
        })?;
        let agents: Vec<String> = std::mem::take(&mut self.effects.claimed).into_iter().collect();
        let release = |at: &String| {
            let order = Order::Release { committed: true };
            self.world.call(at, self.id, order, self.answer_time()).err()
        };
        for e in self.fan_out(agents, release).into_iter().filter_map(|(_, e)| e) {
            self.note(format!("a peer was not released and will ask: {}", crate::agent::chain(&e)));
        }
        self.ended_here();
        if let Some(container) = &self.container
            && let Err(e) = self.world.host().forget(container)
        {
            self.note(format!("cleaning up here: {e}"));
        }
        self.effects.wire = None;
        if let Some(dir) = self.effects.images.take() {
            let _ = fs::remove_dir_all(dir);
        }
        self.world.let_go(self.id);
        self.record.state = State::Finished;
        // The plan is long and of no more use.
        self.record.plan = serde_json::Value::Null;
        self.world.records().write(&self.record).map_err(|e| Stop::Failed(crate::agent::chain(&e)))
    }
}
