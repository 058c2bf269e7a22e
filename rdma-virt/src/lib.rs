//! The pure model of virtual RDMA: what an application holds, what a NIC holds, and how one becomes the other.
//!
//! Nothing in this crate does I/O, calls C, reads a clock or starts a thread: every rule that decides whether a
//! work request can be lost, repeated or reordered is here, where it can be tested against any interleaving.
//!
//! | module | subject |
//! |---|---|
//! | [`id`] | newtypes: virtual and physical values do not mix |
//! | [`keys`], [`qpns`] | tables read on the data path without a lock |
//! | [`wr`] | work requests and completions as they are remembered |
//! | [`gate`] | one QP's stages; what a post does in each; owns [`sendq`] and [`recvq`] |
//! | [`sendq`], [`recvq`], [`srq`] | ledgers of what is under way and what is held |
//! | [`fakecq`] | completions taken before the application asked |
//! | [`quiesce`] | when is nothing under way any more |
//! | [`spin`] | the lock around a post |
//! | [`saved`] | what a process' RDMA objects look like in an image |
//! | [`msg`] | what shim and agent say to each other |
#![forbid(unsafe_code)]

pub mod fakecq;
pub mod gate;
pub mod id;
pub mod keys;
pub mod msg;
pub mod qpns;
pub mod quiesce;
pub mod recvq;
pub mod saved;
pub mod sendq;
pub mod spin;
pub mod srq;
pub mod wr;
