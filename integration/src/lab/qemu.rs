//! Starting and ending the QEMU process of one node.
//!
//! Only processes recorded here (pid and start time) are ever ended.

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::image::Image;
use super::topology::{HUB, LAN_IF, NETS, NODES, NodeSpec, RDMA_IF};
use super::wire::GUEST_PORT;

/// Memory of one node in MiB.
pub const MEMORY_MIB: u32 = 1536;

const QEMU: &str = "qemu-system-x86_64";

/// Which accelerator runs the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Pure emulation; works everywhere.
    Tcg,
    /// Hardware virtualisation; used only after a probe has proved it.
    Kvm,
}

/// A process we started, identified so that a reused pid is not mistaken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// Start time in clock ticks since boot, from `/proc/PID/stat`.
    pub start_time: u64,
}

impl Process {
    /// Records a process that is known to be ours.
    pub fn of(pid: i32) -> Result<Process> {
        let start_time = start_time(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Process { pid, start_time })
    }

    /// Whether that very process still runs.
    pub fn alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Ends it: SIGTERM, then SIGKILL after `grace`.
    pub fn end(&self, grace: Duration) {
        for signal in [Signal::SIGTERM, Signal::SIGKILL] {
            if !self.alive() {
                return;
            }
            let _ = kill(Pid::from_raw(self.pid), signal);
            let deadline = Instant::now() + grace;
            while self.alive() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
}

/// Start time of a process that exists and is not a zombie.
fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let rest = &stat[stat.rfind(')')? + 2..];
    let mut fields = rest.split(' ');
    if matches!(fields.next(), Some("Z" | "X")) {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// What one QEMU needs to know.
#[derive(Debug)]
pub struct Launch<'a> {
    /// Which node.
    pub node: &'static NodeSpec,
    /// Kernel and initrd.
    pub image: &'a Image,
    /// Accelerator.
    pub accel: Accel,
    /// The node's own disk overlay (qcow2).
    pub disk: &'a Path,
    /// Saved machine state to continue from, instead of booting.
    pub incoming: Option<&'a Path>,
    /// Directory for sockets.
    pub sockets: &'a Path,
    /// Directory for console and error logs, and for what is counted.
    pub logs: &'a Path,
    /// Plugin that counts what is executed.
    pub counter: Option<&'a Path>,
}

/// A started QEMU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the node.
    pub node: String,
    /// The QEMU process.
    pub process: Process,
    /// Loopback port of the control channel.
    pub port: u16,
    /// Monitor socket.
    pub monitor: PathBuf,
    /// What the node wrote to its serial console.
    pub console: PathBuf,
    /// What QEMU itself complained about.
    pub errors: PathBuf,
}

/// First line of `qemu-system-x86_64 --version`.
pub fn version() -> Result<String> {
    let out = Command::new(QEMU).arg("--version").output().with_context(|| format!("run {QEMU}"))?;
    Ok(String::from_utf8_lossy(&out.stdout).lines().next().unwrap_or_default().to_owned())
}

/// Major and minor.
fn number(version: &str) -> (u32, u32) {
    let number: Vec<u32> = version
        .split_whitespace()
        .find(|w| w.starts_with(|c: char| c.is_ascii_digit()))
        .unwrap_or("0")
        .split('.')
        .map_while(|p| p.parse().ok())
        .collect();
    (number.first().copied().unwrap_or(0), number.get(1).copied().unwrap_or(0))
}

/// Option that makes a stream link come back when the other QEMU is
/// restarted; older versions have none.
fn reconnect_option(version: &str) -> &'static str {
    match number(version) {
        (major, minor) if (major, minor) >= (9, 2) => ",reconnect-ms=100",
        (major, _) if major >= 8 => ",reconnect=1",
        _ => "",
    }
}

/// What a node executes is written there, if it is counted.
pub fn instructions(logs: &Path, node: &str) -> PathBuf {
    logs.join(format!("{node}.instructions"))
}

