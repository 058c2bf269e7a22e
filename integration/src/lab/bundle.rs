//! OCI bundles on a node: what `lab bundle` makes and `lab unbundle` removes.
//!
//! A bundle is a Debian root file system (an overlay over the one every node
//! holds), a named network namespace with one address on the containers'
//! network, and a `config.json` with the rights Docker gives by default plus
//! the node's RDMA devices. Nothing is started here.
//!
//! The container's end of its link is up and has its address from the start,
//! which restoring TCP connections needs; the **host side is made down**, so
//! nothing passes. A `createRuntime` hook brings the host side up, a `poststop`
//! hook takes it down. So the same bundle can be prepared on the destination
//! of a migration without two machines answering for one address; there it is
//! the migration's commit that brings the link up.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::node::Node;
use super::paths::content_key;

/// Where bundles live on a node.
pub const BUNDLES: &str = "/srv/lab/bundles";

/// Docker's default set.
const CAPABILITIES: &[&str] = &[
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What a bundle is made from.
#[derive(Debug, Clone, Default)]
pub struct Bundle {
    /// Name; also of its network namespace.
    pub name: String,
    /// Address on the containers' network with prefix length; without one
    /// the namespace has a loopback interface only.
    pub ip: Option<String>,
    /// Local files or directories and their places in the container.
    pub copies: Vec<(PathBuf, String)>,
    /// Added to the container's environment.
    pub env: Vec<(String, String)>,
    /// OCI annotations.
    pub annotations: Vec<(String, String)>,
    /// Leaves the RDMA devices out.
    pub no_rdma: bool,
    /// The container's command.
    pub command: Vec<String>,
}

/// A character device of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    path: String,
    major: u32,
    minor: u32,
}

impl Bundle {
    /// Makes the bundle on `node`. An existing one of that name is refused.
    pub fn make(&self, node: &Node) -> Result<String> {
        self.check()?;
        let dir = format!("{BUNDLES}/{}", self.name);
        let devices = if self.no_rdma { vec![] } else { rdma_devices(node)? };
        node.sh(&self.script(&dir)).with_context(|| format!("make bundle {}", self.name))?;
        let result = self.fill(node, &dir, &devices);
        if result.is_err() {
            let _ = remove(node, &self.name);
        }
        result?;
        Ok(dir)
    }

    /// Makes only the network namespace, for a bundle that comes from another
    /// node. [`remove`] takes both away.
    pub fn make_network(&self, node: &Node) -> Result<()> {
        self.check()?;
        node.sh(&format!("set -eu\n{}", self.network())).map(drop).with_context(|| format!("network of {}", self.name))
    }

    fn fill(&self, node: &Node, dir: &str, devices: &[Device]) -> Result<()> {
        for (local, inside) in &self.copies {
            node.push(local, &format!("{dir}/rootfs{inside}"))?;
        }
        let config = serde_json::to_vec_pretty(&self.config(devices))?;
        node.write(&format!("{dir}/config.json"), 0o644, &config)
    }

    fn check(&self) -> Result<()> {
        let good = |s: &str| {
            !s.is_empty()
                && s.len() <= 64
                && s.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
                && !s.starts_with(['.', '-'])
        };
        if !good(&self.name) {
            bail!("bundle name {:?}: use letters, digits, '-', '_', '.'", self.name);
        }
        if self.command.is_empty() {
            bail!("bundle {}: no command given", self.name);
        }
        if let Some(ip) = &self.ip {
            parse_address(ip)?;
        }
        for (_, inside) in &self.copies {
            if !inside.starts_with('/') || Path::new(inside).iter().any(|c| c == "..") {
                bail!("--copy: {inside:?} is not an absolute path in the container");
            }
        }
        Ok(())
    }

    /// Host side interface's name: kernel names hold 15 bytes.
    pub fn veth(&self) -> String {
        format!("vh{}", &content_key(&[self.name.as_bytes()])[..12])
    }

    fn network(&self) -> String {
        let name = &self.name;
        let veth = self.veth();
        let interface = match &self.ip {
            None => String::new(),
            Some(ip) => {
                // The same address has the same MAC on every node, so that
                // nobody's ARP cache is wrong after a move.
                let mac = mac_for(ip);
                format!(
                    "ip link add {veth} type veth peer name eth0 address {mac} netns {name}
ip link set {veth} master br-lan
ip -n {name} addr add {ip} dev eth0
ip -n {name} link set eth0 up
"
                )
            }
        };
        format!("ip netns add {name}\nip -n {name} link set lo up\n{interface}")
    }

