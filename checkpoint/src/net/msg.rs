//! What agents say to each other.
//!
//! One connection carries one [`Call`] and its [`Return`] at a time; a caller that wants several things at once opens
//! several connections. Every call that belongs to a migration names it. There is no call without a reply, and while one is worked
//! on, signs of life come.
//!
//! Three roles answer: anybody ([`Order::Describe`] …), the host of a *peer* ([`Order::Claim`] … [`Order::Release`]),
//! and the *destination* ([`Order::Offer`] … [`Order::Abandon`]). One host can be all three in one migration, the
//! source included: a source asks itself the same questions through the same handler, without the network.
//!
//! Rules for the order of calls to a destination are those of [`crate::engine::dest`].

use rdma_virt::id::{MigrationId, ObjId, PGid, PQpn, PRkey, VGid, VQpn, VRkey, Vpid};
use rdma_virt::msg::{KeyTable, Reply, Request};
use rdma_virt::saved::{Build, ProcessState, Remote};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::Duration;

use crate::image::{HandOver, Secret};
use crate::likeness::Likeness;

/// Version of this protocol; both ends must speak the same.
pub const VERSION: u16 = 12;

/// Longest piece of a file in one [`Order::FilePiece`], and all contents of one [`Order::Files`] together, bytes.
pub const PIECE: usize = 4 << 20;

/// A question to another agent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// `None` only for questions that change nothing and belong to no migration.
    pub migration: Option<MigrationId>,
    /// Echoed in the return; ascending on one connection.
    pub seq: u64,
    pub order: Order,
}

/// What comes back after a [`Call`]: signs of life for as long as it is worked on, then its return.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Back {
    /// Sent every [`BEAT`], so that a caller can tell a long answer from a host that died.
    Working,
    Return(Return),
}

/// Between two signs of life.
pub const BEAT: Duration = Duration::from_secs(2);

/// The reply to a [`Call`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Return {
    pub seq: u64,
    pub answer: Result<Answer, Refusal>,
}

/// Why an agent did not do as told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// Another migration holds the container.
    #[error("container {container} takes part in {by} already")]
    Busy { container: String, by: MigrationId },
    /// The process that was meant has no connection to its agent: it has ended, or never had the shim.
    #[error("{0}")]
    Absent(String),
    /// In one sentence, as this agent sees it.
    #[error("{0}")]
    Failed(String),
}

