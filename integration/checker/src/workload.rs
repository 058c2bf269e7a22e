//! What the two ends do to each other. The client decides and tells the server, so that both follow
//! the same description.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// An operation of the mix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Op {
    /// Numbered SEND.
    Send,
    /// Numbered SEND with the number as immediate data.
    SendImm,
    /// RDMA WRITE into a slot.
    Write,
    /// RDMA WRITE into a ring, with the number as immediate data.
    WriteImm,
    /// RDMA READ: of a slot written before, or of memory that never changes.
    Read,
    /// FETCH_ADD of one.
    Faa,
    /// CMP_SWP along a chain.
    Cas,
}

impl Op {
    /// Whether it consumes a RECV at the other end.
    #[must_use]
    pub fn two_sided(self) -> bool {
        matches!(self, Self::Send | Self::SendImm | Self::WriteImm)
    }
}

impl FromStr for Op {
    type Err = String;
    fn from_str(s: &str) -> Result<Self, String> {
        Ok(match s {
            "send" => Self::Send,
            "send_imm" => Self::SendImm,
            "write" => Self::Write,
            "write_imm" => Self::WriteImm,
            "read" => Self::Read,
            "faa" => Self::Faa,
            "cas" => Self::Cas,
            other => {
                return Err(format!(
                    "unknown operation {other:?}; there are send, send_imm, write, write_imm, read, faa, cas"
                ));
            }
        })
    }
}

/// Operations in the order they are posted, over and over; every lane starts elsewhere in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix(pub Vec<Op>);

impl FromStr for Mix {
    type Err = String;
    /// `op[:weight]` separated by commas. Weights are interleaved, not grouped.
    fn from_str(s: &str) -> Result<Self, String> {
        let mut left = Vec::new();
        for part in s.split(',').filter(|p| !p.is_empty()) {
            let (name, weight) = part.split_once(':').unwrap_or((part, "1"));
            let weight: u32 = weight
                .parse()
                .ok()
                .filter(|w| (1..=64).contains(w))
                .ok_or_else(|| format!("weight of {part:?} must be 1 to 64"))?;
            left.push((name.parse::<Op>()?, weight));
        }
        let mut order = Vec::new();
        while left.iter().any(|(_, w)| *w > 0) {
            for (op, w) in left.iter_mut().filter(|(_, w)| *w > 0) {
                order.push(*op);
                *w -= 1;
            }
        }
        if order.is_empty() {
            return Err("the mix names no operation".into());
        }
        Ok(Self(order))
    }
}

impl fmt::Display for Mix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

/// How completions are learned of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Completions {
    /// Poll the queues over and over.
    Poll,
    /// Block in `ibv_get_cq_event`.
    Events,
    /// O_NONBLOCK channel in an epoll set.
    Epoll,
}

/// A fault in the program's own model, to show that it would notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Fault {
    /// A message is numbered and never posted.
    Drop,
    /// A message is posted twice.
    Dup,
    /// Two messages change places.
    Reorder,
    /// One bit of a message is flipped.
    Corrupt,
    /// A WRITE is recorded and never posted.
    LostWrite,
    /// A FETCH_ADD is recorded and never posted.
    LostAtomic,
    /// A completion is thrown away.
    LostCompletion,
    /// A completion is delivered twice.
    DupCompletion,
}