    fn script(&self, dir: &str) -> String {
        let name = &self.name;
        let network = self.network();
        format!(
            "set -eu
if [ -e {dir} ]; then echo 'bundle {name} exists already; remove it with `cargo xtask lab unbundle`' >&2; exit 1; fi
mkdir -p {dir}/rootfs {dir}/upper {dir}/work
mount -t overlay lab-{name} -o lowerdir=/srv/lab/rootfs,upperdir={dir}/upper,workdir={dir}/work {dir}/rootfs
{network}"
        )
    }

    fn config(&self, devices: &[Device]) -> Value {
        let mut env = vec![
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            format!("HOSTNAME={}", self.name),
            "HOME=/root".to_owned(),
        ];
        env.extend(self.env.iter().map(|(k, v)| format!("{k}={v}")));
        let annotations: serde_json::Map<String, Value> =
            self.annotations.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "hostname": self.name,
            "root": {"path": "rootfs", "readonly": false},
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": self.command,
                "env": env,
                "cwd": "/",
                "noNewPrivileges": false,
                "capabilities": {
                    "bounding": CAPABILITIES,
                    "effective": CAPABILITIES,
                    "permitted": CAPABILITIES,
                },
                // Registered memory is locked memory; engines are told
                // `--ulimit memlock=-1` for RDMA containers.
                "rlimits": [
                    {"type": "RLIMIT_MEMLOCK", "soft": u64::MAX, "hard": u64::MAX},
                    {"type": "RLIMIT_NOFILE", "soft": 65536, "hard": 65536},
                ],
            },
            "mounts": mounts(),
            "annotations": annotations,
            "linux": {
                "cgroupsPath": format!("/lab/{}", self.name),
                "namespaces": [
                    {"type": "pid"},
                    {"type": "ipc"},
                    {"type": "uts"},
                    {"type": "mount"},
                    {"type": "cgroup"},
                    {"type": "network", "path": format!("/run/netns/{}", self.name)},
                ],
                "devices": devices.iter().map(|d| json!({
                    "path": d.path, "type": "c", "major": d.major, "minor": d.minor,
                    "fileMode": 0o666, "uid": 0, "gid": 0,
                })).collect::<Vec<_>>(),
                "resources": {"devices": device_rules(devices)},
                "maskedPaths": [
                    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore",
                    "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                    "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi",
                    "/sys/firmware", "/sys/devices/virtual/powercap",
                ],
                "readonlyPaths": [
                    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
                ],
                "seccomp": seccomp(),
            },
        });
        if let Some(ip) = &self.ip {
            let address = ip.split('/').next().unwrap_or(ip);
            let hook = |way: &str| {
                json!([{
                    "path": "/usr/local/sbin/lab-net",
                    "args": ["lab-net", way, self.veth(), self.name, address],
                    "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
                    "timeout": 20,
                }])
            };
            config["hooks"] = json!({"createRuntime": hook("up"), "poststop": hook("down")});
        }
        config
    }
}

/// The seccomp profile: what Docker's default allows without extra rights.
fn seccomp() -> Value {
    serde_json::from_str(include_str!("seccomp.json")).unwrap_or(Value::Null)
}

