//! What checkpoint and restore must tell CRIU alike: which mounts, namespaces
//! and directories lie outside the container. A name given at the dump must
//! be given again at the restore, so both come from here.

use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use checkpoint::criu::rpc::{Criu_cg_mode, Criu_network_lock_method, Criu_opts, Ext_mount_map};
use checkpoint::criu::{Criu, PLUGIN_DIR};
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use libcontainer::rootfs::utils::is_bind;

use crate::rootfs;

/// RPC option files engines and users expect.
const CONFIG_FILE: &str = "/etc/criu/runc.conf";
/// Annotation naming another one; empty for none.
const CONFIG_ANNOTATION: &str = "org.criu.config";
/// How much CRIU says by default: everything, as under runc.
const SAYS_ALL: u32 = 4;
/// Inside a pause: every line is a system call, and there are some ten for each mapping. Errors and warnings only.
const SAYS_LITTLE: u32 = 2;
/// What CRIU calls masked files.
pub const MASK: &str = "/dev/null";

/// Options that mean the same in both directions.
#[derive(Debug, Clone)]
pub struct Common {
    /// Directory of the images.
    pub image_path: PathBuf,
    /// Directory of logs and statistics; the image directory when `None`.
    pub work_path: Option<PathBuf>,
    pub tcp_established: bool,
    pub ext_unix_sk: bool,
    pub shell_job: bool,
    pub file_locks: bool,
    pub lazy_pages: bool,
    pub auto_dedup: bool,
    /// Make the network namespace but carry nothing of it.
    pub empty_network: bool,
    pub manage_cgroups_mode: Option<Criu_cg_mode>,
    pub network_lock: Option<Criu_network_lock_method>,
    /// The criu program, a path or a name.
    pub criu: PathBuf,
    /// CRIU's plugin directory; ours for containers with the shim when `None`.
    pub plugin_dir: Option<PathBuf>,
    /// Variables of criu's environment, for plugins.
    pub plugin_env: Vec<(String, String)>,
    /// Longest silence of CRIU.
    pub deadline: Duration,
    /// CRIU's `log_level`.
    pub log_level: u32,
}

/// What CRIU's log says of a migration: all of it only where this runtime was started with `--debug`.
pub fn migration_log_level() -> u32 {
    if crate::debug_log::is_installed() { SAYS_ALL } else { SAYS_LITTLE }
}

impl Common {
    /// Nothing special, images in `image_path`.
    pub fn new(image_path: impl Into<PathBuf>) -> Self {
        Common {
            image_path: image_path.into(),
            work_path: None,
            tcp_established: false,
            ext_unix_sk: false,
            shell_job: false,
            file_locks: false,
            lazy_pages: false,
            auto_dedup: false,
            empty_network: false,
            manage_cgroups_mode: None,
            network_lock: None,
            criu: "criu".into(),
            plugin_dir: None,
            plugin_env: Vec::new(),
            deadline: Duration::from_secs(600),
            log_level: SAYS_ALL,
        }
    }

    /// Where logs go.
    pub fn work_dir(&self) -> &Path {
        self.work_path.as_deref().unwrap_or(&self.image_path)
    }

    /// A driver for one run, logging into `log` of the work directory.
    pub fn driver<'a>(&self, shim: bool, log: &str) -> Criu<'a> {
        let mut criu = Criu::new(&self.criu);
        match &self.plugin_dir {
            Some(dir) => drop(criu.plugin_dir(dir)),
            // A container without the shim keeps the plugins the host's CRIU has.
            None if shim && Path::new(PLUGIN_DIR).is_dir() => drop(criu.plugin_dir(PLUGIN_DIR)),
            None => {}
        }
        for (key, value) in &self.plugin_env {
            criu.env(key, value);
        }
        criu.deadline(self.deadline);
        criu.log_at(self.work_dir().join(log));
        criu
    }

    /// The request's options as far as both directions agree. The directories
    /// must stay open until CRIU is done.
    pub fn options(&self, dirs: &Directories, spec: &Spec, log: &str) -> Result<Criu_opts> {
        use std::os::fd::AsRawFd;
        let mut opts = Criu_opts::new();
        opts.set_images_dir_fd(dirs.images.as_raw_fd());
        if let Some(work) = &dirs.work {
            opts.set_work_dir_fd(work.as_raw_fd());
        }
        opts.set_log_level(self.log_level as i32);
        opts.set_log_file(log.into());
        opts.set_notify_scripts(true);
        opts.set_orphan_pts_master(true);
        opts.set_manage_cgroups(true);
        if let Some(mode) = self.manage_cgroups_mode {
            opts.set_manage_cgroups_mode(mode);
        }
        opts.set_tcp_established(self.tcp_established);
        opts.set_ext_unix_sk(self.ext_unix_sk);
        opts.set_shell_job(self.shell_job);
        opts.set_file_locks(self.file_locks);
        opts.set_lazy_pages(self.lazy_pages);
        opts.set_auto_dedup(self.auto_dedup);
        if self.empty_network {
            opts.set_empty_ns(libc::CLONE_NEWNET as u32);
        }
        if let Some(lock) = self.network_lock {
            opts.set_network_lock(lock);
        }
        if let Some(config) = config_file(spec) {
            opts.set_config_file(config);
        }
        Ok(opts)
    }
}

