//! Every migration this host takes part in, in one list: what it is there, how far it is, since when, and what it waits
//! for. For people and programs that look on; nothing is decided here.

use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use serde::{Deserialize, Serialize};

use super::peer::{Claim, QUIET, Why};
use super::sessions::Session;
use super::under_way::{Course, Role, Stage, Waiting};
use super::{Agent, LOCAL, lock};
use crate::engine::arrivals::Seen;
use crate::engine::take_back::hint;
use crate::phase::Phase;
use crate::record::{Kind, Record, State, now};

/// As many records as are shown: all that are not over, and the newest others.
const SHOWN: usize = 10;

/// The other end of what is read from or written to disk.
const IMAGE: &str = "an image";

/// One migration, as this host takes part in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Migration {
    pub id: String,
    /// The one that moves; for a peer, the one here that is connected to it.
    pub container: String,
    pub role: Role,
    /// Address of the other end's agent (a peer's is the source's), or what there is instead.
    pub other: String,
    /// Where this agent conducts it.
    pub phase: Option<Phase>,
    /// How far it is; the phase's name where there is one.
    pub state: String,
    /// Length of the phase or state so far; of one that is over, and of one whose agent was restarted, time since it
    /// began.
    pub since_seconds: f64,
    pub waits_for: Vec<Wait>,
    /// Until this host gives up or goes on by itself, where it will.
    pub left_seconds: Option<f64>,
    pub over: bool,
    /// Why it was undone, or what is the matter with it.
    pub why: Option<String>,
}

/// What is waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Wait {
    pub what: String,
    pub since_seconds: Option<f64>,
    /// Until it is not waited for any more.
    pub left_seconds: Option<f64>,
}

impl Wait {
    fn of(what: &str) -> Self {
        Wait { what: what.into(), since_seconds: None, left_seconds: None }
    }
}

impl From<Waiting> for Wait {
    fn from(w: Waiting) -> Self {
        Wait { since_seconds: Some(w.since.elapsed().as_secs_f64()), left_seconds: w.until.map(left), what: w.what }
    }
}

fn left(until: Instant) -> f64 {
    until.saturating_duration_since(Instant::now()).as_secs_f64()
}

/// Those that are known, or else what one of this kind generally waits for.
fn waits(known: Vec<Waiting>, or: Option<&str>) -> Vec<Wait> {
    if known.is_empty() { or.map(Wait::of).into_iter().collect() } else { known.into_iter().map(Wait::from).collect() }
}

/// What a phase waits for when it asks nobody: work of its own host.
fn own_work(phase: Phase) -> &'static str {
    match phase {
        Phase::Negotiate => "what is known of everybody's processes and links",
        Phase::Copy => "the bundle to be read and sent",
        Phase::PreSetup => "the new objects",
        Phase::PreCopy => "a round of memory to be dumped and sent",
        Phase::Suspend => "the record to be on disk",
        Phase::WaitBeforeStop => "what is in flight to complete",
        Phase::Freeze => "the container to stand still",
        Phase::Dump => "CRIU to write the image",
        Phase::Converge => "the new objects",
        Phase::Transfer => "the image to be read and sent",
        Phase::Restore => "CRIU to restore the container",
        Phase::Commit => "the record to be on disk",
        Phase::Switch => "the moved processes to take their objects",
        Phase::Resume => "held sends to go out",
        Phase::Finish => "what is left here to be removed",
    }
}

fn conducted(id: MigrationId, course: Course, known: Vec<Waiting>) -> Migration {
    let phase = match course.stage {
        Stage::In(phase) => Some(phase),
        Stage::Begun | Stage::Undoing => None,
    };
    let (state, or) = match course.stage {
        Stage::Begun => ("begun", None),
        Stage::In(phase) => (phase.name(), Some(own_work(phase))),
        Stage::Undoing => ("being undone", None),
    };
    Migration {
        id: id.to_string(),
        container: course.container,
        role: course.role,
        other: course.other,
        phase,
        state: state.into(),
        since_seconds: course.since.elapsed().as_secs_f64(),
        waits_for: waits(known, or),
        left_seconds: None,
        over: false,
        why: None,
    }
}

fn arriving(seen: Seen, known: Vec<Waiting>) -> Migration {
    Migration {
        id: seen.id.to_string(),
        container: seen.container,
        role: Role::Destination,
        other: seen.source,
        phase: None,
        state: seen.state,
        since_seconds: seen.since.map_or(0.0, |since| since.elapsed().as_secs_f64()),
        waits_for: waits(known, seen.waits_for),
        left_seconds: seen.until.map(left),
        over: false,
        why: seen.why,
    }
}

