//! What an agent does about migrations it finds on disk when it starts: those that had not committed are undone, those
//! that had are finished. And what it says when others ask for one's fate.

use std::collections::hash_map::Entry;
use std::fs;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rdma_virt::id::MigrationId;

use super::forward::Forward;
use super::source::Run;
use super::world::World;
use super::{Cancel, MigrateRequest, Progress};
use crate::agent::admin::Event;
use crate::agent::{Agent, LOCAL, chain, lock};
use crate::net::msg::{Fate, Order};
use crate::record::{Kind, Record, State};

/// Answers [`Order::Fate`]. No record means that it never committed.
pub fn fate(agent: &Agent, id: MigrationId) -> Fate {
    let record = match agent.records.read(id) {
        Ok(record) => record,
        Err(e) => {
            // Neither yes nor no may be guessed.
            eprintln!("{id}: {}", chain(&e));
            return Fate::Undecided;
        }
    };
    let of = |state: State| record.as_ref().is_some_and(|r| r.state == state);
    if of(State::TakenBack) {
        return Fate::TakenBack;
    }
    // After a checkpoint peers go on waiting, for whoever restores it.
    if of(State::Finished) && record.as_ref().is_some_and(|r| r.kind != Kind::Checkpoint) {
        Fate::Finished
    } else if of(State::Committed) || of(State::Finished) {
        Fate::Committed
    } else if lock(&agent.running).contains_key(&id) || agent.sessions.has(id) {
        Fate::Undecided
    } else {
        Fate::Aborted
    }
}

/// Deals with everything that is neither finished nor aborted nor under way, in the background. Called when the agent
/// starts, and every now and then: somebody who could not be told may be there again.
pub fn run(agent: &Arc<Agent>) {
    let (records, bad) = match agent.records.all() {
        Ok(found) => found,
        Err(e) => {
            eprintln!("{}", chain(&e));
            return;
        }
    };
    for e in bad {
        eprintln!("{}", chain(&e));
    }
    for record in records {
        let work: fn(&Arc<Agent>, Record, &Cancel) = match record.state {
            State::Started => |agent, record, _| undo(agent, record),
            State::Committed => match record.kind {
                Kind::Migration => finish,
                Kind::Checkpoint => |agent, record, _| super::park::finish_parked(agent, record),
                Kind::Restore | Kind::TakeOver => super::revived::go_on,
            },
            State::TakenBack if !record.told => super::take_back::tell_other_end,
            State::Finished if record.kind == Kind::TakeOver && !record.told => super::take_back::tell_other_end,
            State::Finished | State::Aborted | State::TakenBack => continue,
        };
        let Some(id) = record.id() else { continue };
        let cancel = match lock(&agent.running).entry(id) {
            Entry::Occupied(_) => continue,
            Entry::Vacant(free) => free.insert(Arc::default()).clone(),
        };
        let worker = agent.clone();
        let spawned = thread::Builder::new().name("recover".into()).spawn(move || {
            // The record may have changed since it was read: whoever worked on it had not let go of it yet.
            match worker.records.read(id) {
                Ok(Some(now)) if now.state == record.state => work(&worker, now, &cancel),
                _ => {}
            }
            lock(&worker.running).remove(&id);
        });
        if let Err(e) = spawned {
            eprintln!("no thread to deal with an old migration: {e}");
            lock(&agent.running).remove(&id);
        }
    }
}

/// CRIU saw its socket close when the agent ended and let go of the tasks; they stand still in their cgroup.
fn undo(agent: &Arc<Agent>, mut record: Record) {
    let Some(id) = record.id() else { return };
    eprintln!("{id} of container {} was not committed: undoing it", record.container);
    let wait = Duration::from_secs(agent.config.deadlines.answer);
    let told = |at: &str, order: Order| {
        if let Err(e) = agent.call(at, Some(id), order, wait) {
            eprintln!("{id}: {}", chain(&e));
        }
    };
    if record.kind == Kind::Restore {
        // What it had brought waits in the hands of the command, or has ended with it.
        told(LOCAL, Order::Abandon);
    } else if let Ok(container) = agent.host.container(&record.container) {
        let report = |what: &str, e: &dyn std::fmt::Display| eprintln!("{id}: {what}: {e}");
        match agent.host.wire(&container.bundle, Some(container.init)) {
            Ok(Some(mut wire)) => {
                if let Err(e) = wire.up() {
                    report("the container's network", &e);
                }
            }
            Ok(None) => {}
            Err(e) => report("the container's network", &e),
        }
        if container.paused
            && let Err(e) = agent.host.thaw(&container)
        {
            report("thawing the container", &e);
        }
        if let Err(e) = agent.doors.bump(&record.container) {
            report("the container's directory", &e);
        }
        // Now, or as soon as they have come back.
        agent.let_go_on(id, &record.container);
    }
    if record.to != LOCAL {
        told(&record.to, Order::Abandon);
    }
    for (at, _) in &record.peers {
        told(at, Order::Release { committed: false });
    }
    let _ = fs::remove_dir_all(agent.config.state_dir.join("outgoing").join(id.to_string()));
    (record.state, record.why) = (State::Aborted, Some("the agent was restarted before the decision".into()));
    if let Err(e) = agent.records.write(&record) {
        eprintln!("{}", chain(&e));
    }
}

struct Log(MigrationId);

impl Progress for Log {
    fn event(&self, event: Event) {
        if let Event::Note { text } = event {
            eprintln!("{}: {text}", self.0);
        }
    }
}

/// The container belongs to the destination: tells everybody who may not have heard.
fn finish(agent: &Arc<Agent>, record: Record, cancel: &Cancel) {
    if let Some((id, forward)) = decided(&record) {
        finish_in(&**agent, id, record, forward, cancel);
    }
}

/// What a record that decided says.
pub(super) fn decided(record: &Record) -> Option<(MigrationId, Forward)> {
    let id = record.id()?;
    match serde_json::from_value(record.plan.clone()) {
        Ok(forward) => Some((id, forward)),
        Err(e) => {
            eprintln!("{id}: its record is damaged: {e}");
            None
        }
    }
}

/// Everything after the decision, in these surroundings.
pub(super) fn finish_in(world: &dyn World, id: MigrationId, record: Record, forward: Forward, cancel: &Cancel) {
    eprintln!("{id} of container {} was committed: finishing it", record.container);
    let request = MigrateRequest::plain(&record.container, &record.to);
    let log = Log(id);
    let mut run = Run::new(world, id, &request, cancel, &log);
    run.go_on(record, forward);
    if let Err(why) = run.forward_again() {
        eprintln!("{id}: {why}; it will be tried again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{NEVER_CAME, idle_agent};
    use std::time::Instant;

    /// Its containers are gone with it, and the destination may not be there.
    #[test]
    fn a_host_that_was_restarted_before_the_decision_undoes_its_migration() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        let id = MigrationId([6; 16]);
        agent.records.write(&Record::new(id, NEVER_CAME, "127.0.0.1:1")).unwrap();
        let image = agent.config.state_dir.join("outgoing").join(id.to_string());
        fs::create_dir_all(image.join("images")).unwrap();
        run(&agent);
        let until = Instant::now() + Duration::from_secs(20);
        while fate(&agent, id) != Fate::Aborted {
            assert!(Instant::now() < until, "it is not undone");
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(agent.records.read(id).unwrap().map(|r| r.state), Some(State::Aborted));
        assert!(!image.exists(), "its image stays");
    }
}
