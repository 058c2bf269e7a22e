//! Memory regions. The application keeps the keys of the first registration; the NIC's may change with every move.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use libc::{c_int, c_uint, c_void};
use rdma_virt::id::{ObjId, PLkey, PRkey, VLkey, VRkey};

use crate::abi::{ibv_mr, ibv_pd};
use crate::entry::entry;
use crate::errno::{Errno, set_errno};
use crate::pd::{self, ShadowPd};
use crate::real::verbs;
use crate::registry::{self, Shadow};
use crate::{backing, blockers, gate};

/// Flags of `ibv_rereg_mr`.
const CHANGE_TRANSLATION: c_int = 1 << 0;
const CHANGE_PD: c_int = 1 << 1;
const CHANGE_ACCESS: c_int = 1 << 2;

/// What was registered; `ibv_rereg_mr` changes it.
#[derive(Clone, Copy, Debug)]
pub struct Range {
    pub addr: u64,
    pub length: u64,
    pub iova: u64,
    /// `enum ibv_access_flags`.
    pub access: u32,
}

/// A memory region as the application sees it.
#[repr(C)]
pub struct ShadowMr {
    visible: UnsafeCell<ibv_mr>,
    pub id: ObjId,
    pd: Mutex<Arc<ShadowPd>>,
    real: AtomicPtr<ibv_mr>,
    range: Mutex<Range>,
    /// Its part in memory that lies in a file.
    hold: Mutex<backing::Hold>,
    dead: AtomicBool,
}

// SAFETY: the visible part is written under the gate by verbs on this object only; the rest is atomic or locked.
unsafe impl Send for ShadowMr {}
// SAFETY: as above.
unsafe impl Sync for ShadowMr {}

impl ShadowMr {
    pub(crate) fn adopt(pd: Arc<ShadowPd>, real: *mut ibv_mr, range: Range, hold: backing::Hold) -> *mut ibv_mr {
        if real.is_null() {
            let errno = Errno::last();
            backing::release(hold);
            set_errno(errno.0);
            return null_mut();
        }
        // SAFETY: the library just returned it.
        let visible = unsafe {
            ibv_mr {
                context: pd.ctx().visible(),
                pd: pd.visible(),
                addr: (*real).addr,
                length: (*real).length,
                handle: (*real).handle,
                lkey: (*real).lkey,
                rkey: (*real).rkey,
            }
        };
        let shadow = Arc::new(Self {
            visible: UnsafeCell::new(visible),
            id: registry::next_id(),
            pd: Mutex::new(pd),
            real: AtomicPtr::new(real),
            range: Mutex::new(range),
            hold: Mutex::new(hold),
            dead: AtomicBool::new(false),
        });
        shadow.publish();
        registry::add(&shadow) as *mut ibv_mr
    }

