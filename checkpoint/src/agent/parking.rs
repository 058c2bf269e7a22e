//! This host as the host of a peer whose remote end lies on disk: its QPs are suspended, and it waits for whoever
//! restores the image. Only the newest image is let in, by its secret, and once. When the time is over the shims are
//! told to abort: their QPs lead to nobody, and go the way of a dead host's peers.
//!
//! What waits is noted on disk: an agent that starts again goes on waiting. Claims that are not parked are the business
//! of [`super::peer`].

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rdma_virt::id::MigrationId;
use rdma_virt::msg::Request;
use serde::{Deserialize, Serialize};

use super::metrics::Outcome;
use super::peer::{Claim, Why};
use super::{Agent, LOCAL, chain, is_plain_name, lock};
use crate::image::Secret;
use crate::net::msg::{Answer, Refusal};
use crate::record::{RecordError, make_dir, now, read_json, write_json};

/// How often shims are told that they are not forgotten; far less than they wait for by themselves.
const KEEP: Duration = Duration::from_secs(60);

/// What a waiting container is held for.
#[derive(Clone, Debug)]
pub struct Parked {
    generation: u64,
    secret: Secret,
    until: Instant,
    /// Somebody restores the image; the claim's source says who.
    taken: bool,
}

impl Parked {
    /// Time left.
    pub fn left(&self) -> Duration {
        self.until.saturating_duration_since(Instant::now())
    }

    pub fn is_taken(&self) -> bool {
        self.taken
    }
}

/// All containers of this host that wait for one image.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    containers: Vec<String>,
    generation: u64,
    secret: Secret,
    /// Seconds since 1970.
    until: u64,
    /// Containers that are about to be connected to a restore, and the address of its agent.
    #[serde(default)]
    taken: BTreeMap<String, String>,
}

const VERSION: u32 = 1;

/// May be asked of a shim whose container waits, by whoever prepares a restore.
fn only_prepares(request: &Request) -> bool {
    matches!(request, Request::Prepare { .. } | Request::Connect { .. } | Request::Unprepare)
}

impl Agent {
    fn note_path(&self, migration: MigrationId) -> PathBuf {
        self.config.state_dir.join("parked").join(format!("{migration}.json"))
    }

    /// Answers [`crate::net::msg::Order::Park`]. A repetition changes nothing.
    pub fn park(
        &self,
        migration: MigrationId,
        containers: &[String],
        generation: u64,
        secret: Secret,
        seconds: u64,
    ) -> Result<Answer, Refusal> {
        let failed = |why: String| Refusal::Failed(why);
        if containers.iter().any(|c| !is_plain_name(c)) {
            return Err(failed("a container's id with a slash or a leading dot".into()));
        }
        if lock(&self.spent).contains(&migration) {
            return Ok(Answer::Done);
        }
        let mut claims = lock(&self.claims);
        if let Some((id, claim)) =
            containers.iter().filter_map(|id| Some((id, claims.get(id)?))).find(|(_, c)| c.migration != migration)
        {
            return Err(Refusal::Busy { container: id.clone(), by: claim.migration });
        }
        let known =
            |id: &String| claims.get(id).and_then(|c| c.parked.as_ref()).is_some_and(|p| p.generation >= generation);
        if containers.iter().all(known) {
            return Ok(Answer::Done);
        }
        let note = Note {
            version: VERSION,
            containers: containers.to_vec(),
            generation,
            secret,
            until: now() + seconds,
            taken: BTreeMap::new(),
        };
        let path = self.note_path(migration);
        path.parent()
            .map_or(Ok(()), make_dir)
            .and_then(|()| write_json(&path, &note))
            .map_err(|e| failed(chain(&e)))?;
        let parked = Parked { generation, secret, until: Instant::now() + Duration::from_secs(seconds), taken: false };
        for id in containers {
            claims.insert(id.clone(), waiting(migration, parked.clone()));
        }
        eprintln!("{} wait for an image of {migration}, {seconds} s at most", containers.join(", "));
        Ok(Answer::Done)
    }

