//! Putting the RDMA shim into a container: the only place that does.
//!
//! The specification gets three more bind mounts and, if it has none, a time
//! namespace, so that the monotonic clock goes on after a move; nothing else
//! changes:
//!
//! | in the container | on the host | |
//! |---|---|---|
//! | [`AGENT_DIR`] | `/run/migrrdma-agent/containers/ID/` | the agent's socket and epoch file |
//! | [`SHIM_PATH`] | `/var/lib/migrrdma/shim/HASH/libmigrrdma.so` | read-only |
//! | `/etc/ld.so.preload` | `…/containers/ID.preload` | read-only, merged with the image's own |
//!
//! Where a container wants its registered memory in files, [`crate::memory`]
//! adds a mount and a device.
//!
//! A preload *file* reaches every process, those of `exec` and `env -i`
//! included, and musl programs ignore it. The shim lies under a path named by
//! its content and stays there: CRIU refuses a mapped file that changed.
//! The same rewriting on the destination gives the same mount points, which
//! are the keys CRIU matches external mounts by. The user's bundle is not
//! touched, and nothing here knows what the shim does.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libcontainer::oci_spec::runtime::{LinuxNamespaceBuilder, LinuxNamespaceType, Mount, MountBuilder, Spec};

use crate::{memory, rootfs, store};

/// Annotation that overrides the automatic choice: `true` or `false`.
pub const ANNOTATION: &str = "org.migrrdma.inject";
/// Directory of the agent's socket inside a container.
pub const AGENT_DIR: &str = "/run/.migrrdma";
/// The shim inside a container.
pub const SHIM_PATH: &str = "/run/.migrrdma-lib/libmigrrdma.so";
const PRELOAD: &str = "/etc/ld.so.preload";
/// A preload file longer than this is no preload file.
const PRELOAD_CAP: usize = 64 * 1024;

/// Where things are on the host.
#[derive(Debug, Clone)]
pub struct HostPaths {
    /// The installed shim.
    pub shim: PathBuf,
    /// Kept copies, by content.
    pub store: PathBuf,
    /// One directory for each container.
    pub containers: PathBuf,
    /// One directory for the memory files of each container, on a tmpfs.
    pub memory: PathBuf,
    /// One directory for what each moved container is shown in sysfs.
    pub sysfs: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        HostPaths {
            shim: "/usr/local/lib/migrrdma/libmigrrdma.so".into(),
            store: "/var/lib/migrrdma/shim".into(),
            containers: "/run/migrrdma-agent/containers".into(),
            memory: "/run/migrrdma-agent/memory".into(),
            sysfs: "/run/migrrdma-agent/sysfs".into(),
        }
    }
}

impl HostPaths {
    /// The host directory that a container sees as [`AGENT_DIR`].
    pub fn agent_dir(&self, id: &str) -> PathBuf {
        self.containers.join(id)
    }

    /// The host directory that a container sees as [`memory::MEMORY_DIR`].
    pub fn memory_dir(&self, id: &str) -> PathBuf {
        self.memory.join(id)
    }

    /// The host directory that lies over a moved container's sysfs ([`crate::shown`]).
    pub fn sysfs_dir(&self, id: &str) -> PathBuf {
        self.sysfs.join(id)
    }

    fn preload(&self, id: &str) -> PathBuf {
        self.containers.join(format!("{id}.preload"))
    }

    /// Removes what injection made for one container. The shim's copy stays.
    pub fn forget(&self, id: &str) {
        let _ = fs::remove_dir_all(self.agent_dir(id));
        store::sweep_drafts(&self.preload(id));
        let _ = fs::remove_file(self.preload(id));
        let _ = fs::remove_dir_all(self.memory_dir(id));
        let _ = fs::remove_dir_all(self.sysfs_dir(id));
    }
}

/// Whether this container shall get the shim: what the annotation says, else
/// whether it has an RDMA device.
pub fn wanted(spec: &Spec) -> Result<bool> {
    let annotation = spec.annotations().as_ref().and_then(|all| all.get(ANNOTATION));
    match annotation.map(String::as_str) {
        Some("true") => Ok(true),
        Some("false") => Ok(false),
        Some(other) => bail!("annotation {ANNOTATION} is {other:?}; it must be true or false"),
        None => Ok(has_rdma_device(spec)),
    }
}

fn has_rdma_device(spec: &Spec) -> bool {
    let rdma = |path: &Path| path.starts_with("/dev/infiniband");
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let mounts = spec.mounts().as_ref();
    devices.is_some_and(|all| all.iter().any(|device| rdma(device.path())))
        || mounts.is_some_and(|all| {
            all.iter().any(|mount| {
                let source = mount.source().as_deref();
                rdma(mount.destination()) || source.is_some_and(|source| rdma(source) || source == Path::new("/dev"))
            })
        })
}

