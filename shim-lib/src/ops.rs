//! The op tables of a shadow context: what the header's inline functions call. Data path verbs are in the modules of
//! their objects; here is the table, and the verbs that are not moved: they unwrap, work, and leave a note that makes
//! a migration refuse.
#![expect(unsafe_code, reason = "C objects by pointer")]

use std::mem::offset_of;
use std::ptr::null_mut;

use libc::{c_int, c_uint, c_void};

use crate::abi::{
    cq_init, ibv_context, ibv_counters, ibv_cq, ibv_cq_ex, ibv_cq_init_attr_ex, ibv_dm, ibv_flow, ibv_flow_action,
    ibv_mr, ibv_mw, ibv_mw_bind, ibv_parent_domain_init_attr, ibv_pd, ibv_qp, ibv_qp_init_attr, ibv_qp_init_attr_ex,
    ibv_rwq_ind_table, ibv_rwq_ind_table_init_attr, ibv_sge, ibv_srq, ibv_srq_init_attr_ex, ibv_td, ibv_wq,
    ibv_wq_init_attr, ibv_xrcd, qp_init_mask, srq_init, verbs_context, wr_opcode,
};
use crate::channel::{self, ShadowChannel};
use crate::context::{self, ShadowContext, table_of};
use crate::cq::{self, ShadowCq};
use crate::entry::{boundary, failure};
use crate::pd::{self, ShadowPd};
use crate::qp::life::{Parts, create, unwrap_attr};
use crate::qp::{builder, recv, send};
use crate::real::verbs;
use crate::registry;
use crate::{blockers, cq_ex, gate, mr, provider, qp, query, srq};

/// Fills the table of a new shadow: an op of ours wherever the library has one.
///
/// # Safety
/// `real` is a live context of the library.
pub(crate) unsafe fn fill(table: &mut verbs_context, real: *mut ibv_context) {
    // SAFETY: the caller's promise.
    let ops = unsafe { &(*real).ops };
    let mine = &mut table.context.ops;
    mine.compat_query_device = ops.compat_query_device.map(|_| query::ibv_query_device as _);
    mine.compat_query_port = ops.compat_query_port.map(|_| query::ibv_query_port as _);
    mine.alloc_mw = ops.alloc_mw.map(|_| alloc_mw as _);
    mine.bind_mw = ops.bind_mw.map(|_| bind_mw as _);
    mine.dealloc_mw = ops.dealloc_mw.map(|_| dealloc_mw as _);
    mine.poll_cq = ops.poll_cq.map(|_| cq::poll_cq as _);
    mine.req_notify_cq = ops.req_notify_cq.map(|_| cq::req_notify_cq as _);
    mine.post_srq_recv = ops.post_srq_recv.map(|_| srq::post_srq_recv as _);
    mine.post_send = ops.post_send.map(|_| send::post_send as _);
    mine.post_recv = ops.post_recv.map(|_| recv::post_recv as _);

    macro_rules! extended {
        ($($field:ident),* $(,)?) => {$(
            if let Some(theirs) = table_of(real, offset_of!(verbs_context, $field)) {
                // SAFETY: the table reaches back to the field.
                table.$field = unsafe { (*theirs).$field }.map(|_| $field as _);
            }
        )*};
    }
    extended!(
        query_port,
        advise_mr,
        alloc_null_mr,
        read_counters,
        attach_counters_point_flow,
        create_counters,
        destroy_counters,
        reg_dm_mr,
        alloc_dm,
        free_dm,
        modify_flow_action_esp,
        destroy_flow_action,
        create_flow_action_esp,
        modify_qp_rate_limit,
        alloc_parent_domain,
        dealloc_td,
        alloc_td,
        modify_cq,
        post_srq_ops,
        destroy_rwq_ind_table,
        create_rwq_ind_table,
        destroy_wq,
        modify_wq,
        create_wq,
        query_rt_values,
        create_cq_ex,
        query_device_ex,
        ibv_destroy_flow,
        ibv_create_flow,
        open_qp,
        create_qp_ex,
        get_srq_num,
        create_srq_ex,
        open_xrcd,
        close_xrcd,
    );
    table.old_create_flow = table.ibv_create_flow;
    table.old_destroy_flow = table.ibv_destroy_flow;
    if let Some(theirs) = table_of(real, offset_of!(verbs_context, private)) {
        // SAFETY: the table reaches back to the field.
        table.private = unsafe { (*theirs).private };
    }
}

