//! The *rebuild* hand-over: nobody makes kernel objects before the container is there, its processes make them by
//! themselves, after the commit. This is what any provider can do. Here are the choice between the two, the source's
//! part after the commit, and the destination's.
//!
//! What can be found out before the commit is: whether there is a device, an address on it, and a file of it inside the
//! restored container ([`Here::look`]). After the commit every step can only be repeated, and all of them may be.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use rdma_virt::id::{MigrationId, PGid, Vpid};
use rdma_virt::msg::{KeyTable, Reply, Request};
use rdma_virt::saved::{ContextState, ProcessState, QpState, RebuildContext, RebuildLink, RebuildProcess, SgidMap};

use super::check::inside;
use super::newcomers::{alive, ask_shims};
use super::plan::{Far, is_connected};
use super::source::{Run, Stop, confused};
use crate::agent::{Agent, chain};
use crate::image::{self, HandOver};
use crate::incubator;
use crate::net::msg::{Answer, BornGid, BornQp, JoinLink, Order};
use crate::uverbs::{self, Device};

/// For making and connecting everything: thousands of QPs at a few milliseconds each.
const OBJECTS: Duration = Duration::from_secs(120);

/// Why these processes cannot have their objects handed over; empty: they can.
pub fn against_adopt(states: &[ProcessState], can_adopt: impl Fn(&str) -> bool) -> Vec<String> {
    let contexts = states.iter().flat_map(|s| s.contexts.iter().map(move |c| (s, c)));
    contexts
        .filter(|(_, c)| !can_adopt(&c.driver))
        .map(|(s, c)| {
            format!(
                "{} (pid {}) uses {}, and objects on devices of driver {} cannot be handed over by an incubator; \
                 use --hand-over rebuild",
                s.comm, s.vpid.0, c.device, c.driver
            )
        })
        .collect()
}

impl Run<'_> {
    /// What was asked for, or else what the devices' drivers can do. Says what speaks against it.
    pub(super) fn choose_hand_over(&mut self) -> Vec<String> {
        let against = against_adopt(&self.states, uverbs::can_adopt);
        self.hand_over = match self.request.hand_over {
            Some(wish) => wish,
            None if against.is_empty() => HandOver::Adopt,
            None => HandOver::Rebuild,
        };
        if self.hand_over == HandOver::Adopt { against } else { Vec::new() }
    }

    /// After the commit: the moved processes make their objects again. Then the new QPs have numbers, to which the
    /// peers' second QPs are connected.
    pub(super) fn rebuild(&mut self) -> Result<Vec<(Vpid, KeyTable)>, Stop> {
        let mut keys = Vec::new();
        Self::again(&mut *self, "having the moved processes make their objects again", |run| {
            let outside = run.plan.joins_outside().map_err(Stop::Failed)?;
            keys = run.ask_to_rebuild(outside)?;
            if run.plan.links.iter().any(|l| matches!(l.far, Far::Inside(_))) {
                // Ends that moved together learn each other's numbers only now.
                keys = run.ask_to_rebuild(run.plan.joins_known())?;
            }
            Ok(())
        })?;
        let connects = self.plan.connects().into_iter();
        self.all_forward("connect", connects.map(|(p, r)| (p.agent, p.container, p.vpid, r)).collect());
        for peer in self.plan.peers().into_keys() {
            self.plan.connected(&peer);
        }
        Ok(keys)
    }

    fn ask_to_rebuild(&mut self, links: Vec<JoinLink>) -> Result<Vec<(Vpid, KeyTable)>, Stop> {
        let deadline = Duration::from_secs(self.world.config().deadlines.reconnect) + OBJECTS + self.answer_time();
        match self.ask_destination(Order::Rebuild { links }, deadline)? {
            Answer::Rebuilt { qps, gids, keys } => {
                (self.plan.born, self.plan.gids) = (qps, gids);
                Ok(keys)
            }
            _ => Err(confused("the destination", "rebuild")),
        }
    }
}

/// Where the processes of one arriving container find what they need on this host.
#[derive(Debug, Default)]
pub struct Here {
    states: Vec<ProcessState>,
    places: Vec<RebuildProcess>,
}

impl Here {
    /// Finds a device for every context of an image, and looks whether the restored container (whose init is `init`) can
    /// open it. An error says what is missing.
    pub fn look(images: &Path, init: i32) -> Result<Self, String> {
        let Some(image) = image::read(images).map_err(|e| chain(&e))? else { return Ok(Self::default()) };
        let states: Vec<ProcessState> = image.processes.into_iter().map(|p| p.state).collect();
        let devices = uverbs::devices().map_err(|e| chain(&e))?;
        let places = places(&states, &devices)?;
        let root = Path::new("/proc").join(init.to_string()).join("root");
        for device in &devices {
            let used = places.iter().flat_map(|p| &p.contexts).any(|c| c.device == device.name);
            if used && !can_see(&root, device) {
                return Err(format!(
                    "the container has no {} here, so its processes could not open {}; give its bundle that device",
                    device.node().display(),
                    device.name
                ));
            }
        }
        Ok(Self { states, places })
    }

