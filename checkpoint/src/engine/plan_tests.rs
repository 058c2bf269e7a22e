//! Tests of the plan: who is told what.

use super::*;
use crate::engine::fixture::{DST, PEER, SRC, mr, process, qp};
use rdma_virt::id::{PRkey, VRkey};

fn here(gid: PGid) -> bool {
    gid == PGid(SRC)
}

fn psn() -> impl FnMut() -> u32 {
    let mut n = 0;
    move || {
        n += 1;
        n
    }
}

fn born(vpid: i32, qp: u32, vqpn: u32, pqpn: u32) -> BornQp {
    BornQp { vpid: Vpid(vpid), context: ObjId(1), qp: ObjId(qp), vqpn: VQpn(vqpn), pqpn: PQpn(pqpn), pgid: PGid(DST) }
}

fn end(vqpn: u32, connected: bool) -> End {
    End { container: "p".into(), vpid: Vpid(9), comm: "peer".into(), vqpn: VQpn(vqpn), connected }
}

/// One process with one QP connected to QP 30 of a peer; found.
fn simple() -> (Plan, Vec<ProcessState>, PeerProcess) {
    let states = vec![process(7, vec![qp(1, 17, Some(30)), qp(2, 18, None)])];
    let mut plan = Plan::default();
    assert_eq!(plan.update(&states, here, psn()), vec![0]);
    plan.found(0, "peer:1", &end(30, true));
    let peer = plan.peers().into_keys().next().unwrap();
    (plan, states, peer)
}

#[test]
fn both_ends_are_joined_with_each_others_numbers_and_psns() {
    let (mut plan, _, peer) = simple();
    assert_eq!(plan.prepares(), vec![(peer.clone(), Request::Prepare { qps: vec![VQpn(30)] })]);
    assert!(plan.joins().is_err(), "no second QP yet");
    assert!(plan.prepared(&peer, &[(VQpn(30), PQpn(55))]));
    plan.born = vec![born(7, 1, 17, 40)];
    let join = plan.joins().unwrap()[0];
    assert_eq!((join.remote.pqpn, join.remote.pgid, join.remote.vqpn), (PQpn(55), PGid(PEER), VQpn(30)));
    let connects = plan.connects();
    let [(to, Request::Connect { links })] = &connects[..] else { panic!("{connects:?}") };
    assert_eq!((to, links[0].remote_qpn, links[0].remote_gid), (&peer, PQpn(40), PGid(DST)));
    assert_eq!((links[0].sq_psn, links[0].rq_psn), (join.rq_psn, join.sq_psn));
}

#[test]
fn keys_are_known_before_the_processes_run_if_every_mr_is_registered_by_then() {
    let mut states = vec![process(7, Vec::new()), process(8, Vec::new())];
    states[0].contexts[0].mrs = vec![mr(1, 0x1000, 64), mr(2, 0x2000, 64)];
    let born = |vpid, mr, key| BornMr { vpid: Vpid(vpid), context: ObjId(1), mr: ObjId(mr), prkey: PRkey(key) };
    let mut plan = Plan { mrs: vec![born(7, 2, 2), born(8, 1, 70)], ..Plan::default() };
    assert_eq!(plan.keys(&states), None, "another process' MR is none of this one's");
    plan.mrs.push(born(7, 1, 90));
    let known = KeyTable(vec![(VRkey(1), PRkey(90))]);
    assert_eq!(
        plan.keys(&states),
        Some(vec![(Vpid(7), known), (Vpid(8), KeyTable::default())]),
        "only what is not called as before"
    );
}

#[test]
fn a_second_update_keeps_what_is_connected_and_reconnects_only_what_was_made_anew() {
    let (mut plan, mut states, peer) = simple();
    plan.prepared(&peer, &[(VQpn(30), PQpn(55))]);
    plan.born = vec![born(7, 1, 17, 40)];
    plan.connected(&peer);
    assert!(plan.update(&states, here, psn()).is_empty());
    assert!(plan.prepares().is_empty() && plan.connects().is_empty());
    plan.born = vec![born(7, 1, 17, 41)];
    assert_eq!(plan.connects().len(), 1, "the destination made the QP again");
    states[0].contexts[0].qps.clear();
    plan.update(&states, here, psn());
    assert!(plan.links.is_empty());
}

#[test]
fn a_link_inside_the_container_needs_no_peer() {
    let mut a = qp(1, 17, Some(18));
    let mut b = qp(1, 18, Some(17));
    for q in [&mut a, &mut b] {
        let r = q.remote.as_mut().unwrap();
        (r.vgid, r.pgid) = (VGid(SRC), PGid(SRC));
    }
    let states = vec![process(7, vec![a]), process(8, vec![b])];
    let mut plan = Plan::default();
    assert!(plan.update(&states, here, psn()).is_empty());
    plan.born = vec![born(7, 1, 17, 40), born(8, 1, 18, 41)];
    let joins = plan.joins().unwrap();
    assert_eq!((joins[0].remote.pqpn, joins[1].remote.pqpn), (PQpn(41), PQpn(40)));
    assert_eq!((joins[0].sq_psn, joins[0].rq_psn), (joins[1].rq_psn, joins[1].sq_psn));
    let keys = vec![(Vpid(7), KeyTable::default()), (Vpid(8), KeyTable::default())];
    let switches = plan.switches(&keys);
    assert!(switches.peers.is_empty());
    let (to, Request::Switch { links, .. }) = &switches.inside[0] else { panic!() };
    assert_eq!((*to, links[0].vqpn, links[0].table), (Vpid(7), VQpn(17), 1), "process 7 learns the keys of 8");
}

