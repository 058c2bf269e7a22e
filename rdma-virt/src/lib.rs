//! The pure model of virtual RDMA: what an application holds, what a NIC holds, and how one becomes the other.
//!
//! Nothing in this crate does I/O, calls C, reads a clock or starts a thread: every rule that decides whether a
//! work request can be lost, repeated or reordered is here, where it can be tested against any interleaving.
//!
//! | module | subject |
//! |---|---|
//! | [`id`] | newtypes: virtual and physical values do not mix |
//! | [`saved`] | what a process' RDMA objects look like in an image |
//! | [`msg`] | what shim and agent say to each other |
#![forbid(unsafe_code)]

pub mod id;
pub mod msg;
pub mod saved;
