//! The uverbs interface of the kernel without libibverbs: open a device, make and change its objects, and learn where
//! their queues would be mapped, without mapping them.
//!
//! Why not libibverbs: the kernel gives the `user_handle` of an object back in every event, and the restored process
//! expects its own pointers there; and libibverbs' rxe provider maps each queue at once, which the kernel allows only
//! one time and only the restored process may use up.
//!
//! | module | subject |
//! |---|---|
//! | [`abi`] | the kernel's structures and numbers |
//! | [`call`] | one `ioctl` |
//! | [`context`] | an open device and its commands |
//! | [`provider`] | what differs between drivers |
//! | [`sysfs`] | which devices there are |
//! | [`gids`] | their GIDs, in one question |

pub mod abi;
pub mod call;
pub mod context;
pub mod gids;
pub mod provider;
pub mod sysfs;
#[cfg(test)]
mod tests;

pub use context::Context;
pub use provider::{Mapping, can_adopt};
pub use sysfs::{Device, Gid, Port, devices};

use std::io;
use std::path::PathBuf;

/// A device could not be asked or told something.
#[derive(Debug, thiserror::Error)]
pub enum UverbsError {
    #[error("cannot read {}: {source}", path.display())]
    Sysfs { path: PathBuf, source: io::Error },
    #[error("cannot open {} of RDMA device {device}: {source}", path.display())]
    Open { path: PathBuf, device: String, source: io::Error },
    #[error("RDMA device {device} (driver {driver}) cannot hand its objects to another process; use hand-over rebuild")]
    NotAdoptable { device: String, driver: String },
    #[error("{verb} on RDMA device {device}: {source}")]
    Verb { verb: &'static str, device: String, source: io::Error },
}
