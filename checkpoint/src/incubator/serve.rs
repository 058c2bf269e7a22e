//! The plugin's side of an incubator: a unix socket on which restored tasks ask for their files and queues. It answers
//! only while armed, one request per connection, and remembers what it has given away.

use super::objects::{Expected, Objects};
use super::proto::Handed;
use super::wire::{Answer, BadPacket, MAX_PLACES, REQUEST, Want};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind, listen, recv,
    sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// How long one restored task may take to ask and to listen, seconds.
const PATIENCE_S: i64 = 5;

/// The plugin socket.
#[derive(Debug)]
pub struct Service {
    listener: OwnedFd,
    path: PathBuf,
    armed: bool,
    files: BTreeSet<(i32, i32)>,
    maps: BTreeSet<(i32, u64)>,
}

impl Service {
    /// Binds the socket. It is open to every user: who can reach the directory is the container, whose tasks are being
    /// restored with credentials of their own.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
        fs::set_permissions(path, Permissions::from_mode(0o666))?;
        listen(&listener, Backlog::new(64)?)?;
        Ok(Self { listener, path: path.into(), armed: false, files: BTreeSet::new(), maps: BTreeSet::new() })
    }

    pub fn arm(&mut self, armed: bool) {
        self.armed = armed;
    }

    /// What has been given away, and what has not although somebody must come for it.
    pub fn handed(&self, objects: &Objects) -> Handed {
        let Expected { files, maps } = objects.expected();
        let missing_files = files
            .into_iter()
            .filter(|(vpid, fd, _)| !self.files.contains(&(*vpid, *fd)))
            .map(|(vpid, fd, what)| format!("process {vpid}: descriptor {fd}, {what}"));
        let missing_maps = maps
            .into_iter()
            .filter(|(vpid, addr, _)| !self.maps.contains(&(*vpid, *addr)))
            .map(|(vpid, addr, what)| format!("process {vpid}: {what} at {addr:#x}"));
        Handed {
            files: self.files.len() as u32,
            maps: self.maps.len() as u32,
            missing: missing_files.chain(missing_maps).collect(),
        }
    }

    /// Answers everyone who waits.
    pub fn answer(&mut self, objects: &Objects) -> io::Result<()> {
        loop {
            let client = match accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
                Ok(client) => own(client),
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(nix::errno::Errno::EINTR | nix::errno::Errno::ECONNABORTED) => continue,
                Err(e) => return Err(e.into()),
            };
            // One client that hangs up or stays silent is its own problem: CRIU fails the restore and says so.
            let _ = self.one(&client, objects);
        }
    }

    fn one(&mut self, client: &OwnedFd, objects: &Objects) -> io::Result<()> {
        let patience = TimeVal::new(PATIENCE_S, 0);
        setsockopt(client, sockopt::ReceiveTimeout, &patience)?;
        setsockopt(client, sockopt::SendTimeout, &patience)?;
        let mut packet = [0; REQUEST + 1];
        let len = recv(client.as_raw_fd(), &mut packet, MsgFlags::empty())?;
        let (answer, fd) = match Want::decode(&packet[..len]) {
            Ok(want) => self.grant(want, objects),
            Err(BadPacket) => (Answer::Refused { why: BadPacket.to_string() }, None),
        };
        if let Answer::Refused { why } = &answer {
            eprintln!("incubator: refused a request of the CRIU plugin: {why}");
        }
        let bytes = answer.encode();
        let fds = fd.map(|fd| [fd.as_raw_fd()]);
        let rights = fds.as_ref().map(|fds| ControlMessage::ScmRights(fds));
        sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(&bytes)], rights.as_slice(), MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }

    fn grant<'o>(&mut self, want: Want, objects: &'o Objects) -> (Answer, Option<BorrowedFd<'o>>) {
        if !self.armed {
            return (Answer::Refused { why: "no restore of this container is under way".into() }, None);
        }
        match want {
            Want::File { vpid, fd } => match objects.file(vpid, fd) {
                Some(file) => {
                    self.files.insert((vpid, fd));
                    (Answer::Granted { offset: 0 }, Some(file))
                }
                None => (Answer::Refused { why: format!("process {vpid} has no RDMA file {fd} here") }, None),
            },
            Want::Map { vpid, addr, offset: _ } => match objects.queue(vpid, addr) {
                Ok(grant) => {
                    self.maps.insert((vpid, addr));
                    (Answer::Granted { offset: grant.offset }, Some(grant.fd))
                }
                Err(why) => (Answer::Refused { why }, None),
            },
            // It maps them from files it has, so who has been told has them.
            Want::Maps { vpid, first } => match objects.places(vpid) {
                Ok(all) => {
                    let places: Vec<_> = all.into_iter().skip(first as usize).take(MAX_PLACES).collect();
                    self.maps.extend(places.iter().map(|place| (vpid, place.addr)));
                    (Answer::Places(places), None)
                }
                Err(why) => (Answer::Refused { why }, None),
            },
        }
    }
}

#[expect(unsafe_code, reason = "nix returns accepted descriptors as plain numbers")]
fn own(fd: i32) -> OwnedFd {
    // SAFETY: accept4 has just returned this descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl AsFd for Service {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
