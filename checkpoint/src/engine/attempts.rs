//! How often a migration is tried: what others are in the middle of will be over, and what has ended is done without. Each
//! attempt is undone whole before the next one begins.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;

use super::source::{End, Run};
use super::world::World;
use super::{Cancel, MigrateRequest, Progress};
use crate::agent::admin::Event;
use crate::agent::config::Config;
use crate::agent::under_way::{Role, UnderWay};
use crate::agent::{Agent, lock};

/// Attempts, when each time another process ended.
const WITHOUT: u32 = 5;

/// Between two looks at a connection in the making.
const HANDSHAKE: Duration = Duration::from_secs(1);

/// A far end that is not connected back by then is one that will not be: its process has reset it.
const SOON: Duration = Duration::from_secs(20);

/// Why another attempt may succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Again {
    /// Another migration holds somebody, and will be over.
    Busy(MigrationId),
    /// A process that took part has ended; the next attempt does without it.
    Ended,
    /// A connection in the making will be made.
    HalfOpen,
}

/// Runs a migration for an administrator, with as many attempts as it takes to get past other migrations.
pub fn migrate(agent: &Arc<Agent>, request: &MigrateRequest, cancel: &Arc<Cancel>, progress: &dyn Progress) {
    let id = MigrationId(super::forward::random());
    let (container, to) = (request.container.clone(), request.to.clone());
    let seen = agent.under_way.begin(id, &container, Role::Source, &to);
    progress.event(Event::Begin { id: id.to_string(), container, to });
    lock(&agent.running).insert(id, cancel.clone());
    let end = attempts(&**agent, id, request, cancel, progress);
    lock(&agent.running).remove(&id);
    drop(seen);
    if let Some(outcome) = end.outcome().filter(|_| !request.dry_run) {
        agent.metrics.migration(Role::Source, outcome);
    }
    if let End::Done(summary) = &end {
        agent.metrics.done(summary);
    }
    progress.event(end.into());
}

fn attempts(
    world: &dyn World,
    id: MigrationId,
    request: &MigrateRequest,
    cancel: &Cancel,
    progress: &dyn Progress,
) -> End {
    let mut attempts = Attempts::new(world.config());
    loop {
        let mut run = Run::new(world, id, request, cancel, progress);
        run.takes_half_open = attempts.take_half_open();
        let end = run.run();
        if !attempts.another(&end, id, cancel, progress, world.under_way()) {
            return end;
        }
    }
}

/// The attempts of one migration.
#[derive(Debug)]
pub(super) struct Attempts {
    began: Instant,
    /// How many ended because a process did.
    ended: u32,
    /// So long it is tried to get past other migrations.
    patience: Duration,
}

impl Attempts {
    pub fn new(config: &Config) -> Self {
        Attempts { began: Instant::now(), ended: 0, patience: Duration::from_secs(config.deadlines.busy) }
    }

    /// Whether the next one does with a far end that is not connected back: there was time for it.
    pub fn take_half_open(&self) -> bool {
        self.began.elapsed() > SOON
    }

    /// Whether to make another one after `end`. Says so, and waits for as long as it takes others to get out of the way.
    pub fn another(
        &mut self,
        end: &End,
        id: MigrationId,
        cancel: &Cancel,
        progress: &dyn Progress,
        under_way: &UnderWay,
    ) -> bool {
        let End::Undone { again: Some(again), why, .. } = end else { return false };
        let worth = match again {
            Again::Busy(_) | Again::HalfOpen => self.began.elapsed() < self.patience,
            Again::Ended => {
                self.ended += 1;
                self.ended < WITHOUT
            }
        };
        if !worth || cancel.why().is_some() {
            return false;
        }
        progress.event(Event::Note { text: format!("{why}; trying again") });
        let (what, pause) = match again {
            // The smaller id comes back sooner, so that of those that hinder each other one gets through.
            Again::Busy(by) => (format!("{by} to be over"), Duration::from_millis(if id < *by { 200 } else { 2000 })),
            Again::HalfOpen => ("a connection in the making".into(), HANDSHAKE),
            Again::Ended => return true,
        };
        let _wait = under_way.wait(id, what, Some(pause));
        thread::sleep(pause);
        true
    }
}
