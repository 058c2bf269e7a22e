//! Rounds of pre-copy: memory that goes over while the container runs is not copied inside the pause, and what it wrote
//! meanwhile comes along all the same.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::stage::{CHECKER, Pair, Stage};
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);
const MIB: u64 = 1 << 20;

/// Claims about pre-copy.
pub const CLAIMS: &[Scenario] = &[
    Scenario {
        name: "memory that does not change goes over before the pause, and what changes meanwhile comes along",
        long: false,
        limit: LIMIT,
        run: most_goes_ahead,
    },
    Scenario {
        name: "a pause that cannot be kept as short as asked is refused before it begins, and the container goes on",
        long: true,
        limit: LIMIT,
        run: too_much_to_ask,
    },
    Scenario {
        name: "rounds of pre-copy under full load disturb no traffic",
        long: true,
        limit: LIMIT,
        run: under_load,
    },
];

fn number(summary: &Value, key: &str) -> u64 {
    summary[key].as_u64().unwrap_or(0)
}

/// Two containers that hold memory, write to it and know what they wrote last.
fn holders(stage: &mut Stage, memory: &str, touch: &str) -> Result<Pair> {
    let pair = Pair { client: "ck-holder".into(), server: "ck-holder-far".into() };
    stage.run(&pair.server, 150, &["peer"], &[CHECKER, "hold"])?;
    stage.wait_log(&pair.server, "listening", |t| t.contains("listening"))?;
    let command = [CHECKER, "hold", "--connect", "10.20.0.150", "--memory", memory, "--touch", touch];
    stage.run(&pair.client, 151, &["src", "dst"], &command)?;
    stage.wait_log(&pair.client, "memory", |t| t.contains("\"running\""))?;
    Ok(pair)
}

fn end(mut stage: Stage, pair: &Pair) -> Result<()> {
    stage.terminate(&pair.client)?;
    stage.verdict(&pair.client)?;
    stage.verdict(&pair.server)?;
    stage.finish()
}

fn most_goes_ahead(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = holders(&mut stage, "96", "200")?;
    for to in ["dst", "src"] {
        let summary = stage.migrate(&pair.client, to)?;
        let (before, inside) = (number(&summary, "pre_copied_bytes"), number(&summary, "image_bytes"));
        stage.ctx.note(format!(
            "{} MiB in {} rounds, {} MiB inside the pause",
            before / MIB,
            number(&summary, "pre_copy_rounds"),
            inside / MIB
        ));
        ensure!(before > 96 * MIB, "only {before} bytes went ahead of 96 MiB: {summary}");
        ensure!(inside < 32 * MIB, "{inside} bytes were left for the pause: {summary}");
        stage.flow(&pair.client, 3)?;
    }
    end(stage, &pair)
}

fn too_much_to_ask(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    // All of it changes all the time.
    let pair = holders(&mut stage, "64", "60000")?;
    let out = stage.try_migrate(&pair.client, "dst", &["--max-blackout", "20"])?;
    let said = out.errors() + &out.text();
    ensure!(!out.success(), "64 MiB were copied in 20 ms:\n{said}");
    ensure!(said.contains("--max-blackout") && said.contains("pre-copy"), "the reason is not told:\n{said}");
    stage.flow(&pair.client, 3)?;
    stage.migrate(&pair.client, "dst")?;
    stage.flow(&pair.client, 3)?;
    end(stage, &pair)
}

fn under_load(ctx: &mut Context) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], &["--qps", "4"])?;
    for to in ["dst", "src", "dst"] {
        // A goal makes rounds pay even for so little memory.
        let summary = stage.migrate_with(&pair.client, to, &["--max-blackout", "60000"])?;
        ensure!(number(&summary, "pre_copy_rounds") > 0, "nothing went ahead: {summary}");
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}
