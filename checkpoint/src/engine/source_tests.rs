//! The source against a scripted world in which any single step fails, with or without having had its effect: the
//! container always runs at exactly one place, and nobody stays suspended.

use super::*;
use crate::agent::config::{Config, Deadlines};
use crate::agent::connecting::End as Unconnected;
use crate::agent::metrics::Metrics;
use crate::agent::procs::Process;
use crate::agent::under_way::UnderWay;
use crate::engine::fixture::{DST, process, qp};
use crate::engine::host::{DumpJob, Held, Host, HostError, Nursery, PreDumpJob, RestoreJob};
use crate::engine::world::OwnShim;
use crate::likeness::Likeness;
use crate::net::msg::{BornQp, End as FarShim, FarEnd, MovedProcess};
use crate::record::Records;
use proptest::prelude::*;
use rdma_virt::id::{ObjId, PGid, PQpn, VQpn};
use rdma_virt::msg::{Count, KeyTable};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

const ID: MigrationId = MigrationId([7; 16]);

/// Everything there is, as it really is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Truth {
    frozen: bool,
    killed: bool,
    link_down: bool,
    /// Own shim.
    away: bool,
    suspended: bool,
    held: bool,
    /// Peer.
    claimed: bool,
    peer_suspended: bool,
    second: bool,
    switched: bool,
    /// Destination.
    offered: bool,
    prepared: bool,
    running: bool,
    adopted: bool,
    /// The new QP has a number; the peer's second one is connected to it.
    born: bool,
    connected: bool,
    there_resumed: bool,
    forgotten: bool,
    /// Somebody has connected to an unconnected QP; seen once.
    half_open: bool,
    /// The destination says nothing any more.
    silent: bool,
    /// The peer's process ends when it is asked for a second QP,
    mortal: bool,
    /// and has ended.
    peer_ended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The step does nothing and says so.
    Before,
    /// The step happens, but nobody hears of it.
    After,
}

/// Steps so far, the one that fails, and the story.
type Steps = (usize, Option<(usize, Fault)>, Vec<String>);

struct Fake {
    truth: Arc<Mutex<Truth>>,
    steps: Arc<Mutex<Steps>>,
    records: Records,
    config: Config,
    under_way: UnderWay,
    metrics: Metrics,
    _dir: tempfile::TempDir,
}

impl Fake {
    fn new(fault: Option<(usize, Fault)>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let deadlines = Deadlines {
            answer: 1,
            silence: 5,
            busy: 1,
            drain: 1,
            restore: 1,
            reconnect: 1,
            forward: 3,
            orphan: 1,
            session: 1,
            parked: 1,
        };
        let config = Config { state_dir: dir.path().into(), deadlines, ..Config::default() };
        let records = Records::open(dir.path()).unwrap();
        let steps = Arc::new(Mutex::new((0, fault, Vec::new())));
        let (under_way, metrics) = (UnderWay::default(), Metrics::default());
        Fake { truth: Arc::default(), steps, records, config, under_way, metrics, _dir: dir }
    }

    fn script(&self) -> Script {
        let committed = self.records.clone();
        Script { truth: self.truth.clone(), steps: self.steps.clone(), records: committed }
    }
}

/// The shared heart of world and host.
#[derive(Clone)]
struct Script {
    truth: Arc<Mutex<Truth>>,
    steps: Arc<Mutex<Steps>>,
    records: Records,
}

impl Script {
    /// One step of the world; `Err` is what the caller hears.
    fn step<T>(&self, name: &str, effect: impl FnOnce(&mut Truth) -> T) -> Result<T, String> {
        let fault = {
            let mut s = self.steps.lock().unwrap();
            s.2.push(name.into());
            s.0 += 1;
            s.1.filter(|(at, _)| *at + 1 == s.0).map(|(_, fault)| fault)
        };
        if fault == Some(Fault::Before) {
            return Err(format!("{name} failed"));
        }
        let mut truth = self.truth.lock().unwrap();
        let result = effect(&mut truth);
        let committed =
            self.records.read(ID).unwrap().is_some_and(|r| matches!(r.state, State::Committed | State::Finished));
        assert!(!truth.running || committed, "runs there without a decision, after {name}");
        assert!(!truth.killed || committed, "killed here without a decision, after {name}");
        assert!(!truth.running || truth.frozen || truth.killed, "two copies run, after {name}");
        if fault == Some(Fault::After) { Err(format!("{name} went unheard")) } else { Ok(result) }
    }
}

