//! What this agent counts, and its page in the Prometheus text format. Who may read the page, and how, is not known
//! here ([`super::exporter`], [`super::admin`]).
//!
//! Values of counters' labels are words of this program, so nobody outside can make their number grow. Counters begin at
//! zero with the agent. Gauges are looked up when somebody asks, and shims for them only every few seconds, only those
//! whose container takes part in no migration: a question would lengthen the pause it is meant to tell about.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use rdma_virt::saved::{ProcessState, QpPhase};

use super::prometheus::{Counters, Histogram, Page};
use super::under_way::Role;
use super::{Agent, lock};
use crate::net::frame::FrameError;
use crate::phase::Phase;
use crate::timeline::Summary;

/// Shims have this long to say what they have.
const ANSWER: Duration = Duration::from_secs(1);

/// What they said is good for this long, however often somebody asks.
const FRESH: Duration = Duration::from_secs(5);

/// How something ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// Decided, but not everybody could be told; it is tried again.
    Unfinished,
    /// What was unfinished has been finished.
    FinishedLater,
    Undone,
    Refused,
    /// Others had the container, or a peer's, for too long.
    Busy,
    /// Of a peer: its source has been silent for too long.
    Orphaned,
    /// Of a peer: nobody has restored the image in time.
    Expired,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Finished => "finished",
            Outcome::Unfinished => "unfinished",
            Outcome::FinishedLater => "finished-later",
            Outcome::Undone => "undone",
            Outcome::Refused => "refused",
            Outcome::Busy => "busy",
            Outcome::Orphaned => "orphaned",
            Outcome::Expired => "expired",
        }
    }

    fn of(role: Role) -> &'static [Outcome] {
        use Outcome::{Busy, Expired, Finished, FinishedLater, Orphaned, Refused, Undone, Unfinished};
        match role {
            Role::Source => &[Finished, Unfinished, FinishedLater, Undone, Refused, Busy],
            Role::Destination => &[Finished, Undone, Refused, Busy],
            Role::Peer => &[Finished, Undone, Orphaned, Expired],
        }
    }
}

/// What a command does with an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    PreDump,
    Checkpoint,
    PartialRestore,
    Restore,
}

impl Operation {
    const ALL: [Operation; 4] =
        [Operation::PreDump, Operation::Checkpoint, Operation::PartialRestore, Operation::Restore];

    fn name(self) -> &'static str {
        match self {
            Operation::PreDump => "pre-dump",
            Operation::Checkpoint => "checkpoint",
            Operation::PartialRestore => "partial-restore",
            Operation::Restore => "restore",
        }
    }
}

/// Where somebody knocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    Agents,
    Containers,
    Admin,
    Metrics,
}

/// Why somebody was not heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// No certificate of our authority, or none at all.
    Tls,
    Version,
    /// More than is allowed.
    Size,
    Malformed,
    /// It did not say what it wants in time.
    Slow,
    /// Too many at a time.
    Flood,
    /// It is not who it says it is.
    Credentials,
    /// It may not ask.
    Rights,
}

impl Reason {
    /// `None` for connections that just ended.
    pub fn of(e: &FrameError) -> Option<Reason> {
        match e {
            FrameError::Closed | FrameError::Io(_) | FrameError::Encode(_) => None,
            FrameError::TimedOut | FrameError::Silent(_) => Some(Reason::Slow),
            FrameError::Version { .. } => Some(Reason::Version),
            FrameError::TooLong { .. } => Some(Reason::Size),
            FrameError::Magic(_) | FrameError::Body(_) | FrameError::Rest(_) => Some(Reason::Malformed),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Reason::Tls => "tls",
            Reason::Version => "version",
            Reason::Size => "size",
            Reason::Malformed => "malformed",
            Reason::Slow => "slow",
            Reason::Flood => "flood",
            Reason::Credentials => "credentials",
            Reason::Rights => "rights",
        }
    }
}

impl Door {
    const ALL: [Door; 4] = [Door::Agents, Door::Containers, Door::Admin, Door::Metrics];

