//! `libmigrrdma.so`: the libibverbs an application sees.
//!
//! It is loaded into every process of a container before libibverbs and defines the same functions. Each hands the
//! application a *shadow* of the object the real library made, with an op table of ours; so every verb, inline ones
//! included, passes here. Without a migration a verb is unwrapped and passed on. While one is under way sends are held,
//! completions are taken aside and control verbs wait; afterwards the real objects behind the shadows are other ones,
//! and numbers the application holds are translated to those of the new host.
//!
//! In a process without RDMA nothing runs: no constructor, no thread, no allocation before the first verbs call, and no
//! library is needed but the C library.
//!
//! | module | subject |
//! |---|---|
//! | [`abi`] | the C types |
//! | [`entry`], [`real`], [`errno`] | what every exported function has |
//! | [`registry`], [`gate`], [`blockers`] | which addresses are ours; stopping control verbs; what cannot be moved |
//! | [`context`], [`pd`], [`mr`], [`channel`], [`cq`], [`srq`], [`qp`] | the shadow objects and their verbs |
//! | [`ops`], [`query`], [`cq_ex`] | op tables, questions, readers |
//! | [`events`], [`kept`], [`bell`] | events; those that were taken before they were asked for; making their file readable |
//! | [`readers`], [`readable`] | threads that wait for events; what can be read at once |
//! | [`tables`], [`convert`], [`lock`] | virtual and physical numbers; work requests; the queues' lock |
//! | [`provider`], [`helper_qp`] | what is known of Soft-RoCE; raising an event |
//! | [`backing`] | registered memory lies in files that can be copied while it is in use |
//! | [`scratch`] | memory for what is only sent away |
//! | [`descriptors`] | a new open file behind a number the application knows |
//! | [`control`] | the thread that talks to the agent |
#![allow(missing_debug_implementations, reason = "shadow objects are C memory; their ids are in the messages")]

mod abi;
mod backing;
mod bell;
mod blockers;
mod channel;
mod context;
mod control;
mod convert;
mod cq;
mod cq_ex;
mod descriptors;
mod entry;
mod errno;
mod events;
mod gate;
mod helper_qp;
mod kept;
mod lock;
mod mr;
mod ops;
mod pd;
mod provider;
mod qp;
mod query;
mod readable;
mod readers;
mod real;
mod registry;
mod scratch;
mod srq;
mod tables;
