//! Which QP of the moving container is connected to which other, and what that asks of everybody. Pure: states and
//! answers in, orders out; every rule here is tested without a network.

use std::collections::BTreeMap;

use rdma_virt::id::{ObjId, PGid, PQpn, VGid, VQpn, Vpid};
use rdma_virt::msg::{Connect, Count, KeyTable, Request, SwitchLink};
use rdma_virt::saved::{ContextState, ProcessState, QpPhase, QpState, Remote};
use serde::{Deserialize, Serialize};

use crate::net::msg::{BornGid, BornMr, BornQp, End, FarEnd, JoinLink, Lease, Link, MovedProcess};

/// One QP of the moving container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QpKey {
    pub vpid: Vpid,
    pub context: ObjId,
    pub qp: ObjId,
}

/// One shim outside the moving container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PeerProcess {
    /// Address of its host's agent.
    pub agent: String,
    pub container: String,
    pub vpid: Vpid,
    pub comm: String,
}

impl std::fmt::Display for PeerProcess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let PeerProcess { agent, container, vpid, comm } = self;
        write!(f, "{comm} (pid {} of container {container} at {agent})", vpid.0)
    }
}

/// Who holds the far end of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Far {
    /// The moving container itself.
    Inside(QpKey),
    /// A process that can make a second QP.
    Peer(PeerProcess),
    /// Nobody any more, or somebody who has not connected back yet: the new QP points where the old one did.
    AsItWas,
}

/// One connected QP of the moving container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedLink {
    pub near: QpKey,
    pub near_vqpn: VQpn,
    /// On the source.
    pub near_pqpn: PQpn,
    pub remote: Remote,
    pub far: Far,
    /// The peer's second QP, once made.
    pub second: Option<PQpn>,
    /// The number of the new QP the peer's second one was connected to.
    pub connected_to: Option<(PGid, PQpn)>,
    /// First PSN of the moving end, and of the far one. 24 bits.
    pub near_psn: u32,
    pub far_psn: u32,
    /// Both ends were suspended and drained.
    pub quiet: bool,
}

/// All links, and what the destination made so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub links: Vec<PlannedLink>,
    pub born: Vec<BornQp>,
    /// And what the processes' GIDs are there.
    #[serde(default)]
    pub gids: Vec<BornGid>,
    /// MRs that are registered before their processes exist.
    #[serde(default)]
    pub mrs: Vec<BornMr>,
}

fn qps(states: &[ProcessState]) -> impl Iterator<Item = (QpKey, &QpState)> {
    states.iter().flat_map(|s| {
        s.contexts
            .iter()
            .flat_map(move |c| c.qps.iter().map(move |q| (QpKey { vpid: s.vpid, context: c.id, qp: q.id }, q)))
    })
}

pub(super) fn is_connected(qp: &QpState) -> bool {
    qp.remote.is_some() && matches!(qp.phase, QpPhase::Rtr | QpPhase::Rts | QpPhase::Sqd | QpPhase::Sqe)
}

/// The far end inside the container itself: its numbers and its idea of its own far end must fit.
fn inside(states: &[ProcessState], near: &QpState, far: &Remote) -> Option<QpKey> {
    qps(states)
        .find(|(_, q)| {
            q.vqpn == far.vqpn
                && q.pqpn == far.pqpn
                && q.remote.is_some_and(|r| r.vqpn == near.vqpn && r.pqpn == near.pqpn)
        })
        .map(|(key, _)| key)
}

impl Plan {
    /// Brings the links to what the states say: keeps what is known of links that are still there, drops others, and
    /// adds new ones. Returns positions of those whose far end has to be found (again). `here` says whether a GID is
    /// one of the source's: numbers alone do not tell a link inside from one between two hosts that count alike.
    /// `psn` gives random numbers.
    pub fn update(
        &mut self,
        states: &[ProcessState],
        here: impl Fn(PGid) -> bool,
        mut psn: impl FnMut() -> u32,
    ) -> Vec<usize> {
        let old = std::mem::take(&mut self.links);
        let mut unknown = Vec::new();
        for (near, qp) in qps(states).filter(|(_, q)| is_connected(q)) {
            let Some(remote) = qp.remote else { continue };
            let known = old.iter().find(|l| l.near == near && l.near_pqpn == qp.pqpn && l.remote == remote);
            if let Some(link) = known {
                // The far end may have connected back since.
                if link.far == Far::AsItWas {
                    unknown.push(self.links.len());
                }
                self.links.push(link.clone());
                continue;
            }
            let far = if here(remote.pgid) { inside(states, qp, &remote) } else { None };
            if far.is_none() {
                unknown.push(self.links.len());
            }
            self.links.push(PlannedLink {
                near,
                near_vqpn: qp.vqpn,
                near_pqpn: qp.pqpn,
                remote,
                far: far.map_or(Far::AsItWas, Far::Inside),
                second: None,
                connected_to: None,
                near_psn: psn() & 0xff_ffff,
                far_psn: psn() & 0xff_ffff,
                quiet: false,
            });
        }
        self.share_psns();
        unknown
    }

