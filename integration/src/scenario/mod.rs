//! Running scenarios: claims about the project, each proved on real kernels.
//!
//! A scenario is a name, which is its claim, a time limit and a function. The
//! runner gives each one clean nodes, and holds each one to three things it
//! need not check itself: every node afterwards holds what it held before
//! ([`crate::census`]), no link dropped or reordered anything
//! ([`crate::link_health`]), and nobody waits for ever. There is no way to
//! skip: a scenario that cannot run fails.

pub mod fabric;
mod report;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::census::NodeCensus;
use crate::lab::node::{self, Node};
use crate::lab::paths::Paths;
use crate::lab::{Lab, deploy};
use crate::link_health::LinkHealth;
pub use report::{Outcome, Tally};

/// How long late reaping may take before a leftover counts.
const SETTLE: Duration = Duration::from_secs(15);

/// Environment variable: file the tally is also written to, as JSON.
pub const RESULTS_ENV: &str = "MIGRRDMA_RESULTS";

/// A claim and how it is proved.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// The claim, as a sentence.
    pub name: &'static str,
    /// Run with `--all` only.
    pub long: bool,
    /// Hard limit for [`Scenario::run`].
    pub limit: Duration,
    /// The proof; an error refutes the claim.
    pub run: fn(&mut Context) -> Result<()>,
}

/// What a scenario works with.
#[derive(Debug)]
pub struct Context {
    /// Source of migrations.
    pub src: Node,
    /// Destination of migrations; unlike the others on purpose.
    pub dst: Node,
    /// Host of the peers.
    pub peer: Node,
    /// Workspace root on the build machine.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
    deadline: Instant,
    allowed: Vec<String>,
    notes: Vec<String>,
}

impl Context {
    /// The nodes of a lab that is up, for so long.
    pub fn new(lab: &Lab, limit: Duration) -> Result<Context> {
        Ok(Context {
            src: lab.node("src")?,
            dst: lab.node("dst")?,
            peer: lab.node("peer")?,
            root: lab.paths().root.clone(),
            target: lab.paths().target.clone(),
            deadline: Instant::now() + limit,
            allowed: Vec::new(),
            notes: Vec::new(),
        })
    }

    /// A node by name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        match name {
            "src" => Ok(&self.src),
            "dst" => Ok(&self.dst),
            "peer" => Ok(&self.peer),
            other => bail!("no node called {other:?}"),
        }
    }

    /// All three nodes.
    pub fn nodes(&self) -> [&Node; 3] {
        [&self.src, &self.dst, &self.peer]
    }

    /// Time left before the scenario's limit.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Adds a remark to the result table, such as a measured number.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// Declares that a link counter may move in this scenario, which breaks
    /// something on purpose. Names as in `rdma statistic show`.
    pub fn allow_counter(&mut self, name: &str) {
        self.allowed.push(name.to_owned());
    }
}

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Include the long scenarios.
    pub all: bool,
    /// Run only names that contain one of these; everything when empty.
    pub filters: Vec<String>,
    /// Print the names and run nothing.
    pub list: bool,
    /// Leave the lab up at the end.
    pub keep: bool,
}

impl Options {
    /// Reads `[--all] [--list] [--keep] [FILTER]…`.
    pub fn from_args(args: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options::default();
        for arg in args {
            match arg.as_str() {
                "--all" => options.all = true,
                "--list" => options.list = true,
                "--keep" => options.keep = true,
                flag if flag.starts_with('-') => {
                    bail!("unknown option {flag}; there are --all, --list and --keep")
                }
                filter => options.filters.push(filter.to_owned()),
            }
        }
        Ok(options)
    }

    fn wants(&self, s: &Scenario) -> bool {
        let named = self.filters.iter().any(|f| s.name.contains(f.as_str()));
        // A long one that is asked for by name is wanted.
        if self.filters.is_empty() { self.all || !s.long } else { named }
    }
}

