//! CRIU's questions during a restore, put to whoever started the monitor; when that one has gone away, to whoever knocks
//! at the door next. Without an answer nothing of the container runs. A command that restores by itself has such a door
//! too ([`crate::by_agent`]).

use std::io::BufReader;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::gate::Gate;
use crate::record::Record;
use crate::starter::{Answer, Event, read_line, send};

/// Puts CRIU's gates to the starter.
pub struct SocketGate<'a> {
    pub stream: &'a mut BufReader<UnixStream>,
    /// Whether there is anybody to ask.
    pub hold: bool,
    pub door: Option<&'a Path>,
    pub record: &'a Record,
}

/// Where the next agent knocks.
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    pub fn open(path: &Path) -> Result<Self> {
        let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
        Ok(Door { listener, path: path.to_owned() })
    }

    /// Puts the question to one after the other until somebody answers it, and keeps the line to that one. `until` ends
    /// the waiting for somebody to come, not for the word of one who has.
    pub fn ask(&self, question: &Event, until: Option<Instant>) -> Result<(Answer, BufReader<UnixStream>)> {
        loop {
            let mut stream = self.next(until)?;
            if let Ok(Some(answer)) = word(&mut stream, question) {
                return Ok((answer, stream));
            }
        }
    }

    /// Waits as long as somebody may come: only the source knows the decision, however long it is silent.
    fn next(&self, until: Option<Instant>) -> Result<BufReader<UnixStream>> {
        while self.path.exists() {
            if until.is_some_and(|until| Instant::now() >= until) {
                bail!("no agent came to say how it goes on");
            }
            let mut fds = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(1000u16)) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(BufReader::new(self.listener.accept()?.0)),
                Err(err) => return Err(err).context("waiting at the door"),
            }
        }
        bail!("nobody knows of this restore any more")
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl SocketGate<'_> {
    fn ask(&mut self, question: &Event, door: Option<&Door>) -> Result<()> {
        if !self.hold {
            return Ok(());
        }
        // The starter has the deadline: whoever holds a commit decides when
        // it is over, and its death closes the socket.
        let answer = match (word(self.stream, question), door) {
            (Ok(Some(answer)), _) => answer,
            (Ok(None) | Err(_), Some(door)) => {
                let (answer, stream) = door.ask(question, None)?;
                *self.stream = stream;
                answer
            }
            (Ok(None), None) => bail!("the starter went away before its word on {question:?}"),
            (Err(err), None) => return Err(err),
        };
        answer.passes()
    }
}

/// `None`: nobody is there any more.
fn word(stream: &mut BufReader<UnixStream>, question: &Event) -> Result<Option<Answer>> {
    send(stream.get_mut(), question)?;
    let Some(line) = read_line(stream)? else { return Ok(None) };
    Ok(Some(serde_json::from_str(&line).context("malformed answer")?))
}

impl Gate for SocketGate<'_> {
    fn post_dump(&mut self) -> Result<()> {
        bail!("a monitor never dumps")
    }

    fn setup_namespaces(&mut self, pid: i32) -> Result<()> {
        self.ask(&Event::SetupNamespaces { pid }, None)
    }

    fn post_restore(&mut self, pid: i32) -> Result<()> {
        // Whatever can fail comes before the last gate.
        self.record.begin()?;
        // Closed again before the tasks run.
        let door = self.door.map(Door::open).transpose()?;
        self.ask(&Event::PostRestore { pid }, door.as_ref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::starter::Starter;
    use std::time::Duration;

    /// Longest time for somebody to come to the door.
    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_closed_socket_answers_no() {
        let dir = tempfile::tempdir().unwrap();
        let _ = dir;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let record = Record::of("unused").unwrap();
        let mut stream = BufReader::new(theirs);
        let mut gate = SocketGate { stream: &mut stream, hold: true, door: None, record: &record };
        drop(ours);
        assert!(gate.setup_namespaces(7).is_err());
    }

    #[test]
    fn a_refusal_carries_its_reason_and_a_go_is_a_go() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let record = Record::of("unused").unwrap();
        let mut stream = BufReader::new(theirs);
        let mut gate = SocketGate { stream: &mut stream, hold: true, door: None, record: &record };
        send(&mut ours, &Answer::Go).unwrap();
        send(&mut ours, &Answer::Refuse { why: "peer lost".into() }).unwrap();
        gate.setup_namespaces(7).unwrap();
        let err = gate.setup_namespaces(7).unwrap_err();
        assert_eq!(err.to_string(), "peer lost");
        let mut reader = BufReader::new(ours);
        let line = read_line(&mut reader).unwrap().unwrap();
        assert_eq!(line, "{\"event\":\"setup-namespaces\",\"pid\":7}\n");
    }

    /// A monitor's gate with a door, whose starter has gone; what the last question led to.
    fn without_starter(door: &Path) -> std::thread::JoinHandle<Result<()>> {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        let path = door.to_owned();
        std::thread::spawn(move || {
            let record = Record::of("unused").unwrap();
            let mut stream = BufReader::new(theirs);
            let mut gate = SocketGate { stream: &mut stream, hold: true, door: Some(&path), record: &record };
            let door = Door::open(&path)?;
            gate.ask(&Event::PostRestore { pid: 7 }, Some(&door))
        })
    }

    fn knock(door: &Path) -> Starter {
        let until = Instant::now() + SOON;
        loop {
            if let Some((starter, 7)) = Starter::at(door).unwrap() {
                return starter;
            }
            assert!(Instant::now() < until, "nobody is at the door");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn whoever_knocks_after_the_starter_went_away_decides_and_may_go_away_too() {
        let dir = tempfile::tempdir().unwrap();
        let door = dir.path().join("door.sock");
        let waits = without_starter(&door);
        drop(knock(&door));
        knock(&door).answer(&Answer::Go).unwrap();
        waits.join().unwrap().unwrap();
        assert!(!door.exists() && Starter::at(&door).unwrap().is_none());
    }

    #[test]
    fn whoever_waits_for_a_time_gets_an_answer_within_it_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let (path, question) = (dir.path().join("door.sock"), Event::PostRestore { pid: 7 });
        let door = Door::open(&path).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| door.ask(&question, Some(Instant::now() + SOON)).unwrap());
            let mut agent = knock(&path);
            agent.answer(&Answer::Go).unwrap();
            let (answer, mut stream) = waits.join().unwrap();
            assert_eq!(answer, Answer::Go);
            send(stream.get_mut(), &Event::Running { pid: 7 }).unwrap();
            assert_eq!(agent.next(SOON).unwrap(), Event::Running { pid: 7 });
        });
        let err = door.ask(&question, Some(Instant::now())).unwrap_err();
        assert!(err.to_string().contains("no agent"), "{err}");
    }

    #[test]
    fn a_door_that_was_removed_answers_no() {
        let dir = tempfile::tempdir().unwrap();
        let door = dir.path().join("door.sock");
        let waits = without_starter(&door);
        drop(knock(&door));
        std::fs::remove_file(&door).unwrap();
        let err = waits.join().unwrap().unwrap_err();
        assert!(err.to_string().contains("nobody knows"), "{err}");
    }
}
