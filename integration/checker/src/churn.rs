//! A thread that makes and destroys objects beside the load, as programs do that register memory
//! for every message or open connections all the time.

use crate::rig::{Local, Rig};
use crate::verbs::{Context, Cq, Memory, Mr, Qp};
use anyhow::{Context as _, Result, bail};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

/// Makes and destroys until the rig stops.
pub fn run(rig: &Arc<Rig>, local: &Local) {
    if let Err(e) = churn(rig, local) {
        rig.failures.add(format!("churn: {e:#}"));
    }
}

fn churn(rig: &Arc<Rig>, local: &Local) -> Result<()> {
    // Mappings are for ever here, so one piece of memory serves all rounds.
    let memory = Memory::map(64 << 10, 0)?;
    let context = Context::open(local.device.as_deref())?;
    let pd = context.alloc_pd()?;
    let options = rig.small_qp();
    while !rig.stop.load(SeqCst) {
        let mr = Mr::register(&pd, &memory, true, false).context("register")?;
        let cq = Cq::create(&context, 16, None, 0).context("make a CQ")?;
        let (qp, _) = Qp::create(&pd, &cq, &cq, None, &options).context("make a QP")?;
        // Connected to itself, so that all states are passed through.
        let own = crate::verbs::Endpoint {
            qpn: qp.qpn(),
            psn: 1,
            gid: context.gid(rig.port, i32::from(rig.gid_index))?,
            lid: 0,
        };
        qp.connect(1, &own, &options).context("connect to itself")?;
        if qp.query()?.state != 3 {
            bail!("a QP brought to RTS is not in RTS");
        }
        qp.destroy().context("destroy a QP")?;
        cq.destroy().context("destroy a CQ")?;
        mr.dereg().context("deregister")?;
        rig.stats.churned.fetch_add(1, Relaxed);
        std::thread::sleep(Duration::from_millis(5));
    }
    pd.dealloc()?;
    context.close()?;
    Ok(())
}
