//! Whether the host of another agent is gone, as far as can be found out from here: it is asked, and where it is silent,
//! so is everybody who may reach it. A host that is dead and one behind a cut line look alike; what follows from that is
//! the business of those who ask.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::time::Duration;

use rdma_virt::id::MigrationId;

use crate::agent::{Agent, LOCAL, chain};
use crate::at_once::at_once;
use crate::net::client::CallError;
use crate::net::frame::FrameError;
use crate::net::msg::{Answer, Order};

/// For the word of an agent on whether somebody is there.
pub(super) const ANSWER: Duration = Duration::from_secs(10);

/// Times it is asked: connections kept from earlier say nothing about it now.
const TIMES: u32 = 3;

/// What was found out.
#[derive(Debug, PartialEq)]
pub(super) enum Sight {
    Answers(Answer),
    /// It, or something in its place, is there, and this is what is odd about it.
    Odd(String),
    /// It does not answer here, but it answers these.
    Elsewhere(Vec<String>),
    /// It answers nobody.
    Silence(String),
}

impl From<Result<Answer, CallError>> for Sight {
    fn from(answer: Result<Answer, CallError>) -> Self {
        let e = match answer {
            Ok(answer) => return Sight::Answers(answer),
            Err(e) => e,
        };
        let silent = match &e {
            // A kernel that says so is alive, whatever became of the agent.
            CallError::Dial { source, .. } if source.kind() == ErrorKind::ConnectionRefused => {
                return Sight::Odd(
                    "its host refuses the connection, so it is there, and only its agent is not; start that, or switch \
                     the host off"
                        .into(),
                );
            }
            CallError::Dial { .. } => true,
            CallError::Talk { source, .. } => {
                matches!(source, FrameError::Closed | FrameError::Io(_) | FrameError::TimedOut | FrameError::Silent(_))
            }
            _ => false,
        };
        if silent { Sight::Silence(chain(&e)) } else { Sight::Odd(chain(&e)) }
    }
}

/// Puts `order` to the agent at `at`; where it is silent, asks those who take part and all that are known whether it
/// answers them.
pub(super) fn look<'a>(
    agent: &Agent,
    id: MigrationId,
    at: &str,
    order: &Order,
    take_part: impl Iterator<Item = &'a String>,
) -> Sight {
    let mut sight = Sight::Silence(String::new());
    for _ in 0..TIMES {
        let answer = agent.call(at, Some(id), order.clone(), ANSWER);
        let again = matches!(answer, Err(CallError::Talk { .. }));
        sight = answer.into();
        if !again {
            break;
        }
    }
    if !matches!(sight, Sight::Silence(_)) {
        return sight;
    }
    let mut others: BTreeSet<String> = take_part.cloned().chain(agent.known_agents()).collect();
    others.retain(|other| other != LOCAL && other != at);
    let reaches = |other: String| {
        let order = Order::Reaches { at: at.to_owned() };
        matches!(agent.call(&other, None, order, ANSWER), Ok(Answer::Has(true))).then_some(other)
    };
    let by: Vec<String> = at_once(others, reaches).into_iter().flatten().collect();
    if by.is_empty() { sight } else { Sight::Elsewhere(by) }
}

/// Why a host of which `why` was found out is not taken for gone; `end` names it as an end of the migration.
pub(super) fn odd(end: &str, why: &str) -> String {
    format!("{end} cannot be taken for gone: {why}")
}

/// The same of one that answers `by`.
pub(super) fn elsewhere(end: &str, by: &[String]) -> String {
    format!(
        "{end} does not answer here, but it answers {}: it is not gone, the line between is cut; once it is mended the \
         migration goes on by itself",
        by.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::msg::Refusal;
    use std::io;

    fn dial(kind: ErrorKind) -> CallError {
        CallError::Dial { at: "10.0.0.2:7477".into(), source: io::Error::from(kind) }
    }

    fn talk(source: FrameError) -> CallError {
        CallError::Talk { at: "10.0.0.2:7477".into(), order: "holds", source }
    }

    #[test]
    fn only_a_host_that_says_nothing_at_all_is_silent() {
        assert_eq!(Sight::from(Ok(Answer::Done)), Sight::Answers(Answer::Done));
        for silent in [
            dial(ErrorKind::TimedOut),
            dial(ErrorKind::HostUnreachable),
            talk(FrameError::Silent(ANSWER)),
            talk(FrameError::TimedOut),
            talk(FrameError::Closed),
        ] {
            assert!(matches!(Sight::from(Err(silent)), Sight::Silence(_)));
        }
        let refused = Refusal::Failed("it cannot".into());
        for there in [
            dial(ErrorKind::ConnectionRefused),
            talk(FrameError::Version { theirs: 1, ours: 2 }),
            CallError::Tls { at: "10.0.0.2:7477".into(), source: FrameError::Closed },
            CallError::NoIdentity("none made".into()),
            CallError::Refused { at: "10.0.0.2:7477".into(), order: "holds", refusal: refused },
        ] {
            let text = there.to_string();
            assert!(matches!(Sight::from(Err(there)), Sight::Odd(_)), "{text}");
        }
    }
}
