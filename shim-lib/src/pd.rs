//! Protection domains.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use rdma_virt::id::ObjId;

use crate::abi::{ibv_context, ibv_pd};
use crate::context::ShadowContext;
use crate::entry::entry;
use crate::errno::Errno;
use crate::real::verbs;
use crate::registry::{self, Shadow};
use crate::{blockers, gate};

/// A protection domain as the application sees it.
#[repr(C)]
pub struct ShadowPd {
    visible: UnsafeCell<ibv_pd>,
    pub id: ObjId,
    ctx: Arc<ShadowContext>,
    real: AtomicPtr<ibv_pd>,
    dead: AtomicBool,
}

// SAFETY: the visible part is written before it is handed out and never by us afterwards; the rest is atomic.
unsafe impl Send for ShadowPd {}
// SAFETY: as above.
unsafe impl Sync for ShadowPd {}

impl ShadowPd {
    pub(crate) fn adopt(ctx: Arc<ShadowContext>, real: *mut ibv_pd) -> *mut ibv_pd {
        if real.is_null() {
            return null_mut();
        }
        // SAFETY: the library just returned it.
        let handle = unsafe { (*real).handle };
        let shadow = Arc::new(Self {
            visible: UnsafeCell::new(ibv_pd { context: ctx.visible(), handle }),
            id: registry::next_id(),
            ctx,
            real: AtomicPtr::new(real),
            dead: AtomicBool::new(false),
        });
        registry::add(&shadow) as *mut ibv_pd
    }

    pub fn ctx(&self) -> &Arc<ShadowContext> {
        &self.ctx
    }

    pub fn visible(&self) -> *mut ibv_pd {
        self.visible.get()
    }

    pub fn real(&self) -> *mut ibv_pd {
        self.real.load(Ordering::Acquire)
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// The kernel's handle now.
    pub fn handle(&self) -> u32 {
        // SAFETY: the real PD of a shadow that is not dead.
        unsafe { (*self.real()).handle }
    }

    /// Stands for a new PD of the present device from now on.
    pub fn rebuild(&self) -> Result<(), Errno> {
        // SAFETY: the real context of a live shadow.
        let made = unsafe { verbs::alloc_pd(self.ctx.real()) }?;
        if made.is_null() {
            return Err(Errno::last());
        }
        self.real.store(made, Ordering::Release);
        Ok(())
    }

    /// Points the library's object at another kernel object.
    pub fn patch(&self, handle: u32) {
        // SAFETY: as above; the caller holds the gate.
        unsafe { (*self.real()).handle = handle }
    }
}

/// The real PD behind whatever the caller holds.
pub(crate) fn unwrap(pd: *mut ibv_pd) -> *mut ibv_pd {
    registry::find::<ShadowPd>(pd).map_or(pd, |p| p.real())
}

entry! {
    "IBVERBS_1.1" fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd, fail null, |real| {
        let Some(ctx) = registry::find::<ShadowContext>(context) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(context) };
        };
        let _pass = gate::enter("ibv_alloc_pd");
        // SAFETY: the real context of a live shadow.
        let pd = unsafe { real(ctx.real()) };
        ShadowPd::adopt(ctx, pd)
    }

    "IBVERBS_1.1" fn ibv_dealloc_pd(pd: *mut ibv_pd) -> i32, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd) };
        };
        let _pass = gate::enter("ibv_dealloc_pd");
        // SAFETY: the real PD of a live shadow.
        let answer = unsafe { real(shadow.real()) };
        if answer == 0 {
            shadow.dead.store(true, Ordering::Release);
            registry::remove(&*shadow);
            blockers::forget(shadow.address());
        }
        answer
    }

    "IBVERBS_1.10" fn ibv_import_pd(context: *mut ibv_context, handle: u32) -> *mut ibv_pd, fail null, |real| {
        let Some(ctx) = registry::find::<ShadowContext>(context) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(context, handle) };
        };
        let _pass = gate::enter("ibv_import_pd");
        // SAFETY: the real context of a live shadow.
        let pd = unsafe { real(ctx.real(), handle) };
        let pd = ShadowPd::adopt(ctx, pd);
        if !pd.is_null() {
            blockers::note("ibv_import_pd", format!("pd handle {handle}"), pd as usize);
        }
        pd
    }

    "IBVERBS_1.10" fn ibv_unimport_pd(pd: *mut ibv_pd), fail nothing, |real| {
        let Some(shadow) = registry::find::<ShadowPd>(pd) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(pd) };
        };
        let _pass = gate::enter("ibv_unimport_pd");
        shadow.dead.store(true, Ordering::Release);
        registry::remove(&*shadow);
        blockers::forget(shadow.address());
        // SAFETY: the real PD of a live shadow.
        unsafe { real(shadow.real()) }
    }
}
