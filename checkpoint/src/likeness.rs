//! What sysfs shows of an RDMA device. A container that moves goes on being shown the devices it knew: their files are
//! copied where it was at home, and laid out as a directory wherever it is later.
//!
//! Names, numbers and addresses are copied. What leads to hardware (`device`) or counts (`counters`, `hw_counters`) is
//! a link to the device of the new host that takes the old one's place, and that host's own devices stay visible beside
//! it under their own names. Where such a directory is mounted is the runtime's business.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};

use rdma_virt::saved::ContextState;
use serde::{Deserialize, Serialize};

use crate::agent::is_plain_name;
use crate::uverbs::sysfs;

/// Its name in an image, and beside what was laid out.
pub const NAME: &str = "in-sysfs.img";
/// The two directories of `/sys/class` that are shown.
pub const CLASSES: [&str; 2] = ["infiniband", "infiniband_verbs"];

/// Version of the file's format.
const VERSION: u32 = 1;
/// Longest file, bytes: more does not fit into a page, which is what sysfs can show.
const PAGE: usize = 4096;
/// A container has seen so many devices at most, each of so many files and entries in its GID tables.
const DEVICES: usize = 64;
const FILES: usize = 4096;
const ENTRIES: u32 = 16384;
/// Longest file of all likenesses, bytes.
const LONGEST: u64 = 32 << 20;
/// Not copied: what counts, what leads elsewhere, and the GID tables, whose entries are mostly empty.
const LEFT_OUT: [&str; 5] = ["counters", "hw_counters", "power", "gids", "gid_attrs"];

/// The files of one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Likeness {
    /// For example `rxe0`.
    pub name: String,
    /// The kernel's name of its driver.
    pub driver: String,
    /// Name of its character device, for example `uverbs0`; empty if it has none.
    pub uverbs: String,
    /// Paths below `/sys/class/infiniband/NAME`, and contents.
    pub files: Vec<(PathBuf, String)>,
    /// Names below `/sys/class/infiniband_verbs/UVERBS`, and contents.
    pub verbs: Vec<(PathBuf, String)>,
    /// Ports, and how many entries their GID tables have.
    pub tables: Vec<(u8, u32)>,
}

/// Likenesses could not be kept, read or laid out.
#[derive(Debug, thiserror::Error)]
pub enum LikenessError {
    #[error("what sysfs showed of RDMA devices cannot be written to {}", .path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("what sysfs showed of RDMA devices cannot be read from {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is not what a checkpoint wrote ({what}); copy the checkpoint again, or take a new one", .path.display())]
    Bad { path: PathBuf, what: String },
    #[error("device {name}: {what}")]
    Malformed { name: String, what: &'static str },
}

#[derive(Serialize, Deserialize)]
struct Kept {
    version: u32,
    devices: Vec<Likeness>,
}

impl Likeness {
    /// Copies what sysfs shows of the device of this context, which is one of this host's. `class` is `/sys/class`.
    pub fn take(class: &Path, context: &ContextState) -> io::Result<Likeness> {
        let dir = class.join(CLASSES[0]).join(&context.device);
        let mut files = Vec::new();
        copy(&dir, Path::new(""), &mut files)?;
        let mut tables = Vec::new();
        for port in fs::read_dir(dir.join("ports")).into_iter().flatten().flatten() {
            let Some(number) = port.file_name().to_str().and_then(|n| n.parse::<u8>().ok()) else { continue };
            let entries = fs::read_dir(port.path().join("gids")).into_iter().flatten().count();
            tables.push((number, u32::try_from(entries).unwrap_or(0)));
        }
        tables.sort_unstable();
        for gid in &context.gids {
            for table in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
                let path = PathBuf::from(format!("ports/{}/{table}/{}", gid.port, gid.index));
                files.extend(content(&dir.join(&path)).map(|text| (path, text)));
            }
        }
        files.sort();
        files.dedup();
        let uverbs = uverbs_of(class, &context.device).unwrap_or_default();
        let mut verbs = Vec::new();
        if !uverbs.is_empty() {
            copy(&class.join(CLASSES[1]).join(&uverbs), Path::new(""), &mut verbs)?;
        }
        Ok(Likeness { name: context.device.clone(), driver: context.driver.clone(), uverbs, files, verbs, tables })
    }

