//! The command line as engines type it: runc's verbs, flags and habits.
//! Declarations only; what a verb does stands in `cmd/`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// OCI runtime that can move RDMA containers between hosts.
#[derive(Debug, Parser)]
#[command(name = "migrrdma", disable_version_flag = true, args_override_self = true, subcommand_required = false)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

/// Options before the verb.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Directory of the containers' state
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// File for log messages and errors, besides stderr
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Format of the log file
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Log what libcontainer does, too
    #[arg(long)]
    pub debug: bool,
    /// Let systemd manage the cgroups (cgroupsPath is slice:prefix:name)
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// The criu program
    #[arg(long, value_name = "PATH", default_value = "criu")]
    pub criu: PathBuf,
    /// Print version, commit and specification version
    #[arg(short = 'v', long)]
    pub version: bool,
    #[arg(long, hide = true)]
    pub rootless: Option<String>,
    #[arg(long, hide = true)]
    pub cgroup_manager: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
#[command(disable_help_subcommand = true)]
pub enum Verb {
    /// Create a container without starting its process
    Create(Create),
    /// Start the process of a created container
    Start(Id),
    /// Create and start a container
    Run(Run),
    /// Print a container's state as JSON
    State(Id),
    /// Send a signal to a container's init process
    Kill(Kill),
    /// Remove a container's state, cgroup and process
    Delete(Delete),
    /// Run another process inside a container
    Exec(Exec),
    /// List the processes of a container
    Ps(Ps),
    /// List containers
    List(List),
    /// Freeze all processes of a container
    Pause(Id),
    /// Thaw a paused container
    Resume(Id),
    /// Change a container's resource limits
    Update(Box<Update>),
    /// Print resource statistics and out-of-memory events
    Events(Events),
    /// Write a new config.json
    Spec(SpecArgs),
    /// Print what this runtime can do, as JSON
    Features,
    /// Save a container to disk with CRIU
    Checkpoint(Checkpoint),
    /// Bring a saved container back to life
    Restore(Box<Restore>),
    /// Print what a supervised container wrote to stdout and stderr
    Logs(Logs),
    /// Wait for a supervised container's end and return its exit status
    Wait(Wait),
    /// Serve this host: local shims, other agents, migrations
    Agent(AgentArgs),
    /// Move a running container to another host
    Migrate(MigrateArgs),
    /// End a migration whose other host is gone for good: take its container back, or over
    Recover(RecoverArgs),
    /// Make a certificate authority and node certificates
    #[command(subcommand)]
    Pki(PkiVerb),
    /// Print what the agent knows: RDMA processes, QPs, migrations
    Status(StatusArgs),
    /// Own a container's stdio and exit status (started by run and by a migration)
    #[command(hide = true)]
    Monitor,
}

