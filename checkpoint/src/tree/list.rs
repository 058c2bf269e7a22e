//! Everything below a directory, with what is needed to see later whether it changed.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::mark;

/// More entries than any root file system has.
const MOST: usize = 8 << 20;

/// What `st_blocks` counts, bytes.
const BLOCK: u64 = 512;

/// File systems keep times by the tick of a clock: what was written this shortly before it was listed may be written
/// again without a trace.
const TICK: Duration = Duration::from_secs(2);

/// One file, directory or other node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// As in `st_mode`, with the type.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes; 0 unless a regular file.
    pub size: u64,
    /// Seconds and nanoseconds.
    pub mtime: (i64, i64),
    pub ctime: (i64, i64),
    pub rdev: u64,
    /// What hard links to one file have in common; `None` for a file with one name.
    pub twin: Option<(u64, u64)>,
    /// Something is mounted over it: only the place is listed.
    pub covered: bool,
}

impl Node {
    fn of(meta: &Metadata) -> Self {
        let regular = meta.is_file();
        Node {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            size: if regular { meta.size() } else { 0 },
            mtime: (meta.mtime(), meta.mtime_nsec()),
            ctime: (meta.ctime(), meta.ctime_nsec()),
            rdev: meta.rdev(),
            twin: (!meta.is_dir() && meta.nlink() > 1).then(|| (meta.dev(), meta.ino())),
            covered: false,
        }
    }

    /// A place for a mount: what it covers cannot be seen.
    fn place(dir: bool) -> Self {
        let mode = if dir { libc::S_IFDIR | 0o755 } else { libc::S_IFREG | 0o644 };
        let (mtime, ctime) = ((0, 0), (0, 0));
        Node { mode, uid: 0, gid: 0, size: 0, mtime, ctime, rdev: 0, twin: None, covered: true }
    }

    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }
}

/// What there was at one time.
#[derive(Clone, Debug)]
pub struct Listing {
    /// By path below the directory; parents come before their children. The directory itself has the empty path.
    pub nodes: BTreeMap<PathBuf, Node>,
    /// Bytes that files take on their file system; less than [`Listing::bytes`] where they have holes.
    pub held: u64,
    began: SystemTime,
}

impl Listing {
    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.nodes.values().map(|n| n.size).sum()
    }

    /// What is new or different in `now`, and what is gone from it.
    pub fn changes<'a>(&self, now: &'a Listing) -> (Vec<(&'a Path, &'a Node)>, Vec<PathBuf>) {
        let since = self.began.checked_sub(TICK).unwrap_or(UNIX_EPOCH);
        let since = since.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX));
        // A directory counts by what it is itself: its names have entries of their own.
        let same = |old: &Node, new: &Node| {
            let (a, b) = (old, new);
            (a.mode, a.uid, a.gid, a.size, a.mtime, a.rdev) == (b.mode, b.uid, b.gid, b.size, b.mtime, b.rdev)
                && a.ctime == b.ctime
                && a.ctime.0 < since
        };
        let changed = now.nodes.iter().filter(|(path, node)| !self.nodes.get(*path).is_some_and(|old| same(old, node)));
        let gone = self.nodes.keys().filter(|path| !now.nodes.contains_key(*path)).cloned().collect();
        (changed.map(|(path, node)| (path.as_path(), node)).collect(), gone)
    }
}

/// Lists `dir`. Other file systems mounted below are left out, but for the one at `dir/inner`; so are sockets, and the
/// directories an overlay mounted there is made of: what they hold is seen through it.
pub fn list(dir: &Path, inner: &Path) -> io::Result<Listing> {
    let inner = dir.join(inner);
    let mut apart = overlay_parts(&fs::read_to_string("/proc/self/mountinfo")?, &inner);
    apart.push(dir.join(mark::FILE));
    walk(dir, |path, meta, dev| match () {
        () if apart.iter().any(|part| part == path) => Found::Nothing,
        // A mount: what it covers is not ours to see.
        () if meta.is_dir() && meta.dev() != dev && path != inner => Found::Nothing,
        () => Found::Node,
    })
}

/// Lists one file system that is mounted at `dir`. Of what is mounted over parts of it only the places are listed, and
/// sockets are left out.
pub fn list_one(dir: &Path) -> io::Result<Listing> {
    walk(dir, |_, meta, dev| if meta.dev() == dev { Found::Node } else { Found::Place })
}

/// What is made of an entry.
enum Found {
    Node,
    Place,
    Nothing,
}

/// `what` decides by path, metadata and the device of the directory.
fn walk(dir: &Path, what: impl Fn(&Path, &Metadata, u64) -> Found) -> io::Result<Listing> {
    let began = SystemTime::now();
    let mut nodes = BTreeMap::new();
    let mut held = 0;
    let top = fs::symlink_metadata(dir)?;
    let mut todo = vec![(dir.to_owned(), top.dev())];
    nodes.insert(PathBuf::new(), Node::of(&top));
    while let Some((at, dev)) = todo.pop() {
        let entries = match fs::read_dir(&at) {
            Ok(entries) => entries,
            // The container runs, and removes what it likes.
            Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
            Err(e) => return Err(named(&at, e)),
        };
        for entry in entries {
            let path = entry.map_err(|e| named(&at, e))?.path();
            let meta = match fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                Err(e) => return Err(named(&path, e)),
            };
            if meta.file_type().is_socket() {
                continue;
            }
            let node = match what(&path, &meta, dev) {
                Found::Nothing => continue,
                Found::Place => Node::place(meta.is_dir()),
                Found::Node => Node::of(&meta),
            };
            if node.is_dir() && !node.covered {
                todo.push((path.clone(), meta.dev()));
            }
            if meta.is_file() && !node.covered {
                held += meta.blocks() * BLOCK;
            }
            if nodes.len() >= MOST {
                return Err(named(dir, io::Error::other(format!("it has more than {MOST} entries"))));
            }
            let Ok(below) = path.strip_prefix(dir) else { continue };
            nodes.insert(below.to_owned(), node);
        }
    }
    Ok(Listing { nodes, held, began })
}

fn named(path: &Path, e: io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

/// `upperdir` and `workdir` of the overlay mounted at `at`.
fn overlay_parts(mountinfo: &str, at: &Path) -> Vec<PathBuf> {
    let mount = mountinfo.lines().rev().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?;
        let mut right = right.split(' ');
        (Path::new(point) == at && right.next() == Some("overlay")).then(|| right.nth(1).map(str::to_owned))?
    });
    let options = mount.unwrap_or_default();
    let part = |option: &str| {
        let path = option.strip_prefix("upperdir=").or_else(|| option.strip_prefix("workdir="))?;
        Some(PathBuf::from(path))
    };
    options.split(',').filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_an_overlay_are_found_by_where_it_is_mounted() {
        let text = "30 1 0:5 / / rw - ext4 /dev/vda rw\n\
                    77 30 0:60 / /b/rootfs rw,relatime shared:3 - overlay lab rw,lowerdir=/l,upperdir=/b/upper,workdir=/b/work\n";
        assert_eq!(overlay_parts(text, Path::new("/b/rootfs")), [PathBuf::from("/b/upper"), "/b/work".into()]);
        assert!(overlay_parts(text, Path::new("/b")).is_empty());
    }
}