    fn name(self) -> &'static str {
        match self {
            Door::Agents => "agents",
            Door::Containers => "containers",
            Door::Admin => "admin",
            Door::Metrics => "metrics",
        }
    }

    fn reasons(self) -> &'static [Reason] {
        use Reason::{Credentials, Flood, Malformed, Rights, Size, Slow, Tls, Version};
        match self {
            Door::Agents => &[Tls, Version, Size, Malformed, Slow, Flood],
            Door::Containers => &[Version, Size, Malformed, Slow, Flood, Credentials, Rights],
            Door::Admin => &[Malformed, Rights],
            Door::Metrics => &[Size, Malformed, Slow, Flood],
        }
    }
}

/// A question about where an end of a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Of an application that connects a QP.
    Resolve,
    /// The same, passed on by another agent.
    ResolveForAgent,
    /// Of a source that looks for its container's peers.
    Find,
}

impl Lookup {
    const ALL: [Lookup; 3] = [Lookup::Resolve, Lookup::ResolveForAgent, Lookup::Find];

    fn name(self) -> &'static str {
        match self {
            Lookup::Resolve => "resolve",
            Lookup::ResolveForAgent => "resolve-for-agent",
            Lookup::Find => "find",
        }
    }
}

// ---- counting ------------------------------------------------------------------------------------------------------

/// Everything one agent counts.
#[derive(Debug)]
pub struct Metrics {
    migrations: Counters<2>,
    images: Counters<2>,
    sent: Counters<1>,
    held: Counters<0>,
    lookups: Counters<2>,
    orders: Counters<2>,
    rejected: Counters<2>,
    phases: [Histogram; Phase::ALL.len()],
    pause: Histogram,
    frozen: Histogram,
    asked: Mutex<Option<(Instant, Asked)>>,
}

impl Default for Metrics {
    fn default() -> Self {
        let doors = Door::ALL.iter().flat_map(|d| d.reasons().iter().map(|r| [d.name(), r.name()]));
        let roles = Role::ALL.iter().flat_map(|r| Outcome::of(*r).iter().map(|o| [r.name(), o.name()]));
        let images = Operation::ALL.iter().flat_map(|operation| {
            let outcomes: &[Outcome] = match operation {
                Operation::PartialRestore => &[Outcome::Finished, Outcome::Refused],
                _ => &[Outcome::Finished, Outcome::Unfinished, Outcome::Undone, Outcome::Refused, Outcome::Busy],
            };
            outcomes.iter().map(|o| [operation.name(), o.name()])
        });
        Metrics {
            migrations: Counters::new(
                "migrrdma_migrations_total",
                "Migrations between hosts that have ended for this host, without dry runs.",
                ["role", "outcome"],
                roles,
            ),
            images: Counters::new(
                "migrrdma_image_operations_total",
                "Checkpoints and restores of containers with RDMA by command that have ended.",
                ["operation", "outcome"],
                images,
            ),
            sent: Counters::new(
                "migrrdma_sent_bytes_total",
                "Bytes that finished migrations from this host have sent.",
                ["what"],
                [["image"], ["pre-copy"], ["registered-memory"]],
            ),
            held: Counters::new(
                "migrrdma_held_sends_total",
                "Sends that processes here had posted while they were suspended, and that went out afterwards.",
                [],
                [[]],
            ),
            lookups: Counters::new(
                "migrrdma_lookups_total",
                "Ends of connections that were asked for; of missed ones nothing is known, they never moved or are gone.",
                ["question", "result"],
                Lookup::ALL.iter().flat_map(|l| ["found", "missed"].map(|result| [l.name(), result])),
            ),
            orders: Counters::new(
                "migrrdma_orders_total",
                "Orders of other agents, by what they were answered.",
                ["order", "answer"],
                [],
            ),
            rejected: Counters::new(
                "migrrdma_rejected_requests_total",
                "Requests and connections that were not heard, by where they came and why not.",
                ["door", "reason"],
                doors,
            ),
            phases: Default::default(),
            pause: Histogram::default(),
            frozen: Histogram::default(),
            asked: Mutex::default(),
        }
    }
}

