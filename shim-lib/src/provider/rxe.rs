//! Soft-RoCE's provider: where it maps its queues, and how it rings its doorbell.
//!
//! Two functions it imports are replaced by ours, in its table of imports only: `mmap`, to know the address, length and
//! offset of every queue and to keep queues out of forked children; and `write`, because the kernel refuses write
//! commands on a device file that another process opened, while it takes the same command through an ioctl.
#![expect(unsafe_code, reason = "replaces two imported functions of a C library")]

use std::cell::RefCell;
use std::ffi::c_void;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, off_t, size_t, ssize_t};
use rdma_virt::saved::QueueMap;

use super::elf;
use crate::entry::boundary;
use crate::errno::{Errno, set_errno};

/// Part of the provider's file name.
pub const LIBRARY: &str = "librxe-rdmav";

static PATCHED: Once = Once::new();

/// Replaces the imports once; nothing happens as long as the provider is not loaded.
pub fn patch() {
    let slots = elf::slots(LIBRARY, &[c"mmap", c"mmap64", c"write"]);
    if slots.is_empty() {
        return;
    }
    PATCHED.call_once(|| {
        for (which, slot) in slots {
            let ours = match which {
                0 | 1 => queue_mmap as *mut c_void,
                _ => doorbell as *mut c_void,
            };
            // SAFETY: same signatures as the functions of the C library.
            unsafe { elf::write_slot(slot, ours) };
        }
    });
}

// ---- queue mappings ------------------------------------------------------------------------------------------------

thread_local! {
    /// Mappings the provider makes while this thread is inside a verb that creates or resizes something.
    static MAPS: RefCell<Option<Vec<QueueMap>>> = const { RefCell::new(None) };
}

/// From now on this thread's queue mappings are recorded.
pub fn record_maps() {
    MAPS.with(|m| *m.borrow_mut() = Some(Vec::new()));
}

/// What was mapped since [`record_maps`], in order; recording ends.
pub fn take_maps() -> Vec<QueueMap> {
    MAPS.with(|m| m.borrow_mut().take()).unwrap_or_default()
}

unsafe extern "C" fn queue_mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the provider's own call, passed on.
    let mapped = unsafe { libc::mmap(addr, len, prot, flags, fd, offset) };
    if mapped == libc::MAP_FAILED {
        return mapped;
    }
    boundary(
        || {
            // A forked child that maps the queues too would keep them alive in the kernel and in a dump.
            // SAFETY: mapped just now.
            unsafe { libc::madvise(mapped, len, libc::MADV_DONTFORK) };
            let map = QueueMap { addr: mapped as u64, len: len as u64, offset: offset as u64 };
            MAPS.with(|m| {
                if let Some(list) = m.borrow_mut().as_mut() {
                    list.push(map);
                }
            });
        },
        || (),
    );
    mapped
}

/// Byte offsets of the indices in a queue's header, and of the entries behind it.
const PRODUCER: u64 = 128;
const CONSUMER: u64 = 256;

/// Whether the kernel has taken everything out of a send queue.
pub fn ring_is_empty(map: &QueueMap) -> bool {
    // SAFETY: a live queue mapping of the provider, at least a header long; both indices are naturally aligned words
    // that user space and kernel exchange atomically.
    unsafe {
        let producer = &*((map.addr + PRODUCER) as *const AtomicU32);
        let consumer = &*((map.addr + CONSUMER) as *const AtomicU32);
        producer.load(Ordering::Acquire) == consumer.load(Ordering::Acquire)
    }
}

// ---- doorbell ------------------------------------------------------------------------------------------------------

/// Whether any device file is handed over: until then the doorbell costs one load more than without us.
static ANY: AtomicBool = AtomicBool::new(false);
static HANDED_OVER: Mutex<Vec<c_int>> = Mutex::new(Vec::new());

/// Says that the device file at `fd` was opened by another process, or is no longer.
pub fn set_handed_over(fd: c_int, value: bool) {
    let mut list = HANDED_OVER.lock().unwrap_or_else(PoisonError::into_inner);
    list.retain(|f| *f != fd);
    if value {
        list.push(fd);
    }
    ANY.store(!list.is_empty(), Ordering::Release);
}

