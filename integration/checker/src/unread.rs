//! Asynchronous events that nobody reads before the end of the run, and a thread that waits for one all the time.
//!
//! Then what was left has to be there: once, in order, with this program's own pointers, and announced by the descriptor.
//! What became of an object that is gone must not come, and what was reported once must not be reported again.

use crate::rig::{Local, Rig};
use crate::verbs::{
    AsyncEvent, Context, Cq, Endpoint, Memory, Mr, Pd, Qp, QpOptions, RecvBatch, SendBatch, Sge, Srq, Verb, Wr,
};
use anyhow::{Context as _, Result, bail, ensure};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest time for the device to do or report something.
const PATIENCE: Duration = Duration::from_secs(20);
/// So long a device that reports something too much gets for it.
const SILENCE: Duration = Duration::from_millis(200);
/// RECVs in the shared queue, and how many are few.
const RECVS: u32 = 4;
const MESSAGE: u32 = 64;

/// A device of its own, because its events must not be read by others.
struct Base {
    context: Arc<Context>,
    pd: Pd,
    cq: Cq,
    gid: [u8; 16],
    options: QpOptions,
}

impl Base {
    fn new(rig: &Rig, local: &Local) -> Result<Self> {
        let context = Arc::new(Context::open(local.device.as_deref())?);
        let pd = context.alloc_pd()?;
        let cq = Cq::create(&context, 32, None, 0)?;
        let gid = context.gid(rig.port, i32::from(rig.gid_index))?;
        Ok(Self { context, pd, cq, gid, options: rig.small_qp() })
    }

    fn qp(&self, srq: Option<&Srq>) -> Result<Qp> {
        let options = QpOptions { recvs: if srq.is_some() { 0 } else { self.options.recvs }, ..self.options };
        Ok(Qp::create(&self.pd, &self.cq, &self.cq, srq, &options).context("make a QP")?.0)
    }

    fn at(&self, qp: &Qp) -> Endpoint {
        Endpoint { qpn: qp.qpn(), psn: 1, gid: self.gid, lid: 0 }
    }

    /// One in RTS, connected to itself.
    fn connected(&self) -> Result<Qp> {
        let qp = self.qp(None)?;
        qp.connect(1, &self.at(&qp), &self.options).context("connect a QP to itself")?;
        Ok(qp)
    }

    /// Waits until `n` requests are completed, all well.
    fn complete(&self, n: usize) -> Result<()> {
        let (start, mut all) = (Instant::now(), Vec::new());
        while all.len() < n {
            self.cq.poll(&mut all)?;
            ensure!(start.elapsed() < PATIENCE, "{} of {n} requests completed within {PATIENCE:?}", all.len());
            std::thread::sleep(Duration::from_millis(1));
        }
        match all.iter().find(|wc| wc.status != 0) {
            Some(wc) => bail!("a request completed with: {}", wc.status_text()),
            None => Ok(()),
        }
    }

    fn close(self) -> Result<()> {
        self.cq.destroy()?;
        self.pd.dealloc()?;
        let Some(context) = Arc::into_inner(self.context) else { bail!("the device is still in use by a thread") };
        Ok(context.close()?)
    }
}

/// Two QPs, one of which receives from a shared queue.
struct Channel {
    from: Qp,
    to: Qp,
    srq: Srq,
    memory: Memory,
    mr: Mr,
}

impl Channel {
    fn new(base: &Base) -> Result<Self> {
        let srq = Srq::create(&base.pd, RECVS)?;
        let (from, to) = (base.qp(None)?, base.qp(Some(&srq))?);
        from.connect(1, &base.at(&to), &base.options)?;
        to.connect(1, &base.at(&from), &base.options)?;
        let memory = Memory::map(MESSAGE as usize, 0)?;
        let mr = Mr::register(&base.pd, &memory, false, false)?;
        let channel = Self { from, to, srq, memory, mr };
        let mut recvs = RecvBatch::default();
        (0..u64::from(RECVS)).for_each(|id| recvs.push(id, channel.sge()));
        recvs.post(&channel.to, Some(&channel.srq))?;
        Ok(channel)
    }

    fn sge(&self) -> Sge {
        Sge { addr: self.memory.addr(0), len: MESSAGE, lkey: self.mr.fields().lkey }
    }

    /// Uses one RECV up.
    fn use_one(&self, base: &Base) -> Result<()> {
        let sges = [self.sge(), Sge::default()];
        let mut sends = SendBatch::default();
        sends.push(&Wr { wr_id: 0, verb: Verb::Send(None), sges, signalled: true, inline: false, solicited: false });
        sends.post(&self.from)?;
        base.complete(2).context("a message to the shared queue")
    }

    fn destroy(self) -> Result<()> {
        self.from.destroy()?;
        self.to.destroy()?;
        self.srq.destroy()?;
        Ok(self.mr.dereg()?)
    }
}

/// What is left unread, and the thread that waits.
pub struct Unread {
    left: Base,
    /// Reported that they are drained, in this order, around the shared queue's event.
    drained: [Qp; 2],
    channel: Channel,
    /// Also reported it, and is destroyed before anybody reads that.
    gone: Qp,
    waits: Base,
    /// Its event has been read.
    read: Qp,
    /// Will have one in the end.
    late: Qp,
    waiter: Option<JoinHandle<Result<AsyncEvent>>>,
}

impl std::fmt::Debug for Unread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unread").finish_non_exhaustive()
    }
}

