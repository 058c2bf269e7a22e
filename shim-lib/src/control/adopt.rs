//! Arrival: every object of the process is pointed at the kernel object that was made for it on the destination, MRs
//! that nobody registered yet are registered, receives are posted again and CQs armed again. Sends stay held.
//!
//! Any failure names its object. It leaves the process frozen: it is the destination that gives up, and the process
//! goes with it.

use std::sync::Arc;

use rdma_virt::id::{Handle, ObjId, PRkey, VRkey};
use rdma_virt::msg::KeyTable;
use rdma_virt::saved::{AdoptedContext, AdoptedProcess, QpPhase};

use super::session::{Migration, Refused};
use super::unread;
use crate::context::ShadowContext;
use crate::mr::ShadowMr;
use crate::registry;

/// See [`rdma_virt::msg::Request::Adopt`].
pub fn adopt(migration: &mut Migration, state: &AdoptedProcess) -> Result<KeyTable, Refused> {
    if let Some(keys) = &migration.adopted {
        return Ok(keys.clone());
    }
    let Some(frozen) = &mut migration.frozen else {
        return Err(Refused::new("the process has not been frozen, so it cannot have moved"));
    };
    let contexts: Vec<Arc<ShadowContext>> = registry::contexts().into_iter().filter(|c| !c.is_dead()).collect();
    let pairs = contexts
        .iter()
        .map(|ctx| match state.contexts.iter().find(|a| a.id == ctx.id) {
            Some(adopted) => Ok((ctx, adopted)),
            None => Err(Refused::new(format!("context {} ({:?}) was not made anew", ctx.device_name(), ctx.id))),
        })
        .collect::<Result<Vec<_>, _>>()?;

    for (ctx, adopted) in &pairs {
        if let Some((_, view)) = frozen.views.iter().find(|(id, _)| *id == ctx.id) {
            let mut view = view.clone();
            view.sgid = adopted.sgid_index.clone();
            ctx.set_view(Some(view));
        }
        ctx.set_handed_over(true);
        point(ctx, adopted)?;
    }
    // Only now: an MR may be registered on one context while another still has the source's handles.
    for (ctx, adopted) in &pairs {
        register(ctx, adopted)?;
    }
    for (ctx, _) in &pairs {
        receive(ctx)?;
    }
    for (ctx, _) in &pairs {
        arm(ctx, &frozen.unread)?;
    }
    if !frozen.made_anew {
        frozen.made_anew = true;
        contexts.iter().flat_map(|c| c.qps()).filter(|q| !q.is_dead()).for_each(|q| q.made_anew());
    }
    // Only now: who waits for an event shall see it.
    for (ctx, adopted) in &pairs {
        break_off(ctx, adopted)?;
    }
    // Last: what was read counts for the new kernel objects, so they must not be pointed at once more.
    unread::arrive(&contexts, 0);
    let keys =
        KeyTable(contexts.iter().flat_map(|c| c.mrs()).filter(|m| !m.is_dead()).filter_map(|m| key(&m)).collect());
    migration.adopted = Some(keys.clone());
    Ok(keys)
}

/// The remote key of an MR, if it is no longer what the application hands out.
pub(super) fn key(mr: &ShadowMr) -> Option<(VRkey, PRkey)> {
    let pair = (VRkey(mr.vrkey().0), PRkey(mr.prkey().0));
    (pair.0.0 != pair.1.0).then_some(pair)
}

fn handle_of(list: &[(ObjId, Handle)], id: ObjId, kind: &str) -> Result<u32, Refused> {
    let found = list.iter().find(|(i, _)| *i == id);
    found.map(|(_, h)| h.0).ok_or_else(|| Refused::new(format!("{kind} {} was not made anew", id.0)))
}

