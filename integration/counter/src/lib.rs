//! A plugin of QEMU that counts the instructions a node executes and writes down, every millisecond in which it executed
//! any, how many they were by then. The benchmark reads that: a count of work, which a busy machine does not change.
//!
//! The file (argument `out=PATH`) is a ring of [`SLOTS`] pairs of little-endian 64-bit numbers: nanoseconds since 1970, and
//! instructions since the node's start. What they are good for is not known here.
#![expect(unsafe_code, reason = "QEMU calls C functions with C arguments, and so does whoever calls it")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

/// Pairs in the file: a minute of a node that is never idle.
const SLOTS: u64 = 1 << 16;
const EVERY: Duration = Duration::from_millis(1);

/// `QEMU_PLUGIN_VERSION` of the interface used here; QEMU 10.0 has it.
#[unsafe(no_mangle)]
pub static qemu_plugin_version: c_int = 4;

/// `qemu_plugin_u64` of `qemu-plugin.h`: one number per virtual CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct PerCpu {
    score: *mut c_void,
    offset: usize,
}

// SAFETY: the pointer is a handle that QEMU looks after, valid until it ends, and its functions may be called by any thread.
unsafe impl Send for PerCpu {}
// SAFETY: as above.
unsafe impl Sync for PerCpu {}

/// `QEMU_PLUGIN_INLINE_ADD_U64`.
const ADD: c_int = 0;

unsafe extern "C" {
    fn qemu_plugin_scoreboard_new(size: usize) -> *mut c_void;
    fn qemu_plugin_u64_get(entry: PerCpu, cpu: c_uint) -> u64;
    fn qemu_plugin_register_vcpu_init_cb(id: u64, call: extern "C" fn(u64, c_uint));
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, call: extern "C" fn(u64, *mut c_void));
    fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block: *mut c_void, op: c_int, entry: PerCpu, by: u64);
    fn qemu_plugin_tb_n_insns(block: *const c_void) -> usize;
}

static COUNT: OnceLock<PerCpu> = OnceLock::new();
/// There is a CPU, and its number can be read.
static RUNS: AtomicBool = AtomicBool::new(false);

extern "C" fn cpu_is_there(_id: u64, _cpu: c_uint) {
    RUNS.store(true, Ordering::Release);
}

/// Every block of instructions adds its length when it is executed.
extern "C" fn translated(_id: u64, block: *mut c_void) {
    let Some(count) = COUNT.get() else { return };
    // SAFETY: QEMU lends the block for the time of this call, and nothing of it is kept.
    unsafe {
        let length = qemu_plugin_tb_n_insns(block) as u64;
        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, ADD, *count, length);
    }
}

/// QEMU's first call; anything but 0 makes it end.
///
/// # Safety
/// `args` are as many strings as `count` says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    count: c_int,
    args: *const *const c_char,
) -> c_int {
    let all = (0..usize::try_from(count).unwrap_or(0)).map(|i| {
        // SAFETY: QEMU's contract, see above.
        unsafe { CStr::from_ptr(*args.add(i)) }
    });
    let Some(path) = all.filter_map(|arg| arg.to_bytes().strip_prefix(b"out=")).next_back() else {
        eprintln!("lab-counter: out=PATH is missing");
        return 1;
    };
    let out = match File::create(OsStr::from_bytes(path)) {
        Ok(out) => out,
        Err(e) => {
            eprintln!("lab-counter: {}: {e}", String::from_utf8_lossy(path));
            return 1;
        }
    };
    // SAFETY: plain calls of QEMU, in the function in which they are allowed.
    let count = unsafe {
        let count = PerCpu { score: qemu_plugin_scoreboard_new(size_of::<u64>()), offset: 0 };
        qemu_plugin_register_vcpu_init_cb(id, cpu_is_there);
        count
    };
    if COUNT.set(count).is_err() {
        return 1;
    }
    // SAFETY: as above.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    match thread::Builder::new().name("counter".into()).spawn(move || write_down(count, &out)) {
        Ok(_) => 0,
        Err(e) => {
            eprintln!("lab-counter: no thread: {e}");
            1
        }
    }
}

/// Until QEMU ends.
fn write_down(count: PerCpu, out: &File) {
    let (mut slot, mut last) = (0, 0);
    loop {
        thread::sleep(EVERY);
        if !RUNS.load(Ordering::Acquire) {
            continue;
        }
        // SAFETY: a node has one CPU, number 0, and it is there.
        let now = unsafe { qemu_plugin_u64_get(count, 0) };
        let Ok(at) = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) else { continue };
        if now == last {
            continue;
        }
        last = now;
        let mut pair = [0; 16];
        pair[..8].copy_from_slice(&(at.as_nanos() as u64).to_le_bytes());
        pair[8..].copy_from_slice(&now.to_le_bytes());
        // A disk that is full costs a number, not a node.
        let _ = out.write_all_at(&pair, slot % SLOTS * 16);
        slot += 1;
    }
}