impl World for Fake {
    fn under_way(&self) -> &UnderWay {
        &self.under_way
    }
    fn metrics(&self) -> &Metrics {
        &self.metrics
    }
    fn host(&self) -> Arc<dyn Host> {
        Arc::new(self.script())
    }
    fn records(&self) -> &Records {
        &self.records
    }
    fn config(&self) -> &Config {
        &self.config
    }
    fn destination(&self, to: &str) -> Result<String, String> {
        Ok(to.into())
    }
    fn agent_of(&self, _: PGid) -> String {
        "peer".into()
    }
    fn shims(&self, _: &str) -> Vec<OwnShim> {
        vec![OwnShim { vpid: Vpid(7), comm: "app".into(), pid: 700 }]
    }
    fn processes(&self, _: &Container) -> io::Result<Vec<Process>> {
        let (pid, vpid, comm) = (700, Vpid(7), "app".into());
        Ok(vec![Process { pid, vpid, comm, verbs: vec![3], cm: false }])
    }
    fn lease(&self, _: &str) -> Result<Lease, String> {
        Ok(Lease { first: 1 << 20, count: 1 })
    }

    fn call(&self, at: &str, id: MigrationId, order: Order, _: Duration) -> Result<Answer, CallError> {
        assert_eq!(id, ID);
        let name = order.name();
        let refused = |why: String| {
            let (at, refusal) = (at.to_owned(), Refusal::Failed(why));
            CallError::Refused { at, order: name, refusal }
        };
        if at == "dst" && self.truth.lock().unwrap().silent {
            return Err(refused("it is silent".into()));
        }
        let answered = self.script().step(&format!("{at}: {name}"), |t| {
            if let Order::Relay { request, .. } = &order {
                t.peer_ended |= t.mortal && matches!(request, Request::Prepare { .. });
                if t.peer_ended {
                    return None;
                }
            }
            Some(answer(t, order))
        });
        let ended = || CallError::Refused { at: at.to_owned(), order: name, refusal: Refusal::Absent("ended".into()) };
        answered.map_err(refused)?.ok_or_else(ended)
    }

    fn shim(
        &self,
        _: &str,
        vpid: Vpid,
        _: Option<MigrationId>,
        request: Request,
        _: Duration,
    ) -> Result<Reply, ShimError> {
        let what = crate::agent::shims::verb(&request);
        let broken = |why| ShimError::Broken { who: "app".into(), what, why };
        let reply = self.script().step(&format!("own: {what}"), |t| {
            if t.away || t.frozen {
                return Err("it is not there".to_owned());
            }
            Ok(match request {
                Request::Report => Reply::State(Box::new(state())),
                Request::Suspend { .. } => {
                    t.suspended = true;
                    Reply::Suspended { counts: vec![Count { vqpn: VQpn(17), sent: 1, received: 1 }] }
                }
                Request::Drain { .. } => Reply::Drained,
                Request::Freeze => {
                    t.away = true;
                    Reply::State(Box::new(state()))
                }
                Request::Abort => {
                    t.suspended = false;
                    Reply::GoesOn { held: 0 }
                }
                other => panic!("{other:?} to the moving process"),
            })
        });
        assert_eq!(vpid, Vpid(7));
        reply.and_then(|r| r).map_err(broken)
    }

    fn reconnected(&self, _: &str, vpids: &[Vpid], _: Duration) -> Result<(), Vec<Vpid>> {
        let away = self.truth.lock().unwrap().away;
        if away { Err(vpids.to_vec()) } else { Ok(()) }
    }

    fn disconnected(&self, _: &str, _: &[Vpid], _: Duration) -> Result<(), Vec<Vpid>> {
        assert!(self.truth.lock().unwrap().away);
        Ok(())
    }

    fn bump(&self, _: &str) -> io::Result<()> {
        // Shims notice only when they run.
        let mut t = self.truth.lock().unwrap();
        t.away &= t.frozen;
        Ok(())
    }

