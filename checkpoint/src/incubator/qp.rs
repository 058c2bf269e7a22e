//! One QP of a process to come, and the way from the state it is in to the state it must have.
//!
//! A QP whose attributes or remote end changed since it was connected goes back through RESET: its queues are empty and
//! unmapped, so nothing is lost, and its number stays.

use super::objects::{ObjectError, Owner, is_connected};
use super::proto::Link;
use crate::uverbs::abi::{self, qp_mask};
use crate::uverbs::context::QpAttr as Make;
use crate::uverbs::provider::QpMappings;
use crate::uverbs::{Context, Mapping};
use rdma_virt::id::{Handle, ObjId, PQpn};
use rdma_virt::saved::{AdoptedQp, QpAttr, QpPhase, QpState, QueueMap, SgidMap};

const RC: u32 = 2;
const UC: u32 = 3;

/// The kernel objects a QP is made of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Parts {
    pub pd: Handle,
    pub send_cq: Handle,
    pub recv_cq: Handle,
    pub srq: Option<Handle>,
}

/// A QP here, with what it was made from and how far it got.
#[derive(Debug)]
pub(super) struct Qp {
    state: QpState,
    handle: Handle,
    qpn: PQpn,
    maps: QpMappings,
    /// What the kernel has been told.
    phase: QpPhase,
    /// With which attributes it left RESET.
    attr: QpAttr,
    link: Option<Link>,
}

impl Qp {
    /// Makes it, in RESET.
    pub fn create(owner: &Owner, context: &Context, state: &QpState, parts: &Parts) -> Result<Self, ObjectError> {
        if !matches!(state.qp_type, RC | UC) {
            let why = format!("QPs of type {} cannot be handed over yet, only RC and UC", state.qp_type);
            return Err(owner.wrong(name(state), why));
        }
        let make = Make {
            pd: parts.pd,
            send_cq: parts.send_cq,
            recv_cq: parts.recv_cq,
            srq: parts.srq,
            qp_type: state.qp_type,
            sq_sig_all: state.sq_sig_all,
            cap: abi::QpCap {
                max_send_wr: state.cap.max_send_wr,
                max_recv_wr: state.cap.max_recv_wr,
                max_send_sge: state.cap.max_send_sge,
                max_recv_sge: state.cap.max_recv_sge,
                max_inline_data: state.cap.max_inline_data,
            },
            user_handle: state.user_handle,
        };
        let made = context.create_qp(&make).map_err(owner.verb(name(state)))?;
        Ok(Self {
            state: state.clone(),
            handle: made.handle,
            qpn: made.qpn,
            maps: made.maps,
            phase: QpPhase::Reset,
            attr: QpAttr::default(),
            link: None,
        })
    }

    pub fn handle(&self) -> Handle {
        self.handle
    }

    pub fn maps(&self) -> QpMappings {
        self.maps
    }

    /// Whether it could have been made from this state too.
    pub fn same_shape(&self, now: &QpState) -> bool {
        let made = &self.state;
        (made.pd, made.send_cq, made.recv_cq, made.srq, made.qp_type)
            == (now.pd, now.send_cq, now.recv_cq, now.srq, now.qp_type)
            && (made.sq_sig_all, made.cap, made.user_handle) == (now.sq_sig_all, now.cap, now.user_handle)
    }

    /// Its address vector is no longer to be trusted: the next settling takes it back to INIT.
    pub fn forget_link(&mut self) {
        self.link = None;
    }

