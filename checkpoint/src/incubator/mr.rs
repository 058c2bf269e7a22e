//! MRs of registered memory that has arrived: each is registered on a mapping of the file that the restored process will
//! map, at the address the process knows. The NIC holds the file's pages, whoever maps them and where, so the mapping
//! here is gone again at once.
#![expect(unsafe_code, reason = "maps files")]

use crate::uverbs::{Context, UverbsError};
use nix::fcntl::{OFlag, openat};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::Mode;
use rdma_virt::id::{Handle, ObjId, PLkey, PRkey};
use rdma_virt::saved::{AdoptedMr, BackedMemory, MrState};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// The directory of the container's memory files.
#[derive(Debug)]
pub struct Memory(File);

impl Memory {
    pub fn open(dir: &Path) -> io::Result<Self> {
        File::open(dir).map(Self)
    }

    /// The files of one process.
    pub fn of<'a>(&'a self, list: &'a [BackedMemory]) -> Files<'a> {
        Files { dir: Some(&self.0), list, open: BTreeMap::new() }
    }
}

/// The files of one process, opened as they are needed.
#[derive(Debug, Default)]
pub struct Files<'a> {
    dir: Option<&'a File>,
    list: &'a [BackedMemory],
    open: BTreeMap<String, Option<(File, u64)>>,
}

/// A registered MR.
#[derive(Debug)]
pub struct Mr {
    state: MrState,
    handle: Handle,
    plkey: PLkey,
    prkey: PRkey,
    /// Its file.
    file: String,
    inode: u64,
}

impl Mr {
    pub fn handle(&self) -> Handle {
        self.handle
    }

    /// Whether it is what the state says. (The numbers are those of another host.)
    pub fn same(&self, now: &MrState) -> bool {
        let parts = |s: &MrState| (s.pd, s.addr, s.length, s.iova, s.access);
        parts(&self.state) == parts(now)
    }

    pub fn report(&self, id: ObjId) -> AdoptedMr {
        AdoptedMr { id, handle: self.handle, plkey: self.plkey, prkey: self.prkey }
    }
}

impl Files<'_> {
    /// The file and its inode, if it is here and ours to open.
    fn open(&mut self, name: &str) -> Option<&(File, u64)> {
        let dir = self.dir?;
        if !self.open.contains_key(name) {
            let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            let plain = crate::agent::is_plain_name(name);
            let file = plain.then(|| openat(dir, name, flags, Mode::empty()).ok()).flatten().map(File::from);
            let file = file.and_then(|file| {
                let meta = file.metadata().ok()?;
                (meta.is_file() && !meta.file_type().is_fifo()).then(|| (file, meta.ino()))
            });
            self.open.insert(name.to_owned(), file);
        }
        self.open.get(name)?.as_ref()
    }

    /// Whether the MR holds pages of a file that is still there, and is still where the process has it.
    pub fn still(&mut self, mr: &Mr) -> bool {
        let place = self.list.iter().find(|b| b.holds(mr.state.addr, mr.state.length));
        place.is_some_and(|b| b.file == mr.file) && self.open(&mr.file).is_some_and(|(_, inode)| *inode == mr.inode)
    }

    /// Registers one, if its memory is in a file that is here.
    pub fn register(&mut self, context: &Context, pd: Handle, wanted: &MrState) -> Result<Option<Mr>, String> {
        let Some(place) = self.list.iter().find(|b| b.holds(wanted.addr, wanted.length)).cloned() else {
            return Ok(None);
        };
        let Some((file, inode)) = self.open(&place.file) else {
            return Err(format!("its memory file {} is not here", place.file));
        };
        let inode = *inode;
        let registered = mapped(file, place.len, |at| {
            let start = at + (wanted.addr - place.addr);
            context.reg_mr(pd, start, wanted.length, wanted.iova, wanted.access)
        });
        let made = registered.map_err(|e| e.to_string())?.map_err(|e: UverbsError| chain(&e))?;
        let (handle, plkey, prkey) = (made.handle, made.lkey, made.rkey);
        Ok(Some(Mr { state: *wanted, handle, plkey, prkey, file: place.file, inode }))
    }
}

fn chain(e: &UverbsError) -> String {
    crate::agent::chain(e)
}

/// Does `f` with the beginning of the file mapped.
fn mapped<R>(file: &File, len: u64, f: impl FnOnce(u64) -> R) -> io::Result<R> {
    let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
    let len = len.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    // SAFETY: a new mapping where the kernel has room; nobody looks into it.
    let at = unsafe { mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, 0) }?;
    let result = f(at.as_ptr() as u64);
    // SAFETY: the mapping from above.
    unsafe { munmap(at, len.get()) }?;
    Ok(result)
}
