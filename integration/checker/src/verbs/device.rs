//! Devices, contexts, ports, GIDs and protection domains.
#![expect(unsafe_code, reason = "calls libibverbs")]

use super::{check, last};
use rdma_sys as ib;
use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

/// An open device.
#[derive(Debug)]
pub struct Context {
    pub(super) ptr: *mut ib::ibv_context,
}

// SAFETY: libibverbs contexts may be used from any thread.
unsafe impl Send for Context {}
// SAFETY: as above; every call used here is documented as thread safe.
unsafe impl Sync for Context {}

/// What identifies a device to an application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name, such as `rxe0`.
    pub name: String,
    /// Name of the device node, such as `uverbs0`.
    pub node: String,
    /// Path in sysfs of the verbs device.
    pub dev_path: String,
    /// Path in sysfs of the RDMA device.
    pub ibdev_path: String,
    /// GUID as returned by `ibv_get_device_guid`, network order.
    pub guid: u64,
    /// Node GUID as returned by `ibv_query_device`, network order.
    pub node_guid: u64,
    /// System image GUID, network order.
    pub sys_image_guid: u64,
    /// Limits an application may have sized itself by: QPs, WRs, SGEs, CQs, CQEs, MRs, PDs, RD atoms.
    pub limits: [i32; 8],
}

/// What a port says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortInfo {
    /// `enum ibv_port_state`; 4 is active.
    pub state: u32,
    /// `enum ibv_mtu` in use.
    pub active_mtu: u32,
    /// Local identifier (0 on Ethernet).
    pub lid: u16,
    /// 2 is Ethernet.
    pub link_layer: u8,
    /// Entries of the GID table.
    pub gid_table_len: i32,
}

/// An asynchronous event, acknowledged already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent {
    /// `enum ibv_event_type`.
    pub kind: i32,
    /// Pointer of the object concerned, or the port number.
    pub element: u64,
}

impl AsyncEvent {
    /// A send queue is drained.
    pub const SQ_DRAINED: i32 = 5;
    /// A shared receive queue has few RECVs left.
    pub const SRQ_LIMIT_REACHED: i32 = 15;

    /// Whether it is about a QP, CQ or SRQ; others are about the port or the device.
    #[must_use]
    pub fn about_an_object(&self) -> bool {
        matches!(self.kind, 0..=7 | 14..=16)
    }

    /// Name and whether it means that a QP, CQ or SRQ of ours is broken.
    #[must_use]
    pub fn meaning(&self) -> (&'static str, bool) {
        match self.kind {
            0 => ("CQ error", true),
            1 => ("QP fatal", true),
            2 => ("QP request error", true),
            3 => ("QP access error", true),
            4 => ("communication established", false),
            5 => ("SQ drained", false),
            6 => ("path migrated", false),
            7 => ("path migration error", true),
            8 => ("device fatal", true),
            9 => ("port active", false),
            10 => ("port error", false),
            11 => ("LID change", false),
            12 => ("P_Key change", false),
            13 => ("SM change", false),
            14 => ("SRQ error", true),
            15 => ("SRQ limit reached", false),
            16 => ("last WQE reached", true),
            17 => ("client reregister", false),
            18 => ("GID change", false),
            _ => ("event of unknown type", true),
        }
    }
}

// The library's type for this is a Rust enum in rdma-sys, and a value outside of it, which a newer
// library may deliver, would be undefined behaviour; so it is received as plain integers.
#[repr(C)]
struct RawAsyncEvent {
    element: u64,
    kind: i32,
}
const _: () = assert!(size_of::<RawAsyncEvent>() == size_of::<ib::ibv_async_event>());

impl Context {
    /// Opens the device called `name`, or the first one.
    ///
    /// # Errors
    /// When there is no such device (the message lists those there are) or it cannot be opened.
    pub fn open(name: Option<&str>) -> io::Result<Self> {
        let mut n = 0;
        // SAFETY: out parameter is valid.
        let list = unsafe { ib::ibv_get_device_list(&raw mut n) };
        if list.is_null() {
            return Err(last("ibv_get_device_list"));
        }
        let count = usize::try_from(n).unwrap_or(0);
        let mut names = Vec::new();
        let mut found = Err(io::Error::new(io::ErrorKind::NotFound, "no RDMA device"));
        for i in 0..count {
            // SAFETY: the list has `count` entries.
            let dev = unsafe { *list.add(i) };
            // SAFETY: the device is valid while the list is.
            let this = text(unsafe { ib::ibv_get_device_name(dev) });
            if name.is_none_or(|want| want == this) {
                // SAFETY: as above.
                let ptr = unsafe { ib::ibv_open_device(dev) };
                found = if ptr.is_null() {
                    Err(last("ibv_open_device"))
                } else {
                    let this = Self { ptr };
                    this.never_block_on_events().map(|()| this)
                };
                break;
            }
            names.push(this);
        }
        // SAFETY: the list came from ibv_get_device_list; an open context keeps its device.
        unsafe { ib::ibv_free_device_list(list) };
        found.map_err(|e| match (e.kind(), name) {
            (io::ErrorKind::NotFound, Some(want)) => {
                io::Error::new(e.kind(), format!("no RDMA device called {want}; there are {names:?}"))
            }
            _ => e,
        })
    }

