//! One call of `ioctl(RDMA_VERBS_IOCTL)`: collects typed attributes, keeps their buffers alive, and hands back what the
//! kernel filled in. It does not know what any attribute means.
//!
//! A descriptor that came from another process refuses the old `write()` commands, and one that was opened by another
//! thread of a restored process does too; the same commands go through this call (`METHOD_INVOKE_WRITE`).
#![expect(unsafe_code, reason = "one ioctl with pointers to buffers that this module owns")]

use super::abi::{self, Attr, IoctlHdr};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Marks the plain structures of [`abi`] that may be handed to the kernel byte by byte.
///
/// # Safety
/// `repr(C)`, any bit pattern is a value, and no padding bytes.
pub unsafe trait Plain: Copy + Default {}

macro_rules! plain {
    ($($t:ty),* $(,)?) => {$(
        // SAFETY: repr(C) structures of integers laid out without padding (sizes are checked by the layout test).
        unsafe impl Plain for $t {}
    )*};
}

plain!(
    u32,
    u64,
    abi::QueryDevice,
    abi::QueryDeviceResp,
    abi::AllocPd,
    abi::AllocPdResp,
    abi::RegMr,
    abi::RegMrResp,
    abi::CreateCompChannel,
    abi::CreateCompChannelResp,
    abi::DestroyCqResp,
    abi::QpCap,
    abi::ModifyQp,
    abi::ModifySrq,
    abi::RxeMminfo,
    abi::RxeCreateQpResp,
    abi::RxeCreateSrqResp,
);

/// Index of an attribute of a [`Call`], to read what the kernel wrote there.
#[derive(Clone, Copy, Debug)]
pub struct Slot(usize);

/// A command under construction, and after [`Call::run`] its results.
#[derive(Debug)]
pub struct Call {
    object: u16,
    method: u16,
    attrs: Vec<Attr>,
    /// Buffers of the pointer attributes; boxed slices do not move when the vector grows. u64 keeps them aligned.
    buffers: Vec<(usize, Box<[u64]>)>,
}

impl Call {
    pub fn new(object: u16, method: u16) -> Self {
        Self { object, method, attrs: Vec::with_capacity(16), buffers: Vec::new() }
    }

    /// An old-style command (`IB_USER_VERBS_CMD_*`) with its fixed request and, if it has one, its response.
    pub fn legacy<Req: Plain, Resp: Plain>(cmd: u64, req: &Req, has_resp: bool) -> (Self, Option<Slot>) {
        let mut call = Self::new(abi::OBJECT_DEVICE, abi::METHOD_INVOKE_WRITE);
        call.value(abi::ATTR_WRITE_CMD, cmd);
        call.input(abi::ATTR_CORE_IN, req);
        let slot = has_resp.then(|| call.output::<Resp>(abi::ATTR_CORE_OUT));
        (call, slot)
    }

    fn push(&mut self, attr_id: u16, len: u16, data: u64) -> Slot {
        self.attrs.push(Attr { attr_id, len, flags: abi::ATTR_F_MANDATORY, attr_data: 0, data });
        Slot(self.attrs.len() - 1)
    }

    fn buffer(&mut self, attr: u16, bytes: usize) -> Slot {
        let buffer = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        // Structures of this interface have a few hundred bytes, the one array is asked for in less.
        let len = u16::try_from(bytes).expect("an attribute is shorter than 64 KiB");
        let slot = self.push(attr, len, buffer.as_ptr() as u64);
        self.buffers.push((slot.0, buffer));
        slot
    }

    /// A 64-bit inline value (also used for the kernel's `const_in`).
    pub fn value(&mut self, attr: u16, value: u64) -> Slot {
        self.push(attr, 8, value)
    }

    /// A 32-bit inline value.
    pub fn value32(&mut self, attr: u16, value: u32) -> Slot {
        self.push(attr, 4, u64::from(value))
    }

