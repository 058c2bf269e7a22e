//! Questions an application thread has for the agent: a connection of its own, one question, one answer, closed.
//!
//! Without an agent every number is its own translation. An agent that does not answer in time, or does not know,
//! counts as none: setting up a connection must not depend on it.

use std::time::{Duration, Instant};

use rdma_virt::id::{PGid, PQpn, PRkey, VGid, VQpn, VRkey};
use rdma_virt::msg::{Answer, Ask, Role};

use super::wire::{Conn, WireError};
use super::{note, wire};

/// Longest silence of the agent.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where a remote end is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub pgid: PGid,
    pub pqpn: PQpn,
    /// Remote keys that differ from what its application hands out.
    pub keys: Vec<(VRkey, PRkey)>,
}

fn ask(question: &Ask) -> Option<Answer> {
    if !std::path::Path::new(wire::SOCKET).exists() {
        return None;
    }
    let talk = || -> Result<Answer, WireError> {
        let conn = Conn::open(Role::Ask, Instant::now() + PATIENCE)?;
        conn.send(question)?;
        loop {
            match conn.receive(Some(Instant::now() + PATIENCE))? {
                Answer::Later => {}
                answer => return Ok(answer),
            }
        }
    };
    match talk() {
        Ok(Answer::Failed { why }) => {
            note(|| format!("{question:?}: {why}"));
            None
        }
        Ok(answer) => Some(answer),
        Err(error) => {
            note(|| format!("{question:?}: {error}"));
            None
        }
    }
}

/// The number the application shall see for a QP just made.
pub fn register_qp(pqpn: PQpn) -> VQpn {
    match ask(&Ask::RegisterQp { pqpn }) {
        Some(Answer::Registered { vqpn }) => vqpn,
        _ => VQpn(pqpn.0),
    }
}

/// Where the remote end is that a QP is about to be connected to.
pub fn resolve(vgid: VGid, vqpn: VQpn) -> Resolved {
    match ask(&Ask::Resolve { vgid, vqpn }) {
        Some(Answer::Resolved { pgid, pqpn, keys }) => Resolved { pgid, pqpn, keys },
        _ => Resolved { pgid: PGid(vgid.0), pqpn: PQpn(vqpn.0), keys: Vec::new() },
    }
}
