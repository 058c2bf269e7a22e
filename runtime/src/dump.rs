//! Checkpoint of a container to an image directory.
//!
//! Runs in process for `migrrdma checkpoint` and for a migration alike; the
//! [`Gate`] is where the latter holds CRIU and decides.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use checkpoint::criu::rpc::{Criu_opts, Criu_page_server_info};
use checkpoint::criu::{CriuError, Notify, Verdict};
use checkpoint::memory_image;
use libcontainer::container::ContainerStatus;
use libcontainer::oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::criu_plan::{self, Common, Directories, MASK};
use crate::gate::Gate;
use crate::inject::HostPaths;
use crate::mountinfo::Mounts;
use crate::pending::{self, Owed};
use crate::seal::{self, Seal};
use crate::store::{self, ContainerHandle};
use crate::tmpfs::{self, Tmpfs};
use crate::{criu_version, destroy, handed, keeper, shown, stdio};

/// Log of dumps, a name engines know.
pub const LOG: &str = "dump.log";
/// What the image says about the container, for the restoring runtime.
pub const FACTS: &str = "migrrdma.json";
/// 2: content of tmpfs lies in files of ours.
const FACTS_VERSION: u32 = 2;

/// How to dump.
#[derive(Debug, Clone)]
pub struct DumpOptions {
    pub common: Common,
    /// Earlier images, relative to the image directory.
    pub parent_path: Option<PathBuf>,
    /// Memory changes are being tracked: a pre-dump of this container has succeeded.
    pub tracked: bool,
    /// Memory pages only; the container goes on.
    pub pre_dump: bool,
    pub leave_running: bool,
    /// A migration carries the image: it sends registered memory that lies in files by itself, and sums the image's files on
    /// their way. Otherwise both are done here.
    pub carried: bool,
    /// Remove the container's state afterwards (never with `leave_running` or `pre_dump`).
    pub remove: bool,
    pub tcp_skip_in_flight: bool,
    pub link_remap: bool,
    pub status_fd: Option<i32>,
    pub page_server: Option<(String, i32)>,
}

impl DumpOptions {
    /// A full dump into `image_path` after which the container is gone.
    pub fn new(image_path: impl Into<PathBuf>) -> Self {
        DumpOptions {
            common: Common::new(image_path),
            parent_path: None,
            tracked: false,
            pre_dump: false,
            leave_running: false,
            carried: false,
            remove: true,
            tcp_skip_in_flight: false,
            link_remap: false,
            status_fd: None,
            page_server: None,
        }
    }
}

/// What a dump found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DumpReport {
    /// The init process' pid before the dump.
    pub pid: i32,
    /// The container was paused before, and is again if it was left running.
    pub was_paused: bool,
}

/// Facts beside CRIU's images that CRIU does not keep.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFacts {
    /// Version of this file.
    pub version: u32,
    /// The container's id at the dump.
    pub id: String,
    /// Hash of the shim mapped by its processes.
    pub shim: Option<String>,
    /// Descriptors of carried exec'd processes that led out of the container,
    /// with the stdio number that stands in for each.
    #[serde(default)]
    pub outside: Vec<(String, usize)>,
    /// Size at the dump of each file among the keys of descriptors.
    #[serde(default)]
    pub sizes: BTreeMap<String, u64>,
    /// What CRIU has been told to leave to us.
    #[serde(default)]
    pub tmpfs: Vec<Tmpfs>,
    /// Mount points over sysfs that are mounts from outside.
    #[serde(default)]
    pub shown: Vec<String>,
    /// Pending signals that are not in CRIU's image.
    #[serde(default)]
    pub signals: Vec<Owed>,
    /// The files of the image itself.
    #[serde(default)]
    pub seal: Seal,
}

impl ImageFacts {
    /// Reads them; `None` for images another runtime made.
    pub fn read(image_dir: &Path) -> Result<Option<Self>> {
        let path = image_dir.join(FACTS);
        if !path.exists() {
            return Ok(None);
        }
        let facts: ImageFacts = store::read_json(&path)?;
        if facts.version > FACTS_VERSION {
            bail!(
                "{} has version {}, this program knows {FACTS_VERSION}; restore with a newer migrrdma",
                path.display(),
                facts.version
            );
        }
        Ok(Some(facts))
    }
}

