//! The files that hold registered memory: a directory that the container's runtime mounts into it, on a tmpfs. Without
//! the directory nothing is ever backed.
//!
//! A file is named by the process and a number. Nobody keeps it open; it is there by name, because a dump writes down
//! mappings by name. What a process that was killed left behind is removed by the next one that makes a file.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// Where it is in a container.
#[cfg(not(test))]
const DIR: &str = "/run/.migrrdma-memory";

/// A file is longer than what is mapped of it, so that a mapping which the application makes longer has memory behind
/// it: zeros, as private memory has. Bytes.
const TAIL: u64 = 1 << 40;

static NEXT: AtomicU32 = AtomicU32::new(1);

#[cfg(not(test))]
pub fn dir() -> String {
    DIR.to_owned()
}

/// Tests have one of their own.
#[cfg(test)]
pub fn dir() -> String {
    let dir = "/dev/shm/migrrdma-test".to_owned();
    let _ = fs::create_dir_all(&dir);
    dir
}

pub fn exists() -> bool {
    Path::new(&dir()).is_dir()
}

pub fn path(name: &str) -> String {
    format!("{}/{name}", dir())
}

/// A new file for `len` bytes of memory; it has none yet.
pub fn make(len: usize) -> io::Result<(String, File)> {
    unlimited()?;
    let mut options = OpenOptions::new();
    options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let (name, file) = loop {
        let name = format!("{}.{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        match options.open(path(&name)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            other => break (name, other?),
        }
    };
    match file.set_len(len as u64 + TAIL) {
        Ok(()) => Ok((name, file)),
        Err(e) => {
            remove(&name);
            Err(e)
        }
    }
}

/// Puts memory, all zero, into a part of a file.
#[expect(unsafe_code, reason = "fallocate has no safe interface")]
pub fn allocate(file: &File, at: usize, len: usize) -> io::Result<()> {
    // SAFETY: our own file.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, at as i64, len as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the memory out of a part of a file. Best effort: the file goes soon.
#[expect(unsafe_code, reason = "fallocate has no safe interface")]
pub fn punch(file: &File, at: u64, len: usize) {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: our own file.
    unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, len as i64) };
}

/// A limit on file sizes would end the process with a signal.
#[expect(unsafe_code, reason = "getrlimit has no safe interface")]
fn unlimited() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills our structure.
    let asked = unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &raw mut limit) };
    if asked == 0 && limit.rlim_cur == libc::RLIM_INFINITY {
        return Ok(());
    }
    Err(io::Error::other("file sizes are limited"))
}

pub fn open(name: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path(name))
}

pub fn remove(name: &str) {
    let _ = fs::remove_file(path(name));
}

/// Removes files whose process is gone, and those that `own` says this process does not use (it was another program
/// then).
pub fn clean(own: impl Fn(&str) -> bool) {
    let me = std::process::id();
    for entry in fs::read_dir(dir()).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let Some(pid) = name.split_once('.').and_then(|(pid, _)| pid.parse::<u32>().ok()) else { continue };
        let plain = entry.file_type().is_ok_and(|t| t.is_file());
        let stale = if pid == me { !own(&name) } else { !Path::new(&format!("/proc/{pid}")).exists() };
        if plain && stale {
            remove(&name);
        }
    }
}
