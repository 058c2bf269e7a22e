//! The shadow of an open device: a whole op table of our own in front of the visible context, and what its queries
//! answer once the process lives on another host.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::mem::{offset_of, size_of, zeroed};
use std::ptr::{addr_of_mut, null_mut};
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use rdma_virt::id::{ObjId, VGid};
use rdma_virt::saved::{GidEntry, SgidMap};

use crate::abi::{EXTENDED, ibv_context, ibv_device, verbs_context};
use crate::entry::entry;
use crate::errno::Errno;
use crate::kept::Kept;
use crate::provider;
use crate::real::verbs;
use crate::registry::{self, Shadow};
use crate::tables::{LocalKeys, Qpns};
use crate::{control, descriptors, gate, ops};

/// What the application was told about its device on the host it opened it on. Once the process has moved, queries are
/// answered from here.
#[derive(Clone)]
pub struct View {
    /// Its GID table, empty entries left out.
    pub gids: Vec<GidEntry>,
    /// Where the entries in use are in the present device's table.
    pub sgid: Vec<SgidMap>,
    pub(crate) device: rdma_sys::ibv_device_attr,
    /// By port number, from 1.
    pub(crate) ports: Vec<rdma_sys::ibv_port_attr>,
}

/// An open device as the application sees it.
#[repr(C)]
pub struct ShadowContext {
    table: UnsafeCell<verbs_context>,
    pub id: ObjId,
    real: AtomicPtr<ibv_context>,
    /// Physical QPN to shadow QP.
    pub(crate) qpns: Qpns,
    /// The keys of this device's MRs, as held by the application and as the NIC knows them now.
    pub keys: LocalKeys,
    /// `None` as long as the process is where it opened the device.
    pub view: RwLock<Option<View>>,
    /// Asynchronous events that the kernel has no longer and the application not yet.
    pub(crate) kept: Kept,
    dead: AtomicBool,
}

// SAFETY: the table is written before the context is handed out and only read afterwards; the rest is atomic or locked.
unsafe impl Send for ShadowContext {}
// SAFETY: as above.
unsafe impl Sync for ShadowContext {}

impl ShadowContext {
    fn new(real: *mut ibv_context) -> Arc<Self> {
        let this = Arc::new(Self {
            // SAFETY: all-zero is a valid table: no ops, null pointers.
            table: UnsafeCell::new(unsafe { zeroed() }),
            id: registry::next_id(),
            real: AtomicPtr::new(real),
            qpns: Qpns::new(),
            keys: LocalKeys::new(),
            view: RwLock::new(None),
            kept: Kept::new(),
            dead: AtomicBool::new(false),
        });
        let table = this.table.get();
        // SAFETY: nobody else knows the table yet; `real` is what ibv_open_device returned.
        unsafe {
            let visible = addr_of_mut!((*table).context);
            (*visible).device = (*real).device;
            (*visible).cmd_fd = (*real).cmd_fd;
            (*visible).async_fd = (*real).async_fd;
            (*visible).num_comp_vectors = (*real).num_comp_vectors;
            (*visible).abi_compat = (*real).abi_compat;
            libc::pthread_mutex_init(addr_of_mut!((*visible).mutex), std::ptr::null());
            (*table).sz = size_of::<verbs_context>();
            ops::fill(&mut *table, real);
        }
        this
    }

    /// What the application holds.
    pub fn visible(&self) -> *mut ibv_context {
        // SAFETY: only an address is computed.
        unsafe { addr_of_mut!((*self.table.get()).context) }
    }

