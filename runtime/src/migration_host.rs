//! This runtime as the migration engine's host: what [`checkpoint::engine`] asks of a container runtime, answered
//! with the same functions the verbs use.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use checkpoint::agent::is_plain_name;
use checkpoint::criu::rpc::Criu_network_lock_method;
use checkpoint::engine::host::{
    self, Container, DumpJob, Held, Host, HostError, Nursery, PreDumpJob, RestoreJob, Wire,
};
use checkpoint::incubator::{Incubator, Rights, Spec as IncubatorSpec};
use checkpoint::likeness::Likeness;
use checkpoint::net::link::Links;
use libcontainer::container::ContainerStatus;
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, PosixRlimitType, Spec};

use crate::dump::{self, DumpOptions};
use crate::gate::{Gate, OpenGate};
use crate::inject::{self, HostPaths};
use crate::record::Record;
use crate::starter::{Answer, Event, Order, RestoreOrder, Starter};
use crate::store::{self, ContainerHandle};
use crate::{cgroup, criu_plan, criu_version, destroy, keeper, localise, memory, shown};

/// Time for the incubator to start.
const INCUBATOR: Duration = Duration::from_secs(30);
/// For the monitor's word on anything but the restore itself.
const MONITOR: Duration = Duration::from_secs(30);

/// Containers below one root directory.
#[derive(Debug, Clone)]
pub struct MigrationHost {
    pub root: PathBuf,
    /// The criu program.
    pub criu: PathBuf,
}

/// The whole chain of causes in one sentence.
fn told(err: anyhow::Error) -> HostError {
    HostError(format!("{err:#}"))
}

impl MigrationHost {
    fn look(&self, id: &str) -> Result<Container> {
        let handle = ContainerHandle::load(&self.root, id)?;
        let status = handle.status();
        let init = match status {
            ContainerStatus::Running | ContainerStatus::Paused => handle.init_pid(),
            _ => None,
        };
        let Some(init) = init else {
            bail!("container {id} is {status}; only a running or paused one can be moved");
        };
        let cgroup = handle.cgroup()?;
        let cgroup = cgroup.unified().with_context(|| {
            format!("container {id} has no cgroup of version 2; migration needs the unified hierarchy")
        })?;
        Ok(Container {
            id: id.to_owned(),
            init,
            cgroup: cgroup.to_owned(),
            bundle: handle.container.state.bundle.clone(),
            paused: status == ContainerStatus::Paused,
        })
    }

    fn try_dump(
        &self,
        container: &Container,
        job: &DumpJob,
        gate: &mut dyn FnMut() -> std::result::Result<(), String>,
    ) -> Result<()> {
        let handle = ContainerHandle::load(&self.root, &container.id)?;
        let mut options = DumpOptions::new(&job.images);
        options.remove = false;
        options.carried = true;
        options.parent_path = job.parent.clone();
        options.tracked = job.parent.is_some();
        let common = &mut options.common;
        common.work_path = Some(job.work.clone());
        common.tcp_established = true;
        common.file_locks = true;
        // The engine has taken the container's link down: nothing can arrive that CRIU would have to keep out.
        common.network_lock = Some(Criu_network_lock_method::SKIP);
        common.criu = self.criu.clone();
        common.log_level = criu_plan::migration_log_level();
        dump::dump(handle, &options, &mut LastGate(gate)).map(drop)
    }

    fn try_pre_dump(&self, container: &Container, job: &PreDumpJob) -> Result<()> {
        let handle = ContainerHandle::load(&self.root, &container.id)?;
        let mut options = DumpOptions::new(&job.images);
        options.pre_dump = true;
        options.parent_path = job.parent.clone();
        let common = &mut options.common;
        common.work_path = Some(job.work.clone());
        common.criu = self.criu.clone();
        common.log_level = criu_plan::migration_log_level();
        dump::dump(handle, &options, &mut OpenGate).map(drop)
    }

    fn try_restore(&self, job: &RestoreJob) -> Result<Box<dyn Held>> {
        let mut plugin_env = BTreeMap::new();
        if job.incubator.is_some() {
            plugin_env.insert("MIGRRDMA_INCUBATOR".into(), format!("{}/incubator.sock", inject::AGENT_DIR));
        }
        let spec = store::load_spec_file(&job.bundle.join("config.json"))?;
        let skip = netns(&spec).is_some();
        let order = Order::Restore(RestoreOrder {
            root: self.root.clone(),
            id: job.id.clone(),
            bundle: job.bundle.clone(),
            image_path: job.images.clone(),
            work_path: Some(job.work.clone()),
            systemd_cgroup: by_systemd(&spec),
            tcp_established: true,
            file_locks: true,
            ext_unix_sk: false,
            skip_network_lock: true,
            // Hooks that connect a given namespace to the network must not do so before the commit.
            skip_create_hooks: skip,
            criu: Some(self.criu.clone()),
            criu_log_level: criu_plan::migration_log_level(),
            plugin_dir: None,
            plugin_env,
            hold: true,
            door: Some(job.door.clone()),
            deadline_s: Some(job.deadline.as_secs()),
            pid_file: None,
        });
        let mut starter = Starter::start(&order)?;
        loop {
            match starter.next(job.deadline)? {
                Event::SetupNamespaces { .. } => starter.answer(&Answer::Go)?,
                Event::PostRestore { pid } => return Ok(Box::new(Restored { starter, pid, runs: false, told: false })),
                Event::Failed { error } => bail!("{error}"),
                Event::Running { .. } => bail!("the monitor let the tasks run without asking"),
            }
        }
    }

