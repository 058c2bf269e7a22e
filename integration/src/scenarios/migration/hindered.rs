//! A migration that something makes impossible before its commit: it is undone while the cause is there, and once it is
//! gone the next one goes through.

use std::time::Duration;

use anyhow::Result;

use super::stage::{Pair, Stage};
use super::undone::{later, undone};
use crate::scenario::Context;

/// Something that makes a migration impossible from some phase on.
pub struct Hindrance<'a> {
    /// Where.
    pub node: &'a str,
    /// When: as this phase begins.
    pub phase: &'a str,
    /// The command that brings it about,
    pub begin: &'a str,
    /// and the one that ends it.
    pub end: &'a str,
    /// All of them are in the message.
    pub words: &'a [&'a str],
}

/// From `src` to `dst`, with the other end on `peer`.
pub fn hindered(ctx: &mut Context, h: &Hindrance<'_>) -> Result<()> {
    let mut stage = Stage::new(ctx);
    // What is begun as pre-setup begins is to be there before suspension, and takes a second or two on an emulated node.
    // Memory that goes ahead makes it long enough.
    let load: &[&str] = if h.phase == "pre-setup" {
        stage.memory_in_files();
        &["--qps", "2", "--registered", "32"]
    } else {
        &["--qps", "2"]
    };
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], load)?;
    let running = stage.begin_migration(&pair.client, "dst", &[])?;
    running.wait_for(&format!("\"enter\",\"phase\":\"{}\"", h.phase), Duration::from_secs(120))?;
    stage.ctx.node(h.node)?.sh(h.begin)?;
    // It ends by itself, while the cause is there.
    let out = running.wait(Duration::from_secs(240));
    stage.ctx.node(h.node)?.sh(h.end)?;
    undone(&stage, &pair, &out?, &[h.words, &["undone"]].concat())?;
    later(stage, &pair)
}