/// The directories of a run, held open because CRIU reaches them through us.
#[derive(Debug)]
pub struct Directories {
    images: File,
    work: Option<File>,
}

impl Directories {
    /// Opens them; makes what may be missing (the images only if `make_images`).
    pub fn open(common: &Common, make_images: bool) -> Result<Self> {
        if make_images {
            make_dir(&common.image_path)?;
        }
        let images = open_dir(&common.image_path, "image")?;
        let work = match &common.work_path {
            Some(path) => {
                make_dir(path)?;
                Some(open_dir(path, "work")?)
            }
            None => None,
        };
        Ok(Directories { images, work })
    }
}

fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make the directory {}", path.display()))
}

fn open_dir(path: &Path, what: &str) -> Result<File> {
    let dir = File::open(path).with_context(|| format!("cannot open the {what} directory {}", path.display()))?;
    if !dir.metadata()?.is_dir() {
        bail!("the {what} path {} is no directory", path.display());
    }
    Ok(dir)
}

fn config_file(spec: &Spec) -> Option<String> {
    let annotation = spec.annotations().as_ref().and_then(|all| all.get(CONFIG_ANNOTATION));
    match annotation {
        Some(path) if path.is_empty() => None,
        Some(path) => Some(path.clone()),
        None => Path::new(CONFIG_FILE).exists().then(|| CONFIG_FILE.into()),
    }
}

/// A bind mount from the host: its destination as the container sees it, and
/// its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalMount {
    /// CRIU's key for it.
    pub destination: String,
    pub source: PathBuf,
}

/// Every bind mount of the specification, destinations resolved in the rootfs.
pub fn external_mounts(spec: &Spec, root: &Path) -> Result<Vec<ExternalMount>> {
    let mut all = Vec::new();
    for mount in spec.mounts().iter().flatten().filter(|m| is_external(m)) {
        let inside = rootfs::resolve_inside(root, mount.destination())?;
        let source = mount
            .source()
            .clone()
            .with_context(|| format!("the bind mount at {} has no source", mount.destination().display()))?;
        all.push(ExternalMount { destination: format!("/{}", inside.display()), source });
    }
    Ok(all)
}

fn is_external(mount: &Mount) -> bool {
    is_bind(mount)
}

/// An entry of CRIU's table of external mounts.
pub fn mount_entry(key: &str, value: &str) -> Ext_mount_map {
    let mut entry = Ext_mount_map::new();
    entry.set_key(key.into());
    entry.set_val(value.into());
    entry
}

/// Whether the container has a namespace of this kind to itself, or joins one.
pub fn has_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let all = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    all.into_iter().flatten().any(|namespace| namespace.typ() == kind)
}

/// Path of a namespace that exists independently of the container.
pub fn namespace_path(spec: &Spec, kind: LinuxNamespaceType) -> Option<PathBuf> {
    let linux = spec.linux().as_ref()?;
    linux
        .namespaces()
        .iter()
        .flatten()
        .find(|namespace| namespace.typ() == kind)
        .and_then(|namespace| namespace.path().clone())
        .filter(|path| !path.as_os_str().is_empty())
}

/// CRIU's name and our key of namespaces that can be external.
pub const EXTERNAL_NAMESPACES: [(LinuxNamespaceType, &str, &str); 2] =
    [(LinuxNamespaceType::Network, "net", "extRootNetNS"), (LinuxNamespaceType::Pid, "pid", "extRootPidNS")];

/// Inode number of a namespace file.
pub fn inode(path: &Path) -> Result<u64> {
    let meta = fs::metadata(path).with_context(|| format!("cannot open the namespace {}", path.display()))?;
    Ok(meta.ino())
}

#[cfg(test)]
mod tests {
    use super::*;
    use libcontainer::oci_spec::runtime::MountBuilder;

    #[test]
    fn binds_are_external_under_their_resolved_destination() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("run", root.path().join("var")).unwrap();
        let bind = MountBuilder::default()
            .destination("/var/data")
            .typ("none")
            .source("/srv/data")
            .options(vec!["rbind".to_owned()])
            .build()
            .unwrap();
        let tmpfs = MountBuilder::default().destination("/tmp").typ("tmpfs").source("tmpfs").build().unwrap();
        let mut spec = Spec::default();
        spec.set_mounts(Some(vec![bind, tmpfs]));
        assert_eq!(
            external_mounts(&spec, root.path()).unwrap(),
            [ExternalMount { destination: "/run/data".into(), source: "/srv/data".into() }]
        );
    }
}