impl Metrics {
    /// A migration has ended for this host.
    pub fn migration(&self, role: Role, outcome: Outcome) {
        self.migrations.add([role.name(), outcome.name()], 1);
    }

    pub fn image(&self, operation: Operation, outcome: Outcome) {
        self.images.add([operation.name(), outcome.name()], 1);
    }

    /// A phase has run to its end.
    pub fn phase(&self, phase: Phase, seconds: f64) {
        self.phases[phase as usize].add(seconds);
    }

    /// What a finished migration says of itself.
    pub fn done(&self, summary: &Summary) {
        self.sent.add(["image"], summary.image_bytes);
        self.sent.add(["pre-copy"], summary.pre_copied_bytes);
        self.sent.add(["registered-memory"], summary.memory_bytes);
        summary.pause_seconds.into_iter().for_each(|s| self.pause.add(s));
        summary.frozen_seconds.into_iter().for_each(|s| self.frozen.add(s));
    }

    /// A process goes on, and so many sends with it.
    pub fn held(&self, sends: u64) {
        self.held.add([], sends);
    }

    pub fn lookup(&self, question: Lookup, found: bool) {
        self.lookups.add([question.name(), if found { "found" } else { "missed" }], 1);
    }

    /// An order by its name, and what became of it.
    pub fn order(&self, order: &'static str, answer: &'static str) {
        self.orders.add([order, answer], 1);
    }

    pub fn rejected(&self, door: Door, reason: Reason) {
        self.rejected.add([door.name(), reason.name()], 1);
    }

    /// Everything that is counted, as a page.
    pub fn page(&self) -> String {
        let mut page = Page::default();
        self.render(&mut page);
        page.0
    }

    fn render(&self, page: &mut Page) {
        self.migrations.render(page);
        self.images.render(page);
        let name = "migrrdma_phase_duration_seconds";
        page.head(name, "Phases that ran to their end, on the host that conducts the migration.", "histogram");
        for (phase, times) in Phase::ALL.iter().zip(&self.phases) {
            times.render(page, name, &[("phase", phase.name())]);
        }
        let name = "migrrdma_pause_duration_seconds";
        page.head(
            name,
            "From the first held send until all were free again, of migrations from this host.",
            "histogram",
        );
        self.pause.render(page, name, &[]);
        let name = "migrrdma_frozen_duration_seconds";
        page.head(name, "From the freeze here until the tasks ran there, of migrations from this host.", "histogram");
        self.frozen.render(page, name, &[]);
        self.sent.render(page);
        self.held.render(page);
        self.lookups.render(page);
        self.orders.render(page);
        self.rejected.render(page);
    }
}

// ---- looking -------------------------------------------------------------------------------------------------------

/// What shims have said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Asked {
    /// Connected, but busy with a migration, or silent.
    unasked: usize,
    qps: BTreeMap<&'static str, usize>,
    registered: u64,
}

impl Asked {
    fn add(&mut self, state: &ProcessState) {
        for context in &state.contexts {
            for qp in &context.qps {
                *self.qps.entry(qp_phase(qp.phase)).or_default() += 1;
            }
            self.registered += context.mrs.iter().map(|m| m.length).sum::<u64>();
        }
    }
}

const QP_PHASES: [QpPhase; 7] =
    [QpPhase::Reset, QpPhase::Init, QpPhase::Rtr, QpPhase::Rts, QpPhase::Sqd, QpPhase::Sqe, QpPhase::Err];

fn qp_phase(phase: QpPhase) -> &'static str {
    match phase {
        QpPhase::Reset => "reset",
        QpPhase::Init => "init",
        QpPhase::Rtr => "rtr",
        QpPhase::Rts => "rts",
        QpPhase::Sqd => "sqd",
        QpPhase::Sqe => "sqe",
        QpPhase::Err => "err",
    }
}

