//! By command, on the source of a migration that has committed: its destination is gone for good, an administrator
//! says, and the container is to run here again, from the image that is kept until the migration has ended.
//!
//! Nothing of this happens by itself. A host that is dead and one that cannot be reached look alike from here, and in
//! the second case the container may be running there: only a person can know, or switch it off. What can be known is
//! asked first, of the destination and of every other agent that may reach it.
//!
//! The decision is once more a record, flushed to disk ([`State::TakenBack`]). Before it nothing has changed. After it
//! everybody who asks hears that the container was taken back: peers go on with QPs that end as those of a dead host's
//! peers do, and a destination that comes back kills what it has ([`super::forsaken`]). Then the container is
//! restored as `restore --disconnected` does it ([`super::revive`]). If that fails the image stays, and the same
//! command tries again.

use std::collections::BTreeSet;
use std::collections::hash_map::Entry;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use serde::{Deserialize, Serialize};

use super::by_hand::Clerk;
use super::forward::{Forward, kill_what_is_left};
use super::gone::{self, ANSWER, Sight};
use super::host::Container;
use super::revive::{self, Found, RestoreRequest};
use super::source::End;
use super::world::World;
use super::{Cancel, Progress, take_over};
use crate::agent::admin::Event;
use crate::agent::{Agent, chain, lock};
use crate::at_once::at_once;
use crate::memory_image;
use crate::net::client::CallError;
use crate::net::msg::{Answer, Order};
use crate::record::{Kind, Record, State};

/// How long it is tried in a row to tell the other end, about as long as until the next series of tries,
const TELL: Duration = Duration::from_secs(25);

/// and the time between two tries.
const BETWEEN: Duration = Duration::from_secs(1);

/// Until whoever works on the migration has stopped; it may wait for the destination's silence, and for peers.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why.
const STOPS: &str = "an administrator takes the container back, because its destination is gone";

/// Between two looks whether it has.
const LOOK: Duration = Duration::from_millis(100);

/// What an administrator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecoverRequest {
    /// Its name, or the id of its migration, where more than one had that name.
    pub container: String,
    /// The administrator is sure; otherwise it is only explained.
    #[serde(default)]
    pub destination_is_gone: bool,
    /// The same, on a destination.
    #[serde(default)]
    pub source_is_gone: bool,
}

/// What an administrator who looks on can do, if it comes to that.
pub fn hint(container: &str) -> String {
    format!("if its destination is gone for good, see `migrrdma recover {container}`")
}

/// Whether the destination has the container, as far as can be found out.
#[derive(Debug, PartialEq, Eq)]
enum Heard {
    /// It answers, and has it.
    Holds,
    /// It answers, and has nothing of it: it was restarted.
    Lost,
    /// It, or something in its place, is there, and this is what is odd about it.
    Odd(String),
    /// It does not answer here, but it answers these.
    Elsewhere(Vec<String>),
    /// It answers nobody.
    Silence(String),
}

impl From<Sight> for Heard {
    fn from(sight: Sight) -> Self {
        match sight {
            Sight::Answers(Answer::Has(true)) => Heard::Holds,
            Sight::Answers(Answer::Has(false)) => Heard::Lost,
            Sight::Answers(_) => Heard::Odd("it answers with something else".into()),
            Sight::Odd(why) => Heard::Odd(why),
            Sight::Elsewhere(by) => Heard::Elsewhere(by),
            Sight::Silence(why) => Heard::Silence(why),
        }
    }
}

/// Why the container is not restored here now, if it is not.
fn allowed(record: &Record, heard: &Heard, sure: bool) -> Result<(), String> {
    let Record { container, to, .. } = record;
    match heard {
        Heard::Holds => Err(format!(
            "its destination {to} answers, and has it: the migration goes on by itself; see `migrrdma status` on both \
             hosts"
        )),
        Heard::Lost if record.resumed => Err(format!(
            "its destination {to} answers; the container had gone on there, and the migration ends by itself"
        )),
        Heard::Lost => Ok(()),
        Heard::Odd(why) => Err(gone::odd(&format!("its destination {to}"), why)),
        Heard::Elsewhere(by) => Err(gone::elsewhere(&format!("its destination {to}"), by)),
        Heard::Silence(_) if sure => Ok(()),
        Heard::Silence(why) => {
            let ran =
                if record.resumed { "the container has gone on there" } else { "the container may have run there" };
            Err(format!(
                "its destination {to} does not answer: {why}. If that host is gone for good, `migrrdma recover \
                 {container} --destination-is-gone` gives the migration up and restores the container here, as it \
                 was when it was stopped for its move; its RDMA connections to other containers come up broken, and \
                 these see a dead host. If it is not gone, {ran}: then there are two copies until it hears of this \
                 one and kills its own, and what it did there is lost. Be sure, and switch that host off. \
                 Nothing was changed"
            ))
        }
    }
}