    /// libibverbs' own context.
    pub fn real(&self) -> *mut ibv_context {
        self.real.load(Ordering::Acquire)
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub fn cmd_fd(&self) -> i32 {
        // SAFETY: the real context lives as long as this one is not dead.
        unsafe { (*self.real()).cmd_fd }
    }

    pub fn async_fd(&self) -> i32 {
        // SAFETY: as above.
        unsafe { (*self.real()).async_fd }
    }

    /// What the application opened, wherever the process is now.
    pub(crate) fn device(&self) -> *mut ibv_device {
        // SAFETY: the visible part lives as long as this one; the member is written once.
        unsafe { (*self.visible()).device }
    }

    /// Name of the device the application opened, for example `rxe0`.
    pub fn device_name(&self) -> String {
        // SAFETY: libibverbs keeps a device as long as a context of it.
        unsafe { name_of(self.device()) }
    }

    /// The kernel's name of the driver, as this host's agent reads it too.
    pub fn driver_name(&self) -> String {
        match self.driver() {
            // SAFETY: the real context lives as long as this one is not dead, and keeps its device.
            "other" => provider::kernel_driver(&unsafe { name_of((*self.real()).device) }),
            known => known.to_owned(),
        }
    }

    /// Which of the providers we know drives it: `rxe` or `other`.
    pub fn driver(&self) -> &'static str {
        // SAFETY: the real context is live; the op is only looked at.
        let op = unsafe { (*self.real()).ops.poll_cq };
        op.map_or("other", |op| provider::name_of(op as usize))
    }

    /// From now on the provider's doorbell goes by ioctl: this process did not open the device file itself, and the
    /// kernel refuses `write` on it.
    pub fn set_handed_over(&self, value: bool) {
        provider::rxe::set_handed_over(self.cmd_fd(), value);
    }

    /// Opens the device of that name and stands for it from now on. The files get the numbers the application knows.
    /// What libibverbs held of the device before is not touched any more: it speaks of another host's.
    pub fn rebuild(&self, name: &str) -> Result<(), Errno> {
        let opened = open(name)?;
        // SAFETY: just opened, known to nobody else; the old one is only read.
        unsafe {
            let numbers = (self.cmd_fd(), self.async_fd());
            let moved = descriptors::take_place((*opened).cmd_fd, numbers.0)
                .inspect(|now| (*opened).cmd_fd = *now)
                .and_then(|_| descriptors::take_place((*opened).async_fd, numbers.1))
                .inspect(|now| (*opened).async_fd = *now);
            if let Err(e) = moved {
                let _ = verbs::close_device(opened);
                return Err(Errno(e.raw_os_error().unwrap_or(libc::EIO)));
            }
        }
        self.real.store(opened, Ordering::Release);
        Ok(())
    }

    /// Asks the real device everything a [`View`] holds.
    pub fn capture_view(&self) -> Result<View, Errno> {
        crate::query::capture(self)
    }

    pub fn set_view(&self, view: Option<View>) {
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = view;
    }

    /// Index in the present device's GID table of what the application calls `index`.
    pub(crate) fn physical_sgid(&self, port: u8, index: u8) -> u8 {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        view.as_ref()
            .and_then(|v| v.sgid.iter().find(|m| m.port == port && m.virtual_index == index))
            .map_or(index, |m| m.physical_index)
    }

    /// The application's GID at that place of its table.
    pub(crate) fn virtual_gid(&self, port: u8, index: u32) -> Option<Option<VGid>> {
        let view = self.view.read().unwrap_or_else(PoisonError::into_inner);
        view.as_ref().map(|v| v.gids.iter().find(|g| g.port == port && u32::from(g.index) == index).map(|g| g.gid))
    }
}

/// # Safety
/// `device` is null or one that libibverbs keeps.
unsafe fn name_of(device: *mut ibv_device) -> String {
    if device.is_null() {
        return String::new();
    }
    // SAFETY: an array of chars that ends in NUL, written once by libibverbs.
    unsafe { CStr::from_ptr((*device).name.as_ptr()) }.to_string_lossy().into_owned()
}

/// The live objects of a device, in order of creation.
macro_rules! objects {
    ($($name:ident: $ty:ty;)*) => {
        impl ShadowContext {$(
            pub fn $name(&self) -> Vec<Arc<$ty>> {
                registry::all(Some(self))
            }
        )*}
    };
}
objects! {
    pds: crate::pd::ShadowPd;
    channels: crate::channel::ShadowChannel;
    cqs: crate::cq::ShadowCq;
    srqs: crate::srq::ShadowSrq;
    qps: crate::qp::ShadowQp;
    mrs: crate::mr::ShadowMr;
}

