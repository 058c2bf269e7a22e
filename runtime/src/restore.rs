//! Bringing a dumped container back to life.
//!
//! CRIU is born in the container's cgroup, joins nothing by itself and gets
//! everything from outside by name: mounts, namespaces, stdio. The state file
//! is written before the pid file, the pid file last.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use checkpoint::criu::rpc::{Cgroup_root, Criu_opts, Inherit_fd, Join_namespace};
use checkpoint::criu::{CriuError, Notify, Verdict, soften_errno_texts};
use checkpoint::likeness::{self, CLASSES};
use checkpoint::memory_image;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Spec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::cgroup::Cgroup;
use crate::criu_plan::{self, Common, Directories, MASK};
use crate::dump::ImageFacts;
use crate::gate::Gate;
use crate::inject::HostPaths;
use crate::launch::{self, Prepared};
use crate::store::{self, ContainerHandle};
use crate::tmpfs::Laid;
use crate::{console, debris, destroy, memory, mountpoints, nodes, pending, procfs, seal, shown, stdio};

/// Log of restores, a name engines know.
pub const LOG: &str = "restore.log";

/// An image that names more descriptors was not made by a container.
const MAX_OUTSIDE: usize = 1024;

/// How to restore.
#[derive(Debug)]
pub struct RestoreOptions {
    pub common: Common,
    /// Directory of containers' state.
    pub root: PathBuf,
    pub id: String,
    pub bundle: PathBuf,
    pub systemd_cgroup: bool,
    /// Written last.
    pub pid_file: Option<PathBuf>,
    /// Gets the terminal's master side, if the container has one.
    pub console_socket: Option<PathBuf>,
    pub tcp_close: bool,
    /// Run prestart and createRuntime hooks, which connect the container to
    /// its network. A migration leaves them out: its commit connects.
    pub create_hooks: bool,
    /// `TYPE:NAME`.
    pub lsm_profile: Option<String>,
    pub lsm_mount_context: Option<String>,
    /// stdin, stdout, stderr; inherited from this process where `None`.
    pub stdio: [Option<OwnedFd>; 3],
    /// Makes stand-ins for stdio that was a regular file, where `stdio` is none.
    pub files: Option<FileMaker>,
}

/// Gives a writable file of the size asked for to stand in for stdout (1) or stderr (2).
pub struct FileMaker(pub Box<dyn FnMut(usize, u64) -> Result<OwnedFd>>);

impl std::fmt::Debug for FileMaker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("FileMaker")
    }
}