/// A container of ours that is connected to one that moves. `suspended` of its QPs hold their sends.
fn held(container: String, claim: &Claim, suspended: usize, known: Vec<Waiting>, orphan: Duration) -> Migration {
    let parked = claim.parked.as_ref().filter(|p| !p.is_taken());
    let other = if claim.source == LOCAL { "this host" } else { &claim.source };
    let (state, or) = match (parked, suspended) {
        (Some(_), _) => ("parked", "its image to be restored"),
        (None, 0) => ("held", "the source's next word"),
        (None, _) => ("suspended", "the source's next word"),
    };
    let silent = claim.heard.elapsed() > QUIET;
    let left_seconds = match parked {
        Some(parked) => Some(parked.left().as_secs_f64()),
        None => silent.then(|| orphan.saturating_sub(claim.since.elapsed()).as_secs_f64()),
    };
    Migration {
        id: claim.migration.to_string(),
        container,
        role: Role::Peer,
        other: if parked.is_some() { IMAGE } else { other }.into(),
        phase: None,
        state: state.into(),
        since_seconds: claim.began.elapsed().as_secs_f64(),
        waits_for: waits(known, Some(or)),
        left_seconds,
        over: false,
        why: (silent && parked.is_none()).then(|| "its source is silent".into()),
    }
}

fn pre_dumped(session: &Session, full: Duration) -> Migration {
    let left = session.until.saturating_duration_since(Instant::now());
    Migration {
        id: session.id.to_string(),
        container: session.container.clone(),
        role: Role::Source,
        other: IMAGE.into(),
        phase: None,
        state: format!("pre-dumped ({})", session.generation),
        since_seconds: full.saturating_sub(left).as_secs_f64(),
        waits_for: vec![Wait::of("its checkpoint")],
        left_seconds: Some(left.as_secs_f64()),
        over: false,
        why: None,
    }
}

/// One that was taken back is over once it is restored, though its destination may still have to hear of it.
fn is_over(record: &Record) -> bool {
    match record.state {
        State::Finished | State::Aborted => true,
        State::TakenBack => record.plan.is_null(),
        State::Started | State::Committed => false,
    }
}

/// One that nobody works on at this moment.
fn recorded(record: Record, known: Vec<Waiting>) -> Migration {
    let (over, restored) = (is_over(&record), record.plan.is_null());
    let committed = record.kind == Kind::Migration && record.state == State::Committed;
    let why = record.why.or_else(|| committed.then(|| hint(&record.container)));
    let (role, other) = match record.kind {
        Kind::Migration => (Role::Source, record.to),
        Kind::Checkpoint => (Role::Source, IMAGE.into()),
        Kind::Restore => (Role::Destination, IMAGE.into()),
        Kind::TakeOver => (Role::Destination, record.to),
    };
    let (state, or) = match record.state {
        State::Finished if record.kind == Kind::TakeOver && !record.told => {
            ("taken over", Some("its source to come back and hear of it"))
        }
        State::Started => ("started", Some("this agent to undo it, because it was not decided")),
        State::Committed => ("committed", Some("everybody to be told; it is tried again every now and then")),
        State::TakenBack if !restored => ("taken back", Some("`migrrdma recover` to restore it")),
        State::TakenBack if !record.told => ("taken back", Some("its destination to come back and hear of it")),
        State::TakenBack => ("taken back", None),
        State::Finished => ("finished", None),
        State::Aborted => ("aborted", None),
    };
    Migration {
        id: record.id,
        container: record.container,
        role,
        other,
        phase: None,
        state: state.into(),
        since_seconds: now().saturating_sub(record.began) as f64,
        waits_for: waits(known, or),
        left_seconds: None,
        over,
        why,
    }
}

/// Drops old records of what is over.
fn newest(mut records: Vec<Record>) -> Vec<Record> {
    let old = records.len().saturating_sub(SHOWN);
    let mut at = 0;
    records.retain(|r| {
        at += 1;
        at > old || !is_over(r)
    });
    records
}

