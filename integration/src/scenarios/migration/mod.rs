//! Live migration of unmodified RDMA programs, and what happens when it fails.
//!
//! Each file holds the claims about one kind of load or event; [`stage`] is
//! how containers are set up, moved and judged. The programs inside know
//! nothing of migration: their own verdict (exit status, the checker's result)
//! is the proof.

mod checkers;
mod concurrency;
mod copies;
mod disk;
mod failures;
mod faults;
mod handshake;
mod hindered;
mod killed;
mod lines;
mod lost_source;
mod memory;
mod perftest;
mod places;
mod precopy;
mod processes;
mod rebuild;
pub mod settled;
mod signals;
pub mod stage;
mod surroundings;
mod switched_off;
mod taken_back;
mod tmpfs;
mod undone;

use crate::scenario::Scenario;

/// All claims about migration, the most telling ones first.
pub const GROUPS: &[&[Scenario]] = &[
    checkers::CLAIMS,
    memory::CLAIMS,
    places::CLAIMS,
    handshake::CLAIMS,
    perftest::CLAIMS,
    processes::CLAIMS,
    tmpfs::CLAIMS,
    signals::CLAIMS,
    precopy::CLAIMS,
    rebuild::CLAIMS,
    failures::CLAIMS,
    faults::CLAIMS,
    concurrency::CLAIMS,
    surroundings::CLAIMS,
    killed::CLAIMS,
    lines::CLAIMS,
    lost_source::CLAIMS,
    switched_off::CLAIMS,
    copies::CLAIMS,
    disk::CLAIMS,
    taken_back::CLAIMS,
];
