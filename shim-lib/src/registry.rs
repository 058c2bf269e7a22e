//! Which addresses are shadow objects. The control path asks here before it believes a pointer: libibverbs and
//! librdmacm call exported verbs with real objects, and nothing tells the two apart by looking at memory that may not
//! be ours.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rdma_virt::id::{ObjId, VQpn};

use crate::channel::ShadowChannel;
use crate::context::ShadowContext;
use crate::cq::ShadowCq;
use crate::mr::ShadowMr;
use crate::pd::ShadowPd;
use crate::qp::ShadowQp;
use crate::srq::ShadowSrq;

/// Any shadow object.
#[derive(Clone)]
pub enum Object {
    Context(Arc<ShadowContext>),
    Pd(Arc<ShadowPd>),
    Mr(Arc<ShadowMr>),
    Channel(Arc<ShadowChannel>),
    Cq(Arc<ShadowCq>),
    Srq(Arc<ShadowSrq>),
    Qp(Arc<ShadowQp>),
}

/// A kind of shadow object.
pub trait Shadow: Sized {
    fn wrap(this: Arc<Self>) -> Object;
    fn pick(object: &Object) -> Option<&Arc<Self>>;
    fn id(&self) -> ObjId;
    /// The device it belongs to; a context belongs to itself.
    fn context_id(&self) -> ObjId;
    /// Where the application finds it.
    fn address(&self) -> usize {
        std::ptr::from_ref(self) as usize
    }
}

macro_rules! shadow {
    ($($ty:ident $variant:ident, |$this:ident| $context:expr;)*) => {$(
        impl Shadow for $ty {
            fn wrap(this: Arc<Self>) -> Object { Object::$variant(this) }
            fn pick(object: &Object) -> Option<&Arc<Self>> {
                match object { Object::$variant(o) => Some(o), _ => None }
            }
            fn id(&self) -> ObjId { self.id }
            fn context_id(&self) -> ObjId { let $this = self; $context }
        }
    )*};
}
shadow! {
    ShadowPd Pd, |o| o.ctx().id;
    ShadowMr Mr, |o| o.pd().ctx().id;
    ShadowChannel Channel, |o| o.ctx().id;
    ShadowCq Cq, |o| o.ctx().id;
    ShadowSrq Srq, |o| o.pd().ctx().id;
    ShadowQp Qp, |o| o.ctx().id;
}

impl Shadow for ShadowContext {
    fn wrap(this: Arc<Self>) -> Object {
        Object::Context(this)
    }
    fn pick(object: &Object) -> Option<&Arc<Self>> {
        match object {
            Object::Context(o) => Some(o),
            _ => None,
        }
    }
    fn id(&self) -> ObjId {
        self.id
    }
    fn context_id(&self) -> ObjId {
        self.id
    }
    fn address(&self) -> usize {
        self.visible() as usize
    }
}

static OBJECTS: Mutex<BTreeMap<usize, Object>> = Mutex::new(BTreeMap::new());
static NEXT_ID: AtomicU32 = AtomicU32::new(1);

fn objects() -> MutexGuard<'static, BTreeMap<usize, Object>> {
    OBJECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A name for a new object, over all kinds; never given twice.
pub fn next_id() -> ObjId {
    ObjId(NEXT_ID.fetch_add(1, Ordering::Relaxed))
}

/// Makes an object known and returns the address the application gets.
pub fn add<T: Shadow>(object: &Arc<T>) -> usize {
    let address = object.address();
    objects().insert(address, T::wrap(object.clone()));
    address
}

/// Takes an object off; its memory stays until the last `Arc` of it goes.
pub fn remove<T: Shadow>(object: &T) {
    objects().remove(&object.address());
}

/// The shadow object at this address, if it is one of that kind.
pub fn find<T: Shadow>(address: *const impl Sized) -> Option<Arc<T>> {
    if address.is_null() {
        return None;
    }
    objects().get(&(address as usize)).and_then(|o| T::pick(o).cloned())
}

/// All objects of a kind, of one device or of all, in order of creation.
pub fn all<T: Shadow>(context: Option<&ShadowContext>) -> Vec<Arc<T>> {
    let mut found: Vec<_> = objects()
        .values()
        .filter_map(|o| T::pick(o).cloned())
        .filter(|o| context.is_none_or(|c| o.context_id() == c.id))
        .collect();
    found.sort_by_key(|o| o.id().0);
    found
}

/// All open devices, in order of creation.
pub fn contexts() -> Vec<Arc<ShadowContext>> {
    all(None)
}

/// The QPs with this number; several only if the process has several devices.
pub fn qps_by_vqpn(vqpn: VQpn) -> Vec<Arc<ShadowQp>> {
    all::<ShadowQp>(None).into_iter().filter(|q| q.vqpn() == vqpn).collect()
}