fn mounts() -> Value {
    json!([
        {"destination": "/proc", "type": "proc", "source": "proc",
         "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
         "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
         "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs",
         "options": ["nosuid", "noexec", "nodev", "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
         "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
         "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
         "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
    ])
}

/// Device cgroup: nothing, then Docker's defaults, then the RDMA devices.
fn device_rules(devices: &[Device]) -> Value {
    let mut rules = vec![
        json!({"allow": false, "access": "rwm"}),
        json!({"allow": true, "type": "c", "access": "m"}),
        json!({"allow": true, "type": "b", "access": "m"}),
    ];
    for (major, minor) in [
        (1, Some(3)),
        (1, Some(5)),
        (1, Some(7)),
        (1, Some(8)),
        (1, Some(9)),
        (5, Some(0)),
        (5, Some(1)),
        (5, Some(2)),
        (136, None),
    ] {
        let mut rule = json!({"allow": true, "type": "c", "major": major, "access": "rwm"});
        if let Some(minor) = minor {
            rule["minor"] = json!(minor);
        }
        rules.push(rule);
    }
    for d in devices {
        rules.push(json!({
            "allow": true, "type": "c", "major": d.major, "minor": d.minor, "access": "rwm",
        }));
    }
    json!(rules)
}

/// The character devices under `/dev/infiniband`.
fn rdma_devices(node: &Node) -> Result<Vec<Device>> {
    let text = node.sh("cd /dev/infiniband && stat -c '%n %t %T %F' *")?;
    let devices = parse_devices(&text)?;
    if devices.is_empty() {
        bail!("{} has no device in /dev/infiniband", node.name());
    }
    Ok(devices)
}

fn parse_devices(text: &str) -> Result<Vec<Device>> {
    let mut out = Vec::new();
    for line in text.lines().filter(|l| l.ends_with("character special file")) {
        let mut words = line.split_whitespace();
        let (Some(name), Some(major), Some(minor)) = (words.next(), words.next(), words.next()) else {
            bail!("unexpected line from stat: {line:?}");
        };
        out.push(Device {
            path: format!("/dev/infiniband/{name}"),
            major: u32::from_str_radix(major, 16)?,
            minor: u32::from_str_radix(minor, 16)?,
        });
    }
    Ok(out)
}

fn parse_address(ip: &str) -> Result<(std::net::IpAddr, u8)> {
    let parsed = ip.split_once('/').and_then(|(a, l)| Some((a.parse().ok()?, l.parse::<u8>().ok()?)));
    match parsed {
        Some((a @ std::net::IpAddr::V4(_), l)) if l <= 32 => Ok((a, l)),
        Some((a @ std::net::IpAddr::V6(_), l)) if l <= 128 => Ok((a, l)),
        _ => bail!("--ip {ip:?}: give an address with its prefix length, as in 10.20.0.100/24"),
    }
}

/// A locally administered MAC address derived from the IP address.
fn mac_for(ip: &str) -> String {
    match parse_address(ip) {
        Ok((std::net::IpAddr::V4(a), _)) => {
            let o = a.octets();
            format!("02:4c:{:02x}:{:02x}:{:02x}:{:02x}", o[0], o[1], o[2], o[3])
        }
        _ => {
            let k = content_key(&[ip.as_bytes()]);
            format!("02:4d:{}:{}:{}:{}", &k[0..2], &k[2..4], &k[4..6], &k[6..8])
        }
    }
}

/// Removes a bundle: mount, namespace, files. The container must be gone.
pub fn remove(node: &Node, name: &str) -> Result<()> {
    let bundle = Bundle { name: name.to_owned(), command: vec![String::new()], ..Bundle::default() };
    bundle.check()?;
    let dir = format!("{BUNDLES}/{name}");
    let veth = bundle.veth();
    node.sh(&format!(
        "set -eu
[ -d {dir} ] || {{ echo 'no bundle {name} here' >&2; exit 1; }}
if [ -d /sys/fs/cgroup/lab/{name} ]; then
  [ -z \"$(cat /sys/fs/cgroup/lab/{name}/cgroup.procs)\" ] || {{ echo 'container {name} still runs' >&2; exit 1; }}
fi
rmdir /sys/fs/cgroup/lab 2>/dev/null || true
ip link delete {veth} 2>/dev/null || true
if [ -e /run/netns/{name} ]; then ip netns delete {name}; fi
if mountpoint -q {dir}/rootfs; then umount {dir}/rootfs; fi
rm -rf {dir}
"
    ))
    .map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> Bundle {
        Bundle {
            name: "c1".into(),
            ip: Some("10.20.0.100/24".into()),
            command: vec!["true".into()],
            ..Bundle::default()
        }
    }

    #[test]
    fn a_bundle_is_not_privileged_and_sees_only_the_nodes_rdma_devices() {
        let devices = parse_devices(
            "by-ibdev 0 0 directory\nrdma_cm a 105 character special file\nuverbs1 e7 c1 character special file\n",
        )
        .unwrap();
        let config = bundle().config(&devices);
        let made: Vec<_> = config["linux"]["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|d| (d["path"].as_str().unwrap(), d["minor"].as_u64().unwrap()))
            .collect();
        assert_eq!(made, [("/dev/infiniband/rdma_cm", 261), ("/dev/infiniband/uverbs1", 193)]);
        assert_eq!(config["linux"]["resources"]["devices"][0], json!({"allow": false, "access": "rwm"}));
        let caps = config["process"]["capabilities"]["bounding"].to_string();
        assert!(!caps.contains("SYS_ADMIN") && !caps.contains("IPC_LOCK"));
        assert_eq!(config["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    }

    #[test]
    fn one_address_has_one_mac_everywhere() {
        assert_eq!(mac_for("10.20.0.100/24"), "02:4c:0a:14:00:64");
    }

    #[test]
    fn names_and_addresses_that_a_shell_would_misread_are_refused() {
        for name in ["", "a b", "$(x)", "../x", "-x"] {
            assert!(Bundle { name: name.into(), ..bundle() }.check().is_err(), "{name}");
        }
        for ip in ["10.0.0.1", "10.0.0.1/33", "x/24", "10.0.0.1/24;reboot"] {
            assert!(Bundle { ip: Some(ip.into()), ..bundle() }.check().is_err(), "{ip}");
        }
        assert!(bundle().check().is_ok());
    }
}
