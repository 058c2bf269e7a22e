//! What this agent is in the middle of, for those who look on: the migrations it conducts, each with its phase, and whom
//! anything waits for. Nobody decides by it, and it does not outlive the agent; what is decided lies in records.
//!
//! Whoever does something holds a guard while it lasts, so that what has ended cannot stay on the list.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use rdma_virt::msg::Request;
use serde::{Deserialize, Serialize};

use super::lock;
use super::shims::verb;
use crate::net::msg::Order;
use crate::phase::Phase;

/// What this host is in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    Source,
    Destination,
    /// A container here is connected to the one that moves.
    Peer,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Source, Role::Destination, Role::Peer];

    pub fn name(self) -> &'static str {
        match self {
            Role::Source => "source",
            Role::Destination => "destination",
            Role::Peer => "peer",
        }
    }
}

/// How far a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Begun,
    In(Phase),
    Undoing,
}

/// A migration that this agent conducts.
#[derive(Clone, Debug)]
pub struct Course {
    pub container: String,
    pub role: Role,
    /// The other end, as it is shown.
    pub other: String,
    pub stage: Stage,
    pub since: Instant,
}

/// Somebody is waited for.
#[derive(Clone, Debug)]
pub struct Waiting {
    migration: MigrationId,
    /// Whose process it is, if it is one of this host.
    container: Option<String>,
    pub what: String,
    pub since: Instant,
    /// When that is given up.
    pub until: Option<Instant>,
}

#[derive(Debug, Default)]
struct Board {
    courses: BTreeMap<MigrationId, Course>,
    waiting: BTreeMap<u64, Waiting>,
    next: u64,
}

/// The list. One per agent.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<Board>);

/// While it lives the migration is on the list.
#[derive(Debug)]
pub struct Seen<'a> {
    list: &'a UnderWay,
    id: MigrationId,
}

impl Drop for Seen<'_> {
    fn drop(&mut self) {
        lock(&self.list.0).courses.remove(&self.id);
    }
}

/// While it lives somebody is waited for.
#[derive(Debug)]
pub struct Wait<'a> {
    list: &'a UnderWay,
    number: u64,
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        lock(&self.list.0).waiting.remove(&self.number);
    }
}

