//! The incubator: a process on the destination that makes a container's kernel RDMA objects before the container is
//! there, and hands them to its processes while CRIU restores them.
//!
//! The kernel ties such objects to the open device file, not to a process. So the incubator opens the device, creates
//! everything the source's shims reported, connects the QPs, and when CRIU restores a process gives it, through the
//! CRIU plugin, the very same open files and the offsets of the new queues. Then it goes away and nobody notices.
//!
//! What it must never do: map a queue (the kernel allows it once), or act with more rights than the container has.
//!
//! | module | subject |
//! |---|---|
//! | `parent` | [`Incubator`]: the agent's handle |
//! | `child` | [`main`]: the process |
//! | `proto` | what these two say to each other |
//! | `rights` | becoming as weak as the container |
//! | `limits` | whether the device allows as much as is wanted |
//! | `objects`, `qp`, `mr`, `gid` | making kernel objects equal to a saved state |
//! | `serve`, `wire` | handing them to restored tasks |

mod child;
pub(crate) mod gid;
mod limits;
mod mr;
mod objects;
mod parent;
pub mod proto;
mod qp;
mod rights;
mod serve;
#[cfg(test)]
mod tests;
#[path = "../../plugin/src/wire.rs"]
pub mod wire;

pub use child::main;
pub(crate) use objects::choose;
pub use parent::{Incubator, IncubatorError, Spec};
pub use proto::{Handed, Link, Rights};

/// First argument of the program that makes it run [`main`]; not for people.
pub const SUBCOMMAND: &str = "incubator";
