//! Where the lab keeps what on the build machine.
//!
//! Large, cached things live under `target/lab/`, named by the content of
//! their recipe. Sockets live in a short directory under `/tmp`, because a
//! unix socket's path holds 107 bytes at most.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Paths of one checkout and one lab instance.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The workspace.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    /// Name of the lab instance, `MIGRRDMA_LAB` or `default`.
    pub instance: String,
    /// The plugin of QEMU that counts what nodes execute, if they shall be counted.
    pub counter: Option<PathBuf>,
}

impl Paths {
    /// Paths of this checkout. The instance comes from `MIGRRDMA_LAB`.
    pub fn new() -> Result<Paths> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("workspace root")?.to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => root.join(dir),
            None => root.join("target"),
        };
        let instance = std::env::var("MIGRRDMA_LAB").unwrap_or_else(|_| "default".into());
        if instance.is_empty() || !instance.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            bail!("MIGRRDMA_LAB={instance:?}: use letters, digits, '-' and '_'");
        }
        Ok(Paths { root, target, instance, counter: None })
    }

    /// Everything of the lab that is worth caching.
    pub fn lab(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// Files of the running instance: overlays, logs, state.
    pub fn run(&self) -> PathBuf {
        self.lab().join("run").join(&self.instance)
    }

    /// State file of the running instance.
    pub fn state(&self) -> PathBuf {
        self.run().join("state.json")
    }

    /// Directory of the instance's unix sockets; made when missing, and
    /// refused when it belongs to somebody else.
    pub fn sockets(&self) -> Result<PathBuf> {
        let key = content_key(&[self.run().as_os_str().as_encoded_bytes()]);
        self.private_dir(&format!("migrrdma-lab-{}", &key[..12]))
    }

    fn private_dir(&self, name: &str) -> Result<PathBuf> {
        let dir = Path::new("/tmp").join(name);
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e).with_context(|| format!("create {}", dir.display())),
        }
        let meta = fs::symlink_metadata(&dir)?;
        if !meta.is_dir() || meta.uid() != nix::unistd::geteuid().as_raw() {
            bail!("{} belongs to somebody else; remove it", dir.display());
        }
        Ok(dir)
    }
}

/// A short name for the content of a recipe (FNV-1a, 64 bit, hex): a cache
/// key, not a protection against anybody.
pub fn content_key(parts: &[&[u8]]) -> String {
    let mut h: u64 = 0xcbf2_9ce4_8422_2325;
    for part in parts {
        for &b in (part.len() as u64).to_le_bytes().iter().chain(part.iter()) {
            h ^= u64::from(b);
            h = h.wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    format!("{h:016x}")
}

#[cfg(test)]
mod tests {
    use super::content_key;

    #[test]
    fn a_key_depends_on_every_part_and_on_where_it_ends() {
        assert_eq!(content_key(&[b"a", b"b"]), content_key(&[b"a", b"b"]));
        assert_ne!(content_key(&[b"a", b"b"]), content_key(&[b"ab"]));
        assert_ne!(content_key(&[b"a", b"b"]), content_key(&[b"b", b"a"]));
    }
}
