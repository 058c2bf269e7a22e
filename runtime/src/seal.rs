//! Whether the files of an image are those that were written: CRIU itself waits for ever for pages that are missing.
//!
//! Lengths of all files, checksums of the small ones: reading gigabytes of pages twice would cost more than it tells.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// Files up to this length get a checksum, bytes.
const SUMMED: u64 = 1 << 20;

/// What a file of an image was when it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    pub len: u64,
    /// CRC-32.
    pub crc: Option<u32>,
}

/// By name.
pub type Seal = BTreeMap<String, Sealed>;

/// Looks at all files of a complete image. Without `sums` at their lengths only, for an image whose files are summed by
/// whoever carries them.
pub fn take(dir: &Path, sums: bool) -> Result<Seal> {
    let read = || format!("cannot read {}", dir.display());
    let mut seal = Seal::new();
    for entry in fs::read_dir(dir).with_context(read)? {
        let entry = entry.with_context(read)?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.ends_with(".img") && entry.file_type()?.is_file() {
            let sealed =
                look(&entry.path(), sums).with_context(|| format!("cannot read {}", entry.path().display()))?;
            seal.insert(name, sealed);
        }
    }
    Ok(seal)
}

fn look(path: &Path, sum: bool) -> std::io::Result<Sealed> {
    let len = fs::metadata(path)?.len();
    let crc = if sum && len <= SUMMED { Some(crc32fast::hash(&fs::read(path)?)) } else { None };
    Ok(Sealed { len, crc })
}

/// Refuses an image in which a file is missing, cut or altered.
pub fn check(dir: &Path, seal: &Seal) -> Result<()> {
    for (name, written) in seal {
        if name.contains('/') {
            bail!("{}: {name:?} is no name of an image's file", dir.display());
        }
        let path = dir.join(name);
        let what = match look(&path, written.crc.is_some()) {
            Err(e) => format!("cannot be read ({e})"),
            Ok(now) if now.len != written.len => format!("has {} bytes instead of {}", now.len, written.len),
            Ok(now) if now.crc != written.crc => "was altered: its checksum is wrong".into(),
            Ok(_) => continue,
        };
        bail!("{} {what}; copy the checkpoint again, or take a new one", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_cut_or_altered_is_named_and_other_files_do_not_matter() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("core-1.img"), "core").unwrap();
        fs::write(at("pages-1.img"), vec![1; 2 << 20]).unwrap();
        fs::write(at("dump.log"), "log").unwrap();
        let seal = take(dir.path(), true).unwrap();
        assert_eq!(seal.len(), 2);
        let carried = take(dir.path(), false).unwrap();
        fs::write(at("dump.log"), "another").unwrap();
        fs::write(at("late.img"), "").unwrap();
        check(dir.path(), &seal).unwrap();
        fs::write(at("core-1.img"), "cure").unwrap();
        let said = |seal| check(dir.path(), seal).unwrap_err().to_string();
        assert!(said(&seal).contains("core-1.img was altered"));
        check(dir.path(), &carried).unwrap();
        fs::write(at("core-1.img"), "core").unwrap();
        fs::write(at("pages-1.img"), vec![1; 100]).unwrap();
        assert!(said(&seal).contains("pages-1.img has 100 bytes instead of 2097152"));
        assert!(said(&carried).contains("pages-1.img has 100 bytes instead of 2097152"));
        fs::remove_file(at("pages-1.img")).unwrap();
        assert!(said(&seal).contains("cannot be read"));
        let odd = Seal::from([("../x".to_owned(), Sealed { len: 0, crc: None })]);
        assert!(said(&odd).contains("no name"));
    }
}
