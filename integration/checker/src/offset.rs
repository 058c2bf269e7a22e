//! How far two machines' wall clocks are apart, by questions and answers over UDP.
//!
//! An answer was taken somewhere between its question and its arrival. Of all rounds the quickest one says most: the
//! other clock is ahead by what it showed minus the middle of the round, give or take half the round.

use crate::clock::Reading;
use crate::signals;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::Duration;

/// One round: own clock before, the other's clock, own clock after; nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Own clock when the question left.
    pub asked: i64,
    /// The other clock.
    pub other: i64,
    /// Own clock when the answer was here.
    pub heard: i64,
}

/// What the rounds have shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offset {
    /// How far the other clock is ahead, nanoseconds.
    pub ahead_ns: i64,
    /// Largest error of that: half the quickest round.
    pub error_ns: i64,
    /// Own clock in the middle of that round.
    pub at_ns: i64,
}

impl Offset {
    /// From all rounds; none without a round.
    #[must_use]
    pub fn from(rounds: &[Round]) -> Option<Self> {
        let best = rounds.iter().filter(|r| r.heard >= r.asked).min_by_key(|r| r.heard - r.asked)?;
        let half = (best.heard - best.asked + 1) / 2;
        let middle = best.asked + half;
        Some(Self { ahead_ns: best.other - middle, error_ns: half, at_ns: middle })
    }

    /// As a line for others to read.
    #[must_use]
    pub fn line(&self) -> String {
        json!({"event": "offset", "ahead_ns": self.ahead_ns, "error_ns": self.error_ns, "at_ns": self.at_ns})
            .to_string()
    }
}

/// Answers questions until SIGTERM.
///
/// # Errors
/// When the port is taken.
pub fn answer(port: u16) -> Result<()> {
    let socket = UdpSocket::bind(("0.0.0.0", port)).with_context(|| format!("UDP port {port}"))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut question = [0; 64];
    while !signals::asked_to_stop() {
        match socket.recv_from(&mut question) {
            Ok((n, from)) if n >= 8 => {
                let mut reply = [0; 16];
                reply[..8].copy_from_slice(&question[..8]);
                reply[8..].copy_from_slice(&Reading::now().wall.to_le_bytes());
                let _ = socket.send_to(&reply, from);
            }
            Err(e) if !matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {
                return Err(e).context("wait for a question");
            }
            _ => {}
        }
    }
    Ok(())
}

/// Asks `rounds` times. Lost questions are no error, as long as some are answered.
///
/// # Errors
/// When nobody answers.
pub fn ask(whom: &str, rounds: u32) -> Result<Offset> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("UDP socket")?;
    socket.connect(whom).with_context(|| format!("connect to {whom}"))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let mut answered = Vec::new();
    let mut reply = [0; 64];
    for n in 0..u64::from(rounds) {
        let asked = Reading::now().wall;
        if socket.send(&n.to_le_bytes()).is_err() {
            continue;
        }
        while let Ok(16) = socket.recv(&mut reply) {
            let heard = Reading::now().wall;
            let word = |at: usize| reply[at..at + 8].try_into().map(i64::from_le_bytes).unwrap_or(0);
            // An answer that comes late belongs to a question given up.
            if word(0) == n.cast_signed() {
                answered.push(Round { asked, other: word(8), heard });
                break;
            }
        }
        if n >= 20 && answered.is_empty() {
            break;
        }
    }
    match Offset::from(&answered) {
        Some(offset) => Ok(offset),
        None => bail!("nobody answers at {whom}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_quickest_round_decides() {
        let slow = Round { asked: 0, other: 900, heard: 1000 };
        let quick = Round { asked: 2000, other: 2105, heard: 2010 };
        let o = Offset::from(&[slow, quick]).expect("two rounds");
        assert_eq!((o.ahead_ns, o.error_ns, o.at_ns), (100, 5, 2005));
        assert_eq!(Offset::from(&[]), None);
    }

    proptest! {
        #[test]
        fn the_true_offset_is_within_the_error(
            ahead in -1_000_000i64..1_000_000,
            ways in proptest::collection::vec((0i64..5000, 0i64..5000), 1..50)
        ) {
            let mut now = 0;
            let rounds: Vec<Round> = ways.iter().map(|(there, back)| {
                let asked = now;
                now += there + back + 10;
                Round { asked, other: asked + there + ahead, heard: asked + there + back }
            }).collect();
            let o = Offset::from(&rounds).expect("rounds");
            prop_assert!((o.ahead_ns - ahead).abs() <= o.error_ns + 1);
        }
    }
}
