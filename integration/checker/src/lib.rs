//! An exactly-once checker for RDMA: two ends load each other with numbered, patterned work over
//! reliable connections and prove that nothing was lost, repeated, reordered or corrupted.
//!
//! It is an ordinary verbs program: it knows nothing of migration, and asks for nothing an ordinary
//! program does not ask for. That is its worth: whatever is done to its container underneath, its
//! verdict is the application's.
//!
//! The logic of what must come is in [`sequence`], [`region`], [`atomics`] and [`tracker`], without
//! any I/O; [`lane`] and [`receive`] apply it to a QP; [`rig`] makes the verbs objects; [`threads`]
//! drive them; [`run`] conducts a run from connecting to comparing.

pub mod atomics;
pub mod buffers;
pub mod churn;
pub mod cli;
pub mod clock;
pub mod compare;
pub mod failure;
pub mod hold;
pub mod identity;
pub mod lane;
pub mod layout;
pub mod link;
pub mod offset;
pub mod pattern;
pub mod processes;
pub mod receive;
pub mod region;
pub mod report;
pub mod rig;
pub mod run;
pub mod sequence;
pub mod signals;
pub mod stats;
pub mod stuck;
pub mod threads;
pub mod timeline;
pub mod tracker;
pub mod unread;
pub mod verbs;
pub mod wake;
pub mod wire;
pub mod workload;
pub mod wrid;
