//! Checkpoint and restore of containers that use RDMA: this program runs CRIU, the agent of this host does everything
//! about RDMA around it and holds CRIU at its gates. Without RDMA in use neither needs the other.
//!
//! An agent that goes away while a dump waits for its word has said no. One that goes away while a restore does may have
//! decided already, so the restored tasks wait for the next one.

use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use checkpoint::agent::admin::{Event, Request};
use checkpoint::agent::config::Config;
use checkpoint::agent::procs;
use checkpoint::criu::rpc::Criu_network_lock_method;
use checkpoint::engine::by_hand::Word;
use checkpoint::engine::park::CheckpointRequest;
use checkpoint::engine::revive::RestoreRequest;
use checkpoint::engine::take_back::RecoverRequest;
use checkpoint::image;

use crate::admin_client::Client;
use crate::door::Door;
use crate::dump::{self, DumpOptions};
use crate::gate::Gate;
use crate::inject;
use crate::migration_host;
use crate::restore::{self, Restored};
use crate::starter::{self, Answer, Starter};
use crate::store::ContainerHandle;

/// For an agent that is being restarted.
const AGENT: Duration = Duration::from_secs(10);
/// For the monitor's word on anything but the restore itself.
const MONITOR: Duration = Duration::from_secs(60);
/// For the next agent, when one goes away in the middle of a restore. Nothing is lost when none comes: what was restored
/// never ran, and its image can be used again.
const NEXT_AGENT: Duration = Duration::from_secs(300);

/// Whether an image holds RDMA objects, so that only the agent can bring them back.
pub fn has_rdma(images: &Path) -> bool {
    images.join(image::FILE).exists()
}

fn agent(request: &Request) -> Result<Client> {
    let config = Config::load(None)?;
    Client::ask(&config.admin(), request)
}

/// What the agent says next, but for its remarks; `None` when it has ended.
fn heard(client: &mut Client) -> Result<Option<Event>> {
    loop {
        match client.next() {
            Ok(Some(Event::Begin { .. } | Event::Enter { .. } | Event::Leave { .. } | Event::Progress { .. })) => {}
            Ok(Some(Event::Note { text })) => eprintln!("note: {text}"),
            // Killed with something of ours unread.
            Err(err) if err.is::<std::io::Error>() => return Ok(None),
            other => return other,
        }
    }
}

fn next(client: &mut Client) -> Result<Event> {
    heard(client)?.context("the agent ended before it said how this ended; when it is back, `migrrdma status` knows")
}

fn say(client: &mut Client, word: Word) -> Result<()> {
    client.send(&Request::Word(word))
}

fn told(result: Result<()>) -> Word {
    Word::Ended { error: result.err().map(|err| format!("{err:#}")) }
}

/// The agent's word at a gate; `None`: it ended without one.
fn at_gate(client: &mut Client) -> Result<Option<Answer>> {
    match heard(client)? {
        Some(Event::Go) => Ok(Some(Answer::Go)),
        Some(Event::Refuse { why }) => Ok(Some(Answer::Refuse { why })),
        None => Ok(None),
        Some(other) => bail!("the agent said {other:?} out of turn"),
    }
}

/// How a conversation ended, if it did; `verb` as in "cannot be …".
fn end(event: Event, id: &str, verb: &str) -> Result<()> {
    match event {
        Event::Done { .. } => Ok(()),
        Event::Refused { reasons } => bail!("container {id} cannot be {verb}: {}", reasons.join("; ")),
        Event::Undone { phase, why, left } => {
            let left: String = left.iter().map(|l| format!("; not undone: {l}")).collect();
            bail!("container {id} was not {verb}, it failed in {phase} and was undone: {why}{left}")
        }
        Event::Unfinished { phase, why } => {
            // It was decided, so it would be wrong to say that it failed.
            eprintln!("container {id} was {verb}, but {phase} could not be finished: {why}; see `migrrdma status`");
            Ok(())
        }
        Event::Error { text } => bail!("{text}"),
        other => bail!("the agent said {other:?} out of turn"),
    }
}

