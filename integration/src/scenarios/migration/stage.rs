//! Containers on the lab's nodes, as a user would run and move them.
//!
//! Only commands a user has are used: `migrrdma run`, `migrate`, `logs`,
//! `wait`, `kill`, `delete`. What a scenario leaves is removed by
//! [`Stage::finish`]; after a failure the runner resets the nodes.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::lab::bundle::{self, BUNDLES, Bundle};
use crate::lab::node::{self, Node, Output, Running};
use crate::lab::wire::Exec;
use crate::scenario::Context;

/// Where the checker lies in a container.
pub const CHECKER: &str = "/usr/local/bin/rdma-checker";
/// Longest time one migration may take before it counts as hanging.
const MIGRATION: Duration = Duration::from_secs(180);
/// Longest time for a container to say something.
const PATIENCE: Duration = Duration::from_secs(90);

/// One container and where it is.
#[derive(Debug)]
struct Actor {
    name: String,
    at: String,
    homes: Vec<String>,
}

/// The containers of one scenario.
#[derive(Debug)]
pub struct Stage<'a> {
    /// Nodes, notes, allowances.
    pub ctx: &'a mut Context,
    cast: Vec<Actor>,
    annotations: Vec<(String, String)>,
}

impl<'a> Stage<'a> {
    /// An empty stage.
    pub fn new(ctx: &'a mut Context) -> Self {
        let mut stage = Self { ctx, cast: Vec::new(), annotations: Vec::new() };
        // To run every scenario that way.
        if std::env::var_os("MIGRRDMA_MEMORY_IN_FILES").is_some() {
            stage.memory_in_files();
        }
        stage
    }

    /// Every container from now on has its registered memory in files.
    pub fn memory_in_files(&mut self) {
        self.annotations.push(("org.migrrdma.registered-memory".into(), "files".into()));
    }

    /// Prepares a container's bundle on every node of `homes`, and starts it on the first.
    ///
    /// `host` is the last part of its address in 10.20.0.0/24.
    pub fn run(&mut self, name: &str, host: u8, homes: &[&str], command: &[&str]) -> Result<()> {
        self.prepare(name, host, homes, command)?;
        let dir = format!("{BUNDLES}/{name}");
        let node = self.node_of(name)?;
        node.check(&["migrrdma", "run", "--detach", "--supervise", "--bundle", &dir, name])
            .with_context(|| format!("start {name} on {}", node.name()))
            .map(drop)
    }

    /// As [`Stage::run`], and starts nothing.
    pub fn prepare(&mut self, name: &str, host: u8, homes: &[&str], command: &[&str]) -> Result<()> {
        let checker = self.ctx.target.join("release/rdma-checker");
        let copies = if command.iter().any(|word| word.contains(CHECKER)) {
            ensure!(checker.exists(), "{} is missing: run `cargo build --release -p rdma-checker`", checker.display());
            vec![(checker, CHECKER.to_owned())]
        } else {
            vec![]
        };
        let bundle = Bundle {
            name: name.to_owned(),
            ip: Some(format!("10.20.0.{host}/24")),
            copies,
            annotations: self.annotations.clone(),
            command: command.iter().map(ToString::to_string).collect(),
            ..Bundle::default()
        };
        let make = |home: &&str| {
            bundle.make(self.ctx.node(home)?).with_context(|| format!("bundle of {name} on {home}")).map(drop)
        };
        node::each(homes, make)?;
        let start = homes.first().context("a container needs a home")?;
        self.cast.push(Actor {
            name: name.to_owned(),
            at: (*start).to_owned(),
            homes: homes.iter().map(ToString::to_string).collect(),
        });
        Ok(())
    }

    fn actor(&self, name: &str) -> Result<&Actor> {
        self.cast.iter().find(|a| a.name == name).with_context(|| format!("no container called {name}"))
    }

    /// The node a container is on.
    pub fn node_of(&self, name: &str) -> Result<&Node> {
        self.ctx.node(&self.actor(name)?.at)
    }

    /// What a container has written so far.
    pub fn log(&self, name: &str) -> Result<String> {
        let out = self.node_of(name)?.exec(&["migrrdma", "logs", name])?;
        ensure!(out.success(), "logs of {name}: {}", out.errors());
        Ok(out.text() + &out.errors())
    }

