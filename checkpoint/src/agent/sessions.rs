//! Containers of this host that were pre-dumped: until their checkpoint, or until the time for it is over, their peers
//! are held for it, and partial restores elsewhere go by the session's name. It outlives the command that began it, not
//! the agent: peers that ask are told that there is no such session any more.
//!
//! What a session is for is the business of [`crate::engine::park`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;

use super::{Agent, chain, lock};
use crate::engine::forward::random;
use crate::engine::plan::Plan;
use crate::image::Secret;
use crate::net::msg::{Lease, Order};

/// One series of pre-dumps and the checkpoint at its end.
#[derive(Clone, Debug)]
pub struct Session {
    pub id: MigrationId,
    pub container: String,
    pub secret: Secret,
    /// Of the newest image; 0 before the first.
    pub generation: u64,
    pub plan: Plan,
    /// Agents that hold peers for it.
    pub claimed: BTreeSet<String>,
    pub lease: Option<Lease>,
    pub until: Instant,
}

impl Session {
    pub fn new(container: &str) -> Self {
        let mut secret = [0; 32];
        secret[..16].copy_from_slice(&random());
        secret[16..].copy_from_slice(&random());
        Session {
            id: MigrationId(random()),
            container: container.into(),
            secret: Secret(secret),
            generation: 0,
            plan: Plan::default(),
            claimed: BTreeSet::new(),
            lease: None,
            until: Instant::now(),
        }
    }
}

/// All of this host, by container.
#[derive(Debug, Default)]
pub struct Sessions(Mutex<BTreeMap<String, Session>>);

impl Sessions {
    /// Whoever takes it keeps it again, or ends it.
    pub fn take(&self, container: &str) -> Option<Session> {
        lock(&self.0).remove(container)
    }

    pub fn keep(&self, session: Session) {
        lock(&self.0).insert(session.container.clone(), session);
    }

    pub fn has(&self, id: MigrationId) -> bool {
        lock(&self.0).values().any(|s| s.id == id)
    }

    /// All that nobody has taken.
    pub fn all(&self) -> Vec<Session> {
        lock(&self.0).values().cloned().collect()
    }
}

impl Agent {
    /// Peers go on, and nobody holds the container any more.
    pub fn end_session(&self, session: &Session) {
        for at in &session.claimed {
            let order = Order::Release { committed: false };
            if let Err(e) = self.call(at, Some(session.id), order, Duration::from_secs(self.config.deadlines.answer)) {
                // It asks, and hears that there is no such session.
                eprintln!("{}: {}", session.id, chain(&e));
            }
        }
        self.let_go_of(session.id);
    }

    /// Ends sessions whose time is over or whose container is gone. Called every now and then.
    pub fn look_after_sessions(&self) {
        let over: Vec<Session> = lock(&self.sessions.0)
            .values()
            .filter(|s| s.until <= Instant::now() || self.host.container(&s.container).is_err())
            .cloned()
            .collect();
        for session in over {
            if lock(&self.sessions.0)
                .get(&session.container)
                .is_some_and(|s| s.id == session.id && s.until == session.until)
                && self.sessions.take(&session.container).is_some()
            {
                eprintln!("the pre-dump of container {} was not followed by its checkpoint", session.container);
                self.end_session(&session);
            }
        }
    }
}
