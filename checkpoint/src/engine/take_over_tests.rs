//! When a container may be taken over from a source that is gone, what is done then, and what the source hears.

use super::*;
use crate::engine::dest::obey;
use crate::engine::fixture::{idle_agent, offer, process, qp};
use crate::engine::host::{Held, Result as HostResult};
use crate::engine::plan::{PeerProcess, Plan};
use crate::engine::recover;
use crate::engine::store::Store;
use crate::image::HandOver;
use crate::net::msg::{Answer, Fate, Lease};
use rdma_virt::id::Vpid;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

const ID: MigrationId = MigrationId([9; 16]);
const SOURCE: &str = "10.0.0.1:7477";

/// Says when it is let go.
struct Waits(Arc<AtomicBool>);

impl Held for Waits {
    fn init(&self) -> i32 {
        1
    }
    fn release(&mut self) -> HostResult<()> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
    fn abandon(self: Box<Self>) -> HostResult<()> {
        Ok(())
    }
}

/// Everything a source knows whose container has no processes any more, but had a peer on each host.
fn forward() -> Forward {
    let states = vec![process(1, vec![qp(1, 30, Some(17)), qp(2, 31, Some(18))])];
    let mut plan = Plan::default();
    plan.update(&states, |_| false, || 1);
    for (link, agent) in plan.links.iter_mut().zip([LOCAL, "10.0.0.3:7477"]) {
        link.far =
            Far::Peer(PeerProcess { agent: agent.into(), container: "db".into(), vpid: Vpid(1), comm: "app".into() });
    }
    let lease = Lease { first: 1 << 20, count: 1 };
    Forward { plan, states, lease, hand_over: HandOver::Adopt, container: None, image: None }
}

fn arrived(dir: &Path, forward: &Forward) -> (Arc<Agent>, Entry, Arc<AtomicBool>) {
    let agent = idle_agent(dir);
    let store = Store::make(Store::place(&agent.config.state_dir, ID), 0).unwrap();
    keep(store.dir(), &forward.to_bytes().unwrap()).unwrap();
    let runs: Arc<AtomicBool> = Arc::default();
    let mut arrival = Arrival::new(SOURCE.into(), offer("c"));
    arrival.state = State::Prepared { nursery: None, store, held: Box::new(Waits(runs.clone())), wire: None };
    let entry = Entry::new(arrival);
    lock(&agent.desk.0).insert(ID, entry.clone());
    (agent, entry, runs)
}

#[test]
fn a_source_that_may_be_alive_keeps_the_decision_whatever_the_administrator_says() {
    let dir = tempfile::tempdir().unwrap();
    let (_, entry, _) = arrived(dir.path(), &forward());
    for (sight, word) in [
        (Sight::Answers(Answer::Fate(Fate::Undecided)), "goes on by itself"),
        (Sight::Odd("version 9".into()), "version 9"),
        (Sight::Elsewhere(vec!["10.0.0.3:7477".into()]), "answers 10.0.0.3:7477"),
    ] {
        for sure in [false, true] {
            let why = allowed(&entry, &sight, sure).unwrap_err();
            assert!(why.contains(SOURCE) && why.contains(word), "{why}");
        }
    }
    let silence = Sight::Silence("no route".into());
    let why = allowed(&entry, &silence, false).unwrap_err();
    for word in ["no route", "--source-is-gone", "two copies", "Nothing was changed"] {
        assert!(why.contains(word), "{word}: {why}");
    }
    assert_eq!(allowed(&entry, &silence, true), Ok(()));
}

#[test]
fn only_what_has_arrived_as_a_whole_can_be_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, entry, _) = arrived(dir.path(), &forward());
    assert_eq!(onward(&lock(&entry.arrival)), Ok(forward()));
    std::fs::remove_file(Store::place(&agent.config.state_dir, ID).join(ONWARD)).unwrap();
    assert!(onward(&lock(&entry.arrival)).unwrap_err().contains(ONWARD));
    let dir_of_it = Store::place(&agent.config.state_dir, ID);
    let bytes = forward().to_bytes().unwrap();
    for (bytes, word) in [
        (&bytes[..bytes.len() - 1], "cannot be read"),
        (&[bytes.as_slice(), &[0]].concat(), "1 bytes follow"),
        (&[&[1], &bytes[1..]].concat(), "version 1"),
        (&[], "cannot be read"),
    ] {
        std::fs::write(dir_of_it.join(ONWARD), bytes).unwrap();
        let why = onward(&lock(&entry.arrival)).unwrap_err();
        assert!(why.contains(word) && why.contains(ONWARD), "{why}");
    }
    let gathering = Arrival::new(SOURCE.into(), offer("c"));
    assert!(onward(&gathering).unwrap_err().contains("gone with it"));
    keep(dir.path(), &[]).unwrap();
    assert!(!dir.path().join(ONWARD).exists(), "nothing for nothing");
}