    fn try_incubate(&self, id: &str, bundle: &Path, socket: &Path) -> Result<Incubator> {
        let spec = store::load_spec_file(&bundle.join("config.json"))?;
        let spec = IncubatorSpec {
            program: "/proc/self/exe".into(),
            rights: rights(&spec)?,
            devices: Vec::new(),
            socket: socket.to_owned(),
            memory: self.memory_files(id),
            log: None,
        };
        Ok(Incubator::start(&spec, INCUBATOR)?)
    }
}

/// What the bundle lets its container do.
fn rights(spec: &Spec) -> Result<Rights> {
    let process = spec.process().as_ref().context("config.json has no process")?;
    let user = process.user();
    let caps = process.capabilities().as_ref().and_then(|c| c.effective().clone()).unwrap_or_default();
    let rlimits = process.rlimits().clone().unwrap_or_default();
    let memlock = rlimits.iter().find(|l| l.typ() == PosixRlimitType::RlimitMemlock);
    Ok(Rights {
        uid: user.uid(),
        gid: user.gid(),
        groups: user.additional_gids().clone().unwrap_or_default(),
        caps: caps.iter().map(|cap| format!("CAP_{}", cap.to_string().trim_start_matches("CAP_"))).collect(),
        memlock: memlock.map(|l| (l.soft(), l.hard())),
        // Its cgroup is made by its restore, after these objects, and goes with a restore that failed, which a process
        // in it would prevent. What it would be charged for is little: queues are kernel memory that no memory cgroup
        // counts. Limits of an rdma cgroup are not applied to objects that move.
        cgroup: None,
    })
}

/// Engines that let systemd make cgroups name them `slice:prefix:name`; nothing else looks like that.
pub fn by_systemd(spec: &Spec) -> bool {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    path.and_then(|path| path.to_str()).is_some_and(|path| !path.starts_with('/') && path.matches(':').count() == 2)
}

struct LastGate<'a>(&'a mut dyn FnMut() -> std::result::Result<(), String>);

impl Gate for LastGate<'_> {
    fn post_dump(&mut self) -> Result<()> {
        (self.0)().map_err(anyhow::Error::msg)
    }

    fn setup_namespaces(&mut self, _pid: i32) -> Result<()> {
        bail!("a dump makes no namespaces")
    }

    fn post_restore(&mut self, _pid: i32) -> Result<()> {
        bail!("a dump restores nothing")
    }
}

/// A container restored up to the last gate, in the hands of its monitor.
struct Restored {
    starter: Starter,
    pid: i32,
    /// The tasks run.
    runs: bool,
    /// The monitor has its answer.
    told: bool,
}

/// The monitor would wait for another agent; but this one decides against it.
impl Drop for Restored {
    fn drop(&mut self) {
        if !self.told {
            let _ = self.starter.answer(&Answer::Refuse { why: "the migration was given up".into() });
        }
    }
}

impl Restored {
    fn try_release(&mut self) -> Result<()> {
        if self.runs {
            return Ok(());
        }
        self.starter.answer(&Answer::Go)?;
        self.told = true;
        match self.starter.next(MONITOR)? {
            Event::Running { .. } => {
                self.runs = true;
                Ok(())
            }
            Event::Failed { error } => bail!("{error}"),
            question => bail!("unexpected question of the monitor: {question:?}"),
        }
    }

    fn try_abandon(mut self) -> Result<()> {
        self.starter.answer(&Answer::Refuse { why: "the migration was not committed".into() })?;
        self.told = true;
        match self.starter.next(MONITOR)? {
            Event::Failed { .. } => Ok(()),
            other => bail!("the monitor answered a refusal with {other:?}"),
        }
    }
}

impl Held for Restored {
    fn init(&self) -> i32 {
        self.pid
    }

    fn release(&mut self) -> host::Result<()> {
        self.try_release().map_err(told)
    }

    fn abandon(self: Box<Self>) -> host::Result<()> {
        self.try_abandon().map_err(told)
    }
}

/// The host's ends of the container's veth pairs.
struct Veth(Links);

