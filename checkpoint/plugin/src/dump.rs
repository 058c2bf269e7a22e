//! Dump: which open file of which process is this? CRIU shows a descriptor of its own; the kernel can say whether it is
//! the same open file as descriptor *n* of process *p* (`kcmp`), and `rdma.img` lists those.
#![expect(unsafe_code, reason = "CRIU lends descriptors by number")]

use crate::criu::{self, ImageDir};
use crate::files::{self, Record};
use crate::image::{self, RdmaImage};
use crate::kcmp::same_file;
use crate::{NOT_OURS, Stop};
use nix::fcntl::OFlag;
use std::fs;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::{Mutex, PoisonError};

/// A dump of a container with RDMA.
#[derive(Debug)]
pub struct Dump {
    image: RdmaImage,
}

/// Reads `rdma.img` from CRIU's image directory; `None` if it is not there.
pub fn load(dir: &ImageDir) -> Result<Option<RdmaImage>, String> {
    let Some(file) = dir.file(image::FILE, OFlag::O_RDONLY).map_err(|e| format!("cannot open {}: {e}", image::FILE))?
    else {
        return Ok(None);
    };
    image::read_file(file, image::FILE.into()).map(Some).map_err(|e| e.to_string())
}

/// Whether this is the character device of an RDMA context.
pub fn is_rdma_device(stat: &libc::stat) -> bool {
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR {
        return false;
    }
    // Each QP has two mappings of the same one.
    static LAST: Mutex<Option<(libc::dev_t, bool)>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, is)) = last.filter(|(device, _)| *device == stat.st_rdev) {
        return is;
    }
    let (major, minor) = (libc::major(stat.st_rdev), libc::minor(stat.st_rdev));
    let is = fs::read_link(format!("/sys/dev/char/{major}:{minor}"))
        .is_ok_and(|path| path.components().any(|part| part.as_os_str() == "infiniband_verbs"));
    *last = Some((stat.st_rdev, is));
    is
}

impl Dump {
    pub fn begin() -> Result<Option<Self>, String> {
        let Some(dir) = ImageDir::open() else { return Ok(None) };
        let Some(image) = load(&dir)? else { return Ok(None) };
        files::create(&dir).map_err(|e| format!("cannot create {}: {e}", files::FILE))?;
        Ok(Some(Self { image }))
    }

    /// `DUMP_EXT_FILE`: says whose descriptor the open file `fd` is, and notes it under CRIU's `id`.
    pub fn file(&self, fd: RawFd, id: u32) -> Result<(), Stop> {
        debug_assert_eq!(NOT_OURS, -libc::ENOTSUP);
        let link =
            fs::read_link(format!("/proc/self/fd/{fd}")).map_err(|e| format!("cannot look at descriptor {fd}: {e}"))?;
        let name = link.to_string_lossy();
        // SAFETY: CRIU lends this descriptor for the time of the call.
        let file = unsafe { BorrowedFd::borrow_raw(fd) };
        let stat = nix::sys::stat::fstat(file).map_err(|e| format!("cannot stat {name}: {e}"))?;
        if name != "anon_inode:[infinibandevent]" && !is_rdma_device(&stat) {
            return Err(Stop::NotOurs);
        }
        let (vpid, number) = self.owner(fd).ok_or_else(|| {
            format!("{name} is open in a process whose RDMA objects were not reported; it cannot be saved")
        })?;
        let flags = nix::fcntl::fcntl(file, nix::fcntl::FcntlArg::F_GETFL)
            .map_err(|e| format!("cannot read the flags of {name}: {e}"))?;
        let dir = ImageDir::open().ok_or_else(|| "CRIU has no image directory open".to_owned())?;
        files::append(&dir, Record { id, vpid, fd: number, flags })
            .map_err(|e| format!("cannot write {}: {e}", files::FILE))?;
        criu::info(&format!("file {id:#x} is descriptor {number} of process {vpid} ({name})"));
        Ok(())
    }

    fn owner(&self, fd: RawFd) -> Option<(i32, i32)> {
        let ours = (std::process::id() as i32, fd);
        self.image.processes.iter().find_map(|process| {
            descriptors(process)
                .find(|number| same_file(ours, (process.host_pid, *number)))
                .map(|number| (process.state.vpid.0, number))
        })
    }
}

/// Every descriptor of a process that belongs to RDMA.
fn descriptors(process: &image::ImagedProcess) -> impl Iterator<Item = i32> {
    process.state.contexts.iter().flat_map(|context| {
        [context.cmd_fd, context.async_fd].into_iter().chain(context.channels.iter().map(|channel| channel.fd))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_character_devices_are_not_ours() {
        let stat = nix::sys::stat::stat("/dev/null").unwrap();
        assert!(!is_rdma_device(&stat));
        let stat = nix::sys::stat::stat("/").unwrap();
        assert!(!is_rdma_device(&stat));
    }

    #[test]
    fn outside_criu_the_plugin_is_inert() {
        assert!(Dump::begin().unwrap().is_none());
    }
}
