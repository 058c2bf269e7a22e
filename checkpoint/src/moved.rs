//! Who moved where: the numbers that travel with a container, remembered on every host that has to do with it.
//!
//! An application shows its QP numbers and keys to others together with the GID of the host it first ran on, and
//! those pairs stay valid wherever it goes. So
//! - the host that owns the GID gives no new QP a number that a container which left still shows;
//! - a container that came from elsewhere takes the numbers of its new QPs from a *lease*, a range its first host set
//!   aside for it alone (real QP numbers are never that high);
//! - whoever connects to such a pair learns where it is now.
//!
//! Everything is on disk: kernel objects that would remind us do not stay behind.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rdma_virt::id::{PGid, PQpn, VGid, VQpn};
use serde::{Deserialize, Serialize};

use crate::agent::tidy::same;
use crate::net::msg::{Lease, MovedProcess, Resolved};
use crate::record::{RecordError, make_dir, read_json, write_json};

/// Virtual numbers from here on are never the kernel's own.
const FIRST: u32 = 1 << 20;

/// Numbers in one lease.
const COUNT: u32 = 1 << 12;

/// One more than the largest QP number (24 bits; the last is the multicast QP).
const END: u32 = (1 << 24) - 1;

/// A container that came from elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub lease: Lease,
    /// Numbers given out of it so far.
    pub used: u32,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Counter {
    /// Next lease begins here.
    next: u32,
    /// For QPs of this host whose own number is reserved.
    own: Option<Guest>,
}

#[derive(Debug, Default)]
struct Tables {
    /// By container and pid: ids of containers may repeat on different hosts, their GIDs tell them apart.
    moved: BTreeMap<String, Vec<MovedProcess>>,
    guests: BTreeMap<String, Guest>,
    counter: Counter,
}