/// The library's op of that name for a context, ours or its own.
macro_rules! theirs {
    ($context:expr, $field:ident) => {{
        let real = context::unwrap($context);
        // SAFETY: a live context of the caller's; the table reaches back to the field.
        #[allow(unused_unsafe, reason = "some callers are in an unsafe block already")]
        table_of(real, offset_of!(verbs_context, $field)).and_then(|t| unsafe { (*t).$field })
    }};
}

/// Ops that unwrap, call the library's and return what it returns. `note` says what is refused at a migration.
macro_rules! pass {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) -> $ret:ty, of $context:expr, fail $how:ident, calls ($($real:expr),*) $(, note |$made:ident| $what:expr)?;)*) => {$(
        $(#[$doc])*
        unsafe extern "C" fn $name($($arg: $ty),*) -> $ret {
            boundary(
                || {
                    let _pass = gate::enter(stringify!($name));
                    // SAFETY: the caller's live objects.
                    #[allow(unused_unsafe, reason = "some expressions need none")]
                    let context: *mut ibv_context = unsafe { $context };
                    let Some(op) = theirs!(context, $name) else {
                        return failure!($how, libc::EOPNOTSUPP);
                    };
                    // SAFETY: as above, unwrapped.
                    let answer = unsafe { op($($real),*) };
                    $(
                        let $made = answer;
                        if made($made as usize, stringify!($how)) {
                            blockers::note(concat!("ibv_", stringify!($name)), $what, $made as usize);
                        }
                    )?
                    answer
                },
                || failure!($how, libc::EIO),
            )
        }
    )*};
}

/// Whether a verb that answers `how` has made something.
fn made(answer: usize, how: &str) -> bool {
    (how == "null") == (answer != 0)
}

pass! {
    fn advise_mr(pd: *mut ibv_pd, advice: u32, flags: u32, list: *mut ibv_sge, n: u32) -> c_int, of (*pd).context, fail errno, calls (pd::unwrap(pd), advice, flags, list, n);
    fn read_counters(counters: *mut ibv_counters, values: *mut u64, n: u32, flags: u32) -> c_int, of *counters.cast::<*mut ibv_context>(), fail errno, calls (counters, values, n, flags);
    fn attach_counters_point_flow(counters: *mut ibv_counters, attr: *mut c_void, flow: *mut ibv_flow) -> c_int, of *counters.cast::<*mut ibv_context>(), fail errno, calls (counters, attr, flow);
    fn create_counters(context: *mut ibv_context, attr: *mut c_void) -> *mut ibv_counters, of context, fail null, calls (context::unwrap(context), attr), note |c| "counters";
    fn destroy_counters(counters: *mut ibv_counters) -> c_int, of *counters.cast::<*mut ibv_context>(), fail errno, calls (forgotten(counters));
    fn alloc_dm(context: *mut ibv_context, attr: *mut c_void) -> *mut ibv_dm, of context, fail null, calls (context::unwrap(context), attr), note |d| "device memory";
    fn free_dm(dm: *mut ibv_dm) -> c_int, of *dm.cast::<*mut ibv_context>(), fail errno, calls (forgotten(dm));
    fn modify_flow_action_esp(action: *mut ibv_flow_action, attr: *mut c_void) -> c_int, of *action.cast::<*mut ibv_context>(), fail errno, calls (action, attr);
    fn destroy_flow_action(action: *mut ibv_flow_action) -> c_int, of *action.cast::<*mut ibv_context>(), fail errno, calls (forgotten(action));
    fn create_flow_action_esp(context: *mut ibv_context, attr: *mut c_void) -> *mut ibv_flow_action, of context, fail null, calls (context::unwrap(context), attr), note |a| "flow action";
    fn modify_qp_rate_limit(qp: *mut ibv_qp, attr: *mut c_void) -> c_int, of (*qp).context, fail errno, calls (qp::unwrap(qp), attr), note |_a| "a QP's rate limit";
    fn dealloc_td(td: *mut ibv_td) -> c_int, of *td.cast::<*mut ibv_context>(), fail errno, calls (forgotten(td));
    fn alloc_td(context: *mut ibv_context, attr: *mut c_void) -> *mut ibv_td, of context, fail null, calls (context::unwrap(context), attr), note |t| "thread domain";
    fn modify_cq(cq: *mut ibv_cq, attr: *mut c_void) -> c_int, of (*cq).context, fail errno, calls (cq::unwrap(cq), attr), note |_a| "a CQ's moderation";
    fn post_srq_ops(srq: *mut ibv_srq, op_list: *mut c_void, bad: *mut *mut c_void) -> c_int, of (*srq).context, fail errno, calls (srq::unwrap(srq), op_list, bad), note |_a| "tag matching";
    fn destroy_rwq_ind_table(table: *mut ibv_rwq_ind_table) -> c_int, of *table.cast::<*mut ibv_context>(), fail errno, calls (forgotten(table));
    fn create_rwq_ind_table(context: *mut ibv_context, attr: *mut ibv_rwq_ind_table_init_attr) -> *mut ibv_rwq_ind_table, of context, fail null, calls (context::unwrap(context), attr), note |t| "receive indirection table";
    fn destroy_wq(wq: *mut ibv_wq) -> c_int, of (*wq).context, fail errno, calls (forgotten(wq));
    fn modify_wq(wq: *mut ibv_wq, attr: *mut c_void) -> c_int, of (*wq).context, fail errno, calls (wq, attr);
    fn query_rt_values(context: *mut ibv_context, values: *mut c_void) -> c_int, of context, fail errno, calls (context::unwrap(context), values);
    fn ibv_destroy_flow(flow: *mut ibv_flow) -> c_int, of flow_context(flow), fail errno, calls (forgotten(flow));
    fn ibv_create_flow(qp: *mut ibv_qp, attr: *mut c_void) -> *mut ibv_flow, of (*qp).context, fail null, calls (qp::unwrap(qp), attr), note |f| "flow";
    fn open_qp(context: *mut ibv_context, attr: *mut c_void) -> *mut ibv_qp, of context, fail null, calls (context::unwrap(context), attr), note |q| "shared qp";
    fn get_srq_num(srq: *mut ibv_srq, number: *mut u32) -> c_int, of (*srq).context, fail errno, calls (srq::unwrap(srq), number);
    fn open_xrcd(context: *mut ibv_context, attr: *mut c_void) -> *mut ibv_xrcd, of context, fail null, calls (context::unwrap(context), attr), note |x| "xrc domain";
    fn close_xrcd(xrcd: *mut ibv_xrcd) -> c_int, of (*xrcd).context, fail errno, calls (forgotten(xrcd));
}

