//! Whether a container can be taken, as the destination sees it: every reason against it, in sentences.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use super::elf;
use super::host::Host;
use crate::agent::{Agent, facts};
use crate::net::msg::{DeviceFacts, Offer, OfferedProcess};

/// All reasons against taking this container. `arrived`: a bundle that was to come is here now.
pub fn problems(agent: &Agent, offer: &Offer, arrived: bool) -> Vec<String> {
    let to_come = offer.copy.as_ref().filter(|_| !arrived);
    let mut problems = agent.host.examine(&offer.container, to_come.is_none().then_some(&*offer.bundle));
    if let Some(copy) = to_come {
        problems.extend(super::landing::problems(agent, &offer.bundle, copy));
    }
    match agent.host.criu() {
        Ok(ours) if ours < offer.criu => problems.push(format!(
            "CRIU here is {}, older than the source's {}; install the same or a newer version",
            crate::criu::Version(ours),
            crate::criu::Version(offer.criu)
        )),
        Ok(_) => {}
        Err(e) => problems.push(format!("CRIU: {e}")),
    }
    problems.extend(missing_flags(&offer.cpu_flags, &facts::cpu_flags()));
    problems.extend(devices(&offer.processes, &facts::devices()));
    match agent.host.rootfs(&offer.bundle) {
        _ if to_come.is_some() => {}
        Ok(rootfs) => problems.extend(builds(&*agent.host, &offer.processes, &rootfs)),
        // `examine` has said that the bundle is not there.
        Err(e) if problems.is_empty() => problems.push(e.to_string()),
        Err(_) => {}
    }
    problems.extend(room(&agent.config.state_dir, offer.image_bytes, "image"));
    problems
}

fn missing_flags(theirs: &[String], ours: &[String]) -> Option<String> {
    let missing: Vec<&str> = theirs.iter().filter(|f| !ours.contains(f)).map(String::as_str).collect();
    (!missing.is_empty())
        .then(|| format!("the processor here lacks {}, which programs may be using", missing.join(" ")))
}

fn devices(processes: &[OfferedProcess], ours: &[DeviceFacts]) -> Vec<String> {
    let mut problems = Vec::new();
    for (driver, kinds) in processes.iter().flat_map(|p| &p.devices) {
        let same: Vec<&DeviceFacts> = ours.iter().filter(|d| d.driver == *driver).collect();
        let text = if same.is_empty() {
            format!("there is no RDMA device with driver {driver}; add one, or choose another host")
        } else if let Some(kind) = kinds.iter().find(|k| !same.iter().any(|d| d.gids.iter().any(|g| g.kind == **k))) {
            format!("no device with driver {driver} has a GID of type {}", gid_type(*kind))
        } else {
            continue;
        };
        if !problems.contains(&text) {
            problems.push(text);
        }
    }
    problems
}

fn gid_type(kind: u32) -> &'static str {
    match kind {
        0 => "InfiniBand",
        1 => "RoCE v1",
        2 => "RoCE v2",
        _ => "unknown to this program",
    }
}

/// The same programs have to be mapped again: their build ids say whether they are there. Many processes map the same
/// files, so each is looked at once.
fn builds(host: &dyn Host, processes: &[OfferedProcess], rootfs: &Path) -> Vec<String> {
    let mut mapped: BTreeMap<(&str, &str), &OfferedProcess> = BTreeMap::new();
    for process in processes {
        for build in process.builds.iter().filter(|b| !b.id.is_empty()) {
            mapped.entry((&build.file, &build.id)).or_insert(process);
        }
    }
    let check = |((file, id), process): ((&str, &str), &OfferedProcess)| {
        let own = inside(rootfs, Path::new(file));
        let candidates: Vec<PathBuf> =
            host.injected(Path::new(file)).into_iter().chain(own).filter(|p| p.is_file()).collect();
        if candidates.is_empty() {
            return Some(format!(
                "{file} is missing in the bundle's root file system; use the same image on both hosts"
            ));
        }
        if candidates.iter().any(|p| elf::build_id(p).is_ok_and(|found| found == id)) {
            return None;
        }
        Some(format!(
            "{file} is another build than the one {} (pid {}) has mapped; use the same image on both hosts",
            process.comm, process.vpid.0
        ))
    };
    mapped.into_iter().filter_map(check).collect()
}

/// Resolves a path the way a process inside would: symbolic links do not lead out.
pub fn inside(root: &Path, path: &Path) -> Option<PathBuf> {
    let mut done: Vec<std::ffi::OsString> = Vec::new();
    let mut todo: Vec<std::ffi::OsString> = parts(path);
    let mut links = 0;
    while let Some(part) = todo.pop() {
        if part == ".." {
            done.pop();
            continue;
        }
        done.push(part);
        let now = root.join(done.iter().collect::<PathBuf>());
        if let Ok(target) = std::fs::read_link(&now) {
            links += 1;
            if links > 40 {
                return None;
            }
            done.pop();
            if target.is_absolute() {
                done.clear();
            }
            todo.extend(parts(&target));
        }
    }
    Some(root.join(done.iter().collect::<PathBuf>()))
}

/// Names, the last one first.
fn parts(path: &Path) -> Vec<std::ffi::OsString> {
    path.components()
        .rev()
        .filter_map(|c| match c {
            Component::Normal(name) => Some(name.to_owned()),
            Component::ParentDir => Some("..".into()),
            _ => None,
        })
        .collect()
}

/// Whether there is room for that many bytes of something.
pub fn room(dir: &Path, bytes: u64, what: &str) -> Option<String> {
    let stat = nix::sys::statvfs::statvfs(dir).ok()?;
    let free = stat.blocks_available() * stat.fragment_size();
    let mib = |b: u64| b >> 20;
    (free < bytes.saturating_add(64 << 20)).then(|| {
        format!("{} has room for {} MiB, the {what} may need {} MiB", dir.display(), mib(free), mib(bytes) + 64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::msg::GidFacts;
    use rdma_virt::id::{PGid, Vpid};

    #[test]
    fn links_do_not_lead_out_of_the_root() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("usr/lib")).unwrap();
        std::os::unix::fs::symlink("usr/lib", root.path().join("lib")).unwrap();
        std::os::unix::fs::symlink("/../../etc/passwd", root.path().join("usr/lib/evil")).unwrap();
        assert_eq!(inside(root.path(), Path::new("/lib/a")), Some(root.path().join("usr/lib/a")));
        assert_eq!(inside(root.path(), Path::new("/lib/evil")), Some(root.path().join("etc/passwd")));
        std::os::unix::fs::symlink("loop", root.path().join("loop")).unwrap();
        assert_eq!(inside(root.path(), Path::new("/loop")), None);
    }

    #[test]
    fn a_missing_driver_and_a_missing_gid_type_are_told_apart() {
        let process = |driver: &str, kind| OfferedProcess {
            vpid: Vpid(1),
            comm: "a".into(),
            builds: Vec::new(),
            devices: vec![(driver.into(), vec![kind])],
        };
        let gid = GidFacts { port: 1, index: 0, gid: PGid([1; 16]), kind: 2 };
        let ours = [DeviceFacts { name: "rxe1".into(), driver: "rxe".into(), gids: vec![gid] }];
        assert!(devices(&[process("rxe", 2)], &ours).is_empty());
        assert!(devices(&[process("rxe", 1)], &ours)[0].contains("RoCE v1"));
        assert!(devices(&[process("mlx5", 2)], &ours)[0].contains("mlx5"));
    }
}