/// What one agent can ask of another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Order {
    // ---- anybody -------------------------------------------------------------------------------------------------
    /// What are you? → [`Answer::Host`]
    Describe,
    /// Where is the end that a QP is about to be connected to? `asker` is the agent of that QP if it is another than the
    /// caller. → [`Answer::Resolved`], or [`Refusal::Busy`] while that end stands still
    Resolve { vgid: VGid, vqpn: VQpn, asker: Option<String> },
    /// Has one of your processes connected a QP to this end? → [`Answer::Connected`]
    Connected { vgid: VGid, vqpn: VQpn },
    /// These processes live elsewhere now; remember it. → [`Answer::Done`]
    Moved(Vec<MovedProcess>),
    /// Is this process, which left for you, still yours, or known to have gone on? → [`Answer::Has`]
    Has { process: Box<MovedProcess> },
    /// Of the source: what became of this migration? → [`Answer::Fate`]
    Fate,

    // ---- the host of a peer ----------------------------------------------------------------------------------------
    /// Which of your processes hold the far ends of these links? → [`Answer::Found`], in the order asked.
    Find { links: Vec<Link> },
    /// These containers of yours take part in the migration from now on, and in no other. Also checks that their
    /// processes can take part at all. → [`Answer::Done`], or [`Refusal::Busy`]
    ///
    /// `port` is the one on which the source's agent (at the caller's address) can be asked for the fate.
    Claim { containers: Vec<String>, port: u16 },
    /// Put this to the shim of that process. Only what a peer may be asked. → [`Answer::Shim`]
    Relay { container: String, vpid: Vpid, request: Request },
    /// The migration is over for your containers. Before commit (`committed` false) their shims are told to abort.
    /// → [`Answer::Done`]
    Release { committed: bool },
    /// The far end of these containers' QPs lies on disk now. They stay suspended until whoever restores the image has
    /// shown that it is this one, at most so many seconds; then they go on as if its host had died. Repetition is
    /// harmless. → [`Answer::Done`]
    Park { containers: Vec<String>, generation: u64, secret: Secret, seconds: u64 },
    /// The caller restores the image; from now on it asks for what a source asks. Once, and only for the newest image.
    /// `port` as in [`Order::Claim`]. → [`Answer::Done`]
    Unpark { containers: Vec<String>, port: u16, generation: u64, secret: Secret },

    // ---- the destination -------------------------------------------------------------------------------------------
    /// Could you take this container? With `dry_run` nothing is kept. → [`Answer::Offered`]
    Offer { offer: Box<Offer>, dry_run: bool },
    /// Make kernel objects equal to these, or bring those made before to this state. → [`Answer::Incubated`]
    Incubate { states: Vec<ProcessState> },
    /// Connect the new QPs. → [`Answer::Done`]
    Join { links: Vec<JoinLink> },
    /// The container's bundle comes as a tar archive: all of it, or (`whole` false) what changed since, after these
    /// paths were removed. → [`Answer::Done`]
    TreeStart { whole: bool, gone: Vec<Vec<u8>> },
    /// Its next bytes, at most [`PIECE`]. → [`Answer::Done`]
    TreePiece {
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// It ends. → [`Answer::Offered`] after the whole bundle: what speaks against the container now that it is there;
    /// else [`Answer::Done`]
    TreeEnd,
    /// The files that follow are those of this round of pre-copy, counted from 1; of the image itself if it is 0. Each
    /// is made of what the one before it holds and what is new. → [`Answer::Done`]
    Round { number: u32 },
    /// Small files, whole. → [`Answer::Done`]
    Files(Vec<WholeFile>),
    /// A file of the image begins. → [`Answer::Done`]
    FileStart { name: String, mode: u32 },
    /// Its next bytes, at most [`PIECE`]. → [`Answer::Done`]
    FilePiece {
        #[serde(with = "serde_bytes")]
        bytes: Vec<u8>,
    },
    /// It ends; CRC-32 of all its bytes. → [`Answer::Done`]
    FileEnd { len: u64, crc: u32 },
    /// The files with registered memory that there are now: those that are missing are made, empty, and others removed.
    /// → [`Answer::Done`]
    Memory { files: Vec<MemoryFile> },
    /// What changed in them; all bytes together at most [`PIECE`]. → [`Answer::Done`]
    Blocks(Vec<MemoryBlocks>),
    /// The image is complete, `files` counted over all rounds; restore, and hold at the last gate. → [`Answer::Done`]:
    /// everything that can fail is done. `onward` is for the destination to keep, should it have to go on without its
    /// source.
    Restore {
        files: u32,
        #[serde(with = "serde_bytes")]
        onward: Vec<u8>,
    },
    /// The source has decided: bring the address up, let the tasks run. → [`Answer::Done`]. Repetition is harmless.
    Commit,
    /// Have every shim of the container point its objects at the new ones. → [`Answer::Adopted`]
    Adopt,
    /// Instead of [`Order::Adopt`], where nothing was made before: have every shim of the container make its objects
    /// again and connect these, as far as they are known. May be repeated, with more links. → [`Answer::Rebuilt`]
    Rebuild { links: Vec<JoinLink> },
    /// Everybody runs; the migration is history. → [`Answer::Done`]
    Finish,
    /// Not committed and never will be: nothing of it may stay. → [`Answer::Done`], also for an unknown migration.
    Abandon,

    // ---- later than the others: last, because images of registered memory on disk know those by their places in this
    // ---- list. Of a destination that seems to be gone:
    /// Of anybody: does that agent answer you? → [`Answer::Has`]
    Reaches { at: String },
    /// Of the destination: is anything of it still with you? → [`Answer::Has`]
    Holds,
    /// It had committed, and then its source was told that the destination is gone for good, and has the container
    /// again: whatever of it is with you ends, and who waits for it waits no longer. → [`Answer::Done`], also for an
    /// unknown migration
    TakenBack { container: String },
    /// Of the destination: sysfs shall show the container these devices as it knew them. → [`Answer::Done`]
    Show { devices: Vec<Likeness> },
    /// Of the source: the destination was told that its source is gone for good, and has the container: whatever of it is
    /// still with you ends. → [`Answer::Done`], also for an unknown migration
    TakenOver { container: String },
}

