//! First-run set-up of the build machine: the packages that building and the
//! lab need, installed by name through the system's package manager.
//!
//! Nothing is downloaded by any other way, and a machine that has everything
//! is not touched.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// A package and what proves that it is there.
struct Need {
    package: &'static str,
    probe: Probe,
    why: &'static str,
}

enum Probe {
    Program(&'static str),
    File(&'static str),
    /// A library libclang may have under several version directories.
    Clang,
}

const NEEDS: &[Need] = &[
    Need {
        package: "qemu-system-x86",
        probe: Probe::Program("qemu-system-x86_64"),
        why: "runs the lab's three machines",
    },
    Need { package: "qemu-utils", probe: Probe::Program("qemu-img"), why: "disk overlays of the lab's machines" },
    Need { package: "mmdebstrap", probe: Probe::Program("mmdebstrap"), why: "builds the machines' Debian file system" },
    Need { package: "e2fsprogs", probe: Probe::Program("mke2fs"), why: "turns it into a disk image without mounting" },
    Need {
        package: "debian-archive-keyring",
        probe: Probe::File("/usr/share/keyrings/debian-archive-keyring.gpg"),
        why: "checks the packages of the machines' file system",
    },
    Need { package: "gcc", probe: Probe::Program("cc"), why: "links the binaries" },
    Need { package: "pkg-config", probe: Probe::Program("pkg-config"), why: "finds the libraries the build needs" },
    Need {
        package: "libseccomp-dev",
        probe: Probe::File("/usr/include/seccomp.h"),
        why: "seccomp filters of the runtime",
    },
    Need {
        package: "libibverbs-dev",
        probe: Probe::File("/usr/include/infiniband/verbs.h"),
        why: "verbs headers for the shim",
    },
    Need {
        package: "librdmacm-dev",
        probe: Probe::File("/usr/include/rdma/rdma_cma.h"),
        why: "verbs types for the shim",
    },
    Need { package: "libclang-dev", probe: Probe::Clang, why: "reads those headers while building" },
];

impl Probe {
    fn present(&self) -> bool {
        match self {
            Probe::Program(name) => ["/usr/bin", "/usr/sbin", "/bin", "/sbin", "/usr/local/bin"]
                .iter()
                .any(|d| Path::new(d).join(name).exists()),
            Probe::File(path) => Path::new(path).exists(),
            Probe::Clang => fs::read_dir("/usr/lib")
                .map(|dir| {
                    dir.filter_map(|e| e.ok()).any(|e| {
                        e.file_name().to_string_lossy().starts_with("llvm-")
                            && e.path().join("lib/libclang.so").exists()
                    })
                })
                .unwrap_or(false),
        }
    }
}

/// Runs a command that must succeed.
pub fn run(cmd: &mut Command) -> Result<()> {
    let name = cmd.get_program().to_string_lossy().into_owned();
    let status = cmd.stdin(Stdio::null()).status().with_context(|| format!("run {name}"))?;
    if !status.success() {
        bail!("{name} failed: {status}");
    }
    Ok(())
}

/// Installs what is missing; does nothing and says nothing when all is there.
pub fn ensure() -> Result<()> {
    ensure_all(NEEDS)
}

/// What fuzzing needs on top.
pub fn ensure_for_fuzzing() -> Result<()> {
    ensure_all(&[Need { package: "g++", probe: Probe::Program("g++"), why: "builds libFuzzer" }])
}

fn ensure_all(needs: &[Need]) -> Result<()> {
    let absent = || needs.iter().filter(|n| !n.probe.present()).collect::<Vec<&Need>>();
    let missing = absent();
    if missing.is_empty() {
        return Ok(());
    }
    install_all(&missing)?;
    match absent().first() {
        None => Ok(()),
        Some(still) => bail!("{} was installed but what it is needed for is not there", still.package),
    }
}

fn install_all(missing: &[&Need]) -> Result<()> {
    eprintln!("set-up: installing with apt-get:");
    for need in missing {
        eprintln!("  {:24} {}", need.package, need.why);
    }
    let names: BTreeSet<&str> = missing.iter().map(|n| n.package).collect();
    if !nix::unistd::geteuid().is_root() {
        let names: Vec<_> = names.into_iter().collect();
        bail!(
            "installing packages needs root; run this as root, or install them yourself: apt-get install {}",
            names.join(" ")
        );
    }
    if !Probe::Program("apt-get").present() {
        bail!("no apt-get on this machine; install the packages above with your own package manager");
    }
    install(&names)
}

fn install(names: &BTreeSet<&str>) -> Result<()> {
    if apt(&[], &["update", "-q"], &BTreeSet::new()).is_err() {
        eprintln!("set-up: apt-get update failed; going on with the lists there are");
    }
    // Nothing that is there is taken away: where one package from backports has to go for an older one to fit, the newer
    // suite is the one this machine was set up from.
    let flags = ["install", "-y", "-q", "--no-install-recommends", "--no-remove"];
    if apt(&[], &flags, names).is_ok() {
        return Ok(());
    }
    // Their matching parts are not in its sources any more; then only that suite fits.
    eprintln!("set-up: that failed; trying again with this release's backports");
    let dir = std::env::temp_dir().join(format!("migrrdma-apt-{}", std::process::id()));
    let result = install_with_backports(&dir, &flags, names);
    let _ = fs::remove_dir_all(&dir);
    result.context("apt-get could not install what is needed; its messages are above")
}

fn install_with_backports(dir: &Path, flags: &[&str], names: &BTreeSet<&str>) -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let codename = release
        .lines()
        .find_map(|l| l.strip_prefix("VERSION_CODENAME="))
        .context("no VERSION_CODENAME in /etc/os-release")?
        .trim_matches('"');
    let mirror = crate::lab::mirror::Mirror::find()?;
    fs::create_dir_all(dir.join("parts"))?;
    fs::create_dir_all(dir.join("lists/partial"))?;
    let backports = format!("{codename}-backports");
    fs::write(
        dir.join("parts/all.sources"),
        mirror.sources(codename).replace("-updates\n", &format!("-updates {backports}\n")),
    )?;
    // Sources of this one call; the machine's own stay as they are.
    let options = [
        "-o".to_owned(),
        format!("Dir::Etc::sourceparts={}", dir.join("parts").display()),
        "-o".to_owned(),
        format!("Dir::State::lists={}", dir.join("lists").display()),
    ];
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    apt(&options, &["update", "-q"], &BTreeSet::new())?;
    let mut flags = flags.to_vec();
    flags.extend(["-t", &backports]);
    apt(&options, &flags, names)
}

fn apt(options: &[&str], command: &[&str], names: &BTreeSet<&str>) -> Result<()> {
    run(Command::new("apt-get")
        .env("DEBIAN_FRONTEND", "noninteractive")
        // Another apt may be at work for a while.
        .args(["-o", "DPkg::Lock::Timeout=600"])
        .args(options)
        .args(command)
        .args(names)
        .stdout(std::io::stderr()))
}
