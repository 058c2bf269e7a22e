//! What a device allows against what a container wants of it, before anything is made: the kernel's own error for the
//! object that did not fit says neither which limit it was nor how far it was missed.
//!
//! What other users of the device have is not known here; for that the kernel's error is what there is.

use rdma_virt::saved::ContextState;

use crate::uverbs::abi::QueryDeviceResp;

/// The first limit that these contexts, all to be made on one device, are beyond; in words.
pub(super) fn exceeded(limits: &QueryDeviceResp, contexts: &[&ContextState]) -> Option<String> {
    let mut beyond = None;
    let mut check = |what: String, wanted: u64, name: &str, allowed: u64| {
        if wanted > allowed && beyond.is_none() {
            beyond = Some(format!("{what}: {wanted} wanted, {allowed} allowed ({name})"));
        }
    };
    let sum = |of: fn(&ContextState) -> usize| contexts.iter().map(|c| of(c) as u64).sum::<u64>();
    for (what, wanted, name, allowed) in [
        ("QPs", sum(|c| c.qps.len()), "max_qp", limits.max_qp),
        ("CQs", sum(|c| c.cqs.len()), "max_cq", limits.max_cq),
        ("MRs", sum(|c| c.mrs.len()), "max_mr", limits.max_mr),
        ("PDs", sum(|c| c.pds.len()), "max_pd", limits.max_pd),
        ("SRQs", sum(|c| c.srqs.len()), "max_srq", limits.max_srq),
    ] {
        check(what.into(), wanted, name, allowed.into());
    }
    for context in contexts {
        for cq in &context.cqs {
            check(format!("entries of CQ {}", cq.id.0), cq.cqe.into(), "max_cqe", limits.max_cqe.into());
        }
        for qp in &context.qps {
            let (wr, sge) = (u64::from(limits.max_qp_wr), u64::from(limits.max_sge));
            check(format!("sends of QP {}", qp.vqpn.0), qp.cap.max_send_wr.into(), "max_qp_wr", wr);
            check(format!("receives of QP {}", qp.vqpn.0), qp.cap.max_recv_wr.into(), "max_qp_wr", wr);
            let most = qp.cap.max_send_sge.max(qp.cap.max_recv_sge);
            check(format!("SGEs of a WR of QP {}", qp.vqpn.0), most.into(), "max_sge", sge);
        }
        for srq in &context.srqs {
            check(format!("receives of SRQ {}", srq.id.0), srq.max_wr.into(), "max_srq_wr", limits.max_srq_wr.into());
            check(
                format!("SGEs of a WR of SRQ {}", srq.id.0),
                srq.max_sge.into(),
                "max_srq_sge",
                limits.max_srq_sge.into(),
            );
        }
        for mr in &context.mrs {
            check(format!("bytes of MR {}", mr.id.0), mr.length, "max_mr_size", limits.max_mr_size);
        }
    }
    beyond
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{process, qp};

    fn ample() -> QueryDeviceResp {
        QueryDeviceResp {
            max_mr_size: u64::MAX,
            max_qp: 100,
            max_qp_wr: 100,
            max_sge: 4,
            max_cq: 10,
            max_cqe: 1000,
            max_mr: 10,
            max_pd: 10,
            max_srq: 1,
            max_srq_wr: 100,
            max_srq_sge: 4,
            ..QueryDeviceResp::default()
        }
    }

    #[test]
    fn what_does_not_fit_is_named_with_the_limit_and_by_how_much() {
        let two = [process(7, vec![qp(1, 30, None), qp(2, 31, None)]), process(8, vec![qp(1, 32, None)])];
        let contexts: Vec<&ContextState> = two.iter().flat_map(|p| &p.contexts).collect();
        let with = |change: fn(&mut QueryDeviceResp)| {
            let mut limits = ample();
            change(&mut limits);
            exceeded(&limits, &contexts)
        };
        assert_eq!(with(|_| {}), None);
        assert_eq!(with(|l| l.max_qp = 3), None, "as many as there may be");
        assert_eq!(with(|l| l.max_qp = 2).as_deref(), Some("QPs: 3 wanted, 2 allowed (max_qp)"));
        assert_eq!(with(|l| l.max_qp_wr = 0).as_deref(), Some("sends of QP 30: 1 wanted, 0 allowed (max_qp_wr)"));
        let mut large = two[0].contexts[0].clone();
        large.qps[1].cap.max_recv_sge = 9;
        let beyond = exceeded(&ample(), &[&large]);
        assert_eq!(beyond.as_deref(), Some("SGEs of a WR of QP 31: 9 wanted, 4 allowed (max_sge)"));
    }
}
