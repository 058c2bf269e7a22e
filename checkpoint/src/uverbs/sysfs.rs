//! Which RDMA devices this host has, as sysfs tells: name, uverbs node, driver, node GUID and GID tables. The tables are
//! asked of the device itself where that is possible ([`super::gids`]); without access to it sysfs alone is enough.

use super::{UverbsError, gids, provider};
use rdma_virt::id::PGid;
use std::fs;
use std::path::{Path, PathBuf};

/// One RDMA device of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name, for example `rxe0`.
    pub name: String,
    /// Name of its character device under `/dev/infiniband`, for example `uverbs0`.
    pub uverbs: String,
    /// Driver: `rxe` for Soft-RoCE, otherwise the kernel module's name, or `other`.
    pub driver: String,
    /// Node GUID, network byte order as libibverbs shows it.
    pub node_guid: u64,
    pub ports: Vec<Port>,
}

impl Device {
    /// Path of the character device on the host.
    pub fn node(&self) -> PathBuf {
        Path::new("/dev/infiniband").join(&self.uverbs)
    }

    /// Whether any port can carry packets now.
    pub fn is_active(&self) -> bool {
        self.ports.iter().any(|port| port.active)
    }
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Numbered from 1.
    pub number: u8,
    pub active: bool,
    /// Its GID table without the empty entries.
    pub gids: Vec<Gid>,
}

/// One entry of a GID table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    pub index: u16,
    pub gid: PGid,
    /// As in `ibv_gid_entry.gid_type`: 0 InfiniBand, 1 RoCE v1, 2 RoCE v2.
    pub kind: u32,
}

/// All RDMA devices of this host, ordered by name. An empty list if there are none (or no RDMA in this kernel).
pub fn devices() -> Result<Vec<Device>, UverbsError> {
    devices_under(Path::new("/sys/class"), Path::new("/dev/infiniband"))
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// Names in a directory, sorted; none if it does not exist.
fn names(dir: &Path) -> Result<Vec<String>, UverbsError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(UverbsError::Sysfs { path: dir.into(), source }),
    };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

fn devices_under(class: &Path, nodes: &Path) -> Result<Vec<Device>, UverbsError> {
    let verbs = class.join("infiniband_verbs");
    let mut devices = Vec::new();
    for uverbs in names(&verbs)? {
        let Some(name) = read(&verbs.join(&uverbs).join("ibdev")) else { continue };
        let dir = class.join("infiniband").join(&name);
        let driver = driver(&dir);
        let asked = gids::of(&nodes.join(&uverbs), provider::of(&driver).driver_id()).ok();
        devices.push(Device {
            driver,
            node_guid: read(&dir.join("node_guid")).and_then(|text| parse_guid(&text)).unwrap_or(0).to_be(),
            ports: ports(&dir.join("ports"), asked.as_deref())?,
            name,
            uverbs,
        });
    }
    devices.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(devices)
}

/// Hardware has a `device/driver` link. Of the software devices only rxe shows a `parent` file (its netdev); whether
/// it really is rxe the first command on it proves, because each command carries the driver's number.
pub(crate) fn driver(dir: &Path) -> String {
    if let Ok(link) = fs::read_link(dir.join("device/driver"))
        && let Some(name) = link.file_name()
    {
        return name.to_string_lossy().into_owned();
    }
    if dir.join("parent").exists() { "rxe".into() } else { "other".into() }
}

/// `asked`: what the device itself said about its GIDs.
fn ports(dir: &Path, asked: Option<&[(u8, Gid)]>) -> Result<Vec<Port>, UverbsError> {
    let mut ports = Vec::new();
    for name in names(dir)? {
        let Ok(number) = name.parse::<u8>() else { continue };
        let port = dir.join(&name);
        let mut gids = match asked {
            Some(list) => list.iter().filter(|(of, _)| *of == number).map(|(_, gid)| *gid).collect(),
            None => listed_gids(&port)?,
        };
        gids.sort_by_key(|gid| gid.index);
        let active = read(&port.join("state")).is_some_and(|state| state.starts_with("4:"));
        ports.push(Port { number, active, gids });
    }
    ports.sort_by_key(|port| port.number);
    Ok(ports)
}

/// The GID table of a port, place by place.
fn listed_gids(port: &Path) -> Result<Vec<Gid>, UverbsError> {
    let mut gids = Vec::new();
    for entry in names(&port.join("gids"))? {
        let Ok(index) = entry.parse::<u16>() else { continue };
        let Some(gid) = read(&port.join("gids").join(&entry)).and_then(|text| parse_gid(&text)) else { continue };
        if gid.0 == [0; 16] {
            continue;
        }
        // The kernel answers EINVAL for the type of an empty entry.
        let Some(kind) = read(&port.join("gid_attrs/types").join(&entry)) else { continue };
        gids.push(Gid { index, gid, kind: parse_kind(&kind, port) });
    }
    Ok(gids)
}

fn parse_kind(text: &str, port: &Path) -> u32 {
    match text {
        "RoCE v2" => 2,
        _ if read(&port.join("link_layer")).is_some_and(|layer| layer == "Ethernet") => 1,
        _ => 0,
    }
}

/// `5054:00ff:fe00:0001` → number.
fn parse_guid(text: &str) -> Option<u64> {
    u64::from_str_radix(&text.split(':').collect::<String>(), 16).ok()
}

/// Eight groups of four hexadecimal digits.
fn parse_gid(text: &str) -> Option<PGid> {
    text.parse::<std::net::Ipv6Addr>().ok().map(|ip| PGid(ip.octets()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: PathBuf, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn a_soft_roce_device_is_read_from_sysfs_without_its_empty_gids() {
        let root = tempfile::tempdir().unwrap();
        let class = root.path();
        write(class.join("infiniband_verbs/uverbs1/ibdev"), "rxe1\n");
        write(class.join("infiniband_verbs/abi_version"), "6\n");
        let dev = class.join("infiniband/rxe1");
        write(dev.join("parent"), "eth1\n");
        write(dev.join("node_guid"), "5054:00ff:fe00:0002\n");
        write(dev.join("ports/1/state"), "4: ACTIVE\n");
        write(dev.join("ports/1/link_layer"), "Ethernet\n");
        write(dev.join("ports/1/gids/0"), "fe80:0000:0000:0000:5054:00ff:fe00:0002\n");
        write(dev.join("ports/1/gid_attrs/types/0"), "RoCE v2\n");
        write(dev.join("ports/1/gids/10"), "0000:0000:0000:0000:0000:ffff:0a0a:0002\n");
        write(dev.join("ports/1/gid_attrs/types/10"), "RoCE v2\n");
        write(dev.join("ports/1/gids/2"), "0000:0000:0000:0000:0000:0000:0000:0000\n");
        let found = devices_under(class, class).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].uverbs.as_str(), found[0].driver.as_str()),
            ("rxe1", "uverbs1", "rxe")
        );
        assert!(found[0].is_active());
        assert_eq!(found[0].node_guid, 0x5054_00ff_fe00_0002u64.to_be());
        let gids = &found[0].ports[0].gids;
        assert_eq!(gids.iter().map(|gid| gid.index).collect::<Vec<_>>(), [0, 10]);
        assert_eq!(gids[1].gid.to_string(), "10.10.0.2");
        assert_eq!(gids[1].kind, 2);
    }

    #[test]
    fn a_host_without_rdma_has_no_devices() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(devices_under(root.path(), root.path()).unwrap(), []);
    }
}
