//! The container's own network interface: finds the host's end of its veth pairs, takes it down and up, and announces
//! the container's addresses to the neighbours.
//!
//! Only the *host's* end is ever touched: the container's end stays up with address and route, because CRIU restores
//! established TCP connections before the decision, and that needs both. While the host's end is down no packet
//! passes. Plain rtnetlink, no tool needed.
#![expect(
    unsafe_code,
    reason = "entering a network namespace is a system call without a safe wrapper for packet addresses"
)]

use std::fs::File;
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::ifaddrs::getifaddrs;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;

// rtnetlink(7); numbers of linux/rtnetlink.h and linux/if_link.h.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFF_UP: u32 = 1;
/// `struct nlmsghdr` and `struct ifinfomsg`.
const HEADER: usize = 16;
const IFINFO: usize = 16;

/// One veth pair between a container and its host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    /// Name and number inside.
    pub name: String,
    pub inside: u32,
    /// Number of the end on the host.
    pub outside: u32,
    pub mac: [u8; 6],
    /// Addresses inside.
    pub addresses: Vec<Ipv4Addr>,
}

/// All veth pairs of one network namespace.
#[derive(Debug)]
pub struct Links {
    netns: PathBuf,
    pub pairs: Vec<Pair>,
}

impl Links {
    /// Those of the namespace at this path (`/run/netns/NAME`, `/proc/PID/ns/net`). None for the host's own.
    pub fn of(netns: &Path) -> io::Result<Self> {
        let ours = std::fs::metadata("/proc/self/ns/net")?;
        let theirs = std::fs::metadata(netns)?;
        use std::os::unix::fs::MetadataExt;
        let pairs = if (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino()) {
            Vec::new()
        } else {
            within(netns, inner_pairs)?
        };
        Ok(Links { netns: netns.into(), pairs })
    }

    /// Takes all host ends down or up.
    pub fn set(&self, up: bool) -> io::Result<()> {
        for pair in &self.pairs {
            let mut body = vec![0; IFINFO];
            body[4..8].copy_from_slice(&pair.outside.to_ne_bytes());
            body[8..12].copy_from_slice(&(if up { IFF_UP } else { 0 }).to_ne_bytes());
            body[12..16].copy_from_slice(&IFF_UP.to_ne_bytes());
            let mut socket = Netlink::open()?;
            socket.request(RTM_NEWLINK, NLM_F_ACK, &body)?;
            socket.each(|_, _| {})?;
        }
        Ok(())
    }

    /// Gratuitous ARP for every address, three times: neighbours and switches learn the new place at once.
    pub fn announce(&self) -> io::Result<()> {
        let pairs = self.pairs.clone();
        within(&self.netns, move || {
            for round in 0..3 {
                if round > 0 {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
                for pair in &pairs {
                    for address in &pair.addresses {
                        broadcast(pair, &arp(pair.mac, *address))?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// Runs `f` in a thread of its own inside the namespace, so that nothing else of this program is moved.
fn within<T: Send + 'static>(netns: &Path, f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let file = File::open(netns)?;
    let run = move || {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        f()
    };
    let thread = std::thread::Builder::new().name("netns".into()).spawn(run)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread in the network namespace panicked")))
}

fn inner_pairs() -> io::Result<Vec<Pair>> {
    let mut pairs = Vec::new();
    let mut socket = Netlink::open()?;
    socket.request(RTM_GETLINK, NLM_F_DUMP, &[0; IFINFO])?;
    socket.each(|kind, body| {
        if kind == RTM_NEWLINK
            && let Some(pair) = parse(body)
        {
            pairs.push(pair);
        }
    })?;
    for address in getifaddrs()? {
        let ip = address.address.and_then(|a| a.as_sockaddr_in().map(|a| a.ip()));
        if let (Some(ip), Some(pair)) = (ip, pairs.iter_mut().find(|p| p.name == address.interface_name)) {
            pair.addresses.push(ip);
        }
    }
    Ok(pairs)
}

/// A link message of a veth; others are none of our business.
fn parse(body: &[u8]) -> Option<Pair> {
    let inside = u32::from_ne_bytes(body.get(4..8)?.try_into().ok()?);
    let (mut name, mut outside, mut mac, mut veth) = (None, None, [0; 6], false);
    for (kind, value) in attributes(body.get(IFINFO..)?) {
        match kind {
            IFLA_IFNAME => name = Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()),
            IFLA_LINK => outside = value.try_into().ok().map(u32::from_ne_bytes),
            IFLA_ADDRESS => mac = value.try_into().unwrap_or_default(),
            IFLA_LINKINFO => {
                veth = attributes(value)
                    .any(|(k, v)| k == IFLA_INFO_KIND && v.strip_suffix(b"\0").unwrap_or(v) == b"veth");
            }
            _ => {}
        }
    }
    let (name, outside) = (name?, outside?);
    veth.then(|| Pair { name, inside, outside, mac, addresses: Vec::new() })
}

/// Attribute numbers without flag bits, and values.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & 0x3fff;
        let value = bytes.get(4..len)?;
        bytes = bytes.get((len + 3) & !3..).unwrap_or(&[]);
        Some((kind, value))
    })
}

struct Netlink(OwnedFd);

impl Netlink {
    fn open() -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(5, 0))?;
        Ok(Netlink(fd))
    }

    fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let len = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(len.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(())
    }

    /// Hands every message out until the kernel says that was all.
    fn each(&mut self, mut f: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let got = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..got];
            while rest.len() >= HEADER {
                let len = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                let kind = u16::from_ne_bytes([rest[4], rest[5]]);
                let body = rest.get(HEADER..len).ok_or(ErrorKind::InvalidData)?;
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        let code = body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        return if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) };
                    }
                    _ => f(kind, body),
                }
                rest = rest.get((len + 3) & !3..).unwrap_or(&[]);
            }
        }
    }
}

/// An Ethernet frame in which `address` asks for itself.
fn arp(mac: [u8; 6], address: Ipv4Addr) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(mac);
    frame.extend(address.octets());
    frame.extend([0; 6]);
    frame.extend(address.octets());
    frame.resize(60, 0);
    frame
}

fn broadcast(pair: &Pair, frame: &[u8]) -> io::Result<()> {
    // The namespace's own: this thread is inside it.
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: sockaddr_ll is plain data for which zero is a valid value in every field.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_protocol = (libc::ETH_P_ARP as u16).to_be();
    to.sll_ifindex = pair.inside.cast_signed();
    to.sll_halen = 6;
    to.sll_addr[..6].fill(0xff);
    // SAFETY: buffer and address are valid for the lengths given, and the kernel only reads them.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            frame.as_ptr().cast(),
            frame.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_names_its_address_as_sender_and_target() {
        let frame = arp([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 20, 0, 9));
        assert_eq!(frame.len(), 60);
        assert_eq!((&frame[..6], &frame[12..14]), (&[0xff; 6][..], &[8, 6][..]));
        assert_eq!((&frame[28..32], &frame[38..42]), (&[10, 20, 0, 9][..], &[10, 20, 0, 9][..]));
    }

    #[test]
    fn the_hosts_own_namespace_is_no_containers() {
        assert!(Links::of(Path::new("/proc/self/ns/net")).unwrap().pairs.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn damaged_messages_do_no_harm(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..80)) {
            let _ = parse(&bytes);
        }
    }
}
