//! The messages between a shim and the agent of its host.
//!
//! One unix stream socket per RDMA process carries frames both ways: the agent asks, the shim's control thread
//! answers ([`ToShim`] / [`FromShim`]). Application threads that need an answer from the agent (a QP was made, a QP is
//! about to be connected) open a short-lived connection of their own to the same socket and use [`Ask`] / [`Answer`].
//!
//! A frame is: magic `b"mrd1"`, length of the body as u32 little-endian (at most [`MAX_FRAME`]), body as postcard.
//! The first frame on every connection is [`Hello`], from the shim. Encoding and sockets are not here.

use crate::id::{MigrationId, PGid, PQpn, PRkey, VGid, VQpn, VRkey, Vpid};
use crate::saved::{AdoptedProcess, ProcessState, RebuildProcess, RebuiltQp};
use serde::{Deserialize, Serialize};

/// Version of this protocol. A container keeps the shim it was started with, so agents go on speaking what released
/// shims speak; before the first release there is nothing to go on with.
pub const VERSION: u32 = 4;

/// The oldest one an agent understands.
pub const OLDEST: u32 = 3;

/// Start of every frame.
pub const MAGIC: [u8; 4] = *b"mrd1";

/// Longest body of a frame, bytes: a report of a process with tens of thousands of objects fits.
pub const MAX_FRAME: usize = 16 << 20;

/// First frame of a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub version: u32,
    pub vpid: Vpid,
    pub comm: String,
    pub role: Role,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The control thread's: stays open, the agent asks.
    Control,
    /// An application thread's: one [`Ask`], one [`Answer`] (after any number of [`Answer::Later`]), closed.
    Ask,
}

/// A question of an application thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// A QP was made; which number shall the application see?
    RegisterQp { pqpn: PQpn },
    /// A QP is about to be connected to this remote end; where is it now?
    Resolve { vgid: VGid, vqpn: VQpn },
}

/// The agent's answer to an [`Ask`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// For [`Ask::RegisterQp`].
    Registered { vqpn: VQpn },
    /// For [`Ask::Resolve`]. `keys` lists only remote keys that differ from what the remote application hands out.
    Resolved { pgid: PGid, pqpn: PQpn, keys: Vec<(VRkey, PRkey)> },
    /// In one sentence.
    Failed { why: String },
    /// For [`Ask::Resolve`]: that end's container stands still; another answer follows. Since version 4.
    Later,
}

/// A request of the agent to a shim's control thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ToShim {
    /// Echoed in the reply; ascending on one connection.
    pub seq: u64,
    /// `None` only for [`Request::Report`].
    pub migration: Option<MigrationId>,
    pub request: Request,
}

