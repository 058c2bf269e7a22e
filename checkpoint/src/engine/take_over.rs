//! By command, on the destination of a migration: its source is gone for good, an administrator says, and the container
//! is to live here, from what was restored of it.
//!
//! From the end of the restore on this host has all of the container, and what its source would have done next: that came
//! with the order to restore. Only whether it was decided is not known here, and nothing of it happens by itself: a source
//! that is dead and one that cannot be reached look alike, and one that can run may have undone the migration and let the
//! container go on.
//!
//! The decision is a record of this host ([`Kind::TakeOver`]). From there everything goes forward as a source would have
//! taken it: the tasks run, peers change over. Those on the source's own host are gone with it, and their connections with
//! them. A source that comes back is told, and ends whatever of the container it has ([`super::superseded`]).

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rdma_virt::id::MigrationId;

use super::by_hand::ByHand;
use super::dest::{Arrival, Entry, State};
use super::forward::{Forward, FromImage};
use super::gone::{self, Sight};
use super::plan::Far;
use super::source::{End, Run};
use super::take_back::{RecoverRequest, Slot};
use super::{Cancel, MigrateRequest, Progress};
use crate::agent::{Agent, LOCAL, chain, lock};
use crate::net::msg::{Order, Refusal};
use crate::record::{Kind, Record, State as Recorded, read_bytes};

/// Name of what the source would have done next, in an image's directory.
const ONWARD: &str = "onward.bin";

/// Why whoever works on it stops.
const STOPS: &str = "an administrator has the destination take the container over";

