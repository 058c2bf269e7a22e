//! This host as the host of a *peer*: finds the far ends of a moving container's links among the local shims, holds
//! the containers that take part, and hands requests on to their shims.
//!
//! A held container is released by its source, or, when the source has gone silent, after asking it what became of
//! the migration. Peers never wait for ever.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, PQpn};
use rdma_virt::msg::{Reply, Request, Scope};
use rdma_virt::saved::{ProcessState, QpPhase};

use super::metrics::{Lookup, Outcome};
use super::parking::Parked;
use super::shims::{Shim, ShimError};
use super::under_way::Role;
use super::{Agent, LOCAL, facts, lock, procs};
use crate::at_once::at_once;
use crate::net::msg::{Answer, End, FarEnd, Fate, Link, Order, Refusal};

/// A source that said nothing for this long is asked.
pub(super) const QUIET: Duration = Duration::from_secs(20);

/// A process whose connection just ended is gone by then, if it is going to be.
const MOMENT: Duration = Duration::from_secs(1);

/// Why a container takes part in a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// It is the one that moves.
    Moves,
    /// It is connected to the one that moves.
    Peer,
}

/// A container that takes part in a migration.
#[derive(Clone, Debug)]
pub struct Claim {
    pub migration: MigrationId,
    pub why: Why,
    pub began: Instant,
    /// `host:port` of the source's agent, or [`LOCAL`].
    pub source: String,
    /// When the source last asked for something.
    pub heard: Instant,
    /// When it last asked for something itself, not counting answers to our questions.
    pub since: Instant,
    /// It waits for an image to be restored.
    pub parked: Option<Parked>,
}

impl Claim {
    pub fn new(migration: MigrationId, source: String, why: Why) -> Self {
        let now = Instant::now();
        Claim { migration, why, began: now, source, heard: now, since: now, parked: None }
    }
}

impl Agent {
    pub(super) fn answer_time(&self) -> Duration {
        Duration::from_secs(self.config.deadlines.answer)
    }

    /// Reports of all shims of this host, asked at the same time; those that do not answer are left out, with a line
    /// in the log.
    pub fn reports(&self) -> Vec<(String, ProcessState)> {
        let all = self.shims.all();
        let report = |shim: &Arc<Shim>| match shim.report(self.answer_time()) {
            Ok(state) => Some((shim.container.clone(), state)),
            Err(e) => {
                eprintln!("{}", super::chain(&e));
                None
            }
        };
        at_once(&all, report).into_iter().flatten().collect()
    }

    /// Answers [`Order::Find`].
    pub fn find(&self, links: &[Link]) -> Vec<FarEnd> {
        let reports = self.reports();
        let find = |link| {
            let found = find_in(&reports, link);
            self.metrics.lookup(Lookup::Find, found.is_some());
            found.unwrap_or_else(|| kernel_says(link.far.pqpn))
        };
        links.iter().map(find).collect()
    }

    /// Answers [`Order::Claim`].
    pub fn claim(
        &self,
        migration: MigrationId,
        from: Option<SocketAddr>,
        port: u16,
        containers: &[String],
    ) -> Result<Answer, Refusal> {
        for id in containers {
            let container = self.host.container(id).map_err(|e| Refusal::Failed(e.to_string()))?;
            if container.paused {
                return Err(Refusal::Failed(format!(
                    "container {id} is paused; a peer that stands still cannot take part, resume it first"
                )));
            }
        }
        let source = from.map_or(LOCAL.into(), |from| SocketAddr::new(from.ip(), port).to_string());
        self.meet(&source);
        let mut claims = lock(&self.claims);
        if let Some((id, claim)) =
            containers.iter().filter_map(|id| Some((id, claims.get(id)?))).find(|(_, c)| c.migration != migration)
        {
            return Err(Refusal::Busy { container: id.clone(), by: claim.migration });
        }
        if let Some(id) = containers.iter().find(|id| claims.get(*id).is_some_and(|c| c.parked.is_some())) {
            return Err(Refusal::Failed(format!("container {id} waits for an image of that container already")));
        }
        for id in containers {
            let claim = Claim::new(migration, source.clone(), Why::Peer);
            // One that is claimed again is held for as long as it has been.
            let began = claims.get(id).map_or(claim.began, |before| before.began);
            claims.insert(id.clone(), Claim { began, ..claim });
        }
        self.note_claims(&claims);
        Ok(Answer::Done)
    }