/// Whether this QEMU and accelerator can count what a node executes.
pub fn counts(version: &str, accel: Accel) -> bool {
    accel == Accel::Tcg && number(version).0 >= 10
}

/// Whether a node's QEMU can be restarted without restarting all.
pub fn links_reconnect(version: &str) -> bool {
    !reconnect_option(version).is_empty()
}

/// The processor of an emulated node: all that can be emulated, but for what programs take to be quick because the
/// processor has an instruction for it, and what takes an emulator several times as long as doing without. These are
/// strings that are copied and cleared byte by byte, AES, whose every round of every 16 bytes is a call, and vectors
/// beyond SSE2, for whose shuffles that is true as well.
fn emulated(version: &str) -> String {
    let mut cpu = "max,la57=off,erms=off,fsrm=off,aes=off,vaes=off".to_owned();
    cpu += ",ssse3=off,sse4.1=off,sse4.2=off,avx=off,avx2=off,fma=off,f16c=off";
    // Programs take it for granted that a processor with one of these has SSSE3, too (`sha256sum` dies of it).
    cpu += ",sha-ni=off,pclmulqdq=off,vpclmulqdq=off,gfni=off";
    // Older ones have none of it.
    if number(version) >= (8, 1) {
        cpu += ",fsrs=off";
    }
    cpu
}

/// What a node is made of, devices in the order the guest names them by. A
/// saved state fits this hardware only.
pub fn hardware(node: &NodeSpec, accel: Accel) -> Vec<String> {
    let (machine, cpu) = match accel {
        Accel::Tcg => ("q35,accel=tcg", emulated(&version().unwrap_or_default())),
        Accel::Kvm => ("q35,accel=kvm", "host,migratable=on".to_owned()),
    };
    let memory = MEMORY_MIB.to_string();
    let mut out: Vec<String> = ["-nodefaults", "-no-user-config", "-display", "none"].map(str::to_owned).to_vec();
    out.extend(["-machine", machine, "-cpu", &cpu, "-smp", "1", "-m", &memory].map(str::to_owned));
    let mut device = |d: String| out.extend(["-device".to_owned(), d]);
    device("virtio-rng-pci".into());
    device("virtio-blk-pci,drive=disk".into());
    device(format!("virtio-net-pci,netdev=ctl,mac={}", node.mac(0)));
    for (number, net) in [(1, RDMA_IF), (2, LAN_IF)] {
        device(format!("virtio-net-pci,netdev={net},mac={},rx_queue_size=1024", node.mac(number)));
    }
    out
}

/// The kernel's command line.
pub fn kernel_line(node: &NodeSpec) -> String {
    format!(
        "root=/dev/vda rw rootfstype=ext4 console=ttyS0 net.ifnames=0 mitigations=off audit=0 apparmor=0 \
         tsc=reliable random.trust_cpu=on edd=off loglevel=4 systemd.hostname={} systemd.show_status=0",
        node.name
    )
}

