//! The source against a scripted world in which any single step fails, with or without having had its effect: the
//! container always runs at exactly one place, and nobody stays suspended.

#[path = "scripted_world.rs"]
mod scripted_world;

use super::*;
use crate::engine::blocks::BLOCK;
use crate::net::msg::End as FarShim;
use proptest::prelude::*;
use rdma_virt::id::{PQpn, VQpn};
use scripted_world::{Fake, Fault, ID, state};
use std::sync::{Arc, Mutex};

struct Quiet;
impl Progress for Quiet {
    fn event(&self, _: Event) {}
}

fn request(pre_setup: bool, hand_over: Option<HandOver>) -> MigrateRequest {
    MigrateRequest {
        container: "m".into(),
        to: "dst".into(),
        dry_run: false,
        pre_setup,
        pre_copy_rounds: pre_setup.then_some(2),
        max_blackout: None,
        copy_rootfs: false,
        hand_over,
        drain: None,
    }
}

fn run(fake: &Fake, pre_setup: bool, cancel: &Cancel) -> End {
    Run::new(fake, ID, &request(pre_setup, None), cancel, &Quiet).run()
}

fn run_by(fake: &Fake, hand_over: HandOver) -> End {
    Run::new(fake, ID, &request(true, Some(hand_over)), &Cancel::default(), &Quiet).run()
}

/// What must hold however it ended.
fn check(fake: &Fake, end: &End) {
    let t = fake.truth.lock().unwrap().clone();
    let record = fake.records.read(ID).unwrap().map(|r| r.state);
    let log = &fake.steps.lock().unwrap().2;
    let story = format!("{end:?}\n{t:?}\n{log:?}");
    match end {
        End::Done(_) => {
            assert_eq!(record, Some(State::Finished), "{story}");
            assert!(t.running && t.there_resumed && t.switched, "{story}");
            assert!(!t.peer_suspended && !t.held, "{story}");
        }
        End::Unfinished { .. } => {
            assert_eq!(record, Some(State::Committed), "{story}");
            assert!(t.frozen || t.killed, "{story}");
        }
        End::Undone { left, .. } => {
            assert!(!matches!(record, Some(State::Committed | State::Finished)), "{story}");
            assert!(!t.frozen && !t.killed && !t.running && !t.link_down && !t.away && !t.held, "{story}");
            // A step of the undoing itself that failed is told, and made up for when the other side asks.
            if left.is_empty() {
                let peer_waits = t.claimed || t.peer_suspended || t.second;
                assert!(!t.suspended && !peer_waits && !t.offered && !t.prepared, "{story}");
            }
        }
        End::Refused(_) | End::Possible => {
            assert!(!t.frozen && !t.suspended && !t.peer_suspended && !t.held && !t.running, "{story}");
        }
    }
}

#[test]
fn without_a_failure_it_moves_and_nobody_stays_suspended() {
    for pre_setup in [true, false] {
        let fake = Fake::new(None);
        let end = run(&fake, pre_setup, &Cancel::default());
        check(&fake, &end);
        let End::Done(summary) = end else { panic!("{end:?}") };
        assert_eq!((summary.qps_moved, summary.qps_switched), (1, 1));
        assert!(summary.pause_seconds.unwrap() >= summary.frozen_seconds.unwrap());
        assert!(fake.truth.lock().unwrap().forgotten);
    }
}

#[test]
fn a_connection_in_the_making_is_let_come_about_before_the_next_attempt() {
    let fake = Fake::new(None);
    fake.truth.lock().unwrap().half_open = true;
    let end = run(&fake, true, &Cancel::default());
    check(&fake, &end);
    let End::Undone { phase: Phase::Freeze, again: Some(Again::HalfOpen), why, .. } = &end else { panic!("{end:?}") };
    assert!(why.contains("in the making"), "{why}");
    assert_eq!(end.outcome(), Some(Outcome::Busy));
    let end = run(&fake, true, &Cancel::default());
    check(&fake, &end);
    assert!(matches!(end, End::Done(_)), "{end:?}");
}

/// Does something as a phase begins.
struct At<F: Fn() + Sync>(Phase, F);

impl<F: Fn() + Sync> Progress for At<F> {
    fn event(&self, event: Event) {
        if matches!(event, Event::Enter { phase } if phase == self.0) {
            (self.1)();
        }
    }
}

#[test]
fn a_committed_one_that_is_given_up_stops_where_it_is_and_its_image_and_record_stay() {
    let (fake, cancel, request) = (Fake::new(None), Arc::new(Cancel::default()), request(true, None));
    let silence = At(Phase::Commit, || fake.truth.lock().unwrap().silent = true);
    let begun = std::time::Instant::now();
    let end = thread::scope(|scope| {
        scope.spawn(|| {
            while fake.records.read(ID).unwrap().is_none_or(|r| r.state != State::Committed) {
                thread::sleep(Duration::from_millis(10));
            }
            cancel.give_up("an administrator takes the container back");
        });
        Run::new(&fake, ID, &request, &cancel, &silence).run()
    });
    check(&fake, &end);
    let End::Unfinished { phase: Phase::Commit, why } = &end else { panic!("{end:?}") };
    assert!(why.contains("takes the container back"), "{why}");
    assert!(begun.elapsed() < Duration::from_secs(fake.config.deadlines.forward), "it did not try to the last");
    assert!(fake.config.state_dir.join("outgoing").join(ID.to_string()).join("images/core-1.img").exists());
}