/// Whether a process of the container has an RDMA device open.
fn uses_rdma(root: &Path, id: &str) -> Result<bool> {
    let cgroup = ContainerHandle::load(root, id)?.cgroup()?;
    let Some(cgroup) = cgroup.unified() else { return Ok(false) };
    Ok(procs::of_cgroup(cgroup)?.iter().any(|p| !p.verbs.is_empty()))
}

struct DumpGate<'a>(&'a mut Client);

impl Gate for DumpGate<'_> {
    fn post_dump(&mut self) -> Result<()> {
        say(self.0, Word::Reached)?;
        at_gate(self.0)?.context("the agent ended before its word on the dump")?.passes()
    }

    fn setup_namespaces(&mut self, _pid: i32) -> Result<()> {
        bail!("a dump makes no namespaces")
    }

    fn post_restore(&mut self, _pid: i32) -> Result<()> {
        bail!("a dump restores nothing")
    }
}

/// Checkpoint or pre-dump of a container that has the shim. False if the agent has no part in it: nothing of RDMA is in
/// use, or there is no agent.
pub fn checkpoint(root: &Path, id: &str, options: &DumpOptions) -> Result<bool> {
    let request = Request::Checkpoint(CheckpointRequest {
        container: id.to_owned(),
        images: std::path::absolute(&options.common.image_path).context("no current directory")?,
        pre_dump: options.pre_dump,
        leave_running: options.leave_running,
    });
    let until = Instant::now() + AGENT;
    let mut client = loop {
        match agent(&request) {
            Ok(client) => break client,
            Err(err) if !uses_rdma(root, id)? => {
                tracing::debug!("{err:#}");
                return Ok(false);
            }
            // It may be starting.
            Err(_) if Instant::now() < until => std::thread::sleep(Duration::from_millis(300)),
            Err(err) => return Err(err.context(format!("container {id} uses RDMA, so its checkpoint needs the agent"))),
        }
    };
    let mut options = options.clone();
    // The engine has taken the container's link down: nothing can arrive that CRIU would have to keep out.
    options.common.network_lock.get_or_insert(Criu_network_lock_method::SKIP);
    loop {
        match next(&mut client)? {
            Event::Plain => return Ok(false),
            Event::Dump => {
                // Loaded now: the agent may have thawed and frozen it.
                let dumped = ContainerHandle::load(root, id)
                    .and_then(|handle| dump::dump(handle, &options, &mut DumpGate(&mut client)).map(drop));
                say(&mut client, told(dumped))?;
            }
            event => return end(event, id, "checkpointed").map(|()| true),
        }
    }
}

struct RestoreGate<'a> {
    client: &'a mut Client,
    /// Where the next agent finds this program.
    door: Option<&'a Path>,
    /// The agent that came there and said how it goes on.
    later: Option<BufReader<UnixStream>>,
}

impl RestoreGate<'_> {
    /// The word on what is restored and does not run yet.
    fn word(&mut self, pid: i32) -> Result<Answer> {
        // Closed again before the tasks run.
        let door = self.door.map(Door::open).transpose()?;
        let answer = match say(self.client, Word::Restored { pid }) {
            Ok(()) => at_gate(self.client)?,
            Err(_) => None,
        };
        match (answer, door) {
            (Some(answer), _) => Ok(answer),
            (None, Some(door)) => {
                let seconds = NEXT_AGENT.as_secs();
                eprintln!("the agent ended; what is restored waits for the next one, {seconds} s at most");
                let (answer, stream) =
                    door.ask(&starter::Event::PostRestore { pid }, Some(Instant::now() + NEXT_AGENT))?;
                self.later = Some(stream);
                Ok(answer)
            }
            (None, None) => bail!("the agent ended before its word on what is restored"),
        }
    }

    /// For that agent: how it ended.
    fn ended(&mut self, restored: &Result<Restored>) {
        let Some(stream) = &mut self.later else { return };
        let event = match restored {
            Ok(Restored { pid, .. }) => starter::Event::Running { pid: *pid },
            Err(err) => starter::Event::Failed { error: format!("{err:#}") },
        };
        // It sees for itself what there is, if it ended as well.
        let _ = starter::send(stream.get_mut(), &event);
    }
}

