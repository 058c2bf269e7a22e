//! Memory that is registered lies in files of a tmpfs, so that it can be copied to another host, and registered there,
//! while the application runs; a dump then leaves it out.
//!
//! Before a range is registered its whole pages are swapped for a shared mapping of a file, under running threads, and
//! when its last registration ends they become private memory again. What cannot be swapped is registered as it is:
//! small ranges, memory that is not plain private memory (files, shared memory, huge pages, locked memory), ranges that
//! overlap a registered one and are not inside it, a range given back again and again, and everything where the runtime
//! did not mount the directory.
//!
//! | module | subject |
//! |---|---|
//! | [`files`] | the files |
//! | [`maps`] | what is mapped where |
//! | [`uffd`], [`swap`] | exchanging memory under running threads |
//! | [`advice`] | `madvise`, as on private memory |
//! | [`fork`] | a child sees its own copy, as of private memory |
//!
//! Who registers what is in [`crate::mr`]; copying to another host is not here at all.

mod advice;
mod files;
mod fork;
mod maps;
mod swap;
#[cfg(test)]
mod tests;
mod uffd;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rdma_virt::saved::BackedMemory;

/// Bytes. The swap and the files know no other size; hosts that have another register everything as it is.
const PAGE: usize = 4096;

/// Smaller ranges are not worth a mapping of their own, bytes.
const LEAST: usize = 64 << 10;

/// Each is one more mapping or two, of which a process may have some 65,000.
const MOST: usize = 4096;

/// `IBV_ACCESS_ON_DEMAND`: the NIC takes faults instead of holding pages.
const ON_DEMAND: u32 = 1 << 6;

/// A range that came back this often within [`MEMORY`] is registered and deregistered in a loop: copying it each time
/// costs more than it is worth.
const OFTEN: u32 = 3;
const MEMORY: Duration = Duration::from_secs(60);
const MOST_RETURNED: usize = 256;

/// Memory that lies in a file.
#[derive(Debug)]
struct Hull {
    end: usize,
    file: String,
    /// Registrations that overlap it.
    users: u32,
    /// The application had it kept from children of fork.
    not_forked: bool,
}

#[derive(Debug)]
struct Returned {
    range: Range<usize>,
    times: u32,
    last: Instant,
}

#[derive(Debug, Default)]
struct Table {
    hulls: BTreeMap<usize, Hull>,
    /// Ranges that were registered as they were.
    loose: Vec<Range<usize>>,
    returned: Vec<Returned>,
    /// Changes in a child of fork: what was acquired before has no meaning there.
    generation: u32,
    /// Files without an owner were removed.
    cleaned: bool,
}

static TABLE: Mutex<Table> = Mutex::new(Table {
    hulls: BTreeMap::new(),
    loose: Vec::new(),
    returned: Vec::new(),
    generation: 0,
    cleaned: false,
});

fn table() -> MutexGuard<'static, Table> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The part of one registration in it; given back with [`release`].
#[derive(Debug, Default)]
#[must_use]
pub struct Hold {
    range: Range<usize>,
    hulls: Vec<usize>,
    loose: bool,
    generation: u32,
}

/// Whether anything can be backed in this process. Looked at once: the directory is mounted before the first process.
fn is_on() -> bool {
    static KNOWN: AtomicU8 = AtomicU8::new(0);
    match KNOWN.load(Ordering::Relaxed) {
        0 => {
            let on = page_size() == PAGE && files::exists();
            KNOWN.store(if on { 2 } else { 1 }, Ordering::Relaxed);
            on
        }
        known => known == 2,
    }
}

