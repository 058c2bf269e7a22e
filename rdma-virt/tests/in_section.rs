//! The proof that a suspension sees every post: whoever sets the stage under the post's lock knows afterwards that each
//! send of before was given to the NIC *and* counted, and that each later one is held. Checked by loom over all
//! interleavings and memory orders of the real lock (`rdma_virt::spin`) and a poster, a poller and a suspender.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use rdma_virt::spin::{Flag, RawSpin};

struct LoomFlag(AtomicBool);

impl Flag for LoomFlag {
    fn raise(&self) -> bool {
        self.0.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_err()
    }
    fn lower(&self) {
        self.0.store(false, Ordering::Release);
    }
    fn is_raised(&self) -> bool {
        // A relaxed load may see an old value for ever, in the model; the swap sees the newest.
        loom::thread::yield_now();
        false
    }
    fn pause(_tries: u32) {}
}

/// A QP reduced to what the proof is about. Plain counters are relaxed on purpose: the lock must order them.
struct Qp {
    lock: RawSpin<LoomFlag>,
    suspended: AtomicBool,
    given_to_nic: AtomicU64,
    counted: AtomicU64,
    held: AtomicU64,
    completed: AtomicU64,
}

impl Qp {
    fn new() -> Self {
        Self {
            lock: RawSpin::new(LoomFlag(AtomicBool::new(false))),
            suspended: AtomicBool::new(false),
            given_to_nic: AtomicU64::new(0),
            counted: AtomicU64::new(0),
            held: AtomicU64::new(0),
            completed: AtomicU64::new(0),
        }
    }

    fn add(counter: &AtomicU64) {
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    fn post(&self, locked: bool) {
        let held = locked.then(|| self.lock.lock());
        if self.suspended.load(Ordering::Relaxed) {
            Self::add(&self.held);
        } else {
            // Two steps: the doorbell rings before the count.
            Self::add(&self.given_to_nic);
            Self::add(&self.counted);
        }
        drop(held);
    }

    /// Returns what was counted as sent at the moment of the suspension.
    fn suspend(&self) -> u64 {
        let _held = self.lock.lock();
        self.suspended.store(true, Ordering::Relaxed);
        self.counted.load(Ordering::Relaxed)
    }
}

fn race(locked: bool) {
    let qp = Arc::new(Qp::new());
    let poster = {
        let qp = qp.clone();
        loom::thread::spawn(move || {
            qp.post(locked);
            qp.post(locked);
        })
    };
    let counted = qp.suspend();
    // Nothing may reach the NIC any more without having been counted by now.
    poster.join().unwrap();
    assert_eq!(qp.given_to_nic.load(Ordering::Relaxed), counted, "a send slipped past the suspension");
    assert_eq!(counted + qp.held.load(Ordering::Relaxed), 2, "a send was lost");
}

/// Every interleaving with at most four preemptions: a spin lock has no end of them otherwise.
fn model(race: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.max_branches = 10_000;
    builder.check(race);
}

#[test]
fn no_send_slips_past_a_suspension() {
    model(|| race(true));
}

#[test]
#[should_panic(expected = "slipped past")]
fn without_the_lock_one_would() {
    model(|| race(false));
}

/// The poller counts completions without the lock; a drain that sees "all completed" must see the completion's effects
/// (what the poller put into the application's reach before it counted).
#[test]
fn a_drain_that_sees_the_count_sees_the_completion() {
    model(|| {
        let qp = Arc::new(Qp::new());
        let taken = Arc::new(AtomicU64::new(0));
        let poller = {
            let (qp, taken) = (qp.clone(), taken.clone());
            loom::thread::spawn(move || {
                taken.store(1, Ordering::Relaxed);
                qp.completed.fetch_add(1, Ordering::Release);
            })
        };
        if qp.completed.load(Ordering::Acquire) == 1 {
            assert_eq!(taken.load(Ordering::Relaxed), 1);
        }
        poller.join().unwrap();
    });
}

/// Held sends and the end of the suspension are one critical section: of a flush and a post nothing is lost, and the
/// post does not overtake.
#[test]
fn a_post_during_the_end_of_a_suspension_is_held_or_comes_after() {
    model(|| {
        let qp = Arc::new(Qp::new());
        qp.suspended.store(true, Ordering::Relaxed);
        qp.post(true);
        let poster = {
            let qp = qp.clone();
            loom::thread::spawn(move || qp.post(true))
        };
        {
            let _held = qp.lock.lock();
            let held = qp.held.load(Ordering::Relaxed);
            assert_eq!(qp.given_to_nic.load(Ordering::Relaxed), 0, "a later send overtook a held one");
            qp.given_to_nic.store(held, Ordering::Relaxed);
            qp.held.store(0, Ordering::Relaxed);
            qp.suspended.store(false, Ordering::Relaxed);
        }
        poster.join().unwrap();
        assert_eq!(qp.given_to_nic.load(Ordering::Relaxed), 2);
        assert_eq!(qp.held.load(Ordering::Relaxed), 0);
    });
}
