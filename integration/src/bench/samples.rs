//! Finished measurements, one line of JSON each, appended as they come: what an interrupted run leaves is used by the
//! next one.
//!
//! A measurement belongs to the binaries it was made with, by a key over their bytes; those of other builds stay in
//! the file and are not looked at.

use super::plan::Item;
use super::statistics;
use crate::demo::picture;
use crate::lab::paths::content_key;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Raised when what is measured changes.
const FORM: u64 = 2;

/// What is counted rather than timed. What could not be counted is absent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counts {
    /// Mappings of the container's processes before the move: what CRIU walks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mappings: Option<u64>,
    /// Bytes of image that went to the destination inside the pause.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transferred_bytes: Option<u64>,
    /// Bytes that went there before it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pre_copied_bytes: Option<u64>,
    /// Calls of the driver inside the pause, on the destination and on the peers' host: `dst qp` → 3, `peer qp` → 3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_calls_in_pause: Option<BTreeMap<String, u64>>,
    /// Instructions that source and destination executed in turn inside the pause ([`super::instructions`]).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instructions: Option<u64>,
}

impl Counts {
    /// Kernel objects made inside the pause on all hosts.
    pub fn made_in_pause(&self) -> Option<u64> {
        let made = |name: &&String| !name.ends_with(super::counts::MODIFY);
        self.driver_calls_in_pause.as_ref().map(|c| c.iter().filter(|(n, _)| made(n)).map(|(_, v)| v).sum())
    }
}

/// What the other end saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct OtherEnd {
    /// Longest time without a completion around the move, milliseconds.
    pub gap_ms: f64,
    /// The same in the undisturbed seconds before.
    pub normal_ms: f64,
    /// Operations per second in the undisturbed seconds before.
    pub ops_before: f64,
    /// Operations per second from the begin of the move to the pause.
    pub ops_during: f64,
    /// Megabytes per second around the move, for the picture.
    #[serde(default)]
    pub timeline: Vec<picture::Sample>,
}

impl OtherEnd {
    /// What the move adds to the normal gap, milliseconds.
    pub fn extra_ms(&self) -> f64 {
        (self.gap_ms - self.normal_ms).max(0.0)
    }
}

/// What one move has shown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Longest time between two stamps of the container's stamp thread, milliseconds, offset of the hosts' clocks
    /// taken out.
    pub gap_ms: f64,
    /// Largest error of that by the clocks, milliseconds.
    pub clock_error_ms: f64,
    /// How far the destination's clock was ahead, milliseconds.
    pub clock_ahead_ms: f64,
    /// With RDMA only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_end: Option<OtherEnd>,
    #[serde(default)]
    pub counts: Counts,
    /// As `migrrdma migrate` printed it; of plain runc, its own three steps.
    #[serde(default)]
    pub summary: Value,
}

/// What one measurement has shown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Every move, in order.
    pub moves: Vec<Seen>,
}

impl Measured {
    /// The move that does not count where there are others: the first one, of a container that was just started and not
    /// restored.
    pub fn apart(&self) -> Option<&Seen> {
        self.moves.first().filter(|_| self.moves.len() > 1)
    }

    /// The moves that count.
    pub fn counted(&self) -> &[Seen] {
        &self.moves[usize::from(self.apart().is_some())..]
    }

    /// Median of something over the moves that count and have it.
    pub fn median(&self, of: impl Fn(&Seen) -> Option<f64>) -> Option<f64> {
        statistics::median(&self.counted().iter().filter_map(of).collect::<Vec<_>>())
    }

    /// The largest of something in any move.
    pub fn most(&self, of: impl Fn(&Seen) -> Option<u64>) -> Option<u64> {
        self.moves.iter().filter_map(of).max()
    }
}

/// One line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Build and load it belongs to.
    pub key: String,
    #[serde(flatten)]
    pub item: Item,
    /// When it was done, seconds since 1970.
    pub at: f64,
    /// How long it took in all, seconds.
    pub took: f64,
    /// What it showed, or why it failed.
    pub outcome: Result<Measured, String>,
}

/// The file.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    key: String,
    /// Of this key, last one of each measurement.
    pub samples: Vec<Sample>,
    /// Measurements of other builds or loads in the file.
    pub foreign: usize,
}

impl Store {
    /// Opens the file, which need not exist. A last line that was cut is as if it were not there.
    pub fn open(path: &Path, key: &str) -> Result<Store> {
        let text = match fs::read(path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(|| format!("read {}", path.display())),
        };
        let mut store = Store { path: path.to_owned(), key: key.to_owned(), samples: Vec::new(), foreign: 0 };
        for line in text.lines() {
            match serde_json::from_str::<Sample>(line) {
                Ok(sample) if sample.key == key => store.keep(sample),
                Ok(_) => store.foreign += 1,
                Err(_) => {}
            }
        }
        Ok(store)
    }

    fn keep(&mut self, sample: Sample) {
        self.samples.retain(|s| s.item != sample.item);
        self.samples.push(sample);
    }

    /// Whether a measurement is done; one that failed is not.
    pub fn has(&self, item: &Item) -> bool {
        self.samples.iter().any(|s| s.item == *item && s.outcome.is_ok())
    }

