//! What a destination writes down from the moment it is prepared, and how an agent that starts goes on from it.
//!
//! A restored container waits in the hands of its monitor, a process of its own, for a decision that only the source
//! knows. The agent between the two may end at any time: the monitor waits for the next one at its door, and the note
//! beside the image tells that one what it needs.
//!
//! | note | door | found by the next agent |
//! |---|---|---|
//! | none | | a migration that was still arriving: removed; the source cannot have committed |
//! | not decided | open | prepared; the source is asked, or says it |
//! | not decided | closed | the restore ended without a decision: removed |
//! | decided | open | prepared: the decision did not reach the monitor, and the source repeats it |
//! | decided | closed | the tasks run |
//! | of another boot | | removed: the container ended with this host, and its source is told so when it asks |
//!
//! Nothing here is flushed: what is restored does not outlive its host. This is not the record that decides, which
//! lies with the source.
//!
//! What a command restores from files waits in the same way, in the command's hands. There this host has the record, and
//! that the tasks were about to run is flushed as that is: a note that says "not decided" behind a closed door says that
//! nothing ever ran, whatever has become of this host since ([`super::revived`]).

use std::fs;
use std::path::{Path, PathBuf};

use rdma_virt::id::MigrationId;
use rdma_virt::saved::AdoptedProcess;
use serde::{Deserialize, Serialize};

use super::dest::{Arrival, Entry, State};
use super::host::{Held, HostError};
use super::revive::ByHand;
use super::store::{self, Store};
use crate::agent::{Agent, chain, is_plain_name, lock};
use crate::image::HandOver;
use crate::net::msg::Offer;
use crate::record::{read_json, replace_json_unflushed, write_json};

/// Name of the note in an image's directory.
const NOTE: &str = "prepared.json";
/// Name of a file beside it: the tasks were about to run. The note itself is not written anew, for that is inside the pause,
/// and it has a part for each queue pair.
const DECIDED: &str = "decided";
/// Name of the monitor's socket there.
const DOOR: &str = "door.sock";
/// Name of the file with the id of the container that is being restored: there is no note before that is done.
const BEGUN: &str = "restores";
/// Version of the note's format.
const VERSION: u32 = 4;

/// Where the monitor of an image in `dir` waits.
pub(super) fn door(dir: &Path) -> std::path::PathBuf {
    dir.join(DOOR)
}

/// A restore of this container from the image in `dir` begins.
pub(super) fn begins(dir: &Path, container: &str) -> Result<(), String> {
    let path = dir.join(BEGUN);
    fs::write(&path, container).map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// What a restore left that ended together with its monitor.
fn remove_broken_off(agent: &Agent, dir: &Path) {
    let Some(container) = fs::read_to_string(dir.join(BEGUN)).ok().filter(|id| is_plain_name(id)) else { return };
    if let Err(e) = agent.host.remove_restored(&container, &Store::again(dir.to_owned()).images()) {
        eprintln!("container {container}, whose restore broke off: {e}");
    }
}

/// How far a container has come that arrived.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Note {
    version: u32,
    /// As in [`Arrival::source`].
    source: String,
    offer: Offer,
    /// Pid of the restored init in the agent's pid namespace.
    init: i32,
    /// What the incubator made for its processes, which hold it now.
    adopted: Vec<AdoptedProcess>,
    /// The source has committed, and the tasks were about to run.
    decided: bool,
    /// Which start of this host it belongs to.
    boot: String,
    /// The image, where an administrator gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    images: Option<PathBuf>,
}

/// A name that this host's kernel gives itself at each start.
fn this_boot() -> String {
    // Where it cannot be read all notes are believed, as if the host had not been restarted.
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or(String::new(), |id| id.trim().to_owned())
}

impl Note {
    pub fn new(source: &str, offer: &Offer, init: i32, adopted: &[AdoptedProcess]) -> Self {
        let (source, offer, adopted) = (source.to_owned(), offer.clone(), adopted.to_vec());
        Note { version: VERSION, source, offer, init, adopted, decided: false, boot: this_boot(), images: None }
    }

    /// The image came from an administrator.
    pub fn given(self, images: Option<&Path>) -> Self {
        Note { images: images.map(Path::to_owned), ..self }
    }

    #[cfg(test)]
    pub fn of_boot(self, boot: &str) -> Self {
        Note { boot: boot.into(), ..self }
    }

    pub fn decided(self) -> Self {
        Note { decided: true, ..self }
    }

