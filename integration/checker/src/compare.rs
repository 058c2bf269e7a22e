//! The comparison at the end: what one end did against what the other end's memory and counters
//! show.

use crate::atomics::Chain;
use crate::failure::lock;
use crate::lane;
use crate::pattern;
use crate::rig::Rig;
use crate::wire::LaneTotals;

/// What our lanes have done.
#[must_use]
pub fn totals(rig: &Rig) -> Vec<Vec<LaneTotals>> {
    let one = |x: &std::sync::Mutex<lane::Lane>| {
        let l = lock(x);
        LaneTotals {
            two_sided: l.two_sided,
            added: l.counter.posted(),
            swapped: l.chain.posted(),
            slots: l.region.checksums(),
        }
    };
    rig.links.iter().map(|l| l.lanes.iter().map(one).collect()).collect()
}

/// Whether every message the peer sent was received.
#[must_use]
pub fn all_received(rig: &Rig, peer: &[Vec<LaneTotals>]) -> bool {
    rig.links.iter().zip(peer).all(|(l, lanes)| {
        let got = rig.receiver(l).received();
        lanes.iter().zip(got).all(|(t, n)| n >= t.two_sided)
    })
}

/// Messages the peer sent and we have not received, in words.
#[must_use]
pub fn missing(rig: &Rig, peer: &[Vec<LaneTotals>]) -> String {
    let mut text = Vec::new();
    for (l, lanes) in rig.links.iter().zip(peer) {
        for (i, (t, got)) in lanes.iter().zip(rig.receiver(l).received()).enumerate() {
            if got < t.two_sided {
                text.push(format!("messages {got} to {} of {l} lane {i}", t.two_sided - 1));
            }
        }
    }
    if text.is_empty() {
        text.push("credit updates to complete".to_owned());
    }
    text.join(", ")
}

/// Compares our memory with what the peer says it did to it. Violations go to the rig's list.
pub fn check(rig: &Rig, peer: &[Vec<LaneTotals>]) {
    if peer.len() != rig.links.len() {
        rig.failures.add(format!("the other end reports {} QPs, there are {}", peer.len(), rig.links.len()));
        return;
    }
    let mut content = vec![0; rig.w.msg_size as usize];
    for (link, lanes) in rig.links.iter().zip(peer) {
        let received = rig.receiver(link).received();
        if lanes.len() != received.len() {
            rig.failures.add(format!(
                "{link}: the other end reports {} lanes, there are {}",
                lanes.len(),
                received.len()
            ));
            continue;
        }
        for (i, (t, got)) in lanes.iter().zip(received).enumerate() {
            let fail = |what: String| rig.failures.add(format!("{link}: lane {i}: {what}"));
            if got != t.two_sided {
                fail(format!("{} messages were sent, {got} received", t.two_sided));
            }
            let counter = link.shared_memory.load(link.layout.counter(i));
            if counter != t.added {
                fail(format!("{} FETCH_ADDs were done, the counter is {counter}", t.added));
            }
            let cell = link.shared_memory.load(link.layout.cell(i));
            if cell != Chain::value(t.swapped) {
                fail(format!(
                    "{} CMP_SWPs were done, the cell holds {cell:#x} instead of {:#x}",
                    t.swapped,
                    Chain::value(t.swapped)
                ));
            }
            for (s, sum) in t.slots.iter().enumerate() {
                link.shared_memory.read(link.layout.slot(i, s), &mut content);
                if crc32fast::hash(&content) != *sum {
                    fail(format!("slot {s} does not hold what was written: {}", pattern::describe(&content)));
                }
            }
            link.shared_memory.read(link.layout.known(i), &mut content);
            let lane = u8::try_from(i).unwrap_or(u8::MAX);
            let stamp = lane::known(rig.side, link.index, lane);
            if let Err(m) = pattern::verify(&content, &stamp) {
                fail(format!("memory nobody writes has changed: {m}"));
            }
        }
    }
}
