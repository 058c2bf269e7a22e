//! Restore: runs inside the task that is being restored, in its mount and pid namespace, before it has its own
//! credentials. *Adopt* asks the incubator for the open files and queue offsets; *rebuild* puts placeholders in their
//! place, which the shim replaces when the process runs.

use crate::criu::{self, ImageDir};
use crate::files::{self, Record};
use crate::image::{HandOver, RdmaImage};
use crate::wire::{self, Answer, BadPacket, MAX_PLACES, Want};
use crate::{Stop, dump};
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// How long the incubator may take for one answer, seconds.
const PATIENCE_S: i64 = 20;

/// Longer than anything a provider maps, bytes.
const LONGEST: u64 = 1 << 32;

/// A restore of a container with RDMA.
#[derive(Debug)]
pub struct Restore {
    image: RdmaImage,
    files: BTreeMap<u32, Record>,
    socket: String,
    /// What this task maps, once it has asked.
    queues: Option<Queues>,
}

/// Descriptor and offset by address, of one process.
#[derive(Debug)]
struct Queues {
    vpid: i32,
    places: BTreeMap<u64, (i32, u64)>,
}

/// What CRIU shall map.
#[derive(Debug)]
pub struct Place {
    pub fd: OwnedFd,
    pub offset: u64,
}

impl Restore {
    pub fn begin() -> Result<Option<Self>, String> {
        let Some(dir) = ImageDir::open() else { return Ok(None) };
        let Some(image) = dump::load(&dir)? else { return Ok(None) };
        let files = files::read(&dir)?;
        let socket = std::env::var(wire::SOCKET_ENV).unwrap_or_else(|_| wire::SOCKET.to_owned());
        Ok(Some(Self { image, files, socket, queues: None }))
    }

    /// `RESTORE_EXT_FILE`: the open file that shall be CRIU's file `id`.
    pub fn file(&self, id: u32) -> Result<OwnedFd, Stop> {
        let record = self.files.get(&id).ok_or(Stop::NotOurs)?;
        let nonblock = record.flags & libc::O_NONBLOCK != 0;
        match self.image.hand_over {
            HandOver::Rebuild => {
                let flags = if nonblock { EfdFlags::EFD_NONBLOCK } else { EfdFlags::empty() };
                let made = EventFd::from_value_and_flags(0, flags | EfdFlags::EFD_CLOEXEC);
                Ok(made.map_err(|e| format!("cannot make a placeholder for file {id:#x}: {e}"))?.into())
            }
            HandOver::Adopt => {
                let (fd, _) = self.ask(Want::File { vpid: record.vpid, fd: record.fd })?;
                let flags = if nonblock { OFlag::O_NONBLOCK } else { OFlag::empty() };
                // CRIU sets the flags of a descriptor but not those of an external open file.
                fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(|e| format!("cannot set flags of file {id:#x}: {e}"))?;
                Ok(fd)
            }
        }
    }

    /// `UPDATE_VMA_MAP`: what to map at `addr` of this task instead of `old_offset` of the device at `path`.
    ///
    /// CRIU does not stop when this hook fails but opens the path itself. So a failure hands it a file that cannot be
    /// mapped, and the restore ends there.
    pub fn map(&mut self, path: &str, addr: u64, old_offset: u64) -> Result<Place, Stop> {
        let vpid = nix::unistd::getpid().as_raw();
        // A device that was handed over by an incubator once has no path in the container: the image names it
        // `file[MOUNT:INODE]`, and what is mapped there says whose it is.
        let ours =
            path.contains("/infiniband/uverbs") || (path.starts_with("file[") && self.queue(vpid, addr).is_some());
        if !ours {
            return Err(Stop::NotOurs);
        }
        let result = match self.image.hand_over {
            HandOver::Adopt => self.adopted(vpid, addr, old_offset),
            HandOver::Rebuild => self.placeholder(vpid, addr),
        };
        result.or_else(|why| {
            criu::error(&why);
            let unmappable = File::open("/proc/self/stat").map_err(|e| format!("cannot open /proc/self/stat: {e}"))?;
            Ok(Place { fd: unmappable.into(), offset: 0 })
        })
    }

    /// CRIU has put a task's files in place before it maps anything, so what is told once for all queues is enough. Of a
    /// process with other files under its numbers (it shares its parent's memory but not its report) every queue is asked
    /// for by itself.
    fn adopted(&mut self, vpid: i32, addr: u64, old_offset: u64) -> Result<Place, String> {
        if self.queues.as_ref().is_none_or(|queues| queues.vpid != vpid) {
            self.queues = Some(self.ask_for_all(vpid)?);
        }
        let known = self.queues.as_ref().and_then(|queues| queues.places.get(&addr).copied());
        if let Some((fd, offset)) = known {
            return duplicate(fd).map(|fd| Place { fd, offset });
        }
        self.ask(Want::Map { vpid, addr, offset: old_offset }).map(|(fd, offset)| Place { fd, offset })
    }

