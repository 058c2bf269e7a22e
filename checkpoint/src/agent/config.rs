//! `/etc/migrrdma/agent.json`: everything an agent can be told. Every field has a default; an unknown one is an error,
//! because a misspelt setting that is silently ignored is worse.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::net::tls::TlsFiles;

/// Where the file lies unless told otherwise.
pub const PATH: &str = "/etc/migrrdma/agent.json";

/// Port agents listen on unless told otherwise.
pub const PORT: u16 = 7477;

/// Settings of one agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this host in messages; its host name if empty.
    pub name: String,
    /// `address:port` to listen on for other agents.
    pub listen: String,
    pub tls: TlsFiles,
    /// Agents' addresses for GIDs that are not addresses of their hosts: `{"fe80::1": "10.0.0.2:7477"}`.
    pub gid_map: BTreeMap<IpAddr, String>,
    /// Agents to ask when a GID says nothing about its host (link-local ones), or when the agent there is silent and a
    /// container may have left that host. Those met in a migration are asked as well.
    pub agents: Vec<String>,
    /// `address:port` where anybody may fetch the metrics over plain HTTP; nowhere if absent.
    pub metrics: Option<SocketAddr>,
    /// What must survive a reboot.
    pub state_dir: PathBuf,
    /// Sockets and what is shared with containers.
    pub run_dir: PathBuf,
    pub deadlines: Deadlines,
    /// A container that left for a host which cannot be reached any more is remembered for so many days.
    pub forget_moved_days: u64,
}

/// Longest waits, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Deadlines {
    /// A short answer of a shim or of another agent.
    pub answer: u64,
    /// An agent that is asked something says every two seconds that it is at work; one that does not is given up after
    /// so long.
    pub silence: u64,
    /// Until everything in flight has completed.
    pub drain: u64,
    /// Until the destination has restored the container.
    pub restore: u64,
    /// Until restored processes have their connections to the agent again.
    pub reconnect: u64,
    /// After commit: keep trying to reach everybody.
    pub forward: u64,
    /// Another migration that holds the container, or one of its peers, is waited for.
    pub busy: u64,
    /// A peer whose source cannot be reached gives up waiting.
    pub orphan: u64,
    /// After a pre-dump: until the checkpoint it prepares; and a partial restore until the restore.
    pub session: u64,
    /// After a checkpoint: peers wait so long for the image to be restored.
    pub parked: u64,
}

impl Default for Deadlines {
    fn default() -> Self {
        Deadlines {
            answer: 30,
            silence: 20,
            drain: 10,
            restore: 120,
            reconnect: 30,
            forward: 300,
            busy: 300,
            orphan: 600,
            session: 600,
            parked: 600,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            name: String::new(),
            listen: format!("0.0.0.0:{PORT}"),
            tls: TlsFiles::default(),
            gid_map: BTreeMap::new(),
            agents: Vec::new(),
            metrics: None,
            state_dir: "/var/lib/migrrdma".into(),
            run_dir: "/run/migrrdma-agent".into(),
            deadlines: Deadlines::default(),
            forget_moved_days: 30,
        }
    }
}

/// A settings file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read {}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{} is not a valid configuration", .path.display())]
    Form { path: PathBuf, source: serde_json::Error },
}

impl Config {
    /// Reads `path`. A file that does not exist means defaults only if it was not asked for by name.
    pub fn load(path: Option<&Path>) -> Result<Self, ConfigError> {
        let file = path.unwrap_or(Path::new(PATH));
        let mut config: Config = match std::fs::read_to_string(file) {
            Ok(text) => {
                serde_json::from_str(&text).map_err(|source| ConfigError::Form { path: file.into(), source })?
            }
            Err(e) if path.is_none() && e.kind() == std::io::ErrorKind::NotFound => Config::default(),
            Err(source) => return Err(ConfigError::Read { path: file.into(), source }),
        };
        if config.name.is_empty() {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            config.name = if name.trim().is_empty() { "this host".into() } else { name.trim().into() };
        }
        Ok(config)
    }

    /// The port this agent listens on; also the one others are expected on.
    pub fn port(&self) -> u16 {
        self.listen.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).unwrap_or(PORT)
    }

    /// The admin socket.
    pub fn admin(&self) -> PathBuf {
        self.run_dir.join("admin.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_setting_is_an_error_and_a_missing_default_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.json");
        std::fs::write(&path, r#"{"listn": "0.0.0.0:1"}"#).unwrap();
        assert!(matches!(Config::load(Some(&path)), Err(ConfigError::Form { .. })));
        std::fs::write(&path, r#"{"listen": "0.0.0.0:1", "gid_map": {"fe80::1": "a:2"}}"#).unwrap();
        assert_eq!(Config::load(Some(&path)).unwrap().port(), 1);
        std::fs::write(&path, r#"{"metrics": "127.0.0.1:9464"}"#).unwrap();
        assert_eq!(Config::load(Some(&path)).unwrap().metrics, Some(SocketAddr::from(([127, 0, 0, 1], 9464))));
        std::fs::write(&path, r#"{"metrics": "9464"}"#).unwrap();
        assert!(matches!(Config::load(Some(&path)), Err(ConfigError::Form { .. })));
        assert_eq!(Config::default().metrics, None);
        assert!(matches!(Config::load(Some(&dir.path().join("none"))), Err(ConfigError::Read { .. })));
    }

    #[test]
    fn the_promises_name_every_deadline_with_its_default() {
        let text = include_str!("../../PROMISES.md");
        let serde_json::Value::Object(all) = serde_json::to_value(Deadlines::default()).unwrap() else { panic!() };
        for (name, seconds) in all {
            assert!(text.contains(&format!("| `{name}` | {seconds} |")), "{name} = {seconds} s is not in PROMISES.md");
        }
    }
}
