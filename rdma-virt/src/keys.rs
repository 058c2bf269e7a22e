//! Translation of memory keys on the data path: local keys of this process, remote keys of one other process.
//!
//! Both answer the identity for what they do not know, and know nothing until something has moved; then a look-up is
//! one branch. Readers take no lock: [`LocalKeys`] is filled through `&self` with atomics, [`RemoteKeys`] is immutable
//! and exchanged whole by its owner while nobody is inside a post. Who owns which key, and asking another host for
//! one, is not here.

use crate::id::{PLkey, PRkey, VLkey, VRkey};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

const PAGE_BITS: u32 = 12;
const PAGE: usize = 1 << PAGE_BITS;
/// Keys are an index in their upper 24 bits and a tag in their lower 8.
const TAG_BITS: u32 = 8;
/// Set in every used entry, so that a used one is never zero whatever the keys are. The tag of the virtual key needs
/// 8 bits, the physical key 32: there is room.
const USED: u64 = 1 << 63;

type Page = Box<[AtomicU64]>;

/// Local keys of this process: what the application holds → what the NIC accepts now.
///
/// Also knows which keys must not be handed out (again) as their own virtual value, because that number already means
/// something else to this application or to a peer.
pub struct LocalKeys {
    /// False until the first key is given that is not its own translation.
    translating: AtomicBool,
    pages: Box<[OnceLock<Page>]>,
    /// Remote keys that peers translate, or once did: a new key of such a number would be translated by them.
    /// Never shrinks, because no peer says when it forgets.
    reserved: Mutex<BTreeSet<u32>>,
}

impl std::fmt::Debug for LocalKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalKeys").field("translating", &self.translating).finish_non_exhaustive()
    }
}

impl Default for LocalKeys {
    fn default() -> Self {
        Self::new()
    }
}

impl LocalKeys {
    pub fn new() -> Self {
        Self {
            translating: AtomicBool::new(false),
            pages: (0..PAGE).map(|_| OnceLock::new()).collect(),
            reserved: Mutex::new(BTreeSet::new()),
        }
    }

    /// What the NIC knows this key as. The key itself while nothing has moved, and for a key never told.
    #[inline]
    pub fn physical(&self, key: VLkey) -> PLkey {
        if !self.translating.load(Ordering::Relaxed) {
            return PLkey(key.0);
        }
        self.find(key).unwrap_or(PLkey(key.0))
    }

    /// Whether any key is not its own translation: while this is false a WR can be passed on untouched.
    #[inline]
    pub fn is_translating(&self) -> bool {
        self.translating.load(Ordering::Relaxed)
    }

    fn find(&self, key: VLkey) -> Option<PLkey> {
        let (page, entry) = place(key.0);
        let value = self.pages[page].get()?[entry].load(Ordering::Relaxed);
        // A different tag is a stale key: left as it is, so that the NIC refuses it as it would have.
        let same_tag = (value >> 32) as u32 & 0xff == key.0 & 0xff;
        (value & USED != 0 && same_tag).then_some(PLkey(value as u32))
    }

    /// Learns an MR's keys. Call it for every MR that was moved, also where the key happened to stay the same.
    ///
    /// A key visible to a poster is visible before the poster can know it: it is either told while everything is
    /// suspended, or before the verb that makes the MR returns.
    pub fn insert(&self, vlkey: VLkey, plkey: PLkey, vrkey: VRkey, prkey: PRkey) {
        let (page, entry) = place(vlkey.0);
        let page = self.pages[page].get_or_init(|| (0..PAGE).map(|_| AtomicU64::new(0)).collect());
        let tag = u64::from(vlkey.0 & ((1 << TAG_BITS) - 1));
        page[entry].store(USED | tag << 32 | u64::from(plkey.0), Ordering::Relaxed);
        if vlkey.0 != plkey.0 {
            self.translating.store(true, Ordering::Release);
        }
        if vrkey.0 != prkey.0 {
            self.reserve(vrkey);
        }
    }

    /// Forgets a deregistered MR's local key.
    pub fn remove(&self, vlkey: VLkey) {
        let (page, entry) = place(vlkey.0);
        if self.find(vlkey).is_some()
            && let Some(page) = self.pages[page].get()
        {
            page[entry].store(0, Ordering::Relaxed);
        }
    }

    fn reserve(&self, key: VRkey) {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).insert(key.0 >> TAG_BITS);
    }

    /// Whether a freshly registered MR with these keys may be shown to the application under the same numbers. If
    /// not: register once more while still holding this one, so that the NIC must choose others.
    pub fn may_show(&self, plkey: PLkey, prkey: PRkey) -> bool {
        let (page, entry) = place(plkey.0);
        let local = self.pages[page].get().map_or(0, |p| p[entry].load(Ordering::Relaxed));
        // The entry of an MR whose key stayed the same (`(v, v)`) cannot be met: the NIC still holds that key.
        let reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        local & USED == 0 && !reserved.contains(&(prkey.0 >> TAG_BITS))
    }
}