    fn hold(&self, _: MigrationId, _: &str) -> Result<(), MigrationId> {
        self.truth.lock().unwrap().held = true;
        Ok(())
    }
    fn let_go(&self, _: MigrationId) {
        self.truth.lock().unwrap().held = false;
    }
    fn is_young(&self) -> bool {
        false
    }
    fn half_open(&self, _: MigrationId, _: &str, _: &[Unconnected], hold: bool) -> Option<String> {
        let half_open = &mut self.truth.lock().unwrap().half_open;
        (hold && std::mem::take(half_open)).then(|| "somebody has connected to it".into())
    }
    fn left(&self, _: &str, _: &[MovedProcess]) -> Result<(), String> {
        Ok(())
    }
}

fn state() -> ProcessState {
    process(7, vec![qp(1, 17, Some(30))])
}

/// What destination and peer do.
fn answer(t: &mut Truth, order: Order) -> Answer {
    match order {
        Order::Find { links } if t.peer_ended => Answer::Found(vec![FarEnd::Gone; links.len()]),
        Order::Find { links } => {
            let (container, comm) = ("p".to_owned(), "peer".to_owned());
            let end = FarShim { container, vpid: Vpid(9), comm, vqpn: VQpn(30), connected: true };
            Answer::Found(vec![FarEnd::Shim(end); links.len()])
        }
        Order::Claim { .. } => {
            t.claimed = true;
            Answer::Done
        }
        Order::Release { committed } => {
            if t.claimed && !committed {
                (t.peer_suspended, t.second) = (false, false);
            }
            t.claimed = false;
            Answer::Done
        }
        Order::Relay { request, .. } => Answer::Shim(match request {
            Request::Prepare { .. } => {
                t.second = true;
                Reply::Prepared { qps: vec![(VQpn(30), PQpn(55))] }
            }
            Request::Suspend { .. } => {
                t.peer_suspended = true;
                Reply::Suspended { counts: vec![Count { vqpn: VQpn(30), sent: 1, received: 1 }] }
            }
            Request::Drain { .. } => Reply::Drained,
            Request::Connect { links } => {
                assert!(t.born && t.second && links[0].remote_qpn == PQpn(40), "connected only to what is there");
                t.connected = true;
                Reply::Done
            }
            Request::Switch { .. } => {
                assert!(t.running && t.adopted && t.connected, "peers change over only to what is there");
                (t.switched, t.second) = (true, false);
                Reply::Done
            }
            Request::Resume => {
                assert!(t.switched && t.adopted, "nobody goes on before everybody is ready");
                // The same request serves both ends here.
                (t.peer_suspended, t.there_resumed) = (false, true);
                Reply::GoesOn { held: 0 }
            }
            _ => Reply::Done,
        }),
        Order::Offer { .. } => {
            t.offered = true;
            Answer::Offered { problems: Vec::new() }
        }
        Order::Incubate { .. } => {
            assert!(!t.running, "an incubator makes objects before the process is there");
            t.born = true;
            Answer::Incubated { qps: vec![born()], gids: Vec::new(), mrs: 0 }
        }
        Order::Rebuild { links } => {
            assert!(t.running, "a process that does not run makes no objects");
            assert_eq!(links[0].remote.pqpn, PQpn(55), "connected to the peer's second QP");
            (t.born, t.adopted) = (true, true);
            Answer::Rebuilt { qps: vec![born()], gids: Vec::new(), keys: vec![(Vpid(7), KeyTable::default())] }
        }
        Order::Restore { .. } => {
            t.prepared = true;
            Answer::Done
        }
        Order::Commit => {
            assert!(t.prepared);
            t.running = true;
            Answer::Done
        }
        Order::Holds => Answer::Has(t.running),
        Order::Adopt => {
            t.adopted = true;
            Answer::Adopted { keys: vec![(Vpid(7), KeyTable::default())] }
        }
        Order::Abandon => {
            assert!(!t.running, "nothing is taken back after the decision");
            (t.offered, t.prepared) = (false, false);
            Answer::Done
        }
        _ => Answer::Done,
    }
}

fn born() -> BornQp {
    let (vpid, context, qp) = (Vpid(7), ObjId(1), ObjId(1));
    BornQp { vpid, context, qp, vqpn: VQpn(17), pqpn: PQpn(40), pgid: PGid(DST) }
}