    /// Whatever came from outside is laid out only if it stays within its directory, and within bounds.
    fn check(&self) -> Result<(), LikenessError> {
        let bad = |what| Err(LikenessError::Malformed { name: self.name.clone(), what });
        if !is_plain_name(&self.name) || !(self.uverbs.is_empty() || is_plain_name(&self.uverbs)) {
            return bad("its name is no name of a device");
        }
        let all = || self.files.iter().chain(&self.verbs);
        if all().any(|(path, _)| !path.components().all(|c| matches!(c, Component::Normal(_)))) {
            return bad("a file of it lies elsewhere");
        }
        if all().count() > FILES || all().any(|(_, text)| text.len() > PAGE) {
            return bad("it has too many files, or too long ones");
        }
        if self.tables.iter().map(|(_, entries)| u64::from(*entries)).sum::<u64>() > u64::from(ENTRIES) {
            return bad("its GID tables are too long");
        }
        Ok(())
    }
}

/// The regular files of a directory and of those below it. Links are left out: they lead out of it.
fn copy(dir: &Path, below: &Path, files: &mut Vec<(PathBuf, String)>) -> io::Result<()> {
    for entry in fs::read_dir(dir.join(below))? {
        let entry = entry?;
        let path = below.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() && !LEFT_OUT.iter().any(|name| entry.file_name() == *name) && path.components().count() < 5 {
            copy(dir, &path, files)?;
        } else if kind.is_file() {
            // Some are there to be written to, and some have nothing to say now.
            files.extend(content(&entry.path()).map(|text| (path, text)));
        }
    }
    Ok(())
}

fn content(path: &Path) -> Option<String> {
    let mut text = String::new();
    File::open(path).ok()?.take(PAGE as u64).read_to_string(&mut text).ok()?;
    Some(text)
}

fn names(dir: &Path) -> BTreeSet<String> {
    fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok()).collect()
}

fn uverbs_of(class: &Path, device: &str) -> Option<String> {
    let dir = class.join(CLASSES[1]);
    names(&dir)
        .into_iter()
        .find(|name| content(&dir.join(name).join("ibdev")).is_some_and(|text| text.trim() == device))
}

/// Writes likenesses into a directory: an image's, or that of what was laid out.
pub fn write(dir: &Path, devices: &[Likeness]) -> Result<(), LikenessError> {
    let path = dir.join(NAME);
    let kept = Kept { version: VERSION, devices: devices.to_vec() };
    let written = serde_json::to_vec(&kept).map_err(io::Error::other).and_then(|text| fs::write(&path, text));
    written.map_err(|source| LikenessError::Write { path, source })
}

/// Those in a directory; none if nothing is there.
pub fn read(dir: &Path) -> Result<Vec<Likeness>, LikenessError> {
    let path = dir.join(NAME);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(LikenessError::Read { path, source }),
    };
    let mut text = Vec::new();
    file.take(LONGEST).read_to_end(&mut text).map_err(|source| LikenessError::Read { path: path.clone(), source })?;
    let kept: Kept =
        serde_json::from_slice(&text).map_err(|e| LikenessError::Bad { path: path.clone(), what: e.to_string() })?;
    if kept.version != VERSION {
        let what = format!("version {}, and this migrrdma knows {VERSION}", kept.version);
        return Err(LikenessError::Bad { path, what });
    }
    Ok(kept.devices)
}

