//! The plugin that lets a stock CRIU save and restore a process with open RDMA devices.
//!
//! At dump it says which open file is which (the shims' report in `rdma.img` names them by process and descriptor) and
//! accepts mappings of RDMA devices. At restore, running inside the task that is being restored, it fetches the files
//! and queue offsets from the incubator, or in *rebuild* mode puts placeholders there. In a directory of images without
//! `rdma.img` it does nothing at all.
//!
//! It makes no RDMA call and keeps no descriptor open between two hooks: CRIU needs the low numbers for the task.
//!
//! | module | subject |
//! |---|---|
//! | `criu` | what CRIU offers a plugin: log, image directory, its version |
//! | `dump`, `restore` | the hooks |
//! | `files` | the plugin's own image: CRIU's file id → whose descriptor it was |
//! | [`image`] | `rdma.img`, the same source as the engine's |
//! | [`wire`] | requests to the incubator, the same source as the engine's |
#![expect(unsafe_code, reason = "CRIU calls C functions with C arguments")]

mod criu;
mod dump;
mod files;
#[path = "../../src/image.rs"]
pub mod image;
#[path = "../../src/kcmp.rs"]
mod kcmp;
mod restore;
pub mod wire;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

/// The answer that lets CRIU ask the next plugin.
const NOT_OURS: c_int = -libc::ENOTSUP;

/// How a hook ended without an answer.
#[derive(Debug)]
enum Stop {
    /// Nothing of ours.
    NotOurs,
    /// CRIU must fail; the text goes to its log.
    Fail(String),
}

impl From<String> for Stop {
    fn from(why: String) -> Self {
        Stop::Fail(why)
    }
}

/// What CRIU is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Dump,
    PreDump,
    Restore,
}

/// What the plugin knows between hooks; tasks being restored inherit it by fork.
#[derive(Debug)]
enum State {
    /// Before `init`, or no `rdma.img`.
    Inert,
    PreDump,
    Dump(dump::Dump),
    Restore(restore::Restore),
}

static STATE: Mutex<State> = Mutex::new(State::Inert);

/// `cr_plugin_desc_t` of CRIU's `criu-plugin.h`, cut after the last hook we use: CRIU refuses a plugin that knows more
/// hooks than itself, and looks at no more than `max_hooks`.
#[repr(C)]
#[derive(Debug)]
pub struct PluginDesc {
    name: *const c_char,
    init: extern "C" fn(c_int) -> c_int,
    exit: extern "C" fn(c_int, c_int),
    version: c_uint,
    max_hooks: c_uint,
    hooks: [*const c_void; HOOKS],
}

// SAFETY: it is constant, and its pointers point to functions and a string literal.
unsafe impl Sync for PluginDesc {}

const HOOKS: usize = 9;
const DUMP_EXT_FILE: usize = 2;
const RESTORE_EXT_FILE: usize = 3;
const HANDLE_DEVICE_VMA: usize = 7;
const UPDATE_VMA_MAP: usize = 8;

/// `CRIU_PLUGIN_GEN_VERSION(0, 2, 0)`.
const PLUGIN_ABI: c_uint = 2 << 8;

/// The symbol CRIU looks up.
#[unsafe(no_mangle)]
pub static CR_PLUGIN_DESC: PluginDesc = PluginDesc {
    name: c"migrrdma".as_ptr(),
    init,
    exit,
    version: PLUGIN_ABI,
    max_hooks: HOOKS as c_uint,
    hooks: {
        let mut hooks = [std::ptr::null(); HOOKS];
        hooks[DUMP_EXT_FILE] = dump_ext_file as *const c_void;
        hooks[RESTORE_EXT_FILE] = restore_ext_file as *const c_void;
        hooks[HANDLE_DEVICE_VMA] = handle_device_vma as *const c_void;
        hooks[UPDATE_VMA_MAP] = update_vma_map as *const c_void;
        hooks
    },
};

/// Runs a hook so that neither an error nor a panic crosses into C.
fn fence(hook: &str, body: impl FnOnce(&mut State) -> Result<c_int, Stop>) -> c_int {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let mut state = STATE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        body(&mut state)
    }));
    match outcome {
        Ok(Ok(answer)) => answer,
        Ok(Err(Stop::NotOurs)) => NOT_OURS,
        Ok(Err(Stop::Fail(why))) => {
            criu::error(&why);
            -1
        }
        Err(_) => {
            criu::error(&format!("the plugin has a bug: panic in {hook}"));
            -1
        }
    }
}

extern "C" fn init(stage: c_int) -> c_int {
    fence("init", |state| {
        let stage = match stage {
            0 => Stage::Dump,
            1 => Stage::PreDump,
            2 => Stage::Restore,
            _ => return Ok(0),
        };
        *state = match stage {
            Stage::PreDump => State::PreDump,
            Stage::Dump => dump::Dump::begin()?.map_or(State::Inert, State::Dump),
            Stage::Restore => restore::Restore::begin()?.map_or(State::Inert, State::Restore),
        };
        Ok(0)
    })
}

extern "C" fn exit(_stage: c_int, _status: c_int) {
    fence("exit", |state| {
        *state = State::Inert;
        Ok(0)
    });
}

extern "C" fn dump_ext_file(fd: c_int, id: c_int) -> c_int {
    fence("DUMP_EXT_FILE", |state| match state {
        State::Dump(dump) => dump.file(fd, id as u32).map(|()| 0),
        _ => Err(Stop::NotOurs),
    })
}

extern "C" fn handle_device_vma(_fd: c_int, stat: *const libc::stat) -> c_int {
    fence("HANDLE_DEVICE_VMA", |state| {
        // SAFETY: CRIU passes a valid stat structure, or null, which as_ref turns into None.
        let stat = unsafe { stat.as_ref() }.ok_or(Stop::NotOurs)?;
        match state {
            State::Dump(_) | State::PreDump if dump::is_rdma_device(stat) => Ok(0),
            _ => Err(Stop::NotOurs),
        }
    })
}

extern "C" fn restore_ext_file(id: c_int, retry_needed: *mut bool) -> c_int {
    fence("RESTORE_EXT_FILE", |state| match state {
        State::Restore(restore) => {
            let fd = restore.file(id as u32)?;
            if criu::asks_for_retry() && !retry_needed.is_null() {
                // SAFETY: this CRIU passes the address of a bool (and leaves it uninitialised, so it must be written);
                // older ones pass one argument only, and then it is not touched.
                unsafe { retry_needed.write(false) };
            }
            Ok(std::os::fd::IntoRawFd::into_raw_fd(fd))
        }
        _ => Err(Stop::NotOurs),
    })
}

extern "C" fn update_vma_map(
    path: *const c_char,
    addr: u64,
    old_offset: u64,
    new_offset: *mut u64,
    fd: *mut c_int,
) -> c_int {
    fence("UPDATE_VMA_MAP", |state| match state {
        State::Restore(restore) if !path.is_null() && !new_offset.is_null() && !fd.is_null() => {
            // SAFETY: CRIU passes a NUL-terminated path.
            let path = unsafe { std::ffi::CStr::from_ptr(path) }.to_string_lossy();
            let place = restore.map(&path, addr, old_offset)?;
            // SAFETY: both point to variables of the caller; checked for null above.
            unsafe {
                new_offset.write(place.offset);
                fd.write(std::os::fd::IntoRawFd::into_raw_fd(place.fd));
            }
            Ok(1)
        }
        _ => Err(Stop::NotOurs),
    })
}