    pub fn pd(&self) -> Arc<ShadowPd> {
        self.pd.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn visible(&self) -> *mut ibv_mr {
        self.visible.get()
    }

    pub fn real(&self) -> *mut ibv_mr {
        self.real.load(Ordering::Acquire)
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub fn range(&self) -> Range {
        *self.range.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_hold(&self, other: backing::Hold) -> backing::Hold {
        std::mem::replace(&mut *self.hold.lock().unwrap_or_else(PoisonError::into_inner), other)
    }

    pub fn vlkey(&self) -> VLkey {
        // SAFETY: live visible part.
        VLkey(unsafe { (*self.visible()).lkey })
    }

    pub fn vrkey(&self) -> VRkey {
        // SAFETY: live visible part.
        VRkey(unsafe { (*self.visible()).rkey })
    }

    pub fn plkey(&self) -> PLkey {
        // SAFETY: the real MR of a shadow that is not dead.
        PLkey(unsafe { (*self.real()).lkey })
    }

    pub fn prkey(&self) -> PRkey {
        // SAFETY: as above.
        PRkey(unsafe { (*self.real()).rkey })
    }

    pub fn handle(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.real()).handle }
    }

    /// Makes the present pair of keys known to the data path.
    fn publish(&self) {
        self.pd().ctx().keys.insert(self.vlkey(), self.plkey(), self.vrkey(), self.prkey());
    }

    /// Points the library's object at another kernel object with these keys.
    pub fn patch(&self, handle: u32, lkey: u32, rkey: u32) {
        // SAFETY: as above; the caller has the gate shut.
        unsafe {
            let real = self.real();
            (*real).handle = handle;
            (*real).lkey = lkey;
            (*real).rkey = rkey;
        }
        self.publish();
    }

    /// Registers the memory anew behind the same keys. The former kernel object is not touched: it is on another host.
    pub fn reregister(&self) -> Result<(), Errno> {
        let range = self.range();
        // SAFETY: memory the application registered before; a real PD.
        let fresh = unsafe {
            verbs::reg_mr(self.pd().real(), range.addr as *mut c_void, range.length as usize, range.iova, range.access)
        }?;
        if fresh.is_null() {
            return Err(Errno::last());
        }
        // The object of the former registration stays allocated: freeing it is libibverbs' business, which would tell
        // the kernel about a handle that now means something else.
        self.real.store(fresh, Ordering::Release);
        self.publish();
        Ok(())
    }
}

/// Registers until the NIC gives keys that can be shown to the application as they are: after a move some numbers
/// already mean something else to it, or to a peer.
///
/// # Safety
/// `register` registers with the library and returns its MR or null.
unsafe fn register(pd: &ShadowPd, mut register: impl FnMut() -> *mut ibv_mr) -> *mut ibv_mr {
    /// Numbers that can be taken are as many as MRs were moved; a NIC that keeps offering them is out of others.
    const MOST: usize = 1 << 16;
    let keys = &pd.ctx().keys;
    let mut unwanted = Vec::new();
    let found = loop {
        let mr = register();
        // SAFETY: the library just returned it.
        if mr.is_null() || unwanted.len() == MOST || unsafe { keys.may_show(PLkey((*mr).lkey), PRkey((*mr).rkey)) } {
            break mr;
        }
        unwanted.push(mr);
    };
    for mr in unwanted {
        // SAFETY: registered above, shown to nobody.
        let _ = unsafe { verbs::dereg_mr(mr) };
    }
    found
}

/// The real MR behind whatever the caller holds.
pub(crate) fn unwrap(mr: *mut ibv_mr) -> *mut ibv_mr {
    registry::find::<ShadowMr>(mr).map_or(mr, |m| m.real())
}

entry! {
    "IBVERBS_1.1" fn ibv_reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> *mut ibv_mr, fail null, |real| {
        let Some(shadow) = registry::find::<ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, addr, length, access) };
        };
        let _pass = gate::enter("ibv_reg_mr");
        let range = Range { addr: addr as u64, length: length as u64, iova: addr as u64, access: access as u32 };
        let hold = backing::acquire(range.addr, range.length, range.access);
        // SAFETY: a real PD; the caller's memory.
        let mr = unsafe { register(&shadow, || real(shadow.real(), addr, length, access)) };
        ShadowMr::adopt(shadow, mr, range, hold)
    }

    "IBVERBS_1.7" fn ibv_reg_mr_iova(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_int) -> *mut ibv_mr, fail null, |real| {
        let Some(shadow) = registry::find::<ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, addr, length, iova, access) };
        };
        let _pass = gate::enter("ibv_reg_mr_iova");
        let hold = backing::acquire(addr as u64, length as u64, access as u32);
        // SAFETY: a real PD; the caller's memory.
        let mr = unsafe { register(&shadow, || real(shadow.real(), addr, length, iova, access)) };
        ShadowMr::adopt(shadow, mr, Range { addr: addr as u64, length: length as u64, iova, access: access as u32 }, hold)
    }

    "IBVERBS_1.8" fn ibv_reg_mr_iova2(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_uint) -> *mut ibv_mr, fail null, |real| {
        let Some(shadow) = registry::find::<ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd, addr, length, iova, access) };
        };
        let _pass = gate::enter("ibv_reg_mr_iova2");
        let hold = backing::acquire(addr as u64, length as u64, access);
        // SAFETY: a real PD; the caller's memory.
        let mr = unsafe { register(&shadow, || real(shadow.real(), addr, length, iova, access)) };
        ShadowMr::adopt(shadow, mr, Range { addr: addr as u64, length: length as u64, iova, access }, hold)
    }

    /// Memory of another device's buffer: works, cannot be moved.
    "IBVERBS_1.12" fn ibv_reg_dmabuf_mr(pd: *mut ibv_pd, offset: u64, length: usize, iova: u64, fd: c_int, access: c_int) -> *mut ibv_mr, fail null, |real| {
        let _pass = gate::enter("ibv_reg_dmabuf_mr");
        // SAFETY: the caller's promise; a real PD.
        let mr = unsafe { real(pd::unwrap(pd), offset, length, iova, fd, access) };
        foreign(pd, mr, "ibv_reg_dmabuf_mr")
    }

    "IBVERBS_1.10" fn ibv_import_mr(pd: *mut ibv_pd, handle: u32) -> *mut ibv_mr, fail null, |real| {
        let _pass = gate::enter("ibv_import_mr");
        // SAFETY: the caller's promise; a real PD.
        let mr = unsafe { real(pd::unwrap(pd), handle) };
        foreign(pd, mr, "ibv_import_mr")
    }

    "IBVERBS_1.10" fn ibv_unimport_mr(mr: *mut ibv_mr), fail nothing, |real| {
        let Some(shadow) = registry::find::<ShadowMr>(mr) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(mr) };
        };
        let _pass = gate::enter("ibv_unimport_mr");
        bury(&shadow);
        // SAFETY: the real MR of a live shadow.
        unsafe { real(shadow.real()) }
    }

    "IBVERBS_1.1" fn ibv_rereg_mr(mr: *mut ibv_mr, flags: c_int, pd: *mut ibv_pd, addr: *mut c_void, length: usize, access: c_int) -> c_int, fail minus_one, |real| {
        let Some(shadow) = registry::find::<ShadowMr>(mr) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(mr, flags, pd::unwrap(pd), addr, length, access) };
        };
        let _pass = gate::enter("ibv_rereg_mr");
        let moves = flags & CHANGE_TRANSLATION != 0;
        let hold = if moves { backing::acquire_as_is(addr as u64, length as u64) } else { backing::Hold::default() };
        // SAFETY: real objects; the caller's memory.
        let answer = unsafe { real(shadow.real(), flags, pd::unwrap(pd), addr, length, access) };
        // Of the new range and the old one, that which is not registered is let go.
        let other = if answer == 0 && moves { shadow.take_hold(hold) } else { hold };
        backing::release(other);
        if answer == 0 {
            let mut range = shadow.range.lock().unwrap_or_else(PoisonError::into_inner);
            if flags & CHANGE_TRANSLATION != 0 {
                *range = Range { addr: addr as u64, length: length as u64, iova: addr as u64, ..*range };
            }
            if flags & CHANGE_ACCESS != 0 {
                range.access = access as u32;
            }
            drop(range);
            if flags & CHANGE_PD != 0
                && let Some(new) = registry::find::<ShadowPd>(pd)
            {
                // SAFETY: live visible part.
                unsafe { (*shadow.visible()).pd = new.visible() };
                *shadow.pd.lock().unwrap_or_else(PoisonError::into_inner) = new;
            }
            shadow.pd().ctx().keys.remove(shadow.vlkey());
            // SAFETY: live visible and real parts. The verb may hand out new keys, which the application then knows.
            unsafe {
                let (visible, real_mr) = (shadow.visible(), shadow.real());
                (*visible).addr = (*real_mr).addr;
                (*visible).length = (*real_mr).length;
                (*visible).lkey = (*real_mr).lkey;
                (*visible).rkey = (*real_mr).rkey;
                (*visible).handle = (*real_mr).handle;
            }
            shadow.publish();
        }
        answer
    }

    "IBVERBS_1.1" fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowMr>(mr) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(mr) };
        };
        let _pass = gate::enter("ibv_dereg_mr");
        // SAFETY: the real MR of a live shadow.
        let answer = unsafe { real(shadow.real()) };
        if answer == 0 {
            bury(&shadow);
        }
        answer
    }
}

fn bury(shadow: &ShadowMr) {
    shadow.dead.store(true, Ordering::Release);
    shadow.pd().ctx().keys.remove(shadow.vlkey());
    registry::remove(shadow);
    blockers::forget(shadow.address());
    backing::release(shadow.take_hold(backing::Hold::default()));
}

/// An MR that works but cannot be made again elsewhere.
pub(crate) fn foreign(pd: *mut ibv_pd, mr: *mut ibv_mr, verb: &str) -> *mut ibv_mr {
    let Some(shadow) = registry::find::<ShadowPd>(pd) else { return mr };
    if mr.is_null() {
        return mr;
    }
    // SAFETY: the library just returned it.
    let (addr, length, lkey) = unsafe { ((*mr).addr as u64, (*mr).length as u64, (*mr).lkey) };
    let mr = ShadowMr::adopt(shadow, mr, Range { addr, length, iova: addr, access: 0 }, backing::Hold::default());
    blockers::note(verb, format!("mr with lkey {lkey:#x}"), mr as usize);
    mr
}
