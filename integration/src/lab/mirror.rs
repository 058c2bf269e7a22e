//! Which package archive the node image is built from.
//!
//! The answer comes from this machine's own apt configuration, or from
//! `MIGRRDMA_DEBIAN_MIRROR`; no archive is named here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

/// A Debian archive and the keys it is checked with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    uri: String,
    keyring: PathBuf,
}

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

impl Mirror {
    /// Finds the archive this machine itself uses.
    pub fn find() -> Result<Mirror> {
        if !Path::new(KEYRING).exists() {
            bail!("{KEYRING} is missing: install the package debian-archive-keyring");
        }
        if let Ok(uri) = std::env::var("MIGRRDMA_DEBIAN_MIRROR") {
            return Ok(Mirror { uri, keyring: KEYRING.into() });
        }
        let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
        if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
            files.extend(dir.filter_map(|e| e.ok()).map(|e| e.path()));
        }
        files.sort();
        let found = files
            .iter()
            .filter_map(|f| fs::read_to_string(f).ok())
            .flat_map(|text| archive_uris(&text))
            .find(|uri| looks_like_debian(uri));
        match found {
            Some(uri) => Ok(Mirror { uri, keyring: KEYRING.into() }),
            None => bail!("no Debian archive in /etc/apt; set MIGRRDMA_DEBIAN_MIRROR to the URL of one"),
        }
    }

    /// A deb822 source of `suite` in this archive.
    pub fn sources(&self, suite: &str) -> String {
        format!(
            "Types: deb\nURIs: {}\nSuites: {suite} {suite}-updates\nComponents: main\nSigned-By: {}\n",
            self.uri,
            self.keyring.display()
        )
    }
}

/// The archive itself, not its security or other companions.
fn looks_like_debian(uri: &str) -> bool {
    uri.trim_end_matches('/').ends_with("/debian")
}

/// URIs of one sources file, either format.
fn archive_uris(text: &str) -> Vec<String> {
    let mut out = Vec::new();
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("URIs:") {
            out.extend(rest.split_whitespace().map(str::to_owned));
        } else if line.starts_with("deb ") {
            out.extend(line.split_whitespace().find(|w| w.contains("://")).map(str::to_owned));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_main_archive_is_found_in_either_source_format() {
        let new = "Types: deb\n# note\nURIs: http://a.example/debian-security\n\nURIs: http://a.example/debian/\n";
        let old = "# c\ndeb [arch=amd64 signed-by=/k] http://b.example/debian trixie main\n";
        let pick = |t: &str| archive_uris(t).into_iter().find(|u| looks_like_debian(u));
        assert_eq!(pick(new).as_deref(), Some("http://a.example/debian/"));
        assert_eq!(pick(old).as_deref(), Some("http://b.example/debian"));
        assert_eq!(pick("deb http://c.example/apt x main"), None);
    }
}
