//! `cargo xtask`: the commands of the README and of the lab.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use integration::lab::bundle::{self, Bundle};
use integration::lab::node::shell_status;
use integration::lab::paths::Paths;
use integration::lab::topology::NodeSpec;
use integration::lab::wire::Exec;
use integration::lab::{Lab, deploy, guest};
use integration::{bench, demo, fuzz, scenario, scenarios, setup, soak, verdict};

#[derive(Parser)]
#[command(name = "xtask", bin_name = "cargo xtask", about = "Project tasks")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Three machines under QEMU: src, dst and peer
    #[command(subcommand)]
    Lab(LabTask),
    /// Run unit tests and the lab's scenarios
    Test {
        /// Include the long scenarios
        #[arg(long)]
        all: bool,
        /// Leave the lab up at the end
        #[arg(long)]
        keep: bool,
        /// Run only scenarios whose name contains this, and no unit tests
        filter: Vec<String>,
    },
    /// Move a container with RDMA traffic to another host and back, and show it
    Demo {
        /// QPs between the two containers
        #[arg(long, default_value_t = 4)]
        qps: u16,
    },
    /// Measure in the lab
    #[command(subcommand)]
    Bench(BenchTask),
    /// Move containers at random among the nodes while things go wrong, under the checker
    Soak(soak::Options),
    /// Feed everything that comes from outside with mutated bytes
    Fuzz(fuzz::Options),
    /// Install what building and the lab need
    Setup,
    /// Serve a node's control channel (runs inside the node)
    #[command(hide = true)]
    Guest,
    /// Run the lab's own scenarios without building anything
    #[command(hide = true)]
    Scenarios {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

#[derive(Subcommand)]
enum BenchTask {
    /// How long a moved container stands still: with RDMA and without, with pre-setup and without, and by plain runc
    Blackout(bench::Options),
}

#[derive(Subcommand)]
enum LabTask {
    /// Start the lab, install this project's binaries, start the agents
    Up,
    /// Run a command on a node; its exit status is passed through
    Exec {
        /// src, dst or peer
        node: String,
        /// End the command after this many seconds (status 124)
        #[arg(long)]
        timeout: Option<u64>,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Copy a file to REMOTE, or a directory's content into REMOTE
    Push { node: String, local: PathBuf, remote: String },
    /// Copy a file or a directory's content from a node
    Pull { node: String, remote: String, local: PathBuf },
    /// Make an OCI bundle /srv/lab/bundles/NAME on a node, without starting it
    Bundle {
        node: String,
        name: String,
        /// Address on the containers' network, as in 10.20.0.100/24
        #[arg(long)]
        ip: Option<String>,
        /// Local file or directory and its place in the container
        #[arg(long = "copy", value_name = "LOCAL:PATH", value_parser = copy_argument)]
        copies: Vec<(PathBuf, String)>,
        /// Added to the container's environment
        #[arg(long = "env", value_name = "KEY=VALUE", value_parser = pair)]
        env: Vec<(String, String)>,
        /// OCI annotation
        #[arg(long = "annotation", value_name = "KEY=VALUE", value_parser = pair)]
        annotations: Vec<(String, String)>,
        /// Leave the RDMA devices out
        #[arg(long)]
        no_rdma: bool,
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Remove a bundle made by `lab bundle`
    Unbundle { node: String, name: String },
    /// Build the release binaries and install them on the running nodes
    Deploy {
        /// Install what is already built
        #[arg(long)]
        no_build: bool,
    },
    /// Put nodes back to their freshly booted state
    Reset {
        /// src, dst, peer or all
        node: String,
    },
    /// Show a node's console and QEMU's complaints
    Log { node: String },
    /// What is running, and where
    Status,
    /// End the lab
    Down,
}

/// A lab's nodes outlive the command that started them, so whatever files that one was given (a lock, the writing end
/// of somebody's pipe) must not be handed on. Nothing of our own is open yet.
fn close_inherited_files() {
    let numbers = std::fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let numbers: Vec<i32> = numbers.filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for fd in numbers.into_iter().filter(|fd| *fd > 2) {
        // The one the list was read through is closed already.
        let _ = nix::unistd::close(fd);
    }
}

fn main() -> ExitCode {
    close_inherited_files();
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Test { all, keep, filter } => {
            let ok = verdict::run(&verdict::Options { all, keep, filters: filter })?;
            return Ok(if ok { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Task::Demo { qps } => {
            setup::ensure()?;
            let paths = Paths::new()?;
            deploy::build(&paths)?;
            let (lab, _) = Lab::up()?;
            install(&lab)?;
            demo::run(&lab, &demo::Options { qps, output: paths.target.join("demo") })?;
        }
        Task::Scenarios { args } => {
            let options = scenario::Options::from_args(args.into_iter())?;
            let mut groups = vec![scenario::fabric::FABRIC];
            groups.extend(scenarios::migration::GROUPS);
            groups.push(scenarios::bad_input::CLAIMS);
            let tally = scenario::run(&groups, &options)?;
            return Ok(if tally.failed() == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Task::Bench(BenchTask::Blackout(options)) => bench::run(&options)?,
        Task::Fuzz(options) => fuzz::run(&options)?,
        Task::Soak(options) => soak::run(&options)?,
        Task::Setup => setup::ensure()?,
        Task::Guest => guest::serve()?,
        Task::Lab(task) => return lab(task),
    }
    Ok(ExitCode::SUCCESS)
}

fn lab(task: LabTask) -> Result<ExitCode> {
    match task {
        LabTask::Up => {
            setup::ensure()?;
            let (lab, fresh) = Lab::up()?;
            if !fresh {
                eprintln!("lab: already up");
            }
            install(&lab)?;
        }
        LabTask::Exec { node, timeout, command } => {
            let done = Lab::attach()?.node(&node)?.run_attached(Exec {
                argv: command,
                timeout_ms: timeout.map(|s| s * 1000),
                ..Exec::default()
            })?;
            return Ok(ExitCode::from(shell_status(&done) as u8));
        }
        LabTask::Push { node, local, remote } => Lab::attach()?.node(&node)?.push(&local, &remote)?,
        LabTask::Pull { node, remote, local } => Lab::attach()?.node(&node)?.pull(&remote, &local)?,
        LabTask::Bundle { node, name, ip, copies, env, annotations, no_rdma, command } => {
            let bundle = Bundle { name, ip, copies, env, annotations, no_rdma, command };
            println!("{}", bundle.make(&Lab::attach()?.node(&node)?)?);
        }
        LabTask::Unbundle { node, name } => {
            bundle::remove(&Lab::attach()?.node(&node)?, &name)?;
        }
        LabTask::Deploy { no_build } => {
            let lab = Lab::attach()?;
            if !no_build {
                deploy::build(lab.paths())?;
            }
            install(&lab)?;
        }
        LabTask::Reset { node } => {
            let which = match node.as_str() {
                "all" => vec![],
                name => vec![NodeSpec::by_name(name)?],
            };
            let mut lab = Lab::attach()?;
            lab.reset(&which)?;
            install(&lab)?;
        }
        LabTask::Log { node } => {
            let lab = Lab::attach()?;
            let machine = lab.machine(NodeSpec::by_name(&node)?)?;
            for path in [&machine.errors, &machine.console] {
                print!("{}", std::fs::read_to_string(path).unwrap_or_default());
            }
            print!("{}", lab.node(&node)?.check(&["journalctl", "-b", "--no-pager"])?);
        }
        LabTask::Status => {
            let lab = Lab::attach()?;
            for node in lab.nodes()? {
                let machine = lab.machine(node.spec)?;
                let answer = match node.ping(std::time::Duration::from_secs(10)) {
                    Ok(()) => "answers".to_owned(),
                    Err(e) => format!("does not answer: {e:#}"),
                };
                println!(
                    "{:5} {}  rdma {} on {} ({}), lan {}, control 127.0.0.1:{}, qemu pid {}",
                    node.name(),
                    answer,
                    node.spec.rdma_ip(),
                    node.spec.rdma_device,
                    node.spec.uverbs,
                    node.spec.lan_ip(),
                    machine.port,
                    machine.process.pid
                );
            }
        }
        LabTask::Down => Lab::down()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((k, v)) if !k.is_empty() => Ok((k.to_owned(), v.to_owned())),
        _ => Err("give KEY=VALUE".into()),
    }
}

fn copy_argument(text: &str) -> Result<(PathBuf, String), String> {
    match text.rsplit_once(':') {
        Some((local, inside)) if !local.is_empty() && inside.starts_with('/') => Ok((local.into(), inside.to_owned())),
        _ => Err("give LOCAL:PATH with an absolute PATH in the container".into()),
    }
}

fn install(lab: &Lab) -> Result<()> {
    let missing = deploy::deploy(lab)?;
    if !missing.is_empty() {
        eprintln!("lab: not built yet, so not installed: {} (`cargo build --release --workspace`)", missing.join(", "));
    }
    Ok(())
}
