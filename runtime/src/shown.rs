//! A moved container's view of RDMA devices in sysfs: a directory of this host that lies over two of the kernel's.
//!
//! | in the container | on the host | |
//! |---|---|---|
//! | `/sys/class/infiniband` | `/run/migrrdma-agent/sysfs/ID/infiniband` | read-only |
//! | `/sys/class/infiniband_verbs` | `/run/migrrdma-agent/sysfs/ID/infiniband_verbs` | read-only |
//!
//! A container that never moved has no such mounts. The first move puts them over what CRIU restored, while the tasks
//! stand still; later ones find them in the image, as mounts from outside. What lies in them is [`likeness`]'s business.

#![expect(
    unsafe_code,
    reason = "mounts go to another mount namespace by descriptor, for which there is no safe interface"
)]

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, bail};
use checkpoint::likeness::{self, CLASSES, Likeness};
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::sys::statfs::{SYSFS_MAGIC, fstatfs};

use crate::inject::HostPaths;
use crate::mountinfo::Mounts;

/// Of this host.
const CLASS: &str = "/sys/class";

/// Mount points, as a container sees them.
pub fn points() -> [String; 2] {
    CLASSES.map(|class| format!("{CLASS}/{class}"))
}

/// Those of them that are mounts in a container.
pub fn mounted(mounts: &Mounts) -> Vec<String> {
    points().into_iter().filter(|point| mounts.iter().any(|mount| mount.at == point)).collect()
}

/// What a container has been shown since it came to this host.
pub fn known(id: &str, host: &HostPaths) -> Result<Vec<Likeness>> {
    Ok(likeness::read(&host.sysfs_dir(id))?)
}

/// Lays out what a container to come shall see.
pub fn lay(id: &str, devices: &[Likeness], host: &HostPaths) -> Result<()> {
    let dir = host.sysfs_dir(id);
    if let Some(above) = dir.parent() {
        fs::create_dir_all(above).with_context(|| format!("cannot make {}", above.display()))?;
    }
    Ok(likeness::lay(&dir, devices, Path::new(CLASS))?)
}

/// What a restore from these images has to show, laid out by now; `None` if it has nothing to show.
pub fn prepare(id: &str, images: &Path, host: &HostPaths) -> Result<Option<PathBuf>> {
    let dir = host.sysfs_dir(id);
    if !dir.is_dir() {
        let devices = likeness::read(images)?;
        if devices.is_empty() {
            return Ok(None);
        }
        lay(id, &devices, host)?;
    }
    Ok(Some(dir))
}

/// Writes what a container is shown into its image, for a restore elsewhere.
pub fn keep(id: &str, images: &Path, host: &HostPaths) -> Result<()> {
    if images.join(likeness::NAME).exists() {
        return Ok(());
    }
    Ok(likeness::write(images, &known(id, host)?)?)
}

/// Makes the place for what is laid out, and removes what was laid out for containers that are no more: their restore
/// was never begun. `root` holds the state of all containers.
pub fn tidy(root: &Path, host: &HostPaths) -> Result<()> {
    fs::create_dir_all(&host.sysfs).with_context(|| format!("cannot make {}", host.sysfs.display()))?;
    for entry in fs::read_dir(&host.sysfs).into_iter().flatten().flatten() {
        if !root.join(entry.file_name()).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    Ok(())
}

/// Puts the directories of `dir` over the kernel's, in the mount namespace of `init`, whose tasks stand still. A
/// container without sysfs has nothing to be shown.
pub fn mount_into(init: i32, dir: &Path) -> Result<()> {
    let trees = CLASSES.iter().map(|class| detached(&dir.join(class))).collect::<Result<Vec<_>>>()?;
    let namespace =
        File::open(format!("/proc/{init}/ns/mnt")).context("cannot open the container's mount namespace")?;
    // The thread ends there; nobody else sees the other namespace.
    let mounting = thread::spawn(move || -> Result<()> {
        unshare(CloneFlags::CLONE_FS).context("cannot take a root directory of our own")?;
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS).context("cannot enter the container's mount namespace")?;
        points().iter().zip(&trees).try_for_each(|(point, tree)| attach(tree.as_fd(), Path::new(point)))
    });
    match mounting.join() {
        Ok(done) => done,
        Err(_) => bail!("the thread that mounts in the container panicked"),
    }
}