    /// The moving container itself takes part in one migration at a time too.
    pub fn hold_container(&self, migration: MigrationId, container: &str) -> Result<(), MigrationId> {
        let mut claims = lock(&self.claims);
        match claims.get(container) {
            Some(claim) if claim.migration != migration => Err(claim.migration),
            _ => {
                claims.insert(container.into(), Claim::new(migration, LOCAL.into(), Why::Moves));
                Ok(())
            }
        }
    }

    /// The container that just arrived here is still held by its migration.
    pub fn take_over(&self, migration: MigrationId, container: &str, source: &str) {
        let mut claims = lock(&self.claims);
        claims.insert(container.into(), Claim::new(migration, source.into(), Why::Moves));
        self.note_claims(&claims);
    }

    /// Forgets the migration without a word to shims. Peers that wait for an image of it go on waiting.
    pub fn let_go_of(&self, migration: MigrationId) {
        let mut claims = lock(&self.claims);
        let over = |claim: &Claim| claim.migration == migration && claim.parked.is_none();
        // Peers are released first, except by a destination that hosts some: there it is the end of a finished one.
        if claims.values().any(|claim| over(claim) && claim.why == Why::Peer) {
            self.metrics.migration(Role::Peer, Outcome::Finished);
        }
        claims.retain(|_, claim| !over(claim));
        self.note_claims(&claims);
    }

    /// Answers [`Order::Relay`].
    pub fn relay(
        &self,
        migration: MigrationId,
        container: &str,
        vpid: rdma_virt::id::Vpid,
        request: Request,
    ) -> Result<Answer, Refusal> {
        self.check_claim(migration, container, &request)?;
        let peers_only = matches!(
            request,
            Request::Prepare { .. }
                | Request::Connect { .. }
                | Request::Suspend { scope: Scope::Qps(_) }
                | Request::Drain { .. }
                | Request::Switch { .. }
                | Request::Resume
                | Request::Abort
                | Request::Unprepare
        );
        if !peers_only {
            return Err(Refusal::Failed(format!(
                "another host may not ask a shim to {}",
                super::shims::verb(&request)
            )));
        }
        let deadline = match &request {
            Request::Drain { deadline_ms, .. } => Duration::from_millis((*deadline_ms).into()) + self.answer_time(),
            _ => self.answer_time(),
        };
        match self.ask_shim(container, vpid, Some(migration), request, deadline) {
            Ok(reply) => Ok(Answer::Shim(reply)),
            Err(ShimError::Busy { by, .. }) => Err(Refusal::Busy { container: container.into(), by }),
            // This agent may have been started a moment ago; its shims come back one by one.
            Err(e @ ShimError::Absent { .. }) => {
                Err(Refusal::Failed(format!("{}, and it still runs", super::chain(&e))))
            }
            Err(e @ ShimError::Ended { .. }) => Err(Refusal::Absent(super::chain(&e))),
            Err(e) => Err(Refusal::Failed(super::chain(&e))),
        }
    }

    /// Asks a shim of a container here. A process that has ended is told from one that is only not connected.
    pub fn ask_shim(
        &self,
        container: &str,
        vpid: rdma_virt::id::Vpid,
        migration: Option<MigrationId>,
        request: Request,
        deadline: Duration,
    ) -> Result<Reply, ShimError> {
        match self.shims.get(container, vpid).and_then(|shim| shim.ask(migration, request, deadline)) {
            Err(ShimError::Absent { who }) if !self.is_there(container, vpid) => Err(ShimError::Ended { who }),
            // A connection ends a moment before its process does.
            Err(ShimError::Broken { who, .. }) if self.is_gone_soon(container, vpid) => Err(ShimError::Ended { who }),
            Ok(Reply::GoesOn { held }) => {
                self.metrics.held(held);
                Ok(Reply::GoesOn { held })
            }
            answer => answer,
        }
    }

    /// Whether the container still has this process, as far as can be seen.
    fn is_there(&self, container: &str, vpid: rdma_virt::id::Vpid) -> bool {
        let Ok(found) = self.host.container(container) else { return false };
        procs::of_cgroup(&found.cgroup).map_or(true, |list| list.iter().any(|p| p.vpid == vpid))
    }