    /// Replaces the note in `dir`, in one step.
    pub fn write(&self, dir: &Path) -> Result<(), String> {
        let path = dir.join(NOTE);
        if self.images.is_some() && self.decided {
            return write_json(&path, self).map_err(|e| chain(&e));
        }
        replace_json_unflushed(&path, self).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }

    /// What it speaks of ended when this host did.
    fn is_of_the_past(&self) -> bool {
        self.boot != this_boot()
    }

    fn read(dir: &Path) -> Result<Option<Note>, String> {
        let note: Option<Note> = read_json(&dir.join(NOTE)).map_err(|e| chain(&e))?;
        match note {
            Some(Note { version, .. }) if version != VERSION => Err(format!(
                "{} has version {version}, and this migrrdma knows {VERSION}; start the one that wrote it",
                dir.join(NOTE).display()
            )),
            Some(note) => {
                let decided = note.decided || dir.join(DECIDED).exists();
                Ok(Some(Note { decided, ..note }))
            }
            None => Ok(None),
        }
    }
}

/// Adds to the note in `dir` that the tasks are about to run.
pub(super) fn mark_decided(dir: &Path) -> Result<(), String> {
    let path = dir.join(DECIDED);
    fs::write(&path, "").map_err(|e| format!("cannot write {}: {e}", path.display()))
}

/// A container whose tasks run already.
struct Runs(i32);

impl Held for Runs {
    fn init(&self) -> i32 {
        self.0
    }

    fn release(&mut self) -> super::host::Result<()> {
        Ok(())
    }

    fn abandon(self: Box<Self>) -> super::host::Result<()> {
        Err(HostError("its tasks run already".into()))
    }
}

/// Goes on with what was prepared when the agent ended, and removes what was still arriving. Called once, before
/// anything can arrive.
pub fn take_up(agent: &Agent) {
    let dir = agent.config.state_dir.join("incoming");
    for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if store::is_over(&path) {
            super::steps::remove_dir(path);
            continue;
        }
        let id = entry.file_name().to_str().and_then(|name| name.parse::<MigrationId>().ok());
        let note = match Note::read(&path) {
            Ok(note) => note,
            // Its source may have committed: whatever waits there goes on waiting for an agent that understands it.
            Err(why) => {
                eprintln!("{why}");
                continue;
            }
        };
        let past = note.as_ref().is_some_and(Note::is_of_the_past);
        if let Some(note) = note.as_ref().filter(|_| past) {
            eprintln!("container {} was here until this host was restarted; it is gone", note.offer.container);
        }
        let held = agent.host.held_at(&door(&path)).unwrap_or_else(|e| {
            eprintln!("{}: {e}", path.display());
            None
        });
        match (id, note, held) {
            (Some(id), Some(note), Some(held)) => go_on(agent, id, &path, note, Some(held)),
            (Some(id), Some(note), None) if note.decided && !past => go_on(agent, id, &path, note, None),
            (id, note, held) => {
                if let (Some(id), Some(Note { images: Some(_), decided: false, .. })) = (id, note) {
                    super::revived::never_ran(agent, id);
                }
                if let Some(held) = held
                    && let Err(e) = held.abandon()
                {
                    eprintln!("{}: removing what was restored: {e}", path.display());
                }
                remove_broken_off(agent, &path);
                super::steps::remove_dir(path);
            }
        }
    }
    super::steps::remove_unused(agent);
    super::landing::recover(agent);
}

