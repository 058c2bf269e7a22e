//! What the engine needs of the host it runs on and of the container runtime there.
//!
//! Everything that differs per runtime is behind [`Host`]; the implementation for our own is in the program. No
//! method has a default: a host that cannot do something says so at compile time.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rdma_virt::saved::{AdoptedProcess, ProcessState};
use serde::{Deserialize, Serialize};

use crate::likeness::Likeness;
use crate::net::msg::JoinLink;

/// A sentence for people, from whoever knows the reason; wraps any error by its whole chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostError(pub String);

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for HostError {}

impl HostError {
    /// The whole chain of causes in one line.
    pub fn of(e: &(dyn std::error::Error + 'static)) -> Self {
        HostError(crate::agent::chain(e))
    }
}

/// Shorthand of this module.
pub type Result<T> = std::result::Result<T, HostError>;

/// A container as its runtime knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub id: String,
    /// Pid of its init in the agent's pid namespace.
    pub init: i32,
    /// Directory of its cgroup (v2), with `cgroup.procs` and `cgroup.freeze`.
    pub cgroup: PathBuf,
    pub bundle: PathBuf,
    pub paused: bool,
}

/// A dump to be made.
#[derive(Clone, Debug)]
pub struct DumpJob {
    /// Exists, empty but for what the engine put there (the RDMA image).
    pub images: PathBuf,
    /// For logs.
    pub work: PathBuf,
    /// The last round of pre-copy, relative to `images`.
    pub parent: Option<PathBuf>,
}

/// A round of pre-copy to be made.
#[derive(Clone, Debug)]
pub struct PreDumpJob {
    /// Exists, empty.
    pub images: PathBuf,
    /// For logs.
    pub work: PathBuf,
    /// The round before, relative to `images`.
    pub parent: Option<PathBuf>,
}

/// A restore to be made.
#[derive(Clone, Debug)]
pub struct RestoreJob {
    pub id: String,
    pub bundle: PathBuf,
    pub images: PathBuf,
    pub work: PathBuf,
    /// Path the plugin finds the incubator at from inside the container; `None` for a container without RDMA.
    pub incubator: Option<PathBuf>,
    /// Time to reach the last gate.
    pub deadline: Duration,
    /// Socket at which [`Host::held_at`] finds the restore while it is held, whatever became of who asked for it.
    pub door: PathBuf,
}

/// A restored container whose tasks have not run yet.
///
/// Dropped without [`Held::release`], nothing of it may stay.
pub trait Held: Send {
    /// Pid of the restored init in the agent's pid namespace.
    fn init(&self) -> i32;
    /// Lets the tasks run. An error means they do not run and may be tried again.
    fn release(&mut self) -> Result<()>;
    /// Kills the tasks and removes the container's state.
    fn abandon(self: Box<Self>) -> Result<()>;
}

/// The incubator of one container.
pub trait Nursery: Send {
    /// Makes the kernel objects equal to these states; what was made before is changed only where it differs.
    fn converge(&mut self, states: &[ProcessState]) -> Result<Vec<AdoptedProcess>>;
    /// Connects new QPs.
    fn connect(&mut self, links: &[JoinLink]) -> Result<()>;
    /// What there is now.
    fn report(&mut self) -> Result<Vec<AdoptedProcess>>;
    /// The plugin may fetch its objects from now on, until `disarm`.
    fn arm(&mut self) -> Result<()>;
    fn disarm(&mut self) -> Result<()>;
    /// Objects the restored tasks should have fetched and did not; empty is good.
    fn missing(&mut self) -> Result<Vec<String>>;
    /// The restored tasks hold everything; the incubator ends.
    fn release(self: Box<Self>) -> Result<()>;
}

/// The container's way to the world.
pub trait Wire: Send + Sync {
    /// No packet leaves or arrives any more.
    fn down(&mut self) -> Result<()>;
    /// Packets pass again.
    fn up(&mut self) -> Result<()>;
    /// Tells the neighbours where the addresses are now.
    fn announce(&mut self) -> Result<()>;
}

