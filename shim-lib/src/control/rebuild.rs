//! Arrival without an incubator: every object of the process is made again through the library, behind the same shadow
//! and the same numbers of files. From there on as in [`super::adopt`]: MRs are registered, receives posted, CQs armed.
//! Sends stay held.
//!
//! It happens after the commit, so there is nothing to undo: what failed is tried again, and [`Rebuilt`] knows what need
//! not be. The library's objects of the other host are left alone where they are. They cost a few bytes each; telling
//! the library to free them would make it speak to the kernel about handles that mean something else here.
#![expect(unsafe_code, reason = "unmaps queues of another host")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rdma_virt::id::ObjId;
use rdma_virt::msg::{KeyTable, Reply};
use rdma_virt::saved::{QpPhase, QueueMap, RebuildContext, RebuildLink, RebuildProcess, RebuiltQp};

use super::adopt;
use super::freeze::Frozen;
use super::session::{Migration, Refused};
use super::unread;
use crate::context::ShadowContext;
use crate::errno::Errno;
use crate::qp::ShadowQp;
use crate::registry;

/// What has been done so far.
#[derive(Debug, Default)]
pub struct Rebuilt {
    /// Objects that are the new ones.
    made: BTreeSet<ObjId>,
    /// SRQs whose receives count as not posted: those that are posted since are not posted twice.
    emptied: BTreeSet<ObjId>,
    /// Devices whose CQs are armed.
    armed: BTreeSet<ObjId>,
    /// How far new QPs are, and what they are connected to.
    reached: BTreeMap<ObjId, QpPhase>,
    joined: BTreeMap<ObjId, RebuildLink>,
}

impl Rebuilt {
    /// Makes one object, unless it is made.
    fn make(&mut self, id: ObjId, make: impl FnOnce() -> Result<(), Errno>, what: impl Fn() -> String) -> Done {
        if !self.made.contains(&id) {
            make().map_err(|e| Refused::new(format!("{} cannot be made again: {e}", what())))?;
            self.made.insert(id);
        }
        Ok(())
    }
}

type Done = Result<(), Refused>;

/// See [`rdma_virt::msg::Request::Rebuild`].
pub fn rebuild(migration: &mut Migration, asked: &RebuildProcess) -> Result<Reply, Refused> {
    let Some(frozen) = &migration.frozen else {
        return Err(Refused::new("the process has not been frozen, so it cannot have moved"));
    };
    let contexts: Vec<Arc<ShadowContext>> = registry::contexts().into_iter().filter(|c| !c.is_dead()).collect();
    let pairs = contexts
        .iter()
        .map(|ctx| match asked.contexts.iter().find(|a| a.id == ctx.id) {
            Some(place) => Ok((ctx, place)),
            None => Err(Refused::new(format!("context {} ({:?}) has no device here", ctx.device_name(), ctx.id))),
        })
        .collect::<Result<Vec<_>, _>>()?;

    // From here on there is no way back.
    let done = migration.rebuilt.get_or_insert_default();
    for (ctx, place) in &pairs {
        open(done, frozen, ctx, place)?;
        objects(done, ctx)?;
    }
    // Only now: an MR may be registered on one context while another still has the source's handles.
    for (ctx, _) in &pairs {
        for mr in ctx.mrs().iter().filter(|o| !o.is_dead()) {
            let what = || {
                let (lkey, addr, len) = (mr.vlkey().0, mr.range().addr, mr.range().length);
                format!("the MR with lkey {lkey:#x} ({len} bytes at {addr:#x})")
            };
            done.make(mr.id, || mr.reregister(), what)?;
        }
    }
    for (ctx, _) in &pairs {
        receive(done, ctx)?;
    }
    for (ctx, _) in &pairs {
        if !done.armed.contains(&ctx.id) {
            adopt::arm(ctx, &frozen.unread)?;
            done.armed.insert(ctx.id);
        }
    }
    let mut drained = 0;
    for link in &asked.links {
        drained += usize::from(join(done, &contexts, link)? == Some(QpPhase::Sqd));
    }
    unread::arrive(&contexts, drained);

    let (qps, keys) = numbers(&contexts);
    migration.adopted = Some(keys.clone());
    Ok(Reply::Rebuilt { qps, keys })
}

/// What has been made, of a process that went on with it.
pub fn made() -> Reply {
    let (qps, keys) = numbers(&registry::contexts());
    Reply::Rebuilt { qps, keys }
}

