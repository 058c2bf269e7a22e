//! Pending signals that CRIU's image lacks, and how they come along all the same.
//!
//! CRIU reads what is pending for a process first, and its timers only after it has read the process' memory; all that
//! time timers go on. One that goes off in between is in the image neither as a signal nor as a timer that will go off, and
//! so is what somebody sends meanwhile. When CRIU is done, the tasks still standing, the kernel says what is pending by
//! then. What the image does not have is written beside it, and sent again when the restored tasks stand still, who block
//! all signals until they run.
//!
//! The kernel shows which signals are pending, not how many of a kind nor who sent them. So those of a number that the image
//! has some of count as known, and what is not certainly of one timer is sent again as kill(2) does.

#![expect(unsafe_code, reason = "signals with data, and for one thread, have no safe interface")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use checkpoint::agent::procs;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::core_image::{self, Core, SignalSet, Timer, TimerWord};

/// An image that asks for more was not made here.
const MAX_OWED: usize = 4096;

/// They act on the process at once, on the source: a restored one goes on as it was found.
const NOT_OURS: [i32; 3] = [libc::SIGKILL, libc::SIGSTOP, libc::SIGCONT];

/// A signal to be sent again; ids are those in the container's pid namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owed {
    pub pid: i32,
    /// The only thread that may take it.
    #[serde(default)]
    pub thread: Option<i32>,
    pub signal: i32,
    /// Of the timer that sent it.
    #[serde(default)]
    pub timer: Option<TimerWord>,
}

/// What is pending for a process, but for what is not ours.
#[derive(Debug, Default, PartialEq, Eq)]
struct Pending {
    pid: i32,
    shared: SignalSet,
    threads: Vec<(i32, SignalSet)>,
}

/// Finds what is pending for these dumped processes and is not in their images. CRIU was started `since` ago.
pub fn lacking(pids: &[i32], images: &Path, since: impl Fn() -> Duration) -> Result<Vec<Owed>> {
    let mut owed = Vec::new();
    for pending in pids.iter().filter_map(|pid| pending(*pid)) {
        let read = |pid: i32| core_image::read(&images.join(format!("core-{pid}.img")));
        let core = read(pending.pid)?;
        let mut own = Vec::new();
        for (thread, _) in &pending.threads {
            own.push(if *thread == pending.pid { core.own } else { read(*thread)?.own });
        }
        owed.extend(compare(&pending, &core, &own, since()));
    }
    Ok(owed)
}

/// What `pending` has and the image has not; `own` is what that has for each of the threads.
fn compare(pending: &Pending, core: &Core, own: &[SignalSet], since: Duration) -> Vec<Owed> {
    let mut owed = Vec::new();
    let shared = (None, pending.shared.without(core.shared));
    let threads = pending.threads.iter().zip(own);
    let threads = threads.map(|((thread, pending), image)| (Some(*thread), pending.without(*image)));
    for (thread, lost) in std::iter::once(shared).chain(threads) {
        for signal in lost.iter() {
            let timers = || core.timers.iter().filter(|timer| (timer.signal, timer.thread) == (signal, thread));
            if timers().any(|timer| goes_off_again(timer, since)) {
                continue;
            }
            let mut words = timers().filter(|timer| has_gone_off(timer, since)).filter_map(|timer| timer.word);
            let first = words.next();
            // Where timers with other words may have sent it, too, none is made up: it comes without.
            let timer = first.filter(|first| words.all(|word| word.value == first.value));
            owed.push(Owed { pid: pending.pid, thread, signal, timer });
        }
    }
    owed
}

/// It may have sent the signal after CRIU had looked at it; then it will do so again where it is restored.
fn goes_off_again(timer: &Timer, since: Duration) -> bool {
    !timer.left.is_zero() && timer.left <= since
}

/// It may have sent the signal before CRIU looked at it.
fn has_gone_off(timer: &Timer, since: Duration) -> bool {
    timer.left.is_zero() || (!timer.interval.is_zero() && timer.interval.saturating_sub(timer.left) <= since)
}

