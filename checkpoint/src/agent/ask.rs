//! Connections from containers: who is it, and what does an application thread want to know.
//!
//! Everything that arrives here is written by a container and believed only as far as that container itself goes.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, PGid, PQpn, VGid, VQpn, Vpid};
use rdma_virt::msg::{Answer, Ask, Hello, OLDEST, Role, VERSION};

use super::connecting::Still;
use super::metrics::{Door, Lookup, Reason};
use super::{Agent, LOCAL, facts, lock, procs};
use crate::at_once::at_once;
use crate::moved;
use crate::net::client::CallError;
use crate::net::frame::{FrameError, SHIM};
use crate::net::msg::{self, MovedProcess, Order, Refusal, Resolved};

/// Longest message of an application thread, bytes.
const SHORT: usize = 4096;

/// A caller says who it is and what it wants within this time.
const FIRST_WORDS: Duration = Duration::from_secs(5);

/// Another agent's answer is waited for this long; an application thread stands in `ibv_modify_qp` meanwhile.
const RESOLVE: Duration = Duration::from_secs(2);

/// So long an application thread waits for a container that stands still; the pause of most is far shorter.
const STILL: Duration = Duration::from_secs(25);

/// First version of the shims' protocol with [`Answer::Later`].
const UNDERSTANDS_LATER: u32 = 4;

/// An agent that did not answer is not asked again for this long.
const SILENCE: Duration = Duration::from_secs(30);

/// Agents that are asked at the same time when the one that should know is silent.
const AT_ONCE: usize = 16;

/// So many of them are remembered.
const SILENT: usize = 4096;

/// A QP that got another number than the kernel's.
#[derive(Clone, Debug)]
pub struct Registered {
    pub container: String,
    pub vpid: Vpid,
    pub pqpn: PQpn,
}

/// Where a QP is that was made on this host after its container came here. A process that came along shows the GIDs it
/// had; one that was started here, perhaps after others had ended, shows this host's; a child of one that came along
/// shows its parent's, which any of that container's old QPs knows.
fn place(all: &[MovedProcess], known: &Registered, vgid: VGid, here: impl FnOnce() -> Vec<VGid>) -> Option<Resolved> {
    let mut of = all.iter().filter(|p| p.container == known.container && p.vgids.contains(&vgid));
    let from = |process: &MovedProcess| {
        let pgid = moved::now(process, vgid).or(process.qps.first().map(|(_, _, pgid)| *pgid))?;
        Some(Resolved { pgid, pqpn: known.pqpn, keys: process.keys.0.clone() })
    };
    if let Some(itself) = of.clone().find(|p| p.vpid == known.vpid) {
        return from(itself);
    }
    if here().contains(&vgid) {
        return Some(Resolved { pgid: PGid(vgid.0), pqpn: known.pqpn, keys: Vec::new() });
    }
    from(of.next()?)
}

impl super::doors::Caller for Agent {
    fn gone(&self, container: &str) {
        self.forget_container(container);
    }

    fn serve(&self, container: &str, pid: i32, mut stream: UnixStream) {
        let hello = match self.greet(container, pid, &mut stream) {
            Ok(hello) => hello,
            Err(no) => {
                self.complain(container, || format!("container {container}, pid {pid} on this host: {}", no.why));
                no.reason.into_iter().for_each(|reason| self.rejected(reason));
                return;
            }
        };
        let served = match hello.role {
            Role::Control => match self.shims.serve(container, hello.vpid, &hello.comm, pid, stream) {
                Ok(FrameError::Closed | FrameError::Io(_)) => Ok(()),
                Ok(end) => Err(end.into()),
                Err(e) => Err(No { reason: None, why: format!("its control connection: {e}") }),
            },
            Role::Ask => self.answer(container, &hello, &mut stream).map_err(No::from),
        };
        if let Err(no) = served {
            let who = || format!("container {container}, {} (pid {}): {}", hello.comm, hello.vpid.0, no.why);
            self.complain(container, who);
            no.reason.into_iter().for_each(|reason| self.rejected(reason));
        }
    }

    fn rejected(&self, reason: Reason) {
        self.metrics.rejected(Door::Containers, reason);
    }
}

