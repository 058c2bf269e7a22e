//! The shims of this host's containers: who is connected, and one question to one of them.
//!
//! A connection has a reader thread that hands each reply to whoever waits for its number, so an answer that comes
//! too late harms nobody. What the questions mean is not known here.

use std::collections::{BTreeMap, HashMap};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, Vpid};
use rdma_virt::msg::{FromShim, Reply, Request, ToShim};
use rdma_virt::saved::ProcessState;

use super::under_way::UnderWay;
use crate::net::frame::{FrameError, SHIM};

/// For writing one request: a shim that does not read is stuck.
const WRITE: Duration = Duration::from_secs(5);

/// Why a shim gave no useful answer. Every text names the process.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ShimError {
    #[error("{who} has no connection to the agent (not started with the shim, or it ended)")]
    Absent { who: String },
    #[error("{who} has ended")]
    Ended { who: String },
    #[error("the connection to {who} broke while it was asked to {what}: {why}")]
    Broken { who: String, what: &'static str, why: String },
    #[error("{who} did not answer {what} within {} s", .after.as_secs_f32())]
    Deadline { who: String, what: &'static str, after: Duration },
    #[error("{who} takes part in {by} already")]
    Busy { who: String, by: MigrationId },
    #[error("{who} cannot {what}: {why}")]
    Refused { who: String, what: &'static str, why: String },
    #[error("{who} answered {what} with something else")]
    Confused { who: String, what: &'static str },
}

/// In words, for messages.
pub fn verb(request: &Request) -> &'static str {
    match request {
        Request::Report => "report",
        Request::Prepare { .. } => "prepare",
        Request::Connect { .. } => "connect",
        Request::Suspend { .. } => "suspend",
        Request::Drain { .. } => "drain",
        Request::Freeze => "freeze",
        Request::Adopt(_) => "adopt",
        Request::Rebuild(_) => "rebuild its objects",
        Request::Switch { .. } => "switch",
        Request::Resume => "resume",
        Request::Abort => "abort",
        Request::Unprepare => "drop its second QPs",
    }
}

struct Waiting {
    seq: u64,
    slots: HashMap<u64, SyncSender<Reply>>,
    /// Why the connection is over.
    ended: Option<String>,
}

/// One connected shim.
pub struct Shim {
    pub container: String,
    pub vpid: Vpid,
    pub comm: String,
    /// In the agent's pid namespace.
    pub pid: i32,
    writer: Mutex<UnixStream>,
    waiting: Mutex<Waiting>,
    /// QPs that were told to hold their sends.
    suspended: AtomicUsize,
    under_way: Arc<UnderWay>,
    known_as: Arc<KnownAs>,
}

/// What shims know a migration as, where that is not its own name: a copy of a container remembers the series of images
/// it was made in, and what is done with the copy is another matter for everybody else.
#[derive(Debug, Default)]
pub struct KnownAs(Mutex<BTreeMap<MigrationId, MigrationId>>);

impl KnownAs {
    pub fn insert(&self, migration: MigrationId, name: MigrationId) {
        lock(&self.0).insert(migration, name);
    }

    pub fn remove(&self, migration: MigrationId) {
        lock(&self.0).remove(&migration);
    }

    fn of(&self, migration: MigrationId) -> MigrationId {
        lock(&self.0).get(&migration).copied().unwrap_or(migration)
    }
}

impl std::fmt::Debug for Shim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.who())
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shim {
    /// `ib_write_bw (pid 7 of container web)`
    pub fn who(&self) -> String {
        format!("{} (pid {} of container {})", self.comm, self.vpid.0, self.container)
    }

    /// Asks and waits. [`Reply::Busy`] and [`Reply::Refused`] come back as errors.
    pub fn ask(
        &self,
        migration: Option<MigrationId>,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, ShimError> {
        let what = verb(&request);
        let _wait = self.under_way.wait_for_shim(migration, &self.container, &self.who(), &request, deadline);
        let (tx, rx) = sync_channel(1);
        let seq = {
            let mut w = lock(&self.waiting);
            if let Some(why) = &w.ended {
                return Err(ShimError::Broken { who: self.who(), what, why: why.clone() });
            }
            w.seq += 1;
            let seq = w.seq;
            w.slots.insert(seq, tx);
            seq
        };
        let migration = migration.map(|id| self.known_as.of(id));
        let written = SHIM.write(&mut *lock(&self.writer), &ToShim { seq, migration, request });
        if let Err(e) = written {
            lock(&self.waiting).slots.remove(&seq);
            // Part of a frame may be out: nothing sensible can follow it.
            self.close();
            return Err(ShimError::Broken { who: self.who(), what, why: super::chain(&e) });
        }
        let reply = match rx.recv_timeout(deadline) {
            Ok(reply) => reply,
            Err(RecvTimeoutError::Timeout) => {
                lock(&self.waiting).slots.remove(&seq);
                return Err(ShimError::Deadline { who: self.who(), what, after: deadline });
            }
            Err(RecvTimeoutError::Disconnected) => {
                let why = lock(&self.waiting).ended.clone().unwrap_or_default();
                return Err(ShimError::Broken { who: self.who(), what, why });
            }
        };
        match reply {
            Reply::Busy { by } => Err(ShimError::Busy { who: self.who(), by }),
            Reply::Refused { why } => Err(ShimError::Refused { who: self.who(), what, why }),
            other => {
                match &other {
                    Reply::Suspended { counts } => self.suspended.store(counts.len(), Ordering::Relaxed),
                    Reply::GoesOn { .. } => self.suspended.store(0, Ordering::Relaxed),
                    _ => {}
                }
                Ok(other)
            }
        }
    }

    /// How many of its QPs were told on this connection to hold their sends, and not yet to go on.
    pub fn suspended(&self) -> usize {
        self.suspended.load(Ordering::Relaxed)
    }

    /// What it has.
    pub fn report(&self, deadline: Duration) -> Result<ProcessState, ShimError> {
        match self.ask(None, Request::Report, deadline)? {
            Reply::State(state) => Ok(*state),
            _ => Err(ShimError::Confused { who: self.who(), what: "report" }),
        }
    }

    pub fn is_connected(&self) -> bool {
        lock(&self.waiting).ended.is_none()
    }

    fn close(&self) {
        let _ = lock(&self.writer).shutdown(Shutdown::Both);
    }

    /// Hands replies out until the connection ends; how it did.
    fn read(&self, mut stream: UnixStream, large: &Mutex<()>) -> FrameError {
        let end = loop {
            match SHIM.read_when::<FromShim, _>(&mut stream, |len| (len > LARGE).then(|| lock(large))) {
                Ok(FromShim { seq, reply }) => {
                    if let Some(slot) = lock(&self.waiting).slots.remove(&seq) {
                        // Whoever waited may have given up this instant.
                        let _ = slot.try_send(reply);
                    }
                }
                Err(e) => break e,
            }
        };
        self.close();
        let mut w = lock(&self.waiting);
        w.ended = Some(match &end {
            FrameError::Closed => "it closed the connection".to_owned(),
            e => super::chain(e),
        });
        w.slots.clear();
        drop(w);
        end
    }
}

/// All connected shims of this host.
#[derive(Debug, Default)]
pub struct Shims {
    all: Mutex<BTreeMap<String, BTreeMap<Vpid, Arc<Shim>>>>,
    changed: Condvar,
    /// Per container: only one of its processes has a large message read at a time. A container that sends many, or does
    /// not finish one, keeps itself from being heard and takes little memory.
    large: Mutex<BTreeMap<String, Weak<Mutex<()>>>>,
    under_way: Arc<UnderWay>,
    pub known_as: Arc<KnownAs>,
}

/// Larger messages of a container are read one after the other, bytes.
const LARGE: usize = 256 << 10;

impl Shims {
    /// Questions to them are put on this list.
    pub fn new(under_way: Arc<UnderWay>) -> Self {
        Shims { under_way, ..Shims::default() }
    }

    /// Takes a control connection over and serves it in the calling thread until it ends; how it did. A second connection
    /// of the same process replaces the first.
    pub fn serve(
        &self,
        container: &str,
        vpid: Vpid,
        comm: &str,
        pid: i32,
        stream: UnixStream,
    ) -> std::io::Result<FrameError> {
        let reader = stream.try_clone()?;
        reader.set_read_timeout(None)?;
        stream.set_write_timeout(Some(WRITE))?;
        let shim = Arc::new(Shim {
            container: container.into(),
            vpid,
            comm: comm.into(),
            pid,
            writer: Mutex::new(stream),
            waiting: Mutex::new(Waiting { seq: 0, slots: HashMap::new(), ended: None }),
            suspended: AtomicUsize::new(0),
            under_way: self.under_way.clone(),
            known_as: self.known_as.clone(),
        });
        let before = lock(&self.all).entry(container.into()).or_default().insert(vpid, shim.clone());
        if let Some(before) = before {
            before.close();
        }
        self.changed.notify_all();
        let end = shim.read(reader, &self.large(container));
        let mut all = lock(&self.all);
        if let Some(of) = all.get_mut(container) {
            if of.get(&vpid).is_some_and(|now| Arc::ptr_eq(now, &shim)) {
                of.remove(&vpid);
            }
            if of.is_empty() {
                all.remove(container);
            }
        }
        drop(all);
        self.changed.notify_all();
        Ok(end)
    }

    fn large(&self, container: &str) -> Arc<Mutex<()>> {
        let mut all = lock(&self.large);
        all.retain(|_, held| held.strong_count() > 0);
        if let Some(held) = all.get(container).and_then(Weak::upgrade) {
            return held;
        }
        let held = Arc::default();
        all.insert(container.to_owned(), Arc::downgrade(&held));
        held
    }

    /// Those of one container, by pid.
    pub fn of(&self, container: &str) -> Vec<Arc<Shim>> {
        lock(&self.all).get(container).map(|of| of.values().cloned().collect()).unwrap_or_default()
    }

    /// Everything, container by container.
    pub fn all(&self) -> Vec<Arc<Shim>> {
        lock(&self.all).values().flat_map(|of| of.values().cloned()).collect()
    }

    pub fn get(&self, container: &str, vpid: Vpid) -> Result<Arc<Shim>, ShimError> {
        let found = lock(&self.all).get(container).and_then(|of| of.get(&vpid)).cloned();
        found.ok_or_else(|| ShimError::Absent { who: format!("pid {} of container {container}", vpid.0) })
    }

    /// Waits until all these processes are connected; those that are not when the time is over.
    pub fn wait_for(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> Result<Vec<Arc<Shim>>, Vec<Vpid>> {
        let until = Instant::now() + deadline;
        let mut all = lock(&self.all);
        loop {
            let of = all.get(container);
            let missing: Vec<Vpid> = vpids.iter().copied().filter(|v| of.and_then(|of| of.get(v)).is_none()).collect();
            if missing.is_empty() {
                let of = of.cloned().unwrap_or_default();
                return Ok(vpids.iter().filter_map(|v| of.get(v).cloned()).collect());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(missing);
            }
            all = self.changed.wait_timeout(all, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until none of these is connected any more; those that still are when the time is over.
    pub fn wait_gone(&self, container: &str, vpids: &[Vpid], deadline: Duration) -> Result<(), Vec<Vpid>> {
        let until = Instant::now() + deadline;
        let mut all = lock(&self.all);
        loop {
            let of = all.get(container);
            let there: Vec<Vpid> = vpids.iter().copied().filter(|v| of.is_some_and(|of| of.contains_key(v))).collect();
            let left = until.saturating_duration_since(Instant::now());
            if there.is_empty() {
                return Ok(());
            }
            if left.is_zero() {
                return Err(there);
            }
            all = self.changed.wait_timeout(all, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdma_virt::id::VQpn;
    use rdma_virt::msg::{Count, Scope};
    use std::thread;

    const SOON: Duration = Duration::from_secs(10);

    fn connected(shims: &Arc<Shims>) -> UnixStream {
        let (agent, shim) = UnixStream::pair().unwrap();
        let registry = shims.clone();
        thread::spawn(move || drop(registry.serve("c", Vpid(7), "app", 1, agent).unwrap()));
        shims.wait_for("c", &[Vpid(7)], SOON).unwrap();
        shim
    }

    #[test]
    fn a_late_answer_does_not_disturb_the_next_question() {
        let shims = Arc::new(Shims::default());
        let mut end = connected(&shims);
        let shim = shims.get("c", Vpid(7)).unwrap();
        let err = shim.ask(None, Request::Resume, Duration::from_millis(20)).unwrap_err();
        assert!(matches!(err, ShimError::Deadline { .. }), "{err}");
        let first: ToShim = SHIM.read(&mut end).unwrap();
        let answering = thread::spawn(move || {
            let second: ToShim = SHIM.read(&mut end).unwrap();
            SHIM.write(&mut end, &FromShim { seq: first.seq, reply: Reply::Drained }).unwrap();
            SHIM.write(&mut end, &FromShim { seq: second.seq, reply: Reply::GoesOn { held: 3 } }).unwrap();
            end
        });
        assert_eq!(shim.ask(None, Request::Resume, SOON).unwrap(), Reply::GoesOn { held: 3 });
        drop(answering.join().unwrap());
    }

    #[test]
    fn whom_a_migration_waits_for_and_what_holds_its_sends_can_be_seen() {
        let shims = Arc::new(Shims::default());
        let mut end = connected(&shims);
        let shim = shims.get("c", Vpid(7)).unwrap();
        let id = MigrationId([1; 16]);
        let mut answer = |request: Request, reply: Reply| {
            let asked = shim.clone();
            let asking = thread::spawn(move || asked.ask(Some(id), request, SOON));
            let to: ToShim = SHIM.read(&mut end).unwrap();
            let waits: Vec<String> = shims.under_way.waits_of(id, "c").into_iter().map(|w| w.what).collect();
            SHIM.write(&mut end, &FromShim { seq: to.seq, reply }).unwrap();
            asking.join().unwrap().unwrap();
            assert!(shims.under_way.waits(id).is_empty());
            (waits, shim.suspended())
        };
        let count = |vqpn| Count { vqpn: VQpn(vqpn), sent: 0, received: 0 };
        let held = Reply::Suspended { counts: vec![count(17), count(18)] };
        let who = "app (pid 7 of container c) to";
        assert_eq!(answer(Request::Suspend { scope: Scope::All }, held), (vec![format!("{who} suspend")], 2));
        let drain = Request::Drain { expect: Vec::new(), deadline_ms: 1 };
        assert_eq!(answer(drain, Reply::Drained), (vec![format!("{who} drain")], 2));
        assert_eq!(answer(Request::Resume, Reply::GoesOn { held: 0 }), (vec![format!("{who} resume")], 0));
    }

    #[test]
    fn a_large_message_that_is_not_finished_holds_up_its_own_container_only() {
        let shims = Arc::new(Shims::default());
        let serve = |container: &'static str, vpid| {
            let (agent, shim) = UnixStream::pair().unwrap();
            let registry = shims.clone();
            thread::spawn(move || drop(registry.serve(container, Vpid(vpid), "app", 1, agent).unwrap()));
            shims.wait_for(container, &[Vpid(vpid)], SOON).unwrap();
            shim
        };
        let large = |end: &mut UnixStream, seq| {
            let why = "x".repeat(LARGE + 1);
            SHIM.write(end, &FromShim { seq, reply: Reply::Refused { why } })
        };
        let (mut slow, mut own, mut other) = (serve("c", 1), serve("c", 2), serve("d", 1));
        let header = [&rdma_virt::msg::MAGIC[..], &(16_u32 << 20).to_le_bytes()].concat();
        std::io::Write::write_all(&mut slow, &header).unwrap();
        let ask = |container, vpid, time| {
            let shim = shims.get(container, Vpid(vpid)).unwrap();
            thread::spawn(move || shim.ask(None, Request::Resume, time))
        };
        thread::sleep(Duration::from_millis(100));
        let asked = ask("d", 1, SOON);
        let to: ToShim = SHIM.read(&mut other).unwrap();
        large(&mut other, to.seq).unwrap();
        assert!(!matches!(asked.join().unwrap(), Err(ShimError::Deadline { .. })), "another container is heard");
        let asked = ask("c", 2, Duration::from_millis(300));
        let to: ToShim = SHIM.read(&mut own).unwrap();
        let writing = thread::spawn(move || (large(&mut own, to.seq).is_ok(), own));
        assert!(matches!(asked.join().unwrap(), Err(ShimError::Deadline { .. })), "its own waits");
        drop(slow);
        assert!(writing.join().unwrap().0, "until it goes");
    }

    #[test]
    fn a_shim_that_goes_away_fails_the_question_at_once_and_leaves_the_registry() {
        let shims = Arc::new(Shims::default());
        let end = connected(&shims);
        let shim = shims.get("c", Vpid(7)).unwrap();
        let asking = thread::spawn(move || shim.ask(None, Request::Resume, SOON));
        drop(end);
        let err = asking.join().unwrap().unwrap_err();
        assert!(matches!(err, ShimError::Broken { .. }), "{err}");
        let until = Instant::now() + SOON;
        while shims.get("c", Vpid(7)).is_ok() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
        assert!(shims.of("c").is_empty());
        assert_eq!(shims.wait_for("c", &[Vpid(7)], Duration::from_millis(10)).unwrap_err(), [Vpid(7)]);
    }
}