/// What is pending for a process; `None` if nothing is, or it is gone.
fn pending(pid: i32) -> Option<Pending> {
    let leader = Status::read(pid, pid)?;
    let mut pending = Pending { pid: leader.id(), shared: leader.shared, threads: vec![(leader.id(), leader.own)] };
    // Only timers send signals to single threads past the program itself, and there are few such threads.
    if leader.threads > 1 {
        for thread in told_by_timers(&fs::read_to_string(format!("/proc/{pid}/timers")).unwrap_or_default()) {
            if thread != pid
                && let Some(status) = Status::read(pid, thread)
            {
                pending.threads.push((status.id(), status.own));
            }
        }
    }
    pending.threads.retain(|(_, own)| !own.is_empty());
    (!pending.shared.is_empty() || !pending.threads.is_empty()).then_some(pending)
}

/// The threads that `/proc/PID/timers` names.
fn told_by_timers(text: &str) -> Vec<i32> {
    let tid = |line: &str| line.strip_prefix("notify: ")?.rsplit_once("/tid.")?.1.parse().ok();
    let mut threads: Vec<i32> = text.lines().filter_map(tid).collect();
    threads.sort_unstable();
    threads.dedup();
    threads
}

/// What the kernel says of a thread.
#[derive(Debug, PartialEq, Eq)]
struct Status {
    /// Its id in our pid namespace, and in each one below, the innermost last.
    ids: Vec<i32>,
    threads: usize,
    own: SignalSet,
    shared: SignalSet,
}

impl Status {
    /// `None` for one that is gone, or only waited for.
    fn read(pid: i32, thread: i32) -> Option<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/task/{thread}/status")).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let line = |name| procs::field(text, name);
        let not_ours = SignalSet::from_iter(NOT_OURS);
        let set = |name| Some(SignalSet(u64::from_str_radix(line(name)?, 16).ok()?).without(not_ours));
        if line("State")?.starts_with(['Z', 'X']) {
            return None;
        }
        let ids: Vec<i32> = line("NSpid")?.split_whitespace().map_while(|id| id.parse().ok()).collect();
        let threads = line("Threads")?.parse().ok()?;
        (!ids.is_empty()).then_some(Status { ids, threads, own: set("SigPnd")?, shared: set("ShdPnd")? })
    }

    /// Its id in its own pid namespace.
    fn id(&self) -> i32 {
        *self.ids.last().expect("it has one")
    }
}

/// Refuses what no dump of ours asks for.
pub fn check(owed: &[Owed]) -> Result<()> {
    let odd = |one: &Owed| {
        !(1..=64).contains(&one.signal)
            || NOT_OURS.contains(&one.signal)
            || one.pid < 1
            || one.thread.is_some_and(|thread| thread < 1)
    };
    if owed.len() > MAX_OWED || owed.iter().any(odd) {
        bail!("the image asks for signals that no process can be owed");
    }
    Ok(())
}

/// Sends them to the restored processes among `pids`, which stand still with all signals blocked.
pub fn send(owed: &[Owed], init: i32, pids: impl FnOnce() -> Result<Vec<i32>>) -> Result<()> {
    if owed.is_empty() {
        return Ok(());
    }
    // CRIU is in the container's cgroup, but in no pid namespace of its.
    let depth = Status::read(init, init).context("the restored init is gone")?.ids.len();
    let restored: Vec<(i32, i32)> = pids()?
        .into_iter()
        .filter_map(|pid| Some((pid, Status::read(pid, pid).filter(|status| status.ids.len() == depth)?.id())))
        .collect();
    for one in owed {
        let (pid, _) = restored
            .iter()
            .find(|(_, id)| *id == one.pid)
            .with_context(|| format!("the image asks for a signal to process {}, which it does not have", one.pid))?;
        let thread = one.thread.map(|thread| find_thread(*pid, thread)).transpose()?;
        queue(*pid, thread, one.signal, one.timer)
            .with_context(|| format!("cannot send signal {} to process {pid}", one.signal))?;
    }
    Ok(())
}

/// The thread of `pid` that has this id in its own pid namespace.
fn find_thread(pid: i32, id: i32) -> Result<i32> {
    let tasks = format!("/proc/{pid}/task");
    fs::read_dir(&tasks)
        .with_context(|| format!("cannot read {tasks}"))?
        .flatten()
        .filter_map(|task| task.file_name().to_str()?.parse().ok())
        .find(|thread| Status::read(pid, *thread).is_some_and(|status| status.id() == id))
        .with_context(|| format!("the image asks for a signal to thread {id}, which process {pid} does not have"))
}

