//! The command line.

use crate::rig::Local;
use crate::run::Watch;
use crate::workload::Workload;
use clap::{Args, Parser, Subcommand};

/// Proves that RDMA loses, repeats, reorders and corrupts nothing.
///
/// Prints JSON lines; the last one is the result: {"event":"result","ok":true,...}. Exit status 0
/// when everything was right, 1 when something was wrong or the run could not take place.
#[derive(Parser, Clone, Debug)]
#[command(version)]
pub struct Cli {
    /// What to be
    #[command(subcommand)]
    pub command: Command,
}

/// The roles.
#[derive(Subcommand, Clone, Debug)]
pub enum Command {
    /// Wait for one client and follow its workload
    Server {
        /// Address to listen on
        #[arg(long, default_value = "0.0.0.0")]
        bind: String,
        /// TCP port; with several processes the first of as many
        #[arg(long, default_value_t = 18515)]
        port: u16,
        /// Independent processes
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
        processes: u16,
        #[command(flatten)]
        end: End,
    },
    /// Connect to a server and decide what both do
    Client {
        /// Server's address
        #[arg(long)]
        connect: String,
        /// TCP port; with several processes the first of as many
        #[arg(long, default_value_t = 18515)]
        port: u16,
        /// Independent processes
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
        processes: u16,
        #[command(flatten)]
        workload: Box<Workload>,
        #[command(flatten)]
        end: End,
    },
    /// Hold and touch memory without RDMA, with stamps as the others: what they are compared with
    Hold(Hold),
    /// How far another machine's wall clock is ahead of this one's
    Clock {
        /// Ask the one that answers at HOST:PORT; otherwise answer on --port until SIGTERM
        #[arg(long, value_name = "HOST:PORT")]
        ask: Option<String>,
        /// UDP port to answer on
        #[arg(long, default_value_t = 18600)]
        port: u16,
        /// Questions
        #[arg(long, default_value_t = 200)]
        rounds: u32,
    },
    /// Both ends in this process
    Loopback {
        #[command(flatten)]
        workload: Box<Workload>,
        #[command(flatten)]
        end: End,
    },
    /// Both ends as two processes beside each other
    Pair {
        /// TCP port on 127.0.0.1
        #[arg(long, default_value_t = 18515)]
        port: u16,
        #[command(flatten)]
        workload: Box<Workload>,
        #[command(flatten)]
        end: End,
    },
}

/// Options of the role that holds memory.
#[derive(Args, Clone, Debug)]
pub struct Hold {
    /// Address of the other end; without one, wait for it
    #[arg(long)]
    pub connect: Option<String>,
    /// TCP port; with several processes the first of as many
    #[arg(long, default_value_t = 18515)]
    pub port: u16,
    /// Independent processes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub processes: u16,
    /// MiB of private memory that are filled and held
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub memory: u32,
    /// List the RDMA devices once, so that libibverbs and its drivers are loaded as in a program that uses them
    #[arg(long)]
    pub list_devices: bool,
    /// Threads beside the main one and the stamp thread: as many as an end with RDMA has
    #[arg(long, default_value_t = 3)]
    pub threads: u16,
    /// Pages written to per second, one after the other
    #[arg(long, default_value_t = 100)]
    pub touch: u32,
    /// Milliseconds between two stamps of the stamp thread
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub stamp_ms: u64,
    /// Fail when nothing is heard for this many seconds
    #[arg(long, default_value_t = 120.0)]
    pub stall_timeout: f64,
    /// Append the result to this file as well
    #[arg(long, value_name = "FILE")]
    pub result: Option<std::path::PathBuf>,
}

/// Options of one end.
#[derive(Args, Clone, Debug)]
pub struct End {
    /// RDMA device; the first one if not given
    #[arg(long)]
    pub device: Option<String>,
    /// Port of the RDMA device
    #[arg(long, default_value_t = 1)]
    pub ib_port: u8,
    /// GID index; the first IPv4 one if not given
    #[arg(long)]
    pub gid_index: Option<u8>,
    /// Register so many MiB in all: what the QPs leave of it is filled, registered and not used
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    pub registered: u32,
    /// One registration for the memory of all QPs, as programs with a pool have it; needs one context and one PD
    #[arg(long)]
    pub one_registration: bool,
    /// Append a line of JSON every 100 ms to this file (`-`: standard output)
    #[arg(long)]
    pub timeline: Option<String>,
    /// Fail when nothing moves for this many seconds
    #[arg(long, default_value_t = 120.0)]
    pub stall_timeout: f64,
    /// Wait this many seconds for the other end to appear
    #[arg(long, default_value_t = 120.0)]
    pub connect_timeout: f64,
    /// Connect this many seconds after the other end was told where the QPs are, and has connected its own
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub connect_late: f64,
    /// Ask again for every number and name each so many milliseconds; 0 turns it off
    #[arg(long, default_value_t = 1000)]
    pub identity_ms: u64,
    /// Milliseconds between two stamps of the stamp thread
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub stamp_ms: u64,
    /// Print a progress line each so many seconds; 0 turns it off
    #[arg(long, default_value_t = 5.0)]
    pub progress: f64,
    /// Fork a child that sleeps beside the run
    #[arg(long)]
    pub sleeping_child: bool,
}

impl End {
    /// The part that concerns verbs objects.
    #[must_use]
    pub fn local(&self) -> Local {
        Local {
            device: self.device.clone(),
            port: self.ib_port,
            gid_index: self.gid_index,
            registered: (self.registered as usize) << 20,
            one_registration: self.one_registration,
            connect_late: std::time::Duration::from_secs_f64(self.connect_late),
        }
    }

    /// The part that concerns watching over the run.
    #[must_use]
    pub fn watch(&self) -> Watch {
        Watch {
            timeline: self.timeline.clone(),
            stall_timeout: self.stall_timeout,
            identity_ms: self.identity_ms,
            stamp_ms: self.stamp_ms,
            progress: self.progress,
            sleeping_child: self.sleeping_child,
        }
    }
}
