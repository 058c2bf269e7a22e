//! A container's state on disk, and the one place that says what its status is.
//!
//! libcontainer's own files (`state.json`, `youki_config.json`) stand in
//! `<root>/<id>/` next to ours: `migrrdma.json`, the facts libcontainer does
//! not keep, and `config.json`, the specification as it was really used. A
//! directory without `migrrdma.json` belongs to another runtime (Docker gives
//! all runtimes one root) and is never touched.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::procfs;

const SIDECAR: &str = "migrrdma.json";
const EFFECTIVE_SPEC: &str = "config.json";
const SIDECAR_VERSION: u32 = 1;
/// No state file is larger.
const STATE_CAP: u64 = 4 << 20;

/// Message engines look for when a container is gone.
pub const NO_CONTAINER: &str = "container does not exist";
/// Message engines look for when a container has ended.
pub const NOT_RUNNING: &str = "container not running";

/// What libcontainer's state does not say.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Sidecar {
    /// Version of this file's layout.
    pub version: u32,
    /// Start time of the init process, in clock ticks after boot.
    pub start_time: Option<u64>,
    /// What fds 0 to 2 of the init process referred to when it was made.
    #[serde(default)]
    pub descriptors: Vec<String>,
    /// Absolute path of the root file system on the host.
    pub rootfs: PathBuf,
    /// Hash of the shim mounted into this container, if one is.
    #[serde(default)]
    pub shim: Option<String>,
    /// Path of the cgroup below the unified mount point, empty when unknown.
    #[serde(default)]
    pub cgroup: PathBuf,
    /// Directory of the image it was restored from, if it was.
    #[serde(default)]
    pub restored_from: Option<PathBuf>,
}

/// A container this runtime made, loaded from its root directory.
#[derive(Debug, Clone)]
pub struct ContainerHandle {
    /// libcontainer's view; its status is refreshed by [`ContainerHandle::status`] only.
    pub container: Container,
    /// Our own facts.
    pub sidecar: Sidecar,
}

impl ContainerHandle {
    /// Loads `<root>/<id>`.
    pub fn load(root: &Path, id: &str) -> Result<Self> {
        validate_id(id)?;
        let dir = root.join(id);
        if !dir.is_dir() {
            bail!("{NO_CONTAINER}: {id} (looked in {})", root.display());
        }
        let path = dir.join(SIDECAR);
        if !path.exists() {
            if dir.join("state.json").exists() {
                bail!(
                    "container {id} in {} was made by another runtime: use that one, or another --root",
                    root.display()
                );
            }
            bail!("{NO_CONTAINER}: {id} is only half made; remove it with delete --force");
        }
        let sidecar: Sidecar = read_json(&path)?;
        if sidecar.version != SIDECAR_VERSION {
            bail!("{} has version {}, this program reads version {SIDECAR_VERSION}", path.display(), sidecar.version);
        }
        let mut container =
            Container::load(dir.clone()).with_context(|| format!("cannot read the state of container {id}"))?;
        // load() guesses a status from the pid alone; take what was saved.
        container.refresh_state().with_context(|| format!("cannot read the state of container {id}"))?;
        Ok(ContainerHandle { container, sidecar })
    }

    /// The container's id.
    pub fn id(&self) -> &str {
        self.container.id()
    }

    /// `<root>/<id>`.
    pub fn dir(&self) -> &Path {
        &self.container.root
    }

    /// Pid of the init process, `None` when it is gone. A process that merely
    /// got the same pid later is not it.
    pub fn init_pid(&self) -> Option<i32> {
        let pid = self.container.pid()?.as_raw();
        let stat = procfs::stat(pid)?;
        let same = self.sidecar.start_time.is_none_or(|start| start == stat.start_time);
        (same && !stat.gone).then_some(pid)
    }

    /// The status now: the process and the freezer are asked, not the file.
    pub fn status(&self) -> ContainerStatus {
        let saved = self.container.state.status;
        if saved == ContainerStatus::Stopped || self.init_pid().is_none() {
            return match saved {
                ContainerStatus::Creating if self.container.pid().is_none() => saved,
                _ => ContainerStatus::Stopped,
            };
        }
        match saved {
            ContainerStatus::Creating | ContainerStatus::Created => saved,
            _ if self.cgroup().is_ok_and(|cgroup| cgroup.is_frozen()) => ContainerStatus::Paused,
            _ => ContainerStatus::Running,
        }
    }