/// New handles and numbers.
fn point(ctx: &ShadowContext, adopted: &AdoptedContext) -> Result<(), Refused> {
    for pd in ctx.pds().iter().filter(|o| !o.is_dead()) {
        pd.patch(handle_of(&adopted.pds, pd.id, "PD")?);
    }
    for cq in ctx.cqs().iter().filter(|o| !o.is_dead()) {
        cq.patch(handle_of(&adopted.cqs, cq.id, "CQ")?);
    }
    for srq in ctx.srqs().iter().filter(|o| !o.is_dead()) {
        srq.patch(handle_of(&adopted.srqs, srq.id, "SRQ")?);
    }
    for qp in ctx.qps().iter().filter(|o| !o.is_dead()) {
        let new = adopted.qps.iter().find(|q| q.id == qp.id);
        let new = new.ok_or_else(|| Refused::new(format!("qp {} was not made anew", qp.vqpn().0)))?;
        // A QP that was not connected before keeps what is known of its remote end: nothing.
        let known = qp.attr();
        qp.patch(new.handle.0, new.pqpn, new.remote.or(known.remote));
        let announced = known.phase == QpPhase::Rtr && new.remote.is_some();
        qp.announce_psn(announced.then_some(new.sq_psn));
    }
    Ok(())
}

/// MRs: known ones are pointed at, the others registered here.
fn register(ctx: &ShadowContext, adopted: &AdoptedContext) -> Result<(), Refused> {
    for mr in ctx.mrs().iter().filter(|o| !o.is_dead()) {
        match adopted.mrs.iter().find(|m| m.id == mr.id) {
            Some(new) => mr.patch(new.handle.0, new.plkey.0, new.prkey.0),
            None => mr.reregister().map_err(|e| {
                let (lkey, addr, len) = (mr.vlkey().0, mr.range().addr, mr.range().length);
                Refused::new(format!("the MR with lkey {lkey:#x} ({len} bytes at {addr:#x}) cannot be registered: {e}"))
            })?,
        }
    }
    Ok(())
}

/// Receives that were posted and not used up.
fn receive(ctx: &ShadowContext) -> Result<(), Refused> {
    for srq in ctx.srqs().iter().filter(|o| !o.is_dead()) {
        srq.repost().map_err(|e| Refused::new(format!("receives of SRQ {} cannot be posted again: {e}", srq.id.0)))?;
    }
    repost_to_qps(ctx)
}

/// Those of QPs that have a receive queue of their own.
pub fn repost_to_qps(ctx: &ShadowContext) -> Result<(), Refused> {
    for qp in ctx.qps().iter().filter(|o| !o.is_dead()) {
        qp.repost_recvs()
            .map_err(|e| Refused::new(format!("receives of qp {} cannot be posted again: {e}", qp.vqpn().0)))?;
    }
    Ok(())
}

/// A connected QP that was made without a remote end is one whose peer does not wait for this process: it was restored
/// from a copy.
fn break_off(ctx: &ShadowContext, adopted: &AdoptedContext) -> Result<(), Refused> {
    let alone = |id| adopted.qps.iter().any(|q| q.id == id && q.remote.is_none());
    for qp in ctx.qps().iter().filter(|o| !o.is_dead() && o.is_connected() && alone(o.id)) {
        qp.break_off().map_err(|e| Refused::new(format!("qp {} cannot be broken off: {e}", qp.vqpn().0)))?;
    }
    Ok(())
}

/// CQs are polled and armed again. One that was armed owes an event for what a drain took out of it: the event of the
/// old kernel object, if it was raised at all, stayed behind. So does one whose channel had an event that nobody had
/// read: it may have been this CQ's. (An event too many is legal, one too few is not.)
pub(super) fn arm(ctx: &ShadowContext, unread: &[ObjId]) -> Result<(), Refused> {
    for cq in ctx.cqs().iter().filter(|o| !o.is_dead()) {
        if cq.armed().is_none() {
            continue;
        }
        cq.rearm().map_err(|e| Refused::new(format!("CQ {} cannot be armed again: {e}", cq.id.0)))?;
        let lost = cq.channel().is_some_and(|c| unread.contains(&c.id));
        if lost || cq.fake_len() > 0 {
            cq.raise_event()
                .map_err(|e| Refused::new(format!("CQ {} cannot raise the event it owes: {e}", cq.id.0)))?;
        }
    }
    ctx.cqs().iter().filter(|o| !o.is_dead()).for_each(|cq| cq.set_frozen(false));
    Ok(())
}