/// What is true at this moment.
#[derive(Debug, Default)]
struct Now {
    host: String,
    version: String,
    under_way: BTreeMap<Role, usize>,
    shims: usize,
    suspended: usize,
    asked: Asked,
}

impl Now {
    fn render(&self, page: &mut Page) {
        let info = [("host", self.host.as_str()), ("version", self.version.as_str())];
        page.gauge("migrrdma_agent_info", "The agent; always 1.", &[(&info, 1)]);
        let roles: Vec<_> = Role::ALL.iter().map(|r| ([("role", r.name())], self.under_way.get(r).copied())).collect();
        let roles: Vec<_> = roles.iter().map(|(labels, n)| (&labels[..], n.unwrap_or_default() as u64)).collect();
        page.gauge("migrrdma_migrations_under_way", "Migrations this host takes part in now.", &roles);
        page.gauge(
            "migrrdma_shims",
            "Processes with the shim that are connected to this agent.",
            &[(&[], self.shims as u64)],
        );
        page.gauge(
            "migrrdma_unasked_shims",
            "Those that were not asked what they have because they take part in a migration, or did not answer.",
            &[(&[], self.asked.unasked as u64)],
        );
        let qps: Vec<_> = QP_PHASES
            .map(qp_phase)
            .iter()
            .map(|name| ([("state", *name)], self.asked.qps.get(name).copied().unwrap_or_default() as u64))
            .collect();
        let qps: Vec<_> = qps.iter().map(|(labels, n)| (&labels[..], *n)).collect();
        page.gauge("migrrdma_qps", "QPs of the processes that were asked.", &qps);
        page.gauge(
            "migrrdma_registered_bytes",
            "Registered memory of the processes that were asked.",
            &[(&[], self.asked.registered)],
        );
        page.gauge(
            "migrrdma_suspended_qps",
            "QPs that were told by this agent to hold their sends, and not yet to go on.",
            &[(&[], self.suspended as u64)],
        );
    }
}

impl Agent {
    /// The whole page.
    pub fn metrics_page(&self) -> String {
        let mut page = Page::default();
        self.now().render(&mut page);
        page.0 + &self.metrics.page()
    }

    fn now(&self) -> Now {
        let mut under_way: BTreeMap<Role, usize> = BTreeMap::new();
        for migration in self.taking_part().iter().filter(|m| !m.over) {
            *under_way.entry(migration.role).or_default() += 1;
        }
        let shims = self.shims.all();
        Now {
            host: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            under_way,
            shims: shims.len(),
            suspended: shims.iter().map(|s| s.suspended()).sum(),
            asked: self.asked(),
        }
    }

    /// Others that ask meanwhile wait for the same answer.
    fn asked(&self) -> Asked {
        let mut last = lock(&self.metrics.asked);
        if let Some((at, asked)) = &*last
            && at.elapsed() < FRESH
        {
            return asked.clone();
        }
        let asked = self.ask_shims();
        *last = Some((Instant::now(), asked.clone()));
        asked
    }

    fn ask_shims(&self) -> Asked {
        let busy: BTreeSet<String> = lock(&self.claims).keys().cloned().collect();
        let all = self.shims.all();
        let mut asked = Asked::default();
        let said: Vec<Option<ProcessState>> = thread::scope(|scope| {
            let ask = |shim| {
                let report = move || super::shims::Shim::report(shim, ANSWER).ok();
                // Without a thread it is as if it had said nothing.
                thread::Builder::new().stack_size(256 << 10).spawn_scoped(scope, report).ok()
            };
            let running: Vec<_> =
                all.iter().map(|shim| (!busy.contains(&shim.container)).then(|| ask(&**shim)).flatten()).collect();
            running.into_iter().map(|t| t?.join().ok()?).collect()
        });
        for state in &said {
            match state {
                Some(state) => asked.add(state),
                None => asked.unasked += 1,
            }
        }
        asked
    }
}