impl Order {
    /// For messages and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Order::Describe => "describe",
            Order::Resolve { .. } => "resolve",
            Order::Connected { .. } => "connected",
            Order::Moved(_) => "moved",
            Order::Has { .. } => "has",
            Order::Fate => "fate",
            Order::Reaches { .. } => "reaches",
            Order::TakenBack { .. } => "taken-back",
            Order::TakenOver { .. } => "taken-over",
            Order::Find { .. } => "find",
            Order::Claim { .. } => "claim",
            Order::Relay { .. } => "relay",
            Order::Release { .. } => "release",
            Order::Park { .. } => "park",
            Order::Unpark { .. } => "unpark",
            Order::Offer { .. } => "offer",
            Order::Show { .. } => "show",
            Order::Incubate { .. } => "incubate",
            Order::Join { .. } => "join",
            Order::TreeStart { .. } | Order::TreePiece { .. } | Order::TreeEnd => "tree",
            Order::Round { .. }
            | Order::Files(_)
            | Order::FileStart { .. }
            | Order::FilePiece { .. }
            | Order::FileEnd { .. } => "file",
            Order::Memory { .. } | Order::Blocks(_) => "memory",
            Order::Restore { .. } => "restore",
            Order::Commit => "commit",
            Order::Adopt => "adopt",
            Order::Rebuild { .. } => "rebuild",
            Order::Holds => "holds",
            Order::Finish => "finish",
            Order::Abandon => "abandon",
        }
    }
}

/// The answer to an [`Order`], as its documentation says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Answer {
    Done,
    Host(HostFacts),
    /// `None`: nothing known of that end here.
    Resolved(Option<Resolved>),
    /// Who, in words.
    Connected(Option<String>),
    Has(bool),
    Fate(Fate),
    Found(Vec<FarEnd>),
    Shim(Reply),
    /// Everything that stands against it, in sentences; empty means it can be done.
    Offered {
        problems: Vec<String>,
    },
    /// With the MRs that are registered already.
    Incubated {
        qps: Vec<BornQp>,
        gids: Vec<BornGid>,
        mrs: Vec<BornMr>,
    },
    Adopted {
        keys: Vec<(Vpid, KeyTable)>,
    },
    Rebuilt {
        qps: Vec<BornQp>,
        gids: Vec<BornGid>,
        keys: Vec<(Vpid, KeyTable)>,
    },
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WholeFile {
    pub name: String,
    pub mode: u32,
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
    /// CRC-32 of the bytes.
    pub crc: u32,
}

/// A file that holds registered memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFile {
    pub name: String,
    /// Tells it from an earlier file of that name.
    pub id: u64,
    /// Bytes, most of which may never have been written.
    pub len: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// Blocks of 1024 bytes of a [`MemoryFile`]. Runs are first block, counted from `first`, and number of blocks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBlocks {
    pub file: String,
    pub first: u64,
    /// Their contents are `bytes`, in order.
    pub runs: Vec<(u32, u32)>,
    /// These are all zeros.
    pub zeros: Vec<(u32, u32)>,
    /// Without this attribute they would go over one by one.
    #[serde(with = "serde_bytes")]
    pub bytes: Vec<u8>,
}

/// Where an end is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resolved {
    pub pgid: PGid,
    pub pqpn: PQpn,
    /// Remote keys that differ from those the application there hands out.
    pub keys: Vec<(VRkey, PRkey)>,
}

/// What a source says about one of its migrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fate {
    /// It is under way.
    Undecided,
    Committed,
    /// Committed, and everybody has gone on since: there is nothing to hold any more.
    Finished,
    /// Committed, and then given up by an administrator because the destination seemed to be gone: the source has the
    /// container, and no other copy may live.
    TakenBack,
    /// Or never heard of: a source that has no record has not committed.
    Aborted,
}

/// One connection of the moving container, described from its side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub near_vqpn: VQpn,
    pub near_pqpn: PQpn,
    pub far: Remote,
}

/// What a host knows of the far end of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FarEnd {
    /// A process with the shim has it.
    Shim(End),
    /// Somebody has it, in words, but no shim answers for it.
    Foreign(String),
    /// Nobody has it any more: its process ended, or destroyed it.
    Gone,
}

