//! Physical QP number → whose it is, read for every completion: the NIC names a QP by number only.
//!
//! Readers take no lock. What the stored number stands for (a pointer, an index) and how long it lives is the owner's
//! affair: it must not free what a poller may still look up.

use crate::id::PQpn;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const PAGE_BITS: u32 = 12;
const PAGE: usize = 1 << PAGE_BITS;

/// Two levels, second level made when first needed; QP numbers have 24 bits.
pub struct QpnTable {
    pages: Box<[OnceLock<Box<[AtomicUsize]>>]>,
}

impl std::fmt::Debug for QpnTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QpnTable").finish_non_exhaustive()
    }
}

impl Default for QpnTable {
    fn default() -> Self {
        Self::new()
    }
}

impl QpnTable {
    pub fn new() -> Self {
        Self { pages: (0..PAGE).map(|_| OnceLock::new()).collect() }
    }

    /// The token of a QP number, `None` for a number nobody has.
    #[inline]
    pub fn get(&self, qpn: PQpn) -> Option<usize> {
        let (page, entry) = place(qpn)?;
        let token = self.pages[page].get()?[entry].load(Ordering::Acquire);
        (token != 0).then_some(token)
    }

    /// Names a QP number's owner and returns the one before. `token` 0 means nobody. A number of more than 24 bits
    /// is no QP number and is ignored.
    pub fn set(&self, qpn: PQpn, token: usize) -> Option<usize> {
        let (page, entry) = place(qpn)?;
        if token == 0 && self.pages[page].get().is_none() {
            return None;
        }
        let page = self.pages[page].get_or_init(|| (0..PAGE).map(|_| AtomicUsize::new(0)).collect());
        let old = page[entry].swap(token, Ordering::AcqRel);
        (old != 0).then_some(old)
    }

    /// Forgets a QP number, if it still belongs to `token`: the NIC may have given it to somebody new already.
    pub fn remove(&self, qpn: PQpn, token: usize) {
        if let Some((page, entry)) = place(qpn)
            && let Some(page) = self.pages[page].get()
        {
            let _ = page[entry].compare_exchange(token, 0, Ordering::AcqRel, Ordering::Relaxed);
        }
    }
}

fn place(qpn: PQpn) -> Option<(usize, usize)> {
    let page = (qpn.0 >> PAGE_BITS) as usize;
    (page < PAGE).then_some((page, qpn.0 as usize & (PAGE - 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_leads_to_its_owner_until_it_is_removed() {
        let table = QpnTable::new();
        assert_eq!(table.get(PQpn(17)), None);
        assert_eq!(table.set(PQpn(17), 0xa0), None);
        assert_eq!(table.set(PQpn(0xff_ffff), 0xb0), None);
        assert_eq!(table.get(PQpn(17)), Some(0xa0));
        assert_eq!(table.get(PQpn(0xff_ffff)), Some(0xb0));
        assert_eq!(table.get(PQpn(0x100_0000)), None);
        assert_eq!(table.set(PQpn(0xffff_ffff), 1), None);
        assert_eq!(table.set(PQpn(17), 0xc0), Some(0xa0));
        table.remove(PQpn(17), 0xa0);
        assert_eq!(table.get(PQpn(17)), Some(0xc0), "a late removal does not hit the number's next owner");
        table.remove(PQpn(17), 0xc0);
        assert_eq!(table.get(PQpn(17)), None);
    }
}
