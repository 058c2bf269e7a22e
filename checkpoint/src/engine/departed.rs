//! Peers that ended while they waited for an image. Whoever restores it does without them: QPs that were connected to them
//! point where they did, and end as with a dead remote; so does a QP whose far end is gone in a migration. The others go
//! on.
//!
//! A peer is known by the QPs it showed, not by its name: who has the pid of a process that ended, in a container that has
//! the name of one that ended, is a stranger. Peers that cannot be asked have not ended; without them nothing is restored.

use std::collections::BTreeMap;

use rdma_virt::msg::{Reply, Request};

use super::plan::PeerProcess;
use super::source::{Run, Side, Stop, confused};
use crate::net::msg::{Answer, Order};

impl Run<'_> {
    /// As [`Run::make_and_connect`], without what ends meanwhile.
    pub(super) fn make_with_those_left(&mut self) -> Result<(), Stop> {
        loop {
            match self.make_and_connect() {
                // Each time there are fewer.
                Err(Stop::Absent(why)) if self.leave_out_departed()? == 0 => return Err(Stop::Absent(why)),
                Err(Stop::Absent(_)) => {}
                ended => return ended,
            }
        }
    }

    /// Takes links out of the plan whose far ends are no more, and says so; how many.
    pub(super) fn leave_out_departed(&mut self) -> Result<usize, Stop> {
        let departed = self.departed()?;
        for (peer, links) in &departed {
            self.plan.without(peer, links);
            let qps: Vec<String> = links.iter().map(|at| self.plan.links[*at].near_vqpn.to_string()).collect();
            self.note(format!(
                "{peer} ended while it waited: what was connected to it ({}) ends as with a dead remote",
                qps.join(", ")
            ));
        }
        Ok(departed.iter().map(|(_, links)| links.len()).sum())
    }

    fn departed(&self) -> Result<Vec<(PeerProcess, Vec<usize>)>, Stop> {
        let missing = self.not_found()?;
        let mut peers = self.plan.peers();
        peers.values_mut().for_each(|links| links.retain(|at| missing.contains(at)));
        peers.retain(|_, links| !links.is_empty());
        // A shim that is only not connected does not show its QPs either. This one can be asked of whoever waits, and
        // changes nothing that is still of use.
        let asks = peers.keys().map(|peer| (Side::Peer(peer.clone()), Request::Unprepare)).collect();
        for (side, reply) in self.ask_all(asks, self.answer_time()) {
            match reply {
                Ok(Reply::Done) | Err(Stop::Absent(_)) => {}
                Ok(_) => return Err(confused(side, "drop its second QPs")),
                Err(stop) => return Err(stop),
            }
        }
        Ok(peers.into_iter().collect())
    }

    /// Links whose far ends their agents do not find.
    fn not_found(&self) -> Result<Vec<usize>, Stop> {
        let mut by_agent: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (peer, links) in self.plan.peers() {
            by_agent.entry(peer.agent).or_default().extend(links);
        }
        let find = |(agent, at): &(String, Vec<usize>)| {
            let links = at.iter().map(|i| self.plan.question(*i)).collect();
            self.world.call(agent, self.id, Order::Find { links }, self.answer_time())
        };
        let mut missing = Vec::new();
        for ((agent, at), answer) in self.fan_out(by_agent.into_iter().collect(), find) {
            let ends = match answer? {
                Answer::Found(ends) if ends.len() == at.len() => ends,
                _ => return Err(confused(&agent, "find")),
            };
            let there = |i: &usize, end| self.plan.is_far_end(*i, end);
            missing.extend(at.iter().zip(&ends).filter(|(i, end)| !there(i, end)).map(|(i, _)| *i));
        }
        Ok(missing)
    }
}
