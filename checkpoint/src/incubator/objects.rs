//! The kernel objects of the processes that are to come: made, changed and destroyed so that they equal what a
//! [`ProcessState`] says, as often as a newer one arrives.
//!
//! Objects are keyed by process, context and object id, so a second state costs only its differences. Queues are never
//! mapped here: the kernel allows that once, and the restored process needs it.

use super::gid;
use super::mr::{Files, Memory, Mr};
use super::proto::Link;
use super::qp::{self, Qp};
use super::wire::Place;
use crate::uverbs::abi::QueryDeviceResp;
use crate::uverbs::context::{CqAttr, SrqAttr};
use crate::uverbs::{Context, Device, Mapping, UverbsError};
use rdma_virt::id::{Handle, ObjId, Vpid};
use rdma_virt::saved::{
    AdoptedContext, AdoptedProcess, ContextState, CqState, ProcessState, QpPhase, QueueMap, SgidMap, SrqState,
};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// An object could not be made equal to the state.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    #[error("{what} of process {} ({comm}): {source}", vpid.0)]
    Verb { what: String, vpid: Vpid, comm: String, source: UverbsError },
    #[error("{what} of process {} ({comm}): {why}", vpid.0)]
    Wrong { what: String, vpid: Vpid, comm: String, why: String },
    #[error("no RDMA device here for {device} (driver {driver}) of process {}; this host has: {have}", vpid.0)]
    NoDevice { device: String, driver: String, vpid: Vpid, have: String },
    #[error("device {device} of this host allows less than the container has: {beyond}")]
    Limit { device: String, beyond: String },
    #[error("process {} has no QP with id {} in context {} to connect", vpid.0, qp.0, ctx.0)]
    NoQp { vpid: Vpid, ctx: ObjId, qp: ObjId },
}

/// Whose object an error is about.
#[derive(Clone, Debug)]
pub(super) struct Owner {
    pub vpid: Vpid,
    pub comm: String,
}

impl Owner {
    pub fn verb(&self, what: impl Into<String>) -> impl FnOnce(UverbsError) -> ObjectError {
        let (what, vpid, comm) = (what.into(), self.vpid, self.comm.clone());
        move |source| ObjectError::Verb { what, vpid, comm, source }
    }

    pub fn wrong(&self, what: impl Into<String>, why: impl Into<String>) -> ObjectError {
        ObjectError::Wrong { what: what.into(), vpid: self.vpid, comm: self.comm.clone(), why: why.into() }
    }
}

/// A CQ or SRQ with the state it was made from.
#[derive(Debug)]
struct Queue<S> {
    state: S,
    handle: Handle,
    map: Option<Mapping>,
}

/// One context of a process to come.
#[derive(Debug)]
struct Home {
    context: Context,
    sgids: Vec<SgidMap>,
    cmd_fd: i32,
    async_fd: i32,
    pds: BTreeMap<ObjId, Handle>,
    channels: BTreeMap<ObjId, (i32, OwnedFd)>,
    cqs: BTreeMap<ObjId, Queue<CqState>>,
    srqs: BTreeMap<ObjId, Queue<SrqState>>,
    qps: BTreeMap<ObjId, Qp>,
    mrs: BTreeMap<ObjId, Mr>,
}

/// Everything this incubator has made.
#[derive(Debug, Default)]
pub struct Objects {
    processes: BTreeMap<Vpid, BTreeMap<ObjId, Home>>,
    /// Device on the source → device here, from the parent.
    choice: BTreeMap<String, String>,
    /// Registered memory that is here already.
    memory: Option<Memory>,
}

/// A queue that the restored process maps.
#[derive(Debug)]
pub struct Grant<'a> {
    pub fd: BorrowedFd<'a>,
    /// Offset to map, bytes.
    pub offset: u64,
}

/// What restored processes have to take over.
#[derive(Debug, Default)]
pub struct Expected {
    /// (vpid, descriptor, name)
    pub files: Vec<(i32, i32, String)>,
    /// (vpid, address, name)
    pub maps: Vec<(i32, u64, String)>,
}