struct FakeWire(Script);
impl Wire for FakeWire {
    fn down(&mut self) -> crate::engine::host::Result<()> {
        self.0.step("link down", |t| t.link_down = true).map_err(HostError)
    }
    fn up(&mut self) -> crate::engine::host::Result<()> {
        self.0.truth.lock().unwrap().link_down = false;
        Ok(())
    }
    fn announce(&mut self) -> crate::engine::host::Result<()> {
        Ok(())
    }
}

impl Host for Script {
    fn containers(&self) -> crate::engine::host::Result<Vec<Container>> {
        Ok(Vec::new())
    }
    fn container(&self, id: &str) -> crate::engine::host::Result<Container> {
        let (cgroup, bundle) = ("/nonexistent".into(), "/b".into());
        Ok(Container { id: id.into(), init: 1, cgroup, bundle, paused: false })
    }
    fn freeze(&self, _: &Container) -> crate::engine::host::Result<()> {
        self.step("freeze", |t| t.frozen = true).map_err(HostError)
    }
    fn thaw(&self, _: &Container) -> crate::engine::host::Result<()> {
        self.truth.lock().unwrap().frozen = false;
        Ok(())
    }
    fn lost(&self, _: &Container) -> crate::engine::host::Result<Vec<String>> {
        Ok(Vec::new())
    }
    fn dump(
        &self,
        _: &Container,
        job: &DumpJob,
        gate: &mut dyn FnMut() -> Result<(), String>,
    ) -> crate::engine::host::Result<()> {
        std::fs::write(job.images.join("core-1.img"), "x").unwrap();
        self.step("dump", |t| assert!(t.frozen && t.link_down)).map_err(HostError)?;
        gate().map_err(HostError)?;
        self.step("kill", |t| t.killed = true).map_err(HostError)
    }
    fn pre_dump(&self, _: &Container, job: &PreDumpJob) -> crate::engine::host::Result<()> {
        std::fs::write(job.images.join("pages-1.img"), "x").unwrap();
        self.step("pre-dump", |t| assert!(!t.frozen && !t.suspended, "rounds are for a container that runs"))
            .map_err(HostError)
    }
    fn examine(&self, _: &str, _: Option<&Path>) -> Vec<String> {
        Vec::new()
    }
    fn tools(&self) -> Vec<String> {
        Vec::new()
    }
    fn localise(&self, _: &Path) -> crate::engine::host::Result<()> {
        Ok(())
    }
    fn rootfs(&self, _: &Path) -> crate::engine::host::Result<PathBuf> {
        Ok("/".into())
    }
    fn injected(&self, _: &Path) -> Vec<PathBuf> {
        Vec::new()
    }
    fn memory_files(&self, _: &str) -> Option<PathBuf> {
        None
    }
    fn make_memory_files(&self, _: &str) -> crate::engine::host::Result<PathBuf> {
        Err(HostError("not here".into()))
    }
    fn drop_memory_files(&self, _: &str) {}
    fn likenesses(&self, _: &str) -> crate::engine::host::Result<Vec<Likeness>> {
        Ok(Vec::new())
    }
    fn show(&self, _: &str, _: &[Likeness]) -> crate::engine::host::Result<()> {
        Err(HostError("not here".into()))
    }
    fn show_no_more(&self, _: &str) {}
    fn remove_restored(&self, _: &str, _: &Path) -> crate::engine::host::Result<bool> {
        Ok(false)
    }
    fn incubate(&self, _: &str, _: &Path, _: &Path) -> crate::engine::host::Result<Box<dyn Nursery>> {
        Err(HostError("not here".into()))
    }
    fn restore(&self, _: &RestoreJob) -> crate::engine::host::Result<Box<dyn Held>> {
        Err(HostError("not here".into()))
    }
    fn held_at(&self, _: &Path) -> crate::engine::host::Result<Option<Box<dyn Held>>> {
        Ok(None)
    }
    fn forget(&self, _: &Container) -> crate::engine::host::Result<()> {
        self.step("forget", |t| t.forgotten = true).map_err(HostError)
    }
    fn wire(&self, _: &Path, _: Option<i32>) -> crate::engine::host::Result<Option<Box<dyn Wire>>> {
        Ok(Some(Box::new(FakeWire(self.clone()))))
    }
    fn gone_to(&self, _: &str, _: Option<&str>) {}
    fn criu(&self) -> crate::engine::host::Result<u32> {
        Ok(40101)
    }
}

