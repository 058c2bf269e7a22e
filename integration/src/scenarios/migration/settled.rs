//! Where a container is once everything has come to rest: what is asked after something was broken on purpose.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::stage::{Pair, Stage, tail};
use crate::lab::node::{self, Running};

/// From a fault until everything is in order again.
pub const ORDER: Duration = Duration::from_secs(150);

/// Where the container of the pair's moving end is after a migration towards `to` that something befell: the migration
/// ends by itself, one copy runs, where the migration said if it said so, and both ends go on.
pub fn after(stage: &mut Stage<'_>, pair: &Pair, running: &Running, to: &str) -> Result<&'static str> {
    let out = running.wait(ORDER)?;
    ensure!(!out.done.timed_out, "the migration did not end by itself:\n{}", tail(&out.text()));
    let place = settled(stage, &pair.client).with_context(|| tail(&(out.text() + &out.errors())))?;
    if out.success() {
        ensure!(place == to, "the migration succeeded, and the container runs on {place}");
    }
    if place == to {
        stage.moved(&pair.client, to)?;
    }
    // Traffic in both directions, for longer than what was held could last.
    stage.all_flow(&[&pair.client, &pair.server], 300)?;
    Ok(place)
}

const NODES: [&str; 3] = ["src", "dst", "peer"];

/// The one node that knows the container, once no host takes part in a migration any more.
pub fn settled(stage: &Stage<'_>, name: &str) -> Result<&'static str> {
    let until = Instant::now() + ORDER;
    loop {
        let asked = node::each(&NODES, |at| {
            let node = stage.ctx.node(at)?;
            Ok((node.exec(&["migrrdma", "state", name])?.success(), node.exec(&["migrrdma", "status", "--json"])?))
        })?;
        let mut known = Vec::new();
        let mut busy = Vec::new();
        for (node, (knows_it, out)) in NODES.into_iter().zip(asked) {
            if knows_it {
                known.push(node);
            }
            if !out.success() || takes_part(&out.text()) {
                busy.push(format!("{node}: {}{}", out.text(), out.errors()));
            }
        }
        match known.as_slice() {
            [at] if busy.is_empty() => return Ok(at),
            _ if Instant::now() < until => std::thread::sleep(Duration::from_millis(500)),
            _ => bail!("not settled after {ORDER:?}: {name} is known on {known:?}; {}", busy.join("\n")),
        }
    }
}

/// Whether an agent's status names a migration that is not over.
pub fn takes_part(status: &str) -> bool {
    let Ok(status) = serde_json::from_str::<serde_json::Value>(status) else { return true };
    status["migrations"].as_array().is_none_or(|list| !list.iter().all(|m| m["over"] == true))
}

#[cfg(test)]
mod tests {
    use super::takes_part;

    #[test]
    fn a_host_takes_part_until_all_it_names_is_over() {
        assert!(!takes_part(r#"{"migrations": []}"#) && !takes_part(r#"{"migrations": [{"over": true}]}"#));
        assert!(takes_part(r#"{"migrations": [{"over": true}, {"over": false}]}"#));
        assert!(takes_part("{}") && takes_part(""));
    }
}
