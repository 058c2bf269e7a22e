//! Suspension, wait-before-stop, freeze: from a container under full traffic to one that stands still with nothing in
//! flight.

use std::collections::BTreeMap;
use std::time::Duration;

use rdma_virt::id::Vpid;
use rdma_virt::msg::{Count, Reply, Request, Scope};

use super::negotiate::speak_against;
use super::plan::PeerProcess;
use super::source::{Run, Side, Stop, all_good, confused};

impl Run<'_> {
    /// Every end holds new sends. On return nobody is inside a post any more, and the counts are final.
    pub(super) fn suspend(&mut self) -> Result<(), Stop> {
        if self.effects.recorded {
            // Peers found since belong into the record.
            self.record.peers = self.plan.peer_containers();
        } else {
            self.write_record()?;
        }
        if self.states.is_empty() {
            return Ok(());
        }
        self.effects.suspended = true;
        let own = self.states.iter().map(|s| (Side::Own(s.vpid), Request::Suspend { scope: Scope::All }));
        self.suspended(own.chain(self.suspend_peers()).collect())?;

        // What was connected since the last look has a far end that must hold its sends too.
        let (states, silent) = self.reports(self.states.iter().map(|s| s.vpid).collect());
        if !silent.is_empty() {
            return Err(Stop::Failed(silent.join("; ")));
        }
        let before = self.plan.peer_qps();
        self.states = states;
        let reasons = self.find_peers()?;
        if !reasons.is_empty() {
            return Err(Stop::Failed(reasons.join("; ")));
        }
        if self.plan.peer_qps() != before {
            let own = self.states.iter().map(|s| (Side::Own(s.vpid), Request::Suspend { scope: Scope::All }));
            self.suspended(own.chain(self.suspend_peers()).collect())?;
        }
        Ok(())
    }

    fn suspend_peers(&self) -> impl Iterator<Item = (Side, Request)> + use<> {
        let peers = self.plan.peer_qps().into_iter();
        peers.map(|(peer, qps)| (Side::Peer(peer), Request::Suspend { scope: Scope::Qps(qps) }))
    }

    fn suspended(&mut self, asks: Vec<(Side, Request)>) -> Result<(), Stop> {
        for (side, reply) in all_good(self.ask_all(asks, self.answer_time()))? {
            match (side, reply) {
                (Side::Own(vpid), Reply::Suspended { counts }) => {
                    self.counts.0.insert(vpid, counts);
                }
                (Side::Peer(peer), Reply::Suspended { counts }) => {
                    self.counts.1.insert(peer, counts);
                }
                (side, _) => return Err(confused(side, "suspend")),
            }
        }
        Ok(())
    }

    /// What is in flight completes, on all ends at the same time; each knows how much it has still to receive.
    pub(super) fn drain(&mut self) -> Result<(), Stop> {
        if self.states.is_empty() {
            return Ok(());
        }
        let seconds = self.request.drain.unwrap_or(self.world.config().deadlines.drain);
        let deadline_ms = u32::try_from(seconds.saturating_mul(1000)).unwrap_or(u32::MAX);
        let expected = self.plan.expectations(&self.counts.0, &self.counts.1);
        let own = expected.near.into_iter().map(|(vpid, expect)| (Side::Own(vpid), expect));
        let peers = expected.far.into_iter().map(|(peer, expect)| (Side::Peer(peer), expect));
        let ask = |(side, expect)| (side, Request::Drain { expect, deadline_ms });
        let deadline = Duration::from_millis(deadline_ms.into()) + self.answer_time();
        let replies = self.ask_all(own.chain(peers).map(ask).collect(), deadline);
        let mut stuck = Vec::new();
        for (side, reply) in all_good(replies)? {
            match reply {
                Reply::Drained => {}
                Reply::Stuck { qps } => {
                    stuck.extend(
                        qps.iter().map(|q| format!("{side}: {}{}: {}", q.vqpn, self.far_of(&side, q.vqpn), q.why)),
                    );
                }
                _ => return Err(confused(side, "drain")),
            }
        }
        if !stuck.is_empty() {
            return Err(Stop::Failed(format!("after {seconds} s traffic was still in flight: {}", stuck.join("; "))));
        }
        self.plan.links.iter_mut().for_each(|l| l.quiet = true);
        Ok(())
    }

    /// Names the other end of a stuck QP.
    fn far_of(&self, side: &Side, vqpn: rdma_virt::id::VQpn) -> String {
        let Side::Own(vpid) = side else { return String::new() };
        let link = self.plan.links.iter().find(|l| l.near.vpid == *vpid && l.near_vqpn == vqpn);
        link.map_or(String::new(), |l| format!(" (connected to {} at {})", l.remote.vqpn, l.remote.pgid))
    }

    /// The shims say everything once more and let go of their connections; then the cgroup stands still, and no packet
    /// of the container's own network passes any more.
    pub(super) fn freeze(&mut self) -> Result<(), Stop> {
        let container = self.container()?.clone();
        let asks: Vec<(Side, Request)> = self.states.iter().map(|s| (Side::Own(s.vpid), Request::Freeze)).collect();
        let replies = self.ask_all(asks, self.answer_time());
        // Also those whose answer did not reach us may have frozen: told again, they do not mind.
        self.effects.frozen = self.states.iter().map(|s| s.vpid).collect();
        let mut states = Vec::new();
        for (side, reply) in all_good(replies)? {
            match reply {
                Reply::State(state) => states.push(*state),
                _ => return Err(confused(side, "freeze")),
            }
        }
        self.states = states;
        for state in &self.states {
            if let Some(b) = state.blockers.first() {
                return Err(Stop::Failed(format!(
                    "{} (pid {}) began to use {} on {}, which cannot be moved",
                    state.comm, state.vpid.0, b.verb, b.object
                )));
            }
        }
        // Nothing is connected any more by itself: verbs of the control path wait.
        self.no_handshake(true)?;
        // A connection that is still open when the tasks stop is one that leads out of the container: CRIU refuses it.
        let vpids: Vec<Vpid> = self.states.iter().map(|s| s.vpid).collect();
        self.world.disconnected(&self.request.container, &vpids, self.answer_time()).map_err(|there| {
            let there: Vec<String> = there.iter().map(|v| v.0.to_string()).collect();
            Stop::Failed(format!("the shims of pids {} did not close their connections", there.join(", ")))
        })?;
        self.effects.cgroup = true;
        self.world.host().freeze(&container).map_err(|e| Stop::Failed(format!("freezing the container: {e}")))?;
        let known: Vec<i32> = self.states.iter().map(|s| s.vpid.0).collect();
        let mut against = speak_against(&self.list_processes()?, &known);
        against.extend(self.lost()?);
        if !against.is_empty() {
            return Err(Stop::Failed(against.join("; ")));
        }
        let wire = self.world.host().wire(&container.bundle, Some(container.init));
        if let Some(mut wire) = wire.map_err(|e| Stop::Failed(format!("the container's network: {e}")))? {
            let down = wire.down();
            self.effects.wire = Some(wire);
            down.map_err(|e| Stop::Failed(format!("taking the container's network down: {e}")))?;
        }
        Ok(())
    }
}

/// Final counts of both kinds of shims.
pub(super) type Counts = (BTreeMap<Vpid, Vec<Count>>, BTreeMap<PeerProcess, Vec<Count>>);
