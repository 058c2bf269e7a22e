//! Dump, transfer, restore: the container's image on its way. Until the end CRIU on this host holds the tasks at its
//! last gate and waits for the verdict.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::host::{DumpJob, HostError};
use super::precopy;
use super::source::{Run, Stop, confused};
use crate::agent::LOCAL;
use crate::image::{self, ImagedProcess, RdmaImage, Secret, SourceDevice, SourceGid};
use crate::net::msg::{Answer, Order};
use crate::phase::Phase;

/// How often a long wait looks whether somebody wants to stop.
const LOOK: Duration = Duration::from_millis(50);

type Verdict = Result<(), String>;

/// CRIU at its last gate, in a thread of its own. Dropped, it is refused.
#[derive(Debug)]
pub struct Dump {
    verdict: SyncSender<Verdict>,
    thread: JoinHandle<Result<(), HostError>>,
}

impl Dump {
    /// The tasks go on (frozen as they are). Returns when CRIU has let go of them.
    pub fn refuse(self, why: &str) -> Result<(), String> {
        // A dump that failed by itself waits for nothing; its error was told already.
        let _ = self.verdict.send(Err(why.into()));
        match self.thread.join() {
            Ok(_) => Ok(()),
            Err(_) => Err("its thread panicked".into()),
        }
    }

    /// The tasks end. Returns when they have.
    pub fn accept(self) -> Result<(), String> {
        let _ = self.verdict.send(Ok(()));
        match self.thread.join() {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(e.to_string()),
            Err(_) => Err("its thread panicked".into()),
        }
    }
}

impl Run<'_> {
    /// Writes our own image, then has CRIU write its.
    pub(super) fn dump(&mut self) -> Result<(), Stop> {
        let base = self.world.config().state_dir.join("outgoing").join(self.id.to_string());
        let (images, work) = (base.join("images"), base.join("work"));
        self.effects.images = Some(base);
        for dir in [&images, &work] {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|e| Stop::Failed(format!("cannot make {}: {e}", dir.display())))?;
        }
        if !self.states.is_empty() {
            let image = self.rdma_image();
            image::write_unflushed(&images, &image).map_err(|e| Stop::Failed(crate::agent::chain(&e)))?;
        }
        self.voyage = Some(self.embark(0)?);
        self.hold_dump(DumpJob { images, work, parent: precopy::parent(self.rounds) })
    }

    /// Has CRIU dump up to its last gate.
    pub(super) fn hold_dump(&mut self, job: DumpJob) -> Result<(), Stop> {
        let (reached_tx, reached) = channel();
        let (verdict, verdict_rx) = sync_channel::<Verdict>(1);
        let (host, container, images) = (self.world.host(), self.container()?.clone(), job.images.clone());
        let run = move || {
            let mut gate = || {
                let _ = reached_tx.send(());
                // Without a verdict (this migration's thread is gone) the tasks stay.
                verdict_rx.recv().unwrap_or_else(|_| Err("the migration ended without a decision".into()))
            };
            host.dump(&container, &job, &mut gate)
        };
        let thread = thread::Builder::new().name("dump".into()).spawn(run);
        let thread = thread.map_err(|e| Stop::Failed(format!("no thread for the dump: {e}")))?;
        self.effects.dump = Some(Dump { verdict, thread });
        self.wait_for_gate(&reached, &images)
    }

    fn wait_for_gate(&mut self, reached: &Receiver<()>, images: &Path) -> Result<(), Stop> {
        loop {
            if let Some(mut voyage) = self.voyage.take() {
                self.send_grown(&mut voyage, images, Phase::Dump)?;
                self.voyage = Some(voyage);
            }
            match reached.recv_timeout(LOOK) {
                Ok(()) => return Ok(()),
                // CRIU cannot be told to stop in the middle; its verdict will be the refusal.
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let ended = self.effects.dump.take().map(|d| d.thread.join());
                    return Err(Stop::Failed(match ended {
                        Some(Ok(Err(e))) => e.to_string(),
                        Some(Ok(Ok(()))) => "CRIU ended without asking whether it may".into(),
                        _ => "the dump's thread panicked".into(),
                    }));
                }
            }
        }
    }

    pub(super) fn rdma_image(&self) -> RdmaImage {
        RdmaImage {
            generation: 1,
            secret: Secret(secret()),
            container: self.request.container.clone(),
            hand_over: self.hand_over,
            host: self.world.config().name.clone(),
            devices: self
                .devices
                .iter()
                .map(|d| SourceDevice {
                    name: d.name.clone(),
                    driver: d.driver.clone(),
                    node_guid: 0,
                    gids: d
                        .gids
                        .iter()
                        .map(|g| SourceGid { port: g.port, index: g.index, gid: g.gid, kind: g.kind })
                        .collect(),
                })
                .collect(),
            processes: self
                .states
                .iter()
                .map(|s| ImagedProcess {
                    state: s.clone(),
                    host_pid: self.pids.get(&s.vpid).copied().unwrap_or_default(),
                })
                .collect(),
            session: None,
        }
    }

    /// Streams the image's files.
    pub(super) fn transfer(&mut self) -> Result<(), Stop> {
        self.copy_changes()?;
        let Some(images) = self.effects.images.as_ref().map(|base| base.join("images")) else {
            return Err(Stop::Failed("there is no image".into()));
        };
        let voyage = match self.voyage.take() {
            Some(voyage) => voyage,
            None => self.embark(0)?,
        };
        let sent = self.send_rest(voyage, &images, Phase::Transfer)?;
        self.bytes = sent.bytes;
        self.sent += sent;
        Ok(())
    }

    /// The destination restores up to its last gate. From its answer on it keeps everything until it knows the
    /// decision.
    pub(super) fn restore(&mut self) -> Result<(), Stop> {
        let files = self.sent.files;
        let deadline = Duration::from_secs(self.world.config().deadlines.restore) + self.answer_time();
        // Of a restore by command this host has the record.
        let onward = match self.to == LOCAL {
            true => Vec::new(),
            false => self.onward().to_bytes().map_err(Stop::Failed)?,
        };
        let restored = thread::scope(|scope| {
            // Nothing changes any more that the decision has to know; to write it down takes time that is there now.
            let ready = (self.to != LOCAL).then(|| scope.spawn(|| self.make_ready(&self.decision())));
            let restored = self.ask_destination(Order::Restore { files, onward }, deadline);
            let ready = ready.map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))).transpose();
            restored.and_then(|answer| Ok((answer, ready?)))
        });
        match restored? {
            (Answer::Done, ready) => {
                self.ready = ready;
                Ok(())
            }
            _ => Err(confused("the destination", "restore")),
        }
    }
}

fn secret() -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&super::forward::random());
    bytes[16..].copy_from_slice(&super::forward::random());
    bytes
}
