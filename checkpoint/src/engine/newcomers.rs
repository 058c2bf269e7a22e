//! Processes that were just restored here: which of them still exist, and questions to their shims, which connect only
//! now. What the answers mean for the migration is the business of [`super::dest`] and [`super::rebuild`].

use std::sync::Arc;
use std::time::Duration;

use rdma_virt::id::{MigrationId, Vpid};
use rdma_virt::msg::{KeyTable, Reply, Request};
use rdma_virt::saved::AdoptedProcess;

use crate::agent::shims::Shim;
use crate::agent::{Agent, chain, procs};
use crate::at_once::at_once;

/// Those of the processes that still exist. One that ended after the move has nothing to take any more; its objects
/// went with it.
pub(super) fn alive<T>(agent: &Agent, container: &str, init: i32, all: Vec<T>, vpid: impl Fn(&T) -> Vpid) -> Vec<T> {
    if !procs::is_alive(init) {
        // Its pid namespace ended with it.
        return Vec::new();
    }
    // What cannot be looked into may have all of them.
    let Ok(found) = agent.host.container(container) else { return all };
    let Ok(processes) = procs::of_cgroup(&found.cgroup) else { return all };
    all.into_iter().filter(|one| processes.iter().any(|p| p.vpid == vpid(one))).collect()
}

/// Every restored process' shim takes its new objects.
pub(super) fn adopt(
    agent: &Agent,
    id: MigrationId,
    container: &str,
    adopted: Vec<AdoptedProcess>,
) -> Result<Vec<(Vpid, KeyTable)>, String> {
    let asks = adopted.into_iter().map(|a| (a.vpid, Request::Adopt(a))).collect();
    let deadline = Duration::from_secs(agent.config.deadlines.answer);
    ask_shims(agent, id, container, asks, deadline)?
        .into_iter()
        .map(|(vpid, reply)| match reply {
            Reply::Adopted { keys } => Ok((vpid, keys)),
            _ => Err(format!("pid {} answered adopt with something else", vpid.0)),
        })
        .collect()
}

/// Asks shims of restored processes, which are still connecting, at the same time. All have to answer.
pub(super) fn ask_shims(
    agent: &Agent,
    id: MigrationId,
    container: &str,
    asks: Vec<(Vpid, Request)>,
    deadline: Duration,
) -> Result<Vec<(Vpid, Reply)>, String> {
    let vpids: Vec<Vpid> = asks.iter().map(|(vpid, _)| *vpid).collect();
    let wait = Duration::from_secs(agent.config.deadlines.reconnect);
    let shims = agent.shims.wait_for(container, &vpids, wait).map_err(|missing| {
        let missing: Vec<String> = missing.iter().map(|v| v.0.to_string()).collect();
        format!("pids {} have not connected within {} s", missing.join(", "), wait.as_secs())
    })?;
    let ask = |(shim, (vpid, request)): (&Arc<Shim>, (Vpid, Request))| match shim.ask(Some(id), request, deadline) {
        Ok(reply) => Ok((vpid, reply)),
        Err(e) => Err(chain(&e)),
    };
    at_once(shims.iter().zip(asks), ask).into_iter().collect()
}
