//! Registered memory on its way: the files it lies in are sent in rounds, each with the blocks whose content is another
//! than was sent before. The container runs meanwhile; what is written during a round is found by the next one, and the
//! last one comes when nobody writes any more: neither the tasks, which stand still, nor a NIC, which has completed all
//! it had to do.
//!
//! What the files mean, and who registered what, is not known here.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;

use super::blocks::{BLOCK, CHUNK, Diff, Print, diff};
use super::pace::Pace;
use super::source::{Run, Stop, confused};
use super::view::{Torn, View};
use super::world::World;
use super::{Cancel, Progress};
use crate::agent::admin::Event;
use crate::agent::lock;
use crate::net::msg::{Answer, MemoryBlocks, MemoryFile, Order, PIECE};
use crate::phase::Phase;

/// For one piece.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whoever waits longer for the last round is told so.
const MOMENT: Duration = Duration::from_secs(1);

/// Threads that compare.
const WORKERS: usize = 4;

/// Rounds end when one had so little to send, bytes,
const LITTLE: u64 = 4 << 20;
/// or when there were so many.
const ROUNDS: u32 = 5;

/// A container has no more files; a shim makes 4096 at most.
const MOST: usize = 1 << 16;

/// What the destination has.
#[derive(Debug, Default)]
pub(super) struct Known(BTreeMap<String, KnownFile>);

#[derive(Debug)]
struct KnownFile {
    file: MemoryFile,
    /// By number of the chunk; those that are missing are zeros.
    chunks: BTreeMap<u64, Vec<Print>>,
    /// Kept from round to round: the last one, in the pause, finds it mapped.
    view: Option<View>,
}

/// What one round did.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Round {
    /// Sent.
    pub bytes: u64,
    /// Looked at.
    pub seen: u64,
    pub took: Duration,
}

/// A part of a file to be compared.
struct Job<'a> {
    file: usize,
    chunk: u64,
    /// Blocks of it that have memory.
    data: Vec<Range<usize>>,
    known: &'a [Print],
    view: &'a View,
}

/// What a round needs of its migration.
struct Line<'a> {
    world: &'a dyn World,
    id: MigrationId,
    to: String,
    cancel: &'a Cancel,
    /// Who is told how far it is, and in which phase; nobody, where other things go on.
    progress: Option<(&'a dyn Progress, Phase)>,
}

/// Files as they were found.
pub(super) struct Found(Vec<(File, MemoryFile)>);

impl<'a> Run<'a> {
    /// One round: afterwards the destination has every block as it was at some moment of the round.
    pub(super) fn memory_round(&mut self, phase: Phase) -> Result<Round, Stop> {
        let Some(found) = self.find_memory()? else { return Ok(Round::default()) };
        let line = Line { progress: Some((self.progress, phase)), ..self.memory_line() };
        let mut known = std::mem::take(&mut self.known);
        let round = line.round(&found, &mut known, &Pace::fast());
        self.known = known;
        let round = round?;
        self.made(round);
        Ok(round)
    }

    /// Looks which files there are, and tells the destination, if it does not know already. `None` if there are none, and
    /// never were.
    pub(super) fn find_memory(&mut self) -> Result<Option<Found>, Stop> {
        let Some(dir) = self.world.host().memory_files(&self.request.container) else { return Ok(None) };
        let open = list(&dir)?;
        let known = &self.known.0;
        if open.is_empty() && known.is_empty() {
            return Ok(None);
        }
        let is_known = |file: &MemoryFile| known.get(&file.name).is_some_and(|known| known.file == *file);
        if known.len() != open.len() || !open.iter().all(|(_, file)| is_known(file)) {
            let files: Vec<MemoryFile> = open.iter().map(|(_, file)| file.clone()).collect();
            self.memory_line().order(Order::Memory { files: files.clone() })?;
            // A file that is another one by now begins anew on both sides.
            self.known.0.retain(|name, known| files.iter().any(|f| f.name == *name && *f == known.file));
            for file in files {
                let name = file.name.clone();
                self.known.0.entry(name).or_insert(KnownFile { file, chunks: BTreeMap::new(), view: None });
            }
        }
        Ok(Some(Found(open)))
    }

    /// The last round, when nobody writes any more: beside `phases`, which end with the restore. What CRIU and the
    /// destination do meanwhile does not wait for it.
    pub(super) fn last_round_beside(
        &mut self,
        found: Option<Found>,
        phases: impl FnOnce(&mut Self, &LastRound) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let Some(found) = found else { return phases(self, &LastRound::none()) };
        let line = self.memory_line();
        let mut known = std::mem::take(&mut self.known);
        let (told, over) = sync_channel(1);
        let last = LastRound { over: Some(Mutex::new(over)), pace: Pace::default() };
        let done = thread::scope(|scope| {
            let round = || {
                // Whoever waits for it has gone: its own error ended the migration.
                let _ = told.send(line.round(&found, &mut known, &last.pace));
            };
            let thread = thread::Builder::new().name("memory".into()).spawn_scoped(scope, round);
            thread.map_err(|e| Stop::Failed(format!("no thread for registered memory: {e}")))?;
            let _stopped = last.pace.stopped_at_last();
            phases(self, &last)
        });
        self.known = known;
        done
    }