/// Dumps `handle`'s container. On `Err` it is as it was: running, or paused.
pub fn dump(handle: ContainerHandle, options: &DumpOptions, gate: &mut dyn Gate) -> Result<DumpReport> {
    let status = handle.status();
    let was_paused = match status {
        ContainerStatus::Running => false,
        ContainerStatus::Paused => true,
        ContainerStatus::Stopped => bail!("cannot checkpoint: {}", store::NOT_RUNNING),
        other => bail!("cannot checkpoint a container in state {other}"),
    };
    let pid = handle.init_pid().context(store::NOT_RUNNING)?;
    let common = &options.common;
    check_parent(options)?;
    criu_version::of(&common.criu)?;
    let tracks = options.pre_dump || options.parent_path.is_some();
    if tracks && !options.tracked && !common.driver(false, LOG).features()?.mem_track {
        bail!("this kernel or CRIU cannot track memory changes; checkpoint without --pre-dump and --parent-path");
    }
    let spec = handle.spec()?;
    let dirs = Directories::open(common, true)?;
    let keys = stdio::keys(pid);
    let mut outside = gather_tree(&handle, options)?;
    add_outside_files(&handle, &keys, &mut outside)?;
    let mut opts = request(&handle, &spec, pid, options, &dirs)?;
    let files = outside.iter().map(|(key, _)| key).filter(|key| key.starts_with("file["));
    opts.external.extend(files.cloned());
    let mounts = Mounts::of(pid)?;
    let tmpfs = match options.pre_dump {
        true => Vec::new(),
        false => tmpfs::ours(&spec, &handle.sidecar.rootfs, pid, &mounts)?,
    };
    opts.ext_mnt.extend(tmpfs.iter().map(|tmpfs| criu_plan::mount_entry(&tmpfs.at, &tmpfs.image)));
    let shown = shown::mounted(&mounts);
    opts.ext_mnt.extend(shown.iter().map(|point| criu_plan::mount_entry(point, point)));
    let facts = ImageFacts {
        version: FACTS_VERSION,
        id: handle.id().to_owned(),
        shim: handle.sidecar.shim.clone(),
        outside,
        sizes: BTreeMap::new(),
        tmpfs,
        shown,
        signals: Vec::new(),
        seal: Seal::new(),
    };
    if !options.pre_dump && !facts.shown.is_empty() {
        shown::keep(handle.id(), &common.image_path, &HostPaths::default())?;
    }
    run(&handle, pid, opts, options, keys, facts, gate)?;
    drop(dirs);
    if options.leave_running || options.pre_dump {
        // CRIU leaves a cgroup it found frozen frozen; a status file may lag.
        handle_after(handle, was_paused)?;
    } else if options.remove {
        destroy::remove(handle)?;
    }
    Ok(DumpReport { pid, was_paused })
}

/// Makes sure that CRIU will find every process of a container with RDMA, or
/// refuses by name. Other containers are dumped as runc dumps them.
fn gather_tree(handle: &ContainerHandle, options: &DumpOptions) -> Result<Vec<(String, usize)>> {
    if handle.sidecar.shim.is_none() || options.leave_running || options.pre_dump {
        return Ok(Vec::new());
    }
    if let Some((pid, name)) = keeper::outsiders(handle)?.first() {
        bail!(
            "process {pid} ({name}) entered container {} from outside and is no child of its init, so it would be lost; end it first",
            handle.id()
        );
    }
    keeper::release(handle)
}

/// Files from outside that processes other than init still hold as stdio:
/// inherited from init, or carried by an earlier checkpoint.
fn add_outside_files(handle: &ContainerHandle, keys: &[String], outside: &mut Vec<(String, usize)>) -> Result<()> {
    for pid in handle.cgroup()?.pids()? {
        for (n, key) in stdio::keys(pid).into_iter().enumerate() {
            let known = keys.contains(&key) || outside.iter().any(|(old, _)| *old == key);
            if key.starts_with("file[") && !known {
                outside.push((key, n));
            }
        }
    }
    Ok(())
}