/// A mount of that directory which is nowhere yet: read-only, by itself.
fn detached(dir: &Path) -> Result<OwnedFd> {
    let path = std::ffi::CString::new(dir.as_os_str().as_encoded_bytes())?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: a string that outlives the call.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = nix::errno::Errno::result(fd).with_context(|| format!("cannot mount {}", dir.display()))?;
    // SAFETY: the kernel just made this descriptor.
    let tree = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let attr = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: an empty path with a descriptor; the attribute outlives the call, and its size is passed with it.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            EMPTY.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of_val(&attr),
        )
    };
    nix::errno::Errno::result(set).with_context(|| format!("cannot make the mount of {} read-only", dir.display()))?;
    Ok(tree)
}

const EMPTY: &CStr = c"";

fn attach(tree: BorrowedFd<'_>, point: &Path) -> Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(place) = open(point, flags, Mode::empty()) else { return Ok(()) };
    // Only the kernel's own directory is covered, wherever the container's root has that path lead.
    if fstatfs(&place)?.filesystem_type() != SYSFS_MAGIC {
        return Ok(());
    }
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: empty paths with two descriptors that are open.
    let moved = unsafe {
        libc::syscall(libc::SYS_move_mount, tree.as_raw_fd(), EMPTY.as_ptr(), place.as_raw_fd(), EMPTY.as_ptr(), flags)
    };
    nix::errno::Errno::result(moved).with_context(|| format!("cannot mount over {}", point.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(dir: &Path) -> HostPaths {
        HostPaths { sysfs: dir.join("sysfs"), ..HostPaths::default() }
    }

    fn device() -> Likeness {
        Likeness {
            name: "rxe7".into(),
            driver: "rxe".into(),
            uverbs: "uverbs7".into(),
            files: vec![("node_guid".into(), "1\n".into())],
            verbs: vec![("ibdev".into(), "rxe7\n".into())],
            tables: vec![(1, 4)],
        }
    }

    #[test]
    fn what_an_image_shows_is_laid_out_once_and_goes_into_the_next_image() {
        let root = tempfile::tempdir().unwrap();
        let host = host(root.path());
        let (first, second) = (root.path().join("first"), root.path().join("second"));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        assert_eq!(prepare("x", &first, &host).unwrap(), None);
        likeness::write(&first, &[device()]).unwrap();
        let dir = prepare("x", &first, &host).unwrap().unwrap();
        assert_eq!(fs::read_to_string(dir.join("infiniband/rxe7/node_guid")).unwrap(), "1\n");
        assert_eq!(known("x", &host).unwrap(), [device()]);
        keep("x", &second, &host).unwrap();
        assert_eq!(likeness::read(&second).unwrap(), [device()]);
        tidy(root.path(), &host).unwrap();
        assert_eq!(known("x", &host).unwrap(), [], "no container x is here");
    }

    #[test]
    fn a_directory_is_put_over_the_kernels_in_another_mount_namespace_only() {
        let root = tempfile::tempdir().unwrap();
        let class = Path::new(CLASS);
        let points = points();
        if !points.iter().all(|p| Path::new(p).is_dir()) {
            // A kernel without RDMA: what is covered are two directories that every kernel has.
            assert!(class.is_dir());
        }
        likeness::lay(&root.path().join("x"), &[device()], class).unwrap();
        let mut other = std::process::Command::new("unshare");
        other.args(["--mount", "--propagation", "private", "sleep", "30"]);
        let mut other = other.spawn().unwrap();
        let pid = i32::try_from(other.id()).unwrap();
        let own = fs::read_link("/proc/self/ns/mnt").unwrap();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while fs::read_link(format!("/proc/{pid}/ns/mnt")).is_ok_and(|ns| ns == own) {
            assert!(std::time::Instant::now() < end, "no mount namespace within 10 s");
            thread::sleep(std::time::Duration::from_millis(10));
        }
        let done = mount_into(pid, &root.path().join("x"));
        let there = Mounts::of(pid).map(|mounts| mounted(&mounts));
        let seen = fs::read_to_string(format!("/proc/{pid}/root{}/rxe7/node_guid", points[0]));
        let _ = other.kill();
        let _ = other.wait();
        done.unwrap();
        let expected: Vec<String> = points.into_iter().filter(|p| Path::new(p).is_dir()).collect();
        assert_eq!(there.unwrap(), expected);
        assert_eq!(seen.is_ok(), !expected.is_empty());
        assert_eq!(mounted(&Mounts::own()), Vec::<String>::new());
    }
}