fn place(key: u32) -> (usize, usize) {
    let index = (key >> TAG_BITS) as usize;
    (index >> PAGE_BITS, index & (PAGE - 1))
}

/// Remote keys of one moved process: what its application handed out → what its NIC accepts now. Built once, then
/// shared; everything not in it translates to itself.
#[derive(Clone, Debug, Default)]
pub struct RemoteKeys {
    /// Open addressing, at most half full; empty when nothing differs.
    slots: Box<[Option<(u32, u32)>]>,
}

impl RemoteKeys {
    /// Of two entries for the same key the last one counts. Pairs that are their own translation cost nothing.
    pub fn new(pairs: &[(VRkey, PRkey)]) -> Self {
        let differing = || pairs.iter().filter(|(v, p)| v.0 != p.0);
        let wanted = differing().count();
        if wanted == 0 {
            return Self::default();
        }
        let mut table = Self { slots: vec![None; (wanted * 2).next_power_of_two()].into() };
        for (v, p) in differing() {
            let at = table.probe(v.0);
            table.slots[at] = Some((v.0, p.0));
        }
        table
    }

    /// Nothing differs.
    pub fn is_identity(&self) -> bool {
        self.slots.is_empty()
    }

    /// What the remote NIC knows this key as.
    #[inline]
    pub fn physical(&self, key: VRkey) -> PRkey {
        if self.slots.is_empty() {
            return PRkey(key.0);
        }
        PRkey(self.slots[self.probe(key.0)].map_or(key.0, |(_, p)| p))
    }

    /// The pairs, in no order.
    pub fn pairs(&self) -> Vec<(VRkey, PRkey)> {
        self.slots.iter().flatten().map(|&(v, p)| (VRkey(v), PRkey(p))).collect()
    }

    /// Where `key` is or would go. Ends because at least half of the slots are empty.
    fn probe(&self, key: u32) -> usize {
        let mask = self.slots.len() - 1;
        let mut at = (key.wrapping_mul(0x9e37_79b1) >> 7) as usize & mask;
        while self.slots[at].is_some_and(|(v, _)| v != key) {
            at = (at + 1) & mask;
        }
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_themselves_until_something_moved() {
        let keys = LocalKeys::new();
        assert_eq!(keys.physical(VLkey(0x1234)), PLkey(0x1234));
        assert!(!keys.is_translating());
        keys.insert(VLkey(0x1234), PLkey(0x1234), VRkey(0x1234), PRkey(0x1234));
        assert!(!keys.is_translating());
        keys.insert(VLkey(0x1234), PLkey(0x5678), VRkey(0x1234), PRkey(0x5678));
        assert!(keys.is_translating());
        assert_eq!(keys.physical(VLkey(0x1234)), PLkey(0x5678));
        assert_eq!(keys.physical(VLkey(0x1235)), PLkey(0x1235), "another tag is another key");
        assert_eq!(keys.physical(VLkey(0xffff_ffff)), PLkey(0xffff_ffff));
        keys.remove(VLkey(0x1235));
        assert_eq!(keys.physical(VLkey(0x1234)), PLkey(0x5678));
        keys.remove(VLkey(0x1234));
        assert_eq!(keys.physical(VLkey(0x1234)), PLkey(0x1234));
    }

    #[test]
    fn a_number_that_means_something_else_to_somebody_is_not_shown() {
        let keys = LocalKeys::new();
        keys.insert(VLkey(0x100), PLkey(0x900), VRkey(0x1100), PRkey(0x1900));
        assert!(!keys.may_show(PLkey(0x100), PRkey(0x7700)), "the application's other MR is called that");
        assert!(!keys.may_show(PLkey(0x7700), PRkey(0x11aa)), "peers translate that key");
        assert!(keys.may_show(PLkey(0x7700), PRkey(0x7700)));
        keys.remove(VLkey(0x100));
        assert!(keys.may_show(PLkey(0x100), PRkey(0x100)));
        assert!(!keys.may_show(PLkey(0x1100), PRkey(0x1100)), "peers may still hold the dead key");
    }

    #[test]
    fn remote_keys_translate_what_differs_and_nothing_else() {
        let pairs: Vec<_> = (0..1000).map(|i| (VRkey(i << 8 | 7), PRkey((i + 500) << 8 | 9))).collect();
        let table = RemoteKeys::new(&pairs);
        for (v, p) in &pairs {
            assert_eq!(table.physical(*v), *p);
        }
        assert_eq!(table.physical(VRkey(0xdead_0000)), PRkey(0xdead_0000));
        assert_eq!(table.pairs().len(), 1000);
        assert!(RemoteKeys::new(&[(VRkey(5), PRkey(5))]).is_identity());
        let twice = RemoteKeys::new(&[(VRkey(0), PRkey(1)), (VRkey(0), PRkey(2))]);
        assert_eq!(twice.physical(VRkey(0)), PRkey(2));
    }
}