#[expect(unsafe_code, reason = "sysconf has no safe interface")]
fn page_size() -> usize {
    // SAFETY: asks for a number.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// The whole pages that `[addr, addr + len)` touches.
fn pages(addr: u64, len: u64) -> Option<Range<usize>> {
    let start = usize::try_from(addr).ok()? / PAGE * PAGE;
    let end = usize::try_from(addr.checked_add(len)?).ok()?.checked_next_multiple_of(PAGE)?;
    (len > 0 && end < isize::MAX as usize).then_some(start..end)
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}

/// Before `[addr, addr + len)` is registered: backs it if it can be. It never fails; what is not backed is registered
/// as it is.
pub fn acquire(addr: u64, len: u64, access: u32) -> Hold {
    let Some(range) = is_on().then(|| pages(addr, len)).flatten() else { return Hold::default() };
    let mut table = table();
    if let Some(hold) = table.join(&range) {
        return hold;
    }
    let suits = range.len() >= LEAST && access & ON_DEMAND == 0 && table.hulls.len() < MOST;
    if suits && !table.is_taken(&range) && !table.is_restless(&range) {
        if !std::mem::replace(&mut table.cleaned, true) {
            files::clean(|name| table.hulls.values().any(|hull| hull.file == name));
        }
        match back(&range) {
            Ok(hull) => {
                advice::add(&range);
                table.hulls.insert(range.start, hull);
                return table.join(&range).unwrap_or_default();
            }
            Err(e) => crate::control::note(|| format!("memory at {:#x} stays where it is: {e}", range.start)),
        }
    }
    table.take_loose(range)
}

/// For a registration that must not change the memory: it takes part in what is backed already.
pub fn acquire_as_is(addr: u64, len: u64) -> Hold {
    let Some(range) = is_on().then(|| pages(addr, len)).flatten() else { return Hold::default() };
    let mut table = table();
    table.join(&range).unwrap_or_else(|| table.take_loose(range))
}

/// After the registration has ended. Memory that no other one needs is private again on return.
pub fn release(hold: Hold) {
    if hold.range.is_empty() {
        return;
    }
    let mut table = table();
    if table.generation != hold.generation {
        return;
    }
    if hold.loose
        && let Some(at) = table.loose.iter().position(|r| *r == hold.range)
    {
        table.loose.swap_remove(at);
    }
    for start in hold.hulls {
        let Some(hull) = table.hulls.get_mut(&start) else { continue };
        hull.users = hull.users.saturating_sub(1);
        if hull.users > 0 {
            continue;
        }
        let range = start..hull.end;
        match give_back(hull) {
            Ok(()) => {
                advice::remove(start);
                table.hulls.remove(&start);
                table.has_returned(range);
            }
            // It stays in its file, as good as before, and is used by the next registration there.
            Err(e) => crate::control::note(|| format!("memory at {start:#x} stays in its file: {e}")),
        }
    }
}

impl Table {
    /// Takes part in the hull that holds the whole range.
    fn join(&mut self, range: &Range<usize>) -> Option<Hold> {
        let (start, hull) = self.hulls.range_mut(..=range.start).next_back()?;
        if hull.end < range.end {
            return None;
        }
        hull.users += 1;
        Some(Hold { range: range.clone(), hulls: vec![*start], loose: false, generation: self.generation })
    }

    fn overlapping(&self, range: &Range<usize>) -> Vec<usize> {
        let hulls = self.hulls.range(..range.end);
        hulls.filter(|(start, hull)| overlap(&(**start..hull.end), range)).map(|(start, _)| *start).collect()
    }

    /// Whether somebody has registered a part of it.
    fn is_taken(&self, range: &Range<usize>) -> bool {
        self.loose.iter().any(|r| overlap(r, range)) || !self.overlapping(range).is_empty()
    }

    fn take_loose(&mut self, range: Range<usize>) -> Hold {
        let hulls = self.overlapping(&range);
        for start in &hulls {
            if let Some(hull) = self.hulls.get_mut(start) {
                hull.users += 1;
            }
        }
        self.loose.push(range.clone());
        Hold { range, hulls, loose: true, generation: self.generation }
    }

    fn has_returned(&mut self, range: Range<usize>) {
        self.returned.retain(|r| r.last.elapsed() < MEMORY);
        let times = self.returned.iter().filter(|r| overlap(&r.range, &range)).map(|r| r.times).max().unwrap_or(0) + 1;
        self.returned.retain(|r| !overlap(&r.range, &range));
        if self.returned.len() < MOST_RETURNED {
            self.returned.push(Returned { range, times, last: Instant::now() });
        }
    }

    fn is_restless(&self, range: &Range<usize>) -> bool {
        let often = |r: &&Returned| r.times >= OFTEN && r.last.elapsed() < MEMORY && overlap(&r.range, range);
        self.returned.iter().find(often).is_some()
    }
}

/// Puts a file in the place of private memory.
#[expect(unsafe_code, reason = "replaces a mapping of the application")]
fn back(range: &Range<usize>) -> io::Result<Hull> {
    let mappings = maps::within(range.start, range.end)?;
    let mut at = range.start;
    for mapping in &mappings {
        if mapping.start > at || !mapping.is_plain() {
            return Err(io::Error::other("it is not all plain private memory"));
        }
        at = mapping.end;
    }
    if at < range.end {
        return Err(io::Error::other("it is not all mapped"));
    }
    let not_forked = mappings.iter().any(maps::Mapping::is_not_forked);
    if not_forked && !mappings.iter().all(maps::Mapping::is_not_forked) {
        return Err(io::Error::other("one part of it goes to children and another does not"));
    }
    fork::watch()?;
    let (file, open) = files::make(range.len())?;
    // SAFETY: plain memory of this process, as just seen, that no device has: nobody has registered it.
    let swapped = unsafe { swap::to_file(range.start, range.len(), &open) };
    if let Err(e) = swapped {
        files::remove(&file);
        return Err(e);
    }
    Ok(Hull { end: range.end, file, users: 0, not_forked })
}

/// Puts private memory in the place of the file, wherever the application has it mapped by now.
#[expect(unsafe_code, reason = "replaces mappings that are ours")]
fn give_back(hull: &Hull) -> io::Result<()> {
    let open = files::open(&hull.file)?;
    let path = files::path(&hull.file);
    for mapping in maps::of_files(&path)?.into_iter().filter(|m| m.name == path) {
        let (start, len) = (mapping.start, mapping.end - mapping.start);
        // SAFETY: a mapping of that file, as just seen; only we map it.
        unsafe { swap::to_private(start, len, &open, mapping.offset)? };
        let protection = mapping.protection();
        // SAFETY: the memory that has just been put there; these are the properties the application gave it.
        unsafe {
            if protection != libc::PROT_READ | libc::PROT_WRITE {
                libc::mprotect(start as *mut libc::c_void, len, protection);
            }
            if hull.not_forked {
                libc::madvise(start as *mut libc::c_void, len, libc::MADV_DONTFORK);
            }
        }
    }
    files::remove(&hull.file);
    Ok(())
}

/// What lies in files, for a report. A range that the application has mapped differently meanwhile is not in it.
pub fn list() -> Vec<BackedMemory> {
    let table = table();
    if table.hulls.is_empty() {
        return Vec::new();
    }
    let mappings = maps::of_files(&files::path("")).unwrap_or_default();
    let whole = |start: usize, hull: &Hull| {
        let path = files::path(&hull.file);
        mappings.iter().any(|m| m.start == start && m.end >= hull.end && m.offset == 0 && m.name == path)
    };
    let hulls = table.hulls.iter().filter(|(start, hull)| whole(**start, hull));
    hulls
        .map(|(start, hull)| BackedMemory {
            file: hull.file.clone(),
            addr: *start as u64,
            len: (hull.end - start) as u64,
        })
        .collect()
}
