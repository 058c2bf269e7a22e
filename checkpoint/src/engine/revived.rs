//! A restore by command whose agent was restarted. The restored tasks do not depend on the agent: until the decision they
//! wait in the hands of the command, which waits for the next agent; after it they run, and hold what the incubator had
//! made for them. So the next agent goes forward from the record, as the source of a migration does, towards an arrival
//! of its own that it has taken up from a note ([`super::prepared`]).
//!
//! | record | note | door | what happened | what is done |
//! |---|---|---|---|---|
//! | not decided | | open | nothing yet | undone, the command hears no |
//! | decided | not decided | closed | the command ended before it heard of the decision: nothing ran | undone |
//! | decided | any | open | the command has not heard of it | it hears it, and so on |
//! | decided | decided | closed | the tasks run, or did | everybody is told |
//! | decided | none | | nobody knows | given up |
//! | decided | decided, of another boot | | the tasks ended with this host | given up |
//!
//! Undone means that the image can be restored again, as long as peers wait for it; given up, that it is used up.
//!
//! A container that was taken over from a source that is gone ([`super::take_over`]) is gone on with in the same way.

use std::sync::Arc;
use std::time::Duration;

use rdma_virt::id::MigrationId;

use super::by_hand::ByHand as Surroundings;
use super::dest::{self, State as Arrived};
use super::forward::FromImage;
use super::{Cancel, recover, take_back};
use crate::agent::{Agent, chain, lock, procs};
use crate::net::msg::Order;
use crate::record::{Kind, Record, State};

/// Deals with a restore that was decided.
pub(super) fn go_on(agent: &Arc<Agent>, mut record: Record, cancel: &Cancel) {
    let Some(id) = record.id() else { return };
    if record.kind == Kind::TakeOver && !record.told && agent.desk.has(id) {
        // A source that is back may let a copy of its own run.
        record.told = take_back::tell_once(agent, id, &record);
    }
    if held_by_nobody(agent, id) {
        eprintln!("{id} of container {}: the command that held it has ended, and its tasks with it", record.container);
        if let Err(e) = dest::obey(agent, None, id, Order::Abandon) {
            eprintln!("{id}: {e}");
        }
    }
    if !record.resumed && !agent.desk.has(id) {
        return give_up(agent, record);
    }
    let Some((id, forward)) = recover::decided(&record) else { return };
    let mut world = Surroundings::without_clerk(agent);
    let series = forward.image.as_ref().map(|image| image.series);
    if let Some(FromImage { series, origins }) = &forward.image {
        world.origins.clone_from(origins);
        agent.shims.known_as.insert(id, *series);
    }
    recover::finish_in(&world, id, record, forward, cancel);
    agent.shims.known_as.remove(id);
    let is_finished = |record: Record| record.state == State::Finished;
    if let Some(series) = series
        && agent.records.read(id).is_ok_and(|now| now.is_some_and(is_finished))
    {
        take_back::restored_later(agent, series, cancel);
    }
}

/// Whether what was restored has ended before it was let go.
fn held_by_nobody(agent: &Agent, id: MigrationId) -> bool {
    let Some(entry) = agent.desk.get(id) else { return false };
    let arrival = lock(&entry.arrival);
    matches!(&arrival.state, Arrived::Prepared { held, .. } if !procs::is_alive(held.init()))
}

/// The command that held what was restored ended before anybody let it go: whatever the record says, it is as if it had
/// not been decided.
pub(super) fn never_ran(agent: &Agent, id: MigrationId) {
    let undecided = || match agent.records.read(id)? {
        Some(record) if record.kind == Kind::Restore && record.state == State::Committed => {
            agent.records.write(&Record { state: State::Started, plan: serde_json::Value::Null, ..record })
        }
        _ => Ok(()),
    };
    if let Err(e) = undecided() {
        eprintln!("{id}: {}", chain(&e));
    }
}

