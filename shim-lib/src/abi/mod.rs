//! The C types of libibverbs that cross between the application, us and the real library.
//!
//! What `rdma-sys` has in the right shape is taken from there (attribute structs); what it hides (the op tables), cuts
//! short or makes a Rust enum of is written here. Layouts are those of rdma-core 56 and are compared against the
//! installed headers by `layout`. C enums are plain `u32`s: a provider may hand out values we do not know.
//! No behaviour here.
#![allow(non_camel_case_types, reason = "the names of the C headers")]
#![allow(missing_docs, reason = "documented by the manual pages of libibverbs")]

mod attrs;
mod context;
#[cfg(test)]
mod layout;
mod objects;
mod work;

pub use attrs::*;
pub use context::*;
pub use objects::*;
pub use work::*;

pub use rdma_sys::{ibv_ah_attr, ibv_device, ibv_gid, ibv_qp_cap, ibv_sge};
