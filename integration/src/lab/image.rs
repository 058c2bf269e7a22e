//! The nodes' disk image: Debian trixie built with mmdebstrap, cached by the
//! content of its recipe.
//!
//! Two root file systems are made: the node's own and, inside it under
//! `/srv/lab/rootfs`, the one containers run in. Nothing here boots.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use super::guest::{GUEST_REVISION, TOKEN_PATH};
use super::mirror::Mirror;
use super::paths::{Paths, content_key};
use super::wire::WIRE_VERSION;
use crate::setup::run;

const SUITE: &str = "trixie";

/// Packages of the nodes' own system.
const NODE_PACKAGES: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "udev",
    "kmod",
    "dbus",
    "linux-image-amd64",
    "initramfs-tools",
    "criu",
    "runc",
    "rdma-core",
    "ibverbs-utils",
    "ibverbs-providers",
    "perftest",
    "rdmacm-utils",
    "python3-pyverbs",
    "iproute2",
    "iptables",
    "nftables",
    "procps",
    "psmisc",
    "ethtool",
    "iputils-ping",
    "iputils-arping",
    "tcpdump",
    "strace",
    "gdb-minimal",
];

/// Packages of the containers' root file system.
const CONTAINER_PACKAGES: &[&str] = &[
    "perftest",
    "ibverbs-utils",
    "ibverbs-providers",
    "rdmacm-utils",
    "python3-pyverbs",
    "iproute2",
    "iputils-ping",
    "procps",
];

/// Kernel module directories no node will ever need.
const UNUSED_MODULES: &[&str] = &[
    "kernel/sound",
    "kernel/drivers/gpu",
    "kernel/drivers/media",
    "kernel/drivers/staging",
    "kernel/drivers/net/wireless",
    "kernel/drivers/net/ethernet",
    "kernel/drivers/iio",
    "kernel/drivers/scsi",
    "kernel/drivers/isdn",
];

/// Things of no use to a reader without a terminal in front of the node.
const UNUSED_PATHS: &[&str] = &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];

/// Exceptions: the suites that libibverbs and pyverbs are tested with.
const USED_PATHS: &[&str] =
    &["/usr/share/doc/rdma-core", "/usr/share/doc/rdma-core/tests", "/usr/share/doc/rdma-core/tests/*"];

/// Units that would wake up in the middle of a test.
const MASKED_UNITS: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "iwpmd.service",
    "man-db.timer",
    "systemd-tmpfiles-clean.timer",
    "systemd-hostnamed.socket",
];

const GUEST_UNIT: &str = "[Unit]
Description=Lab control channel
DefaultDependencies=no
After=local-fs.target systemd-udevd.service
Conflicts=shutdown.target
[Service]
ExecStartPre=-/usr/sbin/ip link set lo up
ExecStartPre=/usr/sbin/ip addr replace 10.0.2.15/24 dev eth0
ExecStartPre=/usr/sbin/ip link set eth0 up
ExecStart=/usr/local/sbin/lab-guest guest
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8
Restart=always
RestartSec=1
KillMode=process
Delegate=yes
OOMPolicy=continue
TasksMax=infinity
LimitMEMLOCK=infinity
LimitNOFILE=65536
LimitCORE=infinity
[Install]
WantedBy=multi-user.target
";

