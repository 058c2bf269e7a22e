//! The verbs this process has used that cannot be moved yet. They work as ever; a migration reads this list and
//! refuses, naming verb and object.

use std::sync::{Mutex, PoisonError};

use rdma_virt::saved::Blocker;

/// Longest list kept: a program that makes the same thing a million times is refused by its first entries.
const MOST: usize = 256;

static LIST: Mutex<Vec<(usize, Blocker)>> = Mutex::new(Vec::new());

/// Notes that `verb` was used on `object` (in words). `address` is the object it made: [`forget`] takes it off again
/// when that is destroyed. Use 0 for what cannot be undone.
pub fn note(verb: &str, object: impl Into<String>, address: usize) {
    let mut list = LIST.lock().unwrap_or_else(PoisonError::into_inner);
    if list.len() < MOST {
        list.push((address, Blocker { verb: verb.to_owned(), object: object.into() }));
    }
}

/// The object at `address` is gone.
pub fn forget(address: usize) {
    if address != 0 {
        LIST.lock().unwrap_or_else(PoisonError::into_inner).retain(|(a, _)| *a != address);
    }
}

/// What stands in the way of moving this process.
pub fn list() -> Vec<Blocker> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner).iter().map(|(_, b)| b.clone()).collect()
}