    /// Lists the devices and does nothing with them: the library loads its drivers for that.
    ///
    /// # Errors
    /// As the library says.
    pub fn list() -> io::Result<()> {
        let mut n = 0;
        // SAFETY: out parameter is valid.
        let list = unsafe { ib::ibv_get_device_list(&raw mut n) };
        if list.is_null() {
            return Err(last("ibv_get_device_list"));
        }
        // SAFETY: the list is the library's, and no device of it is kept.
        unsafe { ib::ibv_free_device_list(list) };
        Ok(())
    }

    /// Makes the asynchronous event descriptor non-blocking, so that it can be looked at in passing.
    fn never_block_on_events(&self) -> io::Result<()> {
        // SAFETY: the context is open.
        set_nonblocking(unsafe { (*self.ptr).async_fd })
    }

    /// Everything about the device that must look the same for ever.
    ///
    /// # Errors
    /// When the device does not answer.
    pub fn device(&self) -> io::Result<DeviceInfo> {
        // SAFETY: plain C data, filled by the call below.
        let mut a: ib::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open; the attribute is of the library's type.
        check("ibv_query_device", unsafe { ib::ibv_query_device(self.ptr, &raw mut a) })?;
        // SAFETY: `device` of an open context is valid.
        let (dev, guid) = unsafe {
            let d = (*self.ptr).device;
            (&*d, ib::ibv_get_device_guid(d))
        };
        Ok(DeviceInfo {
            // SAFETY: as above.
            name: text(unsafe { ib::ibv_get_device_name((*self.ptr).device) }),
            node: text(dev.dev_name.as_ptr()),
            dev_path: text(dev.dev_path.as_ptr()),
            ibdev_path: text(dev.ibdev_path.as_ptr()),
            guid,
            node_guid: a.node_guid,
            sys_image_guid: a.sys_image_guid,
            limits: [a.max_qp, a.max_qp_wr, a.max_sge, a.max_cq, a.max_cqe, a.max_mr, a.max_pd, a.max_qp_rd_atom],
        })
    }

    /// State of a port.
    ///
    /// # Errors
    /// When the port does not exist.
    pub fn port(&self, port: u8) -> io::Result<PortInfo> {
        // SAFETY: plain C data, filled by the call below.
        let mut a: ib::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the context is open; the real structure is larger than the compatibility type the
        // symbol is declared with, so whatever the library writes fits.
        check("ibv_query_port", unsafe { ib::ibv_query_port(self.ptr, port, (&raw mut a).cast()) })?;
        Ok(PortInfo {
            state: a.state,
            active_mtu: a.active_mtu,
            lid: a.lid,
            link_layer: a.link_layer,
            gid_table_len: a.gid_tbl_len,
        })
    }

    /// One entry of the GID table.
    ///
    /// # Errors
    /// When there is no such entry.
    pub fn gid(&self, port: u8, index: i32) -> io::Result<[u8; 16]> {
        let mut gid = ib::ibv_gid { raw: [0; 16] };
        // SAFETY: the context is open, the out parameter valid.
        check("ibv_query_gid", unsafe { ib::ibv_query_gid(self.ptr, port, index, &raw mut gid) })?;
        // SAFETY: every bit pattern is a valid byte array.
        Ok(unsafe { gid.raw })
    }

