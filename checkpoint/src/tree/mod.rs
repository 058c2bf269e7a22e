//! A bundle with its root file system as a stream of bytes: for hosts that do not share one.
//!
//! | module | subject |
//! |---|---|
//! | `beneath` | paths that lead nowhere else |
//! | [`list`] | what there is, and what changed since |
//! | [`pack`] | written as a tar archive |
//! | [`unpack`] | read into a directory it cannot get out of |
//! | [`mark`] | which bundles are copies of each other |
//!
//! No network and no migration here, and nothing of what a bundle means: one directory, in which one sub-directory may
//! be a mount of its own.

mod beneath;
pub mod list;
pub mod mark;
pub mod pack;
pub mod unpack;

#[cfg(test)]
mod tests;