#[test]
fn a_qp_connected_to_itself_expects_what_it_sends() {
    let mut a = qp(1, 17, Some(17));
    a.remote.as_mut().unwrap().pgid = PGid(SRC);
    let mut plan = Plan::default();
    assert!(plan.update(&[process(7, vec![a])], here, psn()).is_empty());
    plan.born = vec![born(7, 1, 17, 40)];
    let join = plan.joins().unwrap()[0];
    assert_eq!((join.remote.pqpn, join.sq_psn), (PQpn(40), join.rq_psn));
}

#[test]
fn two_hosts_that_count_alike_are_not_one() {
    // QP 17 here is connected to QP 17 there.
    let mut plan = Plan::default();
    assert_eq!(plan.update(&[process(7, vec![qp(1, 17, Some(17))])], here, psn()), vec![0]);
    assert_eq!(plan.links[0].far, Far::AsItWas);
}

#[test]
fn a_far_end_that_is_gone_or_not_connected_yet_is_left_as_it_was() {
    let states = vec![process(7, vec![qp(1, 17, Some(30))])];
    let mut plan = Plan::default();
    plan.update(&states, here, psn());
    plan.found(0, "peer:1", &end(30, false));
    assert!(plan.peers().is_empty());
    plan.born = vec![born(7, 1, 17, 40)];
    assert_eq!(plan.joins().unwrap()[0].remote, states[0].contexts[0].qps[0].remote.unwrap());
}

#[test]
fn every_end_waits_for_what_the_other_has_sent() {
    let (plan, _, peer) = simple();
    let count = |vqpn, sent, received| Count { vqpn: VQpn(vqpn), sent, received };
    let own = BTreeMap::from([(Vpid(7), vec![count(17, 5, 2), count(18, 0, 0)])]);
    let far = BTreeMap::from([(peer.clone(), vec![count(30, 3, 4)])]);
    let e = plan.expectations(&own, &far);
    assert_eq!(e.near[&Vpid(7)], vec![(VQpn(17), 3), (VQpn(18), 0)]);
    assert_eq!(e.far[&peer], vec![(VQpn(30), 5)]);
}

#[test]
fn a_link_to_a_qp_that_is_no_more_points_where_it_did_and_the_others_are_made_again() {
    let states = vec![process(7, vec![qp(1, 17, Some(30)), qp(2, 18, Some(31))])];
    let mut plan = Plan::default();
    plan.update(&states, here, psn());
    for (at, vqpn) in [(0, 30), (1, 31)] {
        plan.found(at, "peer:1", &end(vqpn, true));
    }
    let peer = plan.peers().into_keys().next().unwrap();
    plan.prepared(&peer, &[(VQpn(30), PQpn(55)), (VQpn(31), PQpn(56))]);
    plan.born = vec![born(7, 1, 17, 40), born(7, 2, 18, 41)];
    plan.connected(&peer);
    plan.without(&peer, &[0]);
    assert_eq!(plan.prepares(), vec![(peer.clone(), Request::Prepare { qps: vec![VQpn(31)] })]);
    plan.prepared(&peer, &[(VQpn(31), PQpn(57))]);
    let joins = plan.joins().unwrap();
    assert_eq!(joins[0].remote, states[0].contexts[0].qps[0].remote.unwrap());
    assert_eq!(joins[1].remote.pqpn, PQpn(57));
    let [(_, Request::Connect { links })] = &plan.connects()[..] else { panic!() };
    assert_eq!(links.iter().map(|l| l.vqpn).collect::<Vec<_>>(), [VQpn(31)]);
}

#[test]
fn who_has_the_name_or_the_numbers_of_a_far_end_is_not_it_by_that_alone() {
    let (plan, ..) = simple();
    let there = |end: End| plan.is_far_end(0, &FarEnd::Shim(end));
    assert!(there(end(30, true)));
    assert!(!there(end(30, false)), "it is not connected any more");
    assert!(!there(End { container: "q".into(), ..end(30, true) }));
    assert!(!there(End { vpid: Vpid(10), ..end(30, true) }));
    for not in [FarEnd::Gone, FarEnd::Foreign("somebody".into())] {
        assert!(!plan.is_far_end(0, &not));
    }
}

#[test]
fn a_copy_keeps_its_links_inside_and_loses_those_that_lead_out() {
    let mut there = qp(3, 40, Some(41));
    let mut back = qp(4, 41, Some(40));
    for qp in [&mut there, &mut back] {
        let remote = qp.remote.as_mut().unwrap();
        (remote.vgid, remote.pgid) = (VGid(SRC), PGid(SRC));
    }
    let mut states = vec![process(7, vec![qp(1, 17, Some(30)), qp(2, 18, None), there, back])];
    let mut plan = Plan::default();
    plan.update(&states, here, psn());
    plan.found(0, "peer:1", &end(30, true));
    plan.sever(states.iter_mut());
    let near: Vec<ObjId> = plan.links.iter().map(|l| l.near.qp).collect();
    assert_eq!(near, [ObjId(3), ObjId(4)]);
    assert!(plan.peers().is_empty());
    let phases: Vec<(QpPhase, bool)> =
        states[0].contexts[0].qps.iter().map(|q| (q.phase, q.remote.is_some())).collect();
    let (init, rts) = ((QpPhase::Init, false), (QpPhase::Rts, true));
    assert_eq!(phases, [init, init, rts, rts]);
}