fn go_on(agent: &Agent, id: MigrationId, dir: &Path, note: Note, held: Option<Box<dyn Held>>) {
    let container = note.offer.container.clone();
    let given = note.images.map(|images| Store::given(images, dir.to_owned()));
    let by_hand = given.is_some();
    let store = match given.unwrap_or_else(|| Ok(Store::again(dir.to_owned()))) {
        Ok(store) => store,
        Err(e) => return eprintln!("{id}: {}", chain(&e)),
    };
    let mut arrival = Arrival::new(note.source, note.offer);
    arrival.adopted = note.adopted;
    arrival.by_hand = by_hand.then_some(ByHand::TakenUp);
    arrival.taken_over = super::take_over::happened(agent, id);
    arrival.state = match held {
        None => {
            eprintln!("{id} of container {container}: it runs here; going on");
            agent.take_over(id, &container, &arrival.source);
            State::Running { nursery: None, store, held: Box::new(Runs(note.init)), keys: None }
        }
        Some(held) => {
            eprintln!("{id} of container {container}: prepared; waiting for the decision of {}", arrival.source);
            // Its link is down since before its restore.
            let wire = agent.host.wire(&arrival.offer.bundle, None).unwrap_or_else(|e| {
                eprintln!("{id}: the container's network: {e}");
                None
            });
            arrival.landing = super::landing::Landing::again(agent, id);
            State::Prepared { nursery: None, store, held, wire }
        }
    };
    let (init, hand_over) = (note.init, arrival.offer.hand_over);
    if let (HandOver::Rebuild, State::Prepared { store, .. } | State::Running { store, .. }) =
        (hand_over, &arrival.state)
    {
        match super::rebuild::Here::look(&store.images(), init) {
            Ok(here) => arrival.rebuild = here,
            Err(why) => eprintln!("{id}: {why}"),
        }
    }
    lock(&agent.desk.0).insert(id, Entry::new(arrival));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{NEVER_CAME, idle_agent, offer, removed};
    use rdma_virt::id::Vpid;

    fn note() -> Note {
        let adopted = [AdoptedProcess { vpid: Vpid(1), contexts: Vec::new() }];
        Note::new("10.0.0.1:1", &offer("c"), 7, &adopted)
    }

    #[test]
    fn a_note_is_read_as_it_was_written_in_each_of_its_stages() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Note::read(dir.path()).unwrap(), None);
        let given = note().given(Some(Path::new("/var/image")));
        for (stage, decided) in [(note(), false), (note().decided(), true), (given, false)] {
            stage.write(dir.path()).unwrap();
            let read = Note::read(dir.path()).unwrap().unwrap();
            assert_eq!(read.decided, decided);
            assert_eq!(read, stage);
        }
        note().write(dir.path()).unwrap();
        mark_decided(dir.path()).unwrap();
        assert!(Note::read(dir.path()).unwrap().unwrap().decided, "beside the note is as good as in it");
    }

    #[test]
    fn a_note_of_another_version_and_a_damaged_one_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        Note { version: VERSION + 1, ..note() }.write(dir.path()).unwrap();
        let why = Note::read(dir.path()).unwrap_err();
        assert!(why.contains("version 5"), "{why}");
        fs::write(dir.path().join(NOTE), "{").unwrap();
        assert!(Note::read(dir.path()).is_err());
    }

    #[test]
    fn a_container_outlives_an_agent_that_ends_while_it_removes_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        let arrive = |n| {
            let store = Store::make(Store::place(&agent.config.state_dir, MigrationId([n; 16])), 0).unwrap();
            begins(store.dir(), "c").unwrap();
            note().decided().write(store.dir()).unwrap();
            store.dir().to_owned()
        };
        let over = store::set_aside(&arrive(1)).unwrap();
        fs::remove_file(over.join(NOTE)).unwrap();
        take_up(&agent);
        assert!(!over.exists());
        assert_eq!(removed(&agent), Vec::<String>::new());
        // As it looked before it was set aside first.
        fs::remove_file(arrive(2).join(NOTE)).unwrap();
        take_up(&agent);
        assert_eq!(removed(&agent), ["c"], "that is what a restore leaves which broke off");
    }

    #[test]
    fn what_ran_before_this_host_was_restarted_is_gone_and_said_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        let [past, present] = [1, 2].map(|n| MigrationId([n; 16]));
        for (id, boot) in [(past, "another"), (present, this_boot().as_str())] {
            let store = Store::make(Store::place(&agent.config.state_dir, id), 0).unwrap();
            note().decided().of_boot(boot).write(store.dir()).unwrap();
            assert!(crate::engine::forsaken::holds(&agent, id), "what nobody has looked at may be there");
        }
        take_up(&agent);
        assert!(!crate::engine::forsaken::holds(&agent, past));
        assert!(!Store::place(&agent.config.state_dir, past).exists());
        assert!(agent.desk.has(present));
    }

    #[test]
    fn a_directory_made_for_an_incubator_goes_with_its_agent_unless_its_container_came() {
        let dir = tempfile::tempdir().unwrap();
        let agent = idle_agent(dir.path());
        for container in [NEVER_CAME, "c"] {
            fs::create_dir_all(agent.doors.of(container)).unwrap();
            fs::write(agent.config.run_dir.join(format!("incubates-{container}")), "").unwrap();
        }
        take_up(&agent);
        assert!(!agent.doors.of(NEVER_CAME).exists() && agent.doors.of("c").exists());
        let marks = fs::read_dir(&agent.config.run_dir).unwrap().flatten();
        assert_eq!(marks.filter(|e| e.file_name().to_string_lossy().starts_with("incubates-")).count(), 0);
    }
}
