//! A QP of our own that makes the file of a device's asynchronous events readable, for a program that waits there for an
//! event which we hold and the kernel does not have any more: a UD QP, which needs no remote end, is taken to SQD, and
//! reports that its empty send queue is drained. (Soft-RoCE reports that always, others if asked to.)
//!
//! The event is the kernel's as long as nobody reads it, and goes with its QP. So a bell is silenced by taking it down;
//! nothing has to be read for that. It hangs on objects of its own, because the application may destroy any of its own.
#![expect(unsafe_code, reason = "real verbs on real objects")]

use std::mem::zeroed;
use std::ptr::null_mut;

use crate::abi::{
    ibv_context, ibv_cq, ibv_pd, ibv_qp, ibv_qp_attr, ibv_qp_cap, ibv_qp_init_attr, qp_mask, qp_state, qp_type,
};
use crate::errno::Errno;
use crate::real::verbs;

/// Any key that needs no privilege; nobody is told about it.
const QKEY: u32 = 1;

/// A bell on one device.
#[derive(Debug)]
pub struct Bell {
    pd: *mut ibv_pd,
    cq: *mut ibv_cq,
    qp: *mut ibv_qp,
}

// SAFETY: pointers to objects of libibverbs, which locks its own.
unsafe impl Send for Bell {}

fn made<T>(object: *mut T) -> Result<*mut T, Errno> {
    if object.is_null() { Err(Errno::last()) } else { Ok(object) }
}

impl Bell {
    /// A new one, silent yet.
    pub fn hang(real: *mut ibv_context) -> Result<Self, Errno> {
        let mut bell = Self { pd: null_mut(), cq: null_mut(), qp: null_mut() };
        match bell.make(real) {
            Ok(()) => Ok(bell),
            Err(e) => {
                bell.take_down();
                Err(e)
            }
        }
    }

    fn make(&mut self, real: *mut ibv_context) -> Result<(), Errno> {
        // SAFETY: the real context of a live shadow; objects made here and known to nobody else.
        unsafe {
            self.pd = made(verbs::alloc_pd(real)?)?;
            self.cq = made(verbs::create_cq(real, 1, null_mut(), null_mut(), 0)?)?;
            let mut ask = ibv_qp_init_attr {
                qp_context: null_mut(),
                send_cq: self.cq,
                recv_cq: self.cq,
                srq: null_mut(),
                cap: ibv_qp_cap {
                    max_send_wr: 1,
                    max_recv_wr: 1,
                    max_send_sge: 1,
                    max_recv_sge: 1,
                    max_inline_data: 0,
                },
                qp_type: qp_type::UD,
                sq_sig_all: 0,
            };
            self.qp = made(verbs::create_qp(self.pd, &raw mut ask)?)?;
        }
        Ok(())
    }

    /// What its event is about, as the library says it.
    pub fn qp(&self) -> *mut ibv_qp {
        self.qp
    }

    /// Lets it be heard, once.
    pub fn ring(&self) -> Result<(), Errno> {
        // SAFETY: all-zero is a valid attribute struct.
        let mut attr: ibv_qp_attr = unsafe { zeroed() };
        (attr.port_num, attr.qkey, attr.en_sqd_async_notify) = (1, QKEY, 1);
        let steps = [
            (qp_state::INIT, qp_mask::PKEY_INDEX | qp_mask::PORT | qp_mask::QKEY),
            (qp_state::RTR, 0),
            (qp_state::RTS, qp_mask::SQ_PSN),
            (qp_state::SQD, qp_mask::EN_SQD_ASYNC_NOTIFY),
        ];
        for (state, mask) in steps {
            attr.qp_state = state;
            // SAFETY: a QP of ours; attributes of ours.
            unsafe { verbs::modify_qp(self.qp, &raw mut attr, qp_mask::STATE | mask).and_then(Errno::check)? };
        }
        Ok(())
    }

    /// Its event goes with it, if nobody has read it. If somebody has, this waits for the acknowledgement, which comes at
    /// once and without any lock.
    pub fn take_down(self) {
        // SAFETY: objects of ours that nobody else knows; what was not made is null.
        unsafe {
            if !self.qp.is_null() {
                let _ = verbs::destroy_qp(self.qp);
            }
            if !self.cq.is_null() {
                let _ = verbs::destroy_cq(self.cq);
            }
            if !self.pd.is_null() {
                let _ = verbs::dealloc_pd(self.pd);
            }
        }
    }
}
