//! The destination of a migration that had committed, and that its source has taken back since: an administrator said
//! there that this host is gone, which was wrong, or is not true any more. The container lives at the source again, so
//! whatever of it is here ends at once: held tasks never run, running ones are killed, whether or not they have
//! finished arriving. It is known by the image it was restored from; another container of its name is left alone.
//!
//! Who decides that a container is taken back, and when, is the business of [`super::take_back`] at the source.

use rdma_virt::id::MigrationId;

use super::dest::{Arrival, State};
use super::steps::unmark;
use super::store::Store;
use crate::agent::{Agent, chain, is_plain_name};

/// Whether anything of this migration is here: an arrival in any state, or files of one.
pub(crate) fn holds(agent: &Agent, id: MigrationId) -> bool {
    agent.desk.has(id) || Store::place(&agent.config.state_dir, id).exists()
}

/// One that has finished arriving, and is no business of its migration any more, as far as this host knows.
pub(super) fn remove_finished(agent: &Agent, id: MigrationId, container: &str) -> Result<(), String> {
    if !is_plain_name(container) {
        return Err("a container's id with a slash or a leading dot".into());
    }
    remove(agent, container, &Store::again(Store::place(&agent.config.state_dir, id)))
}

/// Kills it, and takes its address off the network, where the source's copy has it now.
fn remove(agent: &Agent, container: &str, store: &Store) -> Result<(), String> {
    // Only a container that exists can say where its bundle is.
    let found = agent.host.container(container);
    if !agent.host.remove_restored(container, &store.images()).map_err(|e| e.to_string())? {
        return Ok(());
    }
    eprintln!("container {container} was taken back by the host it came from: the copy here is removed");
    agent.moved.forget_guest(container);
    if let Err(e) = found.and_then(|found| agent.host.unplug(&found.bundle, None)) {
        eprintln!("container {container}, which is gone: its network: {e}");
    }
    Ok(())
}

impl Arrival {
    /// What arrived, however far it has come. What cannot be killed stays, and is asked for again.
    pub(super) fn forsake(&mut self, agent: &Agent, id: MigrationId, state: State) -> (State, Result<(), String>) {
        let State::Running { nursery, store, held, keys } = state else {
            self.abandon(agent, state);
            return (State::Gone, Ok(()));
        };
        let container = &self.offer.container;
        // Who waits for it here learns where it is.
        agent.host.gone_to(container, Some(&self.source));
        if let Err(why) = remove(agent, container, &store) {
            return (State::Running { nursery, store, held, keys }, Err(why));
        }
        unmark(agent, container);
        if let Err(e) = store.remove() {
            eprintln!("{id}: {}", chain(&e));
        }
        agent.let_go_of(id);
        (State::Gone, Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::lock;
    use crate::engine::dest::{Entry, obey};
    use crate::engine::fixture::{idle_agent, offer};
    use crate::engine::host::{Held, Result as HostResult};
    use crate::engine::steps::mark;
    use crate::net::msg::{Answer, Lease, Order};
    use std::fs;
    use std::net::SocketAddr;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    const ID: MigrationId = MigrationId([5; 16]);

    /// Says when it is abandoned, and never lets anything run.
    struct Waits(Arc<AtomicBool>);

    impl Held for Waits {
        fn init(&self) -> i32 {
            7
        }
        fn release(&mut self) -> HostResult<()> {
            panic!("nothing may run of a container that was taken back")
        }
        fn abandon(self: Box<Self>) -> HostResult<()> {
            self.0.store(true, Ordering::Relaxed);
            Ok(())
        }
    }

    fn taken_back() -> Order {
        Order::TakenBack { container: "c".into() }
    }

    /// An agent with a guest, the image it came from, and whether the guest was abandoned before it ran.
    fn arrived(dir: &std::path::Path) -> (Arc<Agent>, Store, Arc<AtomicBool>) {
        let agent = idle_agent(dir);
        agent.moved.host_guest("c", Lease { first: 1 << 20, count: 1 }).unwrap();
        let store = Store::make(Store::place(&agent.config.state_dir, ID), 0).unwrap();
        (agent, store, Arc::default())
    }

    fn put(agent: &Agent, state: State) {
        let mut arrival = Arrival::new("10.0.0.1:1".into(), offer("c"));
        arrival.state = state;
        lock(&agent.desk.0).insert(ID, Entry::new(arrival));
    }

    fn ends(agent: &Agent) {
        assert_eq!(obey(agent, None, ID, Order::Holds), Ok(Answer::Has(true)));
        assert_eq!(obey(agent, None, ID, taken_back()), Ok(Answer::Done));
        assert!(agent.moved.guests().is_empty(), "the container is gone");
        assert!(!agent.desk.has(ID));
    }

    #[test]
    fn one_that_waits_for_its_decision_never_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, store, abandoned) = arrived(dir.path());
        let held = Box::new(Waits(abandoned.clone()));
        put(&agent, State::Prepared { nursery: None, store, held, wire: None });
        ends(&agent);
        assert!(abandoned.load(Ordering::Relaxed));
        assert_eq!(obey(&agent, None, ID, Order::Holds), Ok(Answer::Has(false)));
    }

    #[test]
    fn one_that_runs_is_killed_whatever_it_was_told_before() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, store, abandoned) = arrived(dir.path());
        agent.take_over(ID, "c", "10.0.0.1:1");
        let held = Box::new(Waits(abandoned.clone()));
        put(&agent, State::Running { nursery: None, store, held, keys: Some(Vec::new()) });
        let refused = obey(&agent, None, ID, Order::Abandon).unwrap_err().to_string();
        assert!(refused.contains("runs here already"), "an undone migration is another matter: {refused}");
        fs::write(mark(&agent, "c"), "").unwrap();
        ends(&agent);
        assert!(!mark(&agent, "c").exists());
        assert_eq!(obey(&agent, None, ID, Order::Holds), Ok(Answer::Has(false)));
        // Nobody holds its name any more.
        agent.hold_container(MigrationId([6; 16]), "c").unwrap();
    }

    #[test]
    fn a_decision_that_was_long_on_its_way_is_carried_out_only_if_its_source_still_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, store, abandoned) = arrived(dir.path());
        let held = Box::new(Waits(abandoned.clone()));
        put(&agent, State::Prepared { nursery: None, store, held, wire: None });
        let entry = lock(&agent.desk.0)[&ID].clone();
        lock(&entry.arrival).heard = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        // This agent has no certificates, so the source cannot be asked.
        let from = Some(SocketAddr::from(([10, 0, 0, 1], 50000)));
        let why = obey(&agent, from, ID, Order::Commit).unwrap_err().to_string();
        assert!(why.contains("does not confirm it"), "{why}");
        assert!(matches!(lock(&entry.arrival).state, State::Prepared { .. }), "nothing runs, and nothing is lost");
        assert!(!abandoned.load(Ordering::Relaxed));
    }

    #[test]
    fn one_that_has_finished_arriving_is_known_by_its_image_and_another_of_its_name_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, _, _) = arrived(dir.path());
        obey(&agent, None, MigrationId([9; 16]), taken_back()).unwrap();
        assert_eq!(agent.moved.guests(), ["c"], "of another migration");
        let named = Order::TakenBack { container: "../c".into() };
        assert!(obey(&agent, None, ID, named).is_err());
        ends(&agent);
    }
}
