//! The part of libibverbs this program uses, with pointers kept inside.
//!
//! Deliberately thin: one call here is one call of the library, made the way a C program makes it
//! (data path through the function table of the context, as the header's inline functions do).
//! Objects have no `Drop`: they are destroyed by explicit calls whose result is checked, because
//! a destroy that fails or hangs is something this program must report.

mod device;
mod memory;
mod qp;
mod queue;

pub use device::{AsyncEvent, Context, DeviceInfo, Pd, PortInfo, fork_init};
pub use memory::{Memory, Mr, MrFields};
pub use qp::{Endpoint, Qp, QpOptions, QpView, RestState, SendBatch, Sge, Verb, Wr};
pub use queue::{Channel, Cq, RecvBatch, Srq, Wc, WcOpcode};

use std::io;

/// Turns a verbs return value (0, or an errno) into a result naming the call.
fn check(call: &'static str, rc: i32) -> io::Result<()> {
    match rc {
        0 => Ok(()),
        // Some calls return -1 and set errno, most return the errno itself.
        rc if rc > 0 => Err(named(call, io::Error::from_raw_os_error(rc))),
        _ => Err(last(call)),
    }
}

/// The current errno, naming the call that set it.
fn last(call: &'static str) -> io::Error {
    named(call, io::Error::last_os_error())
}

fn named(call: &'static str, e: io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{call}: {e}"))
}