impl Objects {
    pub fn new(choice: Vec<(String, String)>, memory: Option<Memory>) -> Self {
        Self { processes: BTreeMap::new(), choice: choice.into_iter().collect(), memory }
    }

    /// Makes the kernel objects equal to `wanted`. After an error what was done stays; a repetition goes on from there.
    pub fn converge(&mut self, wanted: &[ProcessState], here: &[Device]) -> Result<(), ObjectError> {
        self.processes.retain(|vpid, _| wanted.iter().any(|process| process.vpid == *vpid));
        for process in wanted {
            let owner = Owner { vpid: process.vpid, comm: process.comm.clone() };
            let homes = self.processes.entry(process.vpid).or_default();
            homes.retain(|id, _| process.contexts.iter().any(|context| context.id == *id));
            for state in &process.contexts {
                let device = choose(&self.choice, state, here, process.vpid)?;
                let home = match homes.entry(state.id) {
                    std::collections::btree_map::Entry::Occupied(home) => home.into_mut(),
                    std::collections::btree_map::Entry::Vacant(room) => {
                        let what = format!("context {}", state.device);
                        let context = Context::open(device).map_err(owner.verb(&what))?;
                        let limits = context.limits().map_err(owner.verb(&what))?;
                        fits(&limits, &self.choice, wanted, device, here)?;
                        room.insert(Home::new(context))
                    }
                };
                home.converge(&owner, state, device)?;
                let memory = self.memory.as_ref().map(|memory| memory.of(&process.memory));
                home.register(&owner, state, memory)?;
            }
        }
        Ok(())
    }

    /// Connects one QP as far as its state wants.
    pub fn connect(&mut self, link: &Link) -> Result<(), ObjectError> {
        let missing = ObjectError::NoQp { vpid: link.vpid, ctx: link.ctx, qp: link.qp };
        let home = self.processes.get_mut(&link.vpid).and_then(|homes| homes.get_mut(&link.ctx));
        let Some(home) = home else { return Err(missing) };
        let Some(qp) = home.qps.get_mut(&link.qp) else { return Err(missing) };
        let owner = Owner { vpid: link.vpid, comm: "connect".into() };
        qp.connect(&owner, &home.context, &home.sgids, link)
    }

    /// What there is.
    pub fn report(&self) -> Vec<AdoptedProcess> {
        self.processes
            .iter()
            .map(|(vpid, homes)| AdoptedProcess {
                vpid: *vpid,
                contexts: homes.iter().map(|(id, home)| home.report(*id)).collect(),
            })
            .collect()
    }

    /// The file that was descriptor `fd` of process `vpid`.
    pub fn file(&self, vpid: i32, fd: i32) -> Option<BorrowedFd<'_>> {
        self.processes.get(&Vpid(vpid))?.values().find_map(|home| home.file(fd))
    }

    /// The queue that process `vpid` had mapped at `addr`. The address alone says which: the old offset that CRIU knows
    /// is that of the last host, the one in the state that of the host where the object was first made.
    pub fn queue(&self, vpid: i32, addr: u64) -> Result<Grant<'_>, String> {
        let homes =
            self.processes.get(&Vpid(vpid)).ok_or_else(|| format!("process {vpid} has no RDMA objects here"))?;
        for home in homes.values() {
            if let Some((_, _, new)) = home.queues().find(|(_, old, _)| old.addr == addr) {
                return Ok(Grant { fd: home.context.cmd_fd(), offset: new.offset });
            }
        }
        Err(format!("process {vpid} maps an RDMA device at {addr:#x}, which is no queue its shim reported"))
    }

    /// Every queue that process `vpid` had mapped, in the order of their addresses.
    pub fn places(&self, vpid: i32) -> Result<Vec<Place>, String> {
        let homes =
            self.processes.get(&Vpid(vpid)).ok_or_else(|| format!("process {vpid} has no RDMA objects here"))?;
        let of = |home: &Home| -> Vec<Place> {
            let place = |old: QueueMap, new: Mapping| Place { addr: old.addr, fd: home.cmd_fd, offset: new.offset };
            home.queues().map(|(_, old, new)| place(old, new)).collect()
        };
        let mut places: Vec<Place> = homes.values().flat_map(of).collect();
        places.sort_by_key(|place| place.addr);
        Ok(places)
    }

    /// What restored processes have to take over.
    pub fn expected(&self) -> Expected {
        let Expected { mut files, mut maps } = Expected::default();
        for (vpid, homes) in &self.processes {
            for home in homes.values() {
                let device = home.context.device();
                files.push((vpid.0, home.cmd_fd, format!("command file of {device}")));
                files.push((vpid.0, home.async_fd, format!("event file of {device}")));
                for (id, (fd, _)) in &home.channels {
                    files.push((vpid.0, *fd, format!("completion channel {}", id.0)));
                }
                maps.extend(home.queues().map(|(what, old, _)| (vpid.0, old.addr, what)));
            }
        }
        Expected { files, maps }
    }
}