#[test]
fn a_destination_that_was_restarted_is_not_taken_for_one_that_has_finished() {
    let (fake, cancel, request) = (Fake::new(None), Cancel::default(), request(true, None));
    let restart = At(Phase::Finish, || fake.truth.lock().unwrap().running = false);
    let end = Run::new(&fake, ID, &request, &cancel, &restart).run();
    let End::Unfinished { phase: Phase::Finish, why } = &end else { panic!("{end:?}") };
    assert!(why.contains("`migrrdma recover m`"), "{why}");
    let record = fake.records.read(ID).unwrap().unwrap();
    assert_eq!((record.state, record.resumed), (State::Committed, false));
    assert!(fake.config.state_dir.join("outgoing").join(ID.to_string()).exists(), "the image is all there is");
}

/// A restore, as far as new objects are made and connected; where they are connected to, and what was said.
fn made_from_files(fake: &Fake) -> (Vec<PQpn>, Vec<String>) {
    struct Notes(Mutex<Vec<String>>);
    impl Progress for Notes {
        fn event(&self, event: Event) {
            if let Event::Note { text } = event {
                self.0.lock().unwrap().push(text);
            }
        }
    }
    let (request, cancel, notes) = (request(true, None), Cancel::default(), Notes(Mutex::default()));
    let mut run = Run::new(fake, ID, &request, &cancel, &notes);
    run.states = vec![state()];
    let end = FarShim { container: "p".into(), vpid: Vpid(9), comm: "peer".into(), vqpn: VQpn(30), connected: true };
    run.plan.update(&run.states, |_| false, || 1);
    run.plan.found(0, "peer", &end);
    run.leave_out_departed().unwrap();
    run.make_with_those_left().unwrap();
    let joined = run.plan.joins().unwrap().iter().map(|l| l.remote.pqpn).collect();
    drop(run);
    (joined, notes.0.into_inner().unwrap())
}

#[test]
fn a_peer_that_ended_while_it_waited_or_ends_now_is_left_out_and_named() {
    let (second, old) = (PQpn(55), PQpn(30));
    let all = Fake::new(None);
    assert_eq!(made_from_files(&all), (vec![second], Vec::new()));
    let (ended, ends) = (Fake::new(None), Fake::new(None));
    ended.truth.lock().unwrap().peer_ended = true;
    ends.truth.lock().unwrap().mortal = true;
    for fake in [&ended, &ends] {
        let (joined, notes) = made_from_files(fake);
        assert_eq!(joined, [old], "it points where it did");
        let [note] = &notes[..] else { panic!("{notes:?}") };
        assert!(note.contains("peer (pid 9 of container p at peer)") && note.contains("dead remote"), "{note}");
        assert!(!fake.truth.lock().unwrap().connected);
    }
}

#[test]
fn a_peer_that_cannot_be_asked_has_not_ended() {
    let fake = Fake::new(None);
    // Not in the report, and no answer either.
    let (request, cancel) = (request(true, None), Cancel::default());
    let mut run = Run::new(&fake, ID, &request, &cancel, &Quiet);
    run.states = vec![state()];
    run.plan.update(&run.states, |_| false, || 1);
    let end = FarShim { container: "q".into(), vpid: Vpid(9), comm: "peer".into(), vqpn: VQpn(30), connected: true };
    run.plan.found(0, "peer", &end);
    fake.steps.lock().unwrap().1 = Some((1, Fault::Before));
    let stop = run.leave_out_departed().unwrap_err();
    assert!(matches!(stop, Stop::Failed(_)), "{stop:?}");
    assert_eq!(run.plan.peers().len(), 1);
}

#[test]
fn onlookers_see_each_phase_and_what_it_came_to() {
    let fake = Fake::new(None);
    let seen = fake.under_way.begin(ID, "m", Role::Source, "dst");
    let stage = || fake.under_way.courses()[0].1.stage;
    let end = run(&fake, true, &Cancel::default());
    assert_eq!((end.outcome(), stage()), (Some(Outcome::Finished), Stage::In(Phase::Finish)));
    let count = |phase: Phase| {
        let start = format!("migrrdma_phase_duration_seconds_count{{phase=\"{phase}\"}} ");
        let page = fake.metrics.page();
        page.lines().find_map(|l| l.strip_prefix(&start)).unwrap().to_owned()
    };
    for phase in Phase::ALL {
        assert_eq!(count(phase), if phase == Phase::Copy { "0" } else { "1" }, "{phase}");
    }
    drop(seen);

    let early = Cancel::default();
    early.set("Ctrl-C");
    let fake = Fake::new(None);
    let _seen = fake.under_way.begin(ID, "m", Role::Source, "dst");
    let end = run(&fake, true, &early);
    assert_eq!((end.outcome(), fake.under_way.courses()[0].1.stage), (Some(Outcome::Undone), Stage::Undoing));
}

