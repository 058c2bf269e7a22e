//! What every function has that C code calls: the name, the way to the real one, and a wall no panic gets through.
//!
//! There is no re-entrancy flag. libibverbs and librdmacm call exported verbs themselves and so come through here too;
//! they hold real objects, and a real object always goes straight to the real function, unwrapped and ungated. A flag
//! per thread would also catch verbs that a signal handler calls while its thread sleeps in one, with shadow objects.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `body`; if it panics, the answer is `failed`'s. A panic unwinding into C would end the process.
#[inline(always)]
pub fn boundary<R>(body: impl FnOnce() -> R, failed: impl FnOnce() -> R) -> R {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| failed())
}

/// How a verb says that it failed: there are four ways in libibverbs' interface.
macro_rules! failure {
    (null, $errno:expr) => {{
        $crate::errno::set_errno($errno);
        ::std::ptr::null_mut()
    }};
    (minus_one, $errno:expr) => {{
        $crate::errno::set_errno($errno);
        -1
    }};
    (errno, $errno:expr) => {{
        $crate::errno::set_errno($errno);
        $errno
    }};
    (nothing, $errno:expr) => {{
        let _ = $errno;
    }};
    (zero, $errno:expr) => {{
        let _ = $errno;
        0
    }};
}
pub(crate) use failure;

/// Defines exported verbs: `VERSION fn NAME(ARGS) -> RETURN, fail HOW, |real| BODY`. `real` is the real function; the
/// body decides what of its arguments is ours.
macro_rules! entry {
    ($($(#[$doc:meta])* $version:literal fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?, fail $how:ident, |$real:ident| $body:block)*) => {$(
        $(#[$doc])*
        ///
        /// # Safety
        /// As the manual page of the verb asks: pointers are those of live objects, attributes and results.
        #[unsafe(no_mangle)]
        pub unsafe extern "C" fn $name($($arg: $ty),*) $(-> $ret)? {
            type Signature = unsafe extern "C" fn($($ty),*) $(-> $ret)?;
            static SYMBOL: $crate::real::Symbol =
                $crate::real::Symbol::new(concat!(stringify!($name), "\0"), concat!($version, "\0"));
            $crate::entry::boundary(
                move || {
                    let Some(address) = SYMBOL.address() else {
                        return $crate::entry::failure!($how, libc::ENOSYS);
                    };
                    // SAFETY: libibverbs' function of this name has this signature (abi/layout.rs compiles calls
                    // against its header).
                    let $real = unsafe { ::std::mem::transmute::<*mut libc::c_void, Signature>(address) };
                    $body
                },
                || $crate::entry::failure!($how, libc::EIO),
            )
        }
    )*};
}
pub(crate) use entry;