impl Unread {
    /// Has events raised that stay where they are.
    ///
    /// # Errors
    /// Naming what could not be made, or was not reported.
    pub fn leave(rig: &Rig, local: &Local) -> Result<Self> {
        let left = Base::new(rig, local)?;
        let drained = [left.connected()?, left.connected()?];
        let gone = left.connected()?;
        let channel = Channel::new(&left)?;
        drained[0].drain()?;
        ensure!(left.context.has_async_event(PATIENCE), "no event says that a send queue is drained");
        channel.srq.set_limit(RECVS)?;
        channel.use_one(&left)?;
        drained[1].drain()?;
        // One after the other, or they might come in another order.
        std::thread::sleep(SILENCE);
        gone.drain()?;
        std::thread::sleep(SILENCE);

        let waits = Base::new(rig, local)?;
        waits.context.block_on_events()?;
        let (read, late) = (waits.connected()?, waits.connected()?);
        read.drain()?;
        ensure!(waits.context.has_async_event(PATIENCE), "no event says that a send queue is drained");
        same(wait_for_one(&waits.context)?, AsyncEvent::SQ_DRAINED, read.address())?;
        Ok(Self { left, drained, channel, gone, waits, read, late, waiter: None })
    }

    /// Starts the thread that waits.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn wait(&mut self) -> Result<()> {
        let context = self.waits.context.clone();
        let thread = std::thread::Builder::new().name("async".into());
        self.waiter = Some(thread.spawn(move || wait_for_one(&context))?);
        Ok(())
    }

    /// Reads everything, compares it with what must be there, and destroys the objects. How many events there were.
    ///
    /// # Errors
    /// Naming the first difference.
    pub fn judge(self) -> Result<u64> {
        let Self { left, drained, channel, gone, waits, read, late, waiter } = self;
        gone.destroy().context("destroy a QP that nobody has read the event of")?;
        ensure!(left.context.has_async_event(PATIENCE), "the descriptor does not say that there are events");
        let due = [
            (AsyncEvent::SQ_DRAINED, drained[0].address()),
            (AsyncEvent::SRQ_LIMIT_REACHED, channel.srq.address()),
            (AsyncEvent::SQ_DRAINED, drained[1].address()),
        ];
        let found = take_all(&left.context);
        ensure!(found == due, "there are {}, not {}", list(&found), list(&due));

        // What was reported is over: fewer RECVs still are no event, and nothing is left to say.
        channel.use_one(&left)?;
        std::thread::sleep(SILENCE);
        let more = take_all(&left.context);
        ensure!(more.is_empty(), "events came once more: {}", list(&more));
        ensure!(!left.context.has_async_event(Duration::ZERO), "the descriptor says that there is another event");

        // And what happens anew is reported anew.
        drained[0].go_on()?;
        drained[0].drain()?;
        channel.srq.set_limit(RECVS)?;
        ensure!(left.context.has_async_event(PATIENCE), "no event says that a send queue is drained again");
        channel.use_one(&left)?;
        std::thread::sleep(SILENCE);
        let anew = take_all(&left.context);
        ensure!(anew == due[..2], "there are {} anew, not {}", list(&anew), list(&due[..2]));

        late.drain()?;
        if let Some(waiter) = waiter {
            let start = Instant::now();
            while !waiter.is_finished() {
                ensure!(start.elapsed() < PATIENCE, "the thread that waits for an event does not get it");
                std::thread::sleep(Duration::from_millis(5));
            }
            let Ok(event) = waiter.join() else { bail!("the thread that waits for an event panicked") };
            same(event?, AsyncEvent::SQ_DRAINED, late.address()).context("the thread that waits")?;
        }

        for qp in drained.into_iter().chain([read, late]) {
            qp.destroy().context("destroy a QP whose events are acknowledged")?;
        }
        channel.destroy()?;
        left.close()?;
        waits.close()?;
        Ok((due.len() + anew.len() + 1) as u64)
    }
}

type Found = (i32, u64);

/// Events about objects that are there now; others are the host's affair.
fn take_all(context: &Context) -> Vec<Found> {
    let events = std::iter::from_fn(|| context.async_event());
    events.filter(AsyncEvent::about_an_object).map(|e| (e.kind, e.element)).collect()
}

/// The next event about an object.
fn wait_for_one(context: &Context) -> Result<AsyncEvent> {
    loop {
        match context.next_async_event() {
            Ok(event) if event.about_an_object() => return Ok(event),
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).context("wait for an asynchronous event"),
        }
    }
}

fn same(event: AsyncEvent, kind: i32, element: u64) -> Result<()> {
    let (found, due) = ((event.kind, event.element), (kind, element));
    ensure!(found == due, "there is {}, not {}", list(&[found]), list(&[due]));
    Ok(())
}

fn list(events: &[Found]) -> String {
    let name =
        |(kind, element): &Found| format!("{} on {element:#x}", AsyncEvent { kind: *kind, element: 0 }.meaning().0);
    if events.is_empty() { "none".into() } else { events.iter().map(name).collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_event_and_one_about_another_object_are_named() {
        let event = |kind, element| AsyncEvent { kind, element };
        same(event(5, 0x10), AsyncEvent::SQ_DRAINED, 0x10).expect("the same");
        for wrong in [event(5, 0x20), event(15, 0x10)] {
            let said = same(wrong, AsyncEvent::SQ_DRAINED, 0x10).expect_err("another").to_string();
            assert!(said.contains(&list(&[(wrong.kind, wrong.element)])), "{said}");
            assert!(said.contains("SQ drained on 0x10"), "{said}");
        }
        assert_eq!(list(&[]), "none");
    }

    #[test]
    fn what_concerns_the_host_is_told_from_what_concerns_an_object() {
        let about: Vec<i32> = (0..20).filter(|kind| AsyncEvent { kind: *kind, element: 1 }.about_an_object()).collect();
        assert_eq!(about, [0, 1, 2, 3, 4, 5, 6, 7, 14, 15, 16]);
    }
}