/// An object is about to go, and with it what it stood in the way of.
fn forgotten<T>(object: *mut T) -> *mut T {
    blockers::forget(object as usize);
    object
}

/// # Safety
/// A live flow.
unsafe fn flow_context(flow: *mut ibv_flow) -> *mut ibv_context {
    // `struct ibv_flow` has a comp_mask and then its context.
    // SAFETY: the caller's promise.
    unsafe { *flow.cast::<*mut ibv_context>().add(1) }
}

unsafe extern "C" fn query_port(context: *mut ibv_context, port: u8, attr: *mut c_void, length: usize) -> c_int {
    boundary(
        || {
            let _pass = query::pass(context, "ibv_query_port");
            let Some(op) = theirs!(context, query_port) else { return failure!(errno, libc::EOPNOTSUPP) };
            // SAFETY: the caller's room for an answer of that length.
            unsafe {
                let answer = op(context::unwrap(context), port, attr, length);
                if answer == 0 {
                    query::remembered_port(context, port, attr, length);
                }
                answer
            }
        },
        || failure!(errno, libc::EIO),
    )
}

unsafe extern "C" fn query_device_ex(
    context: *mut ibv_context,
    input: *const c_void,
    attr: *mut c_void,
    size: usize,
) -> c_int {
    boundary(
        || {
            let _pass = query::pass(context, "ibv_query_device_ex");
            let Some(op) = theirs!(context, query_device_ex) else { return failure!(errno, libc::EOPNOTSUPP) };
            // SAFETY: the caller's room for an answer of that size; the plain attributes are its first member.
            unsafe {
                let answer = op(context::unwrap(context), input, attr, size);
                if answer == 0 {
                    query::remembered_device(context, attr);
                }
                answer
            }
        },
        || failure!(errno, libc::EIO),
    )
}