impl RestoreOptions {
    /// Restores `id` from `image_path` with this process' stdio.
    pub fn new(root: &Path, id: &str, bundle: &Path, image_path: &Path) -> Self {
        RestoreOptions {
            common: Common::new(image_path),
            root: root.to_owned(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            systemd_cgroup: false,
            pid_file: None,
            console_socket: None,
            tcp_close: false,
            create_hooks: true,
            lsm_profile: None,
            lsm_mount_context: None,
            stdio: [None, None, None],
            files: None,
        }
    }
}

/// A restored, running container. Its init is a child of this process.
#[derive(Debug)]
pub struct Restored {
    pub pid: i32,
    /// The terminal's master side when no console socket took it.
    pub console: Option<OwnedFd>,
}

/// Restores a container. On `Err` nothing of it is left on this host.
pub fn restore(options: RestoreOptions, gate: &mut dyn Gate) -> Result<Restored> {
    store::validate_id(&options.id)?;
    if options.root.join(&options.id).exists() {
        bail!("container with given ID already exists: {}", options.id);
    }
    if !options.common.image_path.join("inventory.img").exists() {
        bail!("{} holds no checkpoint: inventory.img is missing", options.common.image_path.display());
    }
    let facts = ImageFacts::read(&options.common.image_path)?;
    if let Some(facts) = &facts {
        seal::check(&options.common.image_path, &facts.seal)?;
    }
    let shim = facts.as_ref().and_then(|facts| facts.shim.as_deref());
    let prepared = launch::prepare(&options.bundle, &options.id, options.systemd_cgroup, shim)?;
    if shim.is_some() && prepared.shim.is_none() {
        bail!(
            "the image's processes use the RDMA shim, but the bundle's config.json has no RDMA device; add it, or annotation org.migrrdma.inject=true"
        );
    }
    let facts = facts.unwrap_or_default();
    if facts.outside.len() > MAX_OUTSIDE || facts.outside.iter().any(|(_, n)| *n > 2) {
        bail!("{} of the image is malformed", crate::dump::FACTS);
    }
    pending::check(&facts.signals)?;
    let dir = launch::make_state_dir(&options.root, &options.id)?;
    let (id, work) = (options.id.clone(), options.common.work_dir().to_owned());
    let cgroup = Cgroup::for_spec(&prepared.spec, &id, options.systemd_cgroup);
    let injected = prepared.shim.is_some();
    let result = (|| {
        let cgroup = cgroup.as_ref().map_err(|err| anyhow::anyhow!("{err:#}"))?;
        let root = MountedRoot::new(&dir, &prepared.rootfs)?;
        restore_in(&dir, &prepared, facts, options, cgroup, &root.0, gate)
    })();
    result.inspect_err(|_| {
        destroy::leftovers(&dir, &id, cgroup.as_ref().ok(), injected);
        debris::sweep(&work);
    })
}

fn restore_in(
    dir: &Path,
    prepared: &Prepared,
    facts: ImageFacts,
    mut options: RestoreOptions,
    cgroup: &Cgroup,
    criu_root: &Path,
    gate: &mut dyn Gate,
) -> Result<Restored> {
    let spec = &prepared.spec;
    let common = &options.common;
    let mut handle = launch::new_handle(dir, &options.id, prepared, options.systemd_cgroup)?;
    handle.sidecar.restored_from = Some(common.image_path.clone());
    handle.save()?;
    mountpoints::make(spec, &prepared.rootfs)?;
    put_memory(&options.id, &common.image_path)?;
    let dirs = Directories::open(common, false)?;
    let mut opts = common.options(&dirs, spec, LOG)?;
    let mut criu = common.driver(prepared.shim.is_some(), LOG);

    opts.set_root(criu_root.display().to_string());
    opts.set_rst_sibling(true);
    opts.set_evasive_devices(true);
    opts.set_tcp_close(options.tcp_close);
    if let Some(profile) = &options.lsm_profile {
        opts.set_lsm_profile(profile.clone());
    }
    if let Some(context) = &options.lsm_mount_context {
        opts.set_lsm_mount_context(context.clone());
    }
    external_mounts(&mut opts, prepared)?;
    let shown = shown::prepare(&options.id, &common.image_path, &HostPaths::default())?;
    mounts_over_sysfs(&mut opts, &facts.shown, shown.as_deref())?;
    let laid = Laid::new(&facts.tmpfs, spec, &prepared.rootfs, &common.image_path, dir)?;
    opts.ext_mnt.extend(laid.points().map(|(name, point)| criu_plan::mount_entry(name, &point.display().to_string())));
    for (key, file) in external_namespaces(&mut opts, spec)? {
        let fd = criu.pass_fd(file.into());
        opts.inherit_fd.push(inherit(key, fd));
    }
    // The first time nothing is in the image to take its place.
    let shown = shown.filter(|_| facts.shown.is_empty());
    let ImageFacts { outside, sizes, signals, .. } = facts;
    let mut stdio_fds = Vec::new();
    for (n, fd) in std::mem::take(&mut options.stdio).into_iter().enumerate() {
        stdio_fds.push(own_or(fd, n)?);
    }
    for (key, n) in stdio::inheritable(&common.image_path)?.into_iter().chain(outside) {
        let size = sizes.get(&key).copied();
        let fd = criu.pass_fd(stand_in(&key, n, size, &stdio_fds[n], &mut options.files)?);
        opts.inherit_fd.push(inherit(&key, fd));
    }
    for (n, fd) in stdio_fds.into_iter().enumerate() {
        criu.stdio(n, fd);
    }
    criu.place(Box::new(|pid, opts| place(cgroup, spec, pid, opts).map_err(|err| format!("{err:#}"))));

    let mut refusal = None;
    let mut terminal = None;
    let restored = {
        let mut notify = |told: Notify| -> Verdict {
            let answer = match (told.script.as_str(), told.pid, told.fd) {
                ("setup-namespaces", Some(pid), _) => match options.create_hooks {
                    true => run_hooks(spec, &handle.container, pid),
                    false => Ok(()),
                }
                .and_then(|()| gate.setup_namespaces(pid)),
                ("post-restore", Some(pid), _) => {
                    nodes::adapt(spec, pid);
                    shown
                        .as_deref()
                        .map_or(Ok(()), |dir| shown::mount_into(pid, dir))
                        .and_then(|()| born(&mut handle, pid))
                        // Nobody takes them before the gate opens, and if they cannot be sent it stays shut.
                        .and_then(|()| pending::send(&signals, pid, || cgroup.pids()))
                        .and_then(|()| gate.post_restore(pid))
                }
                ("orphan-pts-master", _, Some(fd)) => match &options.console_socket {
                    Some(socket) => console::send(socket, &fd),
                    None => {
                        terminal = Some(fd);
                        Ok(())
                    }
                },
                _ => Ok(()),
            };
            match answer {
                Ok(()) => Verdict::Go,
                Err(err) => {
                    let why = format!("{err:#}");
                    refusal.get_or_insert(err);
                    Verdict::Refuse(why)
                }
            }
        };
        criu.restore(opts, &mut notify)
    };
    drop(laid);
    let pid = match (restored, refusal) {
        (Ok(pid), None) => pid,
        (Ok(_), Some(err)) | (Err(CriuError::Refused { .. }), Some(err)) => return Err(err),
        (Err(CriuError::Failed { errno, cause, .. }), _) => bail!(
            "CRIU restore failed: {} (CRIU restoring failed: {}; log: {})",
            soften_errno_texts(&cause),
            -errno.abs(),
            common.work_dir().join(LOG).display()
        ),
        (Err(err), _) => return Err(err.into()),
    };
    handle.sidecar.descriptors = stdio::links(pid);
    handle.container.set_status(ContainerStatus::Created);
    handle.set_status(ContainerStatus::Running)?;
    if let Some(path) = &options.pid_file {
        launch::write_pid_file(path, pid)?;
    }
    Ok(Restored { pid, console: terminal })
}

/// What the image has over sysfs comes from what was laid out here.
fn mounts_over_sysfs(opts: &mut Criu_opts, points: &[String], dir: Option<&Path>) -> Result<()> {
    for (point, class) in shown::points().iter().zip(CLASSES) {
        if !points.contains(point) {
            continue;
        }
        let Some(dir) = dir else {
            bail!("the image has a mount at {point}, but not what lies in it ({} is missing)", likeness::NAME);
        };
        opts.ext_mnt.push(criu_plan::mount_entry(point, &dir.join(class).display().to_string()));
    }
    Ok(())
}

/// Registered memory that an image on disk holds.
fn put_memory(id: &str, images: &Path) -> Result<()> {
    if !memory_image::is_in(images) {
        return Ok(());
    }
    let dir = HostPaths::default().memory_dir(id);
    if !dir.is_dir() {
        bail!(
            "the image has registered memory in files, but the bundle's config.json does not ask for it: add annotation {}=files",
            memory::ANNOTATION
        );
    }
    Ok(memory_image::load(images, &dir)?)
}

/// Records the restored init before it runs.
fn born(handle: &mut ContainerHandle, pid: i32) -> Result<()> {
    launch::adopt_process(handle, pid)?;
    handle.container.set_status(ContainerStatus::Created);
    handle.set_status(ContainerStatus::Running)
}

/// A descriptor of our own for CRIU when the caller gave none.
fn own_or(fd: Option<OwnedFd>, n: usize) -> Result<OwnedFd> {
    if let Some(fd) = fd {
        return Ok(fd);
    }
    let own = match n {
        0 => std::io::stdin().as_fd().try_clone_to_owned(),
        1 => std::io::stdout().as_fd().try_clone_to_owned(),
        _ => std::io::stderr().as_fd().try_clone_to_owned(),
    };
    own.or_else(|_| File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from))
        .context("cannot duplicate stdio")
}

