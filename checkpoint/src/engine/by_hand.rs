//! Checkpoint and restore by command: the container's runtime runs CRIU, with its own options and as the parent of what
//! it restores, and the engine only holds it at the gates. Here is that program as the engine's [`Host`] and [`World`].
//!
//! The conversation: the engine says [`Event::Dump`] or [`Event::Restore`]; the program answers with [`Word`]s, and
//! waits for [`Event::Go`] or [`Event::Refuse`] at its gate. A program that goes away has said no. When the agent goes away
//! before its word on a restore, the next one finds the program at the door that it was told, as it finds a monitor.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rdma_virt::id::{MigrationId, PGid, Vpid};
use rdma_virt::msg::{Reply, Request};
use serde::{Deserialize, Serialize};

use super::host::{Container, DumpJob, Held, Host, HostError, Nursery, PreDumpJob, RestoreJob, Result, Wire};
use super::world::{OwnShim, World};
use crate::agent::admin::Event;
use crate::agent::config::Config;
use crate::agent::connecting::End;
use crate::agent::metrics::Metrics;
use crate::agent::procs::Process;
use crate::agent::shims::ShimError;
use crate::agent::under_way::UnderWay;
use crate::agent::{Agent, LOCAL, chain};
use crate::likeness::Likeness;
use crate::net::client::CallError;
use crate::net::msg::{Answer, Lease, MovedProcess, Order};
use crate::record::Records;

/// CRIU's own deadlines are shorter; this one is for a program that hangs.
const PATIENCE: Duration = Duration::from_secs(900);

/// What the program says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    /// The dump is complete, the tasks still exist.
    Reached,
    /// All is restored, nothing runs yet.
    Restored { pid: i32 },
    /// The restored tasks run.
    Running,
    /// CRIU has ended; why it failed, if it did.
    Ended { error: Option<String> },
}

/// The program at the other end of an administrator's connection.
pub trait Clerk: Send + Sync {
    fn tell(&self, event: Event);
    /// Its next word. An error says that it went away, or stayed silent for too long.
    fn word(&self, deadline: Duration) -> std::result::Result<Word, String>;
}

fn unexpected(word: &Word) -> HostError {
    HostError(format!("the command said {word:?} out of turn"))
}

fn ended(word: Word) -> Result<()> {
    match word {
        Word::Ended { error: None } => Ok(()),
        Word::Ended { error: Some(why) } => Err(HostError(why)),
        other => Err(unexpected(&other)),
    }
}

/// The agent's host, but for dumps, which the program makes.
struct HandHost {
    host: Arc<dyn Host>,
    clerk: Arc<dyn Clerk>,
}

impl HandHost {
    fn word(&self) -> Result<Word> {
        self.clerk.word(PATIENCE).map_err(HostError)
    }
}

impl Host for HandHost {
    fn containers(&self) -> Result<Vec<Container>> {
        self.host.containers()
    }
    fn container(&self, id: &str) -> Result<Container> {
        self.host.container(id)
    }
    fn freeze(&self, container: &Container) -> Result<()> {
        self.host.freeze(container)
    }
    fn thaw(&self, container: &Container) -> Result<()> {
        self.host.thaw(container)
    }
    fn lost(&self, container: &Container) -> Result<Vec<String>> {
        self.host.lost(container)
    }

    fn dump(
        &self,
        _: &Container,
        _: &DumpJob,
        gate: &mut dyn FnMut() -> std::result::Result<(), String>,
    ) -> Result<()> {
        self.clerk.tell(Event::Dump);
        match self.word()? {
            Word::Reached => {}
            early => return ended(early).and(Err(HostError("CRIU ended without asking whether it may".into()))),
        }
        self.clerk.tell(match gate() {
            Ok(()) => Event::Go,
            Err(why) => Event::Refuse { why },
        });
        ended(self.word()?)
    }

    fn pre_dump(&self, _: &Container, _: &PreDumpJob) -> Result<()> {
        self.clerk.tell(Event::Dump);
        ended(self.word()?)
    }