/// Starts QEMU for one node and returns as soon as the process runs.
pub fn launch(l: &Launch) -> Result<Machine> {
    let name = l.node.name;
    let port = free_port()?;
    let monitor = l.sockets.join(format!("{name}.qmp"));
    let _ = fs::remove_file(&monitor);
    let console = l.logs.join(format!("{name}.console"));
    let errors = l.logs.join(format!("{name}.qemu"));
    let stderr = fs::File::create(&errors)?;
    let mut cmd = Command::new(QEMU);
    cmd.args(["-name", &format!("lab-{name}")])
        .args(hardware(l.node, l.accel))
        .arg("-serial")
        .arg(format!("file:{}", console.display()))
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", monitor.display()))
        .arg("-drive")
        .arg(format!("if=none,id=disk,format=qcow2,cache=unsafe,discard=unmap,file={}", l.disk.display()))
        .arg("-netdev")
        .arg(format!("user,id=ctl,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:{port}-10.0.2.15:{GUEST_PORT}"));
    for net in NETS {
        link_arguments(&mut cmd, l, net)?;
    }
    cmd.arg("-kernel").arg(&l.image.kernel).arg("-initrd").arg(&l.image.initrd);
    cmd.args(["-append", &kernel_line(l.node)]);
    if let Some(state) = l.incoming {
        cmd.arg("-incoming").arg(format!("exec:cat '{}'", state.display()));
    }
    let out = instructions(l.logs, name);
    let _ = fs::remove_file(&out);
    if let Some(counter) = l.counter.filter(|_| counts(&version().unwrap_or_default(), l.accel)) {
        cmd.arg("-plugin").arg(format!("file={},out={}", counter.display(), out.display()));
    }
    // Its own process group: Ctrl-C at the terminal must not reach it.
    let child = cmd
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("start {QEMU}"))?;
    Ok(Machine {
        node: name.into(),
        process: Process::of(child.id() as i32)
            .with_context(|| format!("QEMU ended at once, see {}", errors.display()))?,
        port,
        monitor,
        console,
        errors,
    })
}

/// One lossless network: a stream socket per node to the hub node, whose QEMU
/// joins them. Never a multicast group, which drops packets under load.
fn link_arguments(cmd: &mut Command, l: &Launch, net: &str) -> Result<()> {
    let socket = |node: &str| l.sockets.join(format!("{net}-{node}.link"));
    if l.node.name != HUB {
        cmd.arg("-netdev").arg(format!(
            "stream,id={net},server=off,addr.type=unix,addr.path={}{}",
            socket(l.node.name).display(),
            reconnect_option(&version()?)
        ));
        return Ok(());
    }
    let hub = if net == RDMA_IF { 1 } else { 2 };
    cmd.arg("-netdev").arg(format!("hubport,id={net},hubid={hub}"));
    for other in NODES.iter().filter(|n| n.name != HUB) {
        let path = socket(other.name);
        let _ = fs::remove_file(&path);
        cmd.arg("-netdev")
            .arg(format!("stream,id={net}-{0},server=on,addr.type=unix,addr.path={1}", other.name, path.display()))
            .arg("-netdev")
            .arg(format!("hubport,id={net}-port-{0},hubid={hub},netdev={net}-{0}", other.name));
    }
    Ok(())
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("find a free loopback port")?;
    Ok(listener.local_addr()?.port())
}

/// Waits until the hub node has opened the sockets the others connect to.
pub fn wait_for_links(sockets: &Path, wait: Duration) -> Result<()> {
    let deadline = Instant::now() + wait;
    for net in NETS {
        for other in NODES.iter().filter(|n| n.name != HUB) {
            let path = sockets.join(format!("{net}-{}.link", other.name));
            while !path.exists() {
                if Instant::now() >= deadline {
                    bail!("{HUB}'s QEMU did not open {} within {wait:?}", path.display());
                }
                thread::sleep(Duration::from_millis(10));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reconnect_option_follows_the_qemu_version() {
        assert_eq!(reconnect_option("QEMU emulator version 7.2.22 (Debian)"), "");
        assert_eq!(reconnect_option("QEMU emulator version 8.2.0"), ",reconnect=1");
        assert_eq!(reconnect_option("QEMU emulator version 10.0.2 (Debian x)"), ",reconnect-ms=100");
    }

    #[test]
    fn an_emulated_processor_has_no_option_its_qemu_does_not_know() {
        assert!(!emulated("QEMU emulator version 7.2.22 (Debian)").contains("fsrs"));
        assert!(emulated("QEMU emulator version 10.0.2 (Debian x)").ends_with(",fsrs=off"));
    }

    #[test]
    fn a_process_is_known_by_pid_and_start_time() {
        let me = Process::of(std::process::id() as i32).unwrap();
        assert!(me.alive());
        let imposter = Process { start_time: me.start_time + 1, ..me };
        assert!(!imposter.alive());
    }
}