/// No virtual number can be given.
#[derive(Debug, thiserror::Error)]
pub enum NumberError {
    #[error("container {0} has used all numbers of its range; a container that moved can make {COUNT} QPs in its life")]
    Used(String),
    #[error("this host has set aside all its virtual QP numbers; remove old files in {}", .0.display())]
    Exhausted(PathBuf),
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// All of it, for one host.
#[derive(Debug)]
pub struct Moved {
    dir: PathBuf,
    tables: Mutex<Tables>,
}

impl Moved {
    /// Reads `state_dir/moved`.
    pub fn open(state_dir: &Path) -> Result<Self, RecordError> {
        let dir = state_dir.join("moved");
        make_dir(&dir)?;
        let mut tables =
            Tables { counter: read_json(&dir.join("counter.json"))?.unwrap_or_default(), ..Tables::default() };
        let wrap = |source| RecordError::Read { path: dir.clone(), source };
        for entry in fs::read_dir(&dir).map_err(wrap)? {
            let path = entry.map_err(wrap)?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default().to_owned();
            if let Some(id) = name.strip_suffix(".moved.json") {
                tables.moved.insert(id.into(), read_json(&path)?.unwrap_or_default());
            } else if let Some(id) = name.strip_suffix(".guest.json")
                && let Some(guest) = read_json(&path)?
            {
                tables.guests.insert(id.into(), guest);
            }
        }
        Ok(Moved { dir, tables: Mutex::new(tables) })
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a range aside for a container of this host that leaves, or tells the one it has already.
    pub fn lease(&self, container: &str) -> Result<Lease, NumberError> {
        let mut t = self.tables();
        if let Some(guest) = t.guests.get(container) {
            // What is used stays used: the range goes on from there.
            let Lease { first, count } = guest.lease;
            return Ok(Lease { first: first + guest.used, count: count.saturating_sub(guest.used) });
        }
        let lease = next_lease(&mut t.counter, &self.dir)?;
        write_json(&self.dir.join("counter.json"), &t.counter)?;
        Ok(lease)
    }

    /// A container lives here now, with this range.
    pub fn host_guest(&self, container: &str, lease: Lease) -> Result<(), RecordError> {
        let mut t = self.tables();
        let guest = Guest { lease, used: 0 };
        write_json(&self.dir.join(format!("{container}.guest.json")), &guest)?;
        t.guests.insert(container.into(), guest);
        Ok(())
    }

    /// Containers that came from elsewhere.
    pub fn guests(&self) -> Vec<String> {
        self.tables().guests.keys().cloned().collect()
    }

    /// It has ended where it was: nobody asks for it any more. Newer words of the same process stay.
    pub fn forget(&self, process: &MovedProcess) -> Result<(), RecordError> {
        let mut t = self.tables();
        let Some(list) = t.moved.get_mut(&process.container) else { return Ok(()) };
        list.retain(|p| !(same(p, process) && p.since <= process.since));
        let path = self.dir.join(format!("{}.moved.json", process.container));
        if !list.is_empty() {
            return write_json(&path, list);
        }
        t.moved.remove(&process.container);
        match fs::remove_file(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => Err(RecordError::Write { path, source }),
            _ => Ok(()),
        }
    }

    /// It left or ended.
    pub fn forget_guest(&self, container: &str) {
        self.tables().guests.remove(container);
        // A file that stays is harmless: the next guest of that name replaces it.
        let _ = fs::remove_file(self.dir.join(format!("{container}.guest.json")));
    }

    /// The number a new QP of `container` shows, on a host with the GIDs `here` tells if they matter.
    pub fn number(&self, container: &str, pqpn: PQpn, here: impl FnOnce() -> Vec<VGid>) -> Result<VQpn, NumberError> {
        let mut t = self.tables();
        if let Some(guest) = t.guests.get_mut(container) {
            let number = take(guest).ok_or_else(|| NumberError::Used(container.into()))?;
            let guest = guest.clone();
            write_json(&self.dir.join(format!("{container}.guest.json")), &guest)?;
            return Ok(VQpn(number));
        }
        let mut shown = t.moved.values().flatten().filter(|p| p.qps.iter().any(|(v, _, _)| v.0 == pqpn.0)).peekable();
        let free = shown.peek().is_none() || {
            let here = here();
            !shown.any(|p| p.vgids.iter().any(|g| here.contains(g)))
        };
        if free {
            return Ok(VQpn(pqpn.0));
        }
        loop {
            if let Some(number) = t.counter.own.as_mut().and_then(take) {
                write_json(&self.dir.join("counter.json"), &t.counter)?;
                return Ok(VQpn(number));
            }
            let lease = next_lease(&mut t.counter, &self.dir)?;
            t.counter.own = Some(Guest { lease, used: 0 });
        }
    }

    /// Remembers, if it is news.
    pub fn learn(&self, news: &[MovedProcess]) -> Result<(), RecordError> {
        let mut t = self.tables();
        let mut touched = Vec::new();
        for process in news {
            let list = t.moved.entry(process.container.clone()).or_default();
            if list.iter().any(|p| same(p, process) && p.since > process.since) {
                continue;
            }
            list.retain(|p| !same(p, process));
            list.push(process.clone());
            if !touched.contains(&process.container) {
                touched.push(process.container.clone());
            }
        }
        for id in touched {
            write_json(&self.dir.join(format!("{id}.moved.json")), &t.moved[&id])?;
        }
        Ok(())
    }

    /// Where that end is, if it moved and we heard of it.
    pub fn resolve(&self, vgid: VGid, vqpn: VQpn) -> Option<Resolved> {
        let t = self.tables();
        let process = t.moved.values().flatten().filter(|p| p.vgids.contains(&vgid));
        let found = process.filter_map(|p| p.qps.iter().find(|(v, _, _)| *v == vqpn).map(|q| (p, q)));
        let (process, (_, pqpn, pgid)) = found.max_by_key(|(p, _)| p.since)?;
        let pgid = now(process, vgid).unwrap_or(*pgid);
        Some(Resolved { pgid, pqpn: *pqpn, keys: process.keys.0.clone() })
    }

    /// Agents whose host has the QP now, or may have it: it was made after the move of a container that shows this GID.
    pub fn homes(&self, vgid: VGid, vqpn: VQpn) -> Vec<String> {
        let t = self.tables();
        let inside = |l: Lease| vqpn.0 >= l.first && vqpn.0 - l.first < l.count;
        let mut homes: Vec<String> = t
            .moved
            .values()
            .flatten()
            .filter(|p| p.vgids.contains(&vgid) && (inside(p.lease) || p.qps.iter().any(|(v, _, _)| *v == vqpn)))
            .map(|p| p.at.clone())
            .collect();
        homes.dedup();
        homes
    }

    /// Agents to whose hosts something moved.
    pub fn hosts(&self) -> BTreeSet<String> {
        self.tables().moved.values().flatten().map(|p| p.at.clone()).collect()
    }

    /// Remote keys of the process that shows this end, as last heard.
    pub fn all(&self) -> Vec<MovedProcess> {
        self.tables().moved.values().flatten().cloned().collect()
    }
}

/// What a GID that a moved process shows is at its present place.
pub fn now(process: &MovedProcess, vgid: VGid) -> Option<PGid> {
    process.gids.iter().find(|(v, _)| *v == vgid).map(|(_, p)| *p)
}

fn take(guest: &mut Guest) -> Option<u32> {
    if guest.used >= guest.lease.count {
        return None;
    }
    guest.used += 1;
    Some(guest.lease.first + guest.used - 1)
}

fn next_lease(counter: &mut Counter, dir: &Path) -> Result<Lease, NumberError> {
    let first = counter.next.max(FIRST);
    if first + COUNT > END {
        return Err(NumberError::Exhausted(dir.into()));
    }
    counter.next = first + COUNT;
    Ok(Lease { first, count: COUNT })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdma_virt::id::Vpid;
    use rdma_virt::msg::KeyTable;

    fn process(since: u64) -> MovedProcess {
        MovedProcess {
            container: "m".into(),
            vpid: Vpid(7),
            vgids: vec![VGid([1; 16]), VGid([5; 16])],
            gids: vec![(VGid([5; 16]), PGid([6; 16]))],
            qps: vec![(VQpn(17), PQpn(40), PGid([2; 16]))],
            keys: KeyTable::default(),
            lease: Lease { first: FIRST, count: COUNT },
            at: "dst:7477".into(),
            since,
        }
    }

    #[test]
    fn a_number_that_left_is_not_given_again_on_the_host_it_left() {
        let dir = tempfile::tempdir().unwrap();
        let moved = Moved::open(dir.path()).unwrap();
        let here = || vec![VGid([1; 16])];
        assert_eq!(moved.number("other", PQpn(17), here).unwrap(), VQpn(17));
        moved.learn(&[process(1)]).unwrap();
        let given = moved.number("other", PQpn(17), here).unwrap();
        assert!(given.0 >= FIRST);
        assert_eq!(moved.number("other", PQpn(18), here).unwrap(), VQpn(18));
        assert_eq!(moved.number("other", PQpn(17), || vec![VGid([9; 16])]).unwrap(), VQpn(17), "elsewhere it is free");

        let again = Moved::open(dir.path()).unwrap();
        let next = again.number("other", PQpn(17), here).unwrap();
        assert!(next.0 > given.0, "a restarted agent repeats no number");
    }

    #[test]
    fn a_guest_takes_its_numbers_from_its_range_and_carries_the_rest_on() {
        let dir = tempfile::tempdir().unwrap();
        let moved = Moved::open(dir.path()).unwrap();
        moved.host_guest("m", Lease { first: FIRST + 5, count: 2 }).unwrap();
        assert_eq!(moved.number("m", PQpn(17), Vec::new).unwrap(), VQpn(FIRST + 5));
        assert_eq!(moved.lease("m").unwrap(), Lease { first: FIRST + 6, count: 1 });
        assert_eq!(moved.number("m", PQpn(18), Vec::new).unwrap(), VQpn(FIRST + 6));
        assert!(moved.number("m", PQpn(19), Vec::new).is_err());
    }

    #[test]
    fn a_container_that_takes_a_deleted_guests_name_is_no_guest() {
        let dir = tempfile::tempdir().unwrap();
        let moved = Moved::open(dir.path()).unwrap();
        moved.host_guest("m", Lease { first: FIRST, count: COUNT }).unwrap();
        assert_eq!(moved.guests(), ["m"]);
        moved.forget_guest("m");
        assert_eq!(moved.number("m", PQpn(17), Vec::new).unwrap(), VQpn(17), "the kernel's own number");
        assert!(Moved::open(dir.path()).unwrap().guests().is_empty(), "also after a restart");
    }

    #[test]
    fn one_that_ended_frees_its_numbers_and_news_of_it_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let moved = Moved::open(dir.path()).unwrap();
        moved.learn(&[process(5)]).unwrap();
        moved.forget(&process(4)).unwrap();
        assert!(moved.resolve(VGid([1; 16]), VQpn(17)).is_some(), "the answer was about an older place");
        moved.forget(&process(5)).unwrap();
        for moved in [moved, Moved::open(dir.path()).unwrap()] {
            assert_eq!(moved.resolve(VGid([1; 16]), VQpn(17)), None);
            assert_eq!(moved.number("other", PQpn(17), || vec![VGid([1; 16])]).unwrap(), VQpn(17));
        }
        assert_eq!(fs::read_dir(dir.path().join("moved")).unwrap().count(), 0);
    }

