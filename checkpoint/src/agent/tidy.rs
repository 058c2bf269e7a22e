//! What is remembered of containers that are no more: dropped when their directory goes, and, for those that live
//! elsewhere, after their home has been asked.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{Agent, chain, lock};
use crate::net::msg::{Answer, MovedProcess, Order};
use crate::record::now;

/// For a home's word; nobody waits for it.
const ANSWER: Duration = Duration::from_secs(5);

/// A place is believed this long before it is asked whether it still is one, seconds.
const FRESH: u64 = 3600;

const DAY: u64 = 24 * 3600;

impl Agent {
    /// A container of this host is deleted, or a new one has its name: the new one is not its heir.
    pub fn forget_container(&self, container: &str) {
        self.moved.forget_guest(container);
        lock(&self.registered).retain(|_, r| r.container != container);
        lock(&self.cgroups).remove(container);
    }

    /// Guests that were deleted while no agent ran.
    pub fn forget_lost_guests(&self) {
        for id in self.moved.guests() {
            if !self.doors.of(&id).exists() {
                self.forget_container(&id);
            }
        }
    }

    /// Answers [`Order::Has`]: it lives here, or it is known where it went.
    pub fn has(&self, container: &str, process: &MovedProcess) -> bool {
        let here = self.doors.of(container).exists() || self.host.container(container).is_ok();
        let known = |p: &MovedProcess| same(p, process) && p.since > process.since;
        here || self.moved.all().iter().any(known)
    }

    /// Asks the homes of everybody who left long enough ago. A home that cannot be reached is believed for as many days
    /// as the settings say. Called every now and then.
    pub fn tidy_moved(&self) {
        let age = |p: &MovedProcess| now().saturating_sub(p.since);
        let mut silent = BTreeSet::new();
        for process in self.moved.all().into_iter().filter(|p| age(p) > FRESH) {
            let order = Order::Has { process: Box::new(process.clone()) };
            let answer = match silent.contains(&process.at) {
                false => self.call(&process.at, None, order, ANSWER),
                true => continue,
            };
            let ended = match answer {
                Ok(Answer::Has(has)) => !has,
                Ok(_) => false,
                Err(e) => {
                    let over = age(&process) > self.config.forget_moved_days.saturating_mul(DAY);
                    if over {
                        eprintln!("container {}: forgotten, its home is silent: {}", process.container, chain(&e));
                    } else {
                        silent.insert(process.at.clone());
                    }
                    over
                }
            };
            if ended && let Err(e) = self.moved.forget(&process) {
                eprintln!("{}", chain(&e));
            }
        }
    }
}

/// The same process of the same container, wherever it is.
pub fn same(a: &MovedProcess, b: &MovedProcess) -> bool {
    a.container == b.container && a.vpid == b.vpid && a.vgids.iter().any(|g| b.vgids.contains(g))
}
