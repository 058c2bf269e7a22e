//! The source of a migration whose destination has taken the container over since: an administrator said there that this
//! host is gone, which was wrong, or is not true any more. The container lives at the destination, whatever this host's
//! record says: a copy that goes on here, because the migration was undone, ends at once. It is known by its init; another
//! container of its name is left alone.
//!
//! Who decides that a container is taken over, and when, is the business of [`super::take_over`] at the destination.

use std::collections::hash_map::Entry;
use std::fs;
use std::sync::Arc;

use rdma_virt::id::MigrationId;

use super::forward::{Forward, kill_what_is_left};
use super::host::Container;
use crate::agent::{Agent, chain, lock};
use crate::net::msg::{Answer, Refusal};
use crate::record::{Record, State};

/// Answers [`crate::net::msg::Order::TakenOver`].
pub(crate) fn obey(agent: &Agent, id: MigrationId, container: &str) -> Result<Answer, Refusal> {
    let failed = |why: String| Refusal::Failed(why);
    // Nobody else works on it meanwhile.
    match lock(&agent.running).entry(id) {
        Entry::Occupied(worker) => {
            worker.get().give_up("its destination has taken the container over");
            return Err(failed(format!("this host still works on {id}; ask again")));
        }
        Entry::Vacant(free) => free.insert(Arc::default()),
    };
    let answer = end_here(agent, id, container);
    lock(&agent.running).remove(&id);
    answer
}

fn end_here(agent: &Agent, id: MigrationId, container: &str) -> Result<Answer, Refusal> {
    let failed = |why: String| Refusal::Failed(why);
    let record = agent.records.read(id).map_err(|e| failed(chain(&e)))?;
    let Some(record) = record.filter(|r| r.container == container) else { return Ok(Answer::Done) };
    match record.state {
        State::Finished => return Ok(Answer::Done),
        State::TakenBack => {
            return Err(failed(format!(
                "this host has taken container {container} back: there are two, end one of them"
            )));
        }
        State::Started | State::Aborted | State::Committed => {}
    }
    // Another container of that name has nothing to do with it.
    let is_it = |copy: &Container| !agent.host.container(container).is_ok_and(|now| now.init != copy.init);
    if let Some(copy) = copy(&record).filter(is_it) {
        // Who waits for it here learns where it is.
        agent.host.gone_to(container, Some(&record.to));
        agent.moved.forget_guest(container);
        end(agent, &copy).map_err(failed)?;
    }
    // Peers on this host: those that were not told before hear it now.
    agent.forsake(id);
    agent.let_go_of(id);
    let _ = fs::remove_dir_all(agent.config.state_dir.join("outgoing").join(id.to_string()));
    let why = Some(format!("{} has taken it over", record.to));
    let over = Record { state: State::Finished, plan: serde_json::Value::Null, why, ..record };
    agent.records.write(&over).map_err(|e| failed(chain(&e)))?;
    Ok(Answer::Done)
}

/// What the container was here.
fn copy(record: &Record) -> Option<Container> {
    let decided = || serde_json::from_value::<Forward>(record.plan.clone()).ok()?.container;
    serde_json::from_value(record.plan.clone()).ok().or_else(decided)
}

/// Takes its address off the network, where the destination's copy has it now, and kills it: in this order, so that
/// nobody hears its sockets end.
fn end(agent: &Agent, copy: &Container) -> Result<(), String> {
    eprintln!("container {} was taken over by the host it went to: the copy here is removed", copy.id);
    if let Err(e) = agent.host.unplug(&copy.bundle, Some(copy.init)) {
        // Its network may have ended with its tasks.
        eprintln!("container {}: its network: {e}", copy.id);
    }
    kill_what_is_left(copy);
    agent.host.forget(copy).map_err(|e| format!("removing what is left of container {} here: {e}", copy.id))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::idle_agent;
    use crate::engine::{Cancel, recover};
    use crate::net::msg::Fate;

    const ID: MigrationId = MigrationId([6; 16]);

    fn container() -> Container {
        let (cgroup, bundle) = ("/nonexistent".into(), "/nonexistent".into());
        // The init that the idle host knows.
        Container { id: "c".into(), init: 1, cgroup, bundle, paused: false }
    }

    #[test]
    fn whatever_the_record_says_the_migration_is_over_and_its_image_is_gone() {
        for (state, after) in [
            (State::Started, State::Finished),
            (State::Aborted, State::Finished),
            (State::Committed, State::Finished),
            (State::TakenBack, State::TakenBack),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let agent = idle_agent(dir.path());
            assert_eq!(obey(&agent, ID, "c"), Ok(Answer::Done), "nothing is known of it");
            let mut record = Record::new(ID, "c", "10.0.0.2:7477");
            (record.state, record.plan) = (state, serde_json::to_value(Some(container())).unwrap());
            agent.records.write(&record).unwrap();
            agent.hold_container(ID, "c").unwrap();
            let image = agent.config.state_dir.join("outgoing").join(ID.to_string());
            fs::create_dir_all(&image).unwrap();
            let answer = obey(&agent, ID, "c");
            assert_eq!(agent.records.read(ID).unwrap().unwrap().state, after);
            if after == State::TakenBack {
                assert!(answer.unwrap_err().to_string().contains("there are two"));
                continue;
            }
            assert_eq!(answer, Ok(Answer::Done));
            assert!(!image.exists());
            agent.hold_container(MigrationId([7; 16]), "c").unwrap();
            assert_eq!(recover::fate(&agent, ID), Fate::Finished);
            assert_eq!(obey(&agent, ID, "c"), Ok(Answer::Done), "again");
        }
    }

    #[test]
    fn the_copy_is_known_before_the_decision_and_after_it() {
        let mut record = Record::new(ID, "c", "10.0.0.2:7477");
        assert_eq!(copy(&record), None);
        record.plan = serde_json::to_value(Some(container())).unwrap();
        assert_eq!(copy(&record), Some(container()));
        let forward = Forward {
            plan: Default::default(),
            states: Vec::new(),
            lease: crate::net::msg::Lease { first: 0, count: 0 },
            hand_over: Default::default(),
            container: Some(container()),
            image: None,
        };
        record.plan = serde_json::to_value(forward).unwrap();
        assert_eq!(copy(&record), Some(container()));
    }

    #[test]
    fn whoever_works_on_it_stops_first() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        let worker: Arc<Cancel> = Arc::default();
        lock(&agent.running).insert(ID, worker.clone());
        assert!(obey(&agent, ID, "c").unwrap_err().to_string().contains("ask again"));
        assert!(worker.given_up().unwrap().contains("taken the container over"));
        assert!(worker.seal().is_err(), "it decides nothing any more");
    }
}