/// The device here that takes the place of the one a context was open on.
pub(crate) fn choose<'a>(
    choice: &BTreeMap<String, String>,
    state: &ContextState,
    here: &'a [Device],
    vpid: Vpid,
) -> Result<&'a Device, ObjectError> {
    let found = match choice.get(&state.device) {
        Some(name) => here.iter().find(|device| device.name == *name),
        None => {
            let mut fitting = here.iter().filter(|device| device.driver == state.driver);
            fitting.clone().find(|device| device.is_active()).or_else(|| fitting.next())
        }
    };
    found.ok_or_else(|| ObjectError::NoDevice {
        device: state.device.clone(),
        driver: state.driver.clone(),
        vpid,
        have: here.iter().map(|device| format!("{} ({})", device.name, device.driver)).collect::<Vec<_>>().join(", "),
    })
}

/// Whether a device allows all that is to be made on it.
fn fits(
    limits: &QueryDeviceResp,
    choice: &BTreeMap<String, String>,
    wanted: &[ProcessState],
    device: &Device,
    here: &[Device],
) -> Result<(), ObjectError> {
    let all = wanted.iter().flat_map(|process| process.contexts.iter().map(|context| (process.vpid, context)));
    let here = all.filter(|(vpid, context)| choose(choice, context, here, *vpid).is_ok_and(|d| d.name == device.name));
    let contexts: Vec<&ContextState> = here.map(|(_, context)| context).collect();
    match super::limits::exceeded(limits, &contexts) {
        Some(beyond) => Err(ObjectError::Limit { device: device.name.clone(), beyond }),
        None => Ok(()),
    }
}

impl Home {
    fn new(context: Context) -> Self {
        Self {
            context,
            sgids: Vec::new(),
            cmd_fd: -1,
            async_fd: -1,
            pds: BTreeMap::new(),
            channels: BTreeMap::new(),
            cqs: BTreeMap::new(),
            srqs: BTreeMap::new(),
            qps: BTreeMap::new(),
            mrs: BTreeMap::new(),
        }
    }

    fn converge(&mut self, owner: &Owner, state: &ContextState, device: &Device) -> Result<(), ObjectError> {
        self.cmd_fd = state.cmd_fd;
        self.async_fd = state.async_fd;
        let mut sgids = gid::map(&state.gids, device);
        // Those in use first: whoever looks for "the" address of this context finds one that packets carry.
        let used = |map: &SgidMap| {
            let mut connected = state.qps.iter().filter(|qp| is_connected(qp.phase));
            connected.any(|qp| (qp.attr.port_num, qp.attr.sgid_index) == (map.port, map.virtual_index))
        };
        sgids.sort_by_key(|map| !used(map));
        if !self.sgids.iter().all(|known| sgids.contains(known)) {
            // A changed GID table makes every address vector doubtful.
            self.qps.values_mut().for_each(Qp::forget_link);
        }
        self.sgids = sgids;
        self.deregister_stale(owner, state)?;
        self.destroy_stale(owner, state)?;
        self.create_missing(owner, state)?;
        for wanted in &state.qps {
            if let Some(qp) = self.qps.get_mut(&wanted.id) {
                qp.settle(owner, &self.context, wanted)?;
            }
        }
        Ok(())
    }