struct Quiet;
impl Progress for Quiet {
    fn event(&self, _: Event) {}
}

fn request(pre_setup: bool, hand_over: Option<HandOver>) -> MigrateRequest {
    MigrateRequest {
        container: "m".into(),
        to: "dst".into(),
        dry_run: false,
        pre_setup,
        pre_copy_rounds: pre_setup.then_some(2),
        max_blackout: None,
        copy_rootfs: false,
        hand_over,
        drain: None,
    }
}

fn run(fake: &Fake, pre_setup: bool, cancel: &Cancel) -> End {
    Run::new(fake, ID, &request(pre_setup, None), cancel, &Quiet).run()
}

fn run_by(fake: &Fake, hand_over: HandOver) -> End {
    Run::new(fake, ID, &request(true, Some(hand_over)), &Cancel::default(), &Quiet).run()
}

/// What must hold however it ended.
fn check(fake: &Fake, end: &End) {
    let t = fake.truth.lock().unwrap().clone();
    let record = fake.records.read(ID).unwrap().map(|r| r.state);
    let log = &fake.steps.lock().unwrap().2;
    let story = format!("{end:?}\n{t:?}\n{log:?}");
    match end {
        End::Done(_) => {
            assert_eq!(record, Some(State::Finished), "{story}");
            assert!(t.running && t.there_resumed && t.switched, "{story}");
            assert!(!t.peer_suspended && !t.held, "{story}");
        }
        End::Unfinished { .. } => {
            assert_eq!(record, Some(State::Committed), "{story}");
            assert!(t.frozen || t.killed, "{story}");
        }
        End::Undone { left, .. } => {
            assert!(!matches!(record, Some(State::Committed | State::Finished)), "{story}");
            assert!(!t.frozen && !t.killed && !t.running && !t.link_down && !t.away && !t.held, "{story}");
            // A step of the undoing itself that failed is told, and made up for when the other side asks.
            if left.is_empty() {
                let peer_waits = t.claimed || t.peer_suspended || t.second;
                assert!(!t.suspended && !peer_waits && !t.offered && !t.prepared, "{story}");
            }
        }
        End::Refused(_) | End::Possible => {
            assert!(!t.frozen && !t.suspended && !t.peer_suspended && !t.held && !t.running, "{story}");
        }
    }
}

#[test]
fn without_a_failure_it_moves_and_nobody_stays_suspended() {
    for pre_setup in [true, false] {
        let fake = Fake::new(None);
        let end = run(&fake, pre_setup, &Cancel::default());
        check(&fake, &end);
        let End::Done(summary) = end else { panic!("{end:?}") };
        assert_eq!((summary.qps_moved, summary.qps_switched), (1, 1));
        assert!(summary.pause_seconds.unwrap() >= summary.frozen_seconds.unwrap());
        assert!(fake.truth.lock().unwrap().forgotten);
    }
}

#[test]
fn a_connection_in_the_making_is_let_come_about_before_the_next_attempt() {
    let fake = Fake::new(None);
    fake.truth.lock().unwrap().half_open = true;
    let end = run(&fake, true, &Cancel::default());
    check(&fake, &end);
    let End::Undone { phase: Phase::Freeze, again: Some(Again::HalfOpen), why, .. } = &end else { panic!("{end:?}") };
    assert!(why.contains("in the making"), "{why}");
    assert_eq!(end.outcome(), Some(Outcome::Busy));
    let end = run(&fake, true, &Cancel::default());
    check(&fake, &end);
    assert!(matches!(end, End::Done(_)), "{end:?}");
}

/// Does something as a phase begins.
struct At<F: Fn() + Sync>(Phase, F);

impl<F: Fn() + Sync> Progress for At<F> {
    fn event(&self, event: Event) {
        if matches!(event, Event::Enter { phase } if phase == self.0) {
            (self.1)();
        }
    }
}