/// Why somebody is not heard: in a word that is counted, if it is worth counting, and in a sentence.
struct No {
    reason: Option<Reason>,
    why: String,
}

impl No {
    fn because(reason: Reason, why: impl Into<String>) -> Self {
        No { reason: Some(reason), why: why.into() }
    }
}

impl From<FrameError> for No {
    fn from(e: FrameError) -> Self {
        No { reason: Reason::of(&e), why: super::chain(&e) }
    }
}

impl Agent {
    fn greet(&self, container: &str, pid: i32, stream: &mut UnixStream) -> Result<Hello, No> {
        let both = |e: std::io::Error| No { reason: None, why: e.to_string() };
        stream.set_read_timeout(Some(FIRST_WORDS)).map_err(both)?;
        stream.set_write_timeout(Some(FIRST_WORDS)).map_err(both)?;
        let mut hello: Hello = SHIM.at_most(SHORT).read(stream)?;
        if !(OLDEST..=VERSION).contains(&hello.version) {
            let spoken = if OLDEST == VERSION { VERSION.to_string() } else { format!("{OLDEST} to {VERSION}") };
            let why = format!("it speaks version {} of the protocol, this agent {spoken}", hello.version);
            return Err(No::because(Reason::Version, why));
        }
        if procs::vpid_of(pid) != Some(hello.vpid) {
            let why = format!("it says it is pid {} in its container, the kernel says otherwise", hello.vpid.0);
            return Err(No::because(Reason::Credentials, why));
        }
        if !self.lives_in(container, pid) {
            return Err(No::because(Reason::Rights, "it does not live in that container"));
        }
        hello.comm.retain(|c| !c.is_control());
        hello.comm.truncate(hello.comm.char_indices().nth(32).map_or(hello.comm.len(), |(at, _)| at));
        Ok(hello)
    }

    /// Writes a line to the log, unless this container had its share.
    fn complain(&self, container: &str, what: impl FnOnce() -> String) {
        if let Some(line) = lock(&self.complaints).line(container, what) {
            eprintln!("{line}");
        }
    }

    /// A container whose runtime has not told its cgroup yet is known by the socket alone.
    fn lives_in(&self, container: &str, pid: i32) -> bool {
        if let Some(cgroup) = lock(&self.cgroups).get(container).cloned()
            && procs::in_cgroup(pid, &cgroup)
        {
            return true;
        }
        match self.host.container(container) {
            Ok(c) => {
                lock(&self.cgroups).insert(container.into(), c.cgroup.clone());
                procs::in_cgroup(pid, &c.cgroup)
            }
            Err(_) => true,
        }
    }

    fn answer(&self, container: &str, hello: &Hello, stream: &mut UnixStream) -> Result<(), FrameError> {
        let ask: Ask = SHIM.at_most(SHORT).read(stream)?;
        let answer = match ask {
            Ask::RegisterQp { pqpn } => match self.register(container, hello.vpid, pqpn) {
                Ok(vqpn) => Answer::Registered { vqpn },
                Err(e) => Answer::Failed { why: super::chain(&e) },
            },
            Ask::Resolve { vgid, vqpn } => {
                let found = self.resolve_patiently(vgid, vqpn, hello.version, stream)?;
                self.metrics.lookup(Lookup::Resolve, found.is_some());
                let identity = Resolved { pgid: PGid(vgid.0), pqpn: PQpn(vqpn.0), keys: Vec::new() };
                let Resolved { pgid, pqpn, keys } = found.unwrap_or(identity);
                Answer::Resolved { pgid, pqpn, keys }
            }
        };
        SHIM.write(stream, &answer)
    }

    fn register(&self, container: &str, vpid: Vpid, pqpn: PQpn) -> Result<VQpn, moved::NumberError> {
        let vqpn = self.moved.number(container, pqpn, facts::shown_gids)?;
        if vqpn.0 != pqpn.0 {
            lock(&self.registered).insert(vqpn, Registered { container: container.into(), vpid, pqpn });
        }
        Ok(vqpn)
    }

