//! Making containers and their further processes with libcontainer.
//!
//! libcontainer's builder reads `config.json` from the bundle itself; this
//! module does the builder's part (some sixty lines) so that the rewritten
//! specification is used while state and hooks still name the user's bundle.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use libcontainer::config::YoukiConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener};
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::user_ns::UserNamespaceConfig;
use libcontainer::validator::Validator;
use libcontainer::{tty, utils};

use crate::cgroup::{self, Cgroup};
use crate::executor::ContainerExec;
use crate::inject::{self, HostPaths};
use crate::store::{self, ContainerHandle, Sidecar};
use crate::{destroy, devices, procfs, rootfs, stdio};

/// Where a new container's terminal goes.
#[derive(Debug, Default)]
pub enum Console {
    /// The specification asks for none.
    #[default]
    None,
    /// An engine's unix socket.
    Socket(PathBuf),
    /// One end of a socket pair this process holds.
    Pair(OwnedFd),
}

/// How to make a container.
#[derive(Debug, Default)]
pub struct CreateOptions {
    pub console: Console,
    pub detached: bool,
    pub no_pivot: bool,
    pub preserve_fds: i32,
    pub systemd_cgroup: bool,
    /// stdin, stdout, stderr; inherited from this process where `None`.
    pub stdio: [Option<OwnedFd>; 3],
}

/// A bundle made ready: its specification with absolute paths and injection.
#[derive(Debug)]
pub struct Prepared {
    pub spec: Spec,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// Hash of the injected shim.
    pub shim: Option<String>,
}

/// Reads, checks and rewrites a bundle's specification. `shim` asks for a
/// certain shim, as an image does.
pub fn prepare(bundle: &Path, id: &str, systemd: bool, shim: Option<&str>) -> Result<Prepared> {
    store::validate_id(id)?;
    let bundle = fs::canonicalize(bundle).with_context(|| format!("cannot open the bundle {}", bundle.display()))?;
    let mut spec = store::load_spec_file(&bundle.join("config.json"))?;
    validate(&spec).context("config.json")?;
    spec.canonicalize_rootfs(&bundle).context("config.json: root.path")?;
    drop_false_no_new_privileges(&mut spec);
    let root = spec.root().as_ref().context("config.json lacks root")?;
    let rootfs = fs::canonicalize(root.path())
        .with_context(|| format!("cannot open the root file system {}", root.path().display()))?;
    default_cgroup_path(&mut spec, id, systemd);
    let shim = match inject::wanted(&spec)? {
        true => Some(inject::inject(&mut spec, id, &rootfs, shim, &HostPaths::default())?),
        false => None,
    };
    Ok(Prepared { spec, bundle, rootfs, shim })
}

fn validate(spec: &Spec) -> Result<()> {
    Validator::validate_spec(spec)?;
    let syscall = create_syscall();
    if let Some(mounts) = spec.mounts() {
        utils::validate_mount_options(mounts)?;
    }
    utils::validate_spec_for_new_user_ns(spec, &*syscall)?;
    utils::validate_spec_for_net_devices(spec, &*syscall)?;
    for (what, missing) in [("process", spec.process().is_none()), ("linux", spec.linux().is_none())] {
        if missing {
            bail!("{what} is missing");
        }
    }
    Ok(())
}

/// libcontainer takes an explicit `false` for "seccomp may be loaded late",
/// which then fails for want of rights; absent means the same and works.
fn drop_false_no_new_privileges(spec: &mut Spec) {
    if let Some(mut process) = spec.process().clone()
        && process.no_new_privileges() == Some(false)
    {
        process.set_no_new_privileges(None);
        spec.set_process(Some(process));
    }
}

/// runc's defaults: a cgroup of the container's name.
fn default_cgroup_path(spec: &mut Spec, id: &str, systemd: bool) {
    let Some(linux) = spec.linux().clone() else {
        return;
    };
    if linux.cgroups_path().as_ref().is_some_and(|p| !p.as_os_str().is_empty()) {
        return;
    }
    let path = match systemd {
        true => format!(":migrrdma:{id}"),
        false => format!("/migrrdma-{id}"),
    };
    let mut linux = linux;
    linux.set_cgroups_path(Some(path.into()));
    spec.set_linux(Some(linux));
}

