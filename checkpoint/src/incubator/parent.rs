//! The agent's handle on an incubator: starts the process, commands it, and ends it. Dropping the handle ends the
//! process, and with it every kernel object that no restored process holds.

use super::SUBCOMMAND;
use super::proto::{self, Command, Handed, Link, Reply, Rights, Start};
use rdma_virt::saved::{AdoptedProcess, ProcessState};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

/// How to start an incubator.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Program whose first argument [`SUBCOMMAND`] runs [`super::main`]; usually `/proc/self/exe`.
    pub program: PathBuf,
    pub rights: Rights,
    /// Device on the source → device here; one that is not named is matched by its driver.
    pub devices: Vec<(String, String)>,
    /// Host path of the socket for the CRIU plugin; its directory appears in the container as `/run/.migrrdma`.
    pub socket: PathBuf,
    /// Host path of the files with the container's registered memory, if it has any.
    pub memory: Option<PathBuf>,
    /// Where its messages go; `None`: to our own standard error.
    pub log: Option<PathBuf>,
}

/// An incubator could not be started or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum IncubatorError {
    #[error("cannot start the incubator {}: {source}", program.display())]
    Start { program: PathBuf, source: io::Error },
    #[error("the incubator did not finish {what} within {seconds} s")]
    Late { what: &'static str, seconds: u64 },
    #[error("the incubator ended during {what} ({status}); see its messages")]
    Dead { what: &'static str, status: String },
    #[error("the connection to the incubator failed during {what}: {source}")]
    Talk { what: &'static str, source: io::Error },
    #[error("the incubator refused {what}: {why}")]
    Refused { what: &'static str, why: String },
}

/// A running incubator.
#[derive(Debug)]
pub struct Incubator {
    child: Child,
    socket: UnixStream,
    timeout: Duration,
    /// The plugin's socket. The process itself may no longer have the right to remove it.
    plugin: PathBuf,
}

impl Incubator {
    /// Starts the process; returns when it has taken its rights and listens for the plugin.
    pub fn start(spec: &Spec, timeout: Duration) -> Result<Self, IncubatorError> {
        let fail = |source| IncubatorError::Start { program: spec.program.clone(), source };
        let (ours, theirs) = UnixStream::pair().map_err(fail)?;
        let log = match &spec.log {
            None => Stdio::inherit(),
            Some(path) => OpenOptions::new().create(true).append(true).open(path).map_err(fail)?.into(),
        };
        let child = std::process::Command::new(&spec.program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(fail)?;
        let mut incubator = Self { child, socket: ours, timeout, plugin: spec.socket.clone() };
        let start = Start {
            rights: spec.rights.clone(),
            devices: spec.devices.clone(),
            socket: spec.socket.clone(),
            memory: spec.memory.clone(),
        };
        incubator.done("its start", &Command::Start(start))?;
        Ok(incubator)
    }

    /// Pid of the process, for messages and for whoever looks after left-overs.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Deadline of every later command.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Makes the kernel objects equal to these processes'; may be repeated with newer states.
    pub fn converge(&mut self, processes: &[ProcessState]) -> Result<Vec<AdoptedProcess>, IncubatorError> {
        self.adopted("creating RDMA objects", &Command::Converge(processes.to_vec()))
    }

    /// Connects QPs as far as the states of the last [`Incubator::converge`] want. The same link again is no change.
    pub fn connect(&mut self, links: &[Link]) -> Result<(), IncubatorError> {
        self.done("connecting QPs", &Command::Connect(links.to_vec()))
    }

    /// What there is now.
    pub fn report(&mut self) -> Result<Vec<AdoptedProcess>, IncubatorError> {
        self.adopted("reporting", &Command::Report)
    }

    /// Lets restored tasks take their files from now on.
    pub fn arm(&mut self) -> Result<(), IncubatorError> {
        self.done("arming", &Command::Arm(true))
    }

    /// Ends that.
    pub fn disarm(&mut self) -> Result<(), IncubatorError> {
        self.done("disarming", &Command::Arm(false))
    }

    /// What restored tasks have taken, and what is still missing.
    pub fn handed(&mut self) -> Result<Handed, IncubatorError> {
        match self.ask("reporting what was handed over", &Command::Handed)? {
            Reply::Handed(handed) => Ok(handed),
            other => Err(unexpected("reporting what was handed over", &other)),
        }
    }

    /// Ends the process; what restored processes hold stays alive.
    pub fn release(mut self) -> Result<(), IncubatorError> {
        self.done("its release", &Command::Release)?;
        let until = Instant::now() + self.timeout;
        while self.child.try_wait().map_err(|source| IncubatorError::Talk { what: "its release", source })?.is_none() {
            if Instant::now() >= until {
                return Err(IncubatorError::Late { what: "its release", seconds: self.timeout.as_secs() });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    fn done(&mut self, what: &'static str, command: &Command) -> Result<(), IncubatorError> {
        match self.ask(what, command)? {
            Reply::Done => Ok(()),
            other => Err(unexpected(what, &other)),
        }
    }

    fn adopted(&mut self, what: &'static str, command: &Command) -> Result<Vec<AdoptedProcess>, IncubatorError> {
        match self.ask(what, command)? {
            Reply::Adopted(processes) => Ok(processes),
            other => Err(unexpected(what, &other)),
        }
    }

    fn ask(&mut self, what: &'static str, command: &Command) -> Result<Reply, IncubatorError> {
        let talk = |source: io::Error| match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                IncubatorError::Late { what, seconds: self.timeout.as_secs() }
            }
            _ => IncubatorError::Talk { what, source },
        };
        let result = (|| {
            self.socket.set_read_timeout(Some(self.timeout))?;
            self.socket.set_write_timeout(Some(self.timeout))?;
            proto::send(&self.socket, command)?;
            proto::receive::<Reply>(&self.socket)
        })();
        match result {
            Ok(Some(Reply::Refused(why))) => Err(IncubatorError::Refused { what, why }),
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.dead(what)),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe || e.kind() == io::ErrorKind::ConnectionReset => {
                Err(self.dead(what))
            }
            Err(e) => Err(talk(e)),
        }
    }

    fn dead(&mut self, what: &'static str) -> IncubatorError {
        // It has closed its socket, so it is ending; give it a moment to say how.
        let until = Instant::now() + Duration::from_secs(1);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status.to_string(),
                _ if Instant::now() >= until => break "still ending".into(),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        IncubatorError::Dead { what, status }
    }
}

fn unexpected(what: &'static str, reply: &Reply) -> IncubatorError {
    let kind = match reply {
        Reply::Done => "Done",
        Reply::Adopted(_) => "Adopted",
        Reply::Handed(_) => "Handed",
        Reply::Refused(_) => "Refused",
    };
    IncubatorError::Refused { what, why: format!("it answered {kind}, which does not fit") }
}

impl Drop for Incubator {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        let _ = std::fs::remove_file(&self.plugin);
    }
}
