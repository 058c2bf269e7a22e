//! Running one more process in a container (`exec`).
//!
//! Like creation this does libcontainer's tenant builder's part itself: that
//! one reads the bundle's untouched `config.json`, and leaves the container's
//! seccomp filter and user namespace out.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use libcontainer::container::ContainerStatus;
use libcontainer::notify_socket::{NotifyListener, NotifySocket};
use libcontainer::oci_spec::runtime::{
    Capability, LinuxBuilder, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, Process, ProcessBuilder, Spec,
    UserBuilder,
};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::container_main_process::container_main_process;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::tty;
use nix::fcntl::OFlag;

use crate::cgroup;
use crate::executor::ContainerExec;
use crate::keeper;
use crate::launch::{self, Console};
use crate::store::{self, ContainerHandle};

/// What to run and how.
#[derive(Debug, Default)]
pub struct TenantOptions {
    /// File with a whole process object; the fields from `args` on are ignored then.
    pub process: Option<PathBuf>,
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: Option<PathBuf>,
    pub terminal: bool,
    /// `UID[:GID]`.
    pub user: Option<String>,
    pub additional_gids: Vec<u32>,
    pub capabilities: Vec<String>,
    pub no_new_privileges: bool,
    pub apparmor: Option<String>,
    pub ignore_paused: bool,
    pub preserve_fds: i32,
    pub detached: bool,
}

/// The process an exec shall run, complete.
pub fn process_of(handle: &ContainerHandle, options: &TenantOptions) -> Result<Process> {
    if let Some(path) = &options.process {
        return store::read_json(path);
    }
    if options.args.is_empty() {
        bail!("exec needs a command, or --process FILE");
    }
    let spec = handle.spec()?;
    let init = spec.process().clone().unwrap_or_default();
    let mut env: Vec<String> = init.env().clone().unwrap_or_default();
    for var in &options.env {
        let key = var.split('=').next().unwrap_or(var);
        env.retain(|old| old.split('=').next() != Some(key));
        env.push(var.clone());
    }
    let mut process = ProcessBuilder::default()
        .args(options.args.clone())
        .env(env)
        .cwd(options.cwd.clone().unwrap_or_else(|| init.cwd().clone()))
        .terminal(options.terminal)
        .build()?;
    let user = match &options.user {
        Some(text) => parse_user(text)?,
        None => (init.user().uid(), init.user().gid()),
    };
    let mut builder = UserBuilder::default().uid(user.0).gid(user.1);
    let mut gids = init.user().additional_gids().clone().unwrap_or_default();
    gids.extend(&options.additional_gids);
    if !gids.is_empty() {
        builder = builder.additional_gids(gids);
    }
    process.set_user(builder.build()?);
    process.set_capabilities(with_capabilities(&init, &options.capabilities)?);
    process.set_rlimits(init.rlimits().clone());
    process.set_oom_score_adj(init.oom_score_adj());
    process.set_selinux_label(init.selinux_label().clone());
    let apparmor = options.apparmor.clone().or(init.apparmor_profile().clone());
    process.set_apparmor_profile(apparmor);
    let no_new = options.no_new_privileges || init.no_new_privileges().unwrap_or(false);
    process.set_no_new_privileges(no_new.then_some(true));
    Ok(process)
}

fn with_capabilities(
    init: &Process,
    more: &[String],
) -> Result<Option<libcontainer::oci_spec::runtime::LinuxCapabilities>> {
    let Some(mut caps) = init.capabilities().clone() else {
        return Ok(None);
    };
    for name in more {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let cap = Capability::from_str(short).map_err(|_| anyhow::anyhow!("unknown capability {name}"))?;
        let add = |set: &Option<std::collections::HashSet<Capability>>| {
            let mut set = set.clone().unwrap_or_default();
            set.insert(cap);
            Some(set)
        };
        let (bounding, effective, permitted) = (add(caps.bounding()), add(caps.effective()), add(caps.permitted()));
        caps.set_bounding(bounding);
        caps.set_effective(effective);
        caps.set_permitted(permitted);
    }
    Ok(Some(caps))
}

fn parse_user(text: &str) -> Result<(u32, u32)> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, "0"));
    let number = |part: &str| part.parse().with_context(|| format!("--user {text}: {part:?} is no number"));
    Ok((number(uid)?, number(gid)?))
}