/// Runs scenarios on a lab of their own and prints the results.
pub fn run(groups: &[&[Scenario]], options: &Options) -> Result<Tally> {
    let wanted: Vec<Scenario> = groups.iter().flat_map(|g| g.iter()).filter(|s| options.wants(s)).copied().collect();
    if wanted.is_empty() {
        bail!("no scenario matches {:?}", options.filters);
    }
    if options.list {
        for s in &wanted {
            println!("{}", s.name);
        }
        return Ok(Tally::default());
    }
    let _alone = sole_user()?;
    let (lab, fresh) = Lab::up()?;
    let mut runner = Runner::new(lab, fresh)?;
    let mut tally = Tally::default();
    for (i, scenario) in wanted.iter().enumerate() {
        eprintln!("[{}/{}] {}", i + 1, wanted.len(), scenario.name);
        let outcome = runner.one(scenario)?;
        eprintln!("{}", outcome.line());
        tally.outcomes.push(outcome);
        // At every step, so that an interrupted run leaves what it has.
        tally.save()?;
    }
    drop(runner);
    if !options.keep {
        Lab::down()?;
    }
    tally.print();
    Ok(tally)
}

/// One run of scenarios per lab instance: each resets the nodes.
pub(crate) fn sole_user() -> Result<Flock<fs::File>> {
    let paths = Paths::new()?;
    fs::create_dir_all(paths.run())?;
    let file = fs::File::create(paths.run().join("scenarios.lock"))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| {
        anyhow::anyhow!(
            "scenarios are already running in the lab {:?}; wait for them, or set MIGRRDMA_LAB to another name",
            paths.instance
        )
    })
}

struct Runner {
    lab: Lab,
    clean: BTreeMap<&'static str, NodeCensus>,
    /// The last thing that was seen of the nodes is that they are clean.
    seen_clean: bool,
}

impl Runner {
    fn new(lab: Lab, fresh: bool) -> Result<Runner> {
        let mut runner = Runner { lab, clean: BTreeMap::new(), seen_clean: false };
        if fresh {
            runner.prepare()?;
        } else {
            runner.reset()?;
        }
        Ok(runner)
    }

    /// Fresh nodes, binaries on them, agents started, and what that is.
    fn reset(&mut self) -> Result<()> {
        self.lab.reset(&[])?;
        self.prepare()
    }

    fn prepare(&mut self) -> Result<()> {
        let missing = deploy::deploy(&self.lab)?;
        if !missing.is_empty() {
            bail!("not built: {}; run `cargo build --release --workspace`", missing.join(", "));
        }
        let nodes = self.lab.nodes()?;
        let counted = node::each(&nodes, NodeCensus::take)?;
        self.clean = nodes.iter().map(Node::name).zip(counted).collect();
        self.seen_clean = true;
        Ok(())
    }

    /// What differs from freshly prepared nodes; empty when they are clean.
    fn dirt(&self) -> Result<Vec<String>> {
        let of = |node: &Node| {
            let name = node.name();
            let clean = self.clean.get(name).with_context(|| format!("no census of {name}"))?;
            let changes = clean.changes(&NodeCensus::take(node)?);
            Ok(changes.iter().map(|c| format!("{name}: {c}")).collect::<Vec<_>>())
        };
        Ok(node::each(&self.lab.nodes()?, of)?.concat())
    }

