//! Small process states for tests, and a host that does nothing, with its agent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rdma_virt::id::{Handle, ObjId, PGid, PLkey, PQpn, PRkey, VGid, VLkey, VQpn, VRkey, Vpid};
use rdma_virt::saved::{ContextState, GidEntry, MrState, ProcessState, QpAttr, QpCap, QpPhase, QpState, Remote};

use crate::agent::Agent;
use crate::agent::config::{Config, Deadlines};

use super::host::{Container, DumpJob, Held, Host, HostError, Nursery, PreDumpJob, RestoreJob, Result, Wire};
use crate::image::HandOver;
use crate::likeness::Likeness;
use crate::net::msg::{Lease, Offer};

/// GID of the source, of the destination, of the peer's host.
pub const SRC: [u8; 16] = [1; 16];
pub const DST: [u8; 16] = [3; 16];
pub const PEER: [u8; 16] = [2; 16];

/// A QP that never moved; connected to a QP of that number on the peer's host, if any.
pub fn qp(id: u32, number: u32, remote: Option<u32>) -> QpState {
    let remote = remote.map(|n| Remote { vgid: VGid(PEER), vqpn: VQpn(n), pgid: PGid(PEER), pqpn: PQpn(n) });
    QpState {
        id: ObjId(id),
        handle: Handle(id),
        pd: ObjId(100),
        send_cq: ObjId(101),
        recv_cq: ObjId(101),
        srq: None,
        qp_type: 2,
        sq_sig_all: false,
        cap: QpCap { max_send_wr: 1, max_recv_wr: 1, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 0 },
        user_handle: 0,
        vqpn: VQpn(number),
        pqpn: PQpn(number),
        sq_map: None,
        rq_map: None,
        phase: if remote.is_some() { QpPhase::Rts } else { QpPhase::Init },
        attr: QpAttr::default(),
        remote,
    }
}

/// A registered range that never moved.
pub fn mr(id: u32, addr: u64, length: u64) -> MrState {
    MrState {
        id: ObjId(id),
        handle: Handle(id),
        pd: ObjId(100),
        addr,
        length,
        iova: addr,
        access: 1,
        vlkey: VLkey(id),
        vrkey: VRkey(id),
        plkey: PLkey(id),
        prkey: PRkey(id),
    }
}

/// A process with one context.
pub fn process(vpid: i32, qps: Vec<QpState>) -> ProcessState {
    ProcessState {
        vpid: Vpid(vpid),
        comm: "app".into(),
        builds: Vec::new(),
        contexts: vec![ContextState {
            id: ObjId(1),
            device: "rxe0".into(),
            driver: "rxe".into(),
            node_guid: 1,
            cmd_fd: 3,
            async_fd: 4,
            gids: vec![GidEntry { port: 1, index: 0, gid: VGid(SRC), kind: 2 }],
            pds: Vec::new(),
            channels: Vec::new(),
            cqs: Vec::new(),
            srqs: Vec::new(),
            qps,
            mrs: Vec::new(),
        }],
        blockers: Vec::new(),
        memory: Vec::new(),
    }
}

/// An agent on such a host, with its directories below `dir`, that is not started: it can do nothing but be asked.
pub fn idle_agent(dir: &Path) -> Arc<Agent> {
    idle_agent_with(dir, Deadlines::default())
}

/// The same with other deadlines.
pub fn idle_agent_with(dir: &Path, deadlines: Deadlines) -> Arc<Agent> {
    let config = Config { state_dir: dir.join("state"), run_dir: dir.join("run"), deadlines, ..Config::default() };
    std::fs::create_dir_all(&config.run_dir).unwrap();
    Agent::new(config, Arc::new(IdleHost)).unwrap()
}

/// What the source says of a container without processes.
pub fn offer(container: &str) -> Offer {
    Offer {
        container: container.into(),
        bundle: "/b".into(),
        from: "src".into(),
        from_port: 1,
        criu: 40101,
        cpu_flags: Vec::new(),
        processes: Vec::new(),
        image_bytes: 0,
        paused: false,
        lease: Lease { first: 1, count: 2 },
        hand_over: HandOver::Adopt,
        copy: None,
    }
}