impl Gate for RestoreGate<'_> {
    fn post_dump(&mut self) -> Result<()> {
        bail!("a restore never dumps")
    }

    fn setup_namespaces(&mut self, _pid: i32) -> Result<()> {
        Ok(())
    }

    fn post_restore(&mut self, pid: i32) -> Result<()> {
        self.word(pid)?.passes()
    }
}

/// Who becomes the parent of what is restored.
#[derive(Debug)]
pub enum How {
    /// This program.
    Here(Box<restore::RestoreOptions>),
    /// A monitor, which keeps stdio and exit status.
    Monitor(Box<starter::RestoreOrder>),
}

impl How {
    fn prepare(&mut self, incubator: bool, bundle: &Path) {
        // A namespace that is given is connected by the agent, when everything is in its place: a packet that arrives
        // before the sockets are there would be answered with a reset.
        let spec = crate::store::load_spec_file(&bundle.join("config.json"));
        let given = spec.is_ok_and(|spec| migration_host::netns(&spec).is_some());
        let socket = format!("{}/incubator.sock", inject::AGENT_DIR);
        let variable = incubator.then(|| ("MIGRRDMA_INCUBATOR".to_owned(), socket));
        match self {
            How::Here(options) => {
                options.create_hooks &= !given;
                options.common.plugin_env.extend(variable);
                options.common.network_lock.get_or_insert(Criu_network_lock_method::SKIP);
            }
            How::Monitor(order) => {
                order.plugin_env.extend(variable);
                order.skip_create_hooks |= given;
                order.skip_network_lock = true;
            }
        }
    }

    /// Restores and lets run, past the agent's gate if there is one.
    fn go(self, gate: Option<&mut RestoreGate<'_>>) -> Result<Restored> {
        match (self, gate) {
            (How::Here(options), Some(gate)) => restore::restore(*options, gate),
            (How::Here(options), None) => restore::restore(*options, &mut crate::gate::OpenGate),
            (How::Monitor(mut order), gate) => {
                order.hold = gate.is_some();
                let deadline = Duration::from_secs(order.deadline_s.unwrap_or(600));
                let starter = Starter::start(&starter::Order::Restore(*order))?;
                match gate {
                    None => starter.running(deadline).map(|pid| Restored { pid, console: None }),
                    Some(gate) => held(starter, deadline, gate),
                }
            }
        }
    }
}

fn held(mut starter: Starter, deadline: Duration, gate: &mut RestoreGate<'_>) -> Result<Restored> {
    use starter::Event;
    loop {
        match starter.next(deadline)? {
            Event::SetupNamespaces { .. } => starter.answer(&Answer::Go)?,
            Event::PostRestore { pid } => {
                let refused = |err| Answer::Refuse { why: format!("{err:#}") };
                starter.answer(&gate.word(pid).unwrap_or_else(refused))?;
                return starter.running(MONITOR).map(|pid| Restored { pid, console: None });
            }
            Event::Failed { error } => bail!("{error}"),
            Event::Running { .. } => bail!("the monitor let the tasks run without asking"),
        }
    }
}

fn request(id: &str, images: &Path, bundle: &Path) -> Result<RestoreRequest> {
    let absolute = |path: &Path| -> Result<PathBuf> { std::path::absolute(path).context("no current directory") };
    let (images, bundle) = (absolute(images)?, absolute(bundle)?);
    Ok(RestoreRequest { container: id.to_owned(), images, bundle, disconnected: false })
}

/// Restores a container, with the agent's help if its image holds RDMA objects.
pub fn restore(id: &str, images: &Path, bundle: &Path, disconnected: bool, how: How) -> Result<Restored> {
    if !has_rdma(images) {
        return how.go(None);
    }
    let left_running = image::read(images).is_ok_and(|i| i.and_then(|i| i.session).is_some_and(|s| s.left_running));
    if left_running || disconnected {
        let why = if left_running { "went on without this image" } else { "are not asked" };
        eprintln!("the peers of container {id} {why}: its RDMA connections to them come up in the error state");
    }
    let request = RestoreRequest { disconnected, ..request(id, images, bundle)? };
    let mut client = agent(&Request::Restore(request)).with_context(|| {
        format!("the image {} holds RDMA objects, which only the agent can bring back", images.display())
    })?;
    as_told(&mut client, id, bundle, how, "restored")
}