/// Lays them out as `dir`, in one step, in the place of what may lie there. `class` is `/sys/class` of this host.
pub fn lay(dir: &Path, devices: &[Likeness], class: &Path) -> Result<(), LikenessError> {
    if devices.len() > DEVICES {
        let name = devices[DEVICES].name.clone();
        return Err(LikenessError::Malformed { name, what: "no container has seen so many devices" });
    }
    devices.iter().try_for_each(Likeness::check)?;
    let draft = dir.with_extension("draft");
    let laid = remove(&draft)
        .and_then(|()| fs::create_dir_all(&draft))
        .and_then(|()| lay_in(&draft, devices, class))
        .map_err(|source| LikenessError::Write { path: draft.clone(), source });
    laid.and_then(|()| write(&draft, devices))
        .and_then(|()| {
            let moved = remove(dir).and_then(|()| fs::rename(&draft, dir));
            moved.map_err(|source| LikenessError::Write { path: dir.to_owned(), source })
        })
        .inspect_err(|_| drop(remove(&draft)))
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

fn lay_in(dir: &Path, devices: &[Likeness], class: &Path) -> io::Result<()> {
    let [rdma, verbs] = CLASSES.map(|name| dir.join(name));
    let taken = |name: &str, of: fn(&Likeness) -> &str| devices.iter().any(|d| of(d) == name);
    beside(&class.join(CLASSES[0]), &rdma, |name| taken(name, |d| &d.name))?;
    beside(&class.join(CLASSES[1]), &verbs, |name| taken(name, |d| &d.uverbs))?;
    let mut done = BTreeSet::new();
    for device in devices.iter().filter(|d| done.insert(d.name.clone())) {
        let here = rdma.join(&device.name);
        fs::create_dir(&here)?;
        fill(&here, &device.files)?;
        tables(&here, device)?;
        let place = stand_in(&class.join(CLASSES[0]), device);
        if let Some(place) = &place {
            lead(place, &here, Path::new("device"))?;
            for (port, _) in &device.tables {
                for counters in ["counters", "hw_counters"] {
                    lead(place, &here, &Path::new("ports").join(port.to_string()).join(counters))?;
                }
            }
        }
        if !device.uverbs.is_empty() && !verbs.join(&device.uverbs).exists() {
            let node = verbs.join(&device.uverbs);
            fs::create_dir(&node)?;
            fill(&node, &device.verbs)?;
            if let Some(place) = &place {
                lead(place, &node, Path::new("device"))?;
            }
        }
    }
    Ok(())
}

/// What this host has, under its own names.
fn beside(class: &Path, dir: &Path, taken: impl Fn(&str) -> bool) -> io::Result<()> {
    fs::create_dir(dir)?;
    for name in names(class).into_iter().filter(|name| !taken(name)) {
        match fs::read_link(class.join(&name)) {
            // Relative, and so as true in the place this is mounted at.
            Ok(target) => symlink(target, dir.join(&name))?,
            Err(_) => fs::write(dir.join(&name), content(&class.join(&name)).unwrap_or_default())?,
        }
    }
    Ok(())
}

fn fill(dir: &Path, files: &[(PathBuf, String)]) -> io::Result<()> {
    for (path, text) in files {
        let path = dir.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(path, text)?;
    }
    Ok(())
}

/// The empty entries of GID tables: one file under all their names.
fn tables(dir: &Path, device: &Likeness) -> io::Result<()> {
    const EMPTY: &str = "0000:0000:0000:0000:0000:0000:0000:0000\n";
    for (port, entries) in &device.tables {
        let gids = dir.join(format!("ports/{port}/gids"));
        fs::create_dir_all(&gids)?;
        let mut first: Option<PathBuf> = None;
        for path in (0..*entries).map(|n| gids.join(n.to_string())) {
            match &first {
                _ if path.exists() => {}
                Some(first) => fs::hard_link(first, path)?,
                None => {
                    fs::write(&path, EMPTY)?;
                    first = Some(path);
                }
            }
        }
    }
    Ok(())
}

/// The device of this host that takes its place: one of its driver, of its own name if there is one.
fn stand_in(class: &Path, device: &Likeness) -> Option<PathBuf> {
    let fits = |name: &String| sysfs::driver(&class.join(name)) == device.driver;
    let all = names(class);
    let found = all.iter().filter(|name| **name == device.name).chain(all.iter()).find(|name| fits(name))?;
    fs::canonicalize(class.join(found)).ok()
}

/// A link to what the standing-in device has at that path, if it has.
fn lead(place: &Path, dir: &Path, path: &Path) -> io::Result<()> {
    let (Ok(target), link) = (fs::canonicalize(place.join(path)), dir.join(path)) else { return Ok(()) };
    if let Some(parent) = link.parent() {
        fs::create_dir_all(parent)?;
    }
    symlink(target, link)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture;
    use rdma_virt::id::VGid;
    use rdma_virt::saved::GidEntry;

    /// A host's `/sys/class` with one device, whose second GID is at `index`.
    fn host(device: &str, uverbs: &str, index: u16, gid: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let dir = format!("devices/{device}");
        put(&format!("{dir}/node_guid"), &format!("{device}-guid\n"));
        put(&format!("{dir}/parent"), "eth1\n");
        put(&format!("{dir}/ports/1/state"), "4: ACTIVE\n");
        put(&format!("{dir}/ports/1/hw_counters/sent_pkts"), "7\n");
        for n in 0..16 {
            let empty = "0000:0000:0000:0000:0000:0000:0000:0000";
            put(&format!("{dir}/ports/1/gids/{n}"), &format!("{}\n", if n == index { gid } else { empty }));
        }
        put(&format!("{dir}/ports/1/gid_attrs/types/{index}"), "RoCE v2\n");
        put(&format!("devices/{uverbs}/ibdev"), &format!("{device}\n"));
        put("class/infiniband_verbs/abi_version", "6\n");
        fs::create_dir_all(root.path().join("class/infiniband")).unwrap();
        symlink(format!("../../devices/{device}"), root.path().join(format!("class/infiniband/{device}"))).unwrap();
        symlink(format!("../../devices/{uverbs}"), root.path().join(format!("class/infiniband_verbs/{uverbs}")))
            .unwrap();
        root
    }

    fn context(device: &str, index: u16) -> ContextState {
        let mut context = fixture::process(1, Vec::new()).contexts.remove(0);
        context.device = device.into();
        context.gids = vec![GidEntry { port: 1, index, gid: VGid([1; 16]), kind: 2 }];
        context
    }

    #[test]
    fn a_device_looks_the_same_on_another_host_beside_that_hosts_own() {
        let (home, away) = (host("rxe0", "uverbs0", 1, "home"), host("rxe1", "uverbs1", 10, "away"));
        let likeness = Likeness::take(&home.path().join("class"), &context("rxe0", 1)).unwrap();
        assert_eq!((likeness.uverbs.as_str(), &likeness.tables[..]), ("uverbs0", &[(1, 16)][..]));
        // Where it is mounted, relative links lead to the same places as from the class directories.
        let dir = away.path().join("class.shown");
        lay(&dir, std::slice::from_ref(&likeness), &away.path().join("class")).unwrap();
        let text = |path: &str| fs::read_to_string(dir.join(path)).unwrap();
        assert_eq!(text("infiniband/rxe0/node_guid"), "rxe0-guid\n");
        assert_eq!(text("infiniband/rxe0/ports/1/gids/1"), "home\n");
        assert_eq!(text("infiniband/rxe0/ports/1/gids/10"), "0000:0000:0000:0000:0000:0000:0000:0000\n");
        assert_eq!(text("infiniband/rxe0/ports/1/gid_attrs/types/1"), "RoCE v2\n");
        assert_eq!(names(&dir.join("infiniband/rxe0/ports/1/gids")).len(), 16);
        assert_eq!(text("infiniband/rxe0/ports/1/hw_counters/sent_pkts"), "7\n", "it counts here");
        assert_eq!(text("infiniband_verbs/uverbs0/ibdev"), "rxe0\n");
        assert_eq!(text("infiniband_verbs/abi_version"), "6\n");
        assert_eq!(fs::read_link(dir.join("infiniband/rxe1")).unwrap(), Path::new("../../devices/rxe1"));
        assert_eq!(fs::read_link(dir.join("infiniband_verbs/uverbs1")).unwrap(), Path::new("../../devices/uverbs1"));
        assert_eq!(read(&dir).unwrap(), [likeness]);
    }

    #[test]
    fn a_device_of_the_same_name_is_covered_and_what_lay_there_is_replaced() {
        let (home, away) = (host("rxe0", "uverbs0", 1, "home"), host("rxe0", "uverbs0", 10, "away"));
        let likeness = Likeness::take(&home.path().join("class"), &context("rxe0", 1)).unwrap();
        let dir = away.path().join("shown");
        for _ in 0..2 {
            lay(&dir, std::slice::from_ref(&likeness), &away.path().join("class")).unwrap();
        }
        assert_eq!(fs::read_to_string(dir.join("infiniband/rxe0/ports/1/gids/1")).unwrap(), "home\n");
        assert!(!dir.with_extension("draft").exists());
    }

    #[test]
    fn nothing_is_laid_out_of_bounds() {
        let root = tempfile::tempdir().unwrap();
        let good = Likeness {
            name: "rxe0".into(),
            driver: "rxe".into(),
            uverbs: "uverbs0".into(),
            files: vec![("node_guid".into(), "1".into())],
            verbs: Vec::new(),
            tables: vec![(1, 4)],
        };
        let refused = |bad: Likeness| {
            let why = lay(&root.path().join("shown"), &[bad], root.path()).unwrap_err().to_string();
            assert!(!root.path().join("shown").exists(), "{why}");
            why
        };
        for path in ["../up", "/etc/passwd", "a/../../b"] {
            let files = vec![(path.into(), String::new())];
            assert!(refused(Likeness { files, ..good.clone() }).contains("lies elsewhere"));
        }
        assert!(refused(Likeness { name: "../x".into(), ..good.clone() }).contains("no name"));
        assert!(refused(Likeness { uverbs: "a/b".into(), ..good.clone() }).contains("no name"));
        assert!(refused(Likeness { tables: vec![(1, u32::MAX)], ..good.clone() }).contains("too long"));
        let files = vec![("a".into(), "x".repeat(PAGE + 1))];
        assert!(refused(Likeness { files, ..good.clone() }).contains("too many"));
        fs::write(root.path().join(NAME), r#"{"version":2,"devices":[]}"#).unwrap();
        assert!(read(root.path()).unwrap_err().to_string().contains("version 2"));
        fs::write(root.path().join(NAME), "{").unwrap();
        assert!(read(root.path()).is_err());
    }
}