    /// Has every shim make its objects again and connect what is known; the new numbers, and changed keys.
    #[expect(clippy::type_complexity, reason = "the two halves of the answer")]
    pub fn run(
        &self,
        agent: &Agent,
        id: MigrationId,
        container: &str,
        init: i32,
        links: &[JoinLink],
    ) -> Result<(Vec<BornQp>, Vec<(Vpid, KeyTable)>), String> {
        let places = alive(agent, container, init, self.places.iter().collect(), |place| place.vpid);
        let asks = places.into_iter().map(|place| (place.vpid, Request::Rebuild(with_links(place, links)))).collect();
        let (mut born, mut keys) = (Vec::new(), Vec::new());
        for (vpid, reply) in ask_shims(agent, id, container, asks, OBJECTS)? {
            let Reply::Rebuilt { qps, keys: table } = reply else {
                return Err(format!("pid {} answered rebuild with something else", vpid.0));
            };
            keys.push((vpid, table));
            for qp in qps {
                let pgid = self.address(vpid, &qp)?;
                let rdma_virt::saved::RebuiltQp { context, qp, vqpn, pqpn } = qp;
                born.push(BornQp { vpid, context, qp, vqpn, pqpn, pgid });
            }
        }
        if !born.is_empty() {
            interrupt(agent, container)?;
        }
        Ok((born, keys))
    }

    /// What each GID of the processes' tables is here.
    pub fn gids(&self) -> Vec<BornGid> {
        let contexts = self.places.iter().flat_map(|p| p.contexts.iter().map(|c| (p.vpid, c.id, &c.sgid_index[..])));
        super::born::gids(contexts, &self.states)
    }

    /// Where packets of this QP come from.
    fn address(&self, vpid: Vpid, made: &rdma_virt::saved::RebuiltQp) -> Result<PGid, String> {
        let place = self.places.iter().filter(|p| p.vpid == vpid).flat_map(|p| &p.contexts);
        let place = place.into_iter().find(|c| c.id == made.context);
        let context = self.states.iter().filter(|s| s.vpid == vpid).flat_map(|s| &s.contexts);
        let qp = context.flat_map(|c| c.qps.iter().map(move |q| (c.id, q)));
        let qp = qp.into_iter().find(|(c, q)| (*c, q.id) == (made.context, made.qp)).map(|(_, q)| q);
        let entry = place.zip(qp).and_then(|(place, qp)| entry(&place.sgid_index, qp));
        // One that is not connected sends from nowhere yet: whoever connects to it goes by the GID it was told.
        let entry = entry.or_else(|| place.and_then(|p| p.sgid_index.first()));
        entry.map(|map| map.physical).ok_or_else(|| format!("{} has no address on this host", made.vqpn))
    }
}

/// Threads that sleep in a system call on a file that was replaced look its number up again when they are interrupted.
/// Being stopped interrupts every call, and those that can go on afterwards do.
fn interrupt(agent: &Agent, container: &str) -> Result<(), String> {
    let stop = || {
        let found = agent.host.container(container)?;
        agent.host.freeze(&found)?;
        agent.host.thaw(&found)
    };
    stop().map_err(|e| format!("waking the container's threads: {e}"))
}

fn with_links(place: &RebuildProcess, links: &[JoinLink]) -> RebuildProcess {
    let own = links.iter().filter(|l| l.vpid == place.vpid);
    let links =
        own.map(|l| RebuildLink { context: l.context, qp: l.qp, remote: l.remote, sq_psn: l.sq_psn, rq_psn: l.rq_psn });
    RebuildProcess { links: links.collect(), ..place.clone() }
}

/// The entry of this host's GID table that stands in for the one a QP uses.
fn entry<'a>(maps: &'a [SgidMap], qp: &QpState) -> Option<&'a SgidMap> {
    maps.iter().find(|m| (m.port, m.virtual_index) == (qp.attr.port_num, qp.attr.sgid_index))
}