/// What became of a container whose migration's other end is gone.
#[derive(Debug)]
pub enum Recovered {
    /// On the source: it was restored from what was kept of it.
    Restored { id: String, pid: i32 },
    /// On the destination: what had been restored runs.
    TakenOver,
}

/// Has the agent end a migration whose other end is gone, and restores what is left of its container if that has to be
/// done. `how` is told its name, the image and the bundle.
pub fn recover(
    config: &Config,
    request: RecoverRequest,
    how: impl FnOnce(&str, &Path, &Path) -> Result<How>,
) -> Result<Recovered> {
    let id = request.container.clone();
    let mut client = Client::ask(&config.admin(), &Request::Recover(request))?;
    loop {
        match client.next()?.context("the agent ended before it said how this ended; run the command again")? {
            Event::Note { text } => eprintln!("{text}"),
            Event::Enter { .. } | Event::Leave { .. } | Event::Progress { .. } => {}
            Event::Kept { container, images, bundle } => {
                let how = how(&container, &images, &bundle)?;
                let Restored { pid, .. } = as_told(&mut client, &container, &bundle, how, "recovered")?;
                return Ok(Recovered::Restored { id: container, pid });
            }
            // Without a word to restore, it had been.
            event => return end(event, &id, "recovered").map(|()| Recovered::TakenOver),
        }
    }
}

/// Restores when the agent says so; `verb` as in [`end`].
fn as_told(client: &mut Client, id: &str, bundle: &Path, how: How, verb: &str) -> Result<Restored> {
    let mut how = Some(how);
    let mut restored = None;
    loop {
        match next(client) {
            Ok(Event::Restore { incubator, door }) => {
                let Some(mut how) = how.take() else { bail!("the agent wants to restore a second time") };
                how.prepare(incubator, bundle);
                let mut gate = RestoreGate { client, door: door.as_deref(), later: None };
                let done = how.go(Some(&mut gate));
                gate.ended(&done);
                match done {
                    Ok(done) => {
                        restored = Some(done);
                        // An agent that has ended meanwhile is noticed next.
                        let _ = say(client, Word::Running);
                    }
                    Err(err) => {
                        let word = Word::Ended { error: Some(format!("{err:#}")) };
                        if say(client, word).is_err() {
                            return Err(err);
                        }
                    }
                }
            }
            // Told at the gate, and again here if the agent changed its mind before.
            Ok(Event::Refuse { .. }) => {}
            Ok(event) => {
                end(event, id, verb)?;
                return restored.context("the agent ended well, but nothing was restored");
            }
            Err(err) => match restored {
                // It runs, whatever became of its connections.
                Some(done) => {
                    eprintln!("container {id}: {err:#}");
                    return Ok(done);
                }
                None => return Err(err),
            },
        }
    }
}

/// Prepares a restore, and leaves it with the agent.
pub fn partial(id: &str, images: &Path, bundle: &Path) -> Result<()> {
    if !has_rdma(images) {
        bail!(
            "{} holds no RDMA objects that could be made early ({} is missing); restore without --partial",
            images.display(),
            image::FILE
        );
    }
    let mut client = agent(&Request::Partial(request(id, images, bundle)?))?;
    let event = next(&mut client)?;
    end(event, id, "prepared")
}

/// Drops a partial restore. False if there is none, or no agent that could have one.
pub fn drop_partial(id: &str) -> bool {
    let dropped = || -> Result<bool> {
        let mut client = agent(&Request::DropPartial { container: id.to_owned() })?;
        Ok(matches!(next(&mut client)?, Event::Dropped { was_there: true }))
    };
    dropped().unwrap_or(false)
}