impl Wire for Veth {
    fn down(&mut self) -> host::Result<()> {
        self.0.set(false).map_err(|e| HostError::of(&e))
    }

    fn up(&mut self) -> host::Result<()> {
        self.0.set(true).map_err(|e| HostError::of(&e))
    }

    fn announce(&mut self) -> host::Result<()> {
        self.0.announce().map_err(|e| HostError::of(&e))
    }
}

impl Host for MigrationHost {
    fn containers(&self) -> host::Result<Vec<Container>> {
        let ids = store::ids(&self.root).map_err(told)?;
        // One that has ended, or is broken, does not hide the others.
        Ok(ids.iter().filter_map(|id| self.look(id).ok()).collect())
    }

    fn container(&self, id: &str) -> host::Result<Container> {
        self.look(id).map_err(told)
    }

    fn freeze(&self, container: &Container) -> host::Result<()> {
        let freeze = || ContainerHandle::load(&self.root, &container.id)?.cgroup()?.freeze();
        freeze().map_err(told)
    }

    fn thaw(&self, container: &Container) -> host::Result<()> {
        let thaw = || ContainerHandle::load(&self.root, &container.id)?.cgroup()?.thaw();
        thaw().map_err(told)
    }

    fn lost(&self, container: &Container) -> host::Result<Vec<String>> {
        let lost = || keeper::outsiders(&ContainerHandle::load(&self.root, &container.id)?);
        let list = lost().map_err(told)?;
        Ok(list.into_iter().map(|(pid, name)| format!("{name} (pid {pid} on the host)")).collect())
    }

    fn dump(
        &self,
        container: &Container,
        job: &DumpJob,
        gate: &mut dyn FnMut() -> std::result::Result<(), String>,
    ) -> host::Result<()> {
        self.try_dump(container, job, gate).map_err(told)
    }

    fn pre_dump(&self, container: &Container, job: &PreDumpJob) -> host::Result<()> {
        self.try_pre_dump(container, job).map_err(told)
    }

    fn examine(&self, id: &str, bundle: Option<&Path>) -> Vec<String> {
        let mut problems = Vec::new();
        if !is_plain_name(id) {
            problems.push(format!("{id:?} is no container id"));
        } else if self.root.join(id).exists() {
            problems.push(format!("a container {id} is here already; delete it first"));
        }
        let Some(bundle) = bundle else { return problems };
        let config = bundle.join("config.json");
        let spec = match store::load_spec_file(&config) {
            Ok(spec) => spec,
            Err(err) => {
                problems.push(format!(
                    "the bundle {} is not here: {err:#}; put it there, or migrate with --copy-rootfs",
                    bundle.display()
                ));
                return problems;
            }
        };
        match self.rootfs(bundle) {
            Ok(rootfs) if rootfs.is_dir() => {}
            Ok(rootfs) => problems.push(format!("the bundle's root file system {} is not here", rootfs.display())),
            Err(err) => problems.push(err.to_string()),
        }
        if let Some(path) = netns(&spec)
            && !path.exists()
        {
            problems.push(format!("the network namespace {} of the bundle is not here", path.display()));
        }
        match inject::wanted(&spec) {
            Ok(true) => problems.extend(self.tools()),
            Ok(false) => {}
            Err(err) => problems.push(format!("{err:#}")),
        }
        problems
    }

    fn tools(&self) -> Vec<String> {
        let needed = [
            ("shim", HostPaths::default().shim),
            ("CRIU plugin", Path::new(checkpoint::criu::PLUGIN_DIR).join("libmigrrdma_plugin.so")),
        ];
        let missing = needed.iter().filter(|(_, path)| !path.is_file());
        missing
            .map(|(what, path)| format!("the {what} {} is missing; install migrrdma again", path.display()))
            .collect()
    }

    fn localise(&self, bundle: &Path) -> host::Result<()> {
        localise::bundle(bundle).map_err(told)
    }

    fn rootfs(&self, bundle: &Path) -> host::Result<PathBuf> {
        let spec = store::load_spec_file(&bundle.join("config.json")).map_err(told)?;
        let root = spec.root().as_ref().map_or_else(|| PathBuf::from("rootfs"), |root| root.path().clone());
        Ok(bundle.join(root))
    }

    fn injected(&self, path: &Path) -> Vec<PathBuf> {
        if path != Path::new(inject::SHIM_PATH) {
            return Vec::new();
        }
        let HostPaths { shim, store, .. } = HostPaths::default();
        let kept = fs::read_dir(store).into_iter().flatten().flatten().map(|e| e.path().join("libmigrrdma.so"));
        kept.chain([shim]).collect()
    }

    fn memory_files(&self, id: &str) -> Option<PathBuf> {
        Some(HostPaths::default().memory_dir(id)).filter(|dir| dir.is_dir())
    }

