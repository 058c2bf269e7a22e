//! Numbers that exist twice, and the arrays that turn one into the other on the data path in two loads.
//!
//! QPNs: what the NIC writes into a completion (physical) to the QP and the number its application knows (virtual).
//! Keys: what the application writes into a work request (virtual) to what the NIC accepts (physical). Which numbers
//! are given out is not decided here.
#![expect(unsafe_code, reason = "lock-free arrays behind atomic pointers")]

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use rdma_virt::id::{PLkey, PRkey, VLkey, VQpn, VRkey};

use crate::qp::ShadowQp;

const HALF: usize = 1 << 12;
const MASK: usize = HALF - 1;

/// An array of 2^24 entries of which only the parts in use take memory. Entries start as their default.
struct Sparse<T> {
    root: Box<[AtomicPtr<T>]>,
}

impl<T: Default> Sparse<T> {
    fn new() -> Self {
        Self { root: (0..HALF).map(|_| AtomicPtr::new(null_mut())).collect() }
    }

    #[inline]
    fn get(&self, index: u32) -> Option<&T> {
        let page = self.root[(index as usize >> 12) & MASK].load(Ordering::Acquire);
        // SAFETY: a page, once there, has HALF entries and stays until the table goes.
        (!page.is_null()).then(|| unsafe { &*page.add(index as usize & MASK) })
    }

    fn get_or_make(&self, index: u32) -> &T {
        let slot = &self.root[(index as usize >> 12) & MASK];
        let mut page = slot.load(Ordering::Acquire);
        if page.is_null() {
            let fresh: Box<[T]> = (0..HALF).map(|_| T::default()).collect();
            let fresh = Box::into_raw(fresh).cast::<T>();
            match slot.compare_exchange(null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => page = fresh,
                Err(theirs) => {
                    page = theirs;
                    // SAFETY: made three lines above, known to nobody.
                    drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(fresh, HALF)) });
                }
            }
        }
        // SAFETY: as in `get`.
        unsafe { &*page.add(index as usize & MASK) }
    }
}

impl<T> Drop for Sparse<T> {
    fn drop(&mut self) {
        for page in &mut self.root {
            let page = *page.get_mut();
            if !page.is_null() {
                // SAFETY: made by `get_or_make` with this length; nobody reads any more.
                drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(page, HALF)) });
            }
        }
    }
}

#[derive(Default)]
struct QpnEntry {
    qp: AtomicPtr<ShadowQp>,
    /// Virtual number plus one; stays when the QP is gone, because its completions may still be in a CQ.
    vqpn: AtomicU32,
}

/// Virtual number of QPs the shim makes for itself: their completions are nobody's.
pub const OURS: u32 = u32::MAX - 1;

/// What a physical QPN means.
pub enum Owner<'a> {
    /// A QP of the application.
    Qp(&'a ShadowQp, u32),
    /// One that was destroyed; its completions still carry the number its application knew.
    Gone(u32),
    /// A helper of the shim.
    Ours,
    /// A QP we do not shadow.
    Unknown,
}

/// Physical QPN to shadow QP.
pub struct QpnTable(Sparse<QpnEntry>);

impl QpnTable {
    pub fn new() -> Self {
        Self(Sparse::new())
    }

