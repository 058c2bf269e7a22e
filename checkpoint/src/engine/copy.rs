//! The container's bundle on its way to a destination that has none: whole before the pause, while the container runs,
//! and inside the pause what it changed since. What the source side does; the destination's is in [`super::landing`].

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::source::{Run, Stop, confused};
use crate::agent::admin::Event;
use crate::net::msg::{Answer, CopyOffer, Order, PIECE};
use crate::phase::Phase;
use crate::tree::list::{Listing, Node, list};
use crate::tree::{mark, pack};

/// For one piece, and for the destination's work on the last one.
const PATIENCE: Duration = Duration::from_secs(120);

/// What was copied, to be compared with what there is in the pause.
#[derive(Debug)]
pub(super) struct Copied {
    inner: PathBuf,
    listing: Listing,
}

impl Run<'_> {
    /// Looks what there is to copy, and says so to the destination.
    pub(super) fn survey(&mut self) -> Result<Option<CopyOffer>, String> {
        if !self.request.copy_rootfs {
            return Ok(None);
        }
        let bundle = self.container().map_err(|e| e.to_string())?.bundle.clone();
        let rootfs = self.world.host().rootfs(&bundle).map_err(|e| e.to_string())?;
        let inner = inside(&bundle, &rootfs)?;
        let listing = list(&bundle, &inner).map_err(|e| format!("the bundle cannot be read: {e}"))?;
        let known = mark::lineage(&bundle).map_err(|e| crate::agent::chain(&e))?;
        let lineage = known.unwrap_or_else(|| self.id.to_string());
        let offer = CopyOffer { lineage, bytes: listing.bytes() };
        self.copied = Some(Copied { inner, listing });
        Ok(Some(offer))
    }

    /// Everything, while the container goes on.
    pub(super) fn copy(&mut self) -> Result<(), Stop> {
        let Some(Copied { inner, listing }) = self.copied.take() else { return Ok(()) };
        let bundle = self.container()?.bundle.clone();
        if mark::lineage(&bundle).ok().flatten().is_none() {
            mark::set(&bundle, &self.id.to_string()).map_err(|e| Stop::Failed(crate::agent::chain(&e)))?;
        }
        let order = Order::TreeStart { whole: true, gone: Vec::new() };
        self.tree_order(order)?;
        let nodes = listing.nodes.iter().map(|(path, node)| (path.as_path(), node));
        self.stream(&bundle, nodes, Phase::Copy, listing.bytes(), true)?;
        let answer = self.tree_order(Order::TreeEnd)?;
        self.copied = Some(Copied { inner, listing });
        match answer {
            Answer::Offered { problems } if problems.is_empty() => Ok(()),
            Answer::Offered { problems } => {
                Err(Stop::Refused(problems.into_iter().map(|p| format!("on the destination: {p}")).collect()))
            }
            _ => Err(confused("the destination", "tree")),
        }
    }

    /// What changed since, now that the container stands still.
    pub(super) fn copy_changes(&mut self) -> Result<(), Stop> {
        let Some(Copied { inner, listing }) = self.copied.take() else { return Ok(()) };
        let bundle = self.container()?.bundle.clone();
        let now = list(&bundle, &inner).map_err(|e| Stop::Failed(format!("the bundle cannot be read: {e}")))?;
        let (changed, gone) = listing.changes(&now);
        if changed.is_empty() && gone.is_empty() {
            return Ok(());
        }
        let bytes = changed.iter().map(|(_, node)| node.size).sum();
        self.note(format!("{} files changed since they were copied, {} KiB", changed.len(), bytes >> 10));
        let gone = gone.iter().map(|path| std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).to_vec()).collect();
        self.tree_order(Order::TreeStart { whole: false, gone })?;
        self.stream(&bundle, changed.into_iter(), Phase::Transfer, bytes, false)?;
        match self.tree_order(Order::TreeEnd)? {
            Answer::Done => Ok(()),
            _ => Err(confused("the destination", "tree")),
        }
    }

    fn tree_order(&self, order: Order) -> Result<Answer, Stop> {
        self.ask_destination(order, PATIENCE)
    }

    fn stream<'n>(
        &self,
        bundle: &Path,
        nodes: impl Iterator<Item = (&'n Path, &'n Node)>,
        phase: Phase,
        total: u64,
        running: bool,
    ) -> Result<(), Stop> {
        let mut pieces = Pieces { run: self, phase, total, done: 0, buffer: Vec::with_capacity(PIECE), why: None };
        match pack::pack(bundle, nodes, &mut pieces, running) {
            Ok(()) => Ok(()),
            Err(e) => Err(pieces.why.unwrap_or_else(|| Stop::Failed(format!("copying the bundle: {e}")))),
        }
    }
}

/// Where the root file system lies in the bundle.
fn inside(bundle: &Path, rootfs: &Path) -> Result<PathBuf, String> {
    let real = |path: &Path| path.canonicalize().map_err(|e| format!("{}: {e}", path.display()));
    let (bundle, rootfs) = (real(bundle)?, real(rootfs)?);
    match rootfs.strip_prefix(&bundle) {
        Ok(inner) if !inner.as_os_str().is_empty() => Ok(inner.to_owned()),
        _ => Err(format!(
            "the root file system {} does not lie in the bundle {}, and --copy-rootfs copies the bundle only; have it \
             on the destination and leave --copy-rootfs out",
            rootfs.display(),
            bundle.display()
        )),
    }
}

/// Sends what is written, in pieces.
struct Pieces<'r, 'w> {
    run: &'r Run<'w>,
    phase: Phase,
    total: u64,
    done: u64,
    buffer: Vec<u8>,
    /// What happened, when a write failed.
    why: Option<Stop>,
}

impl Pieces<'_, '_> {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        self.done += bytes.len() as u64;
        let sent = self.run.wanted().and_then(|()| self.run.tree_order(Order::TreePiece { bytes }));
        if let Err(stop) = sent {
            self.why = Some(stop);
            return Err(io::Error::other("the destination did not take it"));
        }
        let (phase, total) = (self.phase, self.total.max(self.done));
        self.run.progress.event(Event::Progress { phase, done: self.done, total, unit: "bytes".into() });
        Ok(())
    }
}

impl Write for Pieces<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(PIECE - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..n]);
        if self.buffer.len() >= PIECE {
            self.send()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_root_file_system_in_its_bundle_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (bundle, other) = (dir.path().join("b"), dir.path().join("image"));
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        std::fs::create_dir(&other).unwrap();
        std::os::unix::fs::symlink(&other, bundle.join("elsewhere")).unwrap();
        assert_eq!(inside(&bundle, &bundle.join("rootfs")), Ok("rootfs".into()));
        for outside in [other, bundle.join("elsewhere"), bundle.join("../image"), bundle.clone()] {
            assert!(inside(&bundle, &outside).unwrap_err().contains("--copy-rootfs"), "{}", outside.display());
        }
    }
}
