//! How agents reach each other and their local shims: frames, mutual TLS, calls with a deadline.
//!
//! | module | subject |
//! |---|---|
//! | [`frame`] | bytes ↔ message, hostile input refused before it costs memory |
//! | [`msg`] | what agents say to each other |
//! | [`tls`] | both ends show a certificate of the same CA |
//! | [`client`] | calling another agent |
//! | [`server`] | being called |
//! | [`beat`] | signs of life while a call is worked on |
//! | [`unheard`] | what the kernel does when there are none |
//! | [`link`] | a container's own interface: down, up, announced |
//!
//! Nothing here knows what a message means: [`crate::agent`] and [`crate::engine`] do.

pub mod beat;
pub mod client;
pub mod frame;
pub mod link;
pub mod msg;
pub mod server;
pub mod tls;
pub mod unheard;
