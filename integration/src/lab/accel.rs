//! KVM or emulation: decided by a boot, once. A `/dev/kvm` that can be opened proves nothing (on some nested hosts a
//! stock kernel hangs right behind the boot loader), so it is used only after a node has answered under it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::image::Image;
use super::node::Node;
use super::paths::{Paths, content_key};
use super::qemu::{self, Accel, Launch};
use super::snapshot::{Booting, overlay, wait_for_node};
use super::topology::{HUB, NodeSpec};

/// Decides without a trial: `tcg` or `kvm`.
const OVERRIDE: &str = "MIGRRDMA_ACCEL";

const DEVICE: &str = "/dev/kvm";

/// A node that boots under KVM at all answers within a fraction of this.
const TRIAL: Duration = Duration::from_secs(60);

/// What to run the nodes under.
pub fn choose(paths: &Paths, image: &Image) -> Result<Accel> {
    match std::env::var(OVERRIDE).as_deref() {
        Ok("tcg") => return Ok(Accel::Tcg),
        Ok("kvm") => return Ok(Accel::Kvm),
        Ok("") | Err(_) => {}
        Ok(other) => bail!("{OVERRIDE}={other}: write tcg or kvm, or nothing to have it tried"),
    }
    if fs::OpenOptions::new().read(true).write(true).open(DEVICE).is_err() {
        return Ok(Accel::Tcg);
    }
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cpu = cpu.lines().find(|l| l.starts_with("model name")).unwrap_or_default();
    let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let key = content_key(&[image.key.as_bytes(), qemu::version()?.as_bytes(), cpu.as_bytes(), host.trim().as_bytes()]);
    let answer = paths.lab().join(format!("accel-{key}"));
    match fs::read_to_string(&answer).as_deref().map(str::trim_end) {
        Ok("kvm") => return Ok(Accel::Kvm),
        Ok("tcg") => return Ok(Accel::Tcg),
        _ => {}
    }
    eprintln!("lab: {DEVICE} is there; trying for at most {} s whether a node boots under it", TRIAL.as_secs());
    let start = Instant::now();
    let scratch = paths.lab().join("trial");
    let tried = trial(paths, image, &scratch);
    let _ = fs::remove_dir_all(&scratch);
    let (accel, word) = match tried {
        Ok(()) => (Accel::Kvm, "kvm"),
        Err(_) => (Accel::Tcg, "tcg"),
    };
    match tried {
        Ok(()) => eprintln!("lab: it does ({:.0?}); the nodes run under KVM", start.elapsed()),
        Err(e) => eprintln!("lab: it does not, so the nodes are emulated: {e:#}"),
    }
    fs::write(&answer, word)?;
    Ok(accel)
}

/// Boots one node until it answers.
fn trial(paths: &Paths, image: &Image, scratch: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(scratch);
    fs::create_dir_all(scratch)?;
    let spec = NodeSpec::by_name(HUB)?;
    let disk = scratch.join("disk.qcow2");
    overlay(&image.disk, "raw", &disk)?;
    let mut booting = Booting::new(paths)?;
    let machine = qemu::launch(&Launch {
        node: spec,
        image,
        accel: Accel::Kvm,
        disk: &disk,
        incoming: None,
        sockets: scratch,
        logs: scratch,
        counter: None,
    })?;
    booting.add(machine.clone())?;
    let answered = wait_for_node(&Node::new(spec, machine.port, image.token.clone()), &machine, TRIAL);
    booting.end();
    answered
}