    /// Appends one finished measurement; it is on the disk when this returns.
    pub fn append(&mut self, item: Item, took: f64, outcome: Result<Measured, String>) -> Result<()> {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
        let sample = Sample { key: self.key.clone(), item, at: now.as_secs_f64(), took, outcome };
        let mut line = serde_json::to_string(&sample)?;
        line.push('\n');
        let write = || -> std::io::Result<()> {
            if let Some(dir) = self.path.parent() {
                fs::create_dir_all(dir)?;
            }
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(&self.path)?;
            if !ends_whole(&self.path)? {
                file.write_all(b"\n")?;
            }
            file.write_all(line.as_bytes())?;
            file.sync_data()
        };
        write().with_context(|| format!("write {}", self.path.display()))?;
        self.keep(sample);
        Ok(())
    }

    /// Those that succeeded.
    pub fn good(&self) -> impl Iterator<Item = (&Item, &Measured)> {
        self.samples.iter().filter_map(|s| Some((&s.item, s.outcome.as_ref().ok()?)))
    }
}

/// Whether a file ends with a whole line: a run that was killed may have left half of one.
fn ends_whole(path: &Path) -> std::io::Result<bool> {
    let bytes = fs::read(path)?;
    Ok(bytes.last().is_none_or(|b| *b == b'\n'))
}

/// Key of a build and a load.
pub fn key(binaries: &[PathBuf], load: &str) -> Result<String> {
    let mut parts = vec![FORM.to_le_bytes().to_vec(), load.as_bytes().to_vec()];
    for path in binaries {
        parts.push(fs::read(path).with_context(|| format!("{} is not built", path.display()))?);
    }
    Ok(content_key(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>()))
}

#[cfg(test)]
mod tests {
    use super::super::plan::{Cell, Variant};
    use super::*;

    fn item(round: u32) -> Item {
        Item { round, variant: Variant::B, cell: Cell { qps: 8, registered: 16, peers: 1 }, nth: 0 }
    }

    /// A directory of its own that is removed again.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let dir = std::env::temp_dir().join(format!("migrrdma-bench-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            Scratch(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_run_goes_on_where_an_interrupted_one_stopped() {
        let scratch = Scratch::new("goes-on");
        let path = scratch.0.join("samples.jsonl");
        let mut first = Store::open(&path, "k").unwrap();
        first.append(item(0), 1.0, Ok(Measured::default())).unwrap();
        first.append(item(1), 1.0, Err("the node went away".into())).unwrap();
        // Killed in the middle of a line.
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"key\":\"k\",\"rou").unwrap();

        let mut second = Store::open(&path, "k").unwrap();
        assert!(second.has(&item(0)) && !second.has(&item(1)) && !second.has(&item(2)));
        second.append(item(1), 1.0, Ok(Measured::default())).unwrap();
        let third = Store::open(&path, "k").unwrap();
        assert!(third.has(&item(0)) && third.has(&item(1)));
        assert_eq!(third.good().count(), 2);
    }

    #[test]
    fn measurements_of_another_build_are_not_mixed_in() {
        let scratch = Scratch::new("builds");
        let path = scratch.0.join("samples.jsonl");
        Store::open(&path, "old").unwrap().append(item(0), 1.0, Ok(Measured::default())).unwrap();
        let new = Store::open(&path, "new").unwrap();
        assert!(!new.has(&item(0)));
        assert_eq!(new.foreign, 1);
    }

    #[test]
    fn a_key_depends_on_the_binaries_and_the_load() {
        let scratch = Scratch::new("key");
        fs::create_dir_all(&scratch.0).unwrap();
        let file = scratch.0.join("binary");
        fs::write(&file, "one").unwrap();
        let one = key(std::slice::from_ref(&file), "rate 1").unwrap();
        assert_eq!(one, key(std::slice::from_ref(&file), "rate 1").unwrap());
        assert_ne!(one, key(std::slice::from_ref(&file), "rate 2").unwrap());
        fs::write(&file, "two").unwrap();
        assert_ne!(one, key(&[file], "rate 1").unwrap());
    }

    #[test]
    fn the_first_move_counts_only_if_it_is_the_only_one() {
        let of = |gaps: &[f64]| {
            let moves = gaps.iter().map(|&gap_ms| Seen { gap_ms, ..Seen::default() }).collect();
            Measured { moves }.median(|s| Some(s.gap_ms))
        };
        assert_eq!(of(&[90.0, 10.0, 30.0, 20.0]), Some(20.0));
        assert_eq!(of(&[90.0, 10.0, 20.0]), Some(15.0));
        assert_eq!((of(&[90.0]), of(&[])), (Some(90.0), None));
    }

    #[test]
    fn the_most_of_any_move_is_told_the_first_one_included() {
        let seen = |n| Seen { counts: Counts { mappings: n, ..Counts::default() }, ..Seen::default() };
        let measured = Measured { moves: vec![seen(Some(9)), seen(None), seen(Some(3))] };
        assert_eq!(measured.most(|s| s.counts.mappings), Some(9));
    }

    #[test]
    fn objects_made_are_told_from_objects_changed() {
        let calls = [("dst qp", 3), ("peer qp", 2), ("dst modify-qp", 9)];
        let calls = calls.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
        let counts = Counts { driver_calls_in_pause: Some(calls), ..Counts::default() };
        assert_eq!(counts.made_in_pause(), Some(5));
        assert_eq!(Counts::default().made_in_pause(), None);
    }
}
