//! An exactly-once checker for RDMA: two ends load each other with numbered, patterned work over
//! reliable connections and prove that nothing was lost, repeated, reordered or corrupted.
//!
//! It is an ordinary verbs program: it knows nothing of migration, and asks for nothing an ordinary
//! program does not ask for. That is its worth: whatever is done to its container underneath, its
//! verdict is the application's.

pub mod atomics;
pub mod pattern;
pub mod region;
pub mod sequence;
pub mod tracker;