/// Rewrites `spec` for container `id` and makes what it then refers to.
/// `shim` names a kept copy by its hash, as an image asks for; without it the
/// installed one is used. Returns the hash. Safe to repeat.
pub fn inject(spec: &mut Spec, id: &str, rootfs: &Path, shim: Option<&str>, host: &HostPaths) -> Result<String> {
    let (hash, library) = match shim {
        Some(hash) => (hash.to_owned(), kept(hash, host)?),
        None => keep(host)?,
    };
    let agent_dir = host.agent_dir(id);
    fs::create_dir_all(&agent_dir).with_context(|| format!("cannot make {}", agent_dir.display()))?;
    let preload = host.preload(id);
    store::write_atomically(&preload, merged_preload(rootfs)?.as_bytes())?;

    let mut mounts = spec.mounts().clone().unwrap_or_default();
    mounts.push(bind(&agent_dir, AGENT_DIR, &["rw", "noexec"])?);
    mounts.push(bind(&library, SHIM_PATH, &["ro"])?);
    mounts.push(bind(&preload, PRELOAD, &["ro", "noexec"])?);
    if memory::wanted(spec)? {
        mounts.extend(memory::give(spec, &host.memory_dir(id))?);
    }
    spec.set_mounts(Some(mounts));
    own_time(spec)?;
    Ok(hash)
}

/// Gives the container a time namespace of its own where the kernel has them:
/// CRIU carries its clock offsets, and a process sleeping until an absolute
/// monotonic time would else sleep for ever, or not at all, on another host.
fn own_time(spec: &mut Spec) -> Result<()> {
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(());
    };
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    let has_time = namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Time);
    if has_time || !Path::new("/proc/self/ns/time").exists() {
        return Ok(());
    }
    namespaces.push(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Time).build()?);
    linux.set_namespaces(Some(namespaces));
    spec.set_linux(Some(linux));
    Ok(())
}

pub fn bind(source: &Path, destination: &str, options: &[&str]) -> Result<Mount> {
    let mut all: Vec<String> = ["bind", "nosuid", "nodev", "private"].map(String::from).to_vec();
    all.extend(options.iter().map(|option| (*option).to_owned()));
    Ok(MountBuilder::default().typ("bind").source(source).destination(destination).options(all).build()?)
}

/// Keeps the installed shim under its content's name.
fn keep(host: &HostPaths) -> Result<(String, PathBuf)> {
    let bytes = fs::read(&host.shim).with_context(|| {
        format!(
            "the RDMA shim is not installed ({}); install it, or start the container with annotation {ANNOTATION}=false",
            host.shim.display()
        )
    })?;
    let hash = content_name(&bytes);
    let dir = host.store.join(&hash);
    let library = dir.join("libmigrrdma.so");
    if fs::metadata(&library).is_ok_and(|meta| meta.len() == bytes.len() as u64) {
        return Ok((hash, library));
    }
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    store::write_atomically(&library, &bytes)?;
    fs::set_permissions(&library, std::os::unix::fs::PermissionsExt::from_mode(0o555))?;
    Ok((hash, library))
}

fn kept(hash: &str, host: &HostPaths) -> Result<PathBuf> {
    store::validate_id(hash).context("the image names an impossible shim")?;
    let library = host.store.join(hash).join("libmigrrdma.so");
    if library.is_file() {
        return Ok(library);
    }
    // The installed one may be it, only never used on this host.
    if let Ok((own, library)) = keep(host)
        && own == hash
    {
        return Ok(library);
    }
    bail!("the container uses shim {hash}, which this host does not have; copy {} from the source", library.display())
}

/// The image's own preload list with the shim in front.
fn merged_preload(rootfs: &Path) -> Result<String> {
    let mut merged = format!("{SHIM_PATH}\n");
    let own = rootfs::resolve(rootfs, Path::new(PRELOAD))?;
    match fs::metadata(&own) {
        Ok(meta) if meta.is_file() => {
            if meta.len() > PRELOAD_CAP as u64 {
                bail!("{PRELOAD} of the image has {} bytes", meta.len());
            }
            let text = fs::read(&own).with_context(|| format!("cannot read {}", own.display()))?;
            let text = String::from_utf8_lossy(&text);
            for line in text.lines().filter(|line| line.trim() != SHIM_PATH) {
                merged.push_str(line);
                merged.push('\n');
            }
        }
        _ => {}
    }
    Ok(merged)
}

