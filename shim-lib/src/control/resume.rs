//! The end of a migration in this process: what was held goes out, oldest first, and posting is free again. Which
//! QPs are used by then, the old ones or new ones, was decided before.

use std::sync::Arc;

use super::session::{Migration, Refused, alone};
use super::unread;
use crate::qp::ShadowQp;
use crate::{gate, readers, registry};

/// Lets held sends go out. Those that still have some, because their queue is full, are returned: call again when
/// the NIC has taken some.
pub fn flush(qps: Vec<Arc<ShadowQp>>) -> Vec<Arc<ShadowQp>> {
    qps.into_iter()
        .filter(|qp| {
            // One at a time: a provider may do much of the work inside the post, and control verbs wait meanwhile.
            // One of those that takes long delays this, but cannot make it fail.
            let Ok(_alone) = alone() else { return true };
            !qp.is_dead() && qp.resume().is_err()
        })
        .collect()
}

/// After adoption or switch, when every end is in place. The QPs returned are to be [`flush`]ed; that is done after
/// the answer, because it takes as long as the NIC takes for what was held.
pub fn resume(migration: &mut Migration) -> Result<Vec<Arc<ShadowQp>>, Refused> {
    let _alone = alone()?;
    end_stop(migration);
    Ok(std::mem::take(&mut migration.qps))
}

/// What [`abort`] leaves to do and to say.
pub struct Undone {
    /// To be [`flush`]ed.
    pub qps: Vec<Arc<ShadowQp>>,
    pub result: Result<(), Refused>,
}

/// Before commit: everything is as it was. What could not be undone is said; the rest is undone all the same. An error
/// of the outer kind means that nothing was undone yet: ask again.
pub fn abort(migration: &mut Migration) -> Result<Undone, Refused> {
    let _alone = alone()?;
    let mut failed = Vec::new();
    if migration.frozen.take().is_some() {
        for ctx in registry::contexts().iter().filter(|c| !c.is_dead()) {
            for srq in ctx.srqs().iter().filter(|s| !s.is_dead()) {
                if let Err(e) = srq.reopen() {
                    failed.push(format!("receives of SRQ {}: {e}", srq.id.0));
                }
            }
            ctx.cqs().iter().filter(|c| !c.is_dead()).for_each(|c| c.set_frozen(false));
        }
    }
    for qp in migration.qps.iter().filter(|q| !q.is_dead()) {
        if let Err(e) = qp.reopen_rq() {
            failed.push(format!("receives of qp {}: {e}", qp.vqpn().0));
        }
    }
    unread::announce_all();
    end_stop(migration);
    let result = if failed.is_empty() {
        Ok(())
    } else {
        Err(Refused::new(format!("not everything could be posted again: {}", failed.join("; "))))
    };
    Ok(Undone { qps: std::mem::take(&mut migration.qps), result })
}

/// Second QPs that were not used go, and everybody goes on. In this order: the end of a QP waits for whoever has read an
/// event about it.
fn end_stop(migration: &mut Migration) {
    if migration.moving {
        readers::open();
    }
    drop_seconds(migration);
    if migration.moving {
        gate::thaw();
    }
}

/// Second QPs that were not used.
fn drop_seconds(migration: &mut Migration) {
    for qp in migration.seconds.drain(..).filter(|q| !q.is_dead()) {
        qp.drop_second();
    }
}
