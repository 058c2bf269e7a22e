//! Holding new sends, and the right to post markers.
//!
//! A marker tells when unsignalled sends are done. It is an empty RDMA WRITE, which needs no key, but the remote QP
//! must allow RDMA WRITE at all: so while suspended both ends of a connection do, and this comes before any drain
//! begins. Providers whose send queue can be looked at need none of this.
//!
//! The right is not taken back at the moment of an abort: the other end may be a step behind, with a marker under way
//! that would kill its QP. It costs nothing meanwhile; memory is protected by its own access flags and keys.
#![expect(unsafe_code, reason = "calls a real verb")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_virt::msg::{Count, Scope};
use rdma_virt::saved::QpPhase;

use super::note;
use super::session::{Migration, Refused, alone};
use crate::abi::{ibv_qp_attr, qp_mask};
use crate::errno::Errno;
use crate::qp::ShadowQp;
use crate::{real, registry};

/// Longest time a thread may stay inside one post.
const PATIENCE: Duration = Duration::from_secs(6);

/// How long markers are allowed after the end of a migration.
pub const MARKERS_STAY: Duration = Duration::from_secs(60);

const ACCESS_REMOTE_WRITE: u32 = 1 << 1;
/// `enum ibv_qp_type`.
const RC: u32 = 2;
const UC: u32 = 3;

/// Holds new sends on all QPs of the scope; returns their final counts. On failure some may be suspended, and the
/// caller ends the migration if it began with this.
pub fn suspend(migration: &mut Migration, scope: &Scope) -> Result<Vec<Count>, Refused> {
    let alone = alone()?;
    if matches!(scope, Scope::All) && !migration.moving {
        // Control verbs wait until the end of the migration.
        migration.moving = true;
        std::mem::forget(alone);
    }
    let wanted: Vec<Arc<ShadowQp>> = match scope {
        Scope::All => registry::all(None),
        Scope::Qps(names) => names.iter().flat_map(|v| registry::qps_by_vqpn(*v)).collect(),
    };
    for qp in wanted {
        if qp.is_dead() || migration.qps.iter().any(|q| Arc::ptr_eq(q, &qp)) {
            continue;
        }
        qp.suspend(Instant::now() + PATIENCE).map_err(|_| {
            Refused::new(format!("a thread is stopped inside a post on qp {} (for {PATIENCE:?})", qp.vqpn().0))
        })?;
        migration.qps.push(qp);
    }
    Ok(migration.qps.iter().filter(|q| !q.is_dead()).map(|q| q.counts()).collect())
}

/// QPs that allow markers beyond what the application asked for.
#[derive(Default)]
pub struct MarkerRights {
    granted: Vec<Arc<ShadowQp>>,
    until: Option<Instant>,
}

impl MarkerRights {
    /// Lets the remote ends of these post markers.
    pub fn grant(&mut self, qps: &[Arc<ShadowQp>]) {
        self.until = None;
        let Ok(_alone) = alone() else { return };
        for qp in qps {
            let known = qp.attr();
            let needed = !qp.is_dead()
                && qp.progress().sq_empty.is_none()
                && matches!(qp.qp_type, RC | UC)
                && known.phase == QpPhase::Rts
                && known.attr.access & ACCESS_REMOTE_WRITE == 0
                && !self.granted.iter().any(|g| Arc::ptr_eq(g, qp));
            if needed {
                match set_access(qp, known.attr.access | ACCESS_REMOTE_WRITE) {
                    Ok(()) => self.granted.push(qp.clone()),
                    // Then the remote end's drain ends by its deadline, if it needs a marker at all.
                    Err(e) => note(|| format!("{}: markers cannot be allowed: {e}", qp.vqpn())),
                }
            }
        }
    }

    /// They stay until then.
    pub fn expire_at(&mut self, when: Instant) {
        self.until = Some(when);
    }

    /// Takes them back when it is time.
    pub fn revoke_expired(&mut self, now: Instant) {
        if self.until.is_none_or(|until| now < until) {
            return;
        }
        let Ok(_alone) = alone() else { return };
        for qp in self.granted.drain(..) {
            let known = qp.attr();
            if !qp.is_dead() && known.phase == QpPhase::Rts {
                let _ = set_access(&qp, known.attr.access);
            }
        }
        self.until = None;
    }
}

fn set_access(qp: &ShadowQp, access: u32) -> Result<(), Errno> {
    // SAFETY: all-zero is a valid attribute struct; the real QP of a live shadow that nobody can destroy now.
    unsafe {
        let mut attr: ibv_qp_attr = std::mem::zeroed();
        attr.qp_access_flags = access as _;
        Errno::check(real::verbs::modify_qp(qp.real(), &raw mut attr, qp_mask::ACCESS_FLAGS)?)
    }
}
