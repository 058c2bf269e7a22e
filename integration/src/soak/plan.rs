//! What a soak does next: who moves where, how, and what goes wrong meanwhile. Pure: the same seed gives the same steps
//! as long as the same things come of them.

use std::fmt;

use crate::bench::statistics::Random;

/// The hosts containers move among.
pub const NODES: [&str; 3] = ["src", "dst", "peer"];

/// The ways of moving a container, as options of `migrrdma migrate`.
const WAYS: &[&[&str]] =
    &[&[], &[], &[], &["--no-pre-setup"], &["--hand-over", "rebuild"], &["--pre-copy-rounds", "0"]];

/// Where a fault can fall.
const PHASES: &[&str] = &[
    "negotiate",
    "pre-setup",
    "pre-copy",
    "suspend",
    "wait-before-stop",
    "freeze",
    "dump",
    "transfer",
    "restore",
    "commit",
    "switch",
    "finish",
];

/// Whose agent is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// The one that conducts the migration.
    Source,
    /// The one that restores.
    Destination,
    /// The one of the host with the other end.
    Peer,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// An agent is killed when a phase begins.
    Killed(Whose, &'static str),
    /// Ctrl-C when a phase begins.
    Interrupted(&'static str),
    /// The other end is asked to move as well, at the same moment.
    OtherEnd(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Killed(Whose::Source, phase) => write!(f, "source's agent killed in {phase}"),
            Fault::Killed(Whose::Destination, phase) => write!(f, "destination's agent killed in {phase}"),
            Fault::Killed(Whose::Peer, phase) => write!(f, "peer's agent killed in {phase}"),
            Fault::Interrupted(phase) => write!(f, "Ctrl-C in {phase}"),
            Fault::OtherEnd(to) => write!(f, "the other end moves to {to} meanwhile"),
        }
    }
}

/// One migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which container, as an index into the list of all.
    pub who: usize,
    /// Where it goes.
    pub to: &'static str,
    /// Options of `migrrdma migrate`.
    pub way: &'static [&'static str],
    /// What goes wrong, if anything.
    pub fault: Option<Fault>,
}

/// Draws the next step. `places` are the containers' hosts; the other end of container `i` is container `i ^ 1`.
/// `faults`: in how many of a hundred steps something goes wrong.
pub fn next(random: &mut Random, places: &[&str], faults: usize) -> Step {
    let who = random.below(places.len());
    let to = elsewhere(random, places[who]);
    let way = WAYS[random.below(WAYS.len())];
    let wrong = random.below(100) < faults;
    let phase = PHASES[random.below(PHASES.len())];
    let kind = random.below(5);
    let other = elsewhere(random, places[who ^ 1]);
    let fault = match kind {
        0 => Fault::Killed(Whose::Source, phase),
        1 => Fault::Killed(Whose::Destination, phase),
        2 => Fault::Killed(Whose::Peer, phase),
        3 => Fault::Interrupted(phase),
        _ => Fault::OtherEnd(other),
    };
    Step { who, to, way, fault: wrong.then_some(fault) }
}

fn elsewhere(random: &mut Random, at: &str) -> &'static str {
    let others: Vec<_> = NODES.into_iter().filter(|n| *n != at).collect();
    others[random.below(others.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_moves_to_where_it_is_and_everything_is_drawn() {
        let mut random = Random::new(1);
        let places = ["src", "peer", "dst", "dst"];
        let steps: Vec<Step> = (0..2000).map(|_| next(&mut random, &places, 30)).collect();
        assert!(steps.iter().all(|s| s.to != places[s.who]));
        assert!((0..4).all(|who| steps.iter().any(|s| s.who == who)));
        assert!(WAYS.iter().all(|way| steps.iter().any(|s| s.way == *way)));
        let wrong = steps.iter().filter(|s| s.fault.is_some()).count();
        assert!((450..750).contains(&wrong), "{wrong} of 2000 steps with a fault");
        for step in &steps {
            if let Some(Fault::OtherEnd(to)) = step.fault {
                assert_ne!(to, places[step.who ^ 1]);
            }
        }
    }

    #[test]
    fn without_faults_nothing_goes_wrong_and_a_seed_repeats_itself() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..50).map(|_| next(&mut random, &["src", "dst"], 0)).collect::<Vec<_>>()
        };
        assert!(draw(3).iter().all(|s| s.fault.is_none()));
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