    #[test]
    fn two_containers_never_get_the_same_range() {
        let dir = tempfile::tempdir().unwrap();
        let moved = Moved::open(dir.path()).unwrap();
        let (a, b) = (moved.lease("a").unwrap(), moved.lease("b").unwrap());
        assert!(a.first + a.count <= b.first);
    }

    #[test]
    fn the_newest_word_counts_and_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let moved = Moved::open(dir.path()).unwrap();
        moved.learn(&[process(2)]).unwrap();
        let mut old = process(1);
        old.qps[0].1 = PQpn(99);
        moved.learn(&[old]).unwrap();
        let again = Moved::open(dir.path()).unwrap();
        assert_eq!(again.resolve(VGid([1; 16]), VQpn(17)).unwrap().pqpn, PQpn(40));
        assert_eq!(again.resolve(VGid([1; 16]), VQpn(18)), None);
        let by = |gid| again.resolve(VGid([gid; 16]), VQpn(17)).unwrap().pgid;
        assert_eq!((by(5), by(1)), (PGid([6; 16]), PGid([2; 16])), "the GID that was asked for counts, then the QP's");
        assert_eq!(again.homes(VGid([1; 16]), VQpn(FIRST + 1)), vec!["dst:7477".to_owned()]);
        assert_eq!(again.hosts().into_iter().collect::<Vec<_>>(), ["dst:7477"]);
    }
}