    /// As [`Agent::resolve`]. An end that stands still is asked for again until it does not, and the shim is told to
    /// wait; one that is too old to understand that waits as long as it does for any answer.
    fn resolve_patiently(
        &self,
        vgid: VGid,
        vqpn: VQpn,
        version: u32,
        stream: &mut UnixStream,
    ) -> Result<Option<Resolved>, FrameError> {
        let until = Instant::now() + if version >= UNDERSTANDS_LATER { STILL } else { RESOLVE };
        let mut told = Instant::now();
        loop {
            let by = match self.resolve(vgid, vqpn) {
                Ok(found) => return Ok(found),
                Err(by) => by,
            };
            if Instant::now() >= until {
                eprintln!("{vqpn} of {vgid} is taken to be where it was: {by} did not end within {STILL:?}");
                return Ok(None);
            }
            if version >= UNDERSTANDS_LATER && told.elapsed() > Duration::from_secs(1) {
                SHIM.write(stream, &Answer::Later)?;
                told = Instant::now();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Where an end is that a local application knows as this pair; `None` if it never moved as far as anybody knows. An
    /// error names the migration it stands still for.
    fn resolve(&self, vgid: VGid, vqpn: VQpn) -> Result<Option<Resolved>, MigrationId> {
        let here = self.resolve_asked(vgid, vqpn, LOCAL, false).map_err(|still| still.by)?;
        if here.is_some() {
            return Ok(here);
        }
        match self.agent_of(PGid(vgid.0)) {
            at if at == LOCAL => Ok(None),
            at => match self.resolve_there(&at, vgid, vqpn, None).map_err(|still| still.by)? {
                None if self.is_silent(&at) => self.resolve_around(&at, vgid, vqpn),
                found => Ok(found),
            },
        }
    }

    /// The host that shows this GID has no agent, or is off; what once was there may have moved, and whoever took part in
    /// that knows where it is.
    fn resolve_around(&self, silent: &str, vgid: VGid, vqpn: VQpn) -> Result<Option<Resolved>, MigrationId> {
        let known = self.known_agents();
        let others: Vec<&String> = known.iter().filter(|at| *at != silent).collect();
        let until = Instant::now() + RESOLVE;
        for some in others.chunks(AT_ONCE).take_while(|_| Instant::now() < until) {
            let asked = at_once(some, |at| self.resolve_there(at, vgid, vqpn, None));
            if let Some(found) = asked.into_iter().find(|answer| !matches!(answer, Ok(None))) {
                return found.map_err(|still: Still| still.by);
            }
        }
        Ok(None)
    }

    fn is_silent(&self, at: &str) -> bool {
        lock(&self.silent).get(at).is_some_and(|until| Instant::now() < *until)
    }

    /// What this agent knows by itself, or through the container's present home: answers [`Order::Resolve`].
    pub fn resolve_for_other(
        &self,
        vgid: VGid,
        vqpn: VQpn,
        asker: &str,
        passed_on: bool,
    ) -> Result<Option<Resolved>, Refusal> {
        let found = self.resolve_asked(vgid, vqpn, asker, passed_on);
        self.metrics.lookup(Lookup::ResolveForAgent, matches!(found, Ok(Some(_))));
        found.map_err(|Still { container, by }| Refusal::Busy { container, by })
    }

    /// The home is asked even where the answer is known: it has to know who is about to connect. A question is passed on
    /// once, so that none goes in circles.
    fn resolve_asked(&self, vgid: VGid, vqpn: VQpn, asker: &str, passed_on: bool) -> Result<Option<Resolved>, Still> {
        lock(&self.connecting).ask((vgid, vqpn), asker)?;
        let homes = if passed_on { Vec::new() } else { self.moved.homes(vgid, vqpn) };
        for home in homes.iter().filter(|at| *at != LOCAL && *at != asker) {
            let asker = (asker != LOCAL).then_some(asker);
            if let Some(found) = self.resolve_there(home, vgid, vqpn, asker)? {
                return Ok(Some(found));
            }
        }
        Ok(self.resolve_here(vgid, vqpn))
    }

    fn resolve_here(&self, vgid: VGid, vqpn: VQpn) -> Option<Resolved> {
        if let Some(found) = self.moved.resolve(vgid, vqpn) {
            return Some(found);
        }
        let known = lock(&self.registered).get(&vqpn).cloned()?;
        place(&self.moved.all(), &known, vgid, facts::shown_gids)
    }

    fn resolve_there(&self, at: &str, vgid: VGid, vqpn: VQpn, asker: Option<&str>) -> Result<Option<Resolved>, Still> {
        if self.is_silent(at) {
            return Ok(None);
        }
        let order = Order::Resolve { vgid, vqpn, asker: asker.map(str::to_owned) };
        match self.client.call(at, None, order, RESOLVE) {
            Ok(msg::Answer::Resolved(found)) => Ok(found),
            Ok(_) => Ok(None),
            Err(CallError::Refused { refusal: Refusal::Busy { container, by }, .. }) => Err(Still { container, by }),
            Err(e) => {
                // Hosts without an agent are ordinary: their QPs are where they say.
                eprintln!("where is {vqpn} of {vgid}? {}", super::chain(&e));
                let now = Instant::now();
                let mut silent = lock(&self.silent);
                // Containers choose whom we ask.
                silent.retain(|_, until| *until > now);
                if silent.len() < SILENT {
                    silent.insert(at.into(), now + SILENCE);
                }
                Ok(None)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::doors::Caller;
    use super::*;
    use crate::engine::fixture::idle_agent;
    use std::io::Write;

    #[test]
    fn a_qp_made_after_a_move_is_where_its_process_shows_it() {
        let [old, here, other] = [1, 2, 3].map(|n| [n; 16]);
        // It came from elsewhere to here; another one that was started here left and has ended since.
        let came = |vpid, vgid, pgid| MovedProcess {
            container: "c".into(),
            vpid: Vpid(vpid),
            vgids: vec![VGid(vgid)],
            gids: vec![(VGid(vgid), PGid(pgid))],
            qps: Vec::new(),
            keys: rdma_virt::msg::KeyTable::default(),
            lease: msg::Lease { first: 1 << 20, count: 8 },
            at: String::new(),
            since: 1,
        };
        let all = [came(1, old, here), came(9, here, other)];
        let at = |vpid, vgid| {
            let known = Registered { container: "c".into(), vpid: Vpid(vpid), pqpn: PQpn(5) };
            place(&all, &known, VGid(vgid), || vec![VGid(here)]).map(|r| r.pgid.0)
        };
        assert_eq!(at(1, old), Some(here), "a process that came along");
        assert_eq!(at(7, here), Some(here), "one that was started here shows what there is");
        assert_eq!(at(7, old), Some(here), "a child of one that came along");
        assert_eq!(at(7, [8; 16]), None);
    }

    #[test]
    fn who_is_not_heard_is_counted_by_the_reason_and_who_just_leaves_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        let counts = || {
            let start = "migrrdma_rejected_requests_total{door=\"containers\",reason=";
            let page = agent.metrics.page();
            let counts = page.lines().filter_map(|l| l.strip_prefix(start)).filter(|l| !l.ends_with(" 0"));
            counts.map(str::to_owned).collect::<Vec<_>>()
        };
        let own = i32::try_from(std::process::id()).unwrap();
        let say = |bytes: &[u8]| {
            let (agents, mut end) = UnixStream::pair().unwrap();
            end.write_all(bytes).unwrap();
            drop(end);
            Caller::serve(&*agent, "web", own, agents);
        };
        let hello = |version, vpid| SHIM.encode(&Hello { version, vpid, comm: "app".into(), role: Role::Ask }).unwrap();
        let vpid = procs::vpid_of(own).unwrap();
        say(b"");
        say(&hello(VERSION, vpid)[..5]);
        assert!(counts().is_empty());
        say(b"GET /metrics HTTP/1.1\r\n\r\n");
        assert_eq!(counts(), ["\"malformed\"} 1"]);
        say(&hello(VERSION + 1, vpid));
        say(&hello(VERSION, Vpid(vpid.0 + 1)));
        // It is who it says it is, but lives elsewhere.
        say(&hello(VERSION, vpid));
        assert_eq!(counts(), ["\"credentials\"} 1", "\"malformed\"} 1", "\"rights\"} 1", "\"version\"} 1"]);
    }
}