/// libibverbs' context of the device with that name.
fn open(name: &str) -> Result<*mut ibv_context, Errno> {
    let mut n = 0;
    // SAFETY: the list ends in null and is given back; an open context keeps its device.
    unsafe {
        let list = verbs::get_device_list(&raw mut n)?;
        if list.is_null() {
            return Err(Errno::last());
        }
        let devices = std::slice::from_raw_parts(list, usize::try_from(n).unwrap_or(0));
        let opened = match devices.iter().find(|d| name_of(**d) == name) {
            Some(device) => {
                let context = verbs::open_device(*device)?;
                if context.is_null() { Err(Errno::last()) } else { Ok(context) }
            }
            None => Err(Errno(libc::ENODEV)),
        };
        verbs::free_device_list(list)?;
        opened
    }
}

/// The extended table `real` is the last member of, if it reaches back to the field at `offset` of our table.
pub(crate) fn table_of(real: *mut ibv_context, offset: usize) -> Option<*const verbs_context> {
    // SAFETY: `real` is a live context; abi_compat says that it is part of an extended one.
    unsafe {
        if (*real).abi_compat != EXTENDED {
            return None;
        }
        let table = real.byte_sub(offset_of!(verbs_context, context)).cast::<verbs_context>().cast_const();
        ((*table).sz >= size_of::<verbs_context>() - offset).then_some(table)
    }
}

/// The real context behind whatever the caller holds.
pub(crate) fn unwrap(context: *mut ibv_context) -> *mut ibv_context {
    registry::find::<ShadowContext>(context).map_or(context, |c| c.real())
}

/// Whether the application has the provider's library linked by itself, for verbs beyond libibverbs' ("direct verbs"):
/// those take the library's own objects and would not know ours. A plugin that libibverbs loaded has a name of its own.
fn uses_direct_verbs(real: *mut ibv_context) -> Option<String> {
    // SAFETY: a live context; the op is only looked at.
    let op = unsafe { (*real).ops.poll_cq }? as usize;
    let file = provider::elf::file_of(op)?;
    let name = file.rsplit('/').next()?;
    (!name.contains("-rdmav") && !name.contains("libibverbs")).then(|| name.to_owned())
}

/// Hands a context just opened to the application.
fn adopt(real: *mut ibv_context) -> *mut ibv_context {
    if let Some(library) = uses_direct_verbs(real) {
        crate::blockers::note("ibv_open_device", format!("direct verbs of {library}"), 0);
        control::start();
        return real;
    }
    let shadow = ShadowContext::new(real);
    registry::add(&shadow);
    provider::rxe::patch();
    control::start();
    shadow.visible()
}

entry! {
    /// Opens a device: the moment from which this process has something to move.
    "IBVERBS_1.1" fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context, fail null, |real| {
        let _pass = gate::enter("ibv_open_device");
        // SAFETY: the caller's promise.
        let context = unsafe { real(device) };
        if context.is_null() { return null_mut() }
        adopt(context)
    }

    /// A device opened by another process: works, cannot be moved.
    "IBVERBS_1.10" fn ibv_import_device(cmd_fd: i32) -> *mut ibv_context, fail null, |real| {
        let _pass = gate::enter("ibv_import_device");
        // SAFETY: the caller's promise.
        let context = unsafe { real(cmd_fd) };
        if context.is_null() { return null_mut() }
        let visible = adopt(context);
        crate::blockers::note("ibv_import_device", format!("fd {cmd_fd}"), visible as usize);
        visible
    }

    /// Closes a device.
    "IBVERBS_1.1" fn ibv_close_device(context: *mut ibv_context) -> i32, fail minus_one, |real| {
        let Some(shadow) = registry::find::<ShadowContext>(context) else {
            // SAFETY: not ours, the caller's promise.
            return unsafe { real(context) };
        };
        let _pass = gate::enter("ibv_close_device");
        shadow.drop_kept();
        provider::rxe::set_handed_over(shadow.cmd_fd(), false);
        shadow.dead.store(true, Ordering::Release);
        registry::remove(&*shadow);
        crate::blockers::forget(shadow.address());
        // SAFETY: the real context of a live shadow; marked dead above.
        unsafe { real(shadow.real()) }
    }
}