#[derive(Debug, Args)]
pub struct Id {
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Create {
    /// Directory with config.json
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    /// Unix socket that receives the terminal's master side
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// File that receives the init process' pid
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    /// Do not use pivot_root
    #[arg(long)]
    pub no_pivot: bool,
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    /// Pass this many more descriptors, from 3 on
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: i32,
    #[arg(long, hide = true)]
    pub pidfd_socket: Option<PathBuf>,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub create: Create,
    /// Return once the process runs
    #[arg(short, long)]
    pub detach: bool,
    /// Leave the container's state after its process ended
    #[arg(long)]
    pub keep: bool,
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    /// With --detach: a monitor keeps stdio (logs) and exit status (wait)
    #[arg(long, requires = "detach")]
    pub supervise: bool,
}

#[derive(Debug, Args)]
pub struct Kill {
    /// Signal every process of the container
    #[arg(short, long)]
    pub all: bool,
    #[arg(value_name = "container-id")]
    pub id: String,
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
}

#[derive(Debug, Args)]
pub struct Delete {
    /// Kill the container if it still runs
    #[arg(short, long)]
    pub force: bool,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Exec {
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    #[arg(long)]
    pub pidfd_socket: Option<PathBuf>,
    /// Working directory inside the container
    #[arg(long)]
    pub cwd: Option<PathBuf>,
    /// KEY=VALUE, repeatable
    #[arg(short, long)]
    pub env: Vec<String>,
    /// Allocate a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// UID[:GID]
    #[arg(short, long)]
    pub user: Option<String>,
    #[arg(short = 'g', long)]
    pub additional_gids: Vec<u32>,
    /// File with the process as in config.json
    #[arg(short, long)]
    pub process: Option<PathBuf>,
    #[arg(short, long)]
    pub detach: bool,
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    #[arg(long)]
    pub process_label: Option<String>,
    #[arg(long)]
    pub apparmor: Option<String>,
    #[arg(long)]
    pub no_new_privs: bool,
    #[arg(short, long)]
    pub cap: Vec<String>,
    #[arg(long, default_value_t = 0)]
    pub preserve_fds: i32,
    #[arg(long)]
    pub cgroup: Option<String>,
    #[arg(long)]
    pub ignore_paused: bool,
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    #[arg(value_name = "container-id")]
    pub id: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ListFormat {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct Ps {
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: ListFormat,
    #[arg(value_name = "container-id")]
    pub id: String,
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub ps_options: Vec<String>,
}

#[derive(Debug, Args)]
pub struct List {
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: ListFormat,
    /// Print ids only
    #[arg(short, long)]
    pub quiet: bool,
}

#[derive(Debug, Args)]
pub struct Update {
    /// File with linux.resources as JSON, - for stdin
    #[arg(short, long)]
    pub resources: Option<String>,
    #[arg(long)]
    pub blkio_weight: Option<u16>,
    #[arg(long)]
    pub cpu_period: Option<u64>,
    #[arg(long, allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    #[arg(long)]
    pub cpu_burst: Option<u64>,
    #[arg(long)]
    pub cpu_share: Option<u64>,
    #[arg(long)]
    pub cpu_rt_period: Option<u64>,
    #[arg(long, allow_hyphen_values = true)]
    pub cpu_rt_runtime: Option<i64>,
    #[arg(long)]
    pub cpuset_cpus: Option<String>,
    #[arg(long)]
    pub cpuset_mems: Option<String>,
    #[arg(long, allow_hyphen_values = true)]
    pub cpu_idle: Option<i64>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub kernel_memory: Option<i64>,
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub kernel_memory_tcp: Option<i64>,
    #[arg(long, allow_hyphen_values = true)]
    pub memory: Option<i64>,
    #[arg(long, allow_hyphen_values = true)]
    pub memory_reservation: Option<i64>,
    #[arg(long, allow_hyphen_values = true)]
    pub memory_swap: Option<i64>,
    #[arg(long, allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Events {
    /// Print the statistics once and return
    #[arg(long)]
    pub stats: bool,
    /// Time between two prints, such as 5s
    #[arg(long, default_value = "5s")]
    pub interval: String,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct SpecArgs {
    #[arg(short, long, default_value = ".")]
    pub bundle: PathBuf,
    #[arg(long)]
    pub rootless: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CgroupsMode {
    Soft,
    Full,
    Strict,
    Ignore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NetworkLock {
    Iptables,
    Nftables,
    Skip,
}

/// What checkpoint and restore share.
#[derive(Debug, Args)]
pub struct CriuFlags {
    /// Directory of the images
    #[arg(long, value_name = "DIR")]
    pub image_path: Option<PathBuf>,
    /// Directory of logs and statistics
    #[arg(long, value_name = "DIR")]
    pub work_path: Option<PathBuf>,
    /// Earlier images, relative to the image directory
    #[arg(long, value_name = "DIR")]
    pub parent_path: Option<PathBuf>,
    /// Carry established TCP connections
    #[arg(long)]
    pub tcp_established: bool,
    /// Allow unix sockets with a far end outside
    #[arg(long)]
    pub ext_unix_sk: bool,
    /// Allow a terminal that was inherited
    #[arg(long)]
    pub shell_job: bool,
    /// Carry file locks
    #[arg(long)]
    pub file_locks: bool,
    /// Transfer pages on demand
    #[arg(long)]
    pub lazy_pages: bool,
    #[arg(long, value_enum)]
    pub manage_cgroups_mode: Option<CgroupsMode>,
    #[arg(long, value_enum)]
    pub network_lock: Option<NetworkLock>,
    /// Make a namespace, but do not carry what is in it (network)
    #[arg(long, value_name = "NAMESPACE")]
    pub empty_ns: Vec<String>,
    /// Drop pages from older images as they are superseded
    #[arg(long)]
    pub auto_dedup: bool,
}

#[derive(Debug, Args)]
pub struct Checkpoint {
    #[command(flatten)]
    pub criu: CriuFlags,
    /// Leave the container running
    #[arg(long)]
    pub leave_running: bool,
    /// Save memory pages only; the container goes on
    #[arg(long)]
    pub pre_dump: bool,
    /// Leave out packets that are still in flight to a listening socket
    #[arg(long)]
    pub tcp_skip_in_flight: bool,
    /// Link unlinked files back while dumping
    #[arg(long)]
    pub link_remap: bool,
    /// Descriptor told when lazy pages are ready
    #[arg(long)]
    pub status_fd: Option<i32>,
    /// ADDRESS:PORT of a page server
    #[arg(long)]
    pub page_server: Option<String>,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Restore {
    #[command(flatten)]
    pub criu: CriuFlags,
    /// Directory with config.json
    #[arg(short, long)]
    pub bundle: Option<PathBuf>,
    #[arg(short, long)]
    pub detach: bool,
    #[arg(long)]
    pub pid_file: Option<PathBuf>,
    #[arg(long)]
    pub console_socket: Option<PathBuf>,
    /// Close established TCP connections instead of carrying them
    #[arg(long)]
    pub tcp_close: bool,
    /// LSM profile, as TYPE:NAME
    #[arg(long)]
    pub lsm_profile: Option<String>,
    #[arg(long)]
    pub lsm_mount_context: Option<String>,
    /// Do not become the subreaper of the restored processes
    #[arg(long)]
    pub no_subreaper: bool,
    /// Prepare what can be prepared from a pre-copied image, and wait
    #[arg(long)]
    pub partial: bool,
    /// Restore RDMA without the peers, whether or not they wait for the image: QPs that are connected to other containers
    /// come up in the error state, and what is posted to them is flushed
    #[arg(long, conflicts_with = "partial")]
    pub disconnected: bool,
    /// With --detach: a monitor keeps stdio (logs) and exit status (wait)
    #[arg(long, requires = "detach", conflicts_with_all = ["console_socket", "partial"])]
    pub supervise: bool,
    #[arg(long, hide = true)]
    pub no_pivot: bool,
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    #[arg(long, hide = true)]
    pub preserve_fds: Option<i32>,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// Go on printing until the container ends
    #[arg(short, long)]
    pub follow: bool,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct Wait {
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<f64>,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Settings, /etc/migrrdma/agent.json if that exists
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct StatusArgs {
    /// JSON instead of text
    #[arg(long)]
    pub json: bool,
    /// The agent's metrics instead, in the Prometheus text format
    #[arg(long, conflicts_with = "json")]
    pub metrics: bool,
    /// The agent's settings (where its socket is)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// See [`checkpoint::image::HandOver`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HandOver {
    /// They are made before, and handed to the restored processes
    Adopt,
    /// The restored processes make them again by themselves
    Rebuild,
}

impl From<HandOver> for checkpoint::image::HandOver {
    fn from(how: HandOver) -> Self {
        match how {
            HandOver::Adopt => Self::Adopt,
            HandOver::Rebuild => Self::Rebuild,
        }
    }
}

#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// Address of the destination's agent
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: String,
    /// Only say whether it could be done, and if not, why
    #[arg(long)]
    pub dry_run: bool,
    /// Progress as JSON lines
    #[arg(long)]
    pub json: bool,
    /// Make the new RDMA objects inside the pause instead of before it
    #[arg(long)]
    pub no_pre_setup: bool,
    /// Rounds in which memory is copied while the container runs [default: as many as pay; none for little memory]
    #[arg(long, value_name = "N")]
    pub pre_copy_rounds: Option<u32>,
    /// Go on with rounds until what is left can be copied in this time, and give up, with nothing changed, if it never
    /// can. The rest of the pause (stop, restore, hand-over) comes on top
    #[arg(long, value_name = "MILLISECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub max_blackout: Option<u64>,
    /// Send the bundle with its root file system along, for a destination that has none: whole while the container
    /// runs, then what it changed. Its own network namespace must be there
    #[arg(long)]
    pub copy_rootfs: bool,
    /// How its processes get their RDMA objects on the other host [default: adopt if their devices' drivers can do it]
    #[arg(long, value_enum, value_name = "HOW")]
    pub hand_over: Option<HandOver>,
    /// Longest wait for traffic in flight to complete
    #[arg(long, value_name = "SECONDS")]
    pub drain_timeout: Option<u64>,
    /// Write the times of all phases to this file when it is done
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// The agent's settings (where its socket is)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Args)]
#[command(after_help = "\
On the source of a migration: between its commit and its end a container belongs to the destination, and the source \
keeps its image. If that host dies then, the container is nowhere. This command gives the migration up and restores \
the container here, as it was when it was stopped for the move. Its RDMA connections to other containers come up in \
the error state, and their ends see what they see when a host has died.

On the destination: if the source's host dies after the container was restored here, nobody decides any more. This \
command, with --source-is-gone, lets the container run here and connects it to its peers: nothing is lost, but for its \
connections to containers of that host.

The other host is asked first, and so are all other agents that may reach it: if it answers any of them, or its host \
refuses the connection, nothing is done. If nobody hears of it, it may still be alive behind a network that is cut, \
and run the container: only you can know, so say so with --destination-is-gone or --source-is-gone, and switch it off \
before. If it comes back, its agent kills what it has of the container as soon as it hears of this. Until then there \
may be two, and what the other one did is lost.

A destination that was restarted says itself that it has lost the container; then the option is not needed. If the \
restore fails, run the command again.")]
pub struct RecoverArgs {
    /// The destination is gone for good: switched off, or known to be dead. Without it the command only explains
    #[arg(long, conflicts_with = "source_is_gone")]
    pub destination_is_gone: bool,
    /// The source is gone for good: switched off, or known to be dead. Without it the command only explains
    #[arg(long)]
    pub source_is_gone: bool,
    /// The agent's settings (where its socket is)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Or the id of the migration, as `migrrdma status` shows it
    #[arg(value_name = "container-id")]
    pub id: String,
}

#[derive(Debug, Subcommand)]
pub enum PkiVerb {
    /// Make a certificate authority in a directory
    Init {
        #[arg(value_name = "DIR")]
        dir: PathBuf,
    },
    /// Make a certificate for one node, signed by the authority in a directory
    Issue {
        #[arg(value_name = "DIR")]
        dir: PathBuf,
        #[arg(value_name = "NAME")]
        name: String,
        /// Address other agents dial (repeatable)
        #[arg(long)]
        ip: Vec<std::net::IpAddr>,
        /// Name other agents dial (repeatable)
        #[arg(long)]
        dns: Vec<String>,
    },
}
