//! Which bundles are copies of each other: a small file in each of them with a number that all copies share.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::record::{RecordError, read_json, write_json};

/// Name of the file in a bundle. It is not copied: every host writes its own.
pub const FILE: &str = ".migrrdma-copy.json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Mark {
    version: u32,
    lineage: String,
}

/// What this bundle shares with its copies; `None` if it was never copied.
pub fn lineage(bundle: &Path) -> Result<Option<String>, RecordError> {
    Ok(read_json::<Mark>(&bundle.join(FILE))?.map(|mark| mark.lineage))
}

/// Marks a bundle.
pub fn set(bundle: &Path, lineage: &str) -> Result<(), RecordError> {
    write_json(&bundle.join(FILE), &Mark { version: 1, lineage: lineage.into() })
}
