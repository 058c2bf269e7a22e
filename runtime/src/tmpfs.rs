//! What a container has in its tmpfs, across a checkpoint.
//!
//! CRIU runs `tar` and `gzip` for every tmpfs, at both ends and inside the pause: a `/dev/shm` full of data is compressed
//! while the container stands still, and even an empty one costs three programs. So those that config.json asks for, and
//! the empty ones that lie over masked directories, are written here, and on the restoring host laid into new ones that
//! CRIU takes as mounts from outside.
//!
//! Any other one stays CRIU's: what the container mounted by itself, what is mounted in two places or under another
//! mount, what has a label or lies in a user namespace, and what consists mostly of holes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use checkpoint::tree::list::{Listing, list_one};
use checkpoint::tree::{pack, unpack};
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Spec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde::{Deserialize, Serialize};

use crate::criu_plan;
use crate::mountinfo::{Mount, Mounts};
use crate::rootfs;

/// Below a container's state directory: where they are mounted until CRIU has them.
pub const DIR: &str = "tmpfs";

/// An image that names more was not made by a container.
const MOST: usize = 256;

/// So many bytes of holes are written out as zeros.
const HOLES: u64 = 16 << 20;

/// One tmpfs in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Mount point as the container sees it.
    pub at: String,
    /// Options of the file system, in the kernel's words.
    pub options: String,
    /// File of the image that holds what lies in it, a tar archive. CRIU's name for it, too: masked paths have their own
    /// under another runtime.
    pub image: String,
}

/// Those of a container that are not left to CRIU. What decides is how things are now: tasks that run on may still change
/// what lies in them, but hardly where they are.
pub fn ours(spec: &Spec, root: &Path, pid: i32, mounts: &Mounts) -> Result<Vec<Tmpfs>> {
    let simple = |(at, _): &(String, String)| {
        // One that cannot be listed is not ours to judge.
        list_one(&below(pid, at)).is_ok_and(|listing| listing.bytes() <= listing.held + HOLES)
    };
    let named =
        |(n, (at, options)): (usize, (String, String))| Tmpfs { at, options, image: format!("in-tmpfs-{n}.img") };
    Ok(plain(mounts, &wanted(spec, root)?).into_iter().filter(simple).enumerate().map(named).collect())
}

/// Writes what lies in them, with the tasks standing still.
pub fn save(all: &[Tmpfs], pid: i32, images: &Path) -> Result<()> {
    all.iter().try_for_each(|tmpfs| {
        let path = images.join(&tmpfs.image);
        save_one(&below(pid, &tmpfs.at), &path)
            .with_context(|| format!("cannot write what lies in {} to {}", tmpfs.at, path.display()))
    })
}

fn save_one(dir: &Path, path: &Path) -> Result<()> {
    let Listing { nodes, .. } = list_one(dir)?;
    let out = BufWriter::new(File::create(path)?);
    Ok(pack::pack(dir, nodes.iter().map(|(path, node)| (path.as_path(), node)), out, false)?)
}

/// A mount point of the container as this process reaches it.
fn below(pid: i32, at: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root{at}"))
}

/// Where config.json has the runtime mount a tmpfs: by type, and over directories that are masked.
fn wanted(spec: &Spec, root: &Path) -> Result<BTreeSet<String>> {
    let linux = spec.linux().as_ref();
    if criu_plan::has_namespace(spec, LinuxNamespaceType::User) || linux.is_some_and(|l| l.mount_label().is_some()) {
        return Ok(BTreeSet::new());
    }
    let mut all = BTreeSet::new();
    for mount in spec.mounts().iter().flatten().filter(|mount| mount.typ().as_deref() == Some("tmpfs")) {
        all.insert(format!("/{}", rootfs::resolve_inside(root, mount.destination())?.display()));
    }
    all.extend(linux.and_then(|l| l.masked_paths().clone()).into_iter().flatten());
    Ok(all)
}

/// Mount point and options of every tmpfs at one of these places that is all of its file system, mounted once, with
/// nothing mounted over it.
fn plain(mounts: &Mounts, wanted: &BTreeSet<String>) -> Vec<(String, String)> {
    let all: Vec<Mount<'_>> = mounts.iter().collect();
    let once = |mount: &Mount<'_>| all.iter().filter(|m| m.dev == mount.dev || m.at == mount.at).count() == 1;
    let ours = |mount: &&Mount<'_>| {
        mount.kind == "tmpfs"
            && mount.root == "/"
            // Blanks in names are escaped there, and no name of ours has one.
            && wanted.contains(mount.at)
            && !mount.options.contains("context=")
            && once(mount)
    };
    all.iter().filter(ours).map(|m| (m.at.to_owned(), m.options.to_owned())).collect()
}

/// New ones with the content an image has, mounted until this is dropped: CRIU mounts them once more for the container.
#[derive(Debug)]
pub struct Laid {
    dir: PathBuf,
    points: Vec<(String, PathBuf)>,
}

