//! One directory per container, shared with it: the socket its shims connect to, and the epoch they watch.
//!
//! The container's runtime makes `RUN/containers/ID/` and mounts it into the container; the agent puts `agent.sock`
//! and `epoch` there. So the socket a connection arrives on says which container speaks; that the caller really lives
//! in its cgroup is checked all the same. What is said on a connection is not known here.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::metrics::Reason;

/// Name of the socket in a container's directory.
pub const SOCKET: &str = "agent.sock";

/// Name of the epoch file: a decimal number and a newline, replaced as a whole.
pub const EPOCH: &str = "epoch";

/// Open connections per container; one control connection per process, and short questions.
const MOST: usize = 1024;

/// Connections of one container that are accepted before those of the others.
const TURN: usize = 64;

/// Without any event, directories are looked through this often.
const RESCAN: Duration = Duration::from_secs(2);

/// Is told of every connection.
pub trait Caller: Send + Sync + 'static {
    /// Serves a connection from `pid` (agent's namespace) of `container` to its end, in a thread of its own.
    fn serve(&self, container: &str, pid: i32, stream: UnixStream);
    /// The container's directory is gone, or another one has its name.
    fn gone(&self, container: &str);
    /// Somebody was not even asked what they want.
    fn rejected(&self, reason: Reason);
}

struct Door {
    listener: UnixListener,
    path: PathBuf,
    /// Of the socket file we made; another number there means that the directory was made anew.
    inode: u64,
    /// Of the container's directory: a container that takes an old one's name has another.
    directory: u64,
    open: Arc<AtomicUsize>,
}

/// The directories of all containers.
#[derive(Debug, Clone)]
pub struct Doors {
    dir: PathBuf,
    /// Containers whose epoch must not be touched by a scan, with the reason of their being here.
    lock: Arc<Mutex<()>>,
}

impl Doors {
    /// `run_dir/containers`, made if missing.
    pub fn open(run_dir: &Path) -> io::Result<Self> {
        let dir = run_dir.join("containers");
        fs::create_dir_all(&dir)?;
        fs::set_permissions(run_dir, fs::Permissions::from_mode(0o711))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
        Ok(Doors { dir, lock: Arc::default() })
    }

    /// The directory of one container.
    pub fn of(&self, container: &str) -> PathBuf {
        self.dir.join(container)
    }

    /// Tells the container's shims that the world has changed: they connect again. A container without RDMA has no
    /// directory, and nobody in it to be told.
    pub fn bump(&self, container: &str) -> io::Result<()> {
        let _one = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = self.of(container);
        if dir.exists() { write_epoch(&dir) } else { Ok(()) }
    }