fn is_handed_over(fd: c_int) -> bool {
    ANY.load(Ordering::Acquire) && HANDED_OVER.lock().unwrap_or_else(PoisonError::into_inner).contains(&fd)
}

unsafe extern "C" fn doorbell(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
    // SAFETY: the provider's own call, in one form or the other.
    unsafe {
        if boundary(|| is_handed_over(fd), || false) {
            return by_ioctl(fd, buffer, count);
        }
        let written = libc::write(fd, buffer, count);
        if written < 0 && Errno::last().0 == libc::EACCES {
            // Refused for whose credentials the file was opened with: those of another process, of another thread (a
            // restored process' threads do not share theirs), or the ones this process had before it changed them.
            return by_ioctl(fd, buffer, count);
        }
        written
    }
}

/// `RDMA_VERBS_IOCTL`: `_IOWR(0x1b, 1, struct ib_uverbs_ioctl_hdr)`.
const RDMA_VERBS_IOCTL: libc::c_ulong = 0xc018_1b01;
const UVERBS_OBJECT_DEVICE: u16 = 0;
const UVERBS_METHOD_INVOKE_WRITE: u16 = 0;
const UVERBS_ATTR_CORE_IN: u16 = 0;
const UVERBS_ATTR_CORE_OUT: u16 = 1;
const UVERBS_ATTR_WRITE_CMD: u16 = 2;
const UVERBS_ATTR_F_MANDATORY: u16 = 1;
const RDMA_DRIVER_RXE: u32 = 14;

/// `struct ib_uverbs_attr`.
#[repr(C)]
struct Attr {
    id: u16,
    len: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}

/// `struct ib_uverbs_ioctl_hdr` with three attributes.
#[repr(C)]
struct Command {
    length: u16,
    object_id: u16,
    method_id: u16,
    num_attrs: u16,
    reserved1: u64,
    driver_id: u32,
    reserved2: u32,
    attrs: [Attr; 3],
}

/// Header of a write command, and the response pointer every such command starts with.
const WRITE_HEADER: usize = 8;

/// The write command in `buffer`, as an ioctl.
///
/// # Safety
/// `buffer` is `count` bytes of a command the provider built.
unsafe fn by_ioctl(fd: c_int, buffer: *const c_void, count: size_t) -> ssize_t {
    if count < WRITE_HEADER + 8 {
        set_errno(libc::EINVAL);
        return -1;
    }
    // SAFETY: long enough, see above; commands may lie at any address.
    let (command, out_words, response) = unsafe {
        (
            buffer.cast::<u32>().read_unaligned(),
            buffer.byte_add(6).cast::<u16>().read_unaligned(),
            buffer.byte_add(WRITE_HEADER).cast::<u64>().read_unaligned(),
        )
    };
    let attr = |id, len: usize, data| Attr { id, len: len as u16, flags: UVERBS_ATTR_F_MANDATORY, reserved: 0, data };
    let input = count - WRITE_HEADER;
    let mut ask = Command {
        length: size_of::<Command>() as u16,
        object_id: UVERBS_OBJECT_DEVICE,
        method_id: UVERBS_METHOD_INVOKE_WRITE,
        num_attrs: 3,
        reserved1: 0,
        driver_id: RDMA_DRIVER_RXE,
        reserved2: 0,
        attrs: [
            attr(UVERBS_ATTR_WRITE_CMD, size_of::<u64>(), u64::from(command & 0xff)),
            attr(UVERBS_ATTR_CORE_IN, input, buffer as u64 + WRITE_HEADER as u64),
            attr(UVERBS_ATTR_CORE_OUT, usize::from(out_words) * 4, response),
        ],
    };
    // SAFETY: built above; the buffers it names are the provider's.
    if unsafe { libc::ioctl(fd, RDMA_VERBS_IOCTL, &raw mut ask) } == 0 {
        return count as ssize_t;
    }
    Errno::last().set();
    -1
}