impl UnderWay {
    /// A migration begins.
    pub fn begin(&self, id: MigrationId, container: &str, role: Role, other: &str) -> Seen<'_> {
        let (container, other) = (container.into(), other.into());
        let course = Course { container, role, other, stage: Stage::Begun, since: Instant::now() };
        lock(&self.0).courses.insert(id, course);
        Seen { list: self, id }
    }

    /// It is here now. Without effect on one that is not on the list.
    pub fn at(&self, id: MigrationId, stage: Stage) {
        if let Some(course) = lock(&self.0).courses.get_mut(&id) {
            (course.stage, course.since) = (stage, Instant::now());
        }
    }

    /// Something is waited for.
    pub fn wait(&self, id: MigrationId, what: String, deadline: Option<Duration>) -> Wait<'_> {
        self.add(id, None, what, deadline)
    }

    /// The answer of a process of this host; questions that belong to no migration are not told.
    pub fn wait_for_shim(
        &self,
        id: Option<MigrationId>,
        container: &str,
        who: &str,
        request: &Request,
        deadline: Duration,
    ) -> Option<Wait<'_>> {
        Some(self.add(id?, Some(container), format!("{who} to {}", verb(request)), Some(deadline)))
    }

    /// Another agent's answer.
    pub fn wait_for_agent(
        &self,
        id: Option<MigrationId>,
        at: &str,
        order: &Order,
        deadline: Duration,
    ) -> Option<Wait<'_>> {
        let what = match order {
            Order::Relay { container, vpid, request } => {
                format!("pid {} of container {container} at {at} to {}", vpid.0, verb(request))
            }
            Order::Restore { .. } => format!("{at} to restore the container"),
            other => format!("{at} to answer {}", other.name()),
        };
        Some(self.add(id?, None, what, Some(deadline)))
    }

    /// A destination's own step; those that take no time are not told.
    pub fn step_here(&self, id: MigrationId, order: &Order) -> Option<Wait<'_>> {
        let what = match order {
            Order::Show { .. } => "what sysfs shows to be laid out",
            Order::Incubate { .. } => "the incubator to make the objects",
            Order::Join { .. } => "the incubator to connect the QPs",
            Order::TreeStart { .. } | Order::TreePiece { .. } | Order::TreeEnd => "the bundle to be unpacked",
            Order::Restore { .. } => "CRIU to restore the container",
            Order::Commit => "the address to come up and the tasks to run",
            Order::Adopt => "the moved processes to take their objects",
            Order::Rebuild { .. } => "the moved processes to make their objects",
            Order::Finish | Order::Abandon | Order::TakenBack { .. } => "what is not needed to be removed",
            _ => return None,
        };
        Some(self.wait(id, what.into(), None))
    }

    fn add(&self, id: MigrationId, container: Option<&str>, what: String, deadline: Option<Duration>) -> Wait<'_> {
        let since = Instant::now();
        let until = deadline.and_then(|d| since.checked_add(d));
        let container = container.map(str::to_owned);
        let mut board = lock(&self.0);
        let number = board.next;
        board.next += 1;
        board.waiting.insert(number, Waiting { migration: id, container, what, since, until });
        Wait { list: self, number }
    }

    /// All migrations this agent conducts.
    pub fn courses(&self) -> Vec<(MigrationId, Course)> {
        lock(&self.0).courses.iter().map(|(id, course)| (*id, course.clone())).collect()
    }

    /// Whom this migration waits for, oldest first.
    pub fn waits(&self, id: MigrationId) -> Vec<Waiting> {
        lock(&self.0).waiting.values().filter(|w| w.migration == id).cloned().collect()
    }

    /// The same, as far as one container of this host is concerned.
    pub fn waits_of(&self, id: MigrationId, container: &str) -> Vec<Waiting> {
        let mut waits = self.waits(id);
        waits.retain(|w| w.container.as_deref() == Some(container));
        waits
    }

    /// The same, without other containers' processes.
    pub fn waits_but_for_others(&self, id: MigrationId, container: &str) -> Vec<Waiting> {
        let mut waits = self.waits(id);
        waits.retain(|w| w.container.as_deref().is_none_or(|c| c == container));
        waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdma_virt::id::Vpid;

    const ID: MigrationId = MigrationId([1; 16]);
    const OTHER: MigrationId = MigrationId([2; 16]);
    const SOON: Duration = Duration::from_secs(9);

    fn words(waits: &[Waiting]) -> Vec<&str> {
        waits.iter().map(|w| w.what.as_str()).collect()
    }

    #[test]
    fn a_migration_is_listed_with_its_stage_until_it_is_over() {
        let list = UnderWay::default();
        let seen = list.begin(ID, "web", Role::Source, "10.0.0.2:7477");
        list.at(OTHER, Stage::Undoing);
        list.at(ID, Stage::In(Phase::WaitBeforeStop));
        let [(id, course)] = &list.courses()[..] else { panic!("{list:?}") };
        assert_eq!((*id, course.container.as_str(), course.stage), (ID, "web", Stage::In(Phase::WaitBeforeStop)));
        drop(seen);
        assert!(list.courses().is_empty());
    }

    #[test]
    fn each_party_is_told_whom_it_waits_for_and_only_as_long_as_it_does() {
        let list = UnderWay::default();
        let drain = Request::Drain { expect: Vec::new(), deadline_ms: 1 };
        let relay = Order::Relay { container: "db".into(), vpid: Vpid(8), request: drain.clone() };
        let shim = list.wait_for_shim(Some(ID), "web", "app (pid 7 of container web)", &drain, SOON);
        let agent = list.wait_for_agent(Some(ID), "10.0.0.3:7477", &relay, SOON);
        let step = list.step_here(ID, &Order::Restore { files: 1, onward: Vec::new() });
        assert!(list.wait_for_shim(None, "web", "app", &Request::Report, SOON).is_none());
        assert!(list.step_here(ID, &Order::FileEnd { len: 0, crc: 0 }).is_none());
        let [own, far, here] = [
            "app (pid 7 of container web) to drain",
            "pid 8 of container db at 10.0.0.3:7477 to drain",
            "CRIU to restore the container",
        ];
        assert_eq!(words(&list.waits(ID)), [own, far, here]);
        assert_eq!(words(&list.waits_of(ID, "web")), [own]);
        assert_eq!(words(&list.waits_but_for_others(ID, "db")), [far, here]);
        assert!(list.waits(OTHER).is_empty());
        assert!(list.waits(ID)[0].until.is_some_and(|until| until <= Instant::now() + SOON));
        assert!(list.waits(ID)[2].until.is_none(), "a step has no deadline of its own");
        drop((shim, agent, step));
        assert!(list.waits(ID).is_empty());
    }
}
