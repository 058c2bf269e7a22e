//! Everything a source has to do with, scripted: what is true of it, and one step that may fail, with or without having
//! had its effect. Two copies that run, or a container killed without a decision, are noticed at once.

use super::super::*;
use crate::agent::config::{Config, Deadlines};
use crate::agent::connecting::End as Unconnected;
use crate::agent::metrics::Metrics;
use crate::agent::procs::Process;
use crate::agent::under_way::UnderWay;
use crate::engine::blocks::BLOCK;
use crate::engine::fixture::{DST, mr, process, qp};
use crate::engine::host::{DumpJob, Held, Host, HostError, Nursery, PreDumpJob, RestoreJob};
use crate::engine::world::OwnShim;
use crate::likeness::Likeness;
use crate::net::msg::{BornMr, BornQp, End as FarShim, FarEnd, MemoryBlocks, MovedProcess};
use crate::record::Records;
use rdma_virt::id::{ObjId, PGid, PQpn, PRkey, VQpn, VRkey};
use rdma_virt::msg::{Count, KeyTable};
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

pub const ID: MigrationId = MigrationId([7; 16]);

/// Everything there is, as it really is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Truth {
    pub frozen: bool,
    pub killed: bool,
    pub link_down: bool,
    /// Own shim.
    pub away: bool,
    pub suspended: bool,
    pub held: bool,
    /// Peer.
    pub claimed: bool,
    pub peer_suspended: bool,
    pub second: bool,
    pub switched: bool,
    /// Destination.
    pub offered: bool,
    pub prepared: bool,
    pub running: bool,
    pub adopted: bool,
    /// The source has decided, before this step.
    pub decided: bool,
    /// The new QP has a number; the peer's second one is connected to it.
    pub born: bool,
    pub connected: bool,
    /// The process' MR is left for its shim to register.
    pub late_mr: bool,
    pub there_resumed: bool,
    pub forgotten: bool,
    /// The directory of its registered memory; a page of each file changes when the process is about to be frozen.
    pub memory: Option<PathBuf>,
    /// What the destination has of it, by file.
    pub copy: BTreeMap<String, Vec<u8>>,
    /// Somebody has connected to an unconnected QP; seen once.
    pub half_open: bool,
    /// The destination says nothing any more.
    pub silent: bool,
    /// The peer's process ends when it is asked for a second QP,
    pub mortal: bool,
    /// and has ended.
    pub peer_ended: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The step does nothing and says so.
    Before,
    /// The step happens, but nobody hears of it.
    After,
}

/// Steps so far, the one that fails, and the story.
pub type Steps = (usize, Option<(usize, Fault)>, Vec<String>);

pub struct Fake {
    pub truth: Arc<Mutex<Truth>>,
    pub steps: Arc<Mutex<Steps>>,
    pub records: Records,
    pub config: Config,
    pub under_way: UnderWay,
    pub metrics: Metrics,
    pub _dir: tempfile::TempDir,
}