/// A migration of this host that has committed and not ended, or was taken back and not restored yet.
fn is_open(record: &Record) -> bool {
    let taken_back = record.state == State::TakenBack && !record.plan.is_null();
    record.kind == Kind::Migration && (record.state == State::Committed || taken_back)
}

/// The one of that container, or of that id.
fn find(records: Vec<Record>, name: &str) -> Result<Record, String> {
    let mut open: Vec<Record> =
        records.into_iter().filter(|r| is_open(r) && (r.container == name || r.id == name)).collect();
    match open.len() {
        0 => Err("no migration of it from this host has committed and not ended; see `migrrdma status`".into()),
        1 => Ok(open.remove(0)),
        _ => {
            let ids: Vec<String> = open.iter().map(|r| format!("{} to {}", r.id, r.to)).collect();
            Err(format!("more than one migration of that name has not ended ({}); name the id instead", ids.join(", ")))
        }
    }
}

fn ask(agent: &Agent, id: MigrationId, record: &Record) -> Heard {
    gone::look(agent, id, &record.to, &Order::Holds, record.peers.iter().map(|(at, _)| at)).into()
}

/// While it lives nobody else works on the migration.
pub(super) struct Slot<'a> {
    agent: &'a Agent,
    id: MigrationId,
}

impl<'a> Slot<'a> {
    /// An error if another command of this kind works on it: that one is not stopped, and what it will do makes this one
    /// needless.
    pub(super) fn is_free(agent: &Agent, id: MigrationId) -> Result<(), String> {
        match lock(&agent.running).get(&id) {
            Some(worker) if worker.is_deaf() => {
                Err(format!("another `migrrdma recover` works on {id} at this moment; see what it says"))
            }
            _ => Ok(()),
        }
    }