    fn made(&mut self, round: Round) {
        self.sent_memory += round.bytes;
        if self.largest.is_none_or(|other| round.bytes > other.bytes) {
            self.largest = Some(round);
        }
    }

    fn memory_line(&self) -> Line<'a> {
        let (world, cancel, to) = (self.world, self.cancel, self.to.clone());
        Line { world, id: self.id, to, cancel, progress: None }
    }

    /// Rounds while they pay.
    pub(super) fn memory_rounds(&mut self) -> Result<(), Stop> {
        // Pre-setup sent all of it. What has changed since is measured by the first round here.
        let mut before = if self.sent_memory > 0 { self.sent_memory } else { u64::MAX };
        for number in 1..=ROUNDS {
            let round = self.memory_round(Phase::PreCopy)?;
            if round.seen == 0 {
                return Ok(());
            }
            self.note(format!(
                "round {number} of registered memory: {} of {} KiB in {:.1} s",
                round.bytes >> 10,
                round.seen >> 10,
                round.took.as_secs_f64()
            ));
            if round.bytes <= LITTLE || round.bytes > before / 4 * 3 {
                return Ok(());
            }
            before = round.bytes;
        }
        Ok(())
    }
}

/// The last round on its way.
pub(super) struct LastRound {
    over: Option<Mutex<Receiver<Result<Round, Stop>>>>,
    /// CRIU's dump comes first.
    pace: Pace,
}

impl LastRound {
    /// Of a container without such memory.
    fn none() -> Self {
        LastRound { over: None, pace: Pace::default() }
    }

    /// What had to come first is done.
    pub fn hurry(&self) {
        self.pace.hurry();
    }

    /// Waits until the destination has all of it.
    pub fn arrive(&self, run: &mut Run<'_>) -> Result<(), Stop> {
        let Some(over) = &self.over else { return Ok(()) };
        let over = lock(over);
        let round = over.recv_timeout(MOMENT).or_else(|_| {
            run.note("waiting for the last registered memory to arrive");
            over.recv()
        });
        let round = round.unwrap_or_else(|_| Err(Stop::Failed("its thread panicked".into())))?;
        run.late_memory = round.bytes;
        run.made(round);
        Ok(())
    }
}

