//! New objects on the destination, second QPs at peers, both connected. Runs before anything is suspended, and again
//! once the container stands still, for what changed in between; the second time there is usually nothing to do.

use super::plan::Plan;
use super::source::{Run, Side, Stop, all_good, confused};
use crate::image::HandOver;
use crate::net::msg::{Answer, Order};
use crate::phase::Phase;
use rdma_virt::msg::{Reply, Request};
use rdma_virt::saved::ProcessState;
use std::time::Duration;

/// For making and connecting everything on the destination: thousands of QPs at a few milliseconds each.
const OBJECTS: Duration = Duration::from_secs(120);

/// The states as far as objects depend on them: whether a CQ happens to be armed is the shim's business.
fn as_objects(states: &[ProcessState]) -> Vec<ProcessState> {
    let mut states = states.to_vec();
    states.iter_mut().flat_map(|s| &mut s.contexts).flat_map(|c| &mut c.cqs).for_each(|cq| cq.armed = None);
    states
}

impl Run<'_> {
    /// Before suspension.
    pub(super) fn set_up(&mut self) -> Result<(), Stop> {
        if self.states.is_empty() {
            return Ok(());
        }
        self.write_record()?;
        if !self.effects.cgroup {
            // The NIC over there holds what is registered from now on, so it has to be there.
            self.memory_round(Phase::PreSetup)?;
        }
        self.make_and_connect()
    }

    /// The objects of the states at hand, and second QPs beside everything they are connected to.
    pub(super) fn make_and_connect(&mut self) -> Result<(), Stop> {
        self.prepare()?;
        if self.hand_over == HandOver::Adopt {
            self.incubate()?;
            self.join()?;
            self.set_up_for = Some((as_objects(&self.states), self.plan.clone()));
        }
        // For a rebuild the rest comes with the switch: there is nothing to connect to yet.
        Ok(())
    }

    /// After the freeze: what was made, connected or destroyed meanwhile.
    pub(super) fn converge(&mut self) -> Result<(), Stop> {
        if self.states.is_empty() {
            return Ok(());
        }
        let reasons = self.find_peers()?;
        if !reasons.is_empty() {
            return Err(Stop::Failed(reasons.join("; ")));
        }
        // Traffic on a connection made after the suspension was never waited for.
        if let Some(loud) = self.plan.links.iter().find(|l| !l.quiet) {
            return Err(Stop::Failed(format!(
                "{} was connected while the container was being stopped; try again",
                loud.near_vqpn
            )));
        }
        let mut quiet = self.set_up_for.clone();
        if let Some((_, plan)) = &mut quiet {
            plan.links.iter_mut().for_each(|l| l.quiet = true);
        }
        if quiet == Some((as_objects(&self.states), self.plan.clone())) {
            // Nothing was made, connected or destroyed meanwhile: nobody has to be asked.
            return Ok(());
        }
        self.set_up()
    }

    /// Peers make second QPs.
    fn prepare(&mut self) -> Result<(), Stop> {
        let asks: Vec<(Side, Request)> = self.plan.prepares().into_iter().map(|(p, r)| (Side::Peer(p), r)).collect();
        for (side, reply) in all_good(self.ask_all(asks, self.answer_time()))? {
            let (Side::Peer(peer), Reply::Prepared { qps }) = (&side, reply) else {
                return Err(confused(&side, "prepare"));
            };
            if !self.plan.prepared(peer, &qps) {
                // It does not have them any more.
                return Err(Stop::Absent(format!("{peer} did not make every second QP it was asked for")));
            }
        }
        Ok(())
    }

    /// The destination makes its objects.
    fn incubate(&mut self) -> Result<(), Stop> {
        match self.ask_destination(Order::Incubate { states: self.states.clone() }, OBJECTS)? {
            Answer::Incubated { qps, gids, mrs } => {
                (self.plan.born, self.plan.gids, self.plan.mrs) = (qps, gids, mrs);
                Ok(())
            }
            _ => Err(confused("the destination", "incubate")),
        }
    }

    /// Both sides connect.
    fn join(&mut self) -> Result<(), Stop> {
        let links = self.plan.joins().map_err(Stop::Failed)?;
        if !links.is_empty() {
            match self.ask_destination(Order::Join { links }, OBJECTS)? {
                Answer::Done => {}
                _ => return Err(confused("the destination", "join")),
            }
        }
        let asks: Vec<(Side, Request)> = self.plan.connects().into_iter().map(|(p, r)| (Side::Peer(p), r)).collect();
        for (side, reply) in all_good(self.ask_all(asks, self.answer_time()))? {
            let (Side::Peer(peer), Reply::Done) = (&side, reply) else { return Err(confused(&side, "connect")) };
            Plan::connected(&mut self.plan, peer);
        }
        Ok(())
    }
}
