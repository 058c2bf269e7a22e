//! What this host is: its RDMA devices, addresses and processor, and whose agent a GID belongs to.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use rdma_virt::id::{PGid, VGid};

use super::{Agent, LOCAL};
use crate::net::msg::{Answer, DeviceFacts, GidFacts, HostFacts, Order};
use crate::uverbs;

/// Agents that are remembered, and asked in one search.
const MOST: usize = 256;

/// For one search among agents, and for one agent in it.
const SEARCH: Duration = Duration::from_secs(6);
const ONE: Duration = Duration::from_secs(2);

/// RDMA devices as sysfs tells; none if it cannot be read.
pub fn devices() -> Vec<DeviceFacts> {
    let list = uverbs::devices().unwrap_or_else(|e| {
        eprintln!("RDMA devices: {}", super::chain(&e));
        Vec::new()
    });
    list.into_iter()
        .map(|d| DeviceFacts {
            gids: d
                .ports
                .iter()
                .flat_map(|p| {
                    p.gids.iter().map(|g| GidFacts { port: p.number, index: g.index, gid: g.gid, kind: g.kind })
                })
                .collect(),
            name: d.name,
            driver: d.driver,
        })
        .collect()
}

/// GIDs of this host.
pub fn gids() -> Vec<PGid> {
    devices().iter().flat_map(|d| d.gids.iter().map(|g| g.gid)).collect()
}

/// The same numbers, as applications that were started here show them.
pub fn shown_gids() -> Vec<VGid> {
    gids().into_iter().map(|g| VGid(g.0)).collect()
}

/// Features of the first processor.
pub fn cpu_flags() -> Vec<String> {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("flags").or_else(|| l.strip_prefix("Features")));
    let flags = line.and_then(|l| l.split_once(':')).map_or("", |(_, flags)| flags);
    let mut flags: Vec<String> = flags.split_whitespace().map(str::to_owned).collect();
    flags.sort();
    flags
}

/// Whether one of this host's interfaces has the address.
pub fn is_own_address(ip: IpAddr) -> bool {
    ip.is_loopback()
        || nix::ifaddrs::getifaddrs().is_ok_and(|list| {
            list.filter_map(|i| i.address).any(|a| {
                a.as_sockaddr_in().is_some_and(|s| IpAddr::V4(s.ip()) == ip)
                    || a.as_sockaddr_in6().is_some_and(|s| IpAddr::V6(s.ip()) == ip)
            })
        })
}

/// Whether packets could be sent there at all. RDMA asks no routing table for a neighbour's GID, TCP does. Sends nothing.
fn has_route(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    std::net::UdpSocket::bind((any, 0)).and_then(|socket| socket.connect((ip, 9))).is_ok()
}

impl Agent {
    /// Answers [`Order::Describe`].
    pub fn describe(&self) -> HostFacts {
        HostFacts {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            criu: self.host.criu().ok(),
            devices: devices(),
            agents: super::lock(&self.met).clone(),
        }
    }

    /// Address of the agent of the host that has this GID; [`LOCAL`] for this host.
    pub fn agent_of(&self, gid: PGid) -> String {
        let ip = gid.ip();
        // Most GIDs are addresses, and those are quickly found.
        if is_own_address(ip) || gids().contains(&gid) {
            return LOCAL.into();
        }
        if let Some(at) = self.config.gid_map.get(&ip) {
            return at.clone();
        }
        let says_its_host = match ip {
            IpAddr::V4(_) => has_route(ip),
            IpAddr::V6(v6) => !v6.is_unicast_link_local() && has_route(ip),
        };
        if !says_its_host && let Some(at) = self.ask_around(gid) {
            return at;
        }
        ip.to_string()
    }

    /// Remembers an agent that takes part in a migration with this one.
    pub fn meet(&self, at: &str) {
        let mut met = super::lock(&self.met);
        if at != LOCAL && met.len() < MOST && !met.iter().any(|known| known == at) {
            met.push(at.to_owned());
        }
    }

    /// Agents that this one was told of, or has met, or that it knows to have taken a container.
    pub fn known_agents(&self) -> BTreeSet<String> {
        let told = self.config.agents.iter().chain(self.config.gid_map.values()).cloned();
        told.chain(self.moved.hosts()).chain(super::lock(&self.met).iter().cloned()).collect()
    }

    /// For GIDs that name no address, or one that only RDMA reaches: asks every agent we know of, and those that they
    /// know of. Answers are remembered.
    fn ask_around(&self, gid: PGid) -> Option<String> {
        if let Some(at) = super::lock(&self.owners).get(&gid) {
            return Some(at.clone());
        }
        let mut known: Vec<String> = self.known_agents().into_iter().collect();
        let until = Instant::now() + SEARCH;
        let mut asked = BTreeSet::new();
        while let Some(at) = known.pop() {
            if asked.len() >= MOST || Instant::now() >= until {
                break;
            }
            if !asked.insert(at.clone()) {
                continue;
            }
            let Ok(Answer::Host(facts)) = self.client.call(&at, None, Order::Describe, ONE) else { continue };
            known.extend(facts.agents);
            let mut owners = super::lock(&self.owners);
            for device in facts.devices {
                owners.extend(device.gids.iter().map(|g| (g.gid, at.clone())));
            }
            if let Some(found) = owners.get(&gid) {
                return Some(found.clone());
            }
        }
        None
    }
}