/// Commands run inside the finished node tree.
const CUSTOMISE: &str = "set -eu
root=$1
echo 'kernel.core_pattern=/var/crash/%e.%p' > $root/etc/sysctl.d/lab.conf
cat > $root/usr/local/sbin/lab-net <<'END'
#!/bin/sh
# Hook of the lab's bundles: the host side of a container's link goes up when
# the container is created or restored, and down when it is gone. A migration
# that restores before its commit says so in the state's annotations.
# Usage: lab-net up|down HOST-INTERFACE NAMESPACE ADDRESS
set -eu
state=$(cat)
if [ \"$1\" = up ]; then
  case \"$state\" in *org.migrrdma.incoming*) exit 0;; esac
  ip link set \"$2\" up
  # Switches on the way learn where the address lives now.
  ip netns exec \"$3\" arping -q -U -c 1 -w 1 -I eth0 \"$4\" >/dev/null 2>&1 </dev/null &
else
  ip link set \"$2\" down
fi
END
chmod 755 $root/usr/local/sbin/lab-net
mkdir -p $root/var/crash $root/srv/lab/bundles $root/etc/udev/rules.d $root/etc/systemd/journald.conf.d
ln -sf /dev/null $root/etc/udev/rules.d/60-rdma-persistent-naming.rules
ln -sf /dev/null $root/etc/udev/rules.d/80-net-setup-link.rules
printf '[Journal]\\nStorage=volatile\\nRuntimeMaxUse=32M\\n' > $root/etc/systemd/journald.conf.d/lab.conf
printf '/dev/vda / ext4 noatime 0 1\\n' > $root/etc/fstab
rm -f $root/etc/resolv.conf $root/etc/machine-id $root/etc/hostname
: > $root/etc/machine-id
printf '127.0.0.1 localhost\\n::1 localhost\\n10.10.0.1 src\\n10.10.0.2 dst\\n10.10.0.3 peer\\n' > $root/etc/hosts
chroot $root passwd -d root >/dev/null
";

/// A node image ready to boot.
#[derive(Debug, Clone)]
pub struct Image {
    /// Content key of the recipe.
    pub key: String,
    /// Raw ext4 image of the root file system.
    pub disk: PathBuf,
    /// Kernel for direct boot.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: PathBuf,
    /// Secret of the control channel.
    pub token: String,
}

fn recipe_key() -> String {
    let mut parts: Vec<&[u8]> = vec![SUITE.as_bytes(), GUEST_UNIT.as_bytes(), CUSTOMISE.as_bytes()];
    for list in [NODE_PACKAGES, CONTAINER_PACKAGES, UNUSED_MODULES, UNUSED_PATHS, USED_PATHS, MASKED_UNITS] {
        parts.push(b"--");
        parts.extend(list.iter().map(|s| s.as_bytes()));
    }
    let versions = [WIRE_VERSION.to_le_bytes(), GUEST_REVISION.to_le_bytes()].concat();
    parts.push(&versions);
    content_key(&parts)
}

/// Returns the image, building it when its recipe has no cached result.
pub fn ensure(paths: &Paths) -> Result<Image> {
    let key = recipe_key();
    let dir = paths.lab().join(format!("image-{key}"));
    if !dir.join("complete").exists() {
        build(paths, &dir)?;
    }
    Ok(Image {
        disk: dir.join("root.ext4"),
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd.img"),
        token: fs::read_to_string(dir.join("token")).with_context(|| format!("read {}/token", dir.display()))?,
        key,
    })
}

fn build(paths: &Paths, dir: &Path) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("building the lab's image needs root (mmdebstrap, mke2fs -d); run as root");
    }
    let start = Instant::now();
    let mirror = Mirror::find()?;
    eprintln!("lab: building the node image (Debian {SUITE}); this takes a few minutes, once");
    clear(dir)?;
    fs::create_dir_all(dir)?;
    let sources = dir.join("trixie.sources");
    fs::write(&sources, mirror.sources(SUITE))?;
    let hooks = dir.join("early.sh");
    fs::write(
        &hooks,
        "set -e\nmkdir -p \"$1/etc/initramfs-tools/conf.d\"\n\
         printf 'MODULES=list\\nCOMPRESS=gzip\\nBUSYBOX=n\\n' > \"$1/etc/initramfs-tools/conf.d/lab\"\n\
         printf 'virtio_pci\\nvirtio_blk\\next4\\n' > \"$1/etc/initramfs-tools/modules\"\n",
    )?;

    let node = dir.join("node");
    let container = dir.join("container");
    // Both at once: one waits for the network while the other unpacks.
    let (a, b) = thread::scope(|s| {
        let a = s.spawn(|| {
            let mut excludes: Vec<String> =
                UNUSED_MODULES.iter().map(|m| format!("/usr/lib/modules/*/{m}/*")).collect();
            excludes.extend(UNUSED_PATHS.iter().map(|p| p.to_string()));
            let hook = format!("--essential-hook=sh {} \"$1\"", hooks.display());
            debootstrap(&node, &sources, NODE_PACKAGES, &excludes, &[&hook])
        });
        let b = s.spawn(|| {
            let excludes: Vec<String> = UNUSED_PATHS.iter().map(|p| p.to_string()).collect();
            debootstrap(&container, &sources, CONTAINER_PACKAGES, &excludes, &[])
        });
        (a.join(), b.join())
    });
    a.map_err(|_| anyhow::anyhow!("image thread panicked"))??;
    b.map_err(|_| anyhow::anyhow!("image thread panicked"))??;

    let custom = dir.join("customise.sh");
    fs::write(&custom, CUSTOMISE)?;
    run(Command::new("sh").arg(&custom).arg(&node))?;
    for unit in MASKED_UNITS {
        let link = node.join("etc/systemd/system").join(unit);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink("/dev/null", &link)?;
    }
    let unit = node.join("etc/systemd/system/lab-guest.service");
    fs::write(&unit, GUEST_UNIT)?;
    let wants = node.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("/etc/systemd/system/lab-guest.service", wants.join("lab-guest.service"))?;
    let guest = node.join("usr/local/sbin/lab-guest");
    fs::copy(std::env::current_exe()?, &guest)?;
    fs::set_permissions(&guest, fs::Permissions::from_mode(0o755))?;

    let token = random_token()?;
    fs::write(dir.join("token"), &token)?;
    let in_guest = node.join(TOKEN_PATH.trim_start_matches('/'));
    fs::write(&in_guest, &token)?;
    fs::set_permissions(&in_guest, fs::Permissions::from_mode(0o600))?;

    let _ = fs::remove_file(container.join("etc/resolv.conf"));
    fs::rename(&container, node.join("srv/lab/rootfs"))?;
    take_boot_files(&node, dir)?;

    run(Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-L", "lab", "-E", "lazy_itable_init=0,root_owner=0:0", "-d"])
        .arg(&node)
        .arg(dir.join("root.ext4"))
        .arg("8G"))?;
    fs::remove_dir_all(&node)?;
    fs::write(dir.join("complete"), "")?;
    drop_older(paths, "image-", dir);
    eprintln!("lab: node image ready after {:.0?}", start.elapsed());
    Ok(())
}

