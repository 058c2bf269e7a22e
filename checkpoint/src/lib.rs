//! Checkpointing and moving containers that use RDMA: the migration engine and everything it stands on.
//!
//! | module | subject |
//! |---|---|
//! | [`agent`] | one process per host, the only one that speaks to other hosts |
//! | [`engine`] | the phases of a migration, from both ends |
//! | [`net`], [`pki`] | agents reach each other under mutual TLS |
//! | [`record`], [`moved`] | what must survive the agent |
//! | [`phase`], [`timeline`] | names and times of the phases |
//! | [`criu`] | driving stock CRIU |
//! | [`image`], [`incubator`], [`uverbs`] | RDMA objects on disk, and made anew in the kernel |
//! | [`likeness`] | what sysfs goes on showing of a device |
//! | `at_once` | one question put to many |
pub mod agent;
mod at_once;
pub mod criu;
pub mod engine;
pub mod image;
pub mod incubator;
mod kcmp;
pub mod likeness;
pub mod memory_image;
pub mod moved;
pub mod net;
pub mod phase;
pub mod pki;
pub mod record;
#[cfg(test)]
mod seeds;
pub mod timeline;
pub mod tree;
pub mod uverbs;
