//! Two ends, a network between them, applications that go on posting and polling, and a migration that is committed or
//! aborted at any moment, every step interleaved at random. Claim: nothing is lost, repeated or reordered, and no drain
//! hangs.
//!
//! The NIC is modelled by what verbs promise: a send queue executes in order; a two-sided message waits for a receive;
//! its effect at the remote end comes before its completion at this one; unsignalled sends complete silently. The rules
//! under test are those of `rdma_virt`; the harness performs what they name, as the shim does. That the model can fail
//! is shown by breaking one rule at a time.

mod broken;
mod end;
mod world;

use broken::Broken;
use end::QPS;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use std::cell::Cell;
use world::{Op, World};

fn op() -> impl Strategy<Value = Op> {
    let end = || 0..2usize;
    let qp = || 0..QPS;
    prop_oneof![
        6 => (end(), qp(), any::<bool>(), any::<bool>())
            .prop_map(|(end, qp, two_sided, signalled)| Op::Send { end, qp, two_sided, signalled }),
        5 => (end(), qp()).prop_map(|(end, qp)| Op::Receive { end, qp }),
        4 => end().prop_map(|end| Op::Poll { end }),
        6 => (end(), qp()).prop_map(|(from, qp)| Op::Deliver { from, qp }),
        5 => (end(), qp()).prop_map(|(from, qp)| Op::Acknowledge { from, qp }),
        1 => end().prop_map(|end| Op::Suspend { end }),
        3 => end().prop_map(|end| Op::Drain { end }),
        2 => end().prop_map(|end| Op::Switch { end }),
        2 => end().prop_map(|end| Op::Resume { end }),
        4 => (end(), qp()).prop_map(|(end, qp)| Op::Flush { end, qp }),
        1 => prop_oneof![9 => Just(None), 1 => end().prop_map(Some)]
            .prop_map(|end| end.map_or(Op::Poll { end: 0 }, |end| Op::Abort { end })),
    ]
}

/// How many migrations were committed and aborted in all cases, or what went wrong.
fn check(broken: Broken, cases: u32) -> Result<(u32, u32), String> {
    let ended = Cell::new((0, 0));
    let config = Config { cases, max_shrink_iters: 2000, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let strategy =
        (prop_oneof![2 => Just(None), 1 => Just(Some(0)), 1 => Just(Some(1))], prop::collection::vec(op(), 0..250));
    let result = runner.run(&strategy, |(srq, ops)| {
        let mut world = World::new(srq, broken);
        ops.into_iter().try_for_each(|op| world.step(op)).map_err(TestCaseError::fail)?;
        world.settle().map_err(TestCaseError::fail)?;
        let (committed, aborted) = ended.get();
        ended.set((committed + world.committed, aborted + world.aborted));
        Ok(())
    });
    match result {
        Ok(()) => Ok(ended.get()),
        Err(TestError::Fail(why, (srq, ops))) => Err(format!("{why}\n  SRQ at {srq:?}, after {ops:?}")),
        Err(TestError::Abort(why)) => panic!("the model gave up: {why}"),
    }
}

#[test]
fn nothing_is_lost_repeated_or_reordered_in_any_interleaving() {
    match check(Broken::Nothing, 3000) {
        Err(why) => panic!("{why}"),
        Ok((committed, aborted)) => {
            assert!(committed > 1000 && aborted > 300, "{committed} commits and {aborted} aborts prove little");
        }
    }
}

#[test]
fn the_model_notices_every_broken_rule() {
    for broken in [
        Broken::NoMarker,
        Broken::CloseAtOnce,
        Broken::IgnoreExpected,
        Broken::HoldReceives,
        Broken::PassWhileFlushing,
        Broken::ForgetHeld,
        Broken::ForgetReceives,
        Broken::RealFirst,
        Broken::DropPolled,
        Broken::NoBarrier,
    ] {
        assert!(check(broken, 1500).is_err(), "nobody noticed that a rule was broken: {broken:?}");
    }
}
