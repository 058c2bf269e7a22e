//! Connections in the making. An application that connects a QP asks where the far end is; until that far end is connected
//! in turn it does not know of the pair, and a container that moved in between would leave its new peer behind. So those
//! who ask are remembered. A container does not stand still while one of its unconnected QPs has been connected to; and
//! while it does stand still, who asks for one of them waits.
//!
//! What a QP's state is, and what becomes of a migration that has to wait, is not known here.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use rdma_virt::id::{MigrationId, VGid, VQpn};

use super::{Agent, LOCAL, lock};
use crate::net::msg::{Answer, Order};

/// One end, as applications call it.
pub type End = (VGid, VQpn);

/// Ends that are remembered, and askers of each: the oldest are forgotten.
const ENDS: usize = 1 << 16;
const ASKERS: usize = 8;

/// Between its question and the connection, an application's QP shows nothing yet. It takes this long at most.
const RECENT: Duration = Duration::from_secs(5);

/// For the word of an agent that asked once.
const WORD: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Asked {
    /// Addresses of agents, [`LOCAL`] for this one.
    by: BTreeSet<String>,
    last: Instant,
}

/// Who asked for which end, and which ends stand still.
#[derive(Debug, Default)]
pub struct Connecting {
    asked: BTreeMap<End, Asked>,
    order: VecDeque<End>,
    still: BTreeMap<MigrationId, (String, BTreeSet<End>)>,
}

/// The end's container stands still for a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Still {
    pub container: String,
    pub by: MigrationId,
}

impl Connecting {
    /// Somebody is about to connect to this end.
    pub fn ask(&mut self, end: End, by: &str) -> Result<(), Still> {
        if let Some((migration, (container, _))) = self.still.iter().find(|(_, (_, ends))| ends.contains(&end)) {
            return Err(Still { container: container.clone(), by: *migration });
        }
        if !self.asked.contains_key(&end) {
            if self.order.len() == ENDS
                && let Some(oldest) = self.order.pop_front()
            {
                self.asked.remove(&oldest);
            }
            self.order.push_back(end);
        }
        let asked = self.asked.entry(end).or_insert_with(|| Asked { by: BTreeSet::new(), last: Instant::now() });
        asked.last = Instant::now();
        if asked.by.len() < ASKERS {
            asked.by.insert(by.to_owned());
        }
        Ok(())
    }

    /// From now on these ends stand still.
    fn hold(&mut self, migration: MigrationId, container: &str, ends: &[End]) {
        self.still.insert(migration, (container.to_owned(), ends.iter().copied().collect()));
    }

    /// They do not, any more.
    pub fn let_go(&mut self, migration: MigrationId) {
        self.still.remove(&migration);
    }

    /// Those that were asked for, by whom, and whether just now.
    fn wanted(&self, ends: &[End]) -> Vec<(End, Vec<String>, bool)> {
        let one = |end: &End| {
            let asked = self.asked.get(end)?;
            Some((*end, asked.by.iter().cloned().collect(), asked.last.elapsed() < RECENT))
        };
        ends.iter().filter_map(one).collect()
    }
}

impl Agent {
    /// The first of these unconnected ends of a container that somebody has connected to, or is just connecting to, in a
    /// sentence. With `hold` those who ask from now on wait until the migration lets go.
    pub fn half_open(&self, migration: MigrationId, container: &str, ends: &[End], hold: bool) -> Option<String> {
        let wanted = {
            let mut connecting = lock(&self.connecting);
            if hold {
                connecting.hold(migration, container, ends);
            }
            connecting.wanted(ends)
        };
        wanted.into_iter().find_map(|((vgid, vqpn), by, recent)| {
            if recent {
                return Some(format!("somebody at {} is about to connect to {vqpn}", by.join(", ")));
            }
            by.iter().find_map(|at| {
                let who = self.connected_there(at, vgid, vqpn)?;
                Some(format!("{who} at {at} has connected to {vqpn}, which is not connected to it yet"))
            })
        })
    }

    fn connected_there(&self, at: &str, vgid: VGid, vqpn: VQpn) -> Option<String> {
        if at == LOCAL {
            return self.connected_to(vgid, vqpn);
        }
        match self.client.call(at, None, Order::Connected { vgid, vqpn }, WORD) {
            Ok(Answer::Connected(who)) => who,
            Ok(_) => None,
            Err(e) => {
                // Whoever it was could not be found as a peer either.
                eprintln!("is anybody connected to {vqpn} of {vgid}? {}", super::chain(&e));
                None
            }
        }
    }

    /// Who on this host has a QP that is connected to that end. Answers [`Order::Connected`].
    pub fn connected_to(&self, vgid: VGid, vqpn: VQpn) -> Option<String> {
        self.reports().into_iter().find_map(|(container, state)| {
            let mut remotes = state.contexts.iter().flat_map(|c| &c.qps).filter_map(|qp| qp.remote);
            let there = remotes.any(|remote| remote.vgid == vgid && remote.vqpn == vqpn);
            there.then(|| format!("{} (pid {} of container {container})", state.comm, state.vpid.0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(n: u32) -> End {
        (VGid([1; 16]), VQpn(n))
    }

    #[test]
    fn who_asks_for_an_end_that_stands_still_waits_until_it_is_let_go() {
        let mut connecting = Connecting::default();
        let (one, other) = (MigrationId([1; 16]), MigrationId([2; 16]));
        connecting.hold(one, "web", &[end(5), end(6)]);
        connecting.hold(other, "db", &[end(7)]);
        assert_eq!(connecting.ask(end(5), "a"), Err(Still { container: "web".into(), by: one }));
        assert_eq!(connecting.ask(end(8), "a"), Ok(()));
        connecting.let_go(one);
        assert_eq!(connecting.ask(end(5), "a"), Ok(()));
        assert!(connecting.ask(end(7), "a").is_err());
    }

    #[test]
    fn those_who_asked_before_are_known_and_memory_is_bounded() {
        let mut connecting = Connecting::default();
        for by in ["a", "b", "a"] {
            connecting.ask(end(5), by).unwrap();
        }
        assert_eq!(connecting.wanted(&[end(4), end(5)]), [(end(5), vec!["a".into(), "b".into()], true)]);
        (0..100).for_each(|n| connecting.ask(end(5), &n.to_string()).unwrap());
        assert_eq!(connecting.wanted(&[end(5)])[0].1.len(), ASKERS);
        (0..ENDS as u32).for_each(|n| connecting.ask(end(10 + n), "c").unwrap());
        assert!(connecting.wanted(&[end(5)]).is_empty(), "the oldest was forgotten");
        assert_eq!((connecting.asked.len(), connecting.order.len()), (ENDS, ENDS));
    }
}