fn debootstrap(out: &Path, sources: &Path, packages: &[&str], excludes: &[String], more: &[&str]) -> Result<()> {
    let log_path = out.with_extension("log");
    let log = fs::File::create(&log_path)?;
    let mut cmd = Command::new("mmdebstrap");
    cmd.args(["--mode=root", "--variant=minbase", "--format=directory"])
        .arg("--aptopt=Acquire::Languages \"none\"")
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .args(excludes.iter().map(|e| format!("--dpkgopt=path-exclude={e}")))
        .args(USED_PATHS.iter().map(|p| format!("--dpkgopt=path-include={p}")))
        .args(more)
        .arg(format!("--include={}", packages.join(",")))
        .arg(SUITE)
        .arg(out)
        .arg(sources)
        .stdout(log.try_clone()?)
        .stderr(log);
    run(&mut cmd).with_context(|| {
        let mut tail = String::new();
        let _ = fs::File::open(&log_path).and_then(|mut f| f.read_to_string(&mut tail));
        let from = tail.len().saturating_sub(1500);
        let from = (from..tail.len()).find(|&i| tail.is_char_boundary(i)).unwrap_or(tail.len());
        format!("mmdebstrap failed; end of its log:\n{}", &tail[from..])
    })
}

fn take_boot_files(node: &Path, dir: &Path) -> Result<()> {
    let boot = node.join("boot");
    for (prefix, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd.img")] {
        let found = fs::read_dir(&boot)?
            .filter_map(|e| e.ok())
            .find(|e| e.file_name().to_string_lossy().starts_with(prefix))
            .with_context(|| format!("no {prefix}* in the image's /boot"))?;
        fs::copy(found.path(), dir.join(name))?;
    }
    Ok(())
}

fn random_token() -> Result<String> {
    let mut bytes = [0u8; 16];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|b| format!("{b:02x}")).collect())
}

/// Removes a tree a root file system was built in. Refuses when something is
/// mounted below: an interrupted build could have left the machine's own
/// `/dev` there.
fn clear(dir: &Path) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let below = format!("{}/", dir.display());
    if let Some(point) = mounts.lines().filter_map(|l| l.split(' ').nth(4)).find(|p| p.starts_with(&below)) {
        bail!("{point} is still mounted from an interrupted build; unmount it first");
    }
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Removes earlier results of the same kind: each is a gigabyte or more.
pub fn drop_older(paths: &Paths, prefix: &str, keep: &Path) {
    let Ok(entries) = fs::read_dir(paths.lab()) else {
        return;
    };
    for entry in entries.filter_map(|e| e.ok()) {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(prefix) && entry.path() != keep {
            let _ = clear(&entry.path());
        }
    }
}
