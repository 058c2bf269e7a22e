//! The exactly-once checker is moved under full load: nothing lost, repeated,
//! reordered or corrupted, in every way of using the queues.

use std::time::Duration;

use anyhow::Result;

use super::stage::{self, Pair, Stage, plainly};
use crate::scenario::{Context, Scenario};

const LIMIT: Duration = Duration::from_secs(300);

fn client_moves(ctx: &mut Context, path: &[&str], load: &[&str]) -> Result<()> {
    stage::client_moves(ctx, path, load, plainly)
}

fn server_moves(ctx: &mut Context, load: &[&str]) -> Result<()> {
    let mut stage = Stage::new(ctx);
    let pair = Pair::start(&mut stage, 0, &["src"], &["peer", "dst"], load)?;
    for to in ["dst", "peer"] {
        stage.migrate(&pair.server, to)?;
        stage.flow(&pair.client, 200)?;
    }
    pair.judge(&mut stage)?;
    stage.finish()
}

macro_rules! claim {
    ($name:literal, $long:literal, $run:expr) => {
        Scenario { name: $name, long: $long, limit: LIMIT, run: $run }
    };
}

/// Claims about checkers.
pub const CLAIMS: &[Scenario] = &[
    claim!(
        "a client with one QP moves there, back and there under full load and nothing is lost or repeated",
        false,
        |c| { client_moves(c, &["dst", "src", "dst"], &["--qps", "1", "--depth", "16"]) }
    ),
    claim!(
        "a client with 8 QPs moves there, back and there under full load and nothing is lost or repeated",
        false,
        |c| { client_moves(c, &["dst", "src", "dst"], &["--qps", "8", "--depth", "8"]) }
    ),
    claim!(
        "a client with 32 QPs moves there, back and there under full load and nothing is lost or repeated",
        false,
        |c| { client_moves(c, &["dst", "src", "dst"], &["--qps", "32", "--depth", "4"]) }
    ),
    claim!("a server moves there and back under full load and nothing is lost or repeated", false, |c| {
        server_moves(c, &["--qps", "4"])
    }),
    claim!("events, shared receive queues and several contexts go on after a move", false, |c| {
        let load = ["--qps", "4", "--events", "--srq", "--contexts", "2", "--pds", "2", "--split-cq", "--two-sge"];
        client_moves(c, &["dst", "src"], &load)
    }),
    claim!("solicited events on a non-blocking channel in epoll, never acknowledged, go on after a move", false, |c| {
        let load = ["--qps", "4", "--epoll", "--solicited", "--ack-at-end", "--threads-per-qp", "0"];
        client_moves(c, &["dst", "src"], &load)
    }),
    claim!("three threads on one QP, unsignalled and inline, go on after a move", false, |c| {
        let load = ["--qps", "2", "--threads-per-qp", "3", "--depth", "48", "--signal-every", "16", "--inline", "96"];
        client_moves(c, &["dst", "src"], &load)
    }),
    claim!("unused QPs in every state keep their state and their numbers over a move", false, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "2", "--idle-qps"])
    }),
    claim!("asynchronous events that were not read before a move are read after it, once", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "2", "--async-events", "--idle-qps"])
    }),
    claim!("asynchronous events that a server's process had not read are read after it has moved, once", true, |c| {
        server_moves(c, &["--qps", "2", "--async-events", "--srq"])
    }),
    claim!("a send queue full of unsignalled requests is drained for a move", false, |c| {
        client_moves(c, &["dst"], &["--qps", "2", "--depth", "64", "--signal-every", "64", "--batch", "16"])
    }),
    claim!("memory, queues and QPs made and destroyed all the time do not disturb a move", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "2", "--churn"])
    }),
    claim!("a server with events and a shared receive queue moves", true, |c| {
        server_moves(c, &["--qps", "4", "--events", "--srq", "--solicited"])
    }),
    claim!("large messages of many packets are not torn by a move", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "2", "--depth", "8", "--msg-size", "100000"])
    }),
    claim!("only small inline messages: none is lost or repeated by a move", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "4", "--msg-size", "64", "--inline", "64"])
    }),
    claim!("a queue pair of depth two moves", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "4", "--depth", "2", "--signal-every", "1", "--batch", "1"])
    }),
    claim!("atomics alone count up by exactly one over moves", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "4", "--mix", "faa,cas"])
    }),
    claim!("a receiver that is often not ready moves", true, |c| {
        // Receiver-not-ready makes rxe count what follows as out of sequence.
        for counter in ["out_of_seq_request", "rcvd_seq_err"] {
            c.allow_counter(counter);
        }
        client_moves(c, &["dst", "src"], &["--qps", "2", "--no-credits", "--mix", "send,send_imm,write,write_imm"])
    }),
    claim!("few retries and no receiver-not-ready retry survive a move", true, |c| {
        client_moves(c, &["dst", "src"], &["--qps", "4", "--rnr-retry", "0", "--retry", "2", "--timeout", "20"])
    }),
    claim!("one CQ, thread and channel for each direction of each QP move", true, |c| {
        let load = ["--qps", "4", "--cqs", "4", "--split-cq", "--thread-per-cq", "--events", "--ack-every", "7"];
        client_moves(c, &["dst", "src"], &load)
    }),
];