impl Laid {
    /// `state` is the container's state directory. A place that config.json does not have a tmpfs at is refused.
    pub fn new(all: &[Tmpfs], spec: &Spec, root: &Path, images: &Path, state: &Path) -> Result<Self> {
        let mut laid = Laid { dir: state.join(DIR), points: Vec::new() };
        if all.is_empty() {
            return Ok(laid);
        }
        let wanted = wanted(spec, root)?;
        if all.len() > MOST || all.iter().any(|tmpfs| tmpfs.image.contains('/')) {
            bail!("{} of the image is malformed", crate::dump::FACTS);
        }
        fs::create_dir(&laid.dir).with_context(|| format!("cannot make {}", laid.dir.display()))?;
        for (n, tmpfs) in all.iter().enumerate() {
            if !wanted.contains(&tmpfs.at) {
                bail!("the image has a tmpfs at {}, where the bundle's config.json asks for none", tmpfs.at);
            }
            let point = laid.dir.join(n.to_string());
            fs::create_dir(&point).with_context(|| format!("cannot make {}", point.display()))?;
            // Known before it is mounted: what is not mounted is harmlessly taken down.
            laid.points.push((tmpfs.image.clone(), point.clone()));
            lay(tmpfs, &point, &images.join(&tmpfs.image))
                .with_context(|| format!("cannot bring back the tmpfs at {}", tmpfs.at))?;
        }
        Ok(laid)
    }

    /// CRIU's names and what each stands for on this host.
    pub fn points(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.points.iter().map(|(name, point)| (name.as_str(), point.as_path()))
    }
}

impl Drop for Laid {
    fn drop(&mut self) {
        take_down(&self.dir);
    }
}

fn lay(tmpfs: &Tmpfs, point: &Path, image: &Path) -> Result<()> {
    let (flags, options): (Vec<&str>, Vec<&str>) =
        tmpfs.options.split(',').partition(|option| matches!(*option, "ro" | "rw" | "lazytime" | "sync" | "dirsync"));
    mount(Some("tmpfs"), point, Some("tmpfs"), MsFlags::empty(), Some(options.join(",").as_str()))
        .with_context(|| format!("cannot mount it with the options {}", tmpfs.options))?;
    // What CRIU makes of it shall not be a copy that follows this one.
    mount(None::<&str>, point, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
    let input = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    // Content is not longer than the archive it comes in.
    let limit = input.metadata()?.len();
    let target = unpack::Target::any(point)?;
    target.unpack(BufReader::new(input), limit).with_context(|| format!("cannot unpack {}", image.display()))?;
    drop(target);
    if flags.contains(&"ro") {
        mount(None::<&str>, point, None::<&str>, MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, None::<&str>)?;
    }
    Ok(())
}

/// Takes down what was laid below a state directory, by whomever.
pub fn take_down(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = umount2(&entry.path(), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(entry.path());
    }
    let _ = fs::remove_dir(dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
70 60 0:50 / / rw,relatime - overlay overlay rw\n\
71 70 0:51 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755,inode64\n\
72 71 0:52 / /dev/shm rw,nosuid - tmpfs shm rw,size=1024k\n\
73 70 0:53 / /cache rw - tmpfs tmpfs rw\n\
74 70 0:53 / /again rw - tmpfs tmpfs rw\n\
75 70 0:54 /part /part rw - tmpfs tmpfs rw\n\
76 70 0:55 / /over rw - tmpfs tmpfs rw\n\
77 76 0:56 / /over rw - tmpfs tmpfs rw\n\
78 70 0:57 / /own rw - tmpfs tmpfs rw\n\
79 70 0:58 / /labelled rw - tmpfs tmpfs rw,context=x\n\
80 70 0:59 / /sys/firmware ro - tmpfs tmpfs ro\n\
81 70 0:60 / /data rw - ext4 /dev/vda rw\n";

    #[test]
    fn what_is_mounted_twice_or_otherwise_special_is_left_to_criu() {
        let wanted = ["/dev", "/dev/shm", "/cache", "/part", "/over", "/labelled", "/sys/firmware", "/data", "/gone"];
        let wanted = wanted.iter().map(|at| (*at).to_owned()).collect();
        let found = plain(&Mounts::from_text(TEXT), &wanted);
        let places: Vec<&str> = found.iter().map(|(at, _)| at.as_str()).collect();
        assert_eq!(places, ["/dev", "/dev/shm", "/sys/firmware"]);
        assert_eq!(found[0].1, "rw,size=65536k,mode=755,inode64");
    }

    #[test]
    fn an_image_brings_a_tmpfs_only_where_the_bundle_has_one() {
        let dir = tempfile::tempdir().unwrap();
        let spec = Spec::default();
        let tmpfs = |at: &str, image: &str| Tmpfs { at: at.into(), options: "rw".into(), image: image.into() };
        let refused = |all: &[Tmpfs]| {
            let end = Laid::new(all, &spec, dir.path(), dir.path(), dir.path());
            format!("{:#}", end.map(drop).unwrap_err())
        };
        assert!(refused(&[tmpfs("/etc", "a.img")]).contains("asks for none"));
        assert!(refused(&[tmpfs("/dev", "../a.img")]).contains("malformed"));
        assert!(!dir.path().join(DIR).exists(), "nothing stays");
        assert!(Laid::new(&[], &spec, dir.path(), dir.path(), dir.path()).unwrap().points().next().is_none());
    }
}
