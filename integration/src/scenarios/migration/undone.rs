//! What a migration that failed before its commit leaves: everything as it was, a message that says why, and the way
//! open for the next one.

use anyhow::{Context as _, Result, ensure};

use super::stage::{Pair, Stage, tail};
use crate::lab::node::Output;

/// The migration failed by itself, its message has all of `words`, and the client of the pair runs on at the source.
pub fn undone(stage: &Stage<'_>, pair: &Pair, out: &Output, words: &[&str]) -> Result<()> {
    let text = out.text() + &out.errors();
    ensure!(!out.success(), "the migration succeeded: the fault came too late or was not seen:\n{}", tail(&text));
    ensure!(!out.done.timed_out, "the migration did not end by itself:\n{}", tail(&text));
    let said = out.errors().to_lowercase();
    ensure!(words.iter().all(|w| said.contains(w)), "the message names not all of {words:?}: {said}");
    let state = stage.node_of(&pair.client)?.check(&["migrrdma", "state", &pair.client])?;
    let state: serde_json::Value = serde_json::from_str(&state).context("state")?;
    ensure!(state["status"] == "running", "the source's container is {}", state["status"]);
    // Traffic in both directions, for longer than what was held could last.
    stage.all_flow(&[&pair.client, &pair.server], 300)
}

/// After a failure: one that succeeds, then the verdicts.
pub fn later(mut stage: Stage<'_>, pair: &Pair) -> Result<()> {
    stage.migrate(&pair.client, "dst").context("a later migration")?;
    stage.flow(&pair.client, 200)?;
    pair.judge(&mut stage)?;
    stage.finish()
}