/// Keeps what came with the order to restore. It is not flushed: what is restored does not outlive this host's uptime.
pub(super) fn keep(dir: &Path, onward: &[u8]) -> Result<(), String> {
    if onward.is_empty() {
        return Ok(());
    }
    let path = dir.join(ONWARD);
    fs::write(&path, onward).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// What an administrator who looks on can do, if it comes to that.
pub(super) fn hint(container: &str) -> String {
    format!("its source is silent; if that is gone for good, see `migrrdma recover {container}`")
}

/// Whether the container of this migration was taken over here, and has not been lost since, by its record; as long as the
/// migration is at the desk [`Arrival::taken_over`] knows. A record that cannot be read may say so.
pub(super) fn happened(agent: &Agent, id: MigrationId) -> bool {
    let is_it = |r: Record| r.kind == Kind::TakeOver && r.state != Recorded::Aborted;
    agent.records.read(id).map_or(true, |record| record.is_some_and(is_it))
}

/// The source had taken the container back, and the copy here has ended for that.
pub(crate) fn was_ended(agent: &Agent, id: MigrationId) {
    let Ok(Some(record)) = agent.records.read(id) else { return };
    if record.kind == Kind::TakeOver && record.state != Recorded::Aborted {
        let why = Some(format!("{} had taken it back", record.to));
        let over = Record { state: Recorded::Aborted, plan: serde_json::Value::Null, why, ..record };
        if let Err(e) = agent.records.write(&over) {
            eprintln!("{}", chain(&e));
        }
    }
}

/// For a source that comes back and does not know of it.
pub(super) fn refusal() -> Refusal {
    Refusal::Failed("an administrator had this host take the container over while its source was gone".into())
}

/// Takes a container over that has arrived here; `None` if there is none of that name, or of that migration.
pub(super) fn try_take_over(
    agent: &Arc<Agent>,
    request: &RecoverRequest,
    cancel: &Cancel,
    progress: &dyn Progress,
) -> Option<Result<End, String>> {
    let named = || request.container.parse::<MigrationId>().ok().filter(|id| agent.desk.has(*id));
    let id = agent.desk.bringing(&request.container).or_else(named)?;
    let entry = agent.desk.get(id)?;
    Some(take_over(agent, id, &entry, request, cancel, progress))
}

fn take_over(
    agent: &Arc<Agent>,
    id: MigrationId,
    entry: &Entry,
    request: &RecoverRequest,
    cancel: &Cancel,
    progress: &dyn Progress,
) -> Result<End, String> {
    if request.destination_is_gone {
        return Err("this host is the destination itself; it is the source that may be gone".into());
    }
    Slot::is_free(agent, id)?;
    let forward = onward(&lock(&entry.arrival))?;
    let peers: Vec<String> = forward.plan.peers().into_keys().map(|peer| peer.agent).collect();
    let sight = gone::look(agent, id, &entry.source, &Order::Fate, peers.iter());
    allowed(entry, &sight, request.source_is_gone)?;
    let slot = Slot::take(agent, id, STOPS, cancel)?;
    let (record, forward) = decide(agent, id, entry)?;
    let mut world = ByHand::without_clerk(agent);
    world.origins = vec![entry.source.clone()];
    let asked = MigrateRequest::plain(&entry.container, LOCAL);
    let mut run = Run::new(&world, id, &asked, cancel, progress);
    run.go_on(record, forward);
    let ended = run.forward_again();
    let end = run.end(ended);
    drop(slot);
    Ok(end)
}

/// What the source would have done next, of an arrival that is complete.
fn onward(arrival: &Arrival) -> Result<Forward, String> {
    if arrival.by_hand.is_some() {
        return Err("it comes from an image on this host, and has no source".into());
    }
    let (State::Prepared { store, .. } | State::Running { store, .. }) = &arrival.state else {
        return Err(format!(
            "it is {} here and was never restored: if its source is gone, the container is gone with it, and what has \
             arrived is dropped after a while",
            arrival.state.name()
        ));
    };
    let path = store.dir().join(ONWARD);
    match read_bytes(&path) {
        Ok(Some(bytes)) => Forward::from_bytes(&bytes).map_err(|why| format!("{}: {why}", path.display())),
        Ok(None) => Err(format!("{} is missing: {} did not send it", path.display(), arrival.source)),
        Err(e) => Err(chain(&e)),
    }
}

/// Why the container is not taken over now, if it is not.
fn allowed(entry: &Entry, sight: &Sight, sure: bool) -> Result<(), String> {
    let Entry { container, source, .. } = entry;
    match sight {
        Sight::Answers(_) => Err(format!(
            "its source {source} answers: the migration goes on by itself, or is undone; see `migrrdma status` on both \
             hosts"
        )),
        Sight::Odd(why) => Err(gone::odd(&format!("its source {source}"), why)),
        Sight::Elsewhere(by) => Err(gone::elsewhere(&format!("its source {source}"), by)),
        Sight::Silence(_) if sure => Ok(()),
        Sight::Silence(why) => Err(format!(
            "its source {source} does not answer: {why}. If that host is gone for good, `migrrdma recover {container} \
             --source-is-gone` lets the container run here, as it was when it was stopped for its move, and connects it to \
             its peers. If it is not gone, the container may run there, because it undid the move: then there are two \
             copies until it hears of this one and kills its own, and what it did there is lost. Be sure, and switch that \
             host off. Nothing was changed"
        )),
    }
}

/// The decision, and what follows from it.
fn decide(agent: &Agent, id: MigrationId, entry: &Entry) -> Result<(Record, Forward), String> {
    // What a source that came back orders is carried out before this or after it, not at the same time.
    let mut arrival = lock(&entry.arrival);
    let mut forward = onward(&arrival)?;
    for link in &mut forward.plan.links {
        // As the source called it.
        if matches!(&link.far, Far::Peer(peer) if peer.agent == LOCAL) {
            link.far = Far::AsItWas;
        }
    }
    forward.image = Some(FromImage { series: id, origins: vec![entry.source.clone()] });
    let mut record = Record::new(id, &entry.container, &entry.source);
    (record.kind, record.state) = (Kind::TakeOver, Recorded::Committed);
    record.peers = forward.plan.peer_containers();
    record.plan = serde_json::to_value(&forward).map_err(|e| format!("the plan cannot be written down: {e}"))?;
    record.why = Some(format!("{} was gone, an administrator said", entry.source));
    if let Err(e) = agent.records.write(&record) {
        // What a reader finds decides, as everywhere.
        let now = agent.records.read(id).ok().flatten();
        if now.is_none_or(|now| now.kind != Kind::TakeOver) {
            arrival.taken_over = happened(agent, id);
            return Err(chain(&e));
        }
    }
    arrival.taken_over = true;
    drop(arrival);
    Ok((record, forward))
}

#[cfg(test)]
#[path = "take_over_tests.rs"]
mod tests;
