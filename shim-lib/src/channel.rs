//! Completion channels.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use rdma_virt::id::ObjId;

use crate::abi::{ibv_comp_channel, ibv_context};
use crate::context::ShadowContext;
use crate::entry::entry;
use crate::errno::Errno;
use crate::real::verbs;
use crate::registry;
use crate::{descriptors, gate};

/// A completion channel as the application sees it.
#[repr(C)]
pub struct ShadowChannel {
    visible: UnsafeCell<ibv_comp_channel>,
    pub id: ObjId,
    ctx: Arc<ShadowContext>,
    real: AtomicPtr<ibv_comp_channel>,
    dead: AtomicBool,
}

// SAFETY: the visible part's reference count is only touched through atomics; the rest is atomic.
unsafe impl Send for ShadowChannel {}
// SAFETY: as above.
unsafe impl Sync for ShadowChannel {}

impl ShadowChannel {
    pub fn ctx(&self) -> &Arc<ShadowContext> {
        &self.ctx
    }

    pub fn visible(&self) -> *mut ibv_comp_channel {
        self.visible.get()
    }

    pub fn real(&self) -> *mut ibv_comp_channel {
        self.real.load(Ordering::Acquire)
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// File descriptor events are read from.
    pub fn fd(&self) -> i32 {
        // SAFETY: the real channel of a shadow that is not dead.
        unsafe { (*self.real()).fd }
    }

    /// Stands for a new channel of the present device from now on, whose file gets the number the application knows.
    pub fn rebuild(&self) -> Result<(), Errno> {
        // SAFETY: the real context of a live shadow; a channel known to nobody else.
        unsafe {
            let made = verbs::create_comp_channel(self.ctx.real())?;
            if made.is_null() {
                return Err(Errno::last());
            }
            match descriptors::take_place((*made).fd, self.fd()) {
                Ok(now) => (*made).fd = now,
                Err(e) => {
                    let _ = verbs::destroy_comp_channel(made);
                    return Err(Errno(e.raw_os_error().unwrap_or(libc::EIO)));
                }
            }
            self.real.store(made, Ordering::Release);
        }
        Ok(())
    }

    /// Shows the application as many CQs on this channel as the library counts.
    pub(crate) fn sync_refcnt(&self) {
        // SAFETY: both are live; the library's own writers hold its lock, a torn read is not possible on an int.
        unsafe { (*self.visible()).refcnt = std::ptr::read_volatile(&raw const (*self.real()).refcnt) };
    }
}

/// The real channel behind whatever the caller holds.
pub(crate) fn unwrap(channel: *mut ibv_comp_channel) -> *mut ibv_comp_channel {
    registry::find::<ShadowChannel>(channel).map_or(channel, |c| c.real())
}

entry! {
    "IBVERBS_1.0" fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel, fail null, |real| {
        let Some(ctx) = registry::find::<ShadowContext>(context) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(context) };
        };
        let _pass = gate::enter("ibv_create_comp_channel");
        // SAFETY: the real context of a live shadow.
        let channel = unsafe { real(ctx.real()) };
        if channel.is_null() { return null_mut() }
        let shadow = Arc::new(ShadowChannel {
            visible: UnsafeCell::new(ibv_comp_channel {
                context: ctx.visible(),
                // SAFETY: the library just returned it.
                fd: unsafe { (*channel).fd },
                refcnt: 0,
            }),
            id: registry::next_id(),
            ctx,
            real: AtomicPtr::new(channel),
            dead: AtomicBool::new(false),
        });
        registry::add(&shadow) as *mut ibv_comp_channel
    }

    "IBVERBS_1.0" fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> i32, fail errno, |real| {
        let Some(shadow) = registry::find::<ShadowChannel>(channel) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(channel) };
        };
        let _pass = gate::enter("ibv_destroy_comp_channel");
        // SAFETY: the real channel of a live shadow.
        let answer = unsafe { real(shadow.real()) };
        if answer == 0 {
            shadow.dead.store(true, Ordering::Release);
            registry::remove(&*shadow);
        }
        answer
    }
}
