//! Reads a tar archive into a directory. The archive comes from another host and is trusted no further than that
//! directory: every path is resolved by the kernel below it, and no symbolic link is followed, wherever it came from.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt, lchown, symlink};
use std::path::{Component, Path, PathBuf};

use nix::sys::stat::{Mode, SFlag, UtimensatFlags, makedev, mknod, utimensat};
use nix::sys::time::TimeSpec;
use tar::{Archive, Entry, EntryType};

use super::beneath::{self, at};
use super::pack::{XATTR, travels};
use super::{list, mark};

/// Smallest hole, bytes; and so many of them are looked at together.
const PAGE: usize = 4096;
const PAGES: usize = 64;

/// Longest value of an extended attribute the kernel takes.
const VALUE: usize = 64 << 10;

/// A directory into which archives are unpacked.
#[derive(Debug)]
pub struct Target {
    dir: PathBuf,
    fd: OwnedFd,
    /// No archive brings it.
    reserved: Option<&'static Path>,
}

impl Target {
    /// The directory of a bundle, which exists.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Ok(Target { reserved: Some(Path::new(mark::FILE)), ..Self::any(dir)? })
    }

    /// Any other directory that exists.
    pub fn any(dir: &Path) -> io::Result<Self> {
        Ok(Target { dir: dir.to_owned(), fd: File::open(dir)?.into(), reserved: None })
    }

    /// Unpacks an archive of at most `limit` bytes of content over what is there. Returns the paths it named.
    pub fn unpack(&self, input: impl Read, limit: u64) -> io::Result<BTreeSet<PathBuf>> {
        let mut archive = Archive::new(input);
        let mut seen = BTreeSet::new();
        let mut left = limit;
        // A directory's time changes with every entry made in it, so these come last.
        let mut times: BTreeMap<PathBuf, i64> = BTreeMap::new();
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = plain(Path::new(OsStr::from_bytes(&entry.path_bytes())))?;
            left = left
                .checked_sub(entry.size())
                .ok_or_else(|| io::Error::other(format!("more than the {limit} bytes that were announced")))?;
            self.one(&path, &mut entry, &mut times)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", self.dir.join(&path).display())))?;
            seen.insert(path);
        }
        for (path, mtime) in times.iter().rev() {
            let (parent, name) = beneath::parent(&self.fd, path)?;
            set_time(&at(&parent, &name), *mtime)?;
        }
        Ok(seen)
    }

    /// Removes everything but these paths.
    pub fn prune(&self, keep: &BTreeSet<PathBuf>, inner: &Path) -> io::Result<()> {
        for path in list::list(&self.dir, inner)?.nodes.keys().rev().filter(|path| !keep.contains(*path)) {
            self.remove(path)?;
        }
        Ok(())
    }

    /// Removes one path with everything below; harmless if it is not there.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let path = plain(path)?;
        if path.as_os_str().is_empty() || self.reserved == Some(path.as_path()) {
            return Ok(());
        }
        match beneath::parent(&self.fd, &path) {
            Ok((parent, name)) => clear(&at(&parent, &name)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn one(&self, path: &Path, entry: &mut Entry<'_, impl Read>, times: &mut BTreeMap<PathBuf, i64>) -> io::Result<()> {
        if self.reserved == Some(path) {
            return Err(io::Error::other("this host writes it itself"));
        }
        let attributes = attributes(entry)?;
        let header = entry.header();
        let (kind, mode) = (header.entry_type(), header.mode()? & 0o7777);
        let number = |n: u64| u32::try_from(n).map_err(|_| io::Error::other("an owner that is no 32-bit number"));
        let (uid, gid) = (number(header.uid()?)?, number(header.gid()?)?);
        let mtime = i64::try_from(header.mtime()?).unwrap_or(0);
        let device = match kind {
            EntryType::Char | EntryType::Block => {
                (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0))
            }
            _ => (0, 0),
        };
        let link = entry.link_name_bytes().map(|b| PathBuf::from(OsStr::from_bytes(&b)));
        let link = || link.clone().ok_or_else(|| io::Error::other("a link to nowhere"));
        let (parent, name) = beneath::parent(&self.fd, path)?;
        let full = at(&parent, &name);
        let there = fs::symlink_metadata(&full).ok();
        let keeps = kind == EntryType::Directory && there.as_ref().is_some_and(fs::Metadata::is_dir);
        if !keeps {
            clear(&full)?;
        }
        match kind {
            EntryType::Directory if keeps => {}
            EntryType::Directory => fs::create_dir(&full)?,
            EntryType::Regular => {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .custom_flags(libc::O_NOFOLLOW)
                    .open(&full)?;
                copy(entry, &mut file)?;
            }
            EntryType::Symlink => symlink(link()?, &full)?,
            EntryType::Link => {
                // Its other name has all the rest.
                let (twin, twin_name) = beneath::parent(&self.fd, &plain(&link()?)?)?;
                return fs::hard_link(at(&twin, &twin_name), &full);
            }
            EntryType::Fifo => mknod(&full, SFlag::S_IFIFO, Mode::empty(), 0)?,
            EntryType::Char => node(&full, SFlag::S_IFCHR, device)?,
            EntryType::Block => node(&full, SFlag::S_IFBLK, device)?,
            other => return Err(io::Error::other(format!("an entry of type {other:?}"))),
        }
        lchown(&full, Some(uid), Some(gid))?;
        if kind != EntryType::Symlink {
            fs::set_permissions(&full, Permissions::from_mode(mode))?;
        }
        // After the owner: changing that takes capabilities away.
        for (name, value) in attributes {
            xattr::set(&full, &name, &value)?;
        }
        match kind {
            EntryType::Directory => drop(times.insert(path.to_owned(), mtime)),
            _ => set_time(&full, mtime)?,
        }
        Ok(())
    }
}