/// Nobody knows whether its tasks ever ran. The image is used up all the same: the peers' shims wait for nothing more,
/// and give up by themselves.
fn give_up(agent: &Arc<Agent>, mut record: Record) {
    let Some(id) = record.id() else { return };
    let wait = Duration::from_secs(agent.config.deadlines.answer);
    for (at, _) in &record.peers {
        if let Err(e) = agent.call(at, Some(id), Order::Release { committed: true }, wait) {
            eprintln!("{id}: {}", chain(&e));
        }
    }
    agent.let_go_of(id);
    // Nothing lives here of one that was taken over: its source may still have an image of it.
    record.state = if record.kind == Kind::TakeOver { State::Aborted } else { State::Finished };
    record.why = Some("what was restored ended before all ends were connected".into());
    record.plan = serde_json::Value::Null;
    if let Err(e) = agent.records.write(&record) {
        eprintln!("{}", chain(&e));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::LOCAL;
    use crate::engine::fixture::{idle_agent, offer};
    use crate::engine::forward::Forward;
    use crate::engine::plan::Plan;
    use crate::engine::prepared::{self, Note};
    use crate::image::HandOver;
    use crate::net::msg::{Fate, Lease};
    use std::path::{Path, PathBuf};

    const ID: MigrationId = MigrationId([3; 16]);
    const SERIES: MigrationId = MigrationId([4; 16]);

    /// What an agent left that ended after the decision; the directory of its note.
    fn left_by_one(dir: &Path, stage: impl FnOnce(Note) -> Note) -> (Arc<Agent>, PathBuf) {
        let agent = idle_agent(dir);
        let lease = Lease { first: 1 << 20, count: 1 };
        let forward = Forward {
            plan: Plan::default(),
            states: Vec::new(),
            lease,
            hand_over: HandOver::Adopt,
            container: None,
            image: Some(FromImage { series: SERIES, origins: Vec::new() }),
        };
        let mut record = Record::new(ID, "c", LOCAL);
        (record.kind, record.state) = (Kind::Restore, State::Committed);
        record.plan = serde_json::to_value(forward).unwrap();
        agent.records.write(&record).unwrap();
        let beside = agent.config.state_dir.join("incoming").join(ID.to_string());
        std::fs::create_dir_all(&beside).unwrap();
        let mut offer = offer("c");
        offer.lease = lease;
        let note = Note::new(LOCAL, &offer, i32::MAX, &[]).given(Some(&dir.join("final")));
        stage(note).write(&beside).unwrap();
        (idle_agent(dir), beside)
    }

    fn state(agent: &Agent) -> State {
        agent.records.read(ID).unwrap().unwrap().state
    }

    #[test]
    fn the_next_agent_finishes_a_restore_whose_tasks_were_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, beside) = left_by_one(dir.path(), Note::decided);
        prepared::take_up(&agent);
        assert_eq!((agent.desk.bringing("c"), state(&agent)), (Some(ID), State::Committed));
        go_on(&agent, agent.records.read(ID).unwrap().unwrap(), &Cancel::default());
        let record = agent.records.read(ID).unwrap().unwrap();
        assert_eq!((record.state, record.resumed, record.why), (State::Finished, true, None));
        assert!(agent.desk.bringing("c").is_none() && !beside.exists());
        let page = agent.metrics_page();
        assert!(page.contains("operation=\"restore\",outcome=\"finished-later\"} 1"), "{page}");
    }

    #[test]
    fn a_container_that_was_taken_back_has_come_back_when_the_next_agent_finishes_its_restore() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, _) = left_by_one(dir.path(), Note::decided);
        let mut taken_back = Record::new(SERIES, "c", "10.0.0.2:7477");
        (taken_back.state, taken_back.plan) = (State::TakenBack, serde_json::json!({}));
        agent.records.write(&taken_back).unwrap();
        let image = agent.config.state_dir.join("outgoing").join(SERIES.to_string());
        std::fs::create_dir_all(&image).unwrap();
        // Nothing is known of it without its note.
        let record = agent.records.read(ID).unwrap().unwrap();
        go_on(&agent, record.clone(), &Cancel::default());
        assert!(image.exists(), "one that was given up is tried again");
        agent.records.write(&record).unwrap();
        prepared::take_up(&agent);
        go_on(&agent, record, &Cancel::default());
        let now = agent.records.read(SERIES).unwrap().unwrap();
        assert!(now.state == State::TakenBack && now.plan.is_null() && !image.exists(), "{now:?}");
        assert!(lock(&agent.running).is_empty());
    }

    #[test]
    fn what_ran_before_this_host_was_restarted_is_not_as_if_it_had_never_run() {
        let dir = tempfile::tempdir().unwrap();
        for (stage, after) in [(Note::decided as fn(Note) -> Note, State::Committed), (|note| note, State::Started)] {
            let (agent, beside) = left_by_one(dir.path(), |note| stage(note).of_boot("another"));
            prepared::take_up(&agent);
            assert_eq!((agent.desk.bringing("c"), state(&agent)), (None, after));
            assert!(!beside.exists());
        }
    }

    #[test]
    fn a_restore_that_nobody_let_go_leaves_the_image_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, beside) = left_by_one(dir.path(), |note| note);
        prepared::take_up(&agent);
        assert_eq!((agent.desk.bringing("c"), state(&agent)), (None, State::Started));
        assert!(!beside.exists());
        assert_eq!(recover::fate(&agent, ID), Fate::Aborted, "peers would not wait again");
    }

    #[test]
    fn a_restore_that_nothing_is_known_of_is_given_up_but_not_one_that_only_has_to_be_cleaned() {
        for resumed in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (agent, beside) = left_by_one(dir.path(), Note::decided);
            std::fs::remove_dir_all(beside).unwrap();
            prepared::take_up(&agent);
            go_on(&agent, Record { resumed, ..agent.records.read(ID).unwrap().unwrap() }, &Cancel::default());
            let record = agent.records.read(ID).unwrap().unwrap();
            assert_eq!((record.state, record.why.is_some()), (State::Finished, !resumed));
        }
    }
}
