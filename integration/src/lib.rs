//! The lab and everything that is tested in it.
//!
//! Three real Debian machines in QEMU ([`lab`]), the first-run set-up of the
//! build machine ([`setup`]) and, on top, the scenario tests. This crate sees
//! the project's binaries only, never its internals, so that a test cannot
//! pass by sharing a bug with the code it tests.

pub mod bench;
pub mod census;
pub mod demo;
pub mod fuzz;
pub mod lab;
pub mod link_health;
pub mod scenario;
pub mod scenarios;
pub mod setup;
pub mod soak;
pub mod verdict;
