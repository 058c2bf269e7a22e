//! Who is who in the lab: node names, addresses and the ways nodes differ.
//!
//! Facts only; nothing here starts or configures anything.

use anyhow::{Result, bail};

/// One machine of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeSpec {
    /// Name on the command line and host name inside.
    pub name: &'static str,
    /// Last byte of every address of this node.
    pub number: u8,
    /// Name of its RDMA device.
    pub rdma_device: &'static str,
    /// Its verbs character device.
    pub uverbs: &'static str,
    /// GID index of its RoCE v2 IPv4 address on the RDMA network.
    pub gid_index: u8,
}

/// The three machines. `dst` is made unlike the others on purpose, so that a
/// number that should have been translated does not pass by luck.
pub const NODES: [NodeSpec; 3] = [
    NodeSpec { name: "src", number: 1, rdma_device: "rxe0", uverbs: "uverbs0", gid_index: 1 },
    NodeSpec { name: "dst", number: 2, rdma_device: "rxe1", uverbs: "uverbs1", gid_index: 3 },
    NodeSpec { name: "peer", number: 3, rdma_device: "rxe0", uverbs: "uverbs0", gid_index: 1 },
];

/// The node whose QEMU joins the links of the other two.
pub const HUB: &str = "peer";

/// Interface of the RDMA network inside every node.
pub const RDMA_IF: &str = "rdma";
/// Uplink of the containers' network inside every node.
pub const LAN_IF: &str = "lan";

/// The networks that join the nodes through the hub.
pub const NETS: [&str; 2] = [RDMA_IF, LAN_IF];
/// Bridge that joins the uplink and the containers' interfaces.
pub const LAN_BRIDGE: &str = "br-lan";
/// MTU of the RDMA network in bytes. From 4200 on rxe has its largest active MTU, 4096. What is more is for TCP, in place of
/// the segmentation by hardware that the emulated NIC has none of.
pub const RDMA_MTU: u32 = 60_000;

impl NodeSpec {
    /// Looks a node up by name.
    pub fn by_name(name: &str) -> Result<&'static NodeSpec> {
        match NODES.iter().find(|n| n.name == name) {
            Some(n) => Ok(n),
            None => bail!("no node called {name:?} in the lab; there are src, dst and peer"),
        }
    }

    /// Address on the RDMA network, without prefix length.
    pub fn rdma_ip(&self) -> String {
        format!("10.10.0.{}", self.number)
    }

    /// Address of the node itself on the containers' network.
    pub fn lan_ip(&self) -> String {
        format!("10.20.0.{}", self.number)
    }

    /// MAC address of network `net` (0 control, 1 RDMA, 2 containers).
    pub fn mac(&self, net: u8) -> String {
        format!("52:54:00:1a:{net:02x}:{:02x}", self.number)
    }

    fn is_unlike(&self) -> bool {
        self.name == "dst"
    }

    /// Shell lines that make the RDMA device, with the name and number it has
    /// on this node: a misc module shifts rdma_cm's minor, a device made and
    /// deleted first takes rxe0/uverbs0 away.
    pub fn make_device(&self) -> String {
        let (before, after) = if self.is_unlike() {
            (
                "modprobe vsock\nip link add dummy0 type dummy\nip link set dummy0 up\n\
                 rdma link add rxe0 type rxe netdev dummy0\n",
                "rdma link delete rxe0\nip link delete dummy0\n",
            )
        } else {
            ("", "")
        };
        format!("{before}rdma link add {} type rxe netdev rdma\n{after}", self.rdma_device)
    }

    /// Shell script that configures the freshly booted node; run once, before
    /// its snapshot is taken.
    pub fn setup_script(&self) -> String {
        let n = self.number;
        let dev = self.rdma_device;
        let device = self.make_device();
        // Two more addresses ahead of the one that counts move its GID index.
        let before_ip = match self.is_unlike() {
            true => "ip addr add 192.0.2.2/32 dev rdma\nip addr add 198.51.100.2/32 dev rdma\n",
            false => "",
        };
        format!(
            "set -eu
sysctl -qw net.ipv6.conf.default.accept_dad=0 net.ipv6.conf.all.accept_dad=0
ip link set eth1 down; ip link set eth1 name rdma
ip link set eth2 down; ip link set eth2 name lan
sysctl -qw net.ipv6.conf.lan.disable_ipv6=1
ip link set rdma mtu {RDMA_MTU} txqueuelen 20000 up
{before_ip}ip addr add 10.10.0.{n}/24 dev rdma
ip link add br-lan type bridge stp_state 0 forward_delay 0
ip link set lan master br-lan txqueuelen 20000 up
ip link set br-lan up
ip addr add 10.20.0.{n}/24 dev br-lan
tc qdisc replace dev rdma root pfifo limit 20000
tc qdisc replace dev lan root pfifo limit 20000
modprobe rdma_rxe
{device}modprobe rdma_ucm
udevadm settle -t 30
for i in $(seq 100); do
  rdma link show {dev}/1 | grep -q 'state ACTIVE' && break
  sleep 0.1
done
rdma link show {dev}/1 | grep -q 'state ACTIVE'
sync
"
        )
    }
}