    fn ask_for_all(&self, vpid: i32) -> Result<Queues, String> {
        let mut places = BTreeMap::new();
        loop {
            match self.talk(Want::Maps { vpid, first: places.len() as u32 })? {
                (Answer::Places(more), _) => {
                    let last = more.len() < MAX_PLACES;
                    places.extend(more.iter().map(|place| (place.addr, (place.fd, place.offset))));
                    if last {
                        let files: BTreeSet<RawFd> = places.values().map(|(fd, _)| *fd).collect();
                        let other: BTreeSet<RawFd> = files.into_iter().filter(|fd| !is_device(*fd)).collect();
                        places.retain(|_, (fd, _)| !other.contains(fd));
                        return Ok(Queues { vpid, places });
                    }
                }
                // Nothing of it is known: who asks for one by itself hears why.
                (Answer::Refused { .. }, _) => return Ok(Queues { vpid, places }),
                (Answer::Granted { .. }, _) => return Err(BadPacket.to_string()),
            }
        }
    }

    /// Length of the queue that this process has at this address.
    fn queue(&self, vpid: i32, addr: u64) -> Option<u64> {
        let contexts = self.image.processes.iter().filter(|p| p.state.vpid.0 == vpid).flat_map(|p| &p.state.contexts);
        let mut maps = contexts.flat_map(|context| {
            let cqs = context.cqs.iter().map(|cq| cq.map);
            let srqs = context.srqs.iter().map(|srq| srq.map);
            let qps = context.qps.iter().flat_map(|qp| [qp.sq_map, qp.rq_map]);
            cqs.chain(srqs).chain(qps).flatten()
        });
        maps.find(|map| map.addr == addr).map(|map| map.len)
    }

    /// Memory as long as the queue was. Of a provider nobody knows, no shim reports what it maps (doorbell pages, for
    /// instance): there it is longer than any, and takes no memory until it is touched, which nobody does.
    fn placeholder(&self, vpid: i32, addr: u64) -> Result<Place, String> {
        let len = self.queue(vpid, addr).unwrap_or(LONGEST);
        let memory = memfd_create(c"migrrdma-queue", MFdFlags::MFD_CLOEXEC)
            .and_then(|fd| nix::unistd::ftruncate(&fd, len as i64).map(|()| fd))
            .map_err(|e| format!("cannot make a placeholder of {len} bytes for the queue at {addr:#x}: {e}"))?;
        Ok(Place { fd: memory, offset: 0 })
    }

    /// Asks the incubator for one file.
    fn ask(&self, want: Want) -> Result<(OwnedFd, u64), String> {
        match self.talk(want)? {
            (Answer::Granted { offset }, Some(fd)) => Ok((fd, offset)),
            (Answer::Granted { .. }, None) => Err(format!("the incubator granted {want:?} but sent no descriptor")),
            (Answer::Refused { why }, _) => Err(why),
            (Answer::Places(_), _) => Err(BadPacket.to_string()),
        }
    }

    /// Asks the incubator; nothing stays open but what it gives.
    fn talk(&self, want: Want) -> Result<(Answer, Option<OwnedFd>), String> {
        let path = &self.socket;
        let fail = |what: &str, e: nix::errno::Errno| format!("{what} the incubator at {path}: {e}");
        let talk = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(|e| fail("cannot make a socket to", e))?;
        let patience = TimeVal::new(PATIENCE_S, 0);
        setsockopt(&talk, sockopt::ReceiveTimeout, &patience).map_err(|e| fail("cannot talk to", e))?;
        setsockopt(&talk, sockopt::SendTimeout, &patience).map_err(|e| fail("cannot talk to", e))?;
        let address = UnixAddr::new(path.as_str()).map_err(|e| fail("cannot name", e))?;
        connect(talk.as_raw_fd(), &address).map_err(|e| fail("cannot reach", e))?;
        send(talk.as_raw_fd(), &want.encode(), MsgFlags::MSG_NOSIGNAL).map_err(|e| fail("cannot ask", e))?;

        let mut packet = vec![0; wire::MAX_REPLY + 1];
        let mut control = cmsg_space!(RawFd);
        let mut parts = [IoSliceMut::new(&mut packet)];
        let (len, fd) = {
            let reply = recvmsg::<()>(talk.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
                .map_err(|e| fail("no answer from", e))?;
            let fds = reply.cmsgs().map_err(|e| fail("no whole answer from", e))?.find_map(|message| match message {
                ControlMessageOwned::ScmRights(fds) => Some(fds),
                _ => None,
            });
            (reply.bytes, fds.and_then(|fds| fds.first().copied()).map(own))
        };
        Answer::decode(&packet[..len]).map(|answer| (answer, fd)).map_err(|bad| bad.to_string())
    }
}

/// Whether this task has an RDMA device open under this number.
fn is_device(fd: RawFd) -> bool {
    nix::sys::stat::fstat(borrow(fd)).is_ok_and(|stat| dump::is_rdma_device(&stat))
}

/// One more descriptor of what this task has open under this number.
fn duplicate(fd: RawFd) -> Result<OwnedFd, String> {
    borrow(fd).try_clone_to_owned().map_err(|e| format!("cannot duplicate descriptor {fd}: {e}"))
}

#[expect(unsafe_code, reason = "the image knows descriptors by number")]
fn borrow<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: the callers look at it or duplicate it, at once; a number that is not open gives EBADF.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

#[expect(unsafe_code, reason = "nix returns received descriptors as plain numbers")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just put this descriptor into our table for this message; nobody else knows it.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }
}