/// What takes the place of a descriptor that led out of the container. For a
/// file CRIU wants the size it had and puts the position back, which neither
/// a pipe nor another file allows.
fn stand_in(key: &str, n: usize, size: Option<u64>, stdio: &OwnedFd, files: &mut Option<FileMaker>) -> Result<OwnedFd> {
    let own = || stdio.try_clone().context("cannot duplicate stdio");
    if !key.starts_with("file[") {
        return own();
    }
    let fits = match nix::sys::stat::fstat(stdio)? {
        stat if stat.st_mode & libc::S_IFMT == libc::S_IFREG => size.is_none_or(|size| size == stat.st_size as u64),
        _ => size.unwrap_or(0) == 0 && nix::unistd::lseek(stdio, 0, nix::unistd::Whence::SeekCur).is_ok(),
    };
    match (fits, files, n) {
        (true, _, _) => own(),
        (_, _, 0) => Ok(File::options().read(true).write(true).open("/dev/null")?.into()),
        (_, Some(make), _) => (make.0)(n, size.unwrap_or(0)),
        (_, None, _) => bail!(
            "{} was a file of {} bytes at the checkpoint; restore with it redirected to that file",
            ["stdin", "stdout", "stderr"][n],
            size.unwrap_or(0)
        ),
    }
}