#[test]
fn what_was_decided_is_on_disk_without_the_peers_that_are_gone_and_the_source_cannot_undo_it() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, entry, _) = arrived(dir.path(), &forward());
    assert!(!happened(&agent, ID));
    let (record, forward) = decide(&agent, ID, &entry).unwrap();
    assert_eq!(agent.records.read(ID).unwrap(), Some(record.clone()));
    assert_eq!((record.kind, record.state, record.to.as_str()), (Kind::TakeOver, Recorded::Committed, SOURCE));
    assert_eq!(record.peers, [("10.0.0.3:7477".to_owned(), vec!["db".to_owned()])]);
    assert_eq!(forward.plan.peers().len(), 1, "the one on the source's host is gone");
    assert!(happened(&agent, ID));
    let listed = agent.taking_part();
    assert_eq!((listed.len(), listed[0].state.as_str()), (1, "committed"), "once: {listed:?}");
    let from = Some(SocketAddr::from(([10, 0, 0, 1], 50000)));
    for order in [Order::Abandon, Order::Holds] {
        let why = obey(&agent, from, ID, order).unwrap_err().to_string();
        assert!(why.contains("take the container over"), "{why}");
    }
    assert!(matches!(lock(&entry.arrival).state, State::Prepared { .. }));
}

#[test]
fn one_that_was_lost_after_all_is_not_in_the_way_of_a_source_that_has_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let (agent, entry, _) = arrived(dir.path(), &forward());
    let (record, _) = decide(&agent, ID, &entry).unwrap();
    // As after a restart of this host.
    lock(&agent.desk.0).clear();
    std::fs::remove_dir_all(Store::place(&agent.config.state_dir, ID)).unwrap();
    super::super::revived::go_on(&agent, record, &Cancel::default());
    assert!(!happened(&agent, ID));
    let from = Some(SocketAddr::from(([10, 0, 0, 1], 50000)));
    assert_eq!(obey(&agent, from, ID, Order::Holds), Ok(Answer::Has(false)));
}

#[test]
fn the_tasks_run_and_the_source_is_told_when_it_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let mut forward = forward();
    // No shim answers in a test.
    (forward.states, forward.plan) = (Vec::new(), Plan::default());
    let (agent, entry, runs) = arrived(dir.path(), &forward);
    let request = RecoverRequest { container: "c".into(), destination_is_gone: false, source_is_gone: false };
    let cancel = Cancel::default();
    // This agent has no certificates, so nobody can be asked, which is no silence.
    let refused = try_take_over(&agent, &request, &cancel, &Silent).unwrap().unwrap_err();
    assert!(refused.contains("cannot be taken for gone"), "{refused}");
    let (record, _) = decide(&agent, ID, &entry).unwrap();
    super::super::revived::go_on(&agent, record, &cancel);
    assert!(runs.load(Ordering::Relaxed));
    let record = agent.records.read(ID).unwrap().unwrap();
    assert_eq!((record.state, record.told), (Recorded::Finished, false));
    assert!(agent.desk.get(ID).is_none());
    let from = Some(SocketAddr::from(([10, 0, 0, 1], 50000)));
    for order in [Order::Commit, Order::Adopt, Order::Abandon, Order::Holds] {
        assert!(obey(&agent, from, ID, order).is_err(), "its source goes on without knowing");
    }
    let told = agent.taking_part();
    let [one] = &told[..] else { panic!("{told:?}") };
    assert!(one.over && one.state == "taken over" && one.other == SOURCE, "{one:?}");
    assert!(try_take_over(&agent, &request, &cancel, &Silent).is_none(), "it is over");
    assert_eq!(recover::fate(&agent, ID), Fate::Finished);
}

struct Silent;

impl Progress for Silent {
    fn event(&self, _: crate::agent::admin::Event) {}
}
