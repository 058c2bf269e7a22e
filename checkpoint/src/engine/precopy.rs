//! Iterative pre-copy: while the container runs, its memory goes to the destination in rounds, each with what changed
//! since the one before, until another round would not be worth its cost. What changed after the last one is part of
//! the image, inside the pause.
//!
//! CRIU makes the rounds and decides page by page what changed. Registered private memory counts as changed in every
//! round, because the kernel cannot tell what a NIC wrote.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::saved::ProcessState;

use super::host::{Container, PreDumpJob};
use super::negotiate::Resident;
use super::regmem;
use super::shipping::Sent;
use super::source::{Run, Stop};
use crate::phase::Phase;

/// A round is worth its cost for so much memory, bytes: it stops the container for a moment,
const WORTH: u64 = 16 << 20;

/// and for less if that would take longer than this inside the pause.
const LONG: Duration = Duration::from_millis(50);

/// What was sent tells how fast that is if it was so much, bytes.
const SAMPLE: u64 = 1 << 20;

/// Between two looks at what CRIU has written.
const LOOK: Duration = Duration::from_millis(20);

/// Rounds, unless told otherwise.
const ROUNDS: u32 = 5;

/// One round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Round {
    /// What it sent.
    pub bytes: u64,
    /// From its begin until it was at the destination.
    pub took: Duration,
}

impl Round {
    /// How long the copying of the last round's bytes would take.
    fn again(self) -> Duration {
        self.took
    }
}

/// What to do after some rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Another,
    Enough,
    /// No round gets the copying down to the goal.
    Hopeless,
}

/// Rounds end when little is left, when they no longer shrink, or when there were enough; with a goal for the pause
/// they go on until the last one was that short.
fn next(rounds: &[Round], most: u32, goal: Option<Duration>) -> Next {
    let Some(last) = rounds.last() else { return if most == 0 { Next::Enough } else { Next::Another } };
    let met = goal.is_none_or(|goal| last.again() <= goal);
    let shrinks = rounds.len() < 2 || last.bytes < rounds[rounds.len() - 2].bytes / 4 * 3;
    let more = (rounds.len() as u32) < most && shrinks;
    match (met, more) {
        (true, false) => Next::Enough,
        (true, true) if last.bytes < WORTH / 4 || goal.is_some() => Next::Enough,
        (_, true) => Next::Another,
        (false, false) => Next::Hopeless,
    }
}

/// How much memory a first round is worth its cost for, where registered memory went as fast as that.
fn worth(largest: Option<regmem::Round>) -> u64 {
    let Some(sample) = largest.filter(|round| round.bytes >= SAMPLE) else { return WORTH };
    let long = sample.bytes as f64 / sample.took.as_secs_f64() * LONG.as_secs_f64();
    WORTH.min(long as u64)
}

/// Bytes that CRIU would send, without those that it would send again in every round.
fn for_rounds(resident: Resident, states: &[ProcessState]) -> u64 {
    let in_files = states.iter().flat_map(|s| &s.memory).map(|m| m.len).sum();
    let private = |s: &ProcessState| -> u64 {
        let mrs = s.contexts.iter().flat_map(|c| &c.mrs);
        mrs.filter(|mr| !s.memory.iter().any(|m| m.holds(mr.addr, mr.length))).map(|mr| mr.length).sum()
    };
    let registered = states.iter().map(private).sum();
    (resident.private + resident.shared.saturating_sub(in_files)).saturating_sub(registered)
}

impl Run<'_> {
    /// Rounds, as many as pay.
    pub(super) fn pre_copy(&mut self) -> Result<(), Stop> {
        let container = self.container()?.clone();
        let goal = self.request.max_blackout.map(Duration::from_millis);
        if self.sent_memory == 0 {
            // It has to go in any case, and says how fast.
            self.memory_round(Phase::PreCopy)?;
        }
        let most = match self.request.pre_copy_rounds {
            Some(rounds) => rounds,
            // A paused container changes nothing, but neither does it gain anything: it is down anyhow.
            None if container.paused => 0,
            None if goal.is_none() && for_rounds(self.resident, &self.states) < worth(self.largest) => 0,
            None => ROUNDS,
        };
        let base = self.world.config().state_dir.join("outgoing").join(self.id.to_string());
        let mut rounds: Vec<Round> = Vec::new();
        loop {
            match next(&rounds, most, goal) {
                Next::Another => {}
                Next::Enough => return self.memory_rounds(),
                Next::Hopeless => return Err(self.hopeless(&rounds, goal.unwrap_or_default())),
            }
            let number = rounds.len() as u32 + 1;
            let round = self.round(&base, number)?;
            self.note(format!(
                "round {number} of pre-copy: {} KiB in {:.1} s",
                round.bytes >> 10,
                round.took.as_secs_f64()
            ));
            rounds.push(round);
        }
    }

    fn round(&mut self, base: &Path, number: u32) -> Result<Round, Stop> {
        self.wanted()?;
        let start = Instant::now();
        self.effects.images = Some(base.to_owned());
        let dirs = [base.join(number.to_string()), base.join("work")];
        for dir in &dirs {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| Stop::Failed(format!("cannot make {}: {e}", dir.display())))?;
        }
        let [images, work] = dirs;
        let job = PreDumpJob { images: images.clone(), work, parent: parent(number - 1) };
        let container = self.container()?.clone();
        let sent = self.dump_and_send(&container, &job, number)?;
        self.rounds = number;
        self.sent += sent;
        Ok(Round { bytes: sent.bytes, took: start.elapsed() })
    }

    /// CRIU writes, and what it has written goes over at the same time.
    fn dump_and_send(&self, container: &Container, job: &PreDumpJob, number: u32) -> Result<Sent, Stop> {
        let mut voyage = self.embark(number)?;
        let (dumped, sent) = thread::scope(|scope| {
            let dumping = scope.spawn(|| self.world.host().pre_dump(container, job));
            let mut sent = Ok(());
            while !dumping.is_finished() {
                // CRIU cannot be told to stop; a failure is told when it is done.
                if sent.is_ok() {
                    sent = self.send_grown(&mut voyage, &job.images, Phase::PreCopy);
                }
                thread::sleep(LOOK);
            }
            (dumping.join().unwrap_or_else(|p| std::panic::resume_unwind(p)), sent)
        });
        dumped.map_err(|e| Stop::Failed(e.to_string()))?;
        sent?;
        self.send_rest(voyage, &job.images, Phase::PreCopy)
    }

    fn hopeless(&self, rounds: &[Round], goal: Duration) -> Stop {
        let last = rounds.last().map_or(Duration::ZERO, |r| r.again());
        let bytes = rounds.last().map_or(0, |r| r.bytes);
        Stop::Failed(format!(
            "after {} rounds of pre-copy the container still changes {} KiB in the time of one, and copying those takes \
             {:.1} s, more than the {:.1} s of --max-blackout; give it more time, or let it do less meanwhile",
            rounds.len(),
            bytes >> 10,
            last.as_secs_f64(),
            goal.as_secs_f64()
        ))
    }
}

