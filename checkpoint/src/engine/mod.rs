//! The migration engine: moves one container from this host to another, with one commit point.
//!
//! ```text
//!  source                      destination                 hosts of peers
//!  ------                      -----------                 --------------
//!  Negotiate    offer ───────▶ could I?                    whose QPs are these? hold them
//!  Copy         the bundle ──▶ unpacked, if asked for
//!  PreSetup     memory ──────▶ files that the NIC holds
//!               states ──────▶ incubator makes objects     second QP beside each
//!               join ────────▶ connects them ◀────────────▶ connects the second QPs
//!  PreCopy      rounds ──────▶ on disk
//!  Suspend      own shims                                  shims: hold sends of these QPs
//!  WaitBeforeStop  own shims                               shims: complete what is in flight
//!  Freeze, Dump (CRIU waits at its last gate)
//!  Converge     as PreSetup, for what changed since
//!  Transfer     files ───────▶ on disk
//!  Restore      ─────────────▶ restored, held before the first instruction
//!  Commit       record on disk; own tasks end
//!               ─────────────▶ address up, tasks run
//!  Switch       adopt ───────▶ shims point at new objects  second QPs take over
//!  Resume       everybody: held sends go out
//!  Finish       cleaned        forgets the migration       forget the migration
//! ```
//!
//! That is the *adopt* hand-over. In *rebuild* nothing is made before: the incubator's part falls away, and Switch begins
//! with the moved processes making their objects again. Only then are the new QPs' numbers known, and the peers' second
//! QPs connected to them.
//!
//! Before the record is on disk every failure undoes everything, and a destination that hears nothing asks. After it
//! nothing is undone: each step is repeated until it succeeds or its deadline has passed.
//!
//! | module | subject |
//! |---|---|
//! | [`host`] | what is needed of the host and its container runtime |
//! | [`plan`] | which QP is connected to which, and what that asks of everybody: pure |
//! | [`source`] | the list of phases, and the one epilogue that undoes |
//! | [`attempts`] | how often, and when again |
//! | [`negotiate`] | whether it can be done, as the source sees it |
//! | `copy`, `landing` | the bundle, where it has to be sent along: source and destination |
//! | [`check`] | whether it can be done, as the destination sees it |
//! | [`setup`] | new objects on the destination and second QPs at peers |
//! | `regmem`, `blocks` | registered memory before and in the pause: what changed |
//! | `memory` | where registered memory arrives |
//! | `precopy`, `shipping` | rounds of memory before the pause; files on their way |
//! | [`quiet`] | suspension, drain, freeze |
//! | [`handover`] | dump, transfer, restore |
//! | [`forward`] | commit and everything after it |
//! | [`rebuild`] | objects that the moved processes make by themselves |
//! | [`dest`], `steps` | the receiving side: one state machine per migration, and what it does with each order |
//! | `born` | what the receiving side's new objects are called there |
//! | `prepared` | what the receiving side writes down, so that a restarted agent goes on from it |
//! | [`orphans`] | arrivals whose source has gone quiet |
//! | `forsaken` | containers that were taken back while this host could not be reached |
//! | `superseded` | containers that a destination took over while this host could not be reached |
//! | [`arrivals`] | what arrives, for those who look on |
//! | [`park`], [`revive`] | by command instead: to disk, and from there |
//! | `revived` | a restore by command whose agent was restarted |
//! | `departed` | peers that ended while they waited for an image |
//! | [`by_hand`] | the command that runs CRIU in these, as the engine's host |
//! | `newcomers` | which restored processes still exist, and questions to their shims |
//! | [`store`] | where an arriving image is put |
//! | [`recover`] | what an agent does about migrations it finds when it starts |
//! | [`take_back`] | by command, on the source: a committed migration whose destination is gone |
//! | `take_over` | by command, on the destination: a migration whose source is gone |
//! | `gone` | whether the other host is gone, as far as can be found out |

pub mod arrivals;
pub mod attempts;
pub(crate) mod blocks;
mod born;
pub mod by_hand;
pub mod check;
mod copy;
mod departed;
pub mod dest;
pub mod elf;
#[cfg(test)]
pub mod fixture;
mod forsaken;
pub mod forward;
mod gone;
pub mod handover;
pub mod host;
mod landing;
pub(crate) mod memory;
pub mod negotiate;
mod newcomers;
mod nursery;
pub mod orphans;
mod pace;
pub mod park;
pub mod plan;
mod precopy;
pub(crate) mod prepared;
pub mod quiet;
pub mod rebuild;
pub mod recover;
pub(crate) mod regmem;
pub mod revive;
mod revived;
pub mod setup;
mod shipping;
mod shown;
pub mod source;
mod steps;
pub mod store;
pub(crate) mod superseded;
pub mod take_back;
pub(crate) mod take_over;
pub(crate) mod view;
pub mod world;