#[test]
fn objects_are_made_by_whom_it_was_asked_and_the_summary_says_so() {
    for (wish, told) in [(None, HandOver::Adopt), (Some(HandOver::Rebuild), HandOver::Rebuild)] {
        let fake = Fake::new(None);
        let end = Run::new(&fake, ID, &request(true, wish), &Cancel::default(), &Quiet).run();
        check(&fake, &end);
        let End::Done(summary) = end else { panic!("{end:?}") };
        assert_eq!(summary.hand_over, Some(told));
        let steps = fake.steps.lock().unwrap().2.join(" ");
        assert_eq!(steps.contains("incubate"), told == HandOver::Adopt, "{steps}");
        assert_eq!(steps.contains("rebuild"), told == HandOver::Rebuild, "{steps}");
    }
}

#[test]
fn peers_change_over_while_the_destination_lets_the_tasks_run_unless_a_key_is_not_known_yet() {
    let all = Fake::new(None);
    run_by(&all, HandOver::Adopt);
    let commit = all.steps.lock().unwrap().2.iter().position(|step| step == "dst: commit");
    for late_mr in [false, true] {
        // The destination has to be told twice, so there is time.
        let fake = Fake::new(commit.map(|at| (at, Fault::Before)));
        fake.truth.lock().unwrap().late_mr = late_mr;
        let end = run_by(&fake, HandOver::Adopt);
        assert!(matches!(end, End::Done(_)), "{end:?}");
        check(&fake, &end);
        let story = fake.steps.lock().unwrap().2.clone();
        let switches: Vec<usize> = (0..story.len()).filter(|at| story[*at] == "peer: switch").collect();
        let adopt = story.iter().position(|step| step == "dst: adopt").unwrap();
        assert_eq!(switches.len(), 1, "{story:?}");
        assert_eq!(switches[0] > adopt, late_mr, "{story:?}");
    }
}

#[test]
fn what_changes_in_registered_memory_at_last_is_there_before_the_decision() {
    let dir = tempfile::tempdir().unwrap();
    let file = |n: u8| dir.path().join(format!("7.{n}"));
    for n in 1..3 {
        fs::write(file(n), vec![n; 8 * BLOCK]).unwrap();
    }
    let fake = Fake::new(None);
    fake.truth.lock().unwrap().memory = Some(dir.path().to_owned());
    let end = run_by(&fake, HandOver::Adopt);
    check(&fake, &end);
    let End::Done(summary) = end else { panic!("{end:?}") };
    assert_eq!(summary.memory_bytes_in_pause, 2 * BLOCK as u64, "what was known is not sent again");
    let t = fake.truth.lock().unwrap();
    for n in 1..3 {
        let now = fs::read(file(n)).unwrap();
        assert_eq!(now[3 * BLOCK], 9);
        assert!(t.copy[&format!("7.{n}")] == now, "file {n}");
    }
}

#[test]
fn whichever_single_step_fails_the_container_runs_at_exactly_one_place() {
    for hand_over in [HandOver::Adopt, HandOver::Rebuild] {
        any_step_fails(hand_over);
    }
}

fn any_step_fails(hand_over: HandOver) {
    let all = Fake::new(None);
    run_by(&all, hand_over);
    let steps = all.steps.lock().unwrap().0;
    assert!(steps > 25, "{steps}");
    std::thread::scope(|scope| {
        for at in 0..steps {
            for fault in [Fault::Before, Fault::After] {
                scope.spawn(move || {
                    let fake = Fake::new(Some((at, fault)));
                    let end = run_by(&fake, hand_over);
                    check(&fake, &end);
                    let committed = fake.records.read(ID).unwrap().is_some_and(|r| r.state == State::Finished);
                    // One failure after the decision is always made up for.
                    assert_eq!(matches!(end, End::Done(_)), committed, "step {at} {fault:?}: {end:?}");
                });
            }
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn a_wish_to_stop_at_any_step_undoes_or_comes_too_late(at in 0_usize..40, pre_setup: bool) {
        struct Stopper<'a> { at: usize, seen: Mutex<usize>, cancel: &'a Cancel }
        impl Progress for Stopper<'_> {
            fn event(&self, _: Event) {
                let mut seen = self.seen.lock().unwrap();
                *seen += 1;
                if *seen == self.at { self.cancel.set("Ctrl-C"); }
            }
        }
        let (fake, cancel) = (Fake::new(None), Cancel::default());
        let request = request(pre_setup, None);
        let stopper = Stopper { at, seen: Mutex::new(0), cancel: &cancel };
        let end = Run::new(&fake, ID, &request, &cancel, &stopper).run();
        check(&fake, &end);
        let undone = matches!(end, End::Undone { .. });
        prop_assert!(undone || matches!(end, End::Done(_)), "{:?}", end);
    }
}
