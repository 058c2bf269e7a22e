//! What arrives on this host, for those who look on ([`crate::agent::taking_part`]). Nothing is decided here; that is the
//! business of [`super::dest`].

use std::time::Instant;

use rdma_virt::id::MigrationId;

use super::dest::{Arrival, Desk, State};
use crate::agent::{LOCAL, lock};

/// A migration to this host, or a partial restore that waits here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub id: MigrationId,
    pub container: String,
    /// Where it comes from.
    pub source: String,
    pub state: String,
    /// `None` in the middle of a step.
    pub since: Option<Instant>,
    pub waits_for: Option<&'static str>,
    /// What an administrator can do about it, if it comes to that.
    pub why: Option<String>,
    /// When it is dropped.
    pub until: Option<Instant>,
}

impl Desk {
    /// All of them, by id.
    pub fn list(&self) -> Vec<Seen> {
        let entries: Vec<_> = lock(&self.0).iter().map(|(id, entry)| (*id, entry.clone())).collect();
        let mut list: Vec<Seen> = entries
            .into_iter()
            .map(|(id, entry)| match entry.arrival.try_lock() {
                Ok(arrival) => arrival.seen(id, &entry.container),
                // A step that takes long says itself what it waits for.
                Err(_) => Seen {
                    id,
                    container: entry.container,
                    source: shown(&entry.source),
                    state: "at work".into(),
                    since: None,
                    waits_for: None,
                    why: None,
                    until: None,
                },
            })
            .collect();
        list.sort_by_key(|seen| seen.id);
        list
    }
}

/// As an address, or what there is instead.
fn shown(source: &str) -> String {
    if source.is_empty() || source == LOCAL { "an image".into() } else { source.into() }
}

impl Arrival {
    fn seen(&self, id: MigrationId, container: &str) -> Seen {
        let (container, since) = (container.to_owned(), Some(self.since));
        if let Some((plan, until)) = self.partial() {
            let (made, connected) = (plan.born.len(), plan.links.iter().filter(|l| l.connected_to.is_some()).count());
            let state = format!("partial restore, {made} QPs made, {connected} connected");
            let (source, waits_for) = (format!("an image of {}", self.source), Some("its restore"));
            return Seen { id, container, source, state, since, waits_for, why: None, until: Some(until) };
        }
        let waits_for = match &self.state {
            State::Gathering { .. } => Some("the source's next word"),
            State::Prepared { .. } => Some("the source's decision"),
            State::Running { keys: None, .. } => Some("the source's word to connect the moved processes"),
            State::Running { .. } => Some("the source to finish"),
            State::Gone => None,
        };
        let state = self.state.name().to_owned();
        let stays = matches!(self.state, State::Prepared { .. } | State::Running { .. });
        let why = (self.silent && stays).then(|| super::take_over::hint(&container));
        Seen { id, container, source: shown(&self.source), state, since, waits_for, why, until: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::dest::Entry;
    use crate::engine::fixture::offer;

    #[test]
    fn an_arrival_is_listed_also_while_somebody_works_on_it() {
        let (desk, id) = (Desk::default(), MigrationId([1; 16]));
        let source = "10.0.0.1:7477";
        let entry = Entry::new(Arrival::new(source.into(), offer("c")));
        let arrival = entry.arrival.clone();
        lock(&desk.0).insert(id, entry);
        let [seen] = &desk.list()[..] else { panic!("one") };
        assert_eq!((seen.source.as_str(), seen.state.as_str()), (source, "offered"));
        assert_eq!(seen.waits_for, Some("the source's next word"));
        let busy = arrival.lock().unwrap();
        let [seen] = &desk.list()[..] else { panic!("one") };
        assert_eq!((seen.source.as_str(), seen.state.as_str(), seen.since), (source, "at work", None));
        drop(busy);
        arrival.lock().unwrap().source = LOCAL.into();
        assert_eq!(desk.list()[0].source, "an image");
    }
}
