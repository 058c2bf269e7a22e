//! The phases of a migration, by name and in order. What happens in each is in [`crate::engine`].

use serde::{Deserialize, Serialize};
use std::fmt;

/// One step of a migration, in the order they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Can it be done at all? Everybody who takes part is found and asked; nothing is changed.
    Negotiate,
    /// If asked for, the bundle with its root file system goes to the destination.
    Copy,
    /// The destination makes the kernel objects, peers a second QP beside each old one; both are connected.
    PreSetup,
    /// Memory goes to the destination in rounds, while the container runs.
    PreCopy,
    /// Every end holds new sends.
    Suspend,
    /// What is in flight completes.
    WaitBeforeStop,
    /// The container stands still.
    Freeze,
    /// CRIU writes its image; at the end it waits for the decision.
    Dump,
    /// What changed since pre-setup is made and connected.
    Converge,
    /// The image goes to the destination.
    Transfer,
    /// The destination restores up to the last gate, and holds there.
    Restore,
    /// One record decides; the address changes over; the destination's tasks run.
    Commit,
    /// Peers change over to their second QPs.
    Switch,
    /// Held sends go out.
    Resume,
    /// The source is cleaned.
    Finish,
}

impl Phase {
    /// All, in order.
    pub const ALL: [Phase; 15] = [
        Phase::Negotiate,
        Phase::Copy,
        Phase::PreSetup,
        Phase::PreCopy,
        Phase::Suspend,
        Phase::WaitBeforeStop,
        Phase::Freeze,
        Phase::Dump,
        Phase::Converge,
        Phase::Transfer,
        Phase::Restore,
        Phase::Commit,
        Phase::Switch,
        Phase::Resume,
        Phase::Finish,
    ];

    /// Lower-case name with hyphens: the one in messages, JSON and figures.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Negotiate => "negotiate",
            Phase::Copy => "copy",
            Phase::PreSetup => "pre-setup",
            Phase::PreCopy => "pre-copy",
            Phase::Suspend => "suspend",
            Phase::WaitBeforeStop => "wait-before-stop",
            Phase::Freeze => "freeze",
            Phase::Dump => "dump",
            Phase::Converge => "converge",
            Phase::Transfer => "transfer",
            Phase::Restore => "restore",
            Phase::Commit => "commit",
            Phase::Switch => "switch",
            Phase::Resume => "resume",
            Phase::Finish => "finish",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_complete_and_in_order() {
        assert!(Phase::ALL.windows(2).all(|w| w[0] < w[1]));
        for phase in Phase::ALL {
            assert_eq!(serde_json::to_string(&phase).unwrap(), format!("{:?}", phase.name()));
        }
    }
}