    /// Both directions of a link inside the container are listed; what one end sends with the other expects.
    fn share_psns(&mut self) {
        for i in 0..self.links.len() {
            if let Far::Inside(other) = self.links[i].far
                && let Some(j) = self.links.iter().position(|l| l.near == other)
                && i < j
            {
                (self.links[j].near_psn, self.links[j].far_psn) = (self.links[i].far_psn, self.links[i].near_psn);
            }
            // A QP connected to itself sends what it expects.
            if self.links[i].far == Far::Inside(self.links[i].near) {
                self.links[i].far_psn = self.links[i].near_psn;
            }
        }
    }

    /// As somebody else begins with it: nothing is made or connected yet.
    pub fn bare(&self) -> Plan {
        let link = |l: &PlannedLink| PlannedLink { second: None, connected_to: None, ..l.clone() };
        Plan { links: self.links.iter().map(link).collect(), ..Plan::default() }
    }

    /// Forgets every link that leads out of the container, and says so in the states: these QPs are not connected any more.
    pub fn sever<'s>(&mut self, states: impl Iterator<Item = &'s mut ProcessState>) {
        self.links.retain(|l| matches!(l.far, Far::Inside(_)));
        let inside: Vec<QpKey> = self.links.iter().map(|l| l.near).collect();
        for state in states {
            let vpid = state.vpid;
            for context in &mut state.contexts {
                let id = context.id;
                let outside = |q: &&mut QpState| !inside.contains(&QpKey { vpid, context: id, qp: q.id });
                for qp in context.qps.iter_mut().filter(|q| is_connected(q)).filter(outside) {
                    (qp.phase, qp.remote) = (QpPhase::Init, None);
                }
            }
        }
    }

    /// Names the peers' agents as they are called from another host.
    pub fn relocate(&mut self, agent_of: impl Fn(PGid) -> String) {
        for link in &mut self.links {
            if let Far::Peer(peer) = &mut link.far {
                peer.agent = agent_of(link.remote.pgid);
            }
        }
    }

    /// How the link looks to the host of its far end.
    pub fn question(&self, at: usize) -> Link {
        let l = &self.links[at];
        Link { near_vqpn: l.near_vqpn, near_pqpn: l.near_pqpn, far: l.remote }
    }

    pub fn found(&mut self, at: usize, agent: &str, end: &End) {
        let End { container, vpid, comm, connected, .. } = end.clone();
        if connected {
            self.links[at].far = Far::Peer(PeerProcess { agent: agent.into(), container, vpid, comm });
        }
    }

    /// Whether this is the process that was found for the link, with the QP it had.
    pub fn is_far_end(&self, at: usize, found: &FarEnd) -> bool {
        match (&self.links[at].far, found) {
            (Far::Peer(peer), FarEnd::Shim(end)) => {
                end.connected && (&peer.container, peer.vpid) == (&end.container, end.vpid)
            }
            _ => false,
        }
    }

    /// QPs of a peer are no more: the new QPs of these links point where the old ones did. What the peer has made for its
    /// other links is to be made again.
    pub fn without(&mut self, peer: &PeerProcess, gone: &[usize]) {
        let theirs = Far::Peer(peer.clone());
        for (at, link) in self.links.iter_mut().enumerate().filter(|(_, l)| l.far == theirs) {
            (link.second, link.connected_to) = (None, None);
            if gone.contains(&at) {
                link.far = Far::AsItWas;
            }
        }
    }

    /// All peers, each once, with positions of their links.
    pub fn peers(&self) -> BTreeMap<PeerProcess, Vec<usize>> {
        let mut peers: BTreeMap<PeerProcess, Vec<usize>> = BTreeMap::new();
        for (at, link) in self.links.iter().enumerate() {
            if let Far::Peer(peer) = &link.far {
                peers.entry(peer.clone()).or_default().push(at);
            }
        }
        peers
    }

    /// Containers per agent.
    pub fn peer_containers(&self) -> Vec<(String, Vec<String>)> {
        let mut by_agent: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for peer in self.peers().into_keys() {
            let list = by_agent.entry(peer.agent).or_default();
            if !list.contains(&peer.container) {
                list.push(peer.container);
            }
        }
        by_agent.into_iter().collect()
    }

    /// Second QPs still to be made, per peer.
    pub fn prepares(&self) -> Vec<(PeerProcess, Request)> {
        self.for_peers(|l| l.second.is_none().then_some(l.remote.vqpn), |qps| Request::Prepare { qps })
    }

    /// A peer has made these; false if one that was asked for is missing.
    pub fn prepared(&mut self, peer: &PeerProcess, made: &[(VQpn, PQpn)]) -> bool {
        let mut all = true;
        for link in self.links.iter_mut().filter(|l| l.far == Far::Peer(peer.clone()) && l.second.is_none()) {
            link.second = made.iter().find(|(v, _)| *v == link.remote.vqpn).map(|(_, p)| *p);
            all &= link.second.is_some();
        }
        all
    }

    fn born(&self, key: QpKey) -> Option<&BornQp> {
        self.born.iter().find(|b| b.vpid == key.vpid && b.context == key.context && b.qp == key.qp)
    }

    /// How the destination connects its new QPs; an error names a QP it did not make.
    pub fn joins(&self) -> Result<Vec<JoinLink>, String> {
        self.links.iter().map(|l| self.join(l)).collect()
    }

    /// As [`Plan::joins`], without links inside the container: what can be said before any new QP has a number.
    pub fn joins_outside(&self) -> Result<Vec<JoinLink>, String> {
        self.links.iter().filter(|l| !matches!(l.far, Far::Inside(_))).map(|l| self.join(l)).collect()
    }

    /// As [`Plan::joins`], without links to QPs that nobody made: their process has ended since.
    pub fn joins_known(&self) -> Vec<JoinLink> {
        self.links.iter().filter_map(|l| self.join(l).ok()).collect()
    }

    fn join(&self, l: &PlannedLink) -> Result<JoinLink, String> {
        let (pgid, pqpn) = match &l.far {
            Far::Inside(other) => {
                let b = self.born(*other).ok_or_else(|| format!("the destination made no {}", l.remote.vqpn))?;
                (b.pgid, b.pqpn)
            }
            Far::Peer(peer) => {
                let second = l.second.ok_or_else(|| format!("{peer} made no second QP for {}", l.remote.vqpn))?;
                (l.remote.pgid, second)
            }
            Far::AsItWas => (l.remote.pgid, l.remote.pqpn),
        };
        let QpKey { vpid, context, qp } = l.near;
        let remote = Remote { pgid, pqpn, ..l.remote };
        Ok(JoinLink { vpid, context, qp, remote, sq_psn: l.near_psn, rq_psn: l.far_psn })
    }

    /// Second QPs to be connected, per peer: those never connected, or connected to a QP that was made anew since.
    pub fn connects(&self) -> Vec<(PeerProcess, Request)> {
        let connect = |l: &PlannedLink| {
            let born = self.born(l.near)?;
            (l.connected_to != Some((born.pgid, born.pqpn))).then_some(Connect {
                vqpn: l.remote.vqpn,
                remote_gid: born.pgid,
                remote_qpn: born.pqpn,
                sq_psn: l.far_psn,
                rq_psn: l.near_psn,
            })
        };
        self.for_peers(connect, |links| Request::Connect { links })
    }

    /// A peer has connected all of its own.
    pub fn connected(&mut self, peer: &PeerProcess) {
        for at in 0..self.links.len() {
            if self.links[at].far == Far::Peer(peer.clone()) {
                self.links[at].connected_to = self.born(self.links[at].near).map(|b| (b.pgid, b.pqpn));
            }
        }
    }

    fn for_peers<T>(
        &self,
        pick: impl Fn(&PlannedLink) -> Option<T>,
        ask: impl Fn(Vec<T>) -> Request,
    ) -> Vec<(PeerProcess, Request)> {
        self.peers()
            .into_iter()
            .filter_map(|(peer, at)| {
                let picked: Vec<T> = at.iter().filter_map(|i| pick(&self.links[*i])).collect();
                (!picked.is_empty()).then(|| (peer, ask(picked)))
            })
            .collect()
    }

    /// The peers' QPs whose far end moves.
    pub fn peer_qps(&self) -> Vec<(PeerProcess, Vec<VQpn>)> {
        let list = |at: Vec<usize>| at.iter().map(|i| self.links[*i].remote.vqpn).collect();
        self.peers().into_iter().map(|(peer, at)| (peer, list(at))).collect()
    }

    /// After all ends are suspended: how many messages each QP has to have received before it is quiet. A QP whose
    /// far end does not take part waits for nothing more.
    pub fn expectations(
        &self,
        own: &BTreeMap<Vpid, Vec<Count>>,
        peers: &BTreeMap<PeerProcess, Vec<Count>>,
    ) -> Expectations {
        let sent = |counts: Option<&Vec<Count>>, vqpn: VQpn| {
            counts.and_then(|c| c.iter().find(|c| c.vqpn == vqpn)).map(|c| c.sent)
        };
        let near = own
            .iter()
            .map(|(vpid, counts)| {
                let expect = |c: &Count| {
                    let link = self.links.iter().find(|l| l.near.vpid == *vpid && l.near_vqpn == c.vqpn);
                    let far = link.and_then(|l| match &l.far {
                        Far::Inside(other) => sent(own.get(&other.vpid), l.remote.vqpn),
                        Far::Peer(peer) => sent(peers.get(peer), l.remote.vqpn),
                        Far::AsItWas => None,
                    });
                    (c.vqpn, far.unwrap_or(c.received))
                };
                (*vpid, counts.iter().map(expect).collect())
            })
            .collect();
        let far = self
            .peers()
            .into_iter()
            .map(|(peer, at)| {
                let list = at
                    .iter()
                    .filter_map(|i| {
                        let l = &self.links[*i];
                        Some((l.remote.vqpn, sent(own.get(&l.near.vpid), l.near_vqpn)?))
                    })
                    .collect();
                (peer, list)
            })
            .collect();
        Expectations { near, far }
    }

    /// What peers are told after commit, and what the moved processes are told of each other. `keys` is what the
    /// moved processes answered.
    pub fn switches(&self, keys: &[(Vpid, KeyTable)]) -> Switches {
        let mut vpids: Vec<Vpid> = keys.iter().map(|(v, _)| *v).collect();
        vpids.dedup();
        let table_of = |vpid: Vpid| vpids.iter().position(|v| *v == vpid).and_then(|i| u32::try_from(i).ok());
        let tables: Vec<KeyTable> = keys.iter().map(|(_, t)| t.clone()).collect();
        let switch = |l: &PlannedLink| {
            let born = self.born(l.near)?;
            let (remote_gid, remote_qpn) = (born.pgid, born.pqpn);
            Some(SwitchLink { vqpn: l.remote.vqpn, remote_gid, remote_qpn, table: table_of(l.near.vpid)? })
        };
        let ask = |links| Request::Switch { links, tables: tables.clone() };
        let mut inside: BTreeMap<Vpid, Vec<SwitchLink>> = BTreeMap::new();
        for l in &self.links {
            if let Far::Inside(other) = &l.far
                && let Some(s) = switch(l)
            {
                inside.entry(other.vpid).or_default().push(s);
            }
        }
        Switches {
            peers: self.for_peers(switch, ask),
            inside: inside.into_iter().map(|(vpid, links)| (vpid, ask(links))).collect(),
        }
    }

    /// Remote keys of the processes as their shims will tell them, if none of their MRs is left for a shim to register.
    pub fn keys(&self, states: &[ProcessState]) -> Option<Vec<(Vpid, KeyTable)>> {
        let born: BTreeMap<_, _> = self.mrs.iter().map(|m| ((m.vpid, m.context, m.mr), m.prkey)).collect();
        let of = |s: &ProcessState| {
            let mrs = s.contexts.iter().flat_map(|c| c.mrs.iter().map(move |mr| (c.id, mr)));
            let pairs = mrs.map(|(context, mr)| Some((mr.vrkey, *born.get(&(s.vpid, context, mr.id))?)));
            let changed = pairs.filter(|pair| pair.is_none_or(|(vrkey, prkey)| vrkey.0 != prkey.0));
            Some((s.vpid, KeyTable(changed.collect::<Option<_>>()?)))
        };
        states.iter().map(of).collect()
    }

    /// Where the moved processes are now, for everybody's tables.
    pub fn moved(
        &self,
        container: &str,
        states: &[ProcessState],
        keys: &[(Vpid, KeyTable)],
        lease: Lease,
        at: &str,
        since: u64,
    ) -> Vec<MovedProcess> {
        let vgids = |s: &ProcessState| {
            let mut gids: Vec<VGid> = s.contexts.iter().flat_map(|c: &ContextState| &c.gids).map(|g| g.gid).collect();
            gids.sort();
            gids.dedup();
            gids
        };
        states
            .iter()
            .map(|s| MovedProcess {
                container: container.into(),
                vpid: s.vpid,
                vgids: vgids(s),
                gids: self.gids.iter().filter(|g| g.vpid == s.vpid).map(|g| (g.vgid, g.pgid)).collect(),
                qps: self.born.iter().filter(|b| b.vpid == s.vpid).map(|b| (b.vqpn, b.pqpn, b.pgid)).collect(),
                keys: keys.iter().find(|(v, _)| *v == s.vpid).map(|(_, t)| t.clone()).unwrap_or_default(),
                lease,
                at: at.into(),
                since,
            })
            .collect()
    }
}

/// See [`Plan::expectations`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expectations {
    pub near: BTreeMap<Vpid, Vec<(VQpn, u64)>>,
    pub far: BTreeMap<PeerProcess, Vec<(VQpn, u64)>>,
}

/// See [`Plan::switches`].
#[derive(Clone, Debug, PartialEq)]
pub struct Switches {
    pub peers: Vec<(PeerProcess, Request)>,
    pub inside: Vec<(Vpid, Request)>,
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