unsafe extern "C" fn alloc_null_mr(pd: *mut ibv_pd) -> *mut ibv_mr {
    boundary(
        || {
            let _pass = gate::enter("ibv_alloc_null_mr");
            // SAFETY: the caller's live PD.
            unsafe {
                let Some(op) = theirs!((*pd).context, alloc_null_mr) else { return failure!(null, libc::EOPNOTSUPP) };
                mr::foreign(pd, op(pd::unwrap(pd)), "ibv_alloc_null_mr")
            }
        },
        || failure!(null, libc::EIO),
    )
}

unsafe extern "C" fn reg_dm_mr(
    pd: *mut ibv_pd,
    dm: *mut ibv_dm,
    offset: u64,
    length: usize,
    access: c_uint,
) -> *mut ibv_mr {
    boundary(
        || {
            let _pass = gate::enter("ibv_reg_dm_mr");
            // SAFETY: the caller's live objects.
            unsafe {
                let Some(op) = theirs!((*pd).context, reg_dm_mr) else { return failure!(null, libc::EOPNOTSUPP) };
                mr::foreign(pd, op(pd::unwrap(pd), dm, offset, length, access), "ibv_reg_dm_mr")
            }
        },
        || failure!(null, libc::EIO),
    )
}

unsafe extern "C" fn alloc_parent_domain(
    context: *mut ibv_context,
    attr: *mut ibv_parent_domain_init_attr,
) -> *mut ibv_pd {
    boundary(
        || {
            let _pass = gate::enter("ibv_alloc_parent_domain");
            let Some(op) = theirs!(context, alloc_parent_domain) else { return failure!(null, libc::EOPNOTSUPP) };
            // SAFETY: the caller's attributes; real objects.
            unsafe {
                let mut ask = *attr;
                ask.pd = pd::unwrap(ask.pd);
                let domain = op(context::unwrap(context), &raw mut ask);
                let Some(ctx) = registry::find::<ShadowContext>(context) else { return domain };
                let pd = ShadowPd::adopt(ctx, domain);
                if !pd.is_null() {
                    blockers::note("ibv_alloc_parent_domain", "parent domain", pd as usize);
                }
                pd
            }
        },
        || failure!(null, libc::EIO),
    )
}

unsafe extern "C" fn create_wq(context: *mut ibv_context, attr: *mut ibv_wq_init_attr) -> *mut ibv_wq {
    boundary(
        || {
            let _pass = gate::enter("ibv_create_wq");
            let Some(op) = theirs!(context, create_wq) else { return failure!(null, libc::EOPNOTSUPP) };
            // SAFETY: the caller's attributes; real objects.
            unsafe {
                let mut ask = *attr;
                ask.pd = pd::unwrap(ask.pd);
                ask.cq = cq::unwrap(ask.cq);
                let wq = op(context::unwrap(context), &raw mut ask);
                (*attr).max_wr = ask.max_wr;
                (*attr).max_sge = ask.max_sge;
                if !wq.is_null() {
                    blockers::note("ibv_create_wq", "work queue", wq as usize);
                }
                wq
            }
        },
        || failure!(null, libc::EIO),
    )
}

unsafe extern "C" fn create_cq_ex(context: *mut ibv_context, attr: *mut ibv_cq_init_attr_ex) -> *mut ibv_cq_ex {
    boundary(
        || {
            let _pass = gate::enter("ibv_create_cq_ex");
            let Some(op) = theirs!(context, create_cq_ex) else { return failure!(null, libc::EOPNOTSUPP) };
            // SAFETY: the caller's attributes; real objects.
            unsafe {
                let wish = *attr;
                let plain = wish.wc_flags & !cq_init::STANDARD == 0
                    && wish.comp_mask & !cq_init::MASK_FLAGS == 0
                    && (wish.comp_mask & cq_init::MASK_FLAGS == 0 || wish.flags & !cq_init::SINGLE_THREADED == 0);
                if plain && let Some(ctx) = registry::find::<ShadowContext>(context) {
                    return create_plain_cq(ctx, &wish);
                }
                let mut ask = wish;
                ask.channel = channel::unwrap(ask.channel);
                ask.parent_domain = pd::unwrap(ask.parent_domain);
                let made = op(context::unwrap(context), &raw mut ask);
                if !made.is_null() {
                    blockers::note("ibv_create_cq_ex", format!("cq with flags {:#x}", wish.wc_flags), made as usize);
                }
                made
            }
        },
        || failure!(null, libc::EIO),
    )
}