/// Makes the state directory of a new container.
pub fn make_state_dir(root: &Path, id: &str) -> Result<PathBuf> {
    fs::create_dir_all(root).with_context(|| format!("cannot make {}", root.display()))?;
    let dir = root.join(id);
    match fs::create_dir(&dir) {
        Ok(()) => Ok(dir),
        Err(err) if err.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("container with given ID already exists: {id}")
        }
        Err(err) => Err(err).with_context(|| format!("cannot make {}", dir.display())),
    }
}

/// A container's state before its process exists, saved.
pub fn new_handle(dir: &Path, id: &str, prepared: &Prepared, systemd: bool) -> Result<ContainerHandle> {
    let mut container = Container::new(id, ContainerStatus::Creating, None, &prepared.bundle, dir)?;
    container
        .set_systemd(systemd)
        .set_annotations(prepared.spec.annotations().clone())
        .set_creator(nix::unistd::geteuid().as_raw());
    let handle = ContainerHandle { container, sidecar: Sidecar::new(prepared.rootfs.clone(), prepared.shim.clone()) };
    YoukiConfig::from_spec(&prepared.spec, id)?.save(dir)?;
    handle.save_spec(&prepared.spec)?;
    handle.save()?;
    Ok(handle)
}

/// Creates a container whose process waits for `start`.
pub fn create(root: &Path, id: &str, bundle: &Path, mut options: CreateOptions) -> Result<ContainerHandle> {
    store::validate_id(id)?;
    if root.join(id).exists() {
        bail!("container with given ID already exists: {id}");
    }
    let prepared = prepare(bundle, id, options.systemd_cgroup, None)?;
    check_terminal(&prepared.spec, &options)?;
    let dir = make_state_dir(root, id)?;
    create_in(&dir, id, &prepared, &mut options).inspect_err(|_| {
        let cgroup = Cgroup::for_spec(&prepared.spec, id, options.systemd_cgroup);
        destroy::leftovers(&dir, id, cgroup.ok().as_ref(), prepared.shim.is_some());
    })
}

fn check_terminal(spec: &Spec, options: &CreateOptions) -> Result<()> {
    let terminal = wants_terminal(spec);
    match (&options.console, terminal, options.detached) {
        (Console::None, true, true) => {
            bail!("cannot allocate tty if runc will detach without setting console socket")
        }
        (Console::Socket(_), false, _) => {
            bail!("cannot use console socket if runc will not detach or allocate tty")
        }
        _ => Ok(()),
    }
}

/// Whether the container's process has a terminal.
pub fn wants_terminal(spec: &Spec) -> bool {
    spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false)
}

fn create_in(dir: &Path, id: &str, prepared: &Prepared, options: &mut CreateOptions) -> Result<ContainerHandle> {
    let mut handle = new_handle(dir, id, prepared, options.systemd_cgroup)?;
    make_cwd(&prepared.spec, &prepared.rootfs)?;
    let console = match std::mem::take(&mut options.console) {
        Console::None => None,
        Console::Pair(fd) => Some(fd),
        Console::Socket(path) => Some(
            tty::setup_console_socket(dir, &path, "console-socket")
                .with_context(|| format!("cannot use console socket {}", path.display()))?,
        ),
    };
    let score = lend_oom_score(&prepared.spec)?;
    // The container's processes must not look into this one.
    nix::sys::prctl::set_dumpable(false)?;
    let raw = |n: usize| options.stdio[n].as_ref().map(AsRawFd::as_raw_fd);
    let args = ContainerArgs {
        container_type: ContainerType::InitContainer,
        syscall: SyscallType::default(),
        spec: Rc::new(prepared.spec.clone()),
        rootfs: prepared.rootfs.clone(),
        console_socket: console.as_ref().map(AsRawFd::as_raw_fd),
        notify_listener: NotifyListener::new(&handle.dir().join(NOTIFY_FILE))?,
        preserve_fds: options.preserve_fds,
        container: Some(handle.container.clone()),
        user_ns_config: UserNamespaceConfig::new(&prepared.spec)?,
        cgroup_config: cgroup::config(&prepared.spec, id, options.systemd_cgroup)?,
        detached: options.detached,
        executor: Box::new(ContainerExec { keep: false }),
        no_pivot: options.no_pivot,
        stdin: raw(0),
        stdout: raw(1),
        stderr: raw(2),
        as_sibling: false,
        pid_file: None,
    };
    let pid = container_main_process(&args);
    restore_oom_score(score);
    let pid = pid.map_err(creation_error)?.as_raw();
    adopt_process(&mut handle, pid)?;
    confine(&prepared.spec, &handle.sidecar.cgroup)?;
    handle.sidecar.descriptors = stdio::links(pid);
    handle.set_status(ContainerStatus::Created)?;
    Ok(handle)
}