    /// A handle of an existing object, or 0 where the kernel puts the new one.
    pub fn handle(&mut self, attr: u16, handle: u32) -> Slot {
        self.push(attr, 0, u64::from(handle))
    }

    /// A file descriptor going in.
    pub fn fd(&mut self, attr: u16, fd: BorrowedFd<'_>) -> Slot {
        self.push(attr, 0, fd.as_raw_fd() as u64)
    }

    /// A structure going in.
    pub fn input<T: Plain>(&mut self, attr: u16, value: &T) -> Slot {
        let size = size_of::<T>();
        if size <= 8 {
            let mut inline = 0u64;
            // SAFETY: `T: Plain` of at most eight bytes is copied into an eight-byte integer.
            unsafe { std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), (&raw mut inline).cast(), size) };
            return self.push(attr, size as u16, inline);
        }
        let slot = self.buffer(attr, size);
        let buffer = &mut self.buffers.last_mut().expect("just added").1;
        // SAFETY: the buffer has at least `size` bytes, does not overlap `value`, and `T` is plain.
        unsafe {
            std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>(), buffer.as_mut_ptr().cast(), size);
        }
        slot
    }

    /// Room for a structure coming out.
    pub fn output<T: Plain>(&mut self, attr: u16) -> Slot {
        self.buffer(attr, size_of::<T>())
    }

    /// Room for an array coming out, read with [`Call::words`].
    pub fn room(&mut self, attr: u16, bytes: usize) -> Slot {
        self.buffer(attr, bytes)
    }

    /// Performs the command on an open uverbs file.
    ///
    /// `driver_id` is the kernel's number of the device's driver; another device's file refuses it with EINVAL.
    pub fn run(&mut self, fd: BorrowedFd<'_>, driver_id: u32) -> io::Result<()> {
        let header = size_of::<IoctlHdr>();
        let total = header + self.attrs.len() * size_of::<Attr>();
        let mut message = vec![0u64; total.div_ceil(8)];
        let head = IoctlHdr {
            length: total as u16,
            object_id: self.object,
            method_id: self.method,
            num_attrs: self.attrs.len() as u16,
            driver_id,
            ..IoctlHdr::default()
        };
        let base = message.as_mut_ptr().cast::<u8>();
        // SAFETY: `message` has room for the header and all attributes, both are multiples of 8 bytes long and
        // 8-aligned. The kernel reads and writes only `message` and the buffers the attributes point to, with the
        // lengths stated there; all of them live until after the call.
        let status = unsafe {
            base.cast::<IoctlHdr>().write(head);
            std::ptr::copy_nonoverlapping(self.attrs.as_ptr(), base.add(header).cast::<Attr>(), self.attrs.len());
            let status = libc::ioctl(fd.as_raw_fd(), abi::RDMA_VERBS_IOCTL, base);
            std::ptr::copy_nonoverlapping(base.add(header).cast::<Attr>(), self.attrs.as_mut_ptr(), self.attrs.len());
            status
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// The handle or descriptor number the kernel put into this attribute.
    pub fn number(&self, slot: Slot) -> u64 {
        self.attrs[slot.0].data
    }

    /// What the kernel wrote into this room.
    pub fn words(&self, slot: Slot) -> &[u64] {
        self.buffers.iter().find(|(at, _)| *at == slot.0).map_or(&[], |(_, buffer)| buffer)
    }

    /// The structure the kernel wrote into this output.
    pub fn result<T: Plain>(&self, slot: Slot) -> T {
        let Some((_, buffer)) = self.buffers.iter().find(|(at, _)| *at == slot.0) else { return T::default() };
        assert!(buffer.len() * 8 >= size_of::<T>(), "result read with the type it was asked with");
        // SAFETY: the buffer holds at least `size_of::<T>()` initialised bytes and `T` is plain; unaligned is allowed.
        unsafe { buffer.as_ptr().cast::<T>().read_unaligned() }
    }
}
