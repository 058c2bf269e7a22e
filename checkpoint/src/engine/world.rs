//! What the source side of the engine sees of its surroundings: the agent it runs in, or a test's scripted world.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rdma_virt::id::{MigrationId, PGid, Vpid};
use rdma_virt::msg::{Reply, Request};

use super::host::{Container, Host};
use crate::agent::config::Config;
use crate::agent::connecting::End;
use crate::agent::metrics::Metrics;
use crate::agent::procs::{self, Process};
use crate::agent::shims::ShimError;
use crate::agent::under_way::UnderWay;
use crate::agent::{Agent, facts, lock};
use crate::net::client::CallError;
use crate::net::msg::{Answer, Lease, MovedProcess, Order};
use crate::record::Records;

/// A shim of the moving container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnShim {
    pub vpid: Vpid,
    pub comm: String,
    /// In the agent's pid namespace.
    pub pid: i32,
}

/// Everything the source needs; no method may wait longer than its deadline.
pub trait World: Sync {
    fn host(&self) -> Arc<dyn Host>;
    fn records(&self) -> &Records;
    fn config(&self) -> &Config;
    /// A destination's address in its one form; an error in a sentence if it is none, or this very host.
    fn destination(&self, to: &str) -> Result<String, String>;
    fn call(&self, at: &str, migration: MigrationId, order: Order, deadline: Duration) -> Result<Answer, CallError> {
        self.call_and_meanwhile(at, migration, order, deadline, &mut || ())
    }
    /// As [`World::call`]; `sent` is run when the order is on its way, and not at all if it never is.
    fn call_and_meanwhile(
        &self,
        at: &str,
        migration: MigrationId,
        order: Order,
        deadline: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Answer, CallError>;
    fn agent_of(&self, gid: PGid) -> String;
    fn shims(&self, container: &str) -> Vec<OwnShim>;
    /// Shims that were there before this agent may not have come back to it yet.
    fn is_young(&self) -> bool;
    fn shim(
        &self,
        container: &str,
        vpid: Vpid,
        migration: Option<MigrationId>,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, ShimError>;
    /// Waits until these are connected; those that are not.
    fn reconnected(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> Result<(), Vec<Vpid>>;
    /// Waits until these have closed their connections; those that have not.
    fn disconnected(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> Result<(), Vec<Vpid>>;
    /// Changes the epoch its shims watch.
    fn bump(&self, container: &str) -> io::Result<()>;
    fn processes(&self, container: &Container) -> io::Result<Vec<Process>>;
    /// Holds the container for this migration; the one that has it already.
    fn hold(&self, migration: MigrationId, container: &str) -> Result<(), MigrationId>;
    fn let_go(&self, migration: MigrationId);
    /// Who has connected to one of these ends of the container, or is about to; with `hold`, others wait from now on until
    /// the migration lets go.
    fn half_open(&self, migration: MigrationId, container: &str, ends: &[End], hold: bool) -> Option<String>;
    /// Numbers the container's later QPs come from.
    fn lease(&self, container: &str) -> Result<Lease, String>;
    /// The container left: remember where it went.
    fn left(&self, container: &str, news: &[MovedProcess]) -> Result<(), String>;
    /// For those who look on.
    fn under_way(&self) -> &UnderWay;
    fn metrics(&self) -> &Metrics;
}

impl World for Agent {
    fn host(&self) -> Arc<dyn Host> {
        self.host.clone()
    }

    fn records(&self) -> &Records {
        &self.records
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn destination(&self, to: &str) -> Result<String, String> {
        if let Some(why) = self.no_network() {
            return Err(format!("this host has no certificates: {why}"));
        }
        let at = self.client.normalise(to).map_err(|e| crate::agent::chain(&e))?;
        let addresses = std::net::ToSocketAddrs::to_socket_addrs(at.as_str())
            .map_err(|e| format!("{to:?} is no host this one can find: {e}"))?;
        let port = self.config.port();
        if addresses.into_iter().any(|a| a.port() == port && facts::is_own_address(a.ip())) {
            return Err(format!("{to} is this very host"));
        }
        self.meet(&at);
        Ok(at)
    }

    fn call_and_meanwhile(
        &self,
        at: &str,
        migration: MigrationId,
        order: Order,
        deadline: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Answer, CallError> {
        Agent::call_and_meanwhile(self, at, Some(migration), order, deadline, sent)
    }

    fn agent_of(&self, gid: PGid) -> String {
        Agent::agent_of(self, gid)
    }

    fn shims(&self, container: &str) -> Vec<OwnShim> {
        let shims = self.shims.of(container);
        shims.iter().map(|s| OwnShim { vpid: s.vpid, comm: s.comm.clone(), pid: s.pid }).collect()
    }

    fn is_young(&self) -> bool {
        self.began.elapsed() < Duration::from_secs(self.config.deadlines.reconnect)
    }

    fn shim(
        &self,
        container: &str,
        vpid: Vpid,
        migration: Option<MigrationId>,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, ShimError> {
        self.ask_shim(container, vpid, migration, request, deadline)
    }

    fn reconnected(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> Result<(), Vec<Vpid>> {
        self.shims.wait_for(container, vpids, deadline).map(drop)
    }

    fn disconnected(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> Result<(), Vec<Vpid>> {
        self.shims.wait_gone(container, vpids, deadline)
    }

    fn bump(&self, container: &str) -> io::Result<()> {
        self.doors.bump(container)
    }

    fn processes(&self, container: &Container) -> io::Result<Vec<Process>> {
        procs::of_cgroup(&container.cgroup)
    }

    fn hold(&self, migration: MigrationId, container: &str) -> Result<(), MigrationId> {
        self.hold_container(migration, container)
    }

    fn let_go(&self, migration: MigrationId) {
        self.let_go_of(migration);
        lock(&self.connecting).let_go(migration);
    }

    fn half_open(&self, migration: MigrationId, container: &str, ends: &[End], hold: bool) -> Option<String> {
        Agent::half_open(self, migration, container, ends, hold)
    }

    fn lease(&self, container: &str) -> Result<Lease, String> {
        self.moved.lease(container).map_err(|e| crate::agent::chain(&e))
    }

    fn left(&self, container: &str, news: &[MovedProcess]) -> Result<(), String> {
        self.moved.forget_guest(container);
        self.moved.learn(news).map_err(|e| crate::agent::chain(&e))
    }

    fn under_way(&self) -> &UnderWay {
        &self.under_way
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}