    /// Who completions with this QPN belong to. The reference is good as long as the caller holds the lock of a CQ of
    /// that QP: a QP being destroyed leaves this table first and passes through its CQs' locks before it goes.
    #[inline]
    pub fn owner(&self, pqpn: u32) -> Owner<'_> {
        let Some(entry) = self.0.get(pqpn) else { return Owner::Unknown };
        let vqpn = entry.vqpn.load(Ordering::Acquire);
        // SAFETY: see above.
        match unsafe { entry.qp.load(Ordering::Acquire).as_ref() } {
            Some(qp) => Owner::Qp(qp, vqpn - 1),
            None if vqpn == 0 => Owner::Unknown,
            None if vqpn == OURS + 1 => Owner::Ours,
            None => Owner::Gone(vqpn - 1),
        }
    }

    pub fn insert(&self, pqpn: u32, vqpn: VQpn, qp: *const ShadowQp) {
        let entry = self.0.get_or_make(pqpn);
        entry.qp.store(null_mut(), Ordering::Release);
        entry.vqpn.store(vqpn.0.wrapping_add(1), Ordering::Release);
        entry.qp.store(qp.cast_mut(), Ordering::Release);
    }

    /// Leaves the number, takes the QP.
    pub fn remove(&self, pqpn: u32, qp: *const ShadowQp) {
        if let Some(entry) = self.0.get(pqpn) {
            let _ = entry.qp.compare_exchange(qp.cast_mut(), null_mut(), Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}

/// One kind of key: virtual to physical.
struct KeyMap(Sparse<AtomicU64>);

impl KeyMap {
    /// An entry is virtual key in the high half, physical in the low half; 0 is none, and means itself.
    #[inline]
    fn translate(&self, key: u32) -> u32 {
        let entry = self.0.get(key >> 8).map_or(0, |e| e.load(Ordering::Acquire));
        match ((entry >> 32) as u32, entry as u32) {
            (0, 0) => key,
            (virt, phys) if virt == key => phys,
            // Same MR slot, another generation of the key: it was refused before and has to be refused now.
            (_, phys) => phys ^ 0x80,
        }
    }

    fn set(&self, virt: u32, phys: u32) {
        self.0.get_or_make(virt >> 8).store(u64::from(virt) << 32 | u64::from(phys), Ordering::Release);
    }

    fn clear(&self, virt: u32) {
        if let Some(e) = self.0.get(virt >> 8) {
            if (e.load(Ordering::Acquire) >> 32) as u32 == virt {
                e.store(0, Ordering::Release);
            }
        }
    }
}

/// The keys of one device's MRs.
pub struct KeyMaps {
    moved: AtomicBool,
    lkeys: KeyMap,
    rkeys: KeyMap,
}

impl KeyMaps {
    pub fn new() -> Self {
        Self { moved: AtomicBool::new(false), lkeys: KeyMap(Sparse::new()), rkeys: KeyMap(Sparse::new()) }
    }

    /// Whether any key differs from what the application holds: until then the data path does not look.
    #[inline]
    pub fn moved(&self) -> bool {
        self.moved.load(Ordering::Acquire)
    }

    #[inline]
    pub fn lkey(&self, key: VLkey) -> PLkey {
        PLkey(self.lkeys.translate(key.0))
    }

    #[inline]
    pub fn rkey(&self, key: VRkey) -> PRkey {
        PRkey(self.rkeys.translate(key.0))
    }

    pub fn set(&self, virt: (VLkey, VRkey), phys: (PLkey, PRkey)) {
        if virt.0.0 != phys.0.0 || virt.1.0 != phys.1.0 || self.moved() {
            self.lkeys.set(virt.0.0, phys.0.0);
            if virt.1.0 != 0 {
                self.rkeys.set(virt.1.0, phys.1.0);
            }
            self.moved.store(true, Ordering::Release);
        }
    }

    pub fn clear(&self, virt: (VLkey, VRkey)) {
        self.lkeys.clear(virt.0.0);
        self.rkeys.clear(virt.1.0);
    }
}

/// The remote keys valid on one QP, where they are not what the remote application handed out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteKeys(Vec<(VRkey, PRkey)>);

impl RemoteKeys {
    pub fn new(mut keys: Vec<(VRkey, PRkey)>) -> Self {
        keys.sort_unstable_by_key(|(v, _)| v.0);
        Self(keys)
    }

    #[inline]
    pub fn translate(&self, key: VRkey) -> PRkey {
        match self.0.binary_search_by_key(&key.0, |(v, _)| v.0) {
            Ok(i) => self.0[i].1,
            Err(_) => PRkey(key.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_themselves_until_somebody_moves() {
        let maps = KeyMaps::new();
        assert_eq!(maps.lkey(VLkey(0x1234)), PLkey(0x1234));
        maps.set((VLkey(0x1234), VRkey(0x1234)), (PLkey(0x1234), PRkey(0x1234)));
        assert!(!maps.moved());
    }

    #[test]
    fn a_stale_key_of_a_moved_region_stays_refused() {
        let maps = KeyMaps::new();
        maps.set((VLkey(0x1211), VRkey(0x1211)), (PLkey(0x9922), PRkey(0x9922)));
        assert_eq!(maps.lkey(VLkey(0x1211)), PLkey(0x9922));
        assert_ne!(maps.lkey(VLkey(0x1210)), PLkey(0x9922));
        maps.clear((VLkey(0x1211), VRkey(0x1211)));
        assert_eq!(maps.rkey(VRkey(0x1211)), PRkey(0x1211));
    }

    #[test]
    fn remote_keys_not_listed_are_themselves() {
        let keys = RemoteKeys::new(vec![(VRkey(9), PRkey(90)), (VRkey(3), PRkey(30))]);
        assert_eq!(keys.translate(VRkey(3)), PRkey(30));
        assert_eq!(keys.translate(VRkey(4)), PRkey(4));
    }
}