/// A device, and addresses on it, for every context.
fn places(states: &[ProcessState], here: &[Device]) -> Result<Vec<RebuildProcess>, String> {
    let place = |s: &ProcessState, c: &ContextState| -> Result<RebuildContext, String> {
        let device = incubator::choose(&Default::default(), c, here, s.vpid).map_err(|e| chain(&e))?;
        let sgid_index = incubator::gid::map(&c.gids, device);
        if let Some(qp) = c.qps.iter().find(|q| is_connected(q) && entry(&sgid_index, q).is_none()) {
            return Err(format!(
                "{} of {} (pid {}) uses GID entry {} of port {}, and {} here has no GID like it; give the interface an \
                 address of the same family",
                qp.vqpn, s.comm, s.vpid.0, qp.attr.sgid_index, qp.attr.port_num, device.name
            ));
        }
        Ok(RebuildContext { id: c.id, device: device.name.clone(), sgid_index })
    };
    states
        .iter()
        .map(|s| {
            let contexts = s.contexts.iter().map(|c| place(s, c)).collect::<Result<_, _>>()?;
            Ok(RebuildProcess { vpid: s.vpid, contexts, links: Vec::new() })
        })
        .collect()
}

/// Whether there is a file of this device where the library looks for one.
fn can_see(root: &Path, device: &Device) -> bool {
    let number = std::fs::read_to_string(format!("/sys/class/infiniband_verbs/{}/dev", device.uverbs));
    let number = number.ok().and_then(|text| {
        let (major, minor) = text.trim().split_once(':')?;
        Some(nix::libc::makedev(major.parse().ok()?, minor.parse().ok()?))
    });
    let meta = inside(root, &device.node()).and_then(|path| std::fs::symlink_metadata(path).ok());
    matches!((number, meta), (Some(n), Some(m)) if m.file_type().is_char_device() && m.rdev() == n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::fixture::{DST, process, qp};
    use crate::uverbs::{Gid, Port};
    use rdma_virt::id::{ObjId, PQpn, VGid, VQpn};
    use rdma_virt::saved::{GidEntry, RebuiltQp, Remote};

    fn device(driver: &str, gid: [u8; 16]) -> Device {
        Device {
            name: format!("{driver}1"),
            uverbs: "uverbs1".into(),
            driver: driver.into(),
            node_guid: 0,
            ports: vec![Port { number: 1, active: true, gids: vec![Gid { index: 3, gid: PGid(gid), kind: 2 }] }],
        }
    }

    #[test]
    fn a_provider_whose_objects_cannot_be_handed_over_is_named_with_the_way_out() {
        let mut state = process(7, vec![]);
        assert!(against_adopt(std::slice::from_ref(&state), uverbs::can_adopt).is_empty());
        state.contexts[0].driver = "mlx5_core".into();
        let text = against_adopt(&[state], uverbs::can_adopt).join("");
        assert!(text.contains("mlx5_core") && text.contains("pid 7") && text.contains("--hand-over rebuild"), "{text}");
    }

    #[test]
    fn every_context_gets_a_device_of_its_driver_and_the_address_its_qps_send_from() {
        let mut connected = qp(1, 17, Some(30));
        connected.attr.port_num = 1;
        let states = [process(7, vec![connected, qp(2, 18, None)])];
        let here = places(&states, &[device("other", DST), device("rxe", DST)]).unwrap();
        assert_eq!(here[0].contexts[0].device, "rxe1");
        let here = Here { states: states.to_vec(), places: here };
        for (id, vqpn) in [(1, 17), (2, 18)] {
            let made = RebuiltQp { context: ObjId(1), qp: ObjId(id), vqpn: VQpn(vqpn), pqpn: PQpn(40) };
            assert_eq!(here.address(Vpid(7), &made), Ok(PGid(DST)));
        }
    }

    #[test]
    fn a_missing_device_and_a_missing_address_stop_it_before_the_decision() {
        let states = [process(7, vec![qp(1, 17, Some(30))])];
        let text = places(&states, &[device("other", DST)]).unwrap_err();
        assert!(text.contains("rxe"), "{text}");
        let mut old = states.clone();
        old[0].contexts[0].gids = vec![GidEntry { port: 1, index: 0, gid: VGid([0x20; 16]), kind: 1 }];
        let text = places(&old, &[device("rxe", DST)]).unwrap_err();
        assert!(text.contains("no GID like it"), "{text}");
    }

    #[test]
    fn each_process_is_told_its_own_links() {
        let place = |vpid| RebuildProcess { vpid: Vpid(vpid), contexts: Vec::new(), links: Vec::new() };
        let remote = Remote { vgid: VGid([1; 16]), vqpn: VQpn(1), pgid: PGid([1; 16]), pqpn: PQpn(1) };
        let link =
            |vpid, qp| JoinLink { vpid: Vpid(vpid), context: ObjId(1), qp: ObjId(qp), remote, sq_psn: 1, rq_psn: 2 };
        let told = with_links(&place(8), &[link(7, 1), link(8, 2), link(8, 3)]);
        assert_eq!(told.links.iter().map(|l| l.qp.0).collect::<Vec<_>>(), [2, 3]);
    }
}