    /// Whoever works on it still tries to reach the destination, and stops.
    pub(super) fn take(agent: &'a Agent, id: MigrationId, why: &str, cancel: &Cancel) -> Result<Self, String> {
        let until = Instant::now() + PATIENCE;
        loop {
            match lock(&agent.running).entry(id) {
                Entry::Vacant(free) => {
                    free.insert(Arc::new(Cancel::deaf()));
                    return Ok(Slot { agent, id });
                }
                Entry::Occupied(at) => at.get().give_up(why),
            }
            if let Some(why) = cancel.why() {
                return Err(why);
            }
            if Instant::now() >= until {
                return Err(format!("somebody still works on {id} after {} s; try again", PATIENCE.as_secs()));
            }
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        lock(&self.agent.running).remove(&self.id);
    }
}

/// The whole conversation with the program that asked.
pub fn recover(
    agent: &Arc<Agent>,
    request: &RecoverRequest,
    cancel: &Arc<Cancel>,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) {
    let end = try_recover(agent, request, cancel, clerk, progress);
    progress.event(end.unwrap_or_else(|why| End::Refused(vec![why])).into());
}

fn try_recover(
    agent: &Arc<Agent>,
    request: &RecoverRequest,
    cancel: &Arc<Cancel>,
    clerk: &Arc<dyn Clerk>,
    progress: &dyn Progress,
) -> Result<End, String> {
    let (records, _) = agent.records.all().map_err(|e| chain(&e))?;
    let seen = match find(records, &request.container) {
        Ok(seen) => seen,
        Err(none) => {
            return take_over::try_take_over(agent, request, cancel, progress).unwrap_or(Err(none));
        }
    };
    if request.source_is_gone {
        return Err("this host is the source itself; it is the destination that may be gone".into());
    }
    let id = seen.id().ok_or_else(|| format!("{:?} is no id of a migration", seen.id))?;
    Slot::is_free(agent, id)?;
    let note = |text: String| progress.event(Event::Note { text });
    let sure = request.destination_is_gone;
    if seen.state == State::Committed {
        allowed(&seen, &ask(agent, id, &seen), sure)?;
    }
    let _slot = Slot::take(agent, id, STOPS, cancel)?;
    let found = agent.records.read(id).map_err(|e| chain(&e))?;
    let mut record = found.filter(is_open).ok_or("its migration has ended meanwhile; see `migrrdma status`")?;
    let kept = Kept::look(agent, id, &record)?;
    if record.state == State::Committed {
        // It may have come back while the others were told to stop.
        let heard = ask(agent, id, &record);
        allowed(&record, &heard, sure)?;
        kept.salvage(agent)?;
        kept.check(agent)?;
        cancel.why().map_or(Ok(()), Err)?;
        give_up(agent, id, &mut record, &heard)?;
        note(format!(
            "the migration to {} is given up, and container {} belongs to this host",
            record.to, record.container
        ));
        tell_peers(agent, id, &record).into_iter().for_each(note);
    } else {
        kept.check(agent)?;
    }
    let RestoreRequest { container, images, bundle, .. } = kept.request.clone();
    progress.event(Event::Kept { container, images, bundle });
    let end = revive::conduct(agent, &kept.request, &kept.found, cancel, clerk, progress);
    let again = format!("its image is kept, and `migrrdma recover {}` tries again", record.container);
    Ok(match end {
        End::Done(summary) => {
            close(agent, id, record).unwrap_or_else(note);
            End::Done(summary)
        }
        End::Refused(mut reasons) => {
            reasons.push(again);
            End::Refused(reasons)
        }
        End::Undone { phase, why, left, .. } => {
            End::Undone { phase, why: format!("{why}; {again}"), left, again: None }
        }
        other => other,
    })
}

/// Nothing of it has to be tried again.
fn close(agent: &Agent, id: MigrationId, record: Record) -> Result<(), String> {
    let written = agent.records.write(&Record { plan: serde_json::Value::Null, ..record });
    let _ = fs::remove_dir_all(outgoing(agent, id));
    written.map_err(|e| chain(&e))
}

/// A restore has ended well whose agent was restarted in the middle of it; of this one, if it was taken back.
pub(super) fn restored_later(agent: &Agent, id: MigrationId, cancel: &Cancel) {
    let open = || agent.records.read(id).map_err(|e| chain(&e)).map(|r| r.filter(|r| r.state == State::TakenBack));
    let closed = || match open()? {
        Some(record) if is_open(&record) => {
            // Whoever still tells the destination writes the record, too.
            let _slot = Slot::take(agent, id, STOPS, cancel)?;
            open()?.map_or(Ok(()), |record| close(agent, id, record))
        }
        _ => Ok(()),
    };
    if let Err(why) = closed() {
        eprintln!("{id}: {why}");
    }
}

/// Where its image is kept.
fn outgoing(agent: &Agent, id: MigrationId) -> PathBuf {
    agent.config.state_dir.join("outgoing").join(id.to_string())
}

/// What is left of the container here.
struct Kept {
    base: PathBuf,
    container: Container,
    found: Found,
    request: RestoreRequest,
}

impl Kept {
    fn look(agent: &Agent, id: MigrationId, record: &Record) -> Result<Self, String> {
        let forward: Forward =
            serde_json::from_value(record.plan.clone()).map_err(|e| format!("the record of {id} is damaged: {e}"))?;
        let container = forward.container.clone().ok_or_else(|| format!("the record of {id} names no container"))?;
        let base = outgoing(agent, id);
        let images = base.join("images");
        if !images.is_dir() {
            return Err(format!("its image {} is not there any more", images.display()));
        }
        let peers = record.peers.iter().map(|(at, _)| at.clone()).collect();
        let found = Found::kept(&images, id, forward, peers, &agent.config.name)?;
        let (bundle, disconnected) = (container.bundle.clone(), true);
        let request = RestoreRequest { container: record.container.clone(), images, bundle, disconnected };
        Ok(Kept { base, container, found, request })
    }

    /// What is not in the image yet is put there. Then nothing stays of the container but that, as after any
    /// migration: if this one goes on after all, it has less to clean.
    fn salvage(&self, agent: &Agent) -> Result<(), String> {
        let Container { id, init, .. } = &self.container;
        if agent.host.container(id).is_ok_and(|now| now.init != *init) {
            return Err(format!("another container {id} runs here by now; delete it first"));
        }
        kill_what_is_left(&self.container);
        save_memory(&self.base, &self.found.memory_files(), agent.host.memory_files(id).as_deref())?;
        agent.host.forget(&self.container).map_err(|e| format!("removing what is left of it here: {e}"))
    }

