//! Which containers take part here in migrations as peers or as arrivals, written down so that an agent that is started goes on from it:
//! a peer's held sends must go out, or its QPs change over, whatever becomes of its agent meanwhile. And telling shims
//! that nothing comes of it, those that connect late included. What else a shim is to do its source says, or is asked
//! (see [`super::peer`]).
//!
//! The file lies in the agent's run directory and ends with the host's uptime, as the shims do. A container that moves
//! away from here is not in it: its migration has a record.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, Vpid};
use rdma_virt::msg::{Reply, Request};
use serde::{Deserialize, Serialize};

use super::peer::{Claim, Why};
use super::shims::{Shim, ShimError};
use super::{Agent, LOCAL, chain, lock};
use crate::record::{read_json, replace_json_unflushed};

/// Name of the file.
const FILE: &str = "claims.json";

/// How long shims that were not connected when their container was let go are told so once they are.
const LATECOMERS: Duration = Duration::from_secs(120);

/// Who was told that a migration was undone a short while ago.
#[derive(Debug)]
pub(super) struct LetGo {
    since: Instant,
    told: BTreeSet<Vpid>,
    /// It had been decided: some have changed over to new QPs, from which no way leads back.
    decided: bool,
}

/// By container and migration: an attempt that found the container's shims still in the hands of the one before, and was
/// undone for it, must not take that one's place.
pub(super) type AllLetGo = HashMap<(String, MigrationId), LetGo>;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Held {
    container: String,
    migration: String,
    source: String,
}

fn write(dir: &Path, held: &[Held]) -> std::io::Result<()> {
    let path = dir.join(FILE);
    if held.is_empty() {
        return match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
    }
    replace_json_unflushed(&path, &held)
}

/// What the next agent has to know. Peers of this host's own migrations belong to it: they are to be told as others are.
fn worth_noting(claims: &HashMap<String, Claim>) -> Vec<Held> {
    let leaves = |c: &Claim| c.source == LOCAL && c.why == Why::Moves;
    let held = claims.iter().filter(|(_, c)| !leaves(c) && c.parked.is_none());
    let one = |(container, c): (&String, &Claim)| Held {
        container: container.clone(),
        migration: c.migration.to_string(),
        source: c.source.clone(),
    };
    held.map(one).collect()
}

fn read(dir: &Path) -> Vec<Held> {
    match read_json(&dir.join(FILE)) {
        Ok(list) => list.unwrap_or_default(),
        Err(e) => {
            eprintln!("{}", chain(&e));
            Vec::new()
        }
    }
}

impl Agent {
    /// Tells every shim of a container that its migration is undone. After a restart of this agent some may still be on
    /// their way back to it; those are told when they have come.
    pub(crate) fn let_go_on(&self, migration: MigrationId, container: &str) {
        self.let_go_so(migration, container, false);
    }

    /// The same of a migration that had been decided and has no other end any more: whatever a shim has come to, it
    /// goes on from there.
    pub(super) fn let_go_alone(&self, migration: MigrationId, container: &str) {
        self.let_go_so(migration, container, true);
    }

    fn let_go_so(&self, migration: MigrationId, container: &str, decided: bool) {
        let let_go = LetGo { since: Instant::now(), told: BTreeSet::new(), decided };
        let key = (container.to_owned(), migration);
        lock(&self.let_go).insert(key.clone(), let_go);
        self.tell_undone(&key);
    }

    /// Whatever this container was before, it is another one now.
    pub(crate) fn forget_undone(&self, container: &str) {
        lock(&self.let_go).retain(|(name, _), _| name != container);
    }

    fn tell_undone(&self, key: &(String, MigrationId)) {
        let (container, migration) = (&key.0, key.1);
        let known = lock(&self.let_go).get(key).map(|let_go| (let_go.told.clone(), let_go.decided));
        let Some((told, decided)) = known else { return };
        let ask = |shim: &Shim, request| shim.ask(Some(migration), request, self.answer_time());
        for shim in self.shims.of(container).into_iter().filter(|shim| !told.contains(&shim.vpid)) {
            let answer = match decided.then(|| ask(&shim, Request::Resume)) {
                // It has not changed over, or has no part in it.
                None | Some(Err(ShimError::Refused { .. })) => ask(&shim, Request::Abort),
                Some(answer) => answer,
            };
            match answer {
                Ok(Reply::GoesOn { held }) => self.metrics.held(held),
                Ok(other) => eprintln!("{} answered abort with {other:?}", shim.who()),
                Err(e) => {
                    eprintln!("{}", chain(&e));
                    continue;
                }
            }
            if let Some(let_go) = lock(&self.let_go).get_mut(key) {
                let_go.told.insert(shim.vpid);
            }
        }
    }

    /// Tells those that have come meanwhile. Called every now and then.
    pub(super) fn look_after_latecomers(&self) {
        lock(&self.let_go).retain(|_, let_go| let_go.since.elapsed() < LATECOMERS);
        let keys: Vec<_> = lock(&self.let_go).keys().cloned().collect();
        keys.iter().for_each(|key| self.tell_undone(key));
    }

    /// To be called with the claims as they have just become. What cannot be written is only missed by an agent that
    /// is restarted right then.
    pub(super) fn note_claims(&self, claims: &HashMap<String, Claim>) {
        if let Err(e) = write(&self.config.run_dir, &worth_noting(claims)) {
            eprintln!("{}: {e}", self.config.run_dir.join(FILE).display());
        }
    }

    /// Holds what the agent before this one held.
    pub(super) fn recall_claims(&self, before: Vec<Held>) {
        for Held { container, migration, source } in before {
            let Ok(migration) = migration.parse() else { continue };
            eprintln!("container {container} takes part in {migration} of {source}");
            // What arrived is on the desk again already.
            let why = if self.desk.bringing(&container) == Some(migration) { Why::Moves } else { Why::Peer };
            let claim = Claim::new(migration, source, why);
            lock(&self.claims).entry(container).or_insert(claim);
        }
        self.note_claims(&lock(&self.claims));
    }

    /// What the agent before this one held, to be read before anything is held anew.
    pub(super) fn held_before(&self) -> Vec<Held> {
        read(&self.config.run_dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_of_own_migrations_are_noted_and_who_leaves_is_not() {
        let claim = |source: &str, why| Claim::new(MigrationId([1; 16]), source.into(), why);
        let claims = HashMap::from([
            ("leaves".to_owned(), claim(LOCAL, Why::Moves)),
            ("its peer".to_owned(), claim(LOCAL, Why::Peer)),
            ("arrives".to_owned(), claim("10.0.0.1:1", Why::Moves)),
            ("another's peer".to_owned(), claim("10.0.0.1:1", Why::Peer)),
        ]);
        let mut noted: Vec<String> = worth_noting(&claims).into_iter().map(|h| h.container).collect();
        noted.sort();
        assert_eq!(noted, ["another's peer", "arrives", "its peer"]);
    }

    #[test]
    fn what_was_held_is_read_again_and_a_damaged_file_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()), []);
        let held =
            |name: &str| Held { container: name.into(), migration: "ab".repeat(16), source: "10.0.0.1:1".into() };
        write(dir.path(), &[held("a"), held("b")]).unwrap();
        write(dir.path(), &[held("b")]).unwrap();
        assert_eq!(read(dir.path()), [held("b")]);
        write(dir.path(), &[]).unwrap();
        assert!(!dir.path().join(FILE).exists());
        fs::write(dir.path().join(FILE), "[{").unwrap();
        assert_eq!(read(dir.path()), []);
    }
}