/// The kernel's siginfo of a timer's signal, on machines with 64 bits.
#[repr(C)]
struct TimerInfo {
    signal: i32,
    errno: i32,
    code: i32,
    _pad: i32,
    timer: i32,
    overrun: i32,
    value: u64,
    _rest: [u64; 12],
}

const _: () = assert!(size_of::<TimerInfo>() == size_of::<libc::siginfo_t>());

fn queue(pid: i32, thread: Option<i32>, signal: i32, timer: Option<TimerWord>) -> nix::Result<()> {
    let info = timer.map(|TimerWord { id, value }| TimerInfo {
        signal,
        errno: 0,
        code: libc::SI_TIMER,
        _pad: 0,
        timer: id,
        overrun: 0,
        value,
        _rest: [0; 12],
    });
    // SAFETY: these calls take integers, and read one siginfo, which is whole and lives until they return.
    let sent = unsafe {
        match (thread, &info) {
            (None, None) => libc::syscall(libc::SYS_kill, pid, signal),
            (None, Some(info)) => libc::syscall(libc::SYS_rt_sigqueueinfo, pid, signal, info),
            (Some(thread), None) => libc::syscall(libc::SYS_tgkill, pid, thread, signal),
            (Some(thread), Some(info)) => libc::syscall(libc::SYS_rt_tgsigqueueinfo, pid, thread, signal, info),
        }
    };
    Errno::result(sent).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATER: Duration = Duration::from_millis(300);

    fn set(signals: &[i32]) -> SignalSet {
        signals.iter().copied().collect()
    }

    fn timer(signal: i32, interval: u64, left: u64) -> Timer {
        let (interval, left) = (Duration::from_millis(interval), Duration::from_millis(left));
        Timer { signal, interval, left, ..Timer::default() }
    }

    fn named(id: i32, timer: Timer) -> Timer {
        Timer { word: Some(TimerWord { id, value: 100 + id as u64 }), ..timer }
    }

    /// Signals and ids of timers that process 7 is owed which has these pending.
    fn owed(pending: &[i32], core: Core) -> Vec<(i32, Option<i32>)> {
        let pending = Pending { pid: 7, shared: set(pending), threads: Vec::new() };
        let owed = compare(&pending, &core, &[], LATER);
        check(&owed).unwrap();
        assert!(owed.iter().all(|one| (one.pid, one.thread) == (7, None)));
        owed.into_iter().map(|one| (one.signal, one.timer.map(|timer| timer.id))).collect()
    }

    #[test]
    fn only_what_the_image_has_neither_as_a_signal_nor_as_a_timer_is_sent_again() {
        let image =
            |shared: &[i32], timers: &[Timer]| Core { shared: set(shared), own: set(&[]), timers: timers.into() };
        let alarm = libc::SIGALRM;
        assert_eq!(owed(&[10, 15], image(&[10], &[])), [(15, None)]);
        // Went off before CRIU looked, once and at intervals; CRIU has this one begin anew.
        assert_eq!(owed(&[alarm], image(&[], &[timer(alarm, 0, 0)])), [(alarm, None)]);
        assert_eq!(owed(&[alarm], image(&[], &[timer(alarm, 100, 0)])), [(alarm, None)]);
        // Went off afterwards: it will where it is restored.
        assert_eq!(owed(&[alarm], image(&[], &[timer(alarm, 0, 200)])), []);
        // Cannot have gone off yet.
        assert_eq!(owed(&[alarm], image(&[], &[timer(alarm, 0, 9000)])), [(alarm, None)]);
    }

    #[test]
    fn a_signal_is_the_timer_s_that_may_have_sent_it() {
        let image = |timers: Vec<Timer>| Core { timers, ..Core::default() };
        let spent = |id, signal| named(id, timer(signal, 0, 0));
        assert_eq!(owed(&[40], image(vec![spent(1, 40), spent(2, 41)])), [(40, Some(1))]);
        // Which of several nobody knows, unless one of them is not spent.
        assert_eq!(owed(&[40], image(vec![spent(1, 40), spent(2, 40)])), [(40, None)]);
        assert_eq!(owed(&[40], image(vec![spent(1, 40), named(2, timer(40, 0, 9000))])), [(40, Some(1))]);
        // One that goes off every second: it did so lately, or it did not.
        let every_second = |left| named(3, timer(40, 1000, left));
        assert_eq!(owed(&[40], image(vec![every_second(900)])), [(40, Some(3))]);
        assert_eq!(owed(&[40], image(vec![every_second(500)])), [(40, None)]);
        assert_eq!(owed(&[40], image(vec![every_second(200)])), []);
    }

    #[test]
    fn a_thread_s_signals_are_compared_with_its_own() {
        let to = |thread, id| Timer { thread: Some(thread), ..named(id, timer(32, 0, 0)) };
        let core = Core { shared: set(&[32]), own: set(&[32]), timers: vec![to(8, 1), to(9, 2)] };
        let threads = vec![(7, set(&[32])), (9, set(&[10, 32]))];
        let pending = Pending { pid: 7, shared: set(&[]), threads };
        let of = |signal, timer| Owed { pid: 7, thread: Some(9), signal, timer };
        let expected = [of(10, None), of(32, Some(TimerWord { id: 2, value: 102 }))];
        assert_eq!(compare(&pending, &core, &[core.own, set(&[])], LATER), expected);
    }

    #[test]
    fn the_kernel_s_words_are_understood() {
        let text = "Name:\ta\nState:\tt (tracing stop)\nTgid:\t90\nNSpid:\t90\t1\nThreads:\t3\n\
                    SigPnd:\t0000000000000200\nShdPnd:\t0000000080062100\n";
        let status = Status::parse(text).unwrap();
        assert_eq!((status.id(), status.threads, status.own), (1, 3, set(&[10])));
        assert_eq!(status.shared, set(&[14, 32]), "SIGKILL, SIGCONT and SIGSTOP are not ours");
        assert_eq!(Status::parse(&text.replace("t (tracing stop)", "Z (zombie)")), None);
        let timers = "ID: 0\nsignal: 32/00007f\nnotify: signal/tid.71\nClockID: 1\n\
                      ID: 1\nsignal: 14/0\nnotify: signal/pid.70\nClockID: 1\n\
                      ID: 2\nsignal: 32/00007f\nnotify: signal/tid.71\nClockID: 0\n";
        assert_eq!(told_by_timers(timers), [71]);
    }

    #[test]
    fn odd_wishes_are_refused() {
        let good = Owed { pid: 1, thread: None, signal: 14, timer: None };
        check(std::slice::from_ref(&good)).unwrap();
        for odd in [
            Owed { signal: 0, ..good.clone() },
            Owed { signal: 65, ..good.clone() },
            Owed { signal: libc::SIGKILL, ..good.clone() },
            Owed { pid: -1, ..good.clone() },
            Owed { thread: Some(0), ..good.clone() },
        ] {
            assert!(check(std::slice::from_ref(&odd)).is_err(), "{odd:?}");
        }
        assert!(check(&vec![good; MAX_OWED + 1]).is_err());
    }

    #[test]
    fn what_is_sent_arrives_with_the_word_of_its_timer() {
        let own = std::process::id() as i32;
        let status = |thread| Status::read(own, thread).unwrap();
        // SAFETY: the set is initialised before it is used, the siginfo before it is read; all of it belongs to this thread.
        let info = unsafe {
            let mut blocked = std::mem::zeroed();
            libc::sigemptyset(&mut blocked);
            libc::sigaddset(&mut blocked, 40);
            assert_eq!(libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, std::ptr::null_mut()), 0);
            let thread = status(libc::gettid()).id();
            let timer = Some(TimerWord { id: 3, value: 0x1234_5678_9abc });
            send(&[Owed { pid: status(own).id(), thread: Some(thread), signal: 40, timer }], own, || Ok(vec![own]))
                .unwrap();
            assert_eq!(status(libc::gettid()).own, set(&[40]));
            let mut info: libc::siginfo_t = std::mem::zeroed();
            assert_eq!(libc::sigwaitinfo(&blocked, &mut info), 40);
            (info.si_code, info.si_value().sival_ptr as u64)
        };
        assert_eq!(info, (libc::SI_TIMER, 0x1234_5678_9abc));
        let odd = Owed { pid: status(own).id(), thread: Some(i32::MAX), signal: 40, timer: None };
        assert!(format!("{:#}", send(&[odd], own, || Ok(vec![own])).unwrap_err()).contains("thread"));
        let odd = Owed { pid: i32::MAX, thread: None, signal: 40, timer: None };
        assert!(format!("{:#}", send(&[odd], own, || Ok(vec![own])).unwrap_err()).contains("process"));
    }
}