fn handle_after(handle: ContainerHandle, was_paused: bool) -> Result<()> {
    if was_paused && !handle.cgroup()?.is_frozen() {
        handle.cgroup()?.freeze()?;
    }
    Ok(())
}

/// Writes what CRIU does not keep, with the tasks standing still. CRIU was `started` then.
fn write_facts(
    handle: &ContainerHandle,
    dir: &Path,
    keys: &[String],
    mut facts: ImageFacts,
    carried: bool,
    started: Instant,
) -> Result<()> {
    let outside = facts.outside.iter().map(|(key, _)| key);
    let files: Vec<&String> = keys.iter().chain(outside).filter(|key| key.starts_with("file[")).collect();
    let pids = handle.cgroup()?.pids()?;
    if !files.is_empty() {
        for &pid in &pids {
            for (n, key) in stdio::keys(pid).into_iter().enumerate() {
                if files.contains(&&key) {
                    let size = fs::metadata(format!("/proc/{pid}/fd/{n}")).map_or(0, |meta| meta.len());
                    facts.sizes.insert(key, size);
                }
            }
        }
    }
    stdio::write(dir, keys)?;
    facts.seal = seal::take(dir, !carried)?;
    // Last: what is sent to the processes from now on is not known where they go.
    facts.signals = pending::lacking(&pids, dir, || started.elapsed())?;
    store::write_json(&dir.join(FACTS), &facts)
}

fn keep_memory(handle: &ContainerHandle, options: &DumpOptions) -> Result<()> {
    let dir = HostPaths::default().memory_dir(handle.id());
    if !options.carried && dir.is_dir() {
        memory_image::save(&dir, &options.common.image_path)?;
    }
    Ok(())
}

fn run(
    handle: &ContainerHandle,
    pid: i32,
    opts: Criu_opts,
    options: &DumpOptions,
    keys: Vec<String>,
    facts: ImageFacts,
    gate: &mut dyn Gate,
) -> Result<()> {
    let mut refusal = None;
    let mut status_fd = options.status_fd;
    let started = Instant::now();
    let mut notify = |told: Notify| -> Verdict {
        let answer = match told.script.as_str() {
            "post-dump" if !options.pre_dump => {
                let images = &options.common.image_path;
                keep_memory(handle, options)
                    .and_then(|()| tmpfs::save(&facts.tmpfs, pid, images))
                    .and_then(|()| write_facts(handle, images, &keys, facts.clone(), options.carried, started))
                    .and_then(|()| gate.post_dump())
            }
            "status-ready" => tell_ready(status_fd.take()),
            _ => Ok(()),
        };
        match answer {
            Ok(()) => Verdict::Go,
            Err(err) => {
                let why = format!("{err:#}");
                refusal = Some(err);
                Verdict::Refuse(why)
            }
        }
    };
    let criu = options.common.driver(handle.sidecar.shim.is_some(), LOG);
    let result = match options.pre_dump {
        true => criu.pre_dump(opts, &mut notify),
        false => criu.dump(opts, &mut notify),
    };
    match (result, refusal) {
        (Ok(()), _) => Ok(()),
        (Err(CriuError::Refused { .. }), Some(err)) => Err(err),
        (Err(err @ CriuError::Failed { .. }), _) => {
            let log = options.common.work_dir().join(LOG);
            bail!("{err} (log: {})", log.display())
        }
        (Err(err), _) => Err(err.into()),
    }
}