    fn examine(&self, id: &str, bundle: Option<&Path>) -> Vec<String> {
        self.host.examine(id, bundle)
    }
    fn tools(&self) -> Vec<String> {
        self.host.tools()
    }
    fn localise(&self, bundle: &Path) -> Result<()> {
        self.host.localise(bundle)
    }
    fn rootfs(&self, bundle: &Path) -> Result<PathBuf> {
        self.host.rootfs(bundle)
    }
    fn injected(&self, path: &Path) -> Vec<PathBuf> {
        self.host.injected(path)
    }
    fn memory_files(&self, id: &str) -> Option<PathBuf> {
        self.host.memory_files(id)
    }
    fn make_memory_files(&self, id: &str) -> Result<PathBuf> {
        self.host.make_memory_files(id)
    }
    fn drop_memory_files(&self, id: &str) {
        self.host.drop_memory_files(id);
    }
    fn likenesses(&self, id: &str) -> Result<Vec<Likeness>> {
        self.host.likenesses(id)
    }
    fn show(&self, id: &str, devices: &[Likeness]) -> Result<()> {
        self.host.show(id, devices)
    }
    fn show_no_more(&self, id: &str) {
        self.host.show_no_more(id);
    }
    fn remove_restored(&self, id: &str, images: &Path) -> Result<bool> {
        self.host.remove_restored(id, images)
    }
    fn incubate(&self, id: &str, bundle: &Path, socket: &Path) -> Result<Box<dyn Nursery>> {
        self.host.incubate(id, bundle, socket)
    }
    fn restore(&self, job: &RestoreJob) -> Result<Box<dyn Held>> {
        restore(&self.clerk, job)
    }
    fn held_at(&self, door: &Path) -> Result<Option<Box<dyn Held>>> {
        self.host.held_at(door)
    }
    fn forget(&self, container: &Container) -> Result<()> {
        self.host.forget(container)
    }
    fn wire(&self, bundle: &Path, init: Option<i32>) -> Result<Option<Box<dyn Wire>>> {
        self.host.wire(bundle, init)
    }
    fn gone_to(&self, id: &str, to: Option<&str>) {
        self.host.gone_to(id, to);
    }
    fn criu(&self) -> Result<u32> {
        self.host.criu()
    }
}

/// Has the program restore up to the last gate.
pub(super) fn restore(clerk: &Arc<dyn Clerk>, job: &RestoreJob) -> Result<Box<dyn Held>> {
    clerk.tell(Event::Restore { incubator: job.incubator.is_some(), door: Some(job.door.clone()) });
    match clerk.word(job.deadline).map_err(HostError)? {
        Word::Restored { pid } => Ok(Box::new(HandHeld { clerk: clerk.clone(), pid, runs: false })),
        early => {
            Err(ended(early).err().unwrap_or_else(|| HostError("CRIU ended without asking whether it may".into())))
        }
    }
}

/// A container that the program has restored and holds.
struct HandHeld {
    clerk: Arc<dyn Clerk>,
    pid: i32,
    runs: bool,
}

impl Held for HandHeld {
    fn init(&self) -> i32 {
        self.pid
    }

    fn release(&mut self) -> Result<()> {
        if self.runs {
            return Ok(());
        }
        self.clerk.tell(Event::Go);
        match self.clerk.word(PATIENCE).map_err(HostError)? {
            Word::Running => {
                self.runs = true;
                Ok(())
            }
            other => Err(ended(other.clone()).err().unwrap_or_else(|| unexpected(&other))),
        }
    }

    fn abandon(self: Box<Self>) -> Result<()> {
        self.clerk.tell(Event::Refuse { why: "the restore was not completed".into() });
        // It says that it failed, as it was told to; or it is gone, and CRIU with it.
        let _ = self.clerk.word(PATIENCE);
        Ok(())
    }
}