const REMOVED: &str = ".removed";

/// Containers that such an agent has had its host remove.
pub fn removed(agent: &Agent) -> Vec<String> {
    let names = std::fs::read_dir(&agent.config.state_dir).unwrap().map(|e| e.unwrap().file_name());
    names.filter_map(|name| Some(name.to_str()?.strip_suffix(REMOVED)?.to_owned())).collect()
}

/// The one container that an idle host does not have.
pub const NEVER_CAME: &str = "never-came";

/// A host on which any other container that is asked for exists, and nothing happens.
#[derive(Debug)]
pub struct IdleHost;

fn never<T>() -> Result<T> {
    Err(HostError("not on this host".into()))
}

impl Host for IdleHost {
    fn containers(&self) -> Result<Vec<Container>> {
        Ok(Vec::new())
    }
    fn container(&self, id: &str) -> Result<Container> {
        if id == NEVER_CAME {
            return never();
        }
        let (cgroup, bundle) = ("/nonexistent".into(), "/nonexistent".into());
        Ok(Container { id: id.into(), init: 1, cgroup, bundle, paused: false })
    }
    fn freeze(&self, _: &Container) -> Result<()> {
        never()
    }
    fn thaw(&self, _: &Container) -> Result<()> {
        never()
    }
    fn lost(&self, _: &Container) -> Result<Vec<String>> {
        never()
    }
    fn dump(&self, _: &Container, _: &DumpJob, _: &mut dyn FnMut() -> std::result::Result<(), String>) -> Result<()> {
        never()
    }
    fn pre_dump(&self, _: &Container, _: &PreDumpJob) -> Result<()> {
        never()
    }
    fn examine(&self, _: &str, _: Option<&Path>) -> Vec<String> {
        vec!["nothing comes to this host".into()]
    }
    fn tools(&self) -> Vec<String> {
        Vec::new()
    }
    fn localise(&self, _: &Path) -> Result<()> {
        never()
    }
    fn rootfs(&self, _: &Path) -> Result<PathBuf> {
        never()
    }
    fn injected(&self, _: &Path) -> Vec<PathBuf> {
        Vec::new()
    }
    fn memory_files(&self, _: &str) -> Option<PathBuf> {
        None
    }
    fn make_memory_files(&self, _: &str) -> Result<PathBuf> {
        never()
    }
    fn drop_memory_files(&self, _: &str) {}
    fn likenesses(&self, _: &str) -> Result<Vec<Likeness>> {
        Ok(Vec::new())
    }
    fn show(&self, _: &str, _: &[Likeness]) -> Result<()> {
        never()
    }
    fn show_no_more(&self, _: &str) {}
    /// Every image that is there has its container. Their names are kept beside the agent's directories of images.
    fn remove_restored(&self, id: &str, images: &Path) -> Result<bool> {
        if images.is_dir()
            && let Some(state) = images.ancestors().nth(3)
        {
            std::fs::write(state.join(format!("{id}{REMOVED}")), "").unwrap();
        }
        Ok(images.is_dir())
    }
    fn incubate(&self, _: &str, _: &Path, _: &Path) -> Result<Box<dyn Nursery>> {
        never()
    }
    fn restore(&self, _: &RestoreJob) -> Result<Box<dyn Held>> {
        never()
    }
    fn held_at(&self, _: &Path) -> Result<Option<Box<dyn Held>>> {
        Ok(None)
    }
    fn forget(&self, _: &Container) -> Result<()> {
        Ok(())
    }
    fn wire(&self, _: &Path, _: Option<i32>) -> Result<Option<Box<dyn Wire>>> {
        never()
    }
    fn gone_to(&self, _: &str, _: Option<&str>) {}
    fn criu(&self) -> Result<u32> {
        never()
    }
}
