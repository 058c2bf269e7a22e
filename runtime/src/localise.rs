//! A bundle that came from another host names that host's RDMA devices; here they have other numbers, and maybe other
//! names. Only the files under `/dev/infiniband` are meant: what else differs between hosts is the administrator's.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

const DIRECTORY: &str = "/dev/infiniband";

/// Character devices of this host by path.
type Nodes = BTreeMap<String, (u64, u64)>;

/// Rewrites `config.json` of the bundle, if it names such devices.
pub fn bundle(dir: &Path) -> Result<()> {
    let path = dir.join("config.json");
    let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut config: Value =
        serde_json::from_slice(&text).with_context(|| format!("{} is no specification", path.display()))?;
    if rewrite(&mut config, &nodes()) {
        let text = serde_json::to_vec_pretty(&config)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

fn nodes() -> Nodes {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    let look = |entry: fs::DirEntry| {
        let meta = entry.metadata().ok().filter(|m| m.file_type().is_char_device())?;
        let number = (libc::major(meta.rdev()).into(), libc::minor(meta.rdev()).into());
        Some((entry.path().to_str()?.to_owned(), number))
    };
    entries.filter_map(look).collect()
}

/// Each `uverbsN` becomes one of this host's, its own name first; the rest keep their names. Says whether anything
/// changed.
fn rewrite(config: &mut Value, here: &Nodes) -> bool {
    let before = config.clone();
    let mut renumbered: BTreeMap<(u64, u64), (u64, u64)> = BTreeMap::new();
    let mut taken: Vec<String> = Vec::new();
    for device in config.pointer_mut("/linux/devices").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(path) = device["path"].as_str().filter(|p| p.starts_with(DIRECTORY)).map(str::to_owned) else {
            continue;
        };
        let verbs = |p: &str| p.strip_prefix(DIRECTORY).is_some_and(|name| name.starts_with("/uverbs"));
        let free = |p: &&String| !taken.contains(p);
        let same = here.keys().filter(free).find(|p| **p == path);
        let found = same.or_else(|| here.keys().filter(free).find(|p| verbs(&path) && verbs(p)));
        let Some((name, (major, minor))) = found.map(|name| (name.clone(), here[name])) else { continue };
        if let (Some(a), Some(b)) = (device["major"].as_u64(), device["minor"].as_u64()) {
            renumbered.insert((a, b), (major, minor));
        }
        (device["path"], device["major"], device["minor"]) = (json!(name), json!(major), json!(minor));
        taken.push(name);
    }
    for rule in config.pointer_mut("/linux/resources/devices").and_then(Value::as_array_mut).into_iter().flatten() {
        if let (Some(a), Some(b)) = (rule["major"].as_u64(), rule["minor"].as_u64())
            && let Some((major, minor)) = renumbered.get(&(a, b))
        {
            (rule["major"], rule["minor"]) = (json!(major), json!(minor));
        }
    }
    *config != before
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rdma_devices_become_this_hosts_and_others_stay() {
        let here = Nodes::from([
            ("/dev/infiniband/rdma_cm".into(), (10, 261)),
            ("/dev/infiniband/uverbs1".into(), (231, 193)),
        ]);
        let mut config = json!({"linux": {
            "devices": [
                {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229},
                {"path": "/dev/infiniband/uverbs0", "type": "c", "major": 231, "minor": 192, "fileMode": 438},
                {"path": "/dev/infiniband/rdma_cm", "type": "c", "major": 10, "minor": 260},
                {"path": "/dev/infiniband/uverbs7", "type": "c", "major": 231, "minor": 199},
            ],
            "resources": {"devices": [
                {"allow": false, "access": "rwm"},
                {"allow": true, "type": "c", "major": 231, "minor": 192, "access": "rwm"},
                {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm"},
            ]},
        }});
        assert!(rewrite(&mut config, &here));
        let devices = &config["linux"]["devices"];
        assert_eq!((&devices[0]["minor"], &devices[1]["path"]), (&json!(229), &json!("/dev/infiniband/uverbs1")));
        assert_eq!(
            (&devices[1]["minor"], &devices[1]["fileMode"], &devices[2]["minor"]),
            (&json!(193), &json!(438), &json!(261))
        );
        assert_eq!(devices[3]["path"], "/dev/infiniband/uverbs7", "there is no second one here");
        let rules = &config["linux"]["resources"]["devices"];
        assert_eq!(
            (&rules[0]["major"], &rules[1]["minor"], &rules[2]["minor"]),
            (&Value::Null, &json!(193), &json!(229))
        );
        assert!(!rewrite(&mut config, &here), "a second time there is nothing to do");
    }
}