/// What an agent can ask of a shim. "Of the moving process" and "of a peer" say who gets it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// What do you have? Changes nothing. → [`Reply::State`]
    Report,
    /// Of a peer: make a second QP beside each named one (same PD, CQs, SRQ), in INIT. A repetition for the same
    /// migration answers the same numbers. → [`Reply::Prepared`]
    Prepare { qps: Vec<VQpn> },
    /// Of a peer: connect the second QPs (RTR, then RTS if the first one is in RTS). → [`Reply::Done`]
    Connect { links: Vec<Connect> },
    /// Of both: hold new sends from now on; returns when no thread is inside a post of these QPs any more.
    /// → [`Reply::Suspended`] with final counts.
    Suspend { scope: Scope },
    /// Of both, after every end is suspended: complete what is in flight. `expect` gives, per QP, how many two-sided
    /// messages its remote end has sent in all. Done when every send has completed and every expected message was
    /// received; receives posted from then on are only remembered. → [`Reply::Drained`] or [`Reply::Stuck`]
    Drain { expect: Vec<(VQpn, u64)>, deadline_ms: u32 },
    /// Of the moving process: gate control verbs and polling, say everything once more, close this connection
    /// after the reply, and wait for the epoch file to change before connecting again. → [`Reply::State`]
    Freeze,
    /// Of the moving process, on the destination: point every object at its new kernel object, register the MRs that
    /// nobody registered yet, re-post receives, re-arm CQs. Sends stay held. → [`Reply::Adopted`]
    Adopt(AdoptedProcess),
    /// Of a peer, after commit: use the second QPs, re-post receives there, destroy the first ones. Sends stay held.
    /// → [`Reply::Done`]
    Switch { links: Vec<SwitchLink>, tables: Vec<KeyTable> },
    /// Of both: everything is in place at every end; held sends go out and sending is free again.
    /// → [`Reply::GoesOn`]
    Resume,
    /// Of both, before commit: forget the migration; destroy second QPs, re-post what was remembered on the first
    /// ones, let held sends go out. Also undoes [`Request::Freeze`]. Without a migration under way: no effect.
    /// → [`Reply::GoesOn`]
    Abort,
    /// Of the moving process, on the destination, where nobody made kernel objects for it: make every object again
    /// through the library, behind the same numbers of files, and do what [`Request::Adopt`] does after that; connect
    /// the QPs of the links given. Sends stay held. There is no way back, so it may be repeated after a failure, and
    /// with more links: what is done already is not done again. → [`Reply::Rebuilt`]
    Rebuild(RebuildProcess),
    /// Of a peer, before commit: whoever asked for the second QPs does not need them; they are destroyed. A suspension
    /// stays as it is. → [`Reply::Done`]
    Unprepare,
}

/// Which QPs a suspension is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scope {
    /// Every QP of the process: it moves.
    All,
    /// These: their remote end moves.
    Qps(Vec<VQpn>),
}

/// How to connect one second QP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connect {
    /// The QP whose second is meant.
    pub vqpn: VQpn,
    pub remote_gid: PGid,
    pub remote_qpn: PQpn,
    /// First PSN this end sends with, and the one it expects. 24 bits.
    pub sq_psn: u32,
    pub rq_psn: u32,
}

/// One QP of a peer that changes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SwitchLink {
    pub vqpn: VQpn,
    pub remote_gid: PGid,
    pub remote_qpn: PQpn,
    /// Index into `tables` of [`Request::Switch`]: the remote keys valid on this QP.
    pub table: u32,
}

/// Remote keys of one moved process that are no longer what its application handed out; all others translate to
/// themselves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyTable(pub Vec<(VRkey, PRkey)>);

/// A shim's reply.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FromShim {
    pub seq: u64,
    pub reply: Reply,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    State(Box<ProcessState>),
    /// The second QPs' numbers, in the order asked.
    Prepared {
        qps: Vec<(VQpn, PQpn)>,
    },
    Suspended {
        counts: Vec<Count>,
    },
    Drained,
    /// The deadline passed; nothing was changed, the QPs are still suspended.
    Stuck {
        qps: Vec<StuckQp>,
    },
    /// Remote keys that are not what the application handed out, after everything was registered.
    Adopted {
        keys: KeyTable,
    },
    /// Another migration holds this process.
    Busy {
        by: MigrationId,
    },
    /// In one sentence: what could not be done, on which object.
    Refused {
        why: String,
    },
    /// The new QPs' numbers, and remote keys as in [`Reply::Adopted`].
    Rebuilt {
        qps: Vec<RebuiltQp>,
        keys: KeyTable,
    },
    /// So many sends had been held, and go out now.
    GoesOn {
        held: u64,
    },
}

/// Two-sided messages of one QP since it was connected. A "message" is one that consumes a receive: SEND in all its
/// forms and RDMA WRITE with immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    pub vqpn: VQpn,
    pub sent: u64,
    pub received: u64,
}

/// Why a QP is not quiet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StuckQp {
    pub vqpn: VQpn,
    /// In words: "3 sends not completed", "waiting for 2 messages, 0 receives posted".
    pub why: String,
}
