//! Under construction.
pub mod agent;
pub mod criu;
pub mod net;
pub mod phase;
pub mod pki;
pub mod timeline;