/// The agent's surroundings, with the program in the place of the host's own CRIU.
pub(super) struct ByHand<'a> {
    agent: &'a Agent,
    host: Arc<dyn Host>,
    /// Agents that learn where the container is: that of the host its image came from, for one.
    pub origins: Vec<String>,
}

impl<'a> ByHand<'a> {
    pub fn new(agent: &'a Agent, clerk: Arc<dyn Clerk>) -> Self {
        ByHand { agent, host: Arc::new(HandHost { host: agent.host.clone(), clerk }), origins: Vec::new() }
    }

    /// For what is left to do when the program went on, or away.
    pub fn without_clerk(agent: &'a Agent) -> Self {
        ByHand { agent, host: agent.host.clone(), origins: Vec::new() }
    }
}

impl World for ByHand<'_> {
    fn host(&self) -> Arc<dyn Host> {
        self.host.clone()
    }
    fn records(&self) -> &Records {
        &self.agent.records
    }
    fn config(&self) -> &Config {
        &self.agent.config
    }
    fn destination(&self, to: &str) -> std::result::Result<String, String> {
        World::destination(self.agent, to)
    }
    fn call_and_meanwhile(
        &self,
        at: &str,
        migration: MigrationId,
        order: Order,
        deadline: Duration,
        sent: &mut dyn FnMut(),
    ) -> std::result::Result<Answer, CallError> {
        self.agent.call_and_meanwhile(at, Some(migration), order, deadline, sent)
    }
    fn agent_of(&self, gid: PGid) -> String {
        self.agent.agent_of(gid)
    }
    fn shims(&self, container: &str) -> Vec<OwnShim> {
        World::shims(self.agent, container)
    }
    fn shim(
        &self,
        container: &str,
        vpid: Vpid,
        migration: Option<MigrationId>,
        request: Request,
        deadline: Duration,
    ) -> std::result::Result<Reply, ShimError> {
        World::shim(self.agent, container, vpid, migration, request, deadline)
    }
    fn is_young(&self) -> bool {
        World::is_young(self.agent)
    }
    fn reconnected(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> std::result::Result<(), Vec<Vpid>> {
        World::reconnected(self.agent, container, vpids, deadline)
    }
    fn disconnected(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> std::result::Result<(), Vec<Vpid>> {
        World::disconnected(self.agent, container, vpids, deadline)
    }
    fn bump(&self, container: &str) -> io::Result<()> {
        World::bump(self.agent, container)
    }
    fn processes(&self, container: &Container) -> io::Result<Vec<Process>> {
        World::processes(self.agent, container)
    }
    fn hold(&self, migration: MigrationId, container: &str) -> std::result::Result<(), MigrationId> {
        World::hold(self.agent, migration, container)
    }
    fn let_go(&self, migration: MigrationId) {
        World::let_go(self.agent, migration);
    }
    fn half_open(&self, migration: MigrationId, container: &str, ends: &[End], hold: bool) -> Option<String> {
        World::half_open(self.agent, migration, container, ends, hold)
    }
    fn lease(&self, container: &str) -> std::result::Result<Lease, String> {
        World::lease(self.agent, container)
    }

    fn under_way(&self) -> &UnderWay {
        &self.agent.under_way
    }
    fn metrics(&self) -> &Metrics {
        &self.agent.metrics
    }

    /// It did not leave: it came here, from wherever the image is.
    fn left(&self, _: &str, news: &[MovedProcess]) -> std::result::Result<(), String> {
        self.agent.moved.learn(news).map_err(|e| chain(&e))?;
        let seldom = Duration::from_secs(5);
        let mut deaf = Vec::new();
        for at in self.origins.iter().filter(|at| *at != LOCAL) {
            let order = Order::Moved(news.to_vec());
            if let Err(e) = self.agent.client.call(at, Some(MigrationId(super::forward::random())), order, seldom) {
                deaf.push(chain(&e));
            }
        }
        if deaf.is_empty() { Ok(()) } else { Err(format!("a host where it was looked for: {}", deaf.join("; "))) }
    }
}