    fn make_memory_files(&self, id: &str) -> host::Result<PathBuf> {
        let dir = HostPaths::default().memory_dir(id);
        memory::make_dir(&dir).map_err(told)?;
        Ok(dir)
    }

    fn likenesses(&self, id: &str) -> host::Result<Vec<Likeness>> {
        shown::known(id, &HostPaths::default()).map_err(told)
    }

    fn show(&self, id: &str, devices: &[Likeness]) -> host::Result<()> {
        shown::lay(id, devices, &HostPaths::default()).map_err(told)
    }

    fn show_no_more(&self, id: &str) {
        let _ = fs::remove_dir_all(HostPaths::default().sysfs_dir(id));
    }

    fn remove_restored(&self, id: &str, images: &Path) -> host::Result<bool> {
        let remove = || {
            if !self.root.join(id).exists() {
                return Ok(false);
            }
            let handle = ContainerHandle::load(&self.root, id)?;
            if handle.sidecar.restored_from.as_deref() != Some(images) {
                return Ok(false);
            }
            destroy::delete(handle, true).map(|()| true)
        };
        remove().map_err(told)
    }

    fn drop_memory_files(&self, id: &str) {
        let _ = fs::remove_dir_all(HostPaths::default().memory_dir(id));
    }

    fn incubate(&self, id: &str, bundle: &Path, socket: &Path) -> host::Result<Box<dyn Nursery>> {
        Ok(Box::new(self.try_incubate(id, bundle, socket).map_err(told)?))
    }

    fn restore(&self, job: &RestoreJob) -> host::Result<Box<dyn Held>> {
        self.try_restore(job).map_err(told)
    }

    fn held_at(&self, door: &Path) -> host::Result<Option<Box<dyn Held>>> {
        let found = Starter::at(door).map_err(told)?;
        Ok(found.map(|(starter, pid)| Box::new(Restored { starter, pid, runs: false, told: false }) as Box<dyn Held>))
    }

    fn forget(&self, container: &Container) -> host::Result<()> {
        let forget = || {
            if !self.root.join(&container.id).exists() {
                return Ok(());
            }
            let handle = ContainerHandle::load(&self.root, &container.id)?;
            if handle.container.state.pid != Some(container.init) {
                return Ok(());
            }
            if let Ok(cgroup) = handle.cgroup() {
                // Frozen tasks that were killed go only when they are let go.
                let _ = cgroup.thaw();
            }
            wait_for_end(&handle)?;
            destroy::remove(handle)
        };
        forget().map_err(told)
    }

    fn wire(&self, bundle: &Path, init: Option<i32>) -> host::Result<Option<Box<dyn Wire>>> {
        let spec = store::load_spec_file(&bundle.join("config.json")).map_err(told)?;
        let path = netns(&spec).or_else(|| init.map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net"))));
        let Some(path) = path else { return Ok(None) };
        let links = Links::of(&path).map_err(|e| HostError(format!("{}: {e}", path.display())))?;
        if links.pairs.is_empty() {
            return Ok(None);
        }
        Ok(Some(Box::new(Veth(links))))
    }

    fn gone_to(&self, id: &str, to: Option<&str>) {
        // A container without a record has nobody waiting for it through us.
        let Ok(record) = Record::of(id) else { return };
        match to {
            Some(to) if record.exists() => {
                if let Err(err) = record.mark_moved(to) {
                    eprintln!("container {id}: {err:#}");
                }
            }
            Some(_) => {}
            None => record.unmark_moved(),
        }
    }

    fn criu(&self) -> host::Result<u32> {
        let version = criu_version::of(&self.criu).map_err(told)?;
        criu_version::warm(&self.criu);
        Ok(version.0)
    }
}

/// The network namespace a bundle names.
pub fn netns(spec: &Spec) -> Option<PathBuf> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|n| n.typ() == LinuxNamespaceType::Network)?.path().clone()
}

/// CRIU has killed the tasks; their end takes a moment.
fn wait_for_end(handle: &ContainerHandle) -> Result<()> {
    if let Some(pid) = handle.init_pid() {
        cgroup::signal_pid(pid, nix::sys::signal::Signal::SIGKILL as i32)?;
    }
    let end = std::time::Instant::now() + MONITOR;
    while handle.init_pid().is_some() {
        if std::time::Instant::now() >= end {
            bail!("container {} does not end although it moved", handle.id());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_makes_the_cgroup_is_seen_from_its_path() {
        for (path, systemd) in [("system.slice:docker:4711", true), ("/lab/one", false), ("machine/a", false)] {
            let text = format!(r#"{{"ociVersion": "1.0.2", "linux": {{"cgroupsPath": "{path}"}}}}"#);
            assert_eq!(by_systemd(&serde_json::from_str(&text).unwrap()), systemd, "{path}");
        }
    }
}
