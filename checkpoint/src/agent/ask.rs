//! Connections from containers: who is it, and what does an application thread want to know.
//!
//! Everything that arrives here is written by a container and believed only as far as that container itself goes.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rdma_virt::id::{PGid, PQpn, VGid, VQpn, Vpid};
use rdma_virt::msg::{Answer, Ask, Hello, OLDEST, Role, VERSION};

use super::{Agent, LOCAL, facts, lock, procs};
use crate::moved;
use crate::net::frame::SHIM;
use crate::net::msg::{self, Order, Resolved};

/// A caller says who it is and what it wants within this time.
const FIRST_WORDS: Duration = Duration::from_secs(5);

/// Another agent's answer is waited for this long; an application thread stands in `ibv_modify_qp` meanwhile.
const RESOLVE: Duration = Duration::from_secs(2);

/// An agent that did not answer is not asked again for this long.
const SILENCE: Duration = Duration::from_secs(30);

/// A QP that got another number than the kernel's.
#[derive(Clone, Debug)]
pub struct Registered {
    pub container: String,
    pub vpid: Vpid,
    pub pqpn: PQpn,
}

impl super::doors::Caller for Agent {
    fn gone(&self, container: &str) {
        self.forget_container(container);
    }

    fn serve(&self, container: &str, pid: i32, mut stream: UnixStream) {
        let hello = match self.greet(container, pid, &mut stream) {
            Ok(hello) => hello,
            Err(why) => {
                eprintln!("container {container}, pid {pid} on this host: {why}");
                return;
            }
        };
        let served = match hello.role {
            Role::Control => self
                .shims
                .serve(container, hello.vpid, &hello.comm, pid, stream)
                .map_err(|e| format!("its control connection: {e}")),
            Role::Ask => self.answer(container, hello.vpid, &mut stream),
        };
        if let Err(why) = served {
            eprintln!("container {container}, {} (pid {}): {why}", hello.comm, hello.vpid.0);
        }
    }
}

impl Agent {
    fn greet(&self, container: &str, pid: i32, stream: &mut UnixStream) -> Result<Hello, String> {
        let both = |e: std::io::Error| e.to_string();
        stream.set_read_timeout(Some(FIRST_WORDS)).map_err(both)?;
        stream.set_write_timeout(Some(FIRST_WORDS)).map_err(both)?;
        let mut hello: Hello = SHIM.read(stream).map_err(|e| super::chain(&e))?;
        if !(OLDEST..=VERSION).contains(&hello.version) {
            let spoken = if OLDEST == VERSION { VERSION.to_string() } else { format!("{OLDEST} to {VERSION}") };
            return Err(format!("it speaks version {} of the protocol, this agent {spoken}", hello.version));
        }
        if procs::vpid_of(pid) != Some(hello.vpid) {
            return Err(format!("it says it is pid {} in its container, the kernel says otherwise", hello.vpid.0));
        }
        if !self.lives_in(container, pid) {
            return Err("it does not live in that container".into());
        }
        hello.comm.retain(|c| !c.is_control());
        hello.comm.truncate(hello.comm.char_indices().nth(32).map_or(hello.comm.len(), |(at, _)| at));
        Ok(hello)
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

    fn answer(&self, container: &str, vpid: Vpid, stream: &mut UnixStream) -> Result<(), String> {
        let ask: Ask = SHIM.read(stream).map_err(|e| super::chain(&e))?;
        let answer = match ask {
            Ask::RegisterQp { pqpn } => match self.register(container, vpid, pqpn) {
                Ok(vqpn) => Answer::Registered { vqpn },
                Err(e) => Answer::Failed { why: super::chain(&e) },
            },
            Ask::Resolve { vgid, vqpn } => {
                let found = self.resolve(vgid, vqpn);
                let identity = Resolved { pgid: PGid(vgid.0), pqpn: PQpn(vqpn.0), keys: Vec::new() };
                let Resolved { pgid, pqpn, keys } = found.unwrap_or(identity);
                Answer::Resolved { pgid, pqpn, keys }
            }
        };
        SHIM.write(stream, &answer).map_err(|e| super::chain(&e))
    }

    fn register(&self, container: &str, vpid: Vpid, pqpn: PQpn) -> Result<VQpn, moved::NumberError> {
        let vqpn = self.moved.number(container, pqpn, facts::shown_gids)?;
        if vqpn.0 != pqpn.0 {
            lock(&self.registered).insert(vqpn, Registered { container: container.into(), vpid, pqpn });
        }
        Ok(vqpn)
    }

    /// Where an end is that a local application knows as this pair; `None` if it never moved as far as anybody knows.
    fn resolve(&self, vgid: VGid, vqpn: VQpn) -> Option<Resolved> {
        if let Some(found) = self.resolve_here(vgid, vqpn) {
            return Some(found);
        }
        let mut agents = vec![self.agent_of(PGid(vgid.0))];
        agents.extend(self.moved.homes(vgid, vqpn));
        agents.into_iter().filter(|at| at != LOCAL).find_map(|at| self.resolve_there(&at, vgid, vqpn))
    }

    /// What this agent knows by itself, or through the container's present home: answers [`Order::Resolve`].
    pub fn resolve_for_other(&self, vgid: VGid, vqpn: VQpn) -> Option<Resolved> {
        self.resolve_here(vgid, vqpn).or_else(|| {
            let homes = self.moved.homes(vgid, vqpn);
            homes.into_iter().filter(|at| at != LOCAL).find_map(|at| self.resolve_there(&at, vgid, vqpn))
        })
    }

    fn resolve_here(&self, vgid: VGid, vqpn: VQpn) -> Option<Resolved> {
        if let Some(found) = self.moved.resolve(vgid, vqpn) {
            return Some(found);
        }
        let known = lock(&self.registered).get(&vqpn).cloned()?;
        // A container that came from elsewhere shows the GIDs it had there: any of its old QPs knows today's.
        let all = self.moved.all();
        let mut of = all.iter().filter(|p| p.container == known.container && p.vgids.contains(&vgid));
        match of.clone().find(|p| p.vpid == known.vpid).or_else(|| of.next()) {
            Some(process) => {
                let pgid = moved::now(process, vgid).or(process.qps.first().map(|(_, _, pgid)| *pgid))?;
                Some(Resolved { pgid, pqpn: known.pqpn, keys: process.keys.0.clone() })
            }
            None if facts::shown_gids().contains(&vgid) => {
                Some(Resolved { pgid: PGid(vgid.0), pqpn: known.pqpn, keys: Vec::new() })
            }
            None => None,
        }
    }

    fn resolve_there(&self, at: &str, vgid: VGid, vqpn: VQpn) -> Option<Resolved> {
        if lock(&self.silent).get(at).is_some_and(|until| Instant::now() < *until) {
            return None;
        }
        match self.client.call(at, None, Order::Resolve { vgid, vqpn }, RESOLVE) {
            Ok(msg::Answer::Resolved(found)) => found,
            Ok(_) => None,
            Err(e) => {
                // Hosts without an agent are ordinary: their QPs are where they say.
                eprintln!("where is {vqpn} of {vgid}? {}", super::chain(&e));
                lock(&self.silent).insert(at.into(), Instant::now() + SILENCE);
                None
            }
        }
    }
}
