//! Containers of this host that were pre-dumped: until their checkpoint, or until the time for it is over, their peers
//! are held for it, and partial restores elsewhere go by the session's name. It outlives the command that began it, and
//! the agent: a file for each lies in the agent's state directory, and the next agent goes on from it. It does not outlive
//! the container, nor an agent that ends while a command works on the session: peers that ask are told that there is no
//! such session any more.
//!
//! What a session is for is the business of [`crate::engine::park`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use serde::{Deserialize, Serialize};

use super::{Agent, chain, is_plain_name, lock, procs};
use crate::engine::forward::random;
use crate::engine::host::Container;
use crate::engine::plan::Plan;
use crate::image::Secret;
use crate::net::msg::{Lease, Order};
use crate::record::{RecordError, make_dir, now, read_json, write_json};

/// One series of pre-dumps and the checkpoint at its end.
#[derive(Clone, Debug)]
pub struct Session {
    pub id: MigrationId,
    pub container: String,
    /// Which container of that name; not known before its first pre-dump.
    pub init: Option<Init>,
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
            init: None,
            secret: Secret(secret),
            generation: 0,
            plan: Plan::default(),
            claimed: BTreeSet::new(),
            lease: None,
            until: Instant::now(),
        }
    }
}

/// A container's first process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Init {
    pid: i32,
    /// See [`procs::began`].
    began: u64,
}

impl Init {
    pub fn of(container: &Container) -> Option<Self> {
        Some(Init { pid: container.init, began: procs::began(container.init)? })
    }
}

/// Version of the note's form.
const VERSION: u32 = 1;

/// A session as it lies on disk; its id is the file's name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    container: String,
    init: Init,
    secret: Secret,
    generation: u64,
    plan: Plan,
    claimed: BTreeSet<String>,
    lease: Option<Lease>,
    /// Seconds since 1970.
    until: u64,
}

impl Note {
    /// `None` for a session that nothing was pre-dumped in.
    fn of(session: &Session) -> Option<Self> {
        let left = session.until.saturating_duration_since(Instant::now()).as_secs();
        Some(Note {
            version: VERSION,
            container: session.container.clone(),
            init: session.init?,
            secret: session.secret,
            generation: session.generation,
            plan: session.plan.clone(),
            claimed: session.claimed.clone(),
            lease: session.lease,
            until: now() + left,
        })
    }

    /// The session, if there is still time for its checkpoint, and `most` at most: clocks jump. An error says why this
    /// is nothing to go on from.
    fn session(self, id: MigrationId, most: Duration) -> Result<Session, String> {
        if self.version != VERSION {
            return Err(format!("it has version {}, and this migrrdma knows {VERSION}", self.version));
        }
        if !is_plain_name(&self.container) {
            return Err("its container's id has a slash or a leading dot".into());
        }
        let left = Duration::from_secs(self.until.saturating_sub(now()));
        if left.is_zero() {
            return Err(format!("the pre-dump of container {} was not followed by its checkpoint", self.container));
        }
        let Note { container, init, secret, generation, plan, claimed, lease, .. } = self;
        let (init, until) = (Some(init), Instant::now() + left.min(most));
        Ok(Session { id, container, init, secret, generation, plan, claimed, lease, until })
    }
}

/// All of this host, by container.
#[derive(Debug)]
pub struct Sessions {
    dir: PathBuf,
    all: Mutex<BTreeMap<String, Session>>,
}

impl Sessions {
    /// `state_dir/sessions`, made if missing. Nothing in it is taken up yet.
    pub fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let dir = state_dir.join("sessions");
        make_dir(&dir)?;
        Ok(Sessions { dir, all: Mutex::default() })
    }

    fn path(&self, id: MigrationId) -> PathBuf {
        self.dir.join(format!("{id}.json"))
    }

    /// Whoever takes it keeps it again, or ends it.
    pub fn take(&self, container: &str) -> Option<Session> {
        let session = lock(&self.all).remove(container)?;
        remove(&self.path(session.id));
        Some(session)
    }

    /// An error says that it will not outlive this agent.
    pub fn keep(&self, session: Session) -> Result<(), RecordError> {
        let note = Note::of(&session);
        let path = self.path(session.id);
        lock(&self.all).insert(session.container.clone(), session);
        note.map_or(Ok(()), |note| write_json(&path, &note))
    }

    pub fn has(&self, id: MigrationId) -> bool {
        lock(&self.all).values().any(|s| s.id == id)
    }

    /// All that nobody has taken.
    pub fn all(&self) -> Vec<Session> {
        lock(&self.all).values().cloned().collect()
    }

    /// What the agent before this one kept. Files of sessions that are over are removed.
    fn kept(&self, most: Duration, lives: impl Fn(&Session) -> bool) -> Vec<Session> {
        let mut kept: Vec<Session> = Vec::new();
        for path in fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|e| e.path()) {
            let id = path.file_stem().and_then(|n| n.to_str()).and_then(|n| n.parse::<MigrationId>().ok());
            let note = read_json::<Note>(&path).map_err(|e| chain(&e));
            let (Some(id), Ok(Some(note))) = (id.filter(|id| self.path(*id) == path), &note) else {
                let why = note.err().unwrap_or_else(|| "its name is not a session's".into());
                eprintln!("{}: {why}", path.display());
                continue;
            };
            let session = note.clone().session(id, most).and_then(|session| {
                let name = &session.container;
                if !lives(&session) {
                    return Err(format!("container {name}, which was pre-dumped, is gone"));
                }
                if kept.iter().any(|other| other.container == *name) {
                    return Err(format!("container {name} was pre-dumped in another series too"));
                }
                Ok(session)
            });
            match session {
                Ok(session) => kept.push(session),
                Err(why) => {
                    eprintln!("{id}: {why}");
                    remove(&path);
                }
            }
        }
        kept
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => eprintln!("{}: {e}", path.display()),
        _ => {}
    }
}

