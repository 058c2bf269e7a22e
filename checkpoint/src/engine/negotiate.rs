//! Whether it can be done, as the source sees it: finds everybody who takes part, and holds them. Collects every
//! reason against it, not only the first.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::thread;
use std::time::Duration;

use rdma_virt::id::{PGid, VGid, Vpid};
use rdma_virt::msg::{Reply, Request};
use rdma_virt::saved::{ProcessState, QpPhase, QpState};

use super::source::{Run, Side, Stop};
use crate::agent::connecting::End;
use crate::agent::procs::{self, Process};
use crate::agent::{LOCAL, facts};
use crate::net::msg::{Answer, FarEnd, Offer, OfferedProcess, Order};

impl Run<'_> {
    pub(super) fn negotiate(&mut self) -> Result<(), Stop> {
        let mut reasons = Vec::new();
        let name = &self.request.container;
        self.world.host().container(name).map_err(|e| Stop::Refused(vec![e.to_string()]))?;
        let destination = self.world.destination(&self.request.to);
        match &destination {
            Ok(at) => (self.to, self.record.to) = (at.clone(), at.clone()),
            Err(why) => reasons.push(why.clone()),
        }
        reasons.extend(self.look_around()?);
        if destination.is_ok() {
            let paused = self.container()?.paused;
            reasons.extend(self.offer(paused)?);
        }
        if reasons.is_empty() && !self.request.dry_run {
            self.show_there()?;
        }
        if reasons.is_empty() { Ok(()) } else { Err(Stop::Refused(reasons)) }
    }

    /// Holds the container, asks its processes what they have, and finds and holds everybody they are connected to.
    /// What speaks against a move, wherever to.
    pub(super) fn look_around(&mut self) -> Result<Vec<String>, Stop> {
        let name = self.request.container.clone();
        let mut reasons = Vec::new();
        let container = self.world.host().container(&name).map_err(|e| Stop::Refused(vec![e.to_string()]))?;
        self.world.hold(self.id, &name).map_err(|by| {
            let text = format!("container {name} takes part in {by} already");
            Stop::Busy { by, text }
        })?;
        self.effects.held = true;
        let paused = container.paused;
        self.container = Some(container);
        if paused && !self.request.dry_run {
            self.wake_paused()?;
        }
        if paused && self.request.dry_run {
            self.note("the container is paused: its processes cannot be asked, so only its surroundings were checked");
        } else {
            reasons.extend(self.look_at_processes()?);
            reasons.extend(self.choose_hand_over());
        }
        reasons.extend(self.find_peers()?);
        self.no_handshake(false)?;
        Ok(reasons)
    }

    /// None of the container's unconnected QPs may have a far end that is connected to it: that one would not be known,
    /// and stay behind. With `hold`, who wants to connect from now on waits.
    pub(super) fn no_handshake(&self, hold: bool) -> Result<(), Stop> {
        let contexts = self.states.iter().flat_map(|s| &s.contexts);
        let open = |qp: &&QpState| qp.remote.is_none() && matches!(qp.phase, QpPhase::Reset | QpPhase::Init);
        let ends: Vec<End> = contexts
            .flat_map(|c| {
                let vgids: BTreeSet<VGid> = c.gids.iter().map(|g| g.gid).collect();
                let qps = c.qps.iter().filter(open);
                qps.flat_map(move |qp| vgids.clone().into_iter().map(|vgid| (vgid, qp.vqpn)))
            })
            .collect();
        match self.world.half_open(self.id, &self.request.container, &ends, hold) {
            None => Ok(()),
            Some(who) => Err(Stop::HalfOpen(format!("a connection is in the making: {who}"))),
        }
    }

    /// A container that somebody paused first runs while it is asked and drained; it is frozen again before the dump.
    fn wake_paused(&mut self) -> Result<(), Stop> {
        self.write_record()?;
        self.effects.cgroup = true;
        self.world.host().thaw(self.container()?).map_err(|e| Stop::Failed(e.to_string()))
    }

    /// The record of a migration that has something to undo.
    pub(super) fn write_record(&mut self) -> Result<(), Stop> {
        self.record.peers = self.plan.peer_containers();
        // Whoever has to end a copy of it later ends this one, and no other container of its name.
        self.record.plan = serde_json::to_value(&self.container).unwrap_or_default();
        self.world.records().write(&self.record).map_err(|e| Stop::Failed(crate::agent::chain(&e)))?;
        self.effects.recorded = true;
        Ok(())
    }

    /// Asks every shim, and compares with what the kernel says.
    fn look_at_processes(&mut self) -> Result<Vec<String>, Stop> {
        let (shims, mut reasons) = loop {
            let processes = self.list_processes()?;
            let shims = self.world.shims(&self.request.container);
            let reasons = speak_against(&processes, &shims.iter().map(|s| s.vpid.0).collect::<Vec<_>>());
            if reasons.is_empty() || !self.world.is_young() {
                break (shims, reasons);
            }
            self.wanted()?;
            thread::sleep(Duration::from_millis(300));
        };
        reasons.extend(self.lost()?);
        self.pids = shims.iter().map(|s| (s.vpid, s.pid)).collect();
        let (states, silent) = self.reports(shims.iter().map(|s| s.vpid).collect());
        reasons.extend(silent);
        for state in &states {
            reasons.extend(state.blockers.iter().map(|b| {
                format!("{} (pid {}) uses {} on {}, which cannot be moved", state.comm, state.vpid.0, b.verb, b.object)
            }));
        }
        self.states = states;
        self.devices = facts::devices();
        Ok(reasons)
    }

    /// What these say they have, and why some did not say anything.
    pub(super) fn reports(&self, vpids: Vec<Vpid>) -> (Vec<ProcessState>, Vec<String>) {
        let asks = vpids.into_iter().map(|vpid| (Side::Own(vpid), Request::Report)).collect();
        let (mut states, mut silent) = (Vec::new(), Vec::new());
        for (side, reply) in self.ask_all(asks, self.answer_time()) {
            match reply {
                Ok(Reply::State(state)) => states.push(*state),
                Ok(_) => silent.push(format!("{side} answered report with something else")),
                // It ended a moment ago, and has nothing any more.
                Err(Stop::Absent(_)) => {}
                Err(stop) => silent.push(stop.to_string()),
            }
        }
        (states, silent)
    }

    /// Processes that CRIU would not see.
    pub(super) fn lost(&self) -> Result<Vec<String>, Stop> {
        let lost = self.world.host().lost(self.container()?).map_err(|e| Stop::Failed(e.to_string()))?;
        let sentence =
            |who: &String| format!("{who} is not below the container's init and would be lost; end it first");
        Ok(lost.iter().map(sentence).collect())
    }

    pub(super) fn list_processes(&self) -> Result<Vec<Process>, Stop> {
        let container = self.container()?;
        self.world
            .processes(container)
            .map_err(|e| Stop::Failed(format!("cannot list the processes in {}: {e}", container.cgroup.display())))
    }

    /// Finds the far ends of all links not found yet, and has their hosts hold their containers.
    pub(super) fn find_peers(&mut self) -> Result<Vec<String>, Stop> {
        // Many links lead to few hosts; finding out whose a GID is may mean asking around, and looking into devices.
        let known = RefCell::new(std::mem::take(&mut self.homes));
        let agent_of = |gid: PGid| known.borrow_mut().entry(gid.0).or_insert_with(|| self.world.agent_of(gid)).clone();
        let here = |gid| agent_of(gid) == LOCAL;
        let unknown = self.plan.update(&self.states, here, super::forward::random_u32);
        let mut by_agent: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for at in unknown {
            by_agent.entry(agent_of(self.plan.links[at].remote.pgid)).or_default().push(at);
        }
        self.homes = known.into_inner();
        let ask = |(agent, at): &(String, Vec<usize>)| {
            let links = at.iter().map(|i| self.plan.question(*i)).collect();
            self.world.call(agent, self.id, Order::Find { links }, self.answer_time())
        };
        let mut reasons = Vec::new();
        for ((agent, at), answer) in self.fan_out(by_agent.into_iter().collect(), ask) {
            let ends = match answer {
                Ok(Answer::Found(ends)) if ends.len() == at.len() => ends,
                Ok(_) => return Err(super::source::confused(&agent, "find")),
                Err(e) => {
                    let to: Vec<String> = at.iter().map(|i| self.plan.links[*i].remote.vqpn.to_string()).collect();
                    reasons.push(format!("far ends ({}): {}", to.join(", "), crate::agent::chain(&e)));
                    continue;
                }
            };
            for (i, end) in at.into_iter().zip(ends) {
                match end {
                    FarEnd::Shim(end) if !end.connected && !self.takes_half_open => {
                        return Err(Stop::HalfOpen(format!(
                            "a connection is in the making: {} is connected to {}, but {} (pid {} of container {} at \
                             {agent}) has not connected that one yet",
                            self.plan.links[i].near_vqpn, end.vqpn, end.comm, end.vpid.0, end.container
                        )));
                    }
                    FarEnd::Shim(end) => self.plan.found(i, &agent, &end),
                    FarEnd::Gone => {}
                    FarEnd::Foreign(who) => {
                        let remote = self.plan.links[i].remote;
                        reasons.push(format!(
                            "the far end of {} ({} at {}) belongs to {who}, which has no shim and cannot follow a move",
                            self.plan.links[i].near_vqpn, remote.vqpn, remote.pgid
                        ));
                    }
                }
            }
        }
        self.claim_peers()?;
        Ok(reasons)
    }

    fn claim_peers(&mut self) -> Result<(), Stop> {
        let port = self.world.config().port();
        let name = self.request.container.clone();
        // A link of the container to itself that did not look like one: it is held already.
        let wanted: Vec<(String, Vec<String>)> = self
            .plan
            .peer_containers()
            .into_iter()
            .map(|(agent, list)| {
                let local = agent == LOCAL;
                let itself = |c: &String| local && *c == name;
                let held = |c: &String| self.held_peers.contains(&(agent.clone(), c.clone()));
                let list: Vec<String> = list.into_iter().filter(|c| !itself(c) && !held(c)).collect();
                (agent, list)
            })
            .filter(|(_, list)| !list.is_empty())
            .collect();
        for (agent, _) in &wanted {
            self.effects.claimed.insert(agent.clone());
        }
        let claim = |(agent, containers): &(String, Vec<String>)| {
            let order = Order::Claim { containers: containers.clone(), port };
            self.world.call(agent, self.id, order, self.answer_time())
        };
        for ((agent, containers), answer) in self.fan_out(wanted, claim) {
            answer?;
            self.held_peers.extend(containers.into_iter().map(|c| (agent.clone(), c)));
        }
        Ok(())
    }

    fn offer(&mut self, paused: bool) -> Result<Vec<String>, Stop> {
        let container = self.container()?.clone();
        let criu = match self.world.host().criu() {
            Ok(version) => version,
            Err(e) => return Ok(vec![format!("CRIU on this host: {e}")]),
        };
        if !self.states.is_empty() {
            let missing = self.world.host().tools();
            if !missing.is_empty() {
                return Ok(missing);
            }
        }
        if !self.request.dry_run {
            self.lease = self.world.lease(&container.id).map_err(Stop::Failed)?;
        }
        let copy = match self.survey() {
            Ok(copy) => copy,
            Err(why) => return Ok(vec![why]),
        };
        self.resident = resident(&self.list_processes()?);
        let offer = Offer {
            container: container.id.clone(),
            bundle: container.bundle.clone(),
            from: self.world.config().name.clone(),
            from_port: self.world.config().port(),
            criu,
            cpu_flags: facts::cpu_flags(),
            processes: self.states.iter().map(offered).collect(),
            image_bytes: self.resident.all(),
            paused,
            lease: self.lease,
            hand_over: self.hand_over,
            copy,
        };
        let dry_run = self.request.dry_run;
        self.effects.offered = !dry_run;
        let order = Order::Offer { offer: Box::new(offer), dry_run };
        match self.world.call(&self.to, self.id, order, Duration::from_secs(60)) {
            Ok(Answer::Offered { problems }) => {
                Ok(problems.into_iter().map(|p| format!("on the destination: {p}")).collect())
            }
            Ok(_) => Err(super::source::confused(&self.to, "offer")),
            Err(e) => match Stop::from(e) {
                Stop::Failed(why) => Ok(vec![why]),
                busy => Err(busy),
            },
        }
    }
}