    /// Answers [`crate::net::msg::Order::Unpark`].
    pub fn unpark(
        &self,
        migration: MigrationId,
        from: Option<SocketAddr>,
        port: u16,
        containers: &[String],
        generation: u64,
        secret: &Secret,
    ) -> Result<Answer, Refusal> {
        let source = from.map_or(LOCAL.into(), |from| SocketAddr::new(from.ip(), port).to_string());
        let failed = |id: &str, why: &str| Err(Refusal::Failed(format!("container {id} {why}")));
        let mut claims = lock(&self.claims);
        for id in containers {
            let claim = claims.get(id).filter(|c| c.migration == migration);
            let Some((claim, parked)) = claim.and_then(|c| Some((c, c.parked.as_ref()?))) else {
                return failed(
                    id,
                    "does not wait for this image: it was restored already, or the time for it is over; \
                     `restore --disconnected` restores it without its connections to others",
                );
            };
            if parked.generation > generation {
                return failed(id, "waits for a newer image of the same container; restore that one");
            }
            if parked.generation != generation || parked.secret != *secret {
                return failed(id, "waits for another image: generation or secret are not the ones it was told");
            }
            if parked.taken && claim.source != source {
                return failed(
                    id,
                    &format!("is about to be connected to a restore of the same image at {}", claim.source),
                );
            }
        }
        // Others of its containers will connect to ours, from GIDs that may name nobody.
        self.meet(&source);
        let taken = containers.iter().map(|id| (id, Some(&source)));
        self.note_taken(migration, taken).map_err(|e| Refusal::Failed(chain(&e)))?;
        for id in containers {
            if let Some(claim) = claims.get_mut(id) {
                claim.source.clone_from(&source);
                claim.heard = Instant::now();
                claim.since = claim.heard;
                if let Some(parked) = &mut claim.parked {
                    parked.taken = true;
                }
            }
        }
        Ok(Answer::Done)
    }