/// Copies what is not zero; the rest are holes.
fn copy(from: &mut impl Read, to: &mut File) -> io::Result<()> {
    let mut buf = vec![0; PAGES * PAGE];
    let mut at = 0;
    loop {
        let mut n = 0;
        while n < buf.len() {
            match from.read(&mut buf[n..]) {
                Ok(0) => break,
                Ok(read) => n += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        for page in buf[..n].chunks(PAGE) {
            if page.iter().any(|byte| *byte != 0) {
                to.write_all_at(page, at)?;
            }
            at += page.len() as u64;
        }
        if n < buf.len() {
            return to.set_len(at);
        }
    }
}

fn attributes(entry: &mut Entry<'_, impl Read>) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let Some(extensions) = entry.pax_extensions()? else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for extension in extensions {
        let extension = extension?;
        let Some(name) = extension.key_bytes().strip_prefix(XATTR.as_bytes()) else { continue };
        let (name, value) = (OsStr::from_bytes(name), extension.value_bytes());
        if value.len() > VALUE {
            return Err(io::Error::other(format!("an extended attribute of {} bytes", value.len())));
        }
        if travels(name) {
            found.push((name.to_owned(), value.to_owned()));
        }
    }
    Ok(found)
}

/// Only names: nothing absolute, nothing that leads up.
fn plain(path: &Path) -> io::Result<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::CurDir => {}
            _ => return Err(io::Error::other(format!("the path {} leads out of the bundle", path.display()))),
        }
    }
    Ok(out)
}

fn clear(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn node(path: &Path, kind: SFlag, (major, minor): (u32, u32)) -> io::Result<()> {
    Ok(mknod(path, kind, Mode::empty(), makedev(major.into(), minor.into()))?)
}

fn set_time(path: &Path, mtime: i64) -> io::Result<()> {
    let time = TimeSpec::new(mtime, 0);
    Ok(utimensat(nix::fcntl::AT_FDCWD, path, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}
