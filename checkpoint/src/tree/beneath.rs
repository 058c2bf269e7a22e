//! Paths below a directory, resolved by the kernel so that no symbolic link is followed: neither one that an archive
//! brought nor one that a running container puts in the way at the right moment.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

fn how(flags: OFlag) -> OpenHow {
    OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS)
}

/// The open parent of a path, and its last name; `.` for the directory itself.
pub fn parent(dir: &OwnedFd, path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let Some(name) = path.file_name() else { return Ok((dir.try_clone()?, ".".into())) };
    let above = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((openat2(dir.as_fd(), above, how(OFlag::O_PATH | OFlag::O_DIRECTORY))?, name.to_owned()))
}

/// A regular file for reading.
pub fn file(dir: &OwnedFd, path: &Path) -> io::Result<File> {
    let file = File::from(openat2(dir.as_fd(), path, how(OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK))?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// A path for calls that take no descriptor; the kernel follows the descriptor's own link, then takes the one name.
pub fn at(parent: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name)
}