/// One host with its container runtime.
pub trait Host: Send + Sync + 'static {
    /// All containers that have processes.
    fn containers(&self) -> Result<Vec<Container>>;
    /// One; the error says whether it is unknown, stopped, or cannot be read.
    fn container(&self, id: &str) -> Result<Container>;
    /// The container's cgroup stands still on return, or let go again.
    fn freeze(&self, container: &Container) -> Result<()>;
    fn thaw(&self, container: &Container) -> Result<()>;
    /// Processes of the container that a dump would not take along, in words; running or frozen, they would be lost.
    fn lost(&self, container: &Container) -> Result<Vec<String>>;
    /// Dumps with CRIU. `gate` is called once, when the image is complete and the tasks still exist: `Ok` lets CRIU
    /// kill them, an error makes them go on (frozen as they were). Returns when CRIU has ended.
    fn dump(
        &self,
        container: &Container,
        job: &DumpJob,
        gate: &mut dyn FnMut() -> std::result::Result<(), String>,
    ) -> Result<()>;
    /// Writes the memory that changed since the round before (all of it, in the first). The container goes on.
    fn pre_dump(&self, container: &Container, job: &PreDumpJob) -> Result<()>;
    /// Everything that speaks against restoring this container from that bundle here, in sentences. `None`: the bundle
    /// is still to come.
    fn examine(&self, id: &str, bundle: Option<&Path>) -> Vec<String>;
    /// What is not installed here and a container with RDMA needs for its move, in sentences.
    fn tools(&self) -> Vec<String>;
    /// Has a bundle that came from another host name this host's devices instead of that one's.
    fn localise(&self, bundle: &Path) -> Result<()>;
    /// The root file system of a bundle.
    fn rootfs(&self, bundle: &Path) -> Result<PathBuf>;
    /// Files of this host that its runtime may mount at that path of a container, like the shim.
    fn injected(&self, path: &Path) -> Vec<PathBuf>;
    /// Directory of the files that hold this container's registered memory; `None` if it has none.
    fn memory_files(&self, id: &str) -> Option<PathBuf>;
    /// Makes that directory for a container to come.
    fn make_memory_files(&self, id: &str) -> Result<PathBuf>;
    /// Removes it.
    fn drop_memory_files(&self, id: &str);
    /// What sysfs shows this container of devices that it knew elsewhere; empty where it has never been elsewhere.
    fn likenesses(&self, id: &str) -> Result<Vec<Likeness>>;
    /// From its restore on, a container to come is shown these.
    fn show(&self, id: &str, devices: &[Likeness]) -> Result<()>;
    /// It does not come.
    fn show_no_more(&self, id: &str);
    /// Kills and removes a container that was restored from these images, or whose restore from them broke off; whether
    /// there was one. Another one of that id is left alone.
    fn remove_restored(&self, id: &str, images: &Path) -> Result<bool>;
    /// Starts the incubator with the rights that bundle gives its container; `socket` is where the plugin's
    /// connections arrive, as a host path.
    fn incubate(&self, id: &str, bundle: &Path, socket: &Path) -> Result<Box<dyn Nursery>>;
    /// Restores up to the last gate.
    fn restore(&self, job: &RestoreJob) -> Result<Box<dyn Held>>;
    /// A restore that somebody else had brought to the last gate and left there; `None` if nothing is held (any more).
    fn held_at(&self, door: &Path) -> Result<Option<Box<dyn Held>>>;
    /// The container's processes are gone because it moved: removes its state, cgroup and mounts here. One that is gone
    /// already, or has another init by now, is left alone.
    fn forget(&self, container: &Container) -> Result<()>;
    /// The container's network on this host; `None` for one that has no interface of its own (host network, or none).
    fn wire(&self, bundle: &Path, init: Option<i32>) -> Result<Option<Box<dyn Wire>>>;
    /// For those who wait for the container here: it went there, or (`None`) it did not after all.
    fn gone_to(&self, id: &str, to: Option<&str>);
    /// CRIU's version (40101 is 4.1.1).
    fn criu(&self) -> Result<u32>;
}

impl dyn Host {
    /// Takes a container's addresses off the network, if it has any of its own.
    pub(super) fn unplug(&self, bundle: &Path, init: Option<i32>) -> Result<()> {
        self.wire(bundle, init)?.map_or(Ok(()), |mut wire| wire.down())
    }
}
