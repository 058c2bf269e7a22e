//! A child of fork gets a private copy of backed memory, as it gets one of any memory a NIC holds. The mappings
//! themselves are kept from children; a copy is made just before the fork and put in their place in the child.
//!
//! Children made past the C library's `fork` (`_Fork`, the bare system call) do not pass here: they do not have the
//! memory at all.
#![expect(unsafe_code, reason = "handlers that the C library calls around a fork")]

use std::cell::UnsafeCell;
use std::io;
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicBool, Ordering};

use super::swap::Snapshot;
use super::{Table, advice, files, maps, table};
use crate::entry::boundary;

/// What lies between `prepare` and the handlers after the fork.
struct Pending {
    table: MutexGuard<'static, Table>,
    copies: Vec<Snapshot>,
}

/// Belongs to the thread that holds the table's lock.
struct Slot(UnsafeCell<Option<Pending>>);

// SAFETY: touched only between the lock of the table in `prepare` and its release in `parent` or `child`, by the thread
// that forks: in the child that is the only one.
unsafe impl Sync for Slot {}

static SLOT: Slot = Slot(UnsafeCell::new(None));

/// From now on forks are seen.
pub fn watch() -> io::Result<()> {
    static WATCHED: AtomicBool = AtomicBool::new(false);
    // Under the table's lock: no two threads get here.
    if WATCHED.load(Ordering::Relaxed) {
        return Ok(());
    }
    // SAFETY: three functions that stay: this library is never unloaded.
    match unsafe { libc::pthread_atfork(Some(prepare), Some(parent), Some(child)) } {
        0 => {
            WATCHED.store(true, Ordering::Relaxed);
            Ok(())
        }
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

unsafe extern "C" fn prepare() {
    boundary(
        || {
            let table = table();
            let mut copies = Vec::new();
            let forked: Vec<String> =
                table.hulls.values().filter(|hull| !hull.not_forked).map(|hull| files::path(&hull.file)).collect();
            if !forked.is_empty() {
                let mappings = maps::of_files(&files::path("")).unwrap_or_default();
                for mapping in mappings.iter().filter(|m| m.perms.starts_with('r') && forked.contains(&m.name)) {
                    // SAFETY: a mapping of ours that can be read, as just seen. Without memory for the copy the child
                    // has none there: a fork that had to copy it could not have gone on either.
                    copies.extend(unsafe { Snapshot::take(mapping.start, mapping.end - mapping.start) });
                }
            }
            // SAFETY: we hold the lock.
            unsafe { *SLOT.0.get() = Some(Pending { table, copies }) };
        },
        || (),
    );
}

unsafe extern "C" fn parent() {
    // SAFETY: the lock that `prepare` took is held until this is dropped.
    boundary(|| drop(unsafe { (*SLOT.0.get()).take() }), || ());
}

unsafe extern "C" fn child() {
    boundary(
        || {
            // SAFETY: as in `parent`; no other thread exists.
            let Some(mut pending) = (unsafe { (*SLOT.0.get()).take() }) else { return };
            for copy in pending.copies.drain(..) {
                // SAFETY: nothing is mapped there in the child; it belonged to the parent's backed memory.
                unsafe { copy.install() };
            }
            advice::clear();
            let table = &mut *pending.table;
            let generation = table.generation.wrapping_add(1);
            *table = Table { generation, ..Table::default() };
        },
        || (),
    );
}