    fn one(&mut self, scenario: &Scenario) -> Result<Outcome> {
        let start = Instant::now();
        let dirt = match std::mem::take(&mut self.seen_clean) {
            true => Vec::new(),
            false => self.dirt().unwrap_or_else(|e| vec![format!("{e:#}")]),
        };
        if !dirt.is_empty() {
            eprintln!("      nodes are reset first: {}", dirt.join("; "));
            self.reset().with_context(|| format!("clean nodes for {:?}", scenario.name))?;
        }
        let before = node::each(&self.lab.nodes()?, LinkHealth::take)?;

        let mut ctx = Context::new(&self.lab, scenario.limit)?;
        let (tx, rx) = mpsc::channel();
        let proof = scenario.run;
        let worker = thread::spawn(move || {
            let result = proof(&mut ctx);
            let _ = tx.send((result, ctx.allowed, ctx.notes));
        });
        let mut problems = Vec::new();
        let (mut allowed, mut notes) = (Vec::new(), Vec::new());
        match rx.recv_timeout(scenario.limit) {
            Ok((result, a, n)) => {
                (allowed, notes) = (a, n);
                if let Err(e) = result {
                    problems.push(format!("{e:#}"));
                }
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                problems.push(format!("not done within its limit of {:?}", scenario.limit));
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let said = worker.join().err();
                problems.push(format!("panicked: {}", panic_text(said)));
            }
        }
        self.inspect(&before, &allowed, &mut problems, &mut notes);
        if !problems.is_empty() {
            notes.push(format!("details in {}", report::keep_evidence(&self.lab, scenario.name)?.display()));
            // Also ends what a scenario past its limit is still waiting for.
            self.reset().context("clean up after a failed scenario")?;
        } else {
            self.seen_clean = true;
        }
        Ok(Outcome { name: scenario.name.to_owned(), problems, notes, seconds: start.elapsed().as_secs_f64() })
    }

    /// The checks that hold for every scenario.
    fn inspect(&self, before: &[LinkHealth], allowed: &[String], problems: &mut Vec<String>, notes: &mut Vec<String>) {
        // After a failure things lie about as a matter of course.
        let proved = problems.is_empty();
        let nodes = match self.lab.nodes() {
            Ok(nodes) => nodes,
            Err(e) => return problems.push(format!("{e:#}")),
        };
        let links = match node::each(&nodes, LinkHealth::take) {
            Ok(links) => links,
            Err(e) => return problems.push(format!("{e:#}")),
        };
        let retried = links.iter().zip(before).any(|(after, before)| before.retried(after));
        for ((node, before), after) in nodes.iter().zip(before).zip(&links) {
            let name = node.name();
            let bad = before.violations(after, allowed, retried);
            problems.extend(bad.iter().map(|v| format!("{name}: link: {v}")));
            notes.extend(before.remarks(after).iter().map(|r| format!("{name}: {r}")));
        }
        if !proved {
            return;
        }
        let left = |node: &Node| {
            let name = node.name();
            let clean = self.clean.get(name).with_context(|| format!("{name}: no census from before"))?;
            let changes = clean.settle(node, SETTLE)?;
            Ok(changes.iter().map(|c| format!("{name}: {c}")).collect::<Vec<_>>())
        };
        match node::each(&nodes, left) {
            Ok(left) => problems.extend(left.concat()),
            Err(e) => problems.push(format!("{e:#}")),
        }
    }
}

fn panic_text(payload: Option<Box<dyn std::any::Any + Send>>) -> String {
    match payload {
        Some(p) => match p.downcast::<String>() {
            Ok(text) => *text,
            Err(p) => p.downcast::<&str>().map_or_else(|_| "without a text".into(), |t| t.to_string()),
        },
        None => "without a text".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(name: &'static str, long: bool) -> Scenario {
        Scenario { name, long, limit: Duration::from_secs(1), run: |_| Ok(()) }
    }

    #[test]
    fn long_scenarios_run_with_all_or_when_named() {
        let options = |args: &[&str]| Options::from_args(args.iter().map(ToString::to_string)).expect("options");
        let (short, long) = (scenario("a b", false), scenario("c d", true));
        assert!(options(&[]).wants(&short) && !options(&[]).wants(&long));
        assert!(options(&["--all"]).wants(&long));
        assert!(options(&["c"]).wants(&long) && !options(&["c"]).wants(&short));
        assert!(Options::from_args(["--skip".to_owned()].into_iter()).is_err());
    }
}