/// A command that cannot be executed is told in runc's words, without the
/// layers it came through.
pub fn creation_error(err: libcontainer::process::container_main_process::ProcessError) -> anyhow::Error {
    let text = format!("{err}");
    match text.find("exec: \"") {
        Some(at) => anyhow::anyhow!("{}", &text[at..]),
        None => anyhow::Error::from(err).context("cannot create the container's process"),
    }
}

/// Records which process is the container's init.
pub fn adopt_process(handle: &mut ContainerHandle, pid: i32) -> Result<()> {
    let stat = procfs::stat(pid).context("the container's process ended at once")?;
    handle.container.set_pid(pid);
    handle.sidecar.start_time = Some(stat.start_time);
    handle.sidecar.cgroup = procfs::unified_cgroup(pid).unwrap_or_default();
    Ok(())
}

/// What libcgroups does not do on the unified hierarchy. `cgroup` is relative
/// to its mount point; empty where there is none.
pub fn confine(spec: &Spec, cgroup: &Path) -> Result<()> {
    let Ok(inside) = cgroup.strip_prefix("/") else {
        return Ok(());
    };
    let path = Path::new("/sys/fs/cgroup").join(inside);
    // On hybrid hosts the old device controller does it.
    if inside.as_os_str().is_empty() || !path.join("cgroup.procs").exists() {
        return Ok(());
    }
    if let Some(resources) = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref()) {
        Cgroup::apply_rdma(&path, resources)?;
    }
    devices::restrict(spec, &path)
}

/// runc makes a missing working directory.
fn make_cwd(spec: &Spec, root: &Path) -> Result<()> {
    let Some(process) = spec.process() else {
        return Ok(());
    };
    let cwd = rootfs::resolve_inside(root, process.cwd())?;
    let mounted = spec.mounts().iter().flatten().any(|mount| {
        let at = mount.destination().strip_prefix("/").unwrap_or(mount.destination());
        !at.as_os_str().is_empty() && cwd.starts_with(at)
    });
    let path = root.join(&cwd);
    if mounted || path.exists() {
        return Ok(());
    }
    fs::create_dir_all(&path).with_context(|| format!("cannot make the working directory {}", path.display()))
}

/// Children inherit the score, and only before they lose their rights.
fn lend_oom_score(spec: &Spec) -> Result<Option<String>> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let Some(score) = spec.process().as_ref().and_then(|p| p.oom_score_adj()) else {
        return Ok(None);
    };
    let old = fs::read_to_string(FILE)?;
    fs::write(FILE, score.to_string()).with_context(|| format!("cannot write {score} to {FILE}"))?;
    Ok(Some(old))
}

fn restore_oom_score(old: Option<String>) {
    if let Some(old) = old {
        let _ = fs::write("/proc/self/oom_score_adj", old.trim());
    }
}

/// Lets a created container's process go.
pub fn start(handle: &mut ContainerHandle) -> Result<()> {
    match handle.status() {
        ContainerStatus::Created => {}
        ContainerStatus::Stopped => bail!("cannot start a container that has stopped"),
        other => bail!("cannot start an already running container (it is {other})"),
    }
    handle.container.start().context("cannot start the container")?;
    handle.save()
}

/// Writes a pid as engines read it: digits, no newline, all at once.
pub fn write_pid_file(path: &Path, pid: i32) -> Result<()> {
    store::write_atomically(path, pid.to_string().as_bytes())
}