/// What the kernel's view says against a move.
pub(super) fn speak_against(processes: &[Process], shims: &[i32]) -> Vec<String> {
    let mut reasons = Vec::new();
    let known = |p: &Process| shims.contains(&p.vpid.0);
    for p in processes {
        // The child of a fork holds its parent's files. It comes along with them, and cannot use them: its parent's
        // queues are not in its memory.
        let inherited = || processes.iter().any(|parent| known(parent) && p.shares_verbs_of(parent));
        if !p.verbs.is_empty() && !known(p) && !inherited() {
            reasons.push(format!(
                "{p} uses RDMA without the shim (static or musl program, or started before the agent's directory was \
                 there) and cannot be moved"
            ));
        }
        if p.cm {
            reasons.push(format!("{p} holds an rdma_cm connection manager file, which cannot be moved"));
        }
    }
    reasons
}

pub(super) fn offered(state: &ProcessState) -> OfferedProcess {
    OfferedProcess {
        vpid: state.vpid,
        comm: state.comm.clone(),
        builds: state.builds.clone(),
        devices: state
            .contexts
            .iter()
            .map(|c| {
                let kind = |port: u8, index: u8| {
                    c.gids.iter().find(|g| g.port == port && g.index == u16::from(index)).map(|g| g.kind)
                };
                let used = c.qps.iter().filter(|q| q.remote.is_some());
                let mut kinds: Vec<u32> = used.filter_map(|q| kind(q.attr.port_num, q.attr.sgid_index)).collect();
                kinds.sort_unstable();
                kinds.dedup();
                (c.driver.clone(), kinds)
            })
            .collect(),
    }
}

/// Memory of the container's processes, bytes: what the image will hold at most, as far as can be said without looking
/// into pages.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Resident {
    pub private: u64,
    /// Of files without a disk, as far as the processes have touched it.
    pub shared: u64,
}

impl Resident {
    fn all(self) -> u64 {
        self.private + self.shared
    }
}

fn resident(processes: &[Process]) -> Resident {
    let mut sum = Resident::default();
    for p in processes {
        let text = fs::read_to_string(format!("/proc/{}/status", p.pid)).unwrap_or_default();
        let kib = |key: &str| {
            procs::field(&text, key)
                .and_then(|value| value.strip_suffix(" kB")?.trim().parse::<u64>().ok())
                .unwrap_or(0)
        };
        sum.private += (kib("RssAnon") + kib("VmSwap")) * 1024;
        sum.shared += kib("RssShmem") * 1024;
    }
    sum
}