/// What QPs are called now, and changed keys.
fn numbers(contexts: &[Arc<ShadowContext>]) -> (Vec<RebuiltQp>, KeyTable) {
    let contexts = || contexts.iter().filter(|c| !c.is_dead());
    let mrs = contexts().flat_map(|c| c.mrs()).filter(|m| !m.is_dead());
    let keys = KeyTable(mrs.filter_map(|m| adopt::key(&m)).collect());
    let number = |ctx: &Arc<ShadowContext>, qp: &Arc<ShadowQp>| RebuiltQp {
        context: ctx.id,
        qp: qp.id,
        vqpn: qp.vqpn(),
        pqpn: qp.pqpn(),
    };
    let qps = contexts().flat_map(|c| c.qps().into_iter().filter(|q| !q.is_dead()).map(move |q| number(c, &q)));
    (qps.collect(), keys)
}

/// The device, and what the application goes on being told about the one it opened.
fn open(done: &mut Rebuilt, frozen: &Frozen, ctx: &ShadowContext, place: &RebuildContext) -> Done {
    let what = || format!("context {} on device {}", ctx.device_name(), place.device);
    done.make(ctx.id, || ctx.rebuild(&place.device), what)?;
    if let Some((_, view)) = frozen.views.iter().find(|(id, _)| *id == ctx.id) {
        let mut view = view.clone();
        view.sgid = place.sgid_index.clone();
        ctx.set_view(Some(view));
    }
    // This thread opened it, the application's threads ring its doorbells: after a restore each has credentials of its
    // own, and the kernel refuses commands that are written to a file somebody else opened.
    ctx.set_handed_over(true);
    Ok(())
}

/// Everything but MRs, the used before their users.
fn objects(done: &mut Rebuilt, ctx: &ShadowContext) -> Done {
    for pd in ctx.pds().iter().filter(|o| !o.is_dead()) {
        done.make(pd.id, || pd.rebuild(), || format!("PD {}", pd.id.0))?;
    }
    for channel in ctx.channels().iter().filter(|o| !o.is_dead()) {
        done.make(channel.id, || channel.rebuild(), || format!("the completion channel with fd {}", channel.fd()))?;
    }
    for cq in ctx.cqs().iter().filter(|o| !o.is_dead()) {
        done.make(cq.id, || cq.rebuild().map(|old| leave([old])), || format!("CQ {}", cq.id.0))?;
    }
    for srq in ctx.srqs().iter().filter(|o| !o.is_dead()) {
        done.make(srq.id, || srq.rebuild().map(|old| leave([old])), || format!("SRQ {}", srq.id.0))?;
    }
    for qp in ctx.qps().iter().filter(|o| !o.is_dead()) {
        done.make(qp.id, || qp.rebuild().map(leave), || format!("qp {}", qp.vqpn().0))?;
    }
    Ok(())
}

/// Receives that were posted and not used up.
fn receive(done: &mut Rebuilt, ctx: &ShadowContext) -> Done {
    for srq in ctx.srqs().iter().filter(|o| !o.is_dead()) {
        let posted = if done.emptied.insert(srq.id) { srq.repost() } else { srq.reopen() };
        posted.map_err(|e| Refused::new(format!("receives of SRQ {} cannot be posted again: {e}", srq.id.0)))?;
    }
    adopt::repost_to_qps(ctx)
}

/// Queues of the other host: a placeholder is mapped there, which nobody reads or writes any more.
fn leave<const N: usize>(maps: [Option<QueueMap>; N]) {
    for map in maps.into_iter().flatten() {
        // SAFETY: mapped by the provider for an object that was just replaced under its lock; nobody else knows it.
        unsafe { libc::munmap(map.addr as *mut libc::c_void, map.len as usize) };
    }
}

/// The state a QP was taken to, if it was not there before.
fn join(done: &mut Rebuilt, contexts: &[Arc<ShadowContext>], link: &RebuildLink) -> Result<Option<QpPhase>, Refused> {
    if let Some(known) = done.joined.get(&link.qp) {
        return if known == link {
            Ok(None)
        } else {
            Err(Refused::new(format!("qp {} is connected to qp {} already", link.qp.0, known.remote.pqpn.0)))
        };
    }
    let qps = contexts.iter().find(|c| c.id == link.context).map(|c| c.qps()).unwrap_or_default();
    // One that is gone has nobody to be connected for.
    let Some(qp) = qps.iter().find(|q| q.id == link.qp && !q.is_dead()) else { return Ok(None) };
    let reached = done.reached.entry(link.qp).or_insert(QpPhase::Init);
    qp.join(link.remote, link.sq_psn, link.rq_psn, reached).map_err(|e| {
        let (to, gid) = (link.remote.pqpn.0, link.remote.pgid);
        Refused::new(format!("the new qp {} cannot be connected to qp {to} on {gid}: {e}", qp.vqpn().0))
    })?;
    done.joined.insert(link.qp, *link);
    Ok(Some(*reached))
}