    /// The specification as used, with what injection added.
    pub fn spec(&self) -> Result<Spec> {
        load_spec_file(&self.dir().join(EFFECTIVE_SPEC))
    }

    /// The container's cgroup.
    pub fn cgroup(&self) -> Result<Cgroup> {
        Cgroup::of(self)
    }

    /// Writes both state files, each by rename.
    pub fn save(&self) -> Result<()> {
        write_json(&self.dir().join(SIDECAR), &self.sidecar)?;
        write_json(&self.dir().join("state.json"), &self.container.state)
    }

    /// Sets and saves the status.
    pub fn set_status(&mut self, status: ContainerStatus) -> Result<()> {
        self.container.set_status(status);
        self.save()
    }

    /// Keeps the specification as used.
    pub fn save_spec(&self, spec: &Spec) -> Result<()> {
        write_json(&self.dir().join(EFFECTIVE_SPEC), spec)
    }
}

impl Sidecar {
    /// A new one for a container with this root file system.
    pub fn new(rootfs: PathBuf, shim: Option<String>) -> Self {
        Sidecar { version: SIDECAR_VERSION, rootfs, shim, ..Sidecar::default() }
    }
}

/// Ids of the containers this runtime made below `root`.
pub fn ids(root: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(err) => return Err(err).with_context(|| format!("cannot list {}", root.display())),
    };
    let mut ids: Vec<String> = entries
        .flatten()
        .filter(|entry| entry.path().join(SIDECAR).exists())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    ids.sort();
    Ok(ids)
}

/// Refuses ids that are no plain file name.
pub fn validate_id(id: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    if id.is_empty() || id == "." || id == ".." || id.len() > 255 || !id.chars().all(plain) {
        bail!("invalid container id {id:?}: letters, digits, '_', '+', '-' and '.' only");
    }
    Ok(())
}

/// Reads a bundle's or our own config.json.
pub fn load_spec_file(path: &Path) -> Result<Spec> {
    let spec: Spec = read_json(path)?;
    if !spec.version().starts_with("1.") {
        bail!("{} asks for runtime specification {}, only 1.x is supported", path.display(), spec.version());
    }
    Ok(spec)
}

/// Reads a JSON file of bounded size.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let len = fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?.len();
    if len > STATE_CAP {
        bail!("{} has {len} bytes, more than {STATE_CAP}", path.display());
    }
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("{} is malformed", path.display()))
}

/// Writes a JSON file so that readers see the old or the new content, never half.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let bytes = serde_json::to_vec(value)?;
    write_atomically(path, &bytes)
}

/// Writes through a temporary file and a rename in the same directory.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().context("a file needs a name")?;
    let temporary = path.with_file_name(format!("{}{}", draft_prefix(name), std::process::id()));
    sweep_drafts(path);
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        fs::rename(&temporary, path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&temporary)))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn draft_prefix(name: &OsStr) -> String {
    format!(".{}.", name.to_string_lossy())
}

/// Removes what processes that were killed in [`write_atomically`] left beside this file.
pub fn sweep_drafts(path: &Path) {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else { return };
    let prefix = draft_prefix(name);
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|n| n.strip_prefix(&prefix)).and_then(|pid| pid.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drafts_of_killed_processes_are_swept_up_and_those_of_living_ones_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.preload");
        // Beyond any pid a kernel gives.
        let dead = dir.path().join(".c.preload.4194305");
        let alive = dir.path().join(".c.preload.1");
        let other = dir.path().join(".d.preload.4194305");
        for file in [&dead, &alive, &other] {
            fs::write(file, "half").unwrap();
        }
        write_atomically(&path, b"whole").unwrap();
        assert!(!dead.exists() && alive.exists() && other.exists());
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn ids_that_leave_the_root_are_refused() {
        for bad in ["", ".", "..", "a/b", "a b", "ä"] {
            assert!(validate_id(bad).is_err(), "{bad:?}");
        }
        validate_id("a-b_c.d+1").unwrap();
    }

    #[test]
    fn a_missing_container_says_so_in_the_words_engines_know() {
        let root = tempfile::tempdir().unwrap();
        let err = ContainerHandle::load(root.path(), "x").unwrap_err();
        assert!(err.to_string().contains("does not exist"));
    }

    #[test]
    fn another_runtimes_container_is_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("x")).unwrap();
        fs::write(root.path().join("x/state.json"), "{}").unwrap();
        let err = ContainerHandle::load(root.path(), "x").unwrap_err();
        assert!(err.to_string().contains("another runtime"));
        assert!(ids(root.path()).unwrap().is_empty());
    }
}