/// FNV-1a with 128 bits: names a file that only root can write, proves nothing.
fn content_name(bytes: &[u8]) -> String {
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    for byte in bytes {
        hash = (hash ^ u128::from(*byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
    }
    format!("{hash:032x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::{LinuxBuilder, LinuxDeviceBuilder, LinuxDeviceType};

    struct Host {
        dir: tempfile::TempDir,
        paths: HostPaths,
    }

    fn host() -> Host {
        let dir = tempfile::tempdir().unwrap();
        let paths = HostPaths {
            shim: dir.path().join("lib.so"),
            store: dir.path().join("store"),
            containers: dir.path().join("containers"),
            memory: dir.path().join("memory"),
            sysfs: dir.path().join("sysfs"),
        };
        fs::write(&paths.shim, b"shim").unwrap();
        fs::create_dir_all(dir.path().join("rootfs/etc")).unwrap();
        Host { dir, paths }
    }

    fn rdma_spec() -> Spec {
        let device = LinuxDeviceBuilder::default()
            .path("/dev/infiniband/uverbs0")
            .typ(LinuxDeviceType::C)
            .major(231)
            .minor(192)
            .build()
            .unwrap();
        let mut spec = Spec::default();
        spec.set_linux(Some(LinuxBuilder::default().devices(vec![device]).build().unwrap()));
        spec
    }

    #[test]
    fn a_device_wants_the_shim_and_an_annotation_decides() {
        assert!(!wanted(&Spec::default()).unwrap());
        let mut spec = rdma_spec();
        assert!(wanted(&spec).unwrap());
        let say = |text: &str| Some([(ANNOTATION.to_owned(), text.to_owned())].into());
        spec.set_annotations(say("false"));
        assert!(!wanted(&spec).unwrap());
        spec.set_annotations(say("yes"));
        assert!(wanted(&spec).is_err());
        let mut plain = Spec::default();
        plain.set_annotations(say("true"));
        assert!(wanted(&plain).unwrap());
    }

    #[test]
    fn three_mounts_and_a_time_namespace_are_added_and_nothing_else() {
        let host = host();
        let rootfs = host.dir.path().join("rootfs");
        let before = rdma_spec();
        let mut spec = before.clone();
        inject(&mut spec, "x", &rootfs, None, &host.paths).unwrap();
        let mut mounts = spec.mounts().clone().unwrap();
        let added = mounts.split_off(mounts.len() - 3);
        let at: Vec<_> = added.iter().map(|m| m.destination().to_str().unwrap()).collect();
        assert_eq!(at, [AGENT_DIR, SHIM_PATH, PRELOAD]);
        spec.set_mounts(Some(mounts));
        let mut linux = spec.linux().clone().unwrap();
        let mut namespaces = linux.namespaces().clone().unwrap();
        if Path::new("/proc/self/ns/time").exists() {
            assert_eq!(namespaces.pop().unwrap().typ(), LinuxNamespaceType::Time);
        }
        linux.set_namespaces(Some(namespaces));
        spec.set_linux(Some(linux));
        assert_eq!(spec, before);
        assert!(host.paths.agent_dir("x").is_dir());
    }

    #[test]
    fn an_images_own_preload_list_is_kept() {
        let host = host();
        let rootfs = host.dir.path().join("rootfs");
        fs::write(rootfs.join("etc/ld.so.preload"), "/usr/lib/libjemalloc.so\n").unwrap();
        inject(&mut rdma_spec(), "x", &rootfs, None, &host.paths).unwrap();
        let text = fs::read_to_string(host.paths.preload("x")).unwrap();
        assert_eq!(text, format!("{SHIM_PATH}\n/usr/lib/libjemalloc.so\n"));
    }

    #[test]
    fn a_kept_shim_survives_an_upgrade_and_an_unknown_one_is_named() {
        let host = host();
        let rootfs = host.dir.path().join("rootfs");
        let old = inject(&mut rdma_spec(), "x", &rootfs, None, &host.paths).unwrap();
        fs::write(&host.paths.shim, b"newer shim").unwrap();
        let new = inject(&mut rdma_spec(), "y", &rootfs, None, &host.paths).unwrap();
        assert_ne!(old, new);
        inject(&mut rdma_spec(), "z", &rootfs, Some(&old), &host.paths).unwrap();
        let err = inject(&mut rdma_spec(), "w", &rootfs, Some("abc"), &host.paths).unwrap_err();
        assert!(err.to_string().contains("uses shim abc"));
    }

    #[test]
    fn a_missing_shim_says_what_to_do() {
        let host = host();
        fs::remove_file(&host.paths.shim).unwrap();
        let err = inject(&mut rdma_spec(), "x", host.dir.path(), None, &host.paths).unwrap_err();
        assert!(err.to_string().contains("org.migrrdma.inject=false"));
    }
}
