//! What differs between NIC drivers when kernel objects are handed to another process: which queues the kernel maps to
//! user space, and how the driver says where. rxe is understood; every other driver is rebuilt inside the process.

use super::abi::{self, RxeCreateQpResp, RxeCreateSrqResp, RxeMminfo};
use super::call::{Call, Slot};

/// Where the owning process has to `mmap` one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Byte offset on the context's descriptor.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

impl From<RxeMminfo> for Option<Mapping> {
    fn from(info: RxeMminfo) -> Self {
        (info.size != 0).then(|| Mapping { offset: info.offset, len: u64::from(info.size) })
    }
}

/// Queue mappings of a QP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QpMappings {
    pub sq: Option<Mapping>,
    pub rq: Option<Mapping>,
}

/// The driver's part of creating objects. `ask_…` adds the driver's response to a command, `…` reads it afterwards.
pub trait Provider: Send + Sync + std::fmt::Debug {
    /// Driver name as in [`super::Device::driver`].
    fn name(&self) -> &'static str;
    /// The kernel's number of the driver (`enum rdma_driver_id`); every command names it.
    fn driver_id(&self) -> u32;
    /// Whether kernel objects made by one process can be taken over by another. If not, only *rebuild* is possible.
    fn can_adopt(&self) -> bool;
    fn ask_cq(&self, call: &mut Call) -> Option<Slot>;
    fn cq(&self, call: &Call, slot: Slot) -> Option<Mapping>;
    fn ask_srq(&self, call: &mut Call) -> Option<Slot>;
    fn srq(&self, call: &Call, slot: Slot) -> Option<Mapping>;
    /// What the driver wants to be told with a change of an SRQ.
    fn change_srq(&self, call: &mut Call);
    fn ask_qp(&self, call: &mut Call) -> Option<Slot>;
    fn qp(&self, call: &Call, slot: Slot) -> QpMappings;
}

/// Soft-RoCE: the kernel allocates the queues and answers with the offset and size of each (`struct mminfo`). A queue
/// can be mapped exactly once, by whoever comes first.
#[derive(Debug)]
pub struct Rxe;

impl Provider for Rxe {
    fn name(&self) -> &'static str {
        "rxe"
    }

    fn driver_id(&self) -> u32 {
        abi::DRIVER_RXE
    }

    fn can_adopt(&self) -> bool {
        true
    }

    fn ask_cq(&self, call: &mut Call) -> Option<Slot> {
        Some(call.output::<RxeMminfo>(abi::ATTR_UHW_OUT))
    }

    fn cq(&self, call: &Call, slot: Slot) -> Option<Mapping> {
        call.result::<RxeMminfo>(slot).into()
    }

    fn ask_srq(&self, call: &mut Call) -> Option<Slot> {
        Some(call.output::<RxeCreateSrqResp>(abi::ATTR_UHW_OUT))
    }

    fn srq(&self, call: &Call, slot: Slot) -> Option<Mapping> {
        call.result::<RxeCreateSrqResp>(slot).mi.into()
    }

    fn change_srq(&self, call: &mut Call) {
        // Where to write about a queue of another size, of which there is none; without it the call is refused.
        call.input(abi::ATTR_UHW_IN, &0u64);
    }

    fn ask_qp(&self, call: &mut Call) -> Option<Slot> {
        Some(call.output::<RxeCreateQpResp>(abi::ATTR_UHW_OUT))
    }

    fn qp(&self, call: &Call, slot: Slot) -> QpMappings {
        let resp = call.result::<RxeCreateQpResp>(slot);
        QpMappings { sq: resp.sq.into(), rq: resp.rq.into() }
    }
}

/// A driver whose objects nobody here knows how to hand over.
#[derive(Debug)]
pub struct Unknown;

impl Provider for Unknown {
    fn name(&self) -> &'static str {
        "other"
    }

    fn driver_id(&self) -> u32 {
        abi::DRIVER_UNKNOWN
    }

    fn can_adopt(&self) -> bool {
        false
    }

    fn ask_cq(&self, _: &mut Call) -> Option<Slot> {
        None
    }

    fn cq(&self, _: &Call, _: Slot) -> Option<Mapping> {
        None
    }

    fn ask_srq(&self, _: &mut Call) -> Option<Slot> {
        None
    }

    fn srq(&self, _: &Call, _: Slot) -> Option<Mapping> {
        None
    }

    fn change_srq(&self, _: &mut Call) {}

    fn ask_qp(&self, _: &mut Call) -> Option<Slot> {
        None
    }

    fn qp(&self, _: &Call, _: Slot) -> QpMappings {
        QpMappings::default()
    }
}

/// The provider of a driver, by its name.
pub fn of(driver: &str) -> &'static dyn Provider {
    match driver {
        "rxe" => &Rxe,
        _ => &Unknown,
    }
}

/// Whether objects on a device of this driver can be adopted; otherwise they must be rebuilt inside the process.
pub fn can_adopt(driver: &str) -> bool {
    of(driver).can_adopt()
}