/// A CQ whose readers need nothing but plain completions.
///
/// # Safety
/// `wish` is the application's.
unsafe fn create_plain_cq(ctx: std::sync::Arc<ShadowContext>, wish: &ibv_cq_init_attr_ex) -> *mut ibv_cq_ex {
    let shadow_channel = registry::find::<ShadowChannel>(wish.channel);
    provider::rxe::record_maps();
    // SAFETY: real objects.
    let made = unsafe {
        verbs::create_cq(
            ctx.real(),
            wish.cqe as c_int,
            wish.cq_context,
            channel::unwrap(wish.channel),
            wish.comp_vector as c_int,
        )
    };
    match made {
        Ok(real) if !real.is_null() => {
            let cq = ShadowCq::adopt(ctx, shadow_channel, real, wish.cqe, wish.comp_vector, wish.cq_context);
            cq_ex::install(&cq, wish.wc_flags);
            cq.visible_ex()
        }
        other => {
            provider::rxe::take_maps();
            if let Err(e) = other {
                e.set();
            }
            null_mut()
        }
    }
}

unsafe extern "C" fn create_qp_ex(context: *mut ibv_context, attr: *mut ibv_qp_init_attr_ex) -> *mut ibv_qp {
    boundary(
        || {
            let _pass = gate::enter("ibv_create_qp_ex");
            let Some(op) = theirs!(context, create_qp_ex) else { return failure!(null, libc::EOPNOTSUPP) };
            // SAFETY: the caller's attributes; real objects.
            unsafe {
                let wish = *attr;
                let ops = if wish.comp_mask & qp_init_mask::SEND_OPS_FLAGS != 0 { wish.send_ops_flags } else { 0 };
                let simple = wish.comp_mask & qp_init_mask::PD != 0
                    && wish.comp_mask & !(qp_init_mask::PD | qp_init_mask::SEND_OPS_FLAGS | qp_init_mask::CREATE_FLAGS)
                        == 0
                    && (wish.comp_mask & qp_init_mask::CREATE_FLAGS == 0 || wish.create_flags == 0)
                    && ops & !builder::SUPPORTED == 0;
                let mut ask = wish;
                ask.pd = pd::unwrap(ask.pd);
                let mut plain = ask.plain();
                unwrap_attr(&mut plain);
                (ask.send_cq, ask.recv_cq, ask.srq) = (plain.send_cq, plain.recv_cq, plain.srq);
                if simple && let Some(parts) = Parts::find(wish.pd, &wish.plain()) {
                    if ops != 0 && !accepts(op, context, &ask) {
                        return null_mut();
                    }
                    let mut plain = wish.plain();
                    let qp = create(parts, &raw mut plain, ops, real_create_qp);
                    (*attr).cap = plain.cap;
                    return qp;
                }
                let made = op(context::unwrap(context), &raw mut ask);
                if !made.is_null() {
                    (*attr).cap = ask.cap;
                    blockers::note("ibv_create_qp_ex", format!("qp {}", (*made).qp_num), made as usize);
                }
                made
            }
        },
        || failure!(null, libc::EIO),
    )
}

type CreateQpEx = unsafe extern "C" fn(*mut ibv_context, *mut ibv_qp_init_attr_ex) -> *mut ibv_qp;

/// Whether the library would make a QP with these builders: an answer of ours must not be kinder than its own.
/// `errno` says why not.
///
/// # Safety
/// `ask` holds real objects.
unsafe fn accepts(op: CreateQpEx, context: *mut ibv_context, ask: &ibv_qp_init_attr_ex) -> bool {
    let mut probe = *ask;
    // SAFETY: the caller's promise; a QP just made for this question.
    unsafe {
        let made = op(context::unwrap(context), &raw mut probe);
        if made.is_null() {
            return false;
        }
        let _ = verbs::destroy_qp(made);
    }
    true
}

