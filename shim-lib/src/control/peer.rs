//! A peer's part: a second QP beside each one whose remote end moves, connected early, used from the commit on.

use std::sync::Arc;

use rdma_virt::id::VQpn;
use rdma_virt::msg::{Connect, KeyTable, Reply, SwitchLink};
use rdma_virt::saved::Remote;

use super::session::{Migration, Refused, alone};
use super::unread;
use crate::context::ShadowContext;
use crate::qp::ShadowQp;
use crate::qp::second::Swapped;
use crate::registry;
use crate::tables::RemoteKeys;

/// The QP an agent means: of several devices' QPs with the same number, the one that is connected.
fn find(vqpn: VQpn) -> Option<Arc<ShadowQp>> {
    let mut alive: Vec<_> = registry::qps_by_vqpn(vqpn).into_iter().filter(|q| !q.is_dead()).collect();
    alive.sort_by_key(|q| q.attr().remote.is_none());
    alive.into_iter().next()
}

/// Makes second QPs. A QP that is gone has no answer: its remote end will see what it sees when a peer dies.
pub fn prepare(migration: &mut Migration, qps: &[VQpn]) -> Result<Reply, Refused> {
    let _alone = alone()?;
    let mut made = Vec::with_capacity(qps.len());
    for vqpn in qps {
        let Some(qp) = find(*vqpn) else { continue };
        if !migration.seconds.iter().any(|q| Arc::ptr_eq(q, &qp)) {
            migration.seconds.push(qp.clone());
        }
        let pqpn = qp
            .make_second()
            .map_err(|e| Refused::new(format!("no second QP can be made beside qp {}: {e}", vqpn.0)))?;
        made.push((*vqpn, pqpn));
    }
    Ok(Reply::Prepared { qps: made })
}

/// Connects second QPs. A link that is up already stays so; to connect one elsewhere it has to be made anew (abort and
/// prepare), because the other end's numbers are new then too.
pub fn connect(migration: &mut Migration, links: &[Connect]) -> Result<Reply, Refused> {
    let _alone = alone()?;
    for link in links {
        let Some(qp) = migration.seconds.iter().find(|q| q.vqpn() == link.vqpn && !q.is_dead()) else { continue };
        match migration.connected.iter().find(|c| c.vqpn == link.vqpn) {
            Some(known) if known == link => continue,
            Some(known) => {
                let (name, to) = (link.vqpn.0, known.remote_qpn.0);
                return Err(Refused::new(format!("the second QP of qp {name} is connected to qp {to} already")));
            }
            None => {}
        }
        qp.connect_second(link.remote_gid, link.remote_qpn, link.sq_psn, link.rq_psn).map_err(|e| {
            let (to, gid) = (link.remote_qpn.0, link.remote_gid);
            Refused::new(format!("the second QP of qp {} cannot be connected to qp {to} on {gid}: {e}", link.vqpn.0))
        })?;
        migration.connected.push(*link);
    }
    Ok(Reply::Done)
}

/// Destroys second QPs that nobody will use: whoever asked for them gave up, or will ask for others. The rest of the
/// migration stays.
pub fn unprepare(migration: &mut Migration) -> Result<Reply, Refused> {
    if migration.switched {
        return Err(Refused::new("the second QPs are in use"));
    }
    let _alone = alone()?;
    for qp in migration.seconds.drain(..).filter(|q| !q.is_dead()) {
        qp.drop_second();
    }
    migration.connected.clear();
    Ok(Reply::Done)
}

/// The devices these are on, each once.
fn contexts_of(qps: &[Arc<ShadowQp>]) -> Vec<Arc<ShadowContext>> {
    let mut found: Vec<Arc<ShadowContext>> = Vec::new();
    for qp in qps.iter().filter(|q| !q.is_dead()) {
        if !found.iter().any(|f| Arc::ptr_eq(f, qp.ctx())) {
            found.push(qp.ctx().clone());
        }
    }
    found
}

/// Changes over to the second QPs: the peer's way past the commit. For a QP of the moving process itself (its remote
/// end moved with it and was connected by the destination) only the remote keys are new.
pub fn switch(migration: &mut Migration, links: &[SwitchLink], tables: &[KeyTable]) -> Result<Reply, Refused> {
    if migration.adopted.is_none() && !migration.drained {
        return Err(Refused::new("the QPs have not been drained"));
    }
    let _alone = alone()?;
    let leaving = contexts_of(&migration.seconds);
    // An event that nobody has read goes with its QP.
    leaving.iter().for_each(|ctx| unread::keep(ctx));
    let tables: Vec<_> = tables.iter().map(|t| Arc::new(RemoteKeys::new(&t.0))).collect();
    // All or nothing is not possible any more; whatever fails concerns one QP and is said at the end.
    let mut failed = Vec::new();
    for link in links {
        let Some(qp) = find(link.vqpn) else { continue };
        let Some(keys) = tables.get(link.table as usize) else {
            failed.push(format!("qp {}: there is no table {}", link.vqpn.0, link.table));
            continue;
        };
        let known = qp.attr().remote;
        let remote = Remote {
            vgid: known.map_or(rdma_virt::id::VGid(link.remote_gid.0), |r| r.vgid),
            vqpn: known.map_or(VQpn(link.remote_qpn.0), |r| r.vqpn),
            pgid: link.remote_gid,
            pqpn: link.remote_qpn,
        };
        let Some(at) = migration.seconds.iter().position(|q| Arc::ptr_eq(q, &qp)) else {
            // Already changed over, or never had a second one.
            if known.is_some_and(|r| (r.pgid, r.pqpn) == (remote.pgid, remote.pqpn)) || migration.adopted.is_some() {
                qp.set_remote(Some(remote));
                qp.set_remote_keys(Some(keys.clone()));
            } else {
                failed.push(format!("qp {}: it has no second QP", link.vqpn.0));
            }
            continue;
        };
        migration.switched = true;
        let done = qp.swap_to_second(remote, Some(keys.clone())).and_then(|swapped| match swapped {
            Swapped::Yes => qp.repost_recvs(),
            // Its own queue is in use still, and gets only what it was not given meanwhile.
            Swapped::NotConnected => qp.reopen_rq(),
        });
        match done {
            Ok(_) => {
                migration.seconds.remove(at);
                qp.destroy_old();
            }
            Err(e) => failed.push(format!("qp {}: {e}", link.vqpn.0)),
        }
    }
    unread::announce(&leaving);
    if failed.is_empty() {
        Ok(Reply::Done)
    } else {
        Err(Refused::new(format!("not everything could be switched: {}", failed.join("; "))))
    }
}