    fn is_gone_soon(&self, container: &str, vpid: rdma_virt::id::Vpid) -> bool {
        let until = Instant::now() + MOMENT;
        while self.is_there(container, vpid) {
            if Instant::now() >= until {
                return false;
            }
            thread::sleep(MOMENT / 40);
        }
        true
    }

    fn check_claim(&self, migration: MigrationId, container: &str, request: &Request) -> Result<(), Refusal> {
        match lock(&self.claims).get_mut(container) {
            Some(claim) if claim.migration == migration => {
                Self::check_parked(container, claim, request)?;
                claim.heard = Instant::now();
                claim.since = claim.heard;
                Ok(())
            }
            Some(claim) => Err(Refusal::Busy { container: container.into(), by: claim.migration }),
            // It was let go, and there is nothing more that it could be told to do.
            None if matches!(request, Request::Switch { .. } | Request::Resume) => {
                Err(Refusal::Absent(format!("container {container} has gone on without the migration")))
            }
            None => Err(Refusal::Failed(format!("container {container} takes part in no migration here"))),
        }
    }

    /// Answers [`Order::Release`]. All shims of the containers are told to abort when nothing was committed; a shim
    /// that cannot be told any more has ended, and its QPs with it.
    pub fn release(&self, migration: MigrationId, committed: bool) -> Answer {
        if !committed && self.wait_again(migration) {
            return Answer::Done;
        }
        self.part(migration, committed, if committed { Outcome::Finished } else { Outcome::Undone });
        Answer::Done
    }

    /// The end of it for peers here.
    pub(super) fn part(&self, migration: MigrationId, committed: bool, outcome: Outcome) {
        let mine: Vec<String> = lock(&self.claims)
            .iter()
            .filter(|(_, claim)| claim.migration == migration)
            .map(|(id, _)| id.clone())
            .collect();
        if !committed {
            mine.iter().for_each(|container| self.let_go_on(migration, container));
        }
        let mut claims = lock(&self.claims);
        let parked = claims.values().any(|claim| claim.migration == migration && claim.parked.is_some());
        if claims.values().any(|claim| claim.migration == migration && claim.why == Why::Peer) {
            self.metrics.migration(Role::Peer, outcome);
        }
        claims.retain(|_, claim| claim.migration != migration);
        self.note_claims(&claims);
        drop(claims);
        if parked {
            self.stop_waiting(migration);
        }
    }

    /// The other end of a migration is gone, and it may have been decided: peers here go on from where they are, with QPs
    /// that may lead to nobody and end then as those of a dead host's peers do. What has arrived here is not their
    /// business.
    pub fn forsake(&self, migration: MigrationId) {
        let of_it = |claim: &Claim| claim.migration == migration && claim.why == Why::Peer;
        let peers: Vec<(String, bool)> = lock(&self.claims)
            .iter()
            .filter(|(_, claim)| of_it(claim))
            .map(|(id, claim)| (id.clone(), claim.parked.is_some()))
            .collect();
        if peers.is_empty() {
            return;
        }
        peers.iter().for_each(|(container, _)| self.let_go_alone(migration, container));
        self.metrics.migration(Role::Peer, Outcome::Orphaned);
        let mut claims = lock(&self.claims);
        claims.retain(|_, claim| !of_it(claim));
        self.note_claims(&claims);
        drop(claims);
        if peers.iter().any(|(_, parked)| *parked) {
            self.stop_waiting(migration);
        }
    }

