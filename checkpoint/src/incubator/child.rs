//! The incubator process itself: one thread that waits for its parent's commands and for restored tasks.

use super::mr::Memory;
use super::objects::Objects;
use super::proto::{self, Command, Reply};
use super::rights;
use super::serve::Service;
use crate::uverbs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How long the parent may take for the rest of a command it has begun.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs an incubator on the socket that is its standard input, until the parent releases it or goes away. Returns the
/// exit status of the process. Everything it has to say in words goes to standard error.
pub fn main() -> i32 {
    let result = io::stdin().as_fd().try_clone_to_owned().map(UnixStream::from).and_then(|parent| run(&parent));
    match result {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("incubator: {e}");
            1
        }
    }
}

pub(super) fn run(parent: &UnixStream) -> io::Result<()> {
    allow_many_files();
    parent.set_read_timeout(Some(PATIENCE))?;
    parent.set_write_timeout(Some(PATIENCE))?;
    let start = match proto::receive(parent)? {
        Some(Command::Start(start)) => start,
        Some(_) => return Err(io::Error::other("the first command was not Start")),
        None => return Ok(()),
    };
    // The directory of the socket belongs to root, so this comes before the rights go. So does that of the memory.
    let memory = start.memory.as_deref().map(Memory::open).transpose()?;
    let bound = Service::bind(&start.socket)
        .map_err(|e| format!("cannot listen on {}: {e}", start.socket.display()))
        .and_then(|service| rights::take(&start.rights).map(|()| service));
    let mut service = match bound {
        Ok(service) => {
            proto::send(parent, &Reply::Done)?;
            service
        }
        Err(why) => return proto::send(parent, &Reply::Refused(why)),
    };
    let mut objects = Objects::new(start.devices, memory);
    loop {
        let mut waiting =
            [PollFd::new(parent.as_fd(), PollFlags::POLLIN), PollFd::new(service.as_fd(), PollFlags::POLLIN)];
        // No deadline: an incubator lives as long as its parent wants, and sees its end as the end of the stream. (A
        // parent-death signal would come when the *thread* that started us ends.)
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready = |fd: &PollFd<'_>| fd.revents().is_some_and(|events| !events.is_empty());
        let (command, task) = (ready(&waiting[0]), ready(&waiting[1]));
        if task {
            service.answer(&objects)?;
        }
        if command {
            let Some(command) = proto::receive(parent)? else { return Ok(()) };
            let last = command == Command::Release;
            let reply = obey(command, &mut objects, &mut service).unwrap_or_else(Reply::Refused);
            proto::send(parent, &reply)?;
            if last {
                return Ok(());
            }
        }
    }
}

/// Every context and every completion channel of the container is a descriptor here, so the limit that suits one of its
/// processes may not suit us. Failing to raise it shows when a channel cannot be made.
fn allow_many_files() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn obey(command: Command, objects: &mut Objects, service: &mut Service) -> Result<Reply, String> {
    match command {
        Command::Start(_) => Err("it has begun already".into()),
        Command::Converge(processes) => {
            let here = uverbs::devices().map_err(|e| e.to_string())?;
            objects.converge(&processes, &here).map_err(|e| e.to_string())?;
            Ok(Reply::Adopted(objects.report()))
        }
        Command::Connect(links) => {
            links.iter().try_for_each(|link| objects.connect(link)).map_err(|e| e.to_string())?;
            Ok(Reply::Done)
        }
        Command::Report => Ok(Reply::Adopted(objects.report())),
        Command::Arm(armed) => {
            service.arm(armed);
            Ok(Reply::Done)
        }
        Command::Handed => Ok(Reply::Handed(service.handed(objects))),
        Command::Release => Ok(Reply::Done),
    }
}