    /// Waits until `done` of a container's output.
    pub fn wait_log(&self, name: &str, what: &str, done: impl Fn(&str) -> bool) -> Result<()> {
        let start = Instant::now();
        loop {
            let text = self.log(name)?;
            if done(&text) {
                return Ok(());
            }
            if start.elapsed() > PATIENCE.min(self.ctx.remaining()) {
                bail!("{name} on {}: no {what} within {PATIENCE:?}; it said:\n{}", self.actor(name)?.at, tail(&text));
            }
            if let Some(r) = result(&text) {
                bail!("{name} ended while waiting for {what}: {r}");
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Waits until a checker has done `ops` more operations, seen from now on.
    pub fn flow(&self, name: &str, ops: u64) -> Result<()> {
        self.all_flow(&[name], ops)
    }

    /// Waits until each of these checkers has done `ops` more operations, seen from now on.
    pub fn all_flow(&self, names: &[&str], ops: u64) -> Result<()> {
        let before = node::each(names, |name| self.log(name).map(|text| progress(&text).unwrap_or(0)))?;
        for (name, before) in names.iter().zip(before) {
            self.wait_log(name, "progress", |t| progress(t).is_some_and(|n| n >= before + ops))?;
        }
        Ok(())
    }

    /// Starts `migrrdma migrate` and leaves it running.
    pub fn begin_migration(&self, name: &str, to: &str, options: &[&str]) -> Result<Running> {
        let ip = self.ctx.node(to)?.spec.rdma_ip();
        let mut argv = vec!["migrrdma", "migrate", name, "--to", &ip, "--json"];
        argv.extend(options);
        self.node_of(name)?.spawn(&argv)
    }

    /// Runs `migrrdma migrate` to its end, whatever that is.
    pub fn try_migrate(&self, name: &str, to: &str, options: &[&str]) -> Result<Output> {
        let ip = self.ctx.node(to)?.spec.rdma_ip();
        let mut argv: Vec<String> = ["migrrdma", "migrate", name, "--to", &ip, "--json"].map(str::to_owned).to_vec();
        argv.extend(options.iter().map(ToString::to_string));
        self.node_of(name)?.run(Exec { argv, timeout_ms: Some(MIGRATION.as_millis() as u64), ..Exec::default() })
    }

    /// Moves a container; the summary of the migration.
    pub fn migrate(&mut self, name: &str, to: &str) -> Result<Value> {
        self.migrate_with(name, to, &[])
    }

    /// Moves a container whose processes make their objects again by themselves.
    pub fn migrate_by_rebuild(&mut self, name: &str, to: &str) -> Result<()> {
        let summary = self.migrate_with(name, to, &["--hand-over", "rebuild"])?;
        ensure!(summary["hand_over"] == "rebuild", "{name} was moved by another hand-over than asked for: {summary}");
        Ok(())
    }

    /// As [`Stage::migrate`], with further options of `migrrdma migrate`.
    pub fn migrate_with(&mut self, name: &str, to: &str, options: &[&str]) -> Result<Value> {
        let out = self.try_migrate(name, to, options)?;
        let from = self.actor(name)?.at.clone();
        if !out.success() {
            // What the containers say is worth more than the runtime's view.
            let said = self.log(name).unwrap_or_default();
            bail!(
                "migration of {name} {from} → {to} ended with status {}: {}\n{}\n{name} said: {}",
                out.status(),
                out.errors(),
                tail(&out.text()),
                tail(&said)
            );
        }
        self.moved(name, to)?;
        let done = json_lines(&out.text()).filter(|v| v["event"] == "done").last();
        let summary = done.context("the migration printed no summary")?["summary"].clone();
        if let Some(s) = summary["pause_seconds"].as_f64() {
            self.ctx.note(format!("{name} {from}→{to}: pause {:.0} ms: {}", s * 1000.0, spans(&summary)));
        }
        Ok(summary)
    }

    /// Moves a container together with its bundle.
    pub fn carry(&mut self, name: &str, to: &str) -> Result<()> {
        let out = self.try_migrate(name, to, &["--copy-rootfs"])?;
        ensure!(out.success(), "{name} was not carried to {to}: {}\n{}", out.errors(), tail(&out.text()));
        let done = json_lines(&out.text()).filter(|v| v["event"] == "done").last();
        let summary = done.context("the migration printed no summary")?["summary"].clone();
        let copy = summary["spans"].as_array().and_then(|s| s.iter().find(|s| s["phase"] == "copy").cloned());
        let took = copy.and_then(|s| s["seconds"].as_f64()).context("nothing was copied")?;
        let pause = summary["frozen_seconds"].as_f64().unwrap_or(0.0);
        self.ctx.note(format!("{name} → {to}: copied in {took:.1} s, frozen for {:.0} ms", pause * 1000.0));
        self.moved(name, to)
    }

    /// Takes over a container that was started by other means.
    pub fn adopt(&mut self, name: &str, at: &str, homes: &[&str]) {
        let homes = homes.iter().map(ToString::to_string).collect();
        self.cast.push(Actor { name: name.to_owned(), at: at.to_owned(), homes });
    }

    /// Notes that a migration started by other means has succeeded.
    pub fn moved(&mut self, name: &str, to: &str) -> Result<()> {
        let actor = self.cast.iter_mut().find(|a| a.name == name).with_context(|| format!("no {name}"))?;
        actor.at = to.to_owned();
        Ok(())
    }

    /// Asks a container to end in its own time.
    pub fn terminate(&self, name: &str) -> Result<()> {
        self.node_of(name)?.check(&["migrrdma", "kill", name, "TERM"]).map(drop)
    }

    /// Waits for a container's end, which must be with status 0. Returns its output.
    pub fn ended(&self, name: &str) -> Result<String> {
        let argv = ["migrrdma", "wait", "--timeout", "150", name].map(str::to_owned).to_vec();
        let out = self.node_of(name)?.run(Exec { argv, timeout_ms: Some(160_000), ..Exec::default() })?;
        let text = self.log(name)?;
        ensure!(
            out.success(),
            "{name} on {} ended with status {} {}; it said:\n{}",
            self.actor(name)?.at,
            out.text().trim(),
            out.errors(),
            tail(&text)
        );
        Ok(text)
    }

    /// Waits for a checker's end and its verdict, which must be that nothing was wrong.
    pub fn verdict(&mut self, name: &str) -> Result<Value> {
        let text = self.ended(name)?;
        let r = result(&text).with_context(|| format!("{name} printed no result:\n{}", tail(&text)))?;
        ensure!(r["ok"] == true, "{name} found: {}", r["errors"]);
        let busy = r["ops"].as_u64().unwrap_or(0);
        ensure!(busy > 0, "{name} checked nothing: {r}");
        Ok(r)
    }

    /// Removes containers, bundles and what is kept of them.
    pub fn finish(self) -> Result<()> {
        let clear = |node: &&Node| {
            for actor in self.cast.iter().filter(|a| a.homes.iter().any(|h| h == node.name())) {
                // Where it is not, there is nothing to delete.
                let _ = node.exec(&["migrrdma", "delete", "--force", &actor.name])?;
                bundle::remove(node, &actor.name)
                    .with_context(|| format!("remove {} from {}", actor.name, node.name()))?;
                // Output and exit status outlive a container on purpose.
                node.check(&["rm", "-rf", &format!("/var/lib/migrrdma/containers/{}", actor.name)])?;
            }
            Ok(())
        };
        node::each(&self.ctx.nodes(), clear).map(drop)
    }
}

/// A client and a server of the checker, loading each other.
#[derive(Debug)]
pub struct Pair {
    /// Name of the client's container.
    pub client: String,
    /// Name of the server's container.
    pub server: String,
}

impl Pair {
    /// Starts both; the client's load is given in its own options. Returns when both are connected and busy.
    pub fn start(stage: &mut Stage, tag: u8, client: &[&str], server: &[&str], load: &[&str]) -> Result<Pair> {
        let pair = Pair { client: format!("ck-client{tag}"), server: format!("ck-server{tag}") };
        let (sh, ch) = (120 + 2 * tag, 121 + 2 * tag);
        let address = format!("10.20.0.{sh}");
        let mut command = vec![CHECKER, "server", "--progress", "2"];
        // What both ends have to be told.
        for option in ["--processes", "--stamp-ms"] {
            command.extend(load.iter().position(|o| *o == option).map(|i| &load[i..i + 2]).unwrap_or_default());
        }
        stage.run(&pair.server, sh, server, &command)?;
        stage.wait_log(&pair.server, "listening", |t| t.contains("listening"))?;
        let mut command = vec![CHECKER, "client", "--connect", &address, "--duration", "0", "--progress", "1"];
        command.extend(load);
        stage.run(&pair.client, ch, client, &command)?;
        stage.wait_log(&pair.client, "connection", |t| t.contains("\"running\""))?;
        stage.flow(&pair.client, 200)?;
        Ok(pair)
    }

    /// Ends both gracefully; both must find nothing wrong.
    pub fn judge(&self, stage: &mut Stage) -> Result<()> {
        stage.terminate(&self.client)?;
        let client = stage.verdict(&self.client)?;
        let server = stage.verdict(&self.server)?;
        let number = |v: &Value, k: &str| v[k].as_u64().unwrap_or(0);
        stage.ctx.note(format!(
            "checked {} + {} operations; peer's longest standstill {} ms",
            number(&client, "ops"),
            number(&server, "ops"),
            server["max_gap_ms"].as_f64().unwrap_or(0.0).round()
        ));
        for (sent, received) in [(&client, &server), (&server, &client)] {
            ensure!(
                number(sent, "sent") == number(received, "received"),
                "{} messages sent, {} received",
                number(sent, "sent"),
                number(received, "received")
            );
        }
        Ok(())
    }
}

/// One way of moving a container: [`Stage::migrate`], or with the other hand-over.
pub type Move = fn(&mut Stage<'_>, &str, &str) -> Result<()>;

/// As [`Stage::migrate`].
pub fn plainly(stage: &mut Stage<'_>, name: &str, to: &str) -> Result<()> {
    stage.migrate(name, to).map(drop)
}

/// As [`Stage::migrate_by_rebuild`].
pub fn by_rebuild(stage: &mut Stage<'_>, name: &str, to: &str) -> Result<()> {
    stage.migrate_by_rebuild(name, to)
}

/// Moves the client of a pair along `path` under a load; both ends are judged.
pub fn client_moves(ctx: &mut Context, path: &[&str], load: &[&str], by: Move) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src", "dst"], &["peer"], load)?;
    for to in path {
        by(&mut stage, &pair.client, to)?;
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

/// Moves a container there and back that is connected to nobody but itself.
pub fn alone_moves(ctx: &mut Context, role: &str, by: Move) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let name = "ck-alone";
    let command = [CHECKER, role, "--duration", "0", "--qps", "2", "--progress", "1"];
    stage.run(name, 140, &["src", "dst"], &command)?;
    stage.flow(name, 200)?;
    for to in ["dst", "src"] {
        by(&mut stage, name, to)?;
        stage.flow(name, 200)?;
    }
    stage.terminate(name)?;
    stage.verdict(name)?;
    stage.finish()
}

/// What each phase took, in milliseconds.
fn spans(summary: &Value) -> String {
    let one = |span: &Value| {
        let (phase, seconds) = (span["phase"].as_str()?, span["seconds"].as_f64()?);
        Some(format!("{phase} {:.0}", seconds * 1000.0))
    };
    summary["spans"].as_array().into_iter().flatten().filter_map(one).collect::<Vec<_>>().join(", ")
}

/// JSON objects among the lines of a text, prefixes left out.
pub fn json_lines(text: &str) -> impl Iterator<Item = Value> + '_ {
    text.lines().filter_map(|l| serde_json::from_str(l.get(l.find('{')?..)?).ok())
}

fn result(text: &str) -> Option<Value> {
    json_lines(text).filter(|v| v["event"] == "result").last()
}

/// Operations in the last progress line.
fn progress(text: &str) -> Option<u64> {
    json_lines(text).filter(|v| v["event"] == "progress").last()?["ops"].as_u64()
}

/// The last lines of a text.
pub fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_progress_and_the_result_are_found_among_other_lines() {
        let text = "noise\n{\"event\":\"progress\",\"ops\":5}\n2026 stdout F {\"event\":\"progress\",\"ops\":9}\n\
                    {\"event\":\"result\",\"ok\":true}\n{broken";
        assert_eq!(progress(text), Some(9));
        assert_eq!(result(text).map(|r| r["ok"] == true), Some(true));
        assert_eq!(result("nothing"), None);
    }
}
