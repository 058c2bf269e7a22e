//! Which migration this process takes part in, and the answer to each request. Every request may be repeated: what is
//! done already is not done again. A second migration is told who holds the process.
//!
//! What a step does is in the other modules; here is only what is legal when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use rdma_virt::msg::{Connect, FromShim, KeyTable, Reply, Request, Scope, ToShim};

use super::drain::Drained;
use super::freeze::{Epoch, Frozen};
use super::rebuild::{self, Rebuilt};
use super::wire::{Conn, WireError};
use super::{adopt, drain, freeze, note, peer, report, resume, suspend, unread};
use crate::gate;
use crate::qp::ShadowQp;
use crate::scratch;

/// What the control thread does after an answer.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait for the next request.
    Serve,
    /// The connection is of no use any more.
    Reconnect,
    /// The process is about to be written down: no connection until the epoch changes.
    AwaitEpoch(Epoch),
}

/// What a request is answered with.
enum Told {
    Reply(Reply),
    /// All that this process has.
    Everything,
}

/// Why a request was not carried out, in one sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

impl Refused {
    pub fn new(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

/// Longest time a control verb of the application may take before a request is refused because of it. Longer than a
/// question of such a verb to the agent ([`super::rpc`]).
const VERB_TIME: Duration = Duration::from_secs(6);

/// No control verb is under way while this exists: nobody destroys an object we are looking at.
#[derive(Debug)]
#[must_use]
pub struct Alone {
    thaw: bool,
}

impl Drop for Alone {
    fn drop(&mut self) {
        if self.thaw {
            gate::thaw();
        }
    }
}

/// Waits until the application is outside of all control verbs, and keeps it there. In the moving process they wait
/// anyhow, from the suspension on. (Only this thread ever shuts the gate.)
pub fn alone() -> Result<Alone, Refused> {
    if gate::is_frozen() {
        return Ok(Alone { thaw: false });
    }
    gate::freeze(Instant::now() + VERB_TIME).map_err(|inside| {
        Refused::new(format!("the application is still inside {} after {VERB_TIME:?}", inside.join(", ")))
    })?;
    Ok(Alone { thaw: true })
}

/// How long a peer stays suspended without a word from its agent. Agents give up long before; this is for a host whose
/// agent never comes back. The connections then go the way of a dead remote host's.
const PARKED: Duration = Duration::from_secs(15 * 60);

/// A migration under way.
pub struct Migration {
    pub id: MigrationId,
    /// Those that are suspended.
    pub qps: Vec<Arc<ShadowQp>>,
    /// Those that have a second QP.
    pub seconds: Vec<Arc<ShadowQp>>,
    /// What second QPs were connected to.
    pub connected: Vec<Connect>,
    /// When the agent last said something about it.
    heard: Instant,
    /// It is this process that moves: all its control verbs wait.
    pub moving: bool,
    pub drained: bool,
    pub frozen: Option<Frozen>,
    /// What was answered to `Adopt` or, without the numbers, to `Rebuild`: every object is the new one.
    pub adopted: Option<KeyTable>,
    /// How far a rebuild is.
    pub rebuilt: Option<Rebuilt>,
    /// Second QPs are in use: there is no way back.
    pub switched: bool,
}

impl Migration {
    fn new(id: MigrationId) -> Self {
        Self {
            id,
            qps: Vec::new(),
            seconds: Vec::new(),
            connected: Vec::new(),
            heard: Instant::now(),
            moving: false,
            drained: false,
            frozen: None,
            adopted: None,
            rebuilt: None,
            switched: false,
        }
    }

    fn committed(&self) -> bool {
        self.switched || self.adopted.is_some() || self.rebuilt.is_some()
    }
}

/// Sends that wait to go out.
fn held(qps: &[Arc<ShadowQp>]) -> u64 {
    qps.iter().filter(|qp| !qp.is_dead()).map(|qp| qp.progress().held as u64).sum()
}

/// The control thread's memory; survives its connections.
#[derive(Default)]
pub struct Session {
    current: Option<Migration>,
    /// The last one that ended here, so that its end can be asked for again.
    ended: Option<MigrationId>,
    /// The last one after which this process went on with new objects.
    gone_on: Option<MigrationId>,
    /// QPs whose held sends did not all fit into the queue yet.
    flushing: Vec<Arc<ShadowQp>>,
    markers: suspend::MarkerRights,
}

impl Session {
    /// Work that goes on between requests. How long to wait for the next one.
    pub fn tick(&mut self) -> Duration {
        self.flushing = resume::flush(std::mem::take(&mut self.flushing));
        // Not the moving process: whether it may run again is not for it to decide.
        if self.current.as_ref().is_some_and(|m| !m.moving && !m.committed() && m.heard.elapsed() > PARKED) {
            note(|| format!("no word of the migration under way for {PARKED:?}: it is given up"));
            if let Err(refused) = self.abort() {
                note(|| refused.to_string());
            }
        }
        if self.current.is_none() {
            self.markers.revoke_expired(Instant::now());
            unread::announce_all();
        }
        if self.flushing.is_empty() { Duration::from_secs(1) } else { Duration::from_millis(1) }
    }

    /// Answers one request. An error is the connection's, not the request's.
    pub fn answer(&mut self, asked: ToShim, conn: &Conn) -> Result<Next, WireError> {
        let is_freeze = matches!(asked.request, Request::Freeze);
        let told = match asked.migration {
            None if matches!(asked.request, Request::Report) => Ok(Told::Everything),
            None => Err(Refused::new("the request names no migration")),
            Some(id) => self.in_migration(id, asked.request, conn),
        };
        let say = |reply| FromShim { seq: asked.seq, reply };
        let refuse = |refused: Refused| Reply::Refused { why: refused.0 };
        match told {
            Ok(Told::Reply(reply)) => conn.send(&say(reply))?,
            Err(refused) => conn.send(&say(refuse(refused)))?,
            Ok(Told::Everything) => {
                // Taken before the answer: after it the agent may change the file at any time, and a dump may begin.
                let epoch = is_freeze.then(Epoch::now);
                let reported = scratch::within(|| {
                    let reply = report::process().map_or_else(refuse, |state| Reply::State(Box::new(state)));
                    let reported = matches!(reply, Reply::State(_));
                    conn.send(&say(reply)).map(|()| reported)
                })?;
                if let Some(epoch) = epoch.filter(|_| reported) {
                    return Ok(Next::AwaitEpoch(epoch));
                }
            }
        }
        Ok(Next::Serve)
    }

    /// The migration a request is about; begins it if the request may.
    fn enter(&mut self, id: MigrationId) -> &mut Migration {
        self.current.get_or_insert_with(|| Migration::new(id))
    }

    /// The migration under way, for requests that cannot begin one.
    fn under_way(&mut self) -> Result<&mut Migration, Refused> {
        self.current.as_mut().ok_or_else(|| Refused::new("no such migration is under way here"))
    }

    fn in_migration(&mut self, id: MigrationId, request: Request, conn: &Conn) -> Result<Told, Refused> {
        if matches!(request, Request::Report) {
            // Also how the agent says that a peer which waits for long is not forgotten.
            if let Some(current) = self.current.as_mut().filter(|m| m.id == id) {
                current.heard = Instant::now();
            }
            return Ok(Told::Everything);
        }
        if let Some(current) = &self.current
            && current.id != id
        {
            // Another one's abort has nothing to undo here.
            let abort = matches!(request, Request::Abort);
            return Ok(Told::Reply(if abort { Reply::GoesOn { held: 0 } } else { Reply::Busy { by: current.id } }));
        }
        if let Some(current) = &mut self.current {
            current.heard = Instant::now();
        }
        if let Some(reply) = self.repeated(id, &request) {
            return Ok(Told::Reply(reply));
        }
        let reply = match request {
            Request::Report => Err(Refused::new("answered above")),
            Request::Prepare { qps } => peer::prepare(self.enter(id), &qps),
            Request::Connect { links } => peer::connect(self.under_way()?, &links),
            Request::Suspend { scope } => self.suspend(id, &scope),
            Request::Drain { expect, deadline_ms } => {
                let migration = self.under_way()?;
                match drain::drain(migration, &expect, Duration::from_millis(deadline_ms.into()), conn) {
                    Drained::Done => Ok(Reply::Drained),
                    Drained::Stuck(qps) => Ok(Reply::Stuck { qps }),
                    Drained::Interrupted => Err(Refused::new("another request came before the drain ended")),
                }
            }
            Request::Freeze => return freeze::freeze(self.under_way()?).map(|()| Told::Everything),
            Request::Adopt(state) => adopt::adopt(self.under_way()?, &state).map(|keys| Reply::Adopted { keys }),
            Request::Rebuild(asked) => rebuild::rebuild(self.under_way()?, &asked),
            Request::Switch { links, tables } => peer::switch(self.under_way()?, &links, &tables),
            Request::Resume => self.resume(id),
            Request::Abort => self.abort(),
            Request::Unprepare => match &mut self.current {
                Some(migration) => peer::unprepare(migration),
                None => Ok(Reply::Done),
            },
        };
        reply.map(Told::Reply)
    }

    /// What an agent asks that took up a migration after another one, which had ended before it could note that everybody
    /// was told to go on: all of it is done.
    fn repeated(&self, id: MigrationId, request: &Request) -> Option<Reply> {
        if self.current.is_some() || self.gone_on != Some(id) {
            return None;
        }
        match request {
            Request::Connect { .. } | Request::Switch { .. } => Some(Reply::Done),
            Request::Rebuild(_) => Some(rebuild::made()),
            _ => None,
        }
    }

    fn suspend(&mut self, id: MigrationId, scope: &Scope) -> Result<Reply, Refused> {
        if self.current.as_ref().is_some_and(Migration::committed) {
            return Err(Refused::new("the migration has been committed: it can only be resumed"));
        }
        let began = self.current.is_none();
        // A QP still sending what an earlier suspension held goes on doing so after this one.
        let migration = self.enter(id);
        let counts = suspend::suspend(migration, scope);
        match counts {
            Ok(counts) => {
                let qps = migration.qps.clone();
                self.flushing.retain(|f| !qps.iter().any(|q| Arc::ptr_eq(q, f)));
                self.markers.grant(&qps);
                Ok(Reply::Suspended { counts })
            }
            Err(refused) => {
                if began {
                    // Nothing was held before this request: nothing may be after it.
                    self.abort()?;
                }
                Err(refused)
            }
        }
    }

    fn resume(&mut self, id: MigrationId) -> Result<Reply, Refused> {
        let Some(migration) = &mut self.current else {
            let repeated = self.ended == Some(id);
            let again = Reply::GoesOn { held: 0 };
            return if repeated { Ok(again) } else { Err(Refused::new("no such migration is under way here")) };
        };
        if !migration.committed() && !migration.qps.is_empty() {
            return Err(Refused::new("nothing was adopted or switched: the migration can only be aborted"));
        }
        if migration.rebuilt.is_some() && migration.adopted.is_none() {
            return Err(Refused::new("not every object has been made again yet"));
        }
        let qps = resume::resume(migration)?;
        let held = held(&qps);
        self.flushing.extend(qps);
        self.end();
        self.gone_on = Some(id);
        Ok(Reply::GoesOn { held })
    }

    fn abort(&mut self) -> Result<Reply, Refused> {
        let Some(migration) = &mut self.current else { return Ok(Reply::GoesOn { held: 0 }) };
        if migration.committed() {
            return Err(Refused::new("the migration has been committed: it can only be resumed"));
        }
        let undone = resume::abort(migration)?;
        let held = held(&undone.qps);
        self.flushing.extend(undone.qps);
        self.end();
        undone.result.map(|()| Reply::GoesOn { held })
    }

    fn end(&mut self) {
        self.markers.expire_at(Instant::now() + suspend::MARKERS_STAY);
        self.ended = self.current.take().map(|m| m.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId([1; 16]);

    #[test]
    fn an_agent_that_asks_once_more_hears_that_it_is_done_unless_it_was_undone() {
        let _one = gate::tests::ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let connect = Request::Connect { links: Vec::new() };
        let switch = Request::Switch { links: Vec::new(), tables: Vec::new() };
        let mut session = Session::default();
        session.enter(ID);
        assert_eq!(session.repeated(ID, &switch), None, "it is not over");
        session.resume(ID).unwrap();
        assert_eq!(session.repeated(ID, &connect), Some(Reply::Done));
        assert_eq!(session.repeated(ID, &switch), Some(Reply::Done));
        assert_eq!(session.repeated(ID, &Request::Freeze), None, "nobody asks that after the decision");
        assert_eq!(session.repeated(MigrationId([2; 16]), &switch), None, "of another one");
        session.enter(MigrationId([2; 16]));
        assert_eq!(session.repeated(ID, &switch), None, "another one has the process");

        let mut undone = Session::default();
        undone.enter(ID);
        undone.abort().unwrap();
        assert_eq!(undone.repeated(ID, &switch), None);
    }
}