    /// Destroys what is gone or was made from something that changed, users before the used.
    fn destroy_stale(&mut self, owner: &Owner, state: &ContextState) -> Result<(), ObjectError> {
        let channel_stays = |id: &ObjId| state.channels.iter().any(|channel| channel.id == *id);
        let cq_stays = |id: &ObjId| {
            let made = self.cqs.get(id);
            made.is_some_and(|cq| state.cqs.iter().any(|now| now.id == *id && same_cq(&cq.state, now)))
        };
        let srq_stays = |id: &ObjId| {
            let made = self.srqs.get(id);
            made.is_some_and(|srq| state.srqs.iter().any(|now| now.id == *id && same_srq(&srq.state, now)))
        };
        let qp_stays = |id: &ObjId, made: &Qp| {
            state.qps.iter().any(|now| {
                now.id == *id
                    && made.same_shape(now)
                    && cq_stays(&now.send_cq)
                    && cq_stays(&now.recv_cq)
                    && now.srq.as_ref().is_none_or(srq_stays)
            })
        };
        let qps: Vec<ObjId> = self.qps.iter().filter(|(id, made)| !qp_stays(id, made)).map(|(id, _)| *id).collect();
        let srqs: Vec<ObjId> = self.srqs.keys().filter(|id| !srq_stays(id)).copied().collect();
        let cqs: Vec<ObjId> = self.cqs.keys().filter(|id| !cq_stays(id)).copied().collect();
        let pds: Vec<ObjId> = self.pds.keys().filter(|id| !state.pds.iter().any(|pd| pd.id == **id)).copied().collect();
        for id in qps {
            self.context.destroy_qp(self.qps[&id].handle()).map_err(owner.verb(format!("QP {}", id.0)))?;
            self.qps.remove(&id);
        }
        for id in srqs {
            self.context.destroy_srq(self.srqs[&id].handle).map_err(owner.verb(format!("SRQ {}", id.0)))?;
            self.srqs.remove(&id);
        }
        for id in cqs {
            self.context.destroy_cq(self.cqs[&id].handle).map_err(owner.verb(format!("CQ {}", id.0)))?;
            self.cqs.remove(&id);
        }
        self.channels.retain(|id, _| channel_stays(id));
        for id in pds {
            self.context.destroy_pd(self.pds[&id]).map_err(owner.verb(format!("PD {}", id.0)))?;
            self.pds.remove(&id);
        }
        Ok(())
    }

