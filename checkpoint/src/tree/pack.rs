//! Writes nodes as a tar archive: names, owners, modes, times, links, devices and extended attributes.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use super::beneath;
use super::list::Node;

/// Before the name of an extended attribute in the archive, as other programs write it.
pub const XATTR: &str = "SCHILY.xattr.";

/// Packs these nodes of `dir`. With `running`, files may change meanwhile: one that is gone is left out, one that grew
/// is cut, and one that shrank is filled up; whoever asked looks for changes afterwards.
pub fn pack<'a>(
    dir: &Path,
    nodes: impl Iterator<Item = (&'a Path, &'a Node)>,
    out: impl Write,
    running: bool,
) -> io::Result<()> {
    let top: OwnedFd = File::open(dir)?.into();
    let mut tar = Builder::new(out);
    let mut first: HashMap<(u64, u64), PathBuf> = HashMap::new();
    for (path, node) in nodes {
        match one(&mut tar, &top, path, node, &mut first) {
            Err(e) if running && went_away(&e) => {}
            Err(e) => return Err(io::Error::new(e.kind(), format!("{}: {e}", dir.join(path).display()))),
            Ok(()) => {}
        }
    }
    tar.into_inner()?.flush()
}

/// It is gone, or something else has its name.
fn went_away(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
        || matches!(e.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR | libc::EINVAL | libc::ENXIO))
}

fn one<W: Write>(
    tar: &mut Builder<W>,
    top: &OwnedFd,
    path: &Path,
    node: &Node,
    first: &mut HashMap<(u64, u64), PathBuf>,
) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(node.mode & 0o7777);
    header.set_uid(node.uid.into());
    header.set_gid(node.gid.into());
    header.set_mtime(u64::try_from(node.mtime.0).unwrap_or(0));
    header.set_size(0);
    let name = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    if let Some(twin) = node.twin {
        if let Some(known) = first.get(&twin) {
            header.set_entry_type(EntryType::Link);
            return tar.append_link(&mut header, name, known);
        }
        first.insert(twin, path.to_owned());
    }
    if node.covered {
        header.set_entry_type(if node.is_dir() { EntryType::Directory } else { EntryType::Regular });
        return tar.append_data(&mut header, name, io::empty());
    }
    let (parent, last) = beneath::parent(top, path)?;
    let full = beneath::at(&parent, &last);
    // Opened before anything of it is written: it may be gone.
    let content = match node.mode & libc::S_IFMT {
        libc::S_IFREG => Some(beneath::file(top, path)?),
        _ => None,
    };
    let target = match node.mode & libc::S_IFMT {
        libc::S_IFLNK => Some(fs::read_link(&full)?),
        _ => None,
    };
    let attributes = attributes(&full)?;
    if !attributes.is_empty() {
        tar.append_pax_extensions(attributes.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
    }
    let devices = |header: &mut Header, kind| -> io::Result<()> {
        header.set_entry_type(kind);
        header.set_device_major(libc::major(node.rdev) as u32)?;
        header.set_device_minor(libc::minor(node.rdev) as u32)
    };
    match (node.mode & libc::S_IFMT, content, target) {
        (_, Some(file), _) => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(node.size);
            return tar.append_data(&mut header, name, Exact { file, left: node.size });
        }
        (_, _, Some(target)) => {
            header.set_entry_type(EntryType::Symlink);
            return tar.append_link(&mut header, name, target);
        }
        (libc::S_IFDIR, ..) => header.set_entry_type(EntryType::Directory),
        (libc::S_IFIFO, ..) => header.set_entry_type(EntryType::Fifo),
        (libc::S_IFCHR, ..) => devices(&mut header, EntryType::Char)?,
        (libc::S_IFBLK, ..) => devices(&mut header, EntryType::Block)?,
        (other, ..) => return Err(io::Error::other(format!("a node of unknown type {other:o}"))),
    }
    tar.append_data(&mut header, name, io::empty())
}

/// All extended attributes that mean something elsewhere.
fn attributes(path: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut found = Vec::new();
    for name in names.filter(|n| travels(n)) {
        if let (Some(text), Some(value)) = (name.to_str(), xattr::get(path, &name)?) {
            found.push((format!("{XATTR}{text}"), value));
        }
    }
    Ok(found)
}

/// An overlay's own marks describe its layers, and labels belong to the host's policy.
pub fn travels(name: &OsStr) -> bool {
    let name = name.as_bytes();
    let starts = |with: &[u8]| name.starts_with(with);
    !starts(b"trusted.overlay.") && !starts(b"user.overlay.") && name != b"security.selinux"
}

/// Exactly as many bytes as the archive has promised.
struct Exact {
    file: File,
    left: u64,
}

impl Read for Exact {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buf.len());
        if most == 0 {
            return Ok(0);
        }
        let mut n = self.file.read(&mut buf[..most])?;
        if n == 0 {
            buf[..most].fill(0);
            n = most;
        }
        self.left -= n as u64;
        Ok(n)
    }
}
