//! What a CRIU process offers its plugins, looked up at run time: so the plugin loads (and says what is missing) in
//! anything, its own tests included.
#![expect(unsafe_code, reason = "functions of the CRIU binary are found by name and called")]

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

const LOG_ERROR: c_uint = 1;
const LOG_INFO: c_uint = 3;

fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a lookup by a NUL-terminated name among the loaded objects.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

fn log(level: c_uint, text: &str) {
    type Print = unsafe extern "C" fn(c_uint, *const c_char, ...);
    let line = CString::new(text.replace('\0', " ")).unwrap_or_default();
    match symbol(c"print_on_level") {
        Some(found) => {
            // SAFETY: CRIU's `void print_on_level(unsigned int, const char *, ...)`, called with one string.
            unsafe {
                let print: Print = std::mem::transmute::<*mut c_void, Print>(found);
                print(level, c"%s\n".as_ptr(), line.as_ptr());
            }
        }
        None => eprintln!("{text}"),
    }
}

/// One line in CRIU's log, in the form of its own errors.
pub fn error(text: &str) {
    log(LOG_ERROR, &format!("Error (migrrdma): {text}"));
}

/// One line in CRIU's log.
pub fn info(text: &str) {
    log(LOG_INFO, &format!("migrrdma: {text}"));
}

/// The image directory; closed again when dropped, CRIU's own descriptor stays.
#[derive(Debug)]
pub struct ImageDir(OwnedFd);

impl ImageDir {
    /// `None` outside CRIU.
    pub fn open() -> Option<Self> {
        type Get = unsafe extern "C" fn() -> c_int;
        let found = symbol(c"criu_get_image_dir")?;
        // SAFETY: CRIU's `int criu_get_image_dir(void)`.
        let fd = unsafe { std::mem::transmute::<*mut c_void, Get>(found)() };
        if fd < 0 {
            return None;
        }
        // SAFETY: CRIU keeps this descriptor open while plugins run; it is only borrowed for the duplication.
        let dir = unsafe { BorrowedFd::borrow_raw(fd) };
        dir.try_clone_to_owned().ok().map(Self)
    }

    #[cfg(test)]
    pub fn at(path: &std::path::Path) -> Self {
        Self(File::open(path).unwrap().into())
    }

    /// A file in it, or `None` if it does not exist.
    pub fn file(&self, name: &str, flags: OFlag) -> io::Result<Option<File>> {
        match openat(
            self.0.as_fd(),
            name,
            flags | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW,
            Mode::from_bits_truncate(0o600),
        ) {
            Ok(fd) => Ok(Some(File::from(fd))),
            Err(nix::errno::Errno::ENOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

/// Whether this CRIU passes `RESTORE_EXT_FILE` a second argument. Releases up to 4.2 pass one; the number of hooks the
/// running binary knows tells them apart, and the size of its table of hooks tells their number.
pub fn asks_for_retry() -> bool {
    hooks_known().is_some_and(|hooks| hooks > 14)
}

fn hooks_known() -> Option<usize> {
    const LIST_HEAD: usize = 2 * size_of::<usize>();
    const RTLD_DL_SYMENT: c_int = 1;
    unsafe extern "C" {
        fn dladdr1(addr: *const c_void, info: *mut libc::Dl_info, extra: *mut *mut c_void, flags: c_int) -> c_int;
    }
    let table = symbol(c"cr_plugin_ctl")?;
    let mut info = std::mem::MaybeUninit::<libc::Dl_info>::uninit();
    let mut entry: *mut c_void = std::ptr::null_mut();
    // SAFETY: both outputs are valid for writing; on success `entry` points to the symbol's entry in the binary's
    // symbol table, which stays mapped.
    unsafe {
        if dladdr1(table, info.as_mut_ptr(), &raw mut entry, RTLD_DL_SYMENT) == 0 || entry.is_null() {
            return None;
        }
        let size = (*entry.cast::<libc::Elf64_Sym>()).st_size as usize;
        // `struct { list_head; list_head[hooks]; }`
        (size / LIST_HEAD).checked_sub(1)
    }
}