    /// Asks the sources of quiet migrations what became of them. Called every now and then.
    pub fn look_after_claims(&self) {
        let quiet: Vec<(String, Claim)> = lock(&self.claims)
            .iter()
            // The engine asks for what arrived here.
            .filter(|(_, claim)| claim.why == Why::Peer || claim.source == LOCAL)
            .filter(|(_, claim)| claim.heard.elapsed() > QUIET)
            .filter(|(_, claim)| claim.parked.as_ref().is_none_or(Parked::is_taken))
            .map(|(id, claim)| (id.clone(), claim.clone()))
            .collect();
        for (container, claim) in quiet {
            let fate = self.call(&claim.source, Some(claim.migration), Order::Fate, self.answer_time());
            match fate {
                Ok(Answer::Fate(Fate::Aborted)) => {
                    eprintln!("{} is over, its source says; container {container} goes on", claim.migration);
                    self.release(claim.migration, false);
                }
                Ok(Answer::Fate(Fate::TakenBack)) => {
                    eprintln!("{} was taken back, its source says; container {container} goes on", claim.migration);
                    self.forsake(claim.migration);
                }
                Ok(Answer::Fate(Fate::Finished)) => {
                    eprintln!("{} is finished, its source says; container {container} is free", claim.migration);
                    self.release(claim.migration, true);
                }
                Ok(_) => {
                    if let Some(claim) = lock(&self.claims).get_mut(&container) {
                        claim.heard = Instant::now();
                        claim.since = claim.heard;
                    }
                }
                Err(e) => {
                    eprintln!("{}: its source is silent: {}", claim.migration, super::chain(&e));
                    if claim.since.elapsed() > Duration::from_secs(self.config.deadlines.orphan) {
                        eprintln!("container {container} waits no longer for {}", claim.migration);
                        if !self.wait_again(claim.migration) {
                            self.forsake(claim.migration);
                        }
                    }
                }
            }
        }
    }
}

/// The QP whose numbers, and whose idea of its own far end, fit the link.
fn find_in(reports: &[(String, ProcessState)], link: &Link) -> Option<FarEnd> {
    let mut waiting = None;
    for (container, state) in reports {
        for qp in state.contexts.iter().flat_map(|c| &c.qps) {
            if qp.vqpn != link.far.vqpn || qp.pqpn != link.far.pqpn {
                continue;
            }
            let end = |connected| {
                FarEnd::Shim(End {
                    container: container.clone(),
                    vpid: state.vpid,
                    comm: state.comm.clone(),
                    vqpn: qp.vqpn,
                    connected,
                })
            };
            match &qp.remote {
                Some(r) if r.vqpn == link.near_vqpn && r.pqpn == link.near_pqpn => return Some(end(true)),
                Some(_) => {}
                None if matches!(qp.phase, QpPhase::Reset | QpPhase::Init) => waiting = Some(end(false)),
                None => {}
            }
        }
    }
    waiting
}

/// No shim has it: is it anybody's?
fn kernel_says(pqpn: PQpn) -> FarEnd {
    let out = Command::new("rdma").args(["-j", "resource", "show", "qp", "lqpn", &pqpn.0.to_string()]).output();
    let unknown = || FarEnd::Foreign("a process this agent cannot see".into());
    let Ok(out) = out else { return unknown() };
    let Ok(list) = serde_json::from_slice::<Vec<serde_json::Value>>(&out.stdout) else { return unknown() };
    let Some(first) = list.first() else { return FarEnd::Gone };
    let text = |key: &str| first.get(key).map_or("?".into(), |v| v.to_string().trim_matches('"').to_owned());
    FarEnd::Foreign(format!("{} (pid {})", text("comm"), text("pid")))
}

/// Whether this host has the GID at all: a wrong one would be searched for in vain.
pub fn has_gid(gid: rdma_virt::id::PGid) -> bool {
    facts::gids().contains(&gid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{process, qp};
    use rdma_virt::id::{PGid, VGid, VQpn};
    use rdma_virt::saved::Remote;

    fn link(near: u32, far: u32) -> Link {
        let (vgid, pgid) = (VGid([2; 16]), PGid([2; 16]));
        let far = Remote { vgid, vqpn: VQpn(far), pgid, pqpn: PQpn(far) };
        Link { near_vqpn: VQpn(near), near_pqpn: PQpn(near), far }
    }

    #[test]
    fn the_far_end_is_found_by_the_numbers_of_both_ends() {
        let mut a = process(7, vec![qp(1, 30, Some(17))]);
        a.contexts[0].qps.push(qp(2, 31, Some(18)));
        let b = process(8, vec![qp(1, 30, Some(99))]);
        let reports = vec![("x".to_owned(), b), ("y".to_owned(), a)];
        let Some(FarEnd::Shim(end)) = find_in(&reports, &link(17, 30)) else { panic!("not found") };
        assert_eq!((end.container.as_str(), end.vqpn, end.connected), ("y", VQpn(30), true));
        assert_eq!(find_in(&reports, &link(17, 31)), None);
    }
}
