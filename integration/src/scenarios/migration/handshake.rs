//! Moves that fall between the two ends of a connection being connected: one end knows its peer already, the other does
//! not know of it yet.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::stage::{CHECKER, Pair, Stage, tail};
use crate::scenario::{Context, Scenario};

macro_rules! claim {
    ($name:literal, $run:expr) => {
        Scenario { name: $name, long: false, limit: Duration::from_secs(400), run: $run }
    };
}

/// Claims about connections in the making.
pub const CLAIMS: &[Scenario] = &[
    claim!("a container whose peer has connected first moves once it is connected, too, and nothing is lost", |c| {
        half_open(c, "ck-client0", "dst")
    }),
    claim!("a container that has connected first moves while its peer has not, and nothing is lost", |c| {
        half_open(c, "ck-server0", "dst")
    }),
];

/// The client connects so late, seconds: long enough for a move to begin.
const LATE: &str = "15";

fn half_open(ctx: &mut Context, moves: &str, to: &str) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair { client: "ck-client0".into(), server: "ck-server0".into() };
    stage.run(&pair.server, 120, &["peer", "dst"], &[CHECKER, "server", "--progress", "2"])?;
    stage.wait_log(&pair.server, "listening", |t| t.contains("listening"))?;
    let client = [CHECKER, "client", "--connect", "10.20.0.120", "--qps", "4", "--duration", "0", "--progress", "1"];
    let late = ["--connect-late", LATE];
    stage.run(&pair.client, 121, &["src", "dst"], &[&client[..], &late[..]].concat())?;
    stage.wait_log(&pair.client, "exchange", |t| t.contains("exchanged"))?;
    ensure!(!stage.log(&pair.client)?.contains("\"running\""), "the client has connected too early");
    let out = stage.try_migrate(moves, to, &[])?;
    ensure!(out.success(), "{}\n{}", out.errors(), tail(&out.text()));
    stage.ctx.note(if out.text().contains("in the making") { "it waited for the connection" } else { "at once" });
    stage.moved(moves, to)?;
    stage.flow(&pair.client, 300).context("the client")?;
    stage.flow(&pair.server, 300).context("the server")?;
    pair.judge(&mut stage)?;
    stage.finish()
}