use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::agent::admin::Event;
use crate::image::HandOver;

/// What an administrator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    pub container: String,
    /// Address of the destination's agent.
    pub to: String,
    /// Only say whether it could be done.
    #[serde(default)]
    pub dry_run: bool,
    /// Make and connect the new objects before anything is suspended.
    #[serde(default = "yes")]
    pub pre_setup: bool,
    /// Rounds of pre-copy at most; as many as pay, if absent.
    #[serde(default)]
    pub pre_copy_rounds: Option<u32>,
    /// Give up before the pause if what is left cannot be copied in so many milliseconds.
    #[serde(default)]
    pub max_blackout: Option<u64>,
    /// Send the bundle with its root file system along.
    #[serde(default)]
    pub copy_rootfs: bool,
    /// How the processes get their kernel objects; what the provider can do, if absent.
    #[serde(default)]
    pub hand_over: Option<HandOver>,
    /// Seconds until in-flight work must have completed; the agent's setting if absent.
    #[serde(default)]
    pub drain: Option<u64>,
}

impl MigrateRequest {
    /// Without any wish: what the shared phases look at where nobody asked for a migration, or not this time.
    pub(crate) fn plain(container: &str, to: &str) -> Self {
        MigrateRequest {
            container: container.into(),
            to: to.into(),
            dry_run: false,
            pre_setup: yes(),
            pre_copy_rounds: None,
            max_blackout: None,
            copy_rootfs: false,
            hand_over: None,
            drain: None,
        }
    }
}

fn yes() -> bool {
    true
}

/// Is told what happens.
pub trait Progress: Sync {
    fn event(&self, event: Event);
}

/// The wish to stop, until it is too late.
#[derive(Debug, Default)]
pub struct Cancel(Mutex<Wish>);

#[derive(Debug, Default)]
enum Wish {
    #[default]
    None,
    Stop(String),
    /// Committed: wishes are void.
    TooLate,
    /// An administrator gave it up, committed or not, and this is why.
    GivenUp(String),
    /// It is an administrator's own work, and ends by itself.
    Deaf,
}

impl Cancel {
    /// Of work that an administrator asked for, after which everybody else is done with the migration.
    pub fn deaf() -> Self {
        Cancel(Mutex::new(Wish::Deaf))
    }

    pub fn is_deaf(&self) -> bool {
        matches!(*self.wish(), Wish::Deaf)
    }

    fn wish(&self) -> std::sync::MutexGuard<'_, Wish> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks to stop; without effect once sealed.
    pub fn set(&self, why: &str) {
        let mut wish = self.wish();
        if matches!(*wish, Wish::None) {
            *wish = Wish::Stop(why.into());
        }
    }

    /// Whoever works on a committed migration stops where it is, and nothing is undone.
    pub fn give_up(&self, why: &str) {
        let mut wish = self.wish();
        if !matches!(*wish, Wish::Deaf) {
            *wish = Wish::GivenUp(why.into());
        }
    }

    pub fn is_given_up(&self) -> bool {
        matches!(*self.wish(), Wish::GivenUp(_))
    }

    /// Why it was given up, if it was.
    pub fn given_up(&self) -> Option<String> {
        match &*self.wish() {
            Wish::GivenUp(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// Why to stop, if somebody wants to.
    pub fn why(&self) -> Option<String> {
        match &*self.wish() {
            Wish::Stop(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// From now on nobody can stop it; or the reason to stop that came first.
    pub fn seal(&self) -> Result<(), String> {
        let mut wish = self.wish();
        match &*wish {
            Wish::Stop(why) | Wish::GivenUp(why) => Err(why.clone()),
            Wish::None | Wish::TooLate => {
                *wish = Wish::TooLate;
                Ok(())
            }
            Wish::Deaf => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wish_to_stop_wins_or_comes_too_late_but_never_both() {
        let early = Cancel::default();
        early.set("a");
        early.set("b");
        assert_eq!(early.seal(), Err("a".into()));
        let late = Cancel::default();
        late.seal().unwrap();
        late.set("a");
        assert_eq!(late.why(), None);
        assert!(!late.is_given_up());
        late.give_up("an administrator");
        assert!(late.is_given_up());
    }
}