impl Agent {
    /// What runs first, then what arrives, peers, and what is on disk.
    pub fn taking_part(&self) -> Vec<Migration> {
        let list = &self.under_way;
        let courses = list.courses();
        let conducts = |id: &MigrationId| courses.iter().any(|(other, _)| other == id);
        let arrivals = self.desk.list();
        let sessions = self.sessions.all();
        let mut claims: Vec<(String, Claim)> = lock(&self.claims).iter().map(|(c, x)| (c.clone(), x.clone())).collect();
        claims.retain(|(_, claim)| claim.why == Why::Peer);
        claims.sort_by(|(a, _), (b, _)| a.cmp(b));
        let records = newest(self.records.all().map(|(good, _)| good).unwrap_or_default());

        let mut all = Vec::new();
        let committed = |id: MigrationId| {
            let is_it = |r: &&Record| r.id() == Some(id);
            records.iter().find(is_it).is_some_and(|r| (r.kind, r.state) == (Kind::Migration, State::Committed))
        };
        for (id, course) in &courses {
            let mut told = conducted(*id, course.clone(), list.waits(*id));
            // No phase after the commit takes so long where everybody answers.
            if course.since.elapsed() > QUIET && committed(*id) {
                told.why = Some(hint(&course.container));
            }
            all.push(told);
        }
        // What was decided here of a container that arrives says more than how far it has come.
        let decided_here = |id: MigrationId| {
            let is_it = |r: &Record| r.id() == Some(id) && matches!(r.kind, Kind::Restore | Kind::TakeOver);
            records.iter().any(|r| is_it(r) && !is_over(r))
        };
        for seen in arrivals.into_iter().filter(|seen| !conducts(&seen.id) && !decided_here(seen.id)) {
            let known = list.waits_but_for_others(seen.id, &seen.container);
            all.push(arriving(seen, known));
        }
        let orphan = Duration::from_secs(self.config.deadlines.orphan);
        for (container, claim) in claims {
            let suspended = self.shims.of(&container).iter().map(|s| s.suspended()).sum();
            let known = list.waits_of(claim.migration, &container);
            all.push(held(container, &claim, suspended, known, orphan));
        }
        let full = Duration::from_secs(self.config.deadlines.session);
        all.extend(sessions.iter().filter(|s| !conducts(&s.id)).map(|s| pre_dumped(s, full)));
        for record in records {
            // What is told already need not be told from its record.
            let told = |id: &MigrationId| conducts(id) || sessions.iter().any(|s| s.id == *id);
            if record.id().is_none_or(|id| !told(&id)) {
                let known = record.id().map(|id| list.waits(id)).unwrap_or_default();
                all.push(recorded(record, known));
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::under_way::UnderWay;
    use crate::engine::fixture::idle_agent;
    use rdma_virt::msg::Request;
    use std::net::SocketAddr;

    const ID: MigrationId = MigrationId([1; 16]);
    const MINUTE: Duration = Duration::from_secs(60);

    #[test]
    fn a_conducted_one_tells_its_phase_and_whom_it_waits_for() {
        let list = UnderWay::default();
        let _seen = list.begin(ID, "web", Role::Source, "10.0.0.2:7477");
        list.at(ID, Stage::In(Phase::WaitBeforeStop));
        let tell = || {
            let [(id, course)] = &list.courses()[..] else { panic!("{list:?}") };
            conducted(*id, course.clone(), list.waits(*id))
        };
        assert_eq!(tell().waits_for[0].what, "what is in flight to complete");
        let drain = Request::Drain { expect: Vec::new(), deadline_ms: 1 };
        let _wait = list.wait_for_shim(Some(ID), "web", "app (pid 7 of container web)", &drain, MINUTE);
        let told = serde_json::to_value(tell()).unwrap();
        assert_eq!(told["role"], "source");
        assert_eq!(told["other"], "10.0.0.2:7477");
        assert_eq!((&told["phase"], &told["state"]), (&"wait-before-stop".into(), &"wait-before-stop".into()));
        assert_eq!(told["waits_for"][0]["what"], "app (pid 7 of container web) to drain");
        let left = told["waits_for"][0]["left_seconds"].as_f64().unwrap();
        assert!(left > 50.0 && left <= 60.0, "{left}");
        list.at(ID, Stage::Undoing);
        assert_eq!((tell().phase, tell().state.as_str()), (None, "being undone"));
    }

    #[test]
    fn a_peer_tells_whether_it_holds_its_sends_and_when_it_will_go_on_alone() {
        let mut claim = Claim::new(ID, "10.0.0.1:7477".into(), Why::Peer);
        let tell = |claim: &Claim, suspended| held("db".into(), claim, suspended, Vec::new(), 10 * MINUTE);
        let told = tell(&claim, 0);
        assert_eq!((told.role, told.other.as_str(), told.state.as_str()), (Role::Peer, "10.0.0.1:7477", "held"));
        assert_eq!((told.left_seconds, told.why), (None, None));
        assert_eq!(tell(&claim, 3).state, "suspended");
        let ago = |d: Duration| Instant::now().checked_sub(d).unwrap();
        (claim.began, claim.since, claim.heard) = (ago(MINUTE), ago(MINUTE), ago(MINUTE));
        let told = tell(&claim, 3);
        assert!(told.since_seconds >= 60.0);
        let left = told.left_seconds.unwrap();
        assert!(left > 500.0 && left <= 540.0, "{left}");
        assert_eq!(told.why.as_deref(), Some("its source is silent"));
    }

    /// The only one; with the number the page has for it.
    fn told(agent: &Agent) -> (Option<Migration>, usize) {
        let mut all = agent.taking_part();
        assert!(all.len() < 2, "{all:?}");
        let page = agent.metrics_page();
        let line = page.lines().find_map(|l| l.strip_prefix("migrrdma_migrations_under_way{role=\"peer\"} "));
        (all.pop(), line.unwrap().parse().unwrap())
    }

    fn outcomes(agent: &Agent) -> Vec<String> {
        let page = agent.metrics_page();
        let counts = page.lines().filter_map(|l| l.strip_prefix("migrrdma_migrations_total{role=\"peer\",outcome="));
        counts.filter(|l| !l.ends_with(" 0")).map(str::to_owned).collect()
    }

    #[test]
    fn a_peers_part_is_shown_from_the_claim_to_the_release_and_then_counted() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        assert_eq!(told(&agent), (None, 0));
        let from = Some(SocketAddr::from(([10, 0, 0, 1], 50000)));
        let containers = ["db".to_owned(), "cache".to_owned()];
        agent.claim(ID, from, 7477, &containers[..1]).unwrap();
        let (Some(peer), 1) = told(&agent) else { panic!("{:?}", told(&agent)) };
        assert_eq!((peer.role, peer.state.as_str(), peer.other.as_str()), (Role::Peer, "held", "10.0.0.1:7477"));
        // Two containers take part in one migration once.
        agent.claim(ID, from, 7477, &containers).unwrap();
        agent.release(ID, false);
        assert_eq!((told(&agent), outcomes(&agent)), ((None, 0), vec!["\"undone\"} 1".to_owned()]));
        // A release that is repeated, as after an answer that was lost, counts no more.
        agent.release(ID, false);
        assert_eq!(outcomes(&agent), ["\"undone\"} 1"]);
    }

    #[test]
    fn a_parked_peer_says_how_long_it_will_wait_and_is_counted_when_nobody_came() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        let from = Some(SocketAddr::from(([10, 0, 0, 1], 50000)));
        agent.claim(ID, from, 7477, &["db".to_owned()]).unwrap();
        agent.park(ID, &["db".to_owned()], 1, crate::image::Secret([1; 32]), 600).unwrap();
        let (Some(peer), 1) = told(&agent) else { panic!("{:?}", told(&agent)) };
        assert_eq!((peer.state.as_str(), peer.other.as_str()), ("parked", IMAGE));
        assert_eq!(peer.waits_for, [Wait::of("its image to be restored")]);
        assert!(peer.left_seconds.is_some_and(|left| left > 500.0 && left <= 600.0));
        agent.park(ID, &["db".to_owned()], 2, crate::image::Secret([1; 32]), 0).unwrap();
        agent.look_after_parked();
        assert_eq!((told(&agent), outcomes(&agent)), ((None, 0), vec!["\"expired\"} 1".to_owned()]));
    }

    #[test]
    fn the_container_that_moves_is_no_peer() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        agent.hold_container(ID, "web").unwrap();
        assert_eq!(told(&agent), (None, 0));
        agent.let_go_of(ID);
        assert!(outcomes(&agent).is_empty());
    }