#[test]
fn a_committed_one_that_is_given_up_stops_where_it_is_and_its_image_and_record_stay() {
    let (fake, cancel, request) = (Fake::new(None), Arc::new(Cancel::default()), request(true, None));
    let silence = At(Phase::Commit, || fake.truth.lock().unwrap().silent = true);
    let begun = std::time::Instant::now();
    let end = thread::scope(|scope| {
        scope.spawn(|| {
            while fake.records.read(ID).unwrap().is_none_or(|r| r.state != State::Committed) {
                thread::sleep(Duration::from_millis(10));
            }
            cancel.give_up("an administrator takes the container back");
        });
        Run::new(&fake, ID, &request, &cancel, &silence).run()
    });
    check(&fake, &end);
    let End::Unfinished { phase: Phase::Commit, why } = &end else { panic!("{end:?}") };
    assert!(why.contains("takes the container back"), "{why}");
    assert!(begun.elapsed() < Duration::from_secs(fake.config.deadlines.forward), "it did not try to the last");
    assert!(fake.config.state_dir.join("outgoing").join(ID.to_string()).join("images/core-1.img").exists());
}

#[test]
fn a_destination_that_was_restarted_is_not_taken_for_one_that_has_finished() {
    let (fake, cancel, request) = (Fake::new(None), Cancel::default(), request(true, None));
    let restart = At(Phase::Finish, || fake.truth.lock().unwrap().running = false);
    let end = Run::new(&fake, ID, &request, &cancel, &restart).run();
    let End::Unfinished { phase: Phase::Finish, why } = &end else { panic!("{end:?}") };
    assert!(why.contains("`migrrdma recover m`"), "{why}");
    let record = fake.records.read(ID).unwrap().unwrap();
    assert_eq!((record.state, record.resumed), (State::Committed, false));
    assert!(fake.config.state_dir.join("outgoing").join(ID.to_string()).exists(), "the image is all there is");
}

/// A restore, as far as new objects are made and connected; where they are connected to, and what was said.
fn made_from_files(fake: &Fake) -> (Vec<PQpn>, Vec<String>) {
    struct Notes(Mutex<Vec<String>>);
    impl Progress for Notes {
        fn event(&self, event: Event) {
            if let Event::Note { text } = event {
                self.0.lock().unwrap().push(text);
            }
        }
    }
    let (request, cancel, notes) = (request(true, None), Cancel::default(), Notes(Mutex::default()));
    let mut run = Run::new(fake, ID, &request, &cancel, &notes);
    run.states = vec![state()];
    let end = FarShim { container: "p".into(), vpid: Vpid(9), comm: "peer".into(), vqpn: VQpn(30), connected: true };
    run.plan.update(&run.states, |_| false, || 1);
    run.plan.found(0, "peer", &end);
    run.leave_out_departed().unwrap();
    run.make_with_those_left().unwrap();
    let joined = run.plan.joins().unwrap().iter().map(|l| l.remote.pqpn).collect();
    drop(run);
    (joined, notes.0.into_inner().unwrap())
}

#[test]
fn a_peer_that_ended_while_it_waited_or_ends_now_is_left_out_and_named() {
    let (second, old) = (PQpn(55), PQpn(30));
    let all = Fake::new(None);
    assert_eq!(made_from_files(&all), (vec![second], Vec::new()));
    let (ended, ends) = (Fake::new(None), Fake::new(None));
    ended.truth.lock().unwrap().peer_ended = true;
    ends.truth.lock().unwrap().mortal = true;
    for fake in [&ended, &ends] {
        let (joined, notes) = made_from_files(fake);
        assert_eq!(joined, [old], "it points where it did");
        let [note] = &notes[..] else { panic!("{notes:?}") };
        assert!(note.contains("peer (pid 9 of container p at peer)") && note.contains("dead remote"), "{note}");
        assert!(!fake.truth.lock().unwrap().connected);
    }
}

#[test]
fn a_peer_that_cannot_be_asked_has_not_ended() {
    let fake = Fake::new(None);
    // Not in the report, and no answer either.
    let (request, cancel) = (request(true, None), Cancel::default());
    let mut run = Run::new(&fake, ID, &request, &cancel, &Quiet);
    run.states = vec![state()];
    run.plan.update(&run.states, |_| false, || 1);
    let end = FarShim { container: "q".into(), vpid: Vpid(9), comm: "peer".into(), vqpn: VQpn(30), connected: true };
    run.plan.found(0, "peer", &end);
    fake.steps.lock().unwrap().1 = Some((1, Fault::Before));
    let stop = run.leave_out_departed().unwrap_err();
    assert!(matches!(stop, Stop::Failed(_)), "{stop:?}");
    assert_eq!(run.plan.peers().len(), 1);
}