    /// Index of the first IPv4 GID, else of the first one that is not zero.
    ///
    /// # Errors
    /// When the port has no GID at all.
    pub fn usable_gid(&self, port: u8) -> io::Result<u8> {
        let len = self.port(port)?.gid_table_len.min(256);
        let mut first = None;
        for i in 0..len {
            let Ok(g) = self.gid(port, i) else { continue };
            let index = u8::try_from(i).unwrap_or(u8::MAX);
            if g[..10] == [0; 10] && g[10..12] == [0xff, 0xff] {
                return Ok(index);
            }
            if g != [0; 16] && first.is_none() {
                first = Some(index);
            }
        }
        first.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("port {port} has no GID")))
    }

    /// Makes a protection domain.
    ///
    /// # Errors
    /// As the library says.
    pub fn alloc_pd(&self) -> io::Result<Pd> {
        // SAFETY: the context is open.
        let ptr = unsafe { ib::ibv_alloc_pd(self.ptr) };
        if ptr.is_null() {
            return Err(last("ibv_alloc_pd"));
        }
        Ok(Pd { ptr })
    }

    /// Takes one pending asynchronous event, if there is one, and acknowledges it.
    #[must_use]
    pub fn async_event(&self) -> Option<AsyncEvent> {
        self.next_async_event().ok()
    }

    /// Takes one asynchronous event and acknowledges it; waits for one or says `WouldBlock` as the descriptor is set.
    ///
    /// # Errors
    /// As `read` on the descriptor.
    pub fn next_async_event(&self) -> io::Result<AsyncEvent> {
        let mut e = RawAsyncEvent { element: 0, kind: -1 };
        // SAFETY: same size and layout as the library's structure (asserted above).
        let rc = unsafe { ib::ibv_get_async_event(self.ptr, (&raw mut e).cast()) };
        if rc != 0 {
            return Err(io::Error::last_os_error());
        }
        let seen = AsyncEvent { kind: e.kind, element: e.element };
        // SAFETY: the event was filled by the call above and not acknowledged yet.
        unsafe { ib::ibv_ack_async_event((&raw mut e).cast()) };
        Ok(seen)
    }

    /// Makes the asynchronous event descriptor one that is waited on, as it is when a device is opened.
    ///
    /// # Errors
    /// As `fcntl` on the descriptor.
    pub fn block_on_events(&self) -> io::Result<()> {
        // SAFETY: plain descriptor flags of a descriptor the library owns.
        let rc = unsafe {
            let fd = (*self.ptr).async_fd;
            libc::fcntl(fd, libc::F_SETFL, libc::fcntl(fd, libc::F_GETFL) & !libc::O_NONBLOCK)
        };
        if rc < 0 { Err(last("fcntl")) } else { Ok(()) }
    }

    /// Whether the asynchronous event descriptor says within `patience` that there is an event.
    #[must_use]
    pub fn has_async_event(&self, patience: Duration) -> bool {
        // SAFETY: the context is open.
        let fd = unsafe { (*self.ptr).async_fd };
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let ms = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one pollfd of ours.
        unsafe { libc::poll(&raw mut poll, 1, ms) > 0 && poll.revents & libc::POLLIN != 0 }
    }

    /// Closes the device.
    ///
    /// # Errors
    /// As the library says; objects left over make it fail.
    pub fn close(self) -> io::Result<()> {
        // SAFETY: the context is open and consumed here.
        check("ibv_close_device", unsafe { ib::ibv_close_device(self.ptr) })
    }
}

/// A protection domain.
#[derive(Clone, Copy, Debug)]
pub struct Pd {
    pub(super) ptr: *mut ib::ibv_pd,
}

// SAFETY: libibverbs objects may be used from any thread.
unsafe impl Send for Pd {}
// SAFETY: as above.
unsafe impl Sync for Pd {}

impl Pd {
    /// Frees it.
    ///
    /// # Errors
    /// As the library says; objects left over make it fail.
    pub fn dealloc(self) -> io::Result<()> {
        // SAFETY: the caller destroys each domain once.
        check("ibv_dealloc_pd", unsafe { ib::ibv_dealloc_pd(self.ptr) })
    }
}

/// Makes `fork` safe for processes that registered memory. To be called before the first device is
/// opened.
///
/// # Errors
/// When the library refuses.
pub fn fork_init() -> io::Result<()> {
    // SAFETY: no precondition but the order of calls, which main keeps.
    check("ibv_fork_init", unsafe { ib::ibv_fork_init() })
}

pub(super) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: plain descriptor flags of a descriptor the library owns.
    let rc = unsafe {
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if rc < 0 { Err(last("fcntl")) } else { Ok(()) }
}

fn text(p: *const libc::c_char) -> String {
    if p.is_null() {
        return String::new();
    }
    // SAFETY: the library hands out terminated strings.
    unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
}