/// Starts `process` in the container and returns its pid; it is a child of
/// this process. `Err` also when the program could not be executed.
pub fn exec(handle: &ContainerHandle, process: Process, console: Console, options: &TenantOptions) -> Result<i32> {
    match handle.status() {
        ContainerStatus::Running => {}
        ContainerStatus::Paused if options.ignore_paused => {}
        ContainerStatus::Paused => bail!("cannot exec in a paused container (use --ignore-paused)"),
        ContainerStatus::Stopped => bail!("cannot exec in a stopped container: {}", store::NOT_RUNNING),
        other => bail!("cannot exec in a container in state {other}"),
    }
    let init = handle.init_pid().context(store::NOT_RUNNING)?;
    let terminal = process.terminal().unwrap_or(false);
    if terminal && matches!(console, Console::None) {
        bail!("cannot allocate tty if runc will detach without setting console socket");
    }
    let spec = tenant_spec(handle.spec()?, process, init)?;
    let name = format!("exec-{}", std::process::id());
    let console = match console {
        Console::None => None,
        Console::Pair(fd) => Some(fd),
        Console::Socket(path) => Some(
            tty::setup_console_socket(handle.dir(), &path, &format!("{name}-tty"))
                .with_context(|| format!("cannot use console socket {}", path.display()))?,
        ),
    };
    let notify = handle.dir().join(format!("{name}.sock"));
    let result = launch(handle, spec, console, &notify, options);
    let _ = std::fs::remove_file(&notify);
    let _ = std::fs::remove_file(handle.dir().join(format!("{name}-tty")));
    result
}

fn launch(
    handle: &ContainerHandle,
    spec: Spec,
    console: Option<OwnedFd>,
    notify: &Path,
    options: &TenantOptions,
) -> Result<i32> {
    // A terminal belongs to a session, which a keeper would split.
    let keep = handle.sidecar.shim.is_some() && console.is_none();
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    let cgroup_config = cgroup::config(&spec, handle.id(), handle.container.systemd())?;
    nix::sys::prctl::set_dumpable(false)?;
    let args = ContainerArgs {
        container_type: ContainerType::TenantContainer { exec_notify_fd: write.as_raw_fd() },
        syscall: SyscallType::default(),
        rootfs: handle.sidecar.rootfs.clone(),
        spec: Rc::new(spec),
        console_socket: console.as_ref().map(AsRawFd::as_raw_fd),
        notify_listener: NotifyListener::new(notify)?,
        preserve_fds: options.preserve_fds,
        container: Some(handle.container.clone()),
        // The namespace is joined, not made: no mapping to write.
        user_ns_config: None,
        cgroup_config,
        detached: options.detached,
        executor: Box::new(ContainerExec { keep }),
        no_pivot: false,
        stdin: None,
        stdout: None,
        stderr: None,
        as_sibling: false,
        pid_file: None,
    };
    let pid = container_main_process(&args).map_err(launch::creation_error)?.as_raw();
    NotifySocket::new(notify).notify_container_start()?;
    drop(write);
    // Closed by exec; text before that is the reason why there was none.
    let mut why = String::new();
    std::io::Read::read_to_string(&mut std::fs::File::from(read), &mut why)?;
    if !why.is_empty() {
        let _ = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
        bail!("cannot run the command in the container: {why}");
    }
    if keep {
        keeper::record(handle, pid)?;
    }
    Ok(pid)
}

/// The container's specification with another process and with its namespaces
/// replaced by those that exist.
fn tenant_spec(mut spec: Spec, process: Process, init: i32) -> Result<Spec> {
    let linux = spec.linux().clone().context("config.json lacks linux")?;
    let mut namespaces = Vec::new();
    for namespace in linux.namespaces().iter().flatten() {
        let Some(file) = namespace_file(namespace) else {
            continue;
        };
        namespaces.push(
            LinuxNamespaceBuilder::default().typ(namespace.typ()).path(format!("/proc/{init}/ns/{file}")).build()?,
        );
    }
    let mut adapted = LinuxBuilder::default().namespaces(namespaces).build()?;
    adapted.set_cgroups_path(linux.cgroups_path().clone());
    adapted.set_personality(linux.personality().clone());
    adapted.set_seccomp(linux.seccomp().clone());
    adapted.set_resources(None);
    adapted.set_devices(None);
    spec.set_linux(Some(adapted));
    spec.set_process(Some(process));
    spec.set_hooks(None);
    Ok(spec)
}

fn namespace_file(namespace: &LinuxNamespace) -> Option<&'static str> {
    Some(match namespace.typ() {
        LinuxNamespaceType::Mount => "mnt",
        LinuxNamespaceType::Cgroup => "cgroup",
        LinuxNamespaceType::Uts => "uts",
        LinuxNamespaceType::Ipc => "ipc",
        LinuxNamespaceType::User => "user",
        LinuxNamespaceType::Pid => "pid",
        LinuxNamespaceType::Network => "net",
        LinuxNamespaceType::Time => "time",
    })
}
