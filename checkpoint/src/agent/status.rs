//! What `migrrdma status` shows: containers, their RDMA processes and QPs, and the migrations this host takes part in
//! ([`super::taking_part`]).

use rdma_virt::id::Vpid;
use rdma_virt::saved::ProcessState;
use serde::{Deserialize, Serialize};

use super::taking_part::Migration;
use super::{Agent, procs};
use crate::net::msg::HostFacts;

/// Everything an administrator may want to know of one host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub host: String,
    pub version: String,
    /// 40101 is 4.1.1.
    pub criu: Option<u32>,
    /// Why there is no network half, if there is none.
    pub no_network: Option<String>,
    pub devices: Vec<Device>,
    pub containers: Vec<Container>,
    /// All this host takes part in, and the last ones that are over.
    pub migrations: Vec<Migration>,
}

/// An RDMA device.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Device {
    pub name: String,
    pub driver: String,
    /// Addresses, each once.
    pub gids: Vec<String>,
}

/// A container with processes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    pub id: String,
    pub init: i32,
    pub paused: bool,
    pub processes: Vec<Process>,
}

/// A process that holds an RDMA file, or whose shim is connected.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Process {
    pub vpid: i32,
    /// On the host.
    pub pid: i32,
    pub comm: String,
    /// Why it could not be asked; a process without the shim keeps its container where it is.
    pub trouble: Option<String>,
    pub qps: Vec<Qp>,
    /// PDs, CQs, SRQs, MRs.
    pub objects: [usize; 4],
    /// Bytes of registered memory.
    pub registered: u64,
    /// What keeps it from being moved.
    pub blockers: Vec<String>,
}

/// One QP.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Qp {
    pub device: String,
    /// As the application knows it.
    pub vqpn: u32,
    /// As the NIC knows it.
    pub pqpn: u32,
    pub phase: String,
    /// `address vqpn` and, if different, where that is now.
    pub remote: Option<String>,
}

impl Agent {
    /// Asks everybody.
    pub fn status(&self) -> Status {
        let HostFacts { name, version, criu, devices, .. } = self.describe();
        let reports = self.reports();
        Status {
            host: name,
            version,
            criu,
            no_network: self.no_network().map(str::to_owned),
            devices: devices
                .into_iter()
                .map(|d| {
                    let mut gids: Vec<String> = d.gids.iter().map(|g| g.gid.to_string()).collect();
                    gids.dedup();
                    Device { name: d.name, driver: d.driver, gids }
                })
                .collect(),
            containers: self.container_list(&reports),
            migrations: self.taking_part(),
        }
    }

    fn container_list(&self, reports: &[(String, ProcessState)]) -> Vec<Container> {
        let list = self.host.containers().unwrap_or_else(|e| {
            eprintln!("list of containers: {e}");
            Vec::new()
        });
        list.into_iter()
            .map(|c| {
                let seen = procs::of_cgroup(&c.cgroup).unwrap_or_default();
                let state = |vpid: Vpid| reports.iter().find(|(id, s)| *id == c.id && s.vpid == vpid).map(|(_, s)| s);
                let processes = seen
                    .iter()
                    .filter(|p| !p.verbs.is_empty() || p.cm || state(p.vpid).is_some())
                    .map(|p| match state(p.vpid) {
                        Some(s) => shown(p, s),
                        None => Process {
                            vpid: p.vpid.0,
                            pid: p.pid,
                            comm: p.comm.clone(),
                            trouble: match seen.iter().any(|o| state(o.vpid).is_some() && p.shares_verbs_of(o)) {
                                true => None,
                                false => Some("has no connection to the agent: started without the shim?".into()),
                            },
                            qps: Vec::new(),
                            objects: [0; 4],
                            registered: 0,
                            blockers: Vec::new(),
                        },
                    })
                    .collect();
                Container { id: c.id, init: c.init, paused: c.paused, processes }
            })
            .collect()
    }
}

fn shown(p: &procs::Process, s: &ProcessState) -> Process {
    let count = |f: fn(&rdma_virt::saved::ContextState) -> usize| s.contexts.iter().map(f).sum();
    Process {
        vpid: s.vpid.0,
        pid: p.pid,
        comm: s.comm.clone(),
        trouble: None,
        objects: [count(|c| c.pds.len()), count(|c| c.cqs.len()), count(|c| c.srqs.len()), count(|c| c.mrs.len())],
        registered: s.contexts.iter().flat_map(|c| &c.mrs).map(|m| m.length).sum(),
        blockers: s.blockers.iter().map(|b| format!("{} on {}", b.verb, b.object)).collect(),
        qps: s
            .contexts
            .iter()
            .flat_map(|c| c.qps.iter().map(move |q| (c, q)))
            .map(|(c, q)| Qp {
                device: c.device.clone(),
                vqpn: q.vqpn.0,
                pqpn: q.pqpn.0,
                phase: format!("{:?}", q.phase).to_uppercase(),
                remote: q.remote.map(|r| {
                    let here = r.vgid.0 == r.pgid.0 && r.vqpn.0 == r.pqpn.0;
                    let now = if here { String::new() } else { format!(" (now {} {})", r.pgid, r.pqpn.0) };
                    format!("{} {}{now}", r.vgid, r.vqpn.0)
                }),
            })
            .collect(),
    }
}