    /// Takes a newer state and goes as far towards it as is possible without a remote end.
    pub fn settle(&mut self, owner: &Owner, context: &Context, now: &QpState) -> Result<(), ObjectError> {
        self.state = now.clone();
        match now.phase {
            QpPhase::Reset => self.reset(owner, context),
            QpPhase::Init => {
                if self.phase != QpPhase::Init || self.attr != now.attr {
                    self.reset(owner, context)?;
                }
                self.init(owner, context)
            }
            QpPhase::Rtr | QpPhase::Rts | QpPhase::Sqd => {
                let connected = is_connected(self.phase);
                let fits = match (&self.link, now.remote) {
                    (Some(link), Some(remote)) => (link.remote.vgid, link.remote.vqpn) == (remote.vgid, remote.vqpn),
                    (None, _) => !connected,
                    (Some(_), None) => false,
                };
                let backwards = connected && rank(self.phase) > rank(now.phase);
                if !fits
                    || backwards
                    || self.phase == QpPhase::Err
                    || (self.phase != QpPhase::Reset && self.attr != now.attr)
                {
                    self.reset(owner, context)?;
                }
                self.init(owner, context)?;
                match self.link {
                    Some(link) => self.send_side(owner, context, &link),
                    None => Ok(()),
                }
            }
            QpPhase::Sqe => Err(owner.wrong(name(now), "it is in SQE, which only UD QPs can leave; not supported")),
            QpPhase::Err => {
                self.init(owner, context)?;
                if self.phase != QpPhase::Err {
                    self.to(owner, context, "modify_qp to ERR", QpPhase::Err)?;
                }
                Ok(())
            }
        }
    }

    /// Gives it its remote end and brings it as far as its state wants. The same link again changes nothing.
    pub fn connect(
        &mut self,
        owner: &Owner,
        context: &Context,
        sgids: &[SgidMap],
        link: &Link,
    ) -> Result<(), ObjectError> {
        if !is_connected(self.state.phase) {
            return Err(
                owner.wrong(name(&self.state), format!("it is in {:?} and is not to be connected", self.state.phase))
            );
        }
        if is_connected(self.phase) {
            if self.link == Some(*link) {
                return self.send_side(owner, context, link);
            }
            self.reset(owner, context)?;
        }
        self.init(owner, context)?;
        self.receive_side(owner, context, sgids, link)?;
        self.link = Some(*link);
        self.send_side(owner, context, link)
    }

    fn reset(&mut self, owner: &Owner, context: &Context) -> Result<(), ObjectError> {
        if self.phase != QpPhase::Reset {
            self.to(owner, context, "modify_qp to RESET", QpPhase::Reset)?;
        }
        self.link = None;
        Ok(())
    }

    fn to(&mut self, owner: &Owner, context: &Context, verb: &'static str, phase: QpPhase) -> Result<(), ObjectError> {
        context.modify_qp_state(verb, self.handle, phase as u8).map_err(owner.verb(name(&self.state)))?;
        self.phase = phase;
        Ok(())
    }

    fn init(&mut self, owner: &Owner, context: &Context) -> Result<(), ObjectError> {
        if self.phase != QpPhase::Reset {
            return Ok(());
        }
        let attr = self.state.attr;
        let req = abi::ModifyQp {
            qp_handle: self.handle.0,
            attr_mask: qp_mask::STATE | qp_mask::PKEY_INDEX | qp_mask::PORT | qp_mask::ACCESS_FLAGS,
            qp_state: QpPhase::Init as u8,
            pkey_index: attr.pkey_index,
            port_num: attr.port_num.max(1),
            qp_access_flags: attr.access,
            ..Default::default()
        };
        context.modify_qp("modify_qp to INIT", &req).map_err(owner.verb(name(&self.state)))?;
        self.phase = QpPhase::Init;
        self.attr = attr;
        Ok(())
    }