/// The description both ends follow.
#[derive(Args, Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// Connected QPs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub qps: u16,
    /// Requests under way per QP and direction
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub depth: u32,
    /// RECVs posted per QP; 0 means the depth
    #[arg(long, default_value_t = 0)]
    pub recv_depth: u32,
    /// Threads that post to each QP; 0 means that the polling thread posts too
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=8))]
    pub threads_per_qp: u8,
    /// Largest message, in bytes
    #[arg(long, default_value_t = 4096, value_parser = clap::value_parser!(u32).range(64..=1 << 24))]
    pub msg_size: u32,
    /// Seconds of load; 0 means until SIGTERM
    #[arg(long, default_value_t = 10.0)]
    pub duration: f64,
    /// Operations each end posts per QP; 0 means until the duration is over
    #[arg(long, default_value_t = 0)]
    pub count: u64,
    /// Operations posted in turn: op[:weight],… of send, send_imm, write, write_imm, read, faa, cas
    #[arg(long, default_value = "send,write,read,faa,send_imm,cas,write_imm,read")]
    pub mix: Mix,
    /// Every Nth send request is signalled
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    pub signal_every: u32,
    /// Messages up to this size are sent inline; 0 turns it off
    #[arg(long, default_value_t = 96)]
    pub inline: u32,
    /// Requests posted as one chain at most
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub batch: u32,
    /// Every third message comes from two SGEs with different keys
    #[arg(long)]
    pub two_sge: bool,
    /// RECVs come from shared receive queues (one per protection domain)
    #[arg(long)]
    pub srq: bool,
    /// How completions are learned of
    #[arg(long, value_enum, default_value_t = Completions::Poll)]
    pub completions: Completions,
    /// Short for --completions events
    #[arg(long, conflicts_with = "epoll")]
    pub events: bool,
    /// Short for --completions epoll
    #[arg(long)]
    pub epoll: bool,
    /// RECV queues are armed for solicited events only (needs events or epoll; splits the CQs)
    #[arg(long)]
    pub solicited: bool,
    /// Acknowledge this many events at a time
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub ack_every: u32,
    /// Acknowledge no event before everything is destroyed
    #[arg(long)]
    pub ack_at_end: bool,
    /// Times the device is opened; QPs are dealt to the contexts in turn
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub contexts: u16,
    /// Protection domains per context
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    pub pds: u16,
    /// CQs (pairs of CQs with --split-cq) per context
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=32))]
    pub cqs: u16,
    /// Own CQ for each direction
    #[arg(long)]
    pub split_cq: bool,
    /// Own polling thread (and channel) for each CQ instead of one per context
    #[arg(long)]
    pub thread_per_cq: bool,
    /// Rely on receiver-not-ready retries instead of counting the peer's RECVs
    #[arg(long)]
    pub no_credits: bool,
    /// Only the client posts
    #[arg(long)]
    pub one_way: bool,
    /// Operations per second and end at most; 0 means as many as possible
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// Slots per lane that WRITEs go to
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub slots: u16,
    /// Path MTU in bytes
    #[arg(long, default_value_t = 1024)]
    pub mtu: u32,
    /// Retransmission timeout, 4.096 µs × 2^N
    #[arg(long, default_value_t = 18, value_parser = clap::value_parser!(u8).range(0..=31))]
    pub timeout: u8,
    /// Retransmissions before a QP fails
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u8).range(0..=7))]
    pub retry: u8,
    /// Receiver-not-ready retries; 7 is for ever
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u8).range(0..=7))]
    pub rnr_retry: u8,
    /// READs and atomics under way per QP
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u8).range(1..=128))]
    pub rd_atomic: u8,
    /// A thread that makes and destroys MRs, CQs and QPs all the time
    #[arg(long)]
    pub churn: bool,
    /// Also keep unused QPs in the states RESET, INIT, RTR, SQD and ERR
    #[arg(long)]
    pub idle_qps: bool,
    /// Leave asynchronous events unread until the end of the run, and have a thread wait for one all the time
    #[arg(long)]
    pub async_events: bool,
    /// The server posts no RECV anew for so many seconds, 3 seconds after the start (implies --no-credits)
    #[arg(long, default_value_t = 0.0)]
    pub starve: f64,
    /// Put a fault into the client's own model: the run must then fail
    #[arg(long, value_enum)]
    pub self_test: Option<Fault>,
    /// Number of the message (write, …) the fault is put into
    #[arg(long, default_value_t = 100)]
    pub self_test_at: u64,
}

/// Send-queue room kept for credit updates.
pub const CONTROL_DEPTH: u32 = 4;

