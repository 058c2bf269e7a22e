//! The moving process stands still: control verbs wait since the suspension, queues of the NIC are not touched, and
//! there is no connection to the agent, because a dump cannot hold one.
//!
//! What ends it is the epoch file: its content changes when the agent wants to be connected to, on the source after a
//! rollback, on the destination after the restore. Watching it must hold no fd either (a dump would write it down), so
//! it is looked at by `stat`, and read only when something about it is new.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use rdma_virt::id::ObjId;

use super::session::{Migration, Refused};
use super::{drain, note, report, unread};
use crate::context::View;
use crate::readable::is_readable;
use crate::{readers, registry};

const EPOCH: &str = "/run/.migrrdma/epoch";

/// How often the file is looked at.
const STEP: Duration = Duration::from_millis(1);

/// Steps after which we connect anyhow: an agent that restarted may have forgotten the file. A process that is not
/// running takes no steps, so the time of a dump or on a disk does not count.
const PATIENCE: u32 = 120_000;

/// How long threads that have just read an event are waited for.
const READERS: Duration = Duration::from_millis(500);

/// What the moving process keeps for its arrival.
pub struct Frozen {
    /// What the application was told about each device.
    pub views: Vec<(ObjId, View)>,
    /// Channels with an event that the application has not read: it stays behind with the old kernel object.
    pub unread: Vec<ObjId>,
    /// Every QP knows that it has a new kernel object.
    pub made_anew: bool,
}

/// The epoch file at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    content: Option<String>,
    file: Option<(u64, u64, i64, i64, u64)>,
}

impl Epoch {
    pub fn now() -> Self {
        // Looked at before it is read: a change in between is then seen as one.
        let file = Self::file();
        Self { content: std::fs::read_to_string(EPOCH).ok(), file }
    }

    fn file() -> Option<(u64, u64, i64, i64, u64)> {
        std::fs::metadata(EPOCH).ok().map(|m| (m.dev(), m.ino(), m.mtime(), m.mtime_nsec(), m.size()))
    }

    /// Waits until the content is another.
    pub fn await_change(mut self) {
        for _ in 0..PATIENCE {
            if Self::file() != self.file {
                let now = Self::now();
                if now.content.is_some() && now.content != self.content {
                    return;
                }
                self.file = now.file;
            }
            std::thread::sleep(STEP);
        }
        note(|| format!("{EPOCH} did not change in {PATIENCE} steps; connecting again"));
    }
}

/// See [`rdma_virt::msg::Request::Freeze`]. What is reported then is not kept, and made by whoever sends it.
pub fn freeze(migration: &mut Migration) -> Result<(), Refused> {
    if !migration.moving {
        return Err(Refused::new("the process has not been suspended as a whole"));
    }
    if !migration.drained {
        return Err(Refused::new("the process has not been drained"));
    }
    if migration.frozen.is_none() {
        let mut views = Vec::new();
        for ctx in registry::contexts().iter().filter(|c| !c.is_dead()) {
            views.push((ctx.id, report::view(ctx)?));
            for srq in ctx.srqs().iter().filter(|s| !s.is_dead()) {
                srq.refresh_limit()
                    .map_err(|e| Refused::new(format!("the limit of SRQ {} cannot be asked for: {e}", srq.id.0)))?;
            }
        }
        for ctx in registry::contexts().iter().filter(|c| !c.is_dead()) {
            let cqs = ctx.cqs();
            // Flushes and the like that nobody waited for: they would stay behind in the old queue.
            drain::empty(&cqs);
            cqs.iter().filter(|c| !c.is_dead()).for_each(|c| c.set_frozen(true));
            ctx.srqs().iter().filter(|s| !s.is_dead()).for_each(|s| s.close());
        }
        // Nothing completes any more, so nobody takes an event after this.
        readers::close(Instant::now() + READERS, unread::keep_all);
        let channels = registry::contexts().into_iter().filter(|c| !c.is_dead()).flat_map(|c| c.channels());
        let unread = channels.filter(|c| !c.is_dead() && is_readable(c.fd())).map(|c| c.id).collect();
        migration.frozen = Some(Frozen { views, unread, made_anew: false });
    }
    Ok(())
}