/// Where an image finds round `number`, seen from its own directory.
pub(super) fn parent(number: u32) -> Option<PathBuf> {
    (number > 0).then(|| PathBuf::from(format!("../{number}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{mr, process};
    use proptest::prelude::*;
    use rdma_virt::saved::BackedMemory;

    fn rounds(list: &[(u64, u64)]) -> Vec<Round> {
        list.iter().map(|(mib, ms)| Round { bytes: mib << 20, took: Duration::from_millis(*ms) }).collect()
    }

    #[test]
    fn rounds_end_when_they_no_longer_shrink_or_little_is_left() {
        let cases: &[(&[(u64, u64)], Next)] = &[
            (&[], Next::Another),
            (&[(512, 900)], Next::Another),
            (&[(512, 900), (200, 400)], Next::Another),
            (&[(512, 900), (200, 400), (190, 400)], Next::Enough),
            (&[(512, 900), (3, 10)], Next::Enough),
            (&[(512, 900), (256, 500), (128, 250), (64, 130), (32, 70)], Next::Enough),
        ];
        for (list, wanted) in cases {
            assert_eq!(next(&rounds(list), ROUNDS, None), *wanted, "{list:?}");
        }
        assert_eq!(next(&[], 0, None), Next::Enough);
    }

    #[test]
    fn registered_memory_does_not_count_wherever_it_lies() {
        let mut state = process(7, vec![]);
        state.contexts[0].mrs = vec![mr(1, 0x10000, 0x8000), mr(2, 0x10000, 0x4000), mr(3, 0x90000, 0x3000)];
        state.memory = vec![BackedMemory { file: "7.1".into(), addr: 0x10000, len: 0x8000 }];
        let resident = |private, shared| Resident { private, shared };
        assert_eq!(for_rounds(resident(0x5000, 0x8000), std::slice::from_ref(&state)), 0x2000);
        assert_eq!(for_rounds(resident(0x5000, 0), std::slice::from_ref(&state)), 0x2000, "not touched since a move");
        assert_eq!(for_rounds(resident(0x5000, 0x9000), &[]), 0xe000);
    }

    #[test]
    fn over_a_slow_line_a_round_is_worth_its_cost_for_less_memory() {
        let went = |bytes, ms| Some(regmem::Round { bytes, seen: bytes, took: Duration::from_millis(ms) });
        assert_eq!(worth(None), WORTH);
        assert_eq!(worth(went(16 << 20, 2000)), (16 << 20) / 40);
        assert_eq!(worth(went(16 << 20, 10)), WORTH, "never for more");
        assert_eq!(worth(went(4096, 2000)), WORTH, "so little says nothing");
    }

    #[test]
    fn a_goal_is_met_or_named_as_out_of_reach() {
        let goal = Some(Duration::from_millis(100));
        assert_eq!(next(&rounds(&[(512, 900)]), ROUNDS, goal), Next::Another);
        assert_eq!(next(&rounds(&[(512, 900), (30, 90)]), ROUNDS, goal), Next::Enough);
        assert_eq!(next(&rounds(&[(512, 900), (500, 880)]), ROUNDS, goal), Next::Hopeless);
    }

    proptest! {
        #[test]
        fn rounds_always_end(sizes in proptest::collection::vec(0_u64..1 << 40, 0..40), most in 0_u32..20, goal in proptest::option::of(0_u64..10_000)) {
            let goal = goal.map(Duration::from_millis);
            let mut done: Vec<Round> = Vec::new();
            for bytes in sizes {
                if next(&done, most, goal) != Next::Another {
                    break;
                }
                done.push(Round { bytes, took: Duration::from_millis(bytes >> 20) });
            }
            prop_assert!(done.len() as u32 <= most);
        }
    }
}