    /// Who restores what these wait for, or nobody any more: the next agent has to know whom to ask.
    fn note_taken<'a>(
        &self,
        migration: MigrationId,
        by: impl Iterator<Item = (&'a String, Option<&'a String>)>,
    ) -> Result<(), RecordError> {
        let path = self.note_path(migration);
        let Some(mut note) = read_json::<Note>(&path)? else { return Ok(()) };
        for (container, source) in by {
            match source {
                Some(source) => note.taken.insert(container.clone(), source.clone()),
                None => note.taken.remove(container),
            };
        }
        write_json(&path, &note)
    }

    /// Whether whoever asks may ask this now.
    pub(super) fn check_parked(container: &str, claim: &Claim, request: &Request) -> Result<(), Refusal> {
        match &claim.parked {
            Some(parked) if !parked.taken && !only_prepares(request) => Err(Refusal::Failed(format!(
                "container {container} waits for an image, and nobody has shown that it has it"
            ))),
            _ => Ok(()),
        }
    }

    /// A restore that had begun has failed: those that still have time wait again. Returns whether there were any.
    pub(super) fn wait_again(&self, migration: MigrationId) -> bool {
        let mut again = Vec::new();
        for (id, claim) in lock(&self.claims).iter_mut().filter(|(_, c)| c.migration == migration) {
            if let Some(parked) = claim.parked.as_mut().filter(|p| p.taken && !p.left().is_zero()) {
                parked.taken = false;
                claim.source = LOCAL.into();
                again.push(id.clone());
            }
        }
        if !again.is_empty()
            && let Err(e) = self.note_taken(migration, again.iter().map(|id| (id, None)))
        {
            eprintln!("{}", chain(&e));
        }
        for shim in again.iter().flat_map(|id| self.shims.of(id)) {
            if let Err(e) = shim.ask(Some(migration), Request::Unprepare, self.answer_time()) {
                eprintln!("{}", chain(&e));
            }
        }
        !again.is_empty()
    }

    /// The image was restored, or never will be.
    pub(super) fn stop_waiting(&self, migration: MigrationId) {
        lock(&self.spent).insert(migration);
        let _ = fs::remove_file(self.note_path(migration));
    }

    /// Ends what has waited for too long. Called every now and then.
    pub fn look_after_parked(&self) {
        let parked: Vec<(String, Claim)> = lock(&self.claims)
            .iter()
            .filter(|(_, c)| c.parked.as_ref().is_some_and(|p| !p.taken))
            .map(|(id, c)| (id.clone(), c.clone()))
            .collect();
        for (container, claim) in parked {
            if claim.parked.as_ref().is_some_and(|p| p.left().is_zero()) {
                eprintln!(
                    "nobody restored the image that {container} waits for ({}); it goes on alone",
                    claim.migration
                );
                self.part(claim.migration, false, Outcome::Expired);
            } else if claim.heard.elapsed() > KEEP {
                for shim in self.shims.of(&container) {
                    let _ = shim.ask(Some(claim.migration), Request::Report, self.answer_time());
                }
                if let Some(claim) = lock(&self.claims).get_mut(&container) {
                    claim.heard = Instant::now();
                }
            }
        }
    }

    /// Goes on waiting for what the agent before this one waited for.
    pub fn recall_parked(&self) {
        let dir = self.config.state_dir.join("parked");
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let id: Option<MigrationId> = path.file_stem().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
            let note = read_json::<Note>(&path);
            let (Some(id), Ok(Some(note))) = (id, note) else {
                eprintln!("{} is not what this program wrote", path.display());
                continue;
            };
            let left = Duration::from_secs(note.until.saturating_sub(now()));
            let Note { generation, secret, taken, containers, .. } = note;
            for container in containers {
                let source = taken.get(&container);
                let parked = Parked { generation, secret, until: Instant::now() + left, taken: source.is_some() };
                let claim = waiting(id, parked);
                let source = source.unwrap_or(&claim.source).clone();
                lock(&self.claims).insert(container, Claim { source, ..claim });
            }
        }
    }
}

fn waiting(migration: MigrationId, parked: Parked) -> Claim {
    Claim { parked: Some(parked), ..Claim::new(migration, LOCAL.into(), Why::Peer) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::idle_agent;

    const ID: MigrationId = MigrationId([5; 16]);

    /// Whether the container waits for somebody who restores its image now, and who that is.
    fn taken(agent: &Agent) -> Option<(bool, String)> {
        let claims = lock(&agent.claims);
        let claim = claims.get("c")?;
        Some((claim.parked.as_ref()?.is_taken(), claim.source.clone()))
    }

    #[test]
    fn the_next_agent_knows_who_restores_what_its_containers_wait_for() {
        let dir = tempfile::tempdir().unwrap();
        let (names, secret) = (["c".to_owned()], Secret([7; 32]));
        let next = || {
            let agent = idle_agent(dir.path());
            agent.recall_parked();
            agent
        };
        let agent = idle_agent(dir.path());
        agent.park(ID, &names, 2, secret, 600).unwrap();
        let agent = next();
        assert_eq!(taken(&agent), Some((false, LOCAL.into())));
        assert!(agent.unpark(ID, None, 1, &names, 2, &Secret([8; 32])).is_err());
        let from = "10.0.0.4:999".parse().unwrap();
        agent.unpark(ID, Some(from), 7477, &names, 2, &secret).unwrap();
        let agent = next();
        assert_eq!(taken(&agent), Some((true, "10.0.0.4:7477".into())));
        assert!(agent.wait_again(ID));
        let agent = next();
        assert_eq!(taken(&agent), Some((false, LOCAL.into())));
        agent.unpark(ID, None, 1, &names, 2, &secret).unwrap();
        agent.release(ID, true);
        assert_eq!(taken(&next()), None);
    }
}
