//! A host that containers have left is switched off. What they had shown of it, GIDs and QP numbers, stays valid: for those
//! who are connected, and for those who connect later and ask its agent in vain.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::perftest::{CLIENT, SERVER, SERVER_IP, listening};
use super::stage::{Pair, Stage};
use crate::lab::standstill::Standstill;
use crate::lab::topology::NodeSpec;
use crate::scenario::fabric::QP_TIMEOUT;
use crate::scenario::{Context, Scenario};

/// Claims about hosts that are off.
pub const CLAIMS: &[Scenario] = &[Scenario {
    name: "a host that containers have left is switched off: their traffic goes on, and who connects anew finds them",
    long: true,
    limit: Duration::from_secs(300),
    run: switched_off,
}];

const PROGRAM: [&str; 6] = ["ib_write_bw", "-F", "-u", QP_TIMEOUT, "-D", "5"];

/// As perftest shows the GID of the host that is off.
const SHOWN: &str = "255:255:10:10:00:01";

fn switched_off(ctx: &mut Context) -> Result<()> {
    let mut off = Standstill::of(NodeSpec::by_name("src")?)?;
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    // It waits for its client with an open device and no QP: nobody is told of its move but the two hosts.
    stage.run(SERVER, 160, &["src", "dst"], &PROGRAM)?;
    listening(&stage, SERVER)?;
    stage.migrate(SERVER, "dst")?;
    stage.migrate(&pair.client, "dst")?;
    off.begin()?;
    stage.all_flow(&[&pair.client, &pair.server], 300).context("with the old host switched off")?;
    stage.run(CLIENT, 161, &["peer"], &[&PROGRAM[..], &[SERVER_IP]].concat())?;
    for name in [CLIENT, SERVER] {
        let text = stage.ended(name)?;
        ensure!(text.contains("#bytes"), "{name} ended with status 0 and without a result:\n{text}");
        ensure!(text.contains(SHOWN), "{name} does not show the GID of the host that is off:\n{text}");
    }
    off.end()?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}
