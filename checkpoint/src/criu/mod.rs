//! Driving a stock `criu` binary through its service protocol.
//!
//! One [`Criu`] value is one run of `criu swrk`: a child process that reads
//! one request from a seqpacket socket on its fd 3, reports what it is about
//! to do as *notifications*, and answers. Each notification is put to a
//! closure whose answer decides whether CRIU goes on, so the closure may hold
//! CRIU for as long as it needs: in `post-dump` a refusal makes the dumped
//! tasks run again where they are, in `post-restore` it kills the restored
//! ones before they ran a single instruction.
//!
//! This module knows nothing of containers, images or RDMA: the caller fills
//! in the request's options ([`rpc::Criu_opts`]) and owns every directory and
//! descriptor named there.

mod child;
mod log;
mod swrk;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

pub use log::{root_cause, soften_errno_texts};
pub use rust_criu::rust_criu_protobuf::rpc;
pub use swrk::{Criu, Placement};

/// Where our CRIU plugin is installed; CRIU looks for plugins in one directory only.
pub const PLUGIN_DIR: &str = "/usr/local/lib/migrrdma/criu";

/// A message of CRIU about what it has done or is about to do.
#[derive(Debug)]
pub struct Notify {
    /// CRIU's name of the moment: `pre-dump`, `network-lock`, `post-dump`,
    /// `setup-namespaces`, `post-restore`, `orphan-pts-master`, …
    pub script: String,
    /// Pid of the restored init in the caller's pid namespace; present in
    /// `setup-namespaces` and `post-restore` only.
    pub pid: Option<i32>,
    /// The terminal's master side, in `orphan-pts-master` only.
    pub fd: Option<OwnedFd>,
}

/// The answer to a [`Notify`].
#[derive(Debug)]
pub enum Verdict {
    /// CRIU may go on.
    Go,
    /// CRIU must stop and undo; the text says why and ends up in [`CriuError::Refused`].
    Refuse(String),
}

impl From<std::result::Result<(), String>> for Verdict {
    fn from(result: std::result::Result<(), String>) -> Self {
        match result {
            Ok(()) => Verdict::Go,
            Err(why) => Verdict::Refuse(why),
        }
    }
}

/// CRIU's version as one comparable number: 4.1.1 is 40101.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Version(v) = *self;
        write!(f, "{}.{}", v / 10_000, v / 100 % 100)?;
        if v % 100 != 0 {
            write!(f, ".{}", v % 100)?;
        }
        Ok(())
    }
}

/// What the installed CRIU and the running kernel can do together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Features {
    /// Soft-dirty page tracking: pre-dump and incremental dumps work.
    pub mem_track: bool,
    /// Restore may fault pages in later.
    pub lazy_pages: bool,
}

/// Why a run of CRIU did not end well.
#[derive(Debug, thiserror::Error)]
pub enum CriuError {
    /// No executable of that name.
    #[error(
        "CRIU is not installed: {} not found; install the package criu or name the program with --criu",
        .0.display()
    )]
    Missing(PathBuf),
    /// The program exists but could not be started.
    #[error("cannot start {}", .path.display())]
    Spawn {
        /// The program.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A system call of the driver itself failed.
    #[error("talking to CRIU: {what}")]
    Io {
        /// What the driver was doing.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The caller's placement (cgroup) of the criu process failed; nothing was requested yet.
    #[error("cannot put CRIU into the container's cgroup: {0}")]
    Placement(String),
    /// CRIU said something this driver does not understand.
    #[error("CRIU spoke unexpectedly: {0}")]
    Protocol(String),
    /// CRIU did not answer in time; it was ended.
    #[error("CRIU did not finish {op} within {} s; it was ended", .after.as_secs())]
    Deadline {
        /// The request.
        op: &'static str,
        /// The time it was given.
        after: Duration,
    },
    /// CRIU itself failed. Displays the root cause first.
    #[error("CRIU {op} failed: {cause}")]
    Failed {
        /// The request.
        op: &'static str,
        /// The distilled reason: CRIU's own message or the first error of its log.
        cause: String,
        /// `cr_errno` of the answer, 0 when CRIU gave none.
        errno: i32,
    },
    /// CRIU undid its work because the caller's gate said no.
    #[error("{op} refused at {script}: {why}")]
    Refused {
        /// The request.
        op: &'static str,
        /// The notification that was answered no.
        script: String,
        /// The gate's reason.
        why: String,
    },
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, CriuError>;