impl Workload {
    /// Fills in what follows from other options and refuses what cannot work.
    ///
    /// # Errors
    /// With the option that has to change.
    pub fn normalise(&mut self) -> Result<(), String> {
        if self.events {
            self.completions = Completions::Events;
        }
        if self.epoll {
            self.completions = Completions::Epoll;
        }
        if self.recv_depth == 0 {
            self.recv_depth = self.depth;
        }
        let lanes = u32::from(self.lanes());
        if self.depth < lanes {
            return Err(format!("--depth must be at least {lanes}, one for each posting thread"));
        }
        if self.starve > 0.0 {
            self.no_credits = true;
        }
        if self.solicited {
            if self.completions == Completions::Poll {
                return Err("--solicited needs --events or --epoll".into());
            }
            self.split_cq = true;
        }
        if self.completions == Completions::Events && self.threads_per_qp == 0 {
            return Err("a thread blocked in ibv_get_cq_event cannot post: use --threads-per-qp 1, or --epoll".into());
        }
        if self.mtu_code().is_none() {
            return Err("--mtu must be 256, 512, 1024, 2048 or 4096".into());
        }
        if self.contexts > self.qps {
            return Err("--contexts must not exceed --qps".into());
        }
        Ok(())
    }

    /// Streams per QP, each with numbers of its own.
    #[must_use]
    pub fn lanes(&self) -> u8 {
        self.threads_per_qp.max(1)
    }

    /// Requests one lane may have under way.
    #[must_use]
    pub fn lane_depth(&self) -> u32 {
        self.depth / u32::from(self.lanes())
    }

    /// Send-queue size of a QP.
    #[must_use]
    pub fn send_queue(&self) -> u32 {
        self.depth + CONTROL_DEPTH
    }

    /// `enum ibv_mtu`.
    #[must_use]
    pub fn mtu_code(&self) -> Option<u32> {
        Some(match self.mtu {
            256 => 1,
            512 => 2,
            1024 => 3,
            2048 => 4,
            4096 => 5,
            _ => return None,
        })
    }

    /// Every how many-th two-sided message of a QP raises a solicited event.
    #[must_use]
    pub fn solicit_every(&self) -> u64 {
        u64::from(self.recv_depth.clamp(1, 4))
    }

    /// Messages that can land in one QP's RECVs before the application looked at any.
    #[must_use]
    pub fn landing(&self) -> u32 {
        if self.srq && self.no_credits { self.recv_depth * u32::from(self.qps) } else { self.recv_depth }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        w: Workload,
    }

    fn parse(args: &[&str]) -> Result<Workload, String> {
        let mut w = Cli::try_parse_from([&["x"], args].concat()).map_err(|e| e.to_string())?.w;
        w.normalise()?;
        Ok(w)
    }

    #[test]
    fn weights_are_interleaved() {
        let m: Mix = "send:3,read".parse().expect("valid mix");
        assert_eq!(m.0, [Op::Send, Op::Read, Op::Send, Op::Send]);
        assert!("send,fly".parse::<Mix>().is_err());
        assert!("".parse::<Mix>().is_err());
    }

    #[test]
    fn impossible_combinations_are_refused_with_the_option_to_change() {
        let e = parse(&["--solicited"]).expect_err("solicited without events");
        assert!(e.contains("--events"));
        assert!(parse(&["--depth", "2", "--threads-per-qp", "4"]).is_err());
        assert!(parse(&["--events", "--threads-per-qp", "0"]).is_err());
        assert!(parse(&["--mtu", "1500"]).is_err());
    }

    #[test]
    fn a_workload_survives_the_way_to_the_server() {
        let w = parse(&["--qps", "8", "--events", "--srq"]).expect("valid");
        let text = serde_json::to_string(&w).expect("serialise");
        let back: Workload = serde_json::from_str(&text).expect("deserialise");
        assert_eq!(format!("{w:?}"), format!("{back:?}"));
    }
}