    /// Listens for every container that is there or comes, until the process ends.
    pub fn serve(&self, caller: Arc<dyn Caller>) -> io::Result<()> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_DELETE;
        inotify.add_watch(&self.dir, flags)?;
        let doors = self.clone();
        thread::Builder::new().name("doors".into()).spawn(move || {
            let mut open: BTreeMap<String, Door> = BTreeMap::new();
            loop {
                doors.scan(&mut open, &caller);
                doors.wait(&inotify, &open, &caller);
            }
        })?;
        Ok(())
    }

    /// Brings the open sockets to what the directory says.
    fn scan(&self, open: &mut BTreeMap<String, Door>, caller: &Arc<dyn Caller>) {
        let inode = |path: &Path| fs::metadata(path).map(|m| m.ino()).ok();
        open.retain(|id, door| {
            if inode(&self.of(id)) != Some(door.directory) {
                caller.gone(id);
                return false;
            }
            inode(&door.path) == Some(door.inode)
        });
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) => {
                eprintln!("{}: {e}", self.dir.display());
                return;
            }
        };
        for entry in entries.flatten() {
            let Ok(id) = entry.file_name().into_string() else { continue };
            if open.contains_key(&id) || !entry.file_type().is_ok_and(|t| t.is_dir()) {
                continue;
            }
            match self.open_door(&entry.path()) {
                Ok(door) => {
                    open.insert(id, door);
                }
                Err(e) => eprintln!("no socket for container {id}: {}: {e}", entry.path().display()),
            }
        }
    }

    fn open_door(&self, dir: &Path) -> io::Result<Door> {
        let path = dir.join(SOCKET);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        // Any user of the container may speak for its own process.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        {
            let _one = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
            if !dir.join(EPOCH).exists() {
                write_epoch(dir)?;
            }
        }
        let inode = fs::metadata(&path)?.ino();
        let directory = fs::metadata(dir)?.ino();
        Ok(Door { listener, path, inode, directory, open: Arc::default() })
    }

    fn wait(&self, inotify: &Inotify, open: &BTreeMap<String, Door>, caller: &Arc<dyn Caller>) {
        let listeners: Vec<(&String, &Door)> = open.iter().collect();
        let mut fds = vec![PollFd::new(inotify.as_fd(), PollFlags::POLLIN)];
        fds.extend(listeners.iter().map(|(_, d)| PollFd::new(d.listener.as_fd(), PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(RESCAN).unwrap_or(PollTimeout::NONE);
        if let Err(e) = poll(&mut fds, timeout) {
            if e != nix::errno::Errno::EINTR {
                eprintln!("waiting for connections: {e}");
                thread::sleep(RESCAN);
            }
            return;
        }
        // Empties the queue; what the events say is found by the next scan.
        while inotify.read_events().is_ok_and(|events| !events.is_empty()) {}
        for ((id, door), fd) in listeners.iter().zip(&fds[1..]) {
            if fd.any() == Some(true) {
                accept(id, door, caller);
            }
        }
    }
}

fn accept(id: &str, door: &Door, caller: &Arc<dyn Caller>) {
    // Then it is the others' turn.
    for _ in 0..TURN {
        let stream = match door.listener.accept() {
            Ok((stream, _)) => stream,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
            Err(e) => {
                eprintln!("container {id}: accepting a connection: {e}");
                return;
            }
        };
        let pid = match peer_pid(stream.as_fd()) {
            Ok(pid) => pid,
            Err(e) => {
                eprintln!("container {id}: a connection without credentials: {e}");
                caller.rejected(Reason::Credentials);
                continue;
            }
        };
        let many = door.open.fetch_add(1, Ordering::Relaxed) >= MOST;
        if many || stream.set_nonblocking(false).is_err() {
            door.open.fetch_sub(1, Ordering::Relaxed);
            if many {
                caller.rejected(Reason::Flood);
            }
            continue;
        }
        let (caller, count, id) = (caller.clone(), door.open.clone(), id.to_owned());
        let spawned = thread::Builder::new().name("shim".into()).stack_size(512 << 10).spawn(move || {
            caller.serve(&id, pid, stream);
            count.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(e) = spawned {
            door.open.fetch_sub(1, Ordering::Relaxed);
            eprintln!("no thread for a shim: {e}");
        }
    }
}

/// The process that connected, in our pid namespace.
pub fn peer_pid(fd: BorrowedFd<'_>) -> nix::Result<i32> {
    debug_assert!(fd.as_raw_fd() >= 0);
    Ok(getsockopt(&fd, PeerCredentials)?.pid())
}

/// A number never used before on any host: a container that comes back must not find the one it left with.
fn write_epoch(dir: &Path) -> io::Result<()> {
    let number = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64);
    let (path, new) = (dir.join(EPOCH), dir.join(".epoch.new"));
    fs::write(&new, format!("{number}\n"))?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o644))?;
    fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::time::Instant;

    #[derive(Default)]
    struct Tell(Mutex<Vec<String>>);
    impl Caller for Tell {
        fn gone(&self, container: &str) {
            self.0.lock().unwrap().push(container.into());
        }

        fn rejected(&self, reason: Reason) {
            self.0.lock().unwrap().push(format!("{reason:?}"));
        }

        fn serve(&self, container: &str, pid: i32, mut stream: UnixStream) {
            let _ = write!(stream, "{container} {pid}");
        }
    }

    fn connect(path: &Path) -> UnixStream {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return stream,
                Err(e) if Instant::now() > until => panic!("{}: {e}", path.display()),
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    #[test]
    fn a_container_that_goes_is_told_also_when_another_takes_its_name_at_once() {
        let run = tempfile::tempdir().unwrap();
        let doors = Doors::open(run.path()).unwrap();
        let told = Arc::new(Tell::default());
        let caller: Arc<dyn Caller> = told.clone();
        let gone = || std::mem::take(&mut *told.0.lock().unwrap());
        fs::create_dir(doors.of("one")).unwrap();
        let mut open = BTreeMap::new();
        doors.scan(&mut open, &caller);
        fs::remove_file(doors.of("one").join(SOCKET)).unwrap();
        doors.scan(&mut open, &caller);
        assert!(gone().is_empty(), "it is the same container");
        // The new directory is made before the old one goes, so that it cannot have its number.
        fs::create_dir(run.path().join("next")).unwrap();
        fs::remove_dir_all(doors.of("one")).unwrap();
        fs::rename(run.path().join("next"), doors.of("one")).unwrap();
        doors.scan(&mut open, &caller);
        assert_eq!(gone(), ["one"]);
        assert!(open.contains_key("one"), "and the new one is served");
        fs::remove_dir_all(doors.of("one")).unwrap();
        doors.scan(&mut open, &caller);
        assert_eq!(gone(), ["one"]);
    }

    #[test]
    fn a_container_that_appears_gets_a_socket_that_knows_its_name() {
        let run = tempfile::tempdir().unwrap();
        let doors = Doors::open(run.path()).unwrap();
        doors.serve(Arc::new(Tell::default())).unwrap();
        fs::create_dir(doors.of("late")).unwrap();
        let mut said = String::new();
        connect(&doors.of("late").join(SOCKET)).read_to_string(&mut said).unwrap();
        assert_eq!(said, format!("late {}", std::process::id()));
        let epoch = |doors: &Doors| fs::read_to_string(doors.of("late").join(EPOCH)).unwrap();
        let before = epoch(&doors);
        doors.bump("late").unwrap();
        assert_ne!(before, epoch(&doors));
        assert!(epoch(&doors).trim_end().parse::<u64>().is_ok());
        doors.bump("plain").unwrap();
        assert!(!doors.of("plain").exists(), "a container without RDMA is left alone");
    }
}
