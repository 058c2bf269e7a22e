//! What the new objects of a destination are called there, as its source needs to know it: QP numbers, GIDs, and keys.

use rdma_virt::id::{ObjId, Vpid};
use rdma_virt::saved::{AdoptedContext, AdoptedProcess, ProcessState, SgidMap};

use crate::net::msg::{BornGid, BornMr, BornQp};

/// What each GID of the processes' tables is here.
pub(super) fn gids<'a>(
    contexts: impl Iterator<Item = (Vpid, ObjId, &'a [SgidMap])>,
    states: &[ProcessState],
) -> Vec<BornGid> {
    let mut gids = Vec::new();
    for (vpid, id, maps) in contexts {
        let state = states.iter().filter(|s| s.vpid == vpid).flat_map(|s| &s.contexts).find(|c| c.id == id);
        for entry in state.iter().flat_map(|c| &c.gids) {
            let map = maps.iter().find(|m| m.port == entry.port && u16::from(m.virtual_index) == entry.index);
            let born = map.map(|m| BornGid { vpid, vgid: entry.gid, pgid: m.physical });
            gids.extend(born.filter(|b| !gids.contains(b)));
        }
    }
    gids
}

/// Remote keys of what is registered already.
pub(super) fn mrs(made: &[AdoptedProcess]) -> Vec<BornMr> {
    let contexts = made.iter().flat_map(|p| p.contexts.iter().map(|c| (p.vpid, c)));
    let of = |(vpid, c): (Vpid, &AdoptedContext)| {
        let context = c.id;
        c.mrs.iter().map(move |m| BornMr { vpid, context, mr: m.id, prkey: m.prkey }).collect::<Vec<_>>()
    };
    contexts.flat_map(of).collect()
}

/// QP numbers and addresses for the source's plan. A QP's packets come from the GID its application chose, at that
/// entry's place on this host.
pub(super) fn born(made: &[AdoptedProcess], states: &[ProcessState]) -> Result<Vec<BornQp>, String> {
    let mut qps = Vec::new();
    for process in made {
        let of = |c: ObjId| states.iter().find(|s| s.vpid == process.vpid)?.contexts.iter().find(|x| x.id == c);
        for context in &process.contexts {
            for qp in &context.qps {
                let asked = of(context.id).and_then(|c| c.qps.iter().find(|q| q.id == qp.id));
                let entry = asked.and_then(|q| {
                    let fits = |s: &&SgidMap| s.port == q.attr.port_num && s.virtual_index == q.attr.sgid_index;
                    context.sgid_index.iter().find(fits)
                });
                // One that is not connected sends from nowhere yet: whoever connects to it goes by the GID it was told.
                let Some(pgid) = entry.or(context.sgid_index.first()).map(|s| s.physical) else {
                    return Err(format!("device {} has no GID of the kind its QPs use", context.device));
                };
                qps.push(BornQp {
                    vpid: process.vpid,
                    context: context.id,
                    qp: qp.id,
                    vqpn: qp.vqpn,
                    pqpn: qp.pqpn,
                    pgid,
                });
            }
        }
    }
    Ok(qps)
}