// ---- the text format -----------------------------------------------------------------------------------------------

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{process, qp};

    fn text(render: impl FnOnce(&mut Page)) -> String {
        let mut page = Page::default();
        render(&mut page);
        page.0
    }

    #[test]
    fn what_processes_have_is_summed_up_by_state() {
        let mut asked = Asked { unasked: 1, ..Asked::default() };
        let mut state = process(7, vec![qp(1, 30, Some(17)), qp(2, 31, Some(18))]);
        state.contexts[0].qps[1].phase = QpPhase::Err;
        asked.add(&state);
        asked.add(&state);
        let registered = asked.registered;
        let now = Now { host: "h".into(), version: "1".into(), shims: 3, suspended: 4, asked, ..Now::default() };
        let page = text(|page| now.render(page));
        for line in [
            "migrrdma_agent_info{host=\"h\",version=\"1\"} 1",
            "# TYPE migrrdma_migrations_under_way gauge",
            "migrrdma_migrations_under_way{role=\"peer\"} 0",
            "migrrdma_shims 3",
            "migrrdma_unasked_shims 1",
            "migrrdma_qps{state=\"rts\"} 2",
            "migrrdma_qps{state=\"err\"} 2",
            "migrrdma_qps{state=\"init\"} 0",
            &format!("migrrdma_registered_bytes {registered}"),
            "migrrdma_suspended_qps 4",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
        }
    }

    #[test]
    fn what_is_counted_appears_under_its_name_and_no_counter_is_born_by_counting() {
        let metrics = Metrics::default();
        let before = metrics.page().lines().count();
        metrics.migration(Role::Source, Outcome::Undone);
        metrics.image(Operation::Restore, Outcome::Finished);
        metrics.phase(Phase::WaitBeforeStop, 0.2);
        metrics.lookup(Lookup::Find, false);
        metrics.held(12);
        metrics.held(3);
        metrics.done(&Summary { image_bytes: 10, pause_seconds: Some(0.3), ..Summary::default() });
        for door in Door::ALL {
            door.reasons().iter().for_each(|reason| metrics.rejected(door, *reason));
        }
        let page = metrics.page();
        assert_eq!(page.lines().count(), before);
        metrics.order("claim", "busy");
        let page = metrics.page();
        for line in [
            "migrrdma_migrations_total{role=\"source\",outcome=\"undone\"} 1",
            "migrrdma_migrations_total{role=\"peer\",outcome=\"undone\"} 0",
            "migrrdma_image_operations_total{operation=\"restore\",outcome=\"finished\"} 1",
            "migrrdma_phase_duration_seconds_bucket{phase=\"wait-before-stop\",le=\"0.1\"} 0",
            "migrrdma_phase_duration_seconds_bucket{phase=\"wait-before-stop\",le=\"0.25\"} 1",
            "migrrdma_phase_duration_seconds_sum{phase=\"wait-before-stop\"} 0.2",
            "migrrdma_phase_duration_seconds_count{phase=\"dump\"} 0",
            "migrrdma_pause_duration_seconds_count 1",
            "migrrdma_frozen_duration_seconds_count 0",
            "migrrdma_sent_bytes_total{what=\"image\"} 10",
            "migrrdma_held_sends_total 15",
            "migrrdma_lookups_total{question=\"find\",result=\"missed\"} 1",
            "migrrdma_orders_total{order=\"claim\",answer=\"busy\"} 1",
            "migrrdma_rejected_requests_total{door=\"agents\",reason=\"tls\"} 1",
        ] {
            assert!(page.lines().any(|l| l == line), "{line} is missing in\n{page}");
        }
        // Every sample belongs to the family announced last, and no family is announced twice.
        let mut family = String::new();
        let mut announced = BTreeSet::new();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                family = rest.split(' ').next().unwrap().into();
                assert!(announced.insert(family.clone()), "{family} twice");
            } else if !line.starts_with('#') {
                assert!(line.starts_with(&family), "{line} under {family}");
            }
        }
    }
}
