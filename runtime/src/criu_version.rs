//! Which CRIU is installed, found out once for each installation: a run of it costs tens of milliseconds, on a busy host
//! many times that, and a migration must not spend them inside its pause.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, bail};
use checkpoint::criu::{Criu, CriuError, Version};

/// Older ones lack external network namespaces.
const OLDEST: Version = Version(31_500);

/// The file a version was asked of: device, inode, size, change time.
type Stamp = (u64, u64, u64, i64, i64);

static KNOWN: Mutex<BTreeMap<PathBuf, (Stamp, Version)>> = Mutex::new(BTreeMap::new());

static WARM: Mutex<BTreeMap<PathBuf, Stamp>> = Mutex::new(BTreeMap::new());

/// The version of this program; an error if it is missing or too old.
pub fn of(program: &Path) -> Result<Version> {
    let Some((path, stamp)) = find(program) else { return Err(CriuError::Missing(program.to_owned()).into()) };
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let version = match known.get(&path) {
        Some((of, version)) if *of == stamp => *version,
        _ => {
            let version = Criu::new(program).version()?;
            known.insert(path, (stamp, version));
            version
        }
    };
    if version < OLDEST {
        bail!("CRIU {version} is too old, {OLDEST} or newer is needed; install a newer package criu");
    }
    Ok(version)
}

/// Lets CRIU look at this kernel, once for each installation. What it finds it keeps on a tmpfs until the next boot;
/// otherwise the first dump or restore does so, inside somebody's pause.
pub fn warm(program: &Path) {
    let Some((path, stamp)) = find(program) else { return };
    let mut warm = WARM.lock().unwrap_or_else(PoisonError::into_inner);
    if warm.get(&path) != Some(&stamp) {
        // Only time is lost if it fails, and the dump will say why.
        let _ = Criu::new(program).features();
        warm.insert(path, stamp);
    }
}

/// The file that would be run: a name without a slash is looked for as a shell does.
fn find(program: &Path) -> Option<(PathBuf, Stamp)> {
    let stamp = |path: &Path| {
        let m = fs::metadata(path).ok().filter(|m| m.is_file() && m.mode() & 0o111 != 0)?;
        Some((path.to_owned(), (m.dev(), m.ino(), m.size(), m.ctime(), m.ctime_nsec())))
    };
    if program.components().count() > 1 || program.is_absolute() {
        return stamp(program);
    }
    let dirs = std::env::var_os("PATH")?;
    std::env::split_paths(&dirs).find_map(|dir| stamp(&dir.join(program)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_program_that_went_away_is_missed_and_a_directory_is_no_program() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("criu");
        assert!(find(&path).is_none());
        fs::write(&path, "").unwrap();
        assert!(find(&path).is_none(), "it cannot be executed");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(find(&path).is_some());
        fs::remove_file(&path).unwrap();
        let err = of(&path).unwrap_err().to_string();
        assert!(err.contains("not installed") && err.contains("install the package criu"), "{err}");
        assert!(find(dir.path()).is_none());
    }
}
