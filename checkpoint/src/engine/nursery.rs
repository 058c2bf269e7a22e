//! The incubator as the engine's [`Nursery`].

use rdma_virt::saved::{AdoptedProcess, ProcessState};

use super::host::{HostError, Nursery, Result};
use crate::incubator::{Incubator, IncubatorError, Link};
use crate::net::msg::JoinLink;

impl From<IncubatorError> for HostError {
    fn from(e: IncubatorError) -> Self {
        HostError::of(&e)
    }
}

impl Nursery for Incubator {
    fn converge(&mut self, states: &[ProcessState]) -> Result<Vec<AdoptedProcess>> {
        Ok(Incubator::converge(self, states)?)
    }

    fn connect(&mut self, links: &[JoinLink]) -> Result<()> {
        let links: Vec<Link> = links
            .iter()
            .map(|l| Link {
                vpid: l.vpid,
                ctx: l.context,
                qp: l.qp,
                remote: l.remote,
                sq_psn: l.sq_psn,
                rq_psn: l.rq_psn,
            })
            .collect();
        Ok(Incubator::connect(self, &links)?)
    }

    fn report(&mut self) -> Result<Vec<AdoptedProcess>> {
        Ok(Incubator::report(self)?)
    }

    fn arm(&mut self) -> Result<()> {
        Ok(Incubator::arm(self)?)
    }

    fn disarm(&mut self) -> Result<()> {
        Ok(Incubator::disarm(self)?)
    }

    fn missing(&mut self) -> Result<Vec<String>> {
        Ok(self.handed()?.missing)
    }

    fn release(self: Box<Self>) -> Result<()> {
        Ok(Incubator::release(*self)?)
    }
}