fn inherit(key: &str, fd: i32) -> Inherit_fd {
    let mut entry = Inherit_fd::new();
    entry.set_key(key.into());
    entry.set_fd(fd);
    entry
}

/// Puts criu where the restored tasks belong, limits included, and tells it so.
fn place(cgroup: &Cgroup, spec: &Spec, pid: i32, opts: &mut Criu_opts) -> Result<()> {
    cgroup.add(pid)?;
    let linux = spec.linux().as_ref();
    if let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) {
        cgroup.apply(resources)?;
    }
    launch::confine(spec, &procfs::unified_cgroup(pid).unwrap_or_default())?;
    for (controllers, path) in procfs::cgroups(pid) {
        let mut root = Cgroup_root::new();
        root.set_ctrl(controllers);
        root.set_path(path);
        opts.cg_root.push(root);
    }
    Ok(())
}

fn external_mounts(opts: &mut Criu_opts, prepared: &Prepared) -> Result<()> {
    for mount in criu_plan::external_mounts(&prepared.spec, &prepared.rootfs)? {
        if !mount.source.exists() {
            bail!(
                "the bind mount at {} needs {} on this host, which is missing",
                mount.destination,
                mount.source.display()
            );
        }
        opts.ext_mnt.push(criu_plan::mount_entry(&mount.destination, &mount.source.display().to_string()));
    }
    // runc names masked files by what covers them, crun by their own path.
    opts.ext_mnt.push(criu_plan::mount_entry(MASK, MASK));
    let linux = prepared.spec.linux().as_ref();
    for path in linux.and_then(|l| l.masked_paths().as_ref()).into_iter().flatten() {
        opts.ext_mnt.push(criu_plan::mount_entry(path, MASK));
    }
    Ok(())
}

/// Namespaces to inherit; those to join go straight into the options.
fn external_namespaces(opts: &mut Criu_opts, spec: &Spec) -> Result<Vec<(&'static str, File)>> {
    let mut inherited = Vec::new();
    for (kind, _, key) in criu_plan::EXTERNAL_NAMESPACES {
        if let Some(path) = criu_plan::namespace_path(spec, kind) {
            let file = File::open(&path).with_context(|| format!("cannot open the namespace {}", path.display()))?;
            inherited.push((key, file));
        }
    }
    for (kind, name) in [
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
        (LinuxNamespaceType::Time, "time"),
        (LinuxNamespaceType::Mount, "mnt"),
        (LinuxNamespaceType::User, "user"),
    ] {
        if let Some(path) = criu_plan::namespace_path(spec, kind) {
            let mut join = Join_namespace::new();
            join.set_ns(name.into());
            join.set_ns_file(path.display().to_string());
            opts.join_ns.push(join);
        }
    }
    if criu_plan::namespace_path(spec, LinuxNamespaceType::Cgroup).is_some() {
        bail!("CRIU cannot restore into an existing cgroup namespace");
    }
    Ok(inherited)
}

fn run_hooks(spec: &Spec, container: &Container, pid: i32) -> Result<()> {
    let Some(all) = spec.hooks() else {
        return Ok(());
    };
    let mut state = container.state.clone();
    state.pid = Some(pid);
    for (name, list) in [("prestart", all.prestart()), ("createRuntime", all.create_runtime())] {
        hooks::run_hooks(list.as_ref(), Some(&state), None, None, None)
            .with_context(|| format!("a {name} hook failed"))?;
    }
    Ok(())
}

/// The root file system bound where nothing lies over its parent, as CRIU
/// needs it; gone when dropped.
struct MountedRoot(PathBuf);

impl MountedRoot {
    fn new(dir: &Path, rootfs: &Path) -> Result<Self> {
        let path = dir.join(destroy::CRIU_ROOT);
        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        mount(Some(rootfs), &path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
            .with_context(|| format!("cannot bind {} for CRIU", rootfs.display()))?;
        Ok(MountedRoot(path))
    }
}

impl Drop for MountedRoot {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}