    /// Creates what is missing, the used before their users. The restored process' own pointers become the kernel's
    /// `user_handle`, which it gives back in events.
    fn create_missing(&mut self, owner: &Owner, state: &ContextState) -> Result<(), ObjectError> {
        for pd in &state.pds {
            if !self.pds.contains_key(&pd.id) {
                let handle = self.context.alloc_pd().map_err(owner.verb(format!("PD {}", pd.id.0)))?;
                self.pds.insert(pd.id, handle);
            }
        }
        for channel in &state.channels {
            match self.channels.get_mut(&channel.id) {
                Some((fd, _)) => *fd = channel.fd,
                None => {
                    let what = owner.verb(format!("completion channel {}", channel.id.0));
                    let file = self.context.create_comp_channel().map_err(what)?;
                    self.channels.insert(channel.id, (channel.fd, file));
                }
            }
        }
        for cq in &state.cqs {
            if !self.cqs.contains_key(&cq.id) {
                let what = format!("CQ {}", cq.id.0);
                let channel =
                    match cq.channel {
                        None => None,
                        Some(id) => {
                            let channel = self.channels.get(&id).map(|(_, file)| file.as_fd());
                            Some(channel.ok_or_else(|| {
                                owner.wrong(&what, format!("its channel {} is not in the state", id.0))
                            })?)
                        }
                    };
                let attr = CqAttr { cqe: cq.cqe, user_handle: cq.user_handle, comp_vector: cq.comp_vector, channel };
                let made = self.context.create_cq(&attr).map_err(owner.verb(&what))?;
                self.cqs.insert(cq.id, Queue { state: cq.clone(), handle: made.handle, map: made.map });
                check_size(owner, &what, cq.map, made.map)?;
            }
            if let Some(made) = self.cqs.get_mut(&cq.id) {
                made.state = cq.clone();
            }
        }
        for srq in &state.srqs {
            if !self.srqs.contains_key(&srq.id) {
                let what = format!("SRQ {}", srq.id.0);
                let attr = SrqAttr {
                    pd: self.pd(owner, &what, srq.pd)?,
                    user_handle: srq.user_handle,
                    max_wr: srq.max_wr,
                    max_sge: srq.max_sge,
                    limit: srq.limit,
                };
                let made = self.context.create_srq(&attr).map_err(owner.verb(&what))?;
                self.srqs.insert(srq.id, Queue { state: srq.clone(), handle: made.handle, map: made.map });
                check_size(owner, &what, srq.map, made.map)?;
            }
            if let Some(made) = self.srqs.get_mut(&srq.id) {
                if made.state.limit != srq.limit {
                    let what = owner.verb(format!("limit of SRQ {}", srq.id.0));
                    self.context.modify_srq_limit(made.handle, srq.limit).map_err(what)?;
                }
                made.state = srq.clone();
            }
        }
        for wanted in &state.qps {
            if self.qps.contains_key(&wanted.id) {
                continue;
            }
            let what = format!("QP {}", wanted.vqpn.0);
            let cq = |id: ObjId| {
                let found = self.cqs.get(&id).map(|cq| cq.handle);
                found.ok_or_else(|| owner.wrong(&what, format!("its CQ {} is not in the state", id.0)))
            };
            let srq = match wanted.srq {
                None => None,
                Some(id) => {
                    let found = self.srqs.get(&id).map(|srq| srq.handle);
                    Some(found.ok_or_else(|| owner.wrong(&what, format!("its SRQ {} is not in the state", id.0)))?)
                }
            };
            let parts = qp::Parts {
                pd: self.pd(owner, &what, wanted.pd)?,
                send_cq: cq(wanted.send_cq)?,
                recv_cq: cq(wanted.recv_cq)?,
                srq,
            };
            let made = Qp::create(owner, &self.context, wanted, &parts)?;
            let (sq, rq) = (made.maps().sq, made.maps().rq);
            self.qps.insert(wanted.id, made);
            check_size(owner, &format!("send queue of {what}"), wanted.sq_map, sq)?;
            check_size(owner, &format!("receive queue of {what}"), wanted.rq_map, rq)?;
        }
        Ok(())
    }

    /// MRs that are gone, or are others by now. Before their PDs go.
    fn deregister_stale(&mut self, owner: &Owner, state: &ContextState) -> Result<(), ObjectError> {
        let stays = |id: &ObjId, made: &Mr| state.mrs.iter().any(|now| now.id == *id && made.same(now));
        let stale: Vec<ObjId> = self.mrs.iter().filter(|(id, made)| !stays(id, made)).map(|(id, _)| *id).collect();
        for id in stale {
            self.context.destroy_mr(self.mrs[&id].handle()).map_err(owner.verb(format!("MR {}", id.0)))?;
            self.mrs.remove(&id);
        }
        Ok(())
    }

