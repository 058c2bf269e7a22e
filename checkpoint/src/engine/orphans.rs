//! Arrivals whose source has gone quiet: it is asked what became of the migration, and its answer is carried out as its
//! order would have been. Without an answer nothing that may have been decided is given up.

use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;

use super::dest::{Entry, QUIET, State, obey};
use super::revive;
use crate::agent::{Agent, chain, lock};
use crate::net::msg::{Answer, Fate, Order};

/// Asks the sources of quiet migrations what became of them. Called every now and then.
pub fn look_after(agent: &Agent) {
    let entries: Vec<(MigrationId, Entry)> = lock(&agent.desk.0).iter().map(|(id, e)| (*id, e.clone())).collect();
    for (id, entry) in entries {
        // A migration in the middle of a step is not quiet.
        let Ok(arrival) = entry.arrival.try_lock() else { continue };
        if arrival.partial().is_some() {
            drop(arrival);
            revive::look_after(agent, id, &entry);
            continue;
        }
        if arrival.heard.elapsed() < QUIET || arrival.taken_over {
            continue;
        }
        let (source, may_give_up) = (
            arrival.source.clone(),
            !matches!(arrival.state, State::Prepared { .. } | State::Running { .. })
                && arrival.heard.elapsed() > Duration::from_secs(agent.config.deadlines.orphan),
        );
        let runs = matches!(arrival.state, State::Running { .. });
        drop(arrival);
        let order = match agent.call(&source, Some(id), Order::Fate, Duration::from_secs(10)) {
            Ok(Answer::Fate(Fate::TakenBack)) => Order::TakenBack { container: entry.container.clone() },
            Ok(Answer::Fate(Fate::Aborted)) => Order::Abandon,
            Ok(Answer::Fate(Fate::Committed)) => Order::Commit,
            Ok(Answer::Fate(Fate::Finished)) if runs => Order::Finish,
            Ok(Answer::Fate(Fate::Finished)) => Order::Commit,
            Ok(_) => {
                let mut arrival = lock(&entry.arrival);
                (arrival.heard, arrival.silent) = (Instant::now(), false);
                continue;
            }
            Err(_) if may_give_up => Order::Abandon,
            Err(e) => {
                eprintln!("{id}: its source is silent: {}", chain(&e));
                let mut arrival = lock(&entry.arrival);
                arrival.silent = true;
                if runs {
                    // It waits for nothing but the end.
                    arrival.heard = Instant::now();
                }
                continue;
            }
        };
        // An administrator may have decided while it was asked.
        if lock(&entry.arrival).taken_over {
            continue;
        }
        eprintln!("{id} of container {}: {} after asking its source", entry.container, order.name());
        if let Err(e) = obey(agent, None, id, order) {
            eprintln!("{id}: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::config::Deadlines;
    use crate::engine::dest::Arrival;
    use crate::engine::fixture::{idle_agent_with, offer};
    use crate::engine::host::{Held, Result as HostResult};
    use crate::engine::store::Store;

    const ID: MigrationId = MigrationId([6; 16]);
    /// Nobody listens there.
    const SOURCE: &str = "127.0.0.1:1";

    struct Waits;

    impl Held for Waits {
        fn init(&self) -> i32 {
            1
        }
        fn release(&mut self) -> HostResult<()> {
            panic!("nobody has decided that it may run")
        }
        fn abandon(self: Box<Self>) -> HostResult<()> {
            panic!("the source may have decided that it runs here")
        }
    }

    fn quiet(agent: &Agent, state: impl FnOnce(Store) -> State) -> Entry {
        let store = Store::make(Store::place(&agent.config.state_dir, ID), 0).unwrap();
        let mut arrival = Arrival::new(SOURCE.into(), offer("c"));
        arrival.state = state(store);
        arrival.heard = Instant::now().checked_sub(QUIET * 2).unwrap();
        let entry = Entry::new(arrival);
        lock(&agent.desk.0).insert(ID, entry.clone());
        entry
    }

    #[test]
    fn what_a_source_that_is_gone_had_sent_is_dropped_and_what_is_restored_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent_with(dir.path(), Deadlines { orphan: 0, ..Deadlines::default() });
        let there = || Store::place(&agent.config.state_dir, ID).exists();

        quiet(&agent, |store| State::Gathering { nursery: None, store: Some(store) });
        assert!(there());
        look_after(&agent);
        assert!(!there() && lock(&agent.desk.0).get(&ID).is_none(), "it is kept for ever");

        let held = |store| State::Prepared { nursery: None, store, held: Box::new(Waits), wire: None };
        let entry = quiet(&agent, held);
        look_after(&agent);
        assert!(there() && lock(&entry.arrival).silent, "its status does not say that it waits");
        // The test's end is not the source's decision.
        std::mem::forget(std::mem::replace(&mut lock(&entry.arrival).state, State::Gone));
    }
}