    #[test]
    fn what_is_not_over_is_shown_however_old_it_is() {
        let record = |n: u8, state| {
            let mut record = Record::new(MigrationId([n; 16]), "c", "dst:7477");
            (record.state, record.began) = (state, u64::from(n));
            record
        };
        let mut records = vec![record(0, State::Committed), record(1, State::Aborted)];
        records.extend((2..2 + SHOWN as u8).map(|n| record(n, State::Finished)));
        let shown = newest(records);
        assert_eq!(shown.len(), SHOWN + 1);
        assert_eq!((shown[0].began, shown[1].began), (0, 2));
        let told = recorded(shown[0].clone(), Vec::new());
        assert!(!told.over && told.waits_for.len() == 1 && told.since_seconds > 1e9);
        assert!(told.why.is_some_and(|why| why.contains("`migrrdma recover c`")));
        let told = recorded(shown[1].clone(), Vec::new());
        assert!(told.over && told.waits_for.is_empty());
    }

    #[test]
    fn one_that_was_taken_back_is_over_once_it_is_restored_and_then_its_destination_is_to_hear_of_it() {
        let mut record = Record::new(ID, "c", "dst:7477");
        (record.state, record.plan) = (State::TakenBack, serde_json::json!({}));
        let tell = |record: &Record| {
            let told = recorded(record.clone(), Vec::new());
            (told.over, told.waits_for.into_iter().map(|w| w.what).collect::<String>())
        };
        assert_eq!(tell(&record), (false, "`migrrdma recover` to restore it".into()));
        record.plan = serde_json::Value::Null;
        assert_eq!(tell(&record), (true, "its destination to come back and hear of it".into()));
        record.told = true;
        assert_eq!(tell(&record), (true, String::new()));
    }
}