impl Agent {
    /// Goes on with what the agent before this one kept, before anybody can ask for it. Those who wait for a session that
    /// is over ask, and hear it.
    pub(super) fn recall_sessions(&self) {
        let lives = |session: &Session| {
            let container = self.host.container(&session.container);
            container.is_ok_and(|found| Init::of(&found) == session.init)
        };
        for session in self.sessions.kept(Duration::from_secs(self.config.deadlines.session), lives) {
            let Session { id, container, .. } = &session;
            match self.hold_container(*id, container) {
                Ok(()) => {
                    eprintln!("{id}: container {container} was pre-dumped; its checkpoint may follow");
                    lock(&self.sessions.all).insert(container.clone(), session);
                }
                Err(by) => eprintln!("{id}: container {container} takes part in {by}; its pre-dump is over"),
            }
        }
    }

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
        let over: Vec<Session> = lock(&self.sessions.all)
            .values()
            .filter(|s| s.until <= Instant::now() || self.host.container(&s.container).is_err())
            .cloned()
            .collect();
        for session in over {
            if lock(&self.sessions.all)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::idle_agent;
    use crate::engine::recover::fate;
    use crate::net::msg::Fate;

    const MOST: Duration = Duration::from_secs(100);

    fn session(container: &str) -> Session {
        Session {
            init: Some(Init { pid: 7, began: 9 }),
            generation: 2,
            claimed: BTreeSet::from(["10.0.0.1:1".to_owned()]),
            lease: Some(Lease { first: 1 << 20, count: 4 }),
            until: Instant::now() + MOST,
            ..Session::new(container)
        }
    }

    fn open(dir: &tempfile::TempDir) -> Sessions {
        Sessions::open(dir.path()).unwrap()
    }

    fn files(dir: &tempfile::TempDir) -> usize {
        fs::read_dir(dir.path().join("sessions")).unwrap().count()
    }

    #[test]
    fn the_next_agent_goes_on_with_what_was_kept_and_not_with_what_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (sessions, kept) = (open(&dir), session("c"));
        sessions.keep(kept.clone()).unwrap();
        sessions.keep(session("other")).unwrap();
        assert!(sessions.take("other").is_some());
        let again = open(&dir).kept(MOST, |_| true);
        let [one] = &again[..] else { panic!("{again:?}") };
        let of = |s: &Session| (s.id, s.container.clone(), s.init, s.secret, s.generation, s.claimed.clone(), s.lease);
        assert_eq!(of(one), of(&kept));
        assert!(one.until > Instant::now() + MOST / 2, "its time begins anew or is lost");
    }

    #[test]
    fn a_session_whose_container_or_time_is_gone_is_over_and_no_clock_makes_it_longer() {
        let dir = tempfile::tempdir().unwrap();
        let sessions = open(&dir);
        sessions.keep(session("c")).unwrap();
        assert!(sessions.kept(MOST, |_| false).is_empty());
        assert_eq!(files(&dir), 0);
        sessions.keep(Session { until: Instant::now(), ..session("c") }).unwrap();
        assert!(sessions.kept(MOST, |_| true).is_empty());
        assert_eq!(files(&dir), 0);
        sessions.keep(Session { until: Instant::now() + MOST * 9, ..session("c") }).unwrap();
        assert!(sessions.kept(MOST, |_| true)[0].until <= Instant::now() + MOST);
    }

    #[test]
    fn after_a_restart_of_the_agent_peers_hear_that_nothing_is_decided_and_the_checkpoint_goes_on_with_the_series() {
        let dir = tempfile::tempdir().unwrap();
        let before = idle_agent(dir.path());
        let init = Init::of(&before.host.container("c").unwrap());
        let kept = Session { init, ..session("c") };
        before.sessions.keep(kept.clone()).unwrap();
        before.sessions.keep(session("another by now")).unwrap();
        let agent = idle_agent(dir.path());
        assert_eq!(fate(&agent, kept.id), Fate::Aborted);
        agent.recall_sessions();
        assert_eq!(fate(&agent, kept.id), Fate::Undecided);
        assert_eq!(agent.hold_container(MigrationId([1; 16]), "c"), Err(kept.id), "somebody else may move it");
        assert_eq!(agent.sessions.all().len(), 1);
        let taken = agent.sessions.take("c").unwrap();
        assert_eq!((taken.id, taken.secret, taken.generation), (kept.id, kept.secret, 2));
        assert_eq!(fs::read_dir(dir.path().join("state/sessions")).unwrap().count(), 0);
    }

    #[test]
    fn what_this_program_did_not_write_is_no_session_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let sessions = open(&dir);
        let good = Note::of(&session("c")).unwrap();
        fs::write(sessions.path(MigrationId([1; 16])), "{").unwrap();
        write_json(&dir.path().join("sessions/x.json"), &good).unwrap();
        assert!(sessions.kept(MOST, |_| true).is_empty());
        assert_eq!(files(&dir), 2);
        for bad in [Note { version: 2, ..good.clone() }, Note { container: "../c".into(), ..good }] {
            assert!(bad.session(MigrationId([1; 16]), MOST).is_err());
        }
    }
}
