//! What sysfs goes on showing a container that moves: gathered by the source before anything stands still, and laid out
//! by the destination, or written into an image on disk. The files themselves are the business of [`crate::likeness`].

use std::path::Path;

use super::dest::Arrival;
use super::source::{Run, Stop, confused};
use crate::agent::{Agent, chain};
use crate::likeness::{self, Likeness};
use crate::net::msg::{Answer, Order};

const CLASS: &str = "/sys/class";

impl Run<'_> {
    /// The devices its processes have open, and those it was shown before. A device that this host's sysfs does not
    /// have, being in a network namespace of its own, is seen as the destination shows it.
    fn likenesses(&self) -> Result<Vec<Likeness>, Stop> {
        let before = self.world.host().likenesses(&self.request.container);
        let mut all = before.map_err(|e| Stop::Failed(e.to_string()))?;
        for context in self.states.iter().flat_map(|s| &s.contexts) {
            if !all.iter().any(|known| known.name == context.device)
                && let Ok(likeness) = Likeness::take(Path::new(CLASS), context)
            {
                all.push(likeness);
            }
        }
        Ok(all)
    }

    /// Tells the destination.
    pub(super) fn show_there(&self) -> Result<(), Stop> {
        let devices = self.likenesses()?;
        if devices.is_empty() {
            return Ok(());
        }
        match self.ask_destination(Order::Show { devices }, self.answer_time())? {
            Answer::Done => Ok(()),
            _ => Err(confused(&self.to, "show")),
        }
    }

    /// Puts them into an image.
    pub(super) fn show_in(&self, images: &Path) -> Result<(), Stop> {
        match self.likenesses()? {
            none if none.is_empty() => Ok(()),
            devices => likeness::write(images, &devices).map_err(|e| Stop::Failed(chain(&e))),
        }
    }
}

impl Arrival {
    /// What the source told.
    pub(super) fn show(&mut self, agent: &Agent, devices: &[Likeness]) -> Result<(), String> {
        self.shown = true;
        agent.host.show(&self.offer.container, devices).map_err(|e| e.to_string())
    }
}