impl Fake {
    pub fn new(fault: Option<(usize, Fault)>) -> Self {
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
pub struct Script {
    pub truth: Arc<Mutex<Truth>>,
    pub steps: Arc<Mutex<Steps>>,
    pub records: Records,
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
        let decided =
            || self.records.read(ID).unwrap().is_some_and(|r| matches!(r.state, State::Committed | State::Finished));
        let mut truth = self.truth.lock().unwrap();
        truth.decided = decided();
        let result = effect(&mut truth);
        let committed = decided();
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

    fn call_and_meanwhile(
        &self,
        at: &str,
        id: MigrationId,
        order: Order,
        _: Duration,
        sent: &mut dyn FnMut(),
    ) -> Result<Answer, CallError> {
        assert_eq!(id, ID);
        let name = order.name();
        let refused = |why: String| {
            let (at, refusal) = (at.to_owned(), Refusal::Failed(why));
            CallError::Refused { at, order: name, refusal }
        };
        if at == "dst" && self.truth.lock().unwrap().silent {
            return Err(refused("it is silent".into()));
        }
        let what = if let Order::Relay { request, .. } = &order { crate::agent::shims::verb(request) } else { name };
        let answered = self.script().step(&format!("{at}: {what}"), |t| {
            if let Order::Relay { request, .. } = &order {
                t.peer_ended |= t.mortal && matches!(request, Request::Prepare { .. });
                if t.peer_ended {
                    return None;
                }
            }
            Some(answer(t, order))
        });
        sent();
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

pub fn state() -> ProcessState {
    let mut state = process(7, vec![qp(1, 17, Some(30))]);
    state.contexts[0].mrs = vec![mr(5, 0x1000, 64)];
    state
}

/// What destination and peer do.
pub fn answer(t: &mut Truth, order: Order) -> Answer {
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
            Request::Switch { tables, .. } => {
                assert!(t.decided && t.connected, "peers change over only to what is there");
                assert!(t.adopted || !t.late_mr, "nobody knows the key yet");
                assert_eq!(tables, [keys()]);
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
        Order::Memory { files } => {
            t.copy = files.into_iter().map(|f| (f.name, vec![0; f.len as usize])).collect();
            Answer::Done
        }
        Order::Blocks(list) => {
            assert!(!t.decided, "the destination has all memory before it is decided");
            for MemoryBlocks { file, first, runs, bytes, .. } in list {
                let (copy, mut bytes) = (t.copy.get_mut(&file).expect("announced"), &bytes[..]);
                for (at, count) in runs {
                    let (at, len) = ((first as usize + at as usize) * BLOCK, count as usize * BLOCK);
                    copy[at..at + len].copy_from_slice(&bytes[..len]);
                    bytes = &bytes[len..];
                }
            }
            Answer::Done
        }
        Order::Offer { .. } => {
            t.offered = true;
            Answer::Offered { problems: Vec::new() }
        }
        Order::Incubate { .. } => {
            assert!(!t.running, "an incubator makes objects before the process is there");
            t.born = true;
            let known = BornMr { vpid: Vpid(7), context: ObjId(1), mr: ObjId(5), prkey: PRkey(0x50) };
            let mrs = if t.late_mr { Vec::new() } else { vec![known] };
            Answer::Incubated { qps: vec![born()], gids: Vec::new(), mrs }
        }
        Order::Rebuild { links } => {
            assert!(t.running, "a process that does not run makes no objects");
            assert_eq!(links[0].remote.pqpn, PQpn(55), "connected to the peer's second QP");
            (t.born, t.adopted) = (true, true);
            Answer::Rebuilt { qps: vec![born()], gids: Vec::new(), keys: vec![(Vpid(7), keys())] }
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
            Answer::Adopted { keys: vec![(Vpid(7), keys())] }
        }
        Order::Abandon => {
            assert!(!t.running, "nothing is taken back after the decision");
            (t.offered, t.prepared) = (false, false);
            Answer::Done
        }
        _ => Answer::Done,
    }
}

/// What the process' MR is called at its new place.
fn keys() -> KeyTable {
    KeyTable(vec![(VRkey(5), PRkey(0x50))])
}

pub fn born() -> BornQp {
    let (vpid, context, qp) = (Vpid(7), ObjId(1), ObjId(1));
    BornQp { vpid, context, qp, vqpn: VQpn(17), pqpn: PQpn(40), pgid: PGid(DST) }
}

pub struct FakeWire(Script);
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
        self.step("freeze", |t| {
            for file in t.memory.iter().flat_map(|dir| std::fs::read_dir(dir).unwrap()) {
                let file = std::fs::OpenOptions::new().write(true).open(file.unwrap().path()).unwrap();
                std::os::unix::fs::FileExt::write_all_at(&file, &[9; BLOCK], 3 * BLOCK as u64).unwrap();
            }
            t.frozen = true;
        })
        .map_err(HostError)
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
        self.truth.lock().unwrap().memory.clone()
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