    /// Nothing speaks against a restore here.
    fn check(&self, agent: &Agent) -> Result<(), String> {
        let problems = self.found.problems(agent, &self.request);
        if problems.is_empty() { Ok(()) } else { Err(problems.join("; ")) }
    }
}

/// A migration sends registered memory by itself, so its image has none. The files have been as they are since the
/// container was stopped; now they become part of the image that lies in `base`.
fn save_memory(base: &Path, needed: &BTreeSet<String>, dir: Option<&Path>) -> Result<(), String> {
    let images = base.join("images");
    if memory_image::is_in(&images) {
        return Ok(());
    }
    let lost = missing(needed, dir);
    if !lost.is_empty() {
        return Err(format!(
            "its registered memory lay in files that are not there any more ({}): this host was restarted, or the \
             container deleted",
            lost.join(", ")
        ));
    }
    let Some(dir) = dir else { return Ok(()) };
    // Aside first: a file that was cut must not be taken for all of it.
    let aside = base.join("memory");
    let save = || -> Result<(), String> {
        fs::create_dir_all(&aside).map_err(|e| format!("cannot make {}: {e}", aside.display()))?;
        memory_image::save(dir, &aside).map_err(|e| chain(&e))?;
        if !memory_image::is_in(&aside) {
            return Ok(());
        }
        let to = images.join(memory_image::NAME);
        fs::rename(aside.join(memory_image::NAME), &to).map_err(|e| format!("cannot write {}: {e}", to.display()))
    };
    let saved = save();
    let _ = fs::remove_dir_all(&aside);
    saved
}

/// Files that are needed and not in the directory.
fn missing(needed: &BTreeSet<String>, dir: Option<&Path>) -> Vec<String> {
    needed.iter().filter(|name| !dir.is_some_and(|dir| dir.join(name).is_file())).cloned().collect()
}

/// The decision.
fn give_up(agent: &Agent, id: MigrationId, record: &mut Record, heard: &Heard) -> Result<(), String> {
    record.state = State::TakenBack;
    record.why = Some(match heard {
        Heard::Lost => format!("{} had lost it", record.to),
        _ => format!("{} was gone, an administrator said", record.to),
    });
    if let Err(e) = agent.records.write(record) {
        // What a reader finds decides, as everywhere.
        let now = agent.records.read(id).ok().flatten();
        if now.is_none_or(|now| now.state != State::TakenBack) {
            return Err(chain(&e));
        }
    }
    Ok(())
}

/// Those that cannot be told.
fn tell_peers(agent: &Agent, id: MigrationId, record: &Record) -> Vec<String> {
    let wait = Duration::from_secs(agent.config.deadlines.answer);
    let tell = |at: &str| {
        let order = Order::TakenBack { container: record.container.clone() };
        let failed = agent.call(at, Some(id), order, wait).err()?;
        Some(format!("a peer was not told and will ask: {}", chain(&failed)))
    };
    let deaf = at_once(&record.peers, |(at, _)| tell(at)).into_iter().flatten().collect();
    World::let_go(agent, id);
    deaf
}

/// A destination that comes back asks, after a while; and it may not know that there is anything to ask: it had
/// finished, and its answer was lost. A source that comes back does what its record says. So it is tried again and again
/// to tell them, and what they have of the container lives no longer than a few seconds. Called every now and then, until
/// it was heard.
pub(super) fn tell_other_end(agent: &Arc<Agent>, mut record: Record, cancel: &Cancel) {
    let Some(id) = record.id() else { return };
    let until = Instant::now() + TELL;
    while !cancel.is_given_up() && Instant::now() < until {
        if tell_once(agent, id, &record) {
            record.told = true;
            if let Err(e) = agent.records.write(&record) {
                eprintln!("{}", chain(&e));
            }
            return;
        }
        thread::sleep(BETWEEN);
    }
}

/// Whether it has heard it by now.
pub(super) fn tell_once(agent: &Agent, id: MigrationId, record: &Record) -> bool {
    let container = record.container.clone();
    let (order, what) = match record.kind {
        Kind::TakeOver => (Order::TakenOver { container }, "over"),
        _ => (Order::TakenBack { container }, "back"),
    };
    match agent.call(&record.to, Some(id), order, ANSWER) {
        Ok(_) => {}
        Err(e) => {
            // One that is silent is silent, as it was.
            if matches!(e, CallError::Refused { .. }) {
                eprintln!("{id}: {}", chain(&e));
            }
            return false;
        }
    }
    eprintln!("{id} of container {}: {} knows that it was taken {what}", record.container, record.to);
    let mut news = agent.moved.all();
    news.retain(|process| process.container == record.container);
    if record.kind == Kind::TakeOver
        && let Err(e) = agent.call(&record.to, Some(id), Order::Moved(news), ANSWER)
    {
        // It asks its way through.
        eprintln!("{id}: {}", chain(&e));
    }
    true
}

#[cfg(test)]
#[path = "take_back_tests.rs"]
mod tests;
