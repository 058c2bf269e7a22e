//! Claims about the whole system, proved in the lab. How they are run is the
//! business of [`crate::scenario`].

pub mod bad_input;
pub mod migration;