/// # Safety
/// As `ibv_create_qp`, with real objects.
unsafe extern "C" fn real_create_qp(pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> *mut ibv_qp {
    // SAFETY: the caller's promise.
    match unsafe { verbs::create_qp(pd, attr) } {
        Ok(qp) => qp,
        Err(e) => {
            e.set();
            null_mut()
        }
    }
}

unsafe extern "C" fn create_srq_ex(context: *mut ibv_context, attr: *mut ibv_srq_init_attr_ex) -> *mut ibv_srq {
    boundary(
        || {
            let _pass = gate::enter("ibv_create_srq_ex");
            let Some(op) = theirs!(context, create_srq_ex) else { return failure!(null, libc::EOPNOTSUPP) };
            // SAFETY: the caller's attributes; real objects.
            unsafe {
                let mut ask = *attr;
                if ask.comp_mask & srq_init::PD != 0 {
                    ask.pd = pd::unwrap(ask.pd);
                }
                if ask.comp_mask & srq_init::CQ != 0 {
                    ask.cq = cq::unwrap(ask.cq);
                }
                let made = op(context::unwrap(context), &raw mut ask);
                (*attr).attr = ask.attr;
                if !made.is_null() {
                    blockers::note("ibv_create_srq_ex", format!("srq of type {}", ask.srq_type), made as usize);
                }
                made
            }
        },
        || failure!(null, libc::EIO),
    )
}

// ---- memory windows ------------------------------------------------------------------------------------------------
//
// A window stays the library's object, but shows our context and PD: the header compares its PD with that of the
// region it is bound to, and calls through its context.

/// Shows the library its own context and PD while it works on a window.
///
/// # Safety
/// A live window.
unsafe fn with_real_mw<R>(mw: *mut ibv_mw, work: impl FnOnce() -> R) -> R {
    // SAFETY: the caller's promise; verbs on one window are the application's to serialise.
    unsafe {
        let shown = ((*mw).context, (*mw).pd);
        (*mw).context = context::unwrap(shown.0);
        (*mw).pd = pd::unwrap(shown.1);
        let result = work();
        (*mw).context = shown.0;
        (*mw).pd = shown.1;
        result
    }
}

unsafe extern "C" fn alloc_mw(pd: *mut ibv_pd, kind: u32) -> *mut ibv_mw {
    boundary(
        || {
            let _pass = gate::enter("ibv_alloc_mw");
            // SAFETY: the caller's live PD.
            unsafe {
                let real = context::unwrap((*pd).context);
                let Some(op) = (*real).ops.alloc_mw else { return failure!(null, libc::EOPNOTSUPP) };
                let mw = op(pd::unwrap(pd), kind);
                if !mw.is_null() {
                    (*mw).context = (*pd).context;
                    (*mw).pd = pd;
                    blockers::note("ibv_alloc_mw", format!("memory window {:#x}", (*mw).rkey), mw as usize);
                }
                mw
            }
        },
        || failure!(null, libc::EIO),
    )
}

unsafe extern "C" fn bind_mw(qp: *mut ibv_qp, mw: *mut ibv_mw, bind: *mut ibv_mw_bind) -> c_int {
    boundary(
        // SAFETY: the caller's live objects.
        || unsafe {
            let real = context::unwrap((*qp).context);
            let Some(op) = (*real).ops.bind_mw else { return failure!(errno, libc::EOPNOTSUPP) };
            let mut ask = *bind;
            ask.bind_info.mr = mr::unwrap(ask.bind_info.mr);
            match qp::ShadowQp::of(qp) {
                Some(shadow) => shadow.post_foreign(wr_opcode::BIND_MW, ask.send_flags, |real_qp| {
                    with_real_mw(mw, || op(real_qp, mw, &raw mut ask))
                }),
                None => with_real_mw(mw, || op(qp, mw, &raw mut ask)),
            }
        },
        || failure!(errno, libc::EIO),
    )
}

unsafe extern "C" fn dealloc_mw(mw: *mut ibv_mw) -> c_int {
    boundary(
        || {
            let _pass = gate::enter("ibv_dealloc_mw");
            // SAFETY: the caller's live window, which the op frees on success.
            unsafe {
                let shown = ((*mw).context, (*mw).pd);
                let real = context::unwrap(shown.0);
                let Some(op) = (*real).ops.dealloc_mw else { return failure!(errno, libc::EOPNOTSUPP) };
                (*mw).context = real;
                (*mw).pd = pd::unwrap(shown.1);
                let answer = op(mw);
                if answer == 0 {
                    blockers::forget(mw as usize);
                } else {
                    (*mw).context = shown.0;
                    (*mw).pd = shown.1;
                }
                answer
            }
        },
        || failure!(errno, libc::EIO),
    )
}
