//! Asynchronous events around a change of kernel objects: what the old ones raised and nobody has read is kept, and what
//! the new ones raise because of us is dropped. Keeping and announcing are in [`crate::kept`]; here is when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::abi::{event, ibv_async_event};
use crate::context::ShadowContext;
use crate::events::Subject;
use crate::registry;

/// How long a NIC may take to report what we did.
const REPORT: Duration = Duration::from_millis(50);
const STEP: Duration = Duration::from_millis(1);

fn alive() -> impl Iterator<Item = Arc<ShadowContext>> {
    registry::contexts().into_iter().filter(|c| !c.is_dead())
}

/// Every device is about to be left: nothing stays unread, and nothing hangs there for what was kept before. Nobody
/// takes an event meanwhile.
pub fn keep_all() {
    for ctx in alive() {
        ctx.silence_kept();
        ctx.keep_unread(|_| true);
    }
}

/// Some QPs of this device are about to be left.
pub fn keep(ctx: &ShadowContext) {
    ctx.keep_unread(|_| true);
}

/// Kernel objects of these devices are new. What was reported so far is of our doing, at least `reports` events, or about
/// another host's device before the process came there.
pub fn arrive(contexts: &[Arc<ShadowContext>], reports: usize) {
    let deadline = Instant::now() + REPORT;
    let mut came = 0;
    loop {
        came += contexts.iter().map(|ctx| ctx.keep_unread(concerns_the_process)).sum::<usize>();
        if came >= reports || Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(STEP);
    }
    announce(contexts);
}

/// Whether an event of a device the process has just come to is about an object of the process, or the last one that
/// device will ever report.
fn concerns_the_process(mine: &ibv_async_event) -> bool {
    mine.event_type == event::DEVICE_FATAL || !matches!(Subject::of(mine), Subject::Other)
}

/// Who waits for what was kept is told.
pub fn announce(contexts: &[Arc<ShadowContext>]) {
    contexts.iter().for_each(|ctx| ctx.announce_kept());
}

/// As [`announce`], of every device.
pub fn announce_all() {
    alive().for_each(|ctx| ctx.announce_kept());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::ibv_async_element;

    #[test]
    fn what_another_hosts_device_reported_before_is_nobodys_but_its_end() {
        let of = |event_type| ibv_async_event { element: ibv_async_element { port_num: 1 }, event_type };
        let (port_active, gid_change) = (9, 18);
        for (kind, concerns) in [(port_active, false), (gid_change, false), (event::DEVICE_FATAL, true)] {
            assert_eq!(concerns_the_process(&of(kind)), concerns, "event {kind}");
        }
        let about =
            |event_type| ibv_async_event { element: ibv_async_element { qp: std::ptr::dangling_mut() }, event_type };
        for kind in [event::CQ_ERR, event::QP_LAST_WQE_REACHED, event::SRQ_LIMIT_REACHED] {
            assert!(concerns_the_process(&about(kind)), "event {kind}");
        }
    }
}