    /// MRs whose memory is here. Those that cannot be registered now are left to the restored process, which has the
    /// same rights and can say what is wrong.
    fn register(&mut self, owner: &Owner, state: &ContextState, memory: Option<Files<'_>>) -> Result<(), ObjectError> {
        let mut memory = memory.unwrap_or_default();
        // A file that is another one by now has other pages than those an MR holds.
        let stale: Vec<ObjId> = self.mrs.iter().filter(|(_, mr)| !memory.still(mr)).map(|(id, _)| *id).collect();
        for id in stale {
            self.context.destroy_mr(self.mrs[&id].handle()).map_err(owner.verb(format!("MR {}", id.0)))?;
            self.mrs.remove(&id);
        }
        for wanted in &state.mrs {
            if self.mrs.contains_key(&wanted.id) {
                continue;
            }
            let pd = self.pd(owner, &format!("MR {}", wanted.id.0), wanted.pd)?;
            match memory.register(&self.context, pd, wanted) {
                Ok(Some(mr)) => drop(self.mrs.insert(wanted.id, mr)),
                Ok(None) => {}
                Err(why) => {
                    eprintln!("incubator: MR {} of process {} is registered late: {why}", wanted.id.0, owner.vpid.0)
                }
            }
        }
        Ok(())
    }

    fn pd(&self, owner: &Owner, what: &str, id: ObjId) -> Result<Handle, ObjectError> {
        self.pds.get(&id).copied().ok_or_else(|| owner.wrong(what, format!("its PD {} is not in the state", id.0)))
    }

    fn file(&self, fd: i32) -> Option<BorrowedFd<'_>> {
        if fd == self.cmd_fd {
            return Some(self.context.cmd_fd());
        }
        if fd == self.async_fd {
            return Some(self.context.async_fd());
        }
        self.channels.values().find(|(number, _)| *number == fd).map(|(_, file)| file.as_fd())
    }

    /// Name, old mapping and new mapping of every queue the process has mapped.
    fn queues(&self) -> impl Iterator<Item = (String, QueueMap, Mapping)> {
        let cqs = self.cqs.iter().map(|(id, cq)| (format!("CQ {}", id.0), cq.state.map, cq.map));
        let srqs = self.srqs.iter().map(|(id, srq)| (format!("SRQ {}", id.0), srq.state.map, srq.map));
        let qps = self.qps.values().flat_map(Qp::queues);
        cqs.chain(srqs).chain(qps).filter_map(|(what, old, new)| Some((what, old?, new?)))
    }

    fn report(&self, id: ObjId) -> AdoptedContext {
        AdoptedContext {
            id,
            device: self.context.device().to_owned(),
            sgid_index: self.sgids.clone(),
            pds: self.pds.iter().map(|(id, handle)| (*id, *handle)).collect(),
            cqs: self.cqs.iter().map(|(id, cq)| (*id, cq.handle)).collect(),
            srqs: self.srqs.iter().map(|(id, srq)| (*id, srq.handle)).collect(),
            qps: self.qps.iter().map(|(id, qp)| qp.report(*id)).collect(),
            mrs: self.mrs.iter().map(|(id, mr)| mr.report(*id)).collect(),
        }
    }
}

fn same_cq(made: &CqState, now: &CqState) -> bool {
    (made.cqe, made.comp_vector, made.channel, made.user_handle)
        == (now.cqe, now.comp_vector, now.channel, now.user_handle)
}

fn same_srq(made: &SrqState, now: &SrqState) -> bool {
    (made.pd, made.max_wr, made.max_sge, made.user_handle) == (now.pd, now.max_wr, now.max_sge, now.user_handle)
}

/// The application's library goes on with the size it knows, so the new queue must have exactly that.
pub(super) fn check_size(
    owner: &Owner,
    what: &str,
    old: Option<QueueMap>,
    new: Option<Mapping>,
) -> Result<(), ObjectError> {
    const PAGE: u64 = 4096;
    let pages = |len: u64| len.div_ceil(PAGE);
    match (old, new) {
        (Some(old), Some(new)) if pages(old.len) != pages(new.len) => {
            let (old, new) = (old.len, new.len);
            Err(owner
                .wrong(what, format!("the kernel here makes it {new} bytes long, on the source it was {old} bytes")))
        }
        (Some(_), None) => Err(owner.wrong(what, "the driver here gives it no memory to map")),
        _ => Ok(()),
    }
}

/// Whether a QP in this phase carries an address of its remote end.
pub(super) fn is_connected(phase: QpPhase) -> bool {
    matches!(phase, QpPhase::Rtr | QpPhase::Rts | QpPhase::Sqd | QpPhase::Sqe)
}
