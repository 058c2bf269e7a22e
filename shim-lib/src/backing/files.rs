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

/// A new file with `len` bytes of memory in it, all zero.
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
    // All of it now: a tmpfs that is full must show here, not when the application writes.
    let filled = file.set_len(len as u64 + TAIL).and_then(|()| allocate(&file, len));
    match filled {
        Ok(()) => Ok((name, file)),
        Err(e) => {
            remove(&name);
            Err(e)
        }
    }
}

#[expect(unsafe_code, reason = "fallocate has no safe interface")]
fn allocate(file: &File, len: usize) -> io::Result<()> {
    // SAFETY: our own file.
    match unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, len as i64) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
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
