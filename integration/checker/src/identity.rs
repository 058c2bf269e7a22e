//! What the application was told once must stay true: numbers, keys, names, addresses.

use crate::rig::Rig;
use crate::verbs::{DeviceInfo, MrFields, PortInfo, QpView};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

/// Everything about one QP and its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
struct LinkIdentity {
    qp: QpView,
    memory: [MrFields; 4],
}

/// Everything about one context.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ContextIdentity {
    device: DeviceInfo,
    port: PortInfo,
    gid: [u8; 16],
    /// Device number of the node in /dev/infiniband, if there is one.
    node: Option<u64>,
    /// What sysfs says, read past the library.
    sysfs: Vec<(String, Option<String>)>,
}

/// A picture of everything, to compare later ones with.
#[derive(Debug)]
pub struct Identity {
    contexts: Vec<ContextIdentity>,
    links: Vec<LinkIdentity>,
    idle: Vec<QpView>,
    queues: Vec<i32>,
}

impl Identity {
    /// Asks for everything.
    ///
    /// # Errors
    /// When something does not answer.
    pub fn of(rig: &Rig) -> Result<Self, String> {
        let mut contexts = Vec::new();
        for c in &rig.contexts {
            let device = c.device().map_err(|e| e.to_string())?;
            let node = format!("/dev/infiniband/{}", device.node);
            contexts.push(ContextIdentity {
                port: c.port(rig.port).map_err(|e| e.to_string())?,
                gid: c.gid(rig.port, i32::from(rig.gid_index)).map_err(|e| e.to_string())?,
                node: std::fs::metadata(node).ok().map(|m| m.rdev()),
                sysfs: sysfs(&device, rig.port, rig.gid_index),
                device,
            });
        }
        let mut links = Vec::new();
        for l in &rig.links {
            links.push(LinkIdentity {
                qp: l.qp.query().map_err(|e| format!("{l}: {e}"))?,
                memory: [l.send_mr.fields(), l.second_mr.fields(), l.shared_mr.fields(), l.pool.mr.fields()],
            });
        }
        Ok(Self {
            contexts,
            links,
            idle: rig.idle.iter().map(|q| q.query().map_err(|e| e.to_string())).collect::<Result<_, _>>()?,
            queues: rig.queues.iter().map(|q| q.cq.entries()).collect(),
        })
    }

    /// Asks for everything anew and compares; violations go to the rig's list. False when there was
    /// one.
    pub fn check(&self, rig: &Rig) -> bool {
        let now = match Self::of(rig) {
            Ok(n) => n,
            Err(e) => {
                rig.failures.add(format!("a query that worked before fails now: {e}"));
                return false;
            }
        };
        let before = rig.failures.count();
        for (i, (a, b)) in self.contexts.iter().zip(&now.contexts).enumerate() {
            changed(rig, &format!("context {i}"), a, b);
        }
        for (i, (a, b)) in self.links.iter().zip(&now.links).enumerate() {
            changed(rig, &rig.links[i].to_string(), a, b);
        }
        for (i, (a, b)) in self.idle.iter().zip(&now.idle).enumerate() {
            changed(rig, &format!("unused QP {i}"), a, b);
        }
        changed(rig, "sizes of the CQs", &self.queues, &now.queues);
        rig.stats.identity_checks.fetch_add(1, Ordering::Relaxed);
        rig.failures.count() == before
    }

    /// Whether every QP was in RTS and knows the peer it was connected to.
    ///
    /// # Errors
    /// Naming the QP that is not.
    pub fn plausible(&self, rig: &Rig) -> Result<(), String> {
        for (l, id) in rig.links.iter().zip(&self.links) {
            let e = &l.remote().endpoint;
            if id.qp.state != 3 || id.qp.dest_qpn != e.qpn || id.qp.dgid != e.gid {
                return Err(format!("{l}: ibv_query_qp says {:?}, connected to {e:?}", id.qp));
            }
        }
        Ok(())
    }
}

/// Files of the verbs device, of the RDMA device, of its port and of the GID in use.
fn sysfs(device: &DeviceInfo, port: u8, gid: u8) -> Vec<(String, Option<String>)> {
    let DeviceInfo { dev_path, ibdev_path, .. } = device;
    let port = format!("{ibdev_path}/ports/{port}");
    let files = [
        format!("{dev_path}/ibdev"),
        format!("{dev_path}/dev"),
        format!("{ibdev_path}/node_guid"),
        format!("{ibdev_path}/node_desc"),
        format!("{ibdev_path}/node_type"),
        format!("{port}/link_layer"),
        format!("{port}/state"),
        format!("{port}/gids/{gid}"),
        format!("{port}/gid_attrs/types/{gid}"),
        format!("{port}/gid_attrs/ndevs/{gid}"),
    ];
    files.map(|path| (path.clone(), std::fs::read_to_string(path).ok())).into()
}

fn changed<T: PartialEq + std::fmt::Debug>(rig: &Rig, what: &str, before: &T, now: &T) {
    if before != now {
        rig.failures.add(format!("{what} changed: was {before:?}, is {now:?}"));
    }
}