#[test]
fn onlookers_see_each_phase_and_what_it_came_to() {
    let fake = Fake::new(None);
    let seen = fake.under_way.begin(ID, "m", Role::Source, "dst");
    let stage = || fake.under_way.courses()[0].1.stage;
    let end = run(&fake, true, &Cancel::default());
    assert_eq!((end.outcome(), stage()), (Some(Outcome::Finished), Stage::In(Phase::Finish)));
    let count = |phase: Phase| {
        let start = format!("migrrdma_phase_duration_seconds_count{{phase=\"{phase}\"}} ");
        let page = fake.metrics.page();
        page.lines().find_map(|l| l.strip_prefix(&start)).unwrap().to_owned()
    };
    for phase in Phase::ALL {
        assert_eq!(count(phase), if phase == Phase::Copy { "0" } else { "1" }, "{phase}");
    }
    drop(seen);

    let early = Cancel::default();
    early.set("Ctrl-C");
    let fake = Fake::new(None);
    let _seen = fake.under_way.begin(ID, "m", Role::Source, "dst");
    let end = run(&fake, true, &early);
    assert_eq!((end.outcome(), fake.under_way.courses()[0].1.stage), (Some(Outcome::Undone), Stage::Undoing));
}

#[test]
fn objects_are_made_by_whom_it_was_asked_and_the_summary_says_so() {
    for (wish, told) in [(None, HandOver::Adopt), (Some(HandOver::Rebuild), HandOver::Rebuild)] {
        let fake = Fake::new(None);
        let end = Run::new(&fake, ID, &request(true, wish), &Cancel::default(), &Quiet).run();
        check(&fake, &end);
        let End::Done(summary) = end else { panic!("{end:?}") };
        assert_eq!(summary.hand_over, Some(told));
        let steps = fake.steps.lock().unwrap().2.join(" ");
        assert_eq!(steps.contains("incubate"), told == HandOver::Adopt, "{steps}");
        assert_eq!(steps.contains("rebuild"), told == HandOver::Rebuild, "{steps}");
    }
}

#[test]
fn whichever_single_step_fails_the_container_runs_at_exactly_one_place() {
    for hand_over in [HandOver::Adopt, HandOver::Rebuild] {
        any_step_fails(hand_over);
    }
}

fn any_step_fails(hand_over: HandOver) {
    let all = Fake::new(None);
    run_by(&all, hand_over);
    let steps = all.steps.lock().unwrap().0;
    assert!(steps > 25, "{steps}");
    std::thread::scope(|scope| {
        for at in 0..steps {
            for fault in [Fault::Before, Fault::After] {
                scope.spawn(move || {
                    let fake = Fake::new(Some((at, fault)));
                    let end = run_by(&fake, hand_over);
                    check(&fake, &end);
                    let committed = fake.records.read(ID).unwrap().is_some_and(|r| r.state == State::Finished);
                    // One failure after the decision is always made up for.
                    assert_eq!(matches!(end, End::Done(_)), committed, "step {at} {fault:?}: {end:?}");
                });
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_wish_to_stop_at_any_step_undoes_or_comes_too_late(at in 0_usize..40, pre_setup: bool) {
        struct Stopper<'a> { at: usize, seen: Mutex<usize>, cancel: &'a Cancel }
        impl Progress for Stopper<'_> {
            fn event(&self, _: Event) {
                let mut seen = self.seen.lock().unwrap();
                *seen += 1;
                if *seen == self.at { self.cancel.set("Ctrl-C"); }
            }
        }
        let (fake, cancel) = (Fake::new(None), Cancel::default());
        let request = request(pre_setup, None);
        let stopper = Stopper { at, seen: Mutex::new(0), cancel: &cancel };
        let end = Run::new(&fake, ID, &request, &cancel, &stopper).run();
        check(&fake, &end);
        let undone = matches!(end, End::Undone { .. });
        prop_assert!(undone || matches!(end, End::Done(_)), "{:?}", end);
    }
}