/// One QP of one process of one container; the host is known from context.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct End {
    pub container: String,
    pub vpid: Vpid,
    pub comm: String,
    pub vqpn: VQpn,
    /// It is connected back to the moving QP (RTR or later); otherwise it only waits to be.
    pub connected: bool,
}

/// A QP the destination made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BornQp {
    pub vpid: Vpid,
    pub context: ObjId,
    pub qp: ObjId,
    pub vqpn: VQpn,
    pub pqpn: PQpn,
    /// Where the far end has to send to.
    pub pgid: PGid,
}

/// An MR that a destination registered before its process exists, and its remote key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BornMr {
    pub vpid: Vpid,
    pub context: ObjId,
    pub mr: ObjId,
    pub prkey: PRkey,
}

/// What a GID of a moved process' table is at its new place. The destination knows it for every entry, also for those
/// that no QP uses yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BornGid {
    pub vpid: Vpid,
    pub vgid: VGid,
    pub pgid: PGid,
}

/// How the destination connects one of its new QPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinLink {
    pub vpid: Vpid,
    pub context: ObjId,
    pub qp: ObjId,
    /// New location of the far end; its virtual names do not change.
    pub remote: Remote,
    /// First PSN this end sends with, and the one it expects. 24 bits.
    pub sq_psn: u32,
    pub rq_psn: u32,
}

/// A contiguous range of virtual QP numbers that only one container gives out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    pub first: u32,
    pub count: u32,
}

/// What a destination must know to say yes or no.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub container: String,
    /// Where its bundle lies, on both hosts.
    pub bundle: PathBuf,
    /// Name of the source for messages.
    pub from: String,
    /// Port on which the source's agent can be asked for the fate; its address is the caller's.
    pub from_port: u16,
    /// 40101 is 4.1.1.
    pub criu: u32,
    pub cpu_flags: Vec<String>,
    /// One entry for each process.
    pub processes: Vec<OfferedProcess>,
    /// Bytes the image will need on the destination, estimated.
    pub image_bytes: u64,
    /// The container was paused when found; it stays so.
    pub paused: bool,
    /// Range from which QPs made after the move get their virtual numbers.
    pub lease: Lease,
    /// How the container's processes get their kernel objects.
    pub hand_over: HandOver,
    /// The bundle comes along.
    pub copy: Option<CopyOffer>,
}

/// A bundle that is to be copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOffer {
    /// What all copies of the bundle share.
    pub lineage: String,
    /// Of all files.
    pub bytes: u64,
}

/// What one RDMA process needs of a destination.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedProcess {
    pub vpid: Vpid,
    pub comm: String,
    pub builds: Vec<Build>,
    /// Driver names of its devices, and the GID types (`ibv_gid_type`) its QPs use there.
    pub devices: Vec<(String, Vec<u32>)>,
}

/// What a host has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    pub name: String,
    pub version: String,
    /// `None`: no usable CRIU, or none found yet.
    pub criu: Option<u32>,
    pub devices: Vec<DeviceFacts>,
    /// Other agents this one has dealt with, `host:port`: whoever looks for a GID's host can ask on.
    pub agents: Vec<String>,
}

/// One RDMA device of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    pub name: String,
    pub driver: String,
    pub gids: Vec<GidFacts>,
}

/// One GID of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GidFacts {
    pub port: u8,
    pub index: u16,
    pub gid: PGid,
    /// As in `enum ibv_gid_type`.
    pub kind: u32,
}

/// Where one process that moved is now, for those who connect to it or hold its keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedProcess {
    pub container: String,
    pub vpid: Vpid,
    /// GIDs its application shows to others.
    pub vgids: Vec<VGid>,
    /// What those are now that have a counterpart there.
    #[serde(default)]
    pub gids: Vec<(VGid, PGid)>,
    /// Its virtual QP numbers and where they are.
    pub qps: Vec<(VQpn, PQpn, PGid)>,
    pub keys: KeyTable,
    /// Range its later QPs come from.
    pub lease: Lease,
    /// `host:port` of the agent where it lives.
    pub at: String,
    /// Seconds since 1970 by the source's clock: the newer of two entries counts.
    pub since: u64,
}