fn request(
    handle: &ContainerHandle,
    spec: &Spec,
    pid: i32,
    options: &DumpOptions,
    dirs: &Directories,
) -> Result<Criu_opts> {
    let common = &options.common;
    let root = &handle.sidecar.rootfs;
    let mut opts = common.options(dirs, spec, LOG)?;
    opts.set_pid(pid);
    opts.set_root(root.display().to_string());
    opts.set_leave_running(options.leave_running || options.pre_dump);
    opts.set_tcp_skip_in_flight(options.tcp_skip_in_flight);
    opts.set_link_remap(options.link_remap);
    // Not only for paused containers: the freezer stops a fork bomb that ptrace chases.
    if let Some(path) = handle.cgroup()?.unified() {
        opts.set_freeze_cgroup(path.display().to_string());
    }
    if let Some(parent) = &options.parent_path {
        opts.set_parent_img(parent.display().to_string());
        opts.set_track_mem(true);
    }
    if options.pre_dump {
        opts.set_track_mem(true);
    }
    if let Some((address, port)) = &options.page_server {
        let mut server = Criu_page_server_info::new();
        server.set_address(address.clone());
        server.set_port(*port);
        opts.ps = Some(server).into();
    }
    opts.external.extend(handed::externals(&handle.cgroup()?.pids()?));
    for mount in criu_plan::external_mounts(spec, root)? {
        opts.ext_mnt.push(criu_plan::mount_entry(&mount.destination, &mount.destination));
    }
    for path in masked_files(spec, pid) {
        opts.ext_mnt.push(criu_plan::mount_entry(&path, MASK));
    }
    for (kind, name, key) in criu_plan::EXTERNAL_NAMESPACES {
        if criu_plan::namespace_path(spec, kind).is_some() {
            // The path may be gone or lead elsewhere by now; the process knows.
            let inode = criu_plan::inode(Path::new(&format!("/proc/{pid}/ns/{name}")))?;
            opts.external.push(format!("{name}[{inode}]:{key}"));
        }
    }
    opts.external.extend(stdio::external(&stdio::keys(pid)).cloned());
    Ok(opts)
}

/// Masked paths that are files: the runtime bound /dev/null over them.
fn masked_files(spec: &Spec, pid: i32) -> Vec<String> {
    let linux = spec.linux().as_ref();
    let paths = linux.and_then(|linux| linux.masked_paths().clone());
    paths
        .unwrap_or_default()
        .into_iter()
        .filter(|path| {
            // /dev/null is a character device, a masked directory a directory.
            fs::metadata(format!("/proc/{pid}/root{path}")).is_ok_and(|meta| !meta.is_dir())
        })
        .collect()
}

fn check_parent(options: &DumpOptions) -> Result<()> {
    let Some(parent) = &options.parent_path else {
        return Ok(());
    };
    if parent.is_absolute() {
        bail!("--parent-path must be relative: {}", parent.display());
    }
    let full = options.common.image_path.join(parent);
    // The image directory may not exist yet, and `..` needs it to.
    fs::create_dir_all(&options.common.image_path)
        .with_context(|| format!("cannot make {}", options.common.image_path.display()))?;
    if !full.is_dir() {
        bail!("invalid --parent-path: {} is no directory", full.display());
    }
    Ok(())
}

#[expect(unsafe_code, reason = "the engine hands a descriptor over by its number")]
fn tell_ready(fd: Option<i32>) -> Result<()> {
    use std::io::Write;
    use std::os::fd::FromRawFd;
    let Some(fd) = fd else {
        return Ok(());
    };
    // SAFETY: --status-fd gives the descriptor to this program, which uses it once.
    let mut file = unsafe { fs::File::from_raw_fd(fd) };
    file.write_all(b"\0").context("cannot write to --status-fd")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_must_be_relative_and_exist() {
        let dir = tempfile::tempdir().unwrap();
        let mut options = DumpOptions::new(dir.path().join("images"));
        options.parent_path = Some("/abs".into());
        let err = check_parent(&options).unwrap_err().to_string();
        assert!(err.contains("--parent-path must be relative"));
        options.parent_path = Some("../pre".into());
        let err = check_parent(&options).unwrap_err().to_string();
        assert!(err.contains("invalid --parent-path"));
        fs::create_dir(dir.path().join("pre")).unwrap();
        check_parent(&options).unwrap();
    }

    #[test]
    fn facts_of_a_newer_version_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ImageFacts::read(dir.path()).unwrap(), None);
        fs::write(dir.path().join(FACTS), r#"{"version":3,"id":"x","shim":null,"later":1}"#).unwrap();
        let err = ImageFacts::read(dir.path()).unwrap_err();
        assert!(err.to_string().contains("newer migrrdma"));
    }
}
