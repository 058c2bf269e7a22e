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