    fn receive_side(
        &mut self,
        owner: &Owner,
        context: &Context,
        sgids: &[SgidMap],
        link: &Link,
    ) -> Result<(), ObjectError> {
        let attr = self.state.attr;
        let sgid = sgids
            .iter()
            .find(|map| map.port == attr.port_num && map.virtual_index == attr.sgid_index)
            .ok_or_else(|| {
                let why = format!(
                    "no GID of port {} of {} is like entry {} of the source's table; give the interface an address of the same family",
                    attr.port_num,
                    context.device(),
                    attr.sgid_index
                );
                owner.wrong(name(&self.state), why)
            })?;
        let mut req = abi::ModifyQp {
            dest: abi::QpDest {
                dgid: link.remote.pgid.0,
                flow_label: attr.flow_label,
                dlid: attr.dlid,
                sgid_index: sgid.physical_index,
                hop_limit: attr.hop_limit,
                traffic_class: attr.traffic_class,
                sl: attr.sl,
                src_path_bits: attr.src_path_bits,
                static_rate: attr.static_rate,
                is_global: u8::from(attr.is_global),
                port_num: attr.port_num,
                ..Default::default()
            },
            qp_handle: self.handle.0,
            attr_mask: qp_mask::STATE | qp_mask::AV | qp_mask::PATH_MTU | qp_mask::DEST_QPN | qp_mask::RQ_PSN,
            qp_state: QpPhase::Rtr as u8,
            path_mtu: attr.path_mtu as u8,
            dest_qp_num: link.remote.pqpn.0,
            rq_psn: link.rq_psn,
            ..Default::default()
        };
        if self.state.qp_type == RC {
            req.attr_mask |= qp_mask::MAX_DEST_RD_ATOMIC | qp_mask::MIN_RNR_TIMER;
            req.max_dest_rd_atomic = attr.max_dest_rd_atomic;
            req.min_rnr_timer = attr.min_rnr_timer;
        }
        context.modify_qp("modify_qp to RTR", &req).map_err(owner.verb(name(&self.state)))?;
        self.phase = QpPhase::Rtr;
        Ok(())
    }

    /// From RTR to RTS and SQD, as far as the state wants.
    fn send_side(&mut self, owner: &Owner, context: &Context, link: &Link) -> Result<(), ObjectError> {
        if self.phase == QpPhase::Rtr && rank(self.state.phase) >= rank(QpPhase::Rts) {
            let attr = self.state.attr;
            let mut req = abi::ModifyQp {
                qp_handle: self.handle.0,
                attr_mask: qp_mask::STATE | qp_mask::SQ_PSN,
                qp_state: QpPhase::Rts as u8,
                sq_psn: link.sq_psn,
                ..Default::default()
            };
            if self.state.qp_type == RC {
                req.attr_mask |= qp_mask::TIMEOUT | qp_mask::RETRY_CNT | qp_mask::RNR_RETRY | qp_mask::MAX_QP_RD_ATOMIC;
                req.timeout = attr.timeout;
                req.retry_cnt = attr.retry_cnt;
                req.rnr_retry = attr.rnr_retry;
                req.max_rd_atomic = attr.max_rd_atomic;
            }
            context.modify_qp("modify_qp to RTS", &req).map_err(owner.verb(name(&self.state)))?;
            self.phase = QpPhase::Rts;
        }
        if self.phase == QpPhase::Rts && self.state.phase == QpPhase::Sqd {
            self.to(owner, context, "modify_qp to SQD", QpPhase::Sqd)?;
        }
        Ok(())
    }

    /// Name, old mapping and new mapping of its queues.
    pub fn queues(&self) -> [(String, Option<QueueMap>, Option<Mapping>); 2] {
        let name = name(&self.state);
        [
            (format!("send queue of {name}"), self.state.sq_map, self.maps.sq),
            (format!("receive queue of {name}"), self.state.rq_map, self.maps.rq),
        ]
    }

    pub fn report(&self, id: ObjId) -> AdoptedQp {
        AdoptedQp {
            id,
            handle: self.handle,
            vqpn: self.state.vqpn,
            pqpn: self.qpn,
            remote: self.link.map(|link| link.remote),
            sq_psn: self.link.map_or(0, |link| link.sq_psn),
        }
    }
}

fn name(state: &QpState) -> String {
    format!("QP {}", state.vqpn.0)
}

/// How far a phase is on the way up.
fn rank(phase: QpPhase) -> u8 {
    match phase {
        QpPhase::Reset => 0,
        QpPhase::Init => 1,
        QpPhase::Rtr => 2,
        QpPhase::Rts => 3,
        QpPhase::Sqd | QpPhase::Sqe => 4,
        QpPhase::Err => 5,
    }
}
