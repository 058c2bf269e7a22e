//! Finds the real libibverbs' functions behind our own of the same name.
//!
//! Each is looked up once, at its first call, and only in processes that made such a call: a preloaded library has no
//! business loading or resolving anything in a process without RDMA.
#![expect(unsafe_code, reason = "dlvsym")]

use std::ffi::CStr;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::c_void;

const LIBRARY: &CStr = c"libibverbs.so.1";

/// One function of the real library.
#[derive(Debug)]
pub struct Symbol {
    name: &'static CStr,
    version: &'static CStr,
    address: AtomicPtr<c_void>,
}

impl Symbol {
    /// `name` and `version` (as in libibverbs' version script) end in NUL; checked at compile time where this is used
    /// in a `static`.
    pub const fn new(name: &'static str, version: &'static str) -> Self {
        let (Ok(name), Ok(version)) =
            (CStr::from_bytes_with_nul(name.as_bytes()), CStr::from_bytes_with_nul(version.as_bytes()))
        else {
            panic!("a symbol's name ends in NUL")
        };
        Self { name, version, address: AtomicPtr::new(null_mut()) }
    }

    /// Its address; `None` if this libibverbs is too old to have it, or is not there at all.
    pub fn address(&self) -> Option<*mut c_void> {
        let known = self.address.load(Ordering::Acquire);
        let found = if known.is_null() { self.resolve() } else { known };
        (!found.is_null()).then_some(found)
    }

    #[cold]
    fn resolve(&self) -> *mut c_void {
        let found = self.look_in(libc::RTLD_NEXT);
        let found = if found.is_null() {
            // An application that opened the library by itself, without RTLD_GLOBAL, has it outside of the order
            // RTLD_NEXT walks.
            // SAFETY: RTLD_NOLOAD: nothing is loaded, no constructor runs.
            let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOLOAD | libc::RTLD_LAZY) };
            if handle.is_null() { null_mut() } else { self.look_in(handle) }
        } else {
            found
        };
        self.address.store(found, Ordering::Release);
        found
    }

    fn look_in(&self, handle: *mut c_void) -> *mut c_void {
        // SAFETY: both strings end in NUL; the handle is RTLD_NEXT or one dlopen gave us.
        let found = unsafe { libc::dlvsym(handle, self.name.as_ptr(), self.version.as_ptr()) };
        if !found.is_null() {
            return found;
        }
        // SAFETY: as above.
        unsafe { libc::dlsym(handle, self.name.as_ptr()) }
    }
}

/// The real verbs that other modules and `control` call by themselves, outside of the entry of the same name. All take
/// real objects.
pub mod verbs {
    use super::Symbol;
    use crate::abi::{
        ibv_async_event, ibv_comp_channel, ibv_context, ibv_cq, ibv_device, ibv_mr, ibv_pd, ibv_qp, ibv_qp_attr,
        ibv_qp_init_attr, ibv_srq, ibv_srq_attr, ibv_srq_init_attr,
    };
    use crate::errno::Errno;
    use libc::{c_int, c_uint, c_void, ssize_t};

    macro_rules! real {
        ($($version:literal fn $name:ident as $short:ident($($arg:ident: $ty:ty),*) -> $ret:ty;)*) => {$(
            #[doc = concat!("The real `", stringify!($name), "`; `Err(ENOSYS)` if this libibverbs has none.")]
            ///
            /// # Safety
            /// As the verb's manual page; every object is a real one.
            pub unsafe fn $short($($arg: $ty),*) -> Result<$ret, Errno> {
                type Signature = unsafe extern "C" fn($($ty),*) -> $ret;
                static SYMBOL: Symbol = Symbol::new(concat!(stringify!($name), "\0"), concat!($version, "\0"));
                let address = SYMBOL.address().ok_or(Errno(libc::ENOSYS))?;
                // SAFETY: libibverbs' function of this name has this signature; the caller's promise.
                Ok(unsafe { std::mem::transmute::<*mut c_void, Signature>(address)($($arg),*) })
            }
        )*};
    }

    real! {
        "IBVERBS_1.1" fn ibv_ack_cq_events as ack_cq_events(cq: *mut ibv_cq, n: c_uint) -> ();
        "IBVERBS_1.1" fn ibv_ack_async_event as ack_async_event(event: *mut ibv_async_event) -> ();
        "IBVERBS_1.1" fn ibv_get_device_list as get_device_list(num: *mut c_int) -> *mut *mut ibv_device;
        "IBVERBS_1.1" fn ibv_free_device_list as free_device_list(list: *mut *mut ibv_device) -> ();
        "IBVERBS_1.1" fn ibv_open_device as open_device(device: *mut ibv_device) -> *mut ibv_context;
        "IBVERBS_1.1" fn ibv_close_device as close_device(context: *mut ibv_context) -> c_int;
        "IBVERBS_1.1" fn ibv_alloc_pd as alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
        "IBVERBS_1.1" fn ibv_dealloc_pd as dealloc_pd(pd: *mut ibv_pd) -> c_int;
        "IBVERBS_1.0" fn ibv_create_comp_channel as create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
        "IBVERBS_1.0" fn ibv_destroy_comp_channel as destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
        "IBVERBS_1.1" fn ibv_create_srq as create_srq(pd: *mut ibv_pd, attr: *mut ibv_srq_init_attr) -> *mut ibv_srq;
        "IBVERBS_1.1" fn ibv_query_srq as query_srq(srq: *mut ibv_srq, attr: *mut ibv_srq_attr) -> c_int;
        "IBVERBS_1.1" fn ibv_create_cq as create_cq(context: *mut ibv_context, cqe: c_int, cq_context: *mut c_void, channel: *mut ibv_comp_channel, vector: c_int) -> *mut ibv_cq;
        "IBVERBS_1.1" fn ibv_destroy_cq as destroy_cq(cq: *mut ibv_cq) -> c_int;
        "IBVERBS_1.1" fn ibv_create_qp as create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp;
        "IBVERBS_1.1" fn ibv_modify_qp as modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
        "IBVERBS_1.1" fn ibv_destroy_qp as destroy_qp(qp: *mut ibv_qp) -> c_int;
        "IBVERBS_1.8" fn ibv_reg_mr_iova2 as reg_mr(pd: *mut ibv_pd, addr: *mut c_void, length: usize, iova: u64, access: c_uint) -> *mut ibv_mr;
        "IBVERBS_1.1" fn ibv_dereg_mr as dereg_mr(mr: *mut ibv_mr) -> c_int;
        "IBVERBS_1.1" fn ibv_query_device as query_device(context: *mut ibv_context, attr: *mut c_void) -> c_int;
        "IBVERBS_1.1" fn ibv_query_port as query_port(context: *mut ibv_context, port: u8, attr: *mut c_void) -> c_int;
        "IBVERBS_1.11" fn _ibv_query_gid_table as query_gid_table(context: *mut ibv_context, entries: *mut c_void, max: usize, flags: u32, size: usize) -> ssize_t;
        "IBVERBS_1.11" fn _ibv_query_gid_ex as query_gid_ex(context: *mut ibv_context, port: u32, index: u32, entry: *mut c_void, flags: u32, size: usize) -> c_int;
    }
}