impl Line<'_> {
    /// Compares and sends.
    fn round(&self, found: &Found, known: &mut Known, pace: &Pace) -> Result<Round, Stop> {
        pace.begin();
        let start = Instant::now();
        let (bytes, seen) = self.changes(&found.0, known, pace)?;
        Ok(Round { bytes, seen, took: start.elapsed() })
    }

    fn order(&self, order: Order) -> Result<(), Stop> {
        if let Some(why) = self.cancel.given_up().or_else(|| self.cancel.why()) {
            return Err(Stop::Failed(why));
        }
        match self.world.call(&self.to, self.id, order, PATIENCE)? {
            Answer::Done => Ok(()),
            _ => Err(confused("the destination", "memory")),
        }
    }

    fn changes(&self, open: &[(File, MemoryFile)], known: &mut Known, pace: &Pace) -> Result<(u64, u64), Stop> {
        for (file, meta) in open.iter().filter(|(_, meta)| meta.len > 0) {
            let known = known.0.get_mut(&meta.name).filter(|known| known.view.is_none());
            if let Some(known) = known {
                known.view = Some(View::of(file, meta.len).map_err(|e| lost(&meta.name, &e))?);
            }
        }
        let mut jobs = Vec::new();
        for (n, (file, meta)) in open.iter().enumerate() {
            let KnownFile { chunks, view: Some(view), .. } = &known.0[&meta.name] else { continue };
            let mut data = filled(file).map_err(|e| lost(&meta.name, &e))?;
            for chunk in chunks.keys() {
                data.entry(*chunk).or_default();
            }
            let known = |chunk| chunks.get(&chunk).map_or(&[][..], Vec::as_slice);
            jobs.extend(data.into_iter().map(|(chunk, data)| Job { file: n, chunk, data, known: known(chunk), view }));
        }
        let seen = jobs.iter().flat_map(|job| &job.data).map(|blocks| blocks.len() * BLOCK).sum::<usize>() as u64;
        let mut batch = Batch { line: self, total: seen, sent: 0, blocks: Vec::new(), waiting: 0 };
        let mut prints = Vec::with_capacity(jobs.len());
        let next = AtomicUsize::new(0);
        let (results, compared) = sync_channel::<(usize, (Diff, Result<(), Torn>))>(WORKERS);
        let mut torn = BTreeSet::new();
        thread::scope(|scope| {
            for _ in 0..WORKERS.min(thread::available_parallelism().map_or(1, usize::from)).min(jobs.len()) {
                let (results, jobs, next) = (results.clone(), &jobs, &next);
                scope.spawn(move || {
                    let _keeper = pace.keeper();
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(job) = jobs.get(at) else { return };
                        // Nobody listens: somebody else's error ended the round.
                        if results.send((at, compare(job.view, job.chunk, job.known, &job.data))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(results);
            // To encrypt what has changed takes longer than to find it. (Not sooner: those threads would inherit the pace, and
            // keep it.)
            let _keeper = pace.keeper();
            for (at, (mut diff, whole)) in compared {
                if pace.is_over() {
                    return Err(Stop::Failed("it is not wanted any more".into()));
                }
                let job = &jobs[at];
                let name = &open[job.file].1.name;
                if whole.is_err() {
                    torn.insert(job.file);
                }
                prints.push((job.file, job.chunk, std::mem::take(&mut diff.prints)));
                batch.add(name, job.chunk * CHUNK as u64, diff)?;
            }
            batch.flush()
        })?;
        let sent = batch.sent;
        for (file, chunk, now) in prints {
            if let Some(known) = known.0.get_mut(&open[file].1.name) {
                known.chunks.insert(chunk, now);
                // The next round has another file, or the same of another length.
                if torn.contains(&file) {
                    known.view = None;
                }
            }
        }
        Ok((sent, seen))
    }
}

fn lost(name: &str, e: &io::Error) -> Stop {
    Stop::Failed(format!("registered memory in file {name} cannot be read: {e}"))
}

/// The files there are, open. What is no plain file is not the shim's.
pub(crate) fn list(dir: &Path) -> Result<Vec<(File, MemoryFile)>, Stop> {
    let read = |e: io::Error| Stop::Failed(format!("cannot read {}: {e}", dir.display()));
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = match OpenOptions::new().read(true).custom_flags(flags).open(entry.path()) {
            Ok(file) => file,
            // Removed meanwhile, or no file.
            Err(_) => continue,
        };
        let meta = file.metadata().map_err(read)?;
        if !meta.is_file() || !crate::agent::is_plain_name(&name) {
            continue;
        }
        if found.len() == MOST {
            return Err(Stop::Failed(format!("{} holds more than {MOST} files", dir.display())));
        }
        let (id, len, mode) = (meta.ino(), meta.len(), meta.mode() & 0o777);
        found.push((file, MemoryFile { name, id, len, mode, uid: meta.uid(), gid: meta.gid() }));
    }
    found.sort_by(|a, b| a.1.name.cmp(&b.1.name));
    Ok(found)
}

/// The chunks that have memory, with the blocks of each that have.
pub(crate) fn filled(file: &File) -> io::Result<BTreeMap<u64, Vec<Range<usize>>>> {
    let step = (CHUNK * BLOCK) as u64;
    let mut found: BTreeMap<u64, Vec<Range<usize>>> = BTreeMap::new();
    let mut at = 0;
    while let Some(start) = seek(file, at, libc::SEEK_DATA)? {
        let end = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(start + 1);
        for chunk in start / step..end.div_ceil(step) {
            let in_chunk = |at: u64| (at.max(chunk * step) - chunk * step).min(step) as usize;
            found.entry(chunk).or_default().push(in_chunk(start) / BLOCK..in_chunk(end).div_ceil(BLOCK));
        }
        at = end;
    }
    Ok(found)
}

#[expect(unsafe_code, reason = "lseek with SEEK_DATA has no safe interface")]
fn seek(file: &File, at: u64, whence: i32) -> io::Result<Option<u64>> {
    // SAFETY: asks where data is; the position is nobody's business, reads name theirs.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}

/// Compares the blocks of a chunk. What is missing of the file is zeros; the destination's becomes shorter, too.
pub(crate) fn compare(view: &View, chunk: u64, known: &[Print], data: &[Range<usize>]) -> (Diff, Result<(), Torn>) {
    let start = usize::try_from(chunk).unwrap_or(usize::MAX).saturating_mul(CHUNK * BLOCK);
    view.look(start..start.saturating_add(CHUNK * BLOCK), |now| diff(known, data, now))
}

/// Changes that wait for company.
struct Batch<'a> {
    line: &'a Line<'a>,
    total: u64,
    sent: u64,
    blocks: Vec<MemoryBlocks>,
    waiting: usize,
}

impl Batch<'_> {
    fn add(&mut self, file: &str, first: u64, diff: Diff) -> Result<(), Stop> {
        if diff.is_empty() {
            return Ok(());
        }
        if self.waiting + diff.bytes.len() > PIECE {
            self.flush()?;
        }
        self.waiting += diff.bytes.len();
        let Diff { runs, zeros, bytes, .. } = diff;
        self.blocks.push(MemoryBlocks { file: file.to_owned(), first, runs, zeros, bytes });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Stop> {
        if self.blocks.is_empty() {
            return Ok(());
        }
        self.line.order(Order::Blocks(std::mem::take(&mut self.blocks)))?;
        self.sent += std::mem::take(&mut self.waiting) as u64;
        if let Some((progress, phase)) = self.line.progress {
            let (done, total) = (self.sent, self.total.max(self.sent));
            progress.event(Event::Progress { phase, done, total, unit: "bytes".into() });
        }
        Ok(())
    }
}
