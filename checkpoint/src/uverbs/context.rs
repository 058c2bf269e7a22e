//! An open RDMA device and the commands on it. Every method is one command of the kernel; who owns which object and in
//! which order they are made is the caller's business.
#![expect(unsafe_code, reason = "descriptors that the kernel has just made are taken over by number")]

use super::abi::{self, qp_mask};
use super::call::{Call, Slot};
use super::provider::{self, Mapping, Provider, QpMappings};
use super::{Device, UverbsError};
use rdma_virt::id::{Handle, PLkey, PQpn, PRkey};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An open device: one kernel context, with its asynchronous event file.
#[derive(Debug)]
pub struct Context {
    cmd: OwnedFd,
    events: OwnedFd,
    device: String,
    provider: &'static dyn Provider,
    comp_vectors: u32,
}

/// A new CQ.
#[derive(Clone, Copy, Debug)]
pub struct NewCq {
    pub handle: Handle,
    pub map: Option<Mapping>,
}

/// A new SRQ.
#[derive(Clone, Copy, Debug)]
pub struct NewSrq {
    pub handle: Handle,
    pub map: Option<Mapping>,
}

/// A new QP, in RESET.
#[derive(Clone, Copy, Debug)]
pub struct NewQp {
    pub handle: Handle,
    pub qpn: PQpn,
    pub maps: QpMappings,
}

/// A new MR.
#[derive(Clone, Copy, Debug)]
pub struct NewMr {
    pub handle: Handle,
    pub lkey: PLkey,
    pub rkey: PRkey,
}

/// What a CQ is made from.
#[derive(Clone, Copy, Debug)]
pub struct CqAttr<'a> {
    pub cqe: u32,
    pub user_handle: u64,
    pub comp_vector: u32,
    pub channel: Option<BorrowedFd<'a>>,
}

/// What an SRQ is made from.
#[derive(Clone, Copy, Debug)]
pub struct SrqAttr {
    pub pd: Handle,
    pub user_handle: u64,
    pub max_wr: u32,
    pub max_sge: u32,
    pub limit: u32,
}

/// What a QP is made from.
#[derive(Clone, Copy, Debug)]
pub struct QpAttr {
    pub pd: Handle,
    pub send_cq: Handle,
    pub recv_cq: Handle,
    pub srq: Option<Handle>,
    /// `enum ibv_qp_type`.
    pub qp_type: u32,
    pub sq_sig_all: bool,
    pub cap: abi::QpCap,
    pub user_handle: u64,
}

impl Context {
    /// Opens the device and makes a context on it, with the rights this thread has now.
    pub fn open(device: &Device) -> Result<Self, UverbsError> {
        let provider = provider::of(&device.driver);
        if !provider.can_adopt() {
            return Err(UverbsError::NotAdoptable { device: device.name.clone(), driver: device.driver.clone() });
        }
        let path = device.node();
        let cmd: OwnedFd = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(file) => file.into(),
            Err(source) => return Err(UverbsError::Open { path, device: device.name.clone(), source }),
        };
        let fail = |verb| move |source| UverbsError::Verb { verb, device: device.name.clone(), source };

        let mut call = Call::new(abi::OBJECT_DEVICE, abi::METHOD_GET_CONTEXT);
        let vectors = call.output::<u32>(abi::ATTR_GET_CONTEXT_NUM_COMP_VECTORS);
        call.output::<u64>(abi::ATTR_GET_CONTEXT_CORE_SUPPORT);
        call.run(cmd.as_fd(), provider.driver_id()).map_err(fail("get_context"))?;
        let comp_vectors = call.result::<u32>(vectors).max(1);

        let mut call = Call::new(abi::OBJECT_ASYNC_EVENT, abi::METHOD_ASYNC_EVENT_ALLOC);
        let slot = call.handle(abi::ATTR_ASYNC_EVENT_ALLOC_FD_HANDLE, 0);
        call.run(cmd.as_fd(), provider.driver_id()).map_err(fail("alloc_async_fd"))?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        let events = unsafe { OwnedFd::from_raw_fd(call.number(slot) as i32) };
        Ok(Self { cmd, events, device: device.name.clone(), provider, comp_vectors })
    }

    /// Name of the device on this host.
    pub fn device(&self) -> &str {
        &self.device
    }

    /// The file all objects of this context belong to.
    pub fn cmd_fd(&self) -> BorrowedFd<'_> {
        self.cmd.as_fd()
    }

    /// The file that carries asynchronous events.
    pub fn async_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }

    fn fail(&self, verb: &'static str, source: io::Error) -> UverbsError {
        UverbsError::Verb { verb, device: self.device.clone(), source }
    }

    fn run(&self, verb: &'static str, call: &mut Call) -> Result<(), UverbsError> {
        call.run(self.cmd.as_fd(), self.provider.driver_id()).map_err(|source| self.fail(verb, source))
    }

    /// What the device allows.
    pub fn limits(&self) -> Result<abi::QueryDeviceResp, UverbsError> {
        let ask = abi::QueryDevice::default();
        let (mut call, slot) = Call::legacy::<_, abi::QueryDeviceResp>(abi::CMD_QUERY_DEVICE, &ask, true);
        self.run("query_device", &mut call)?;
        Ok(slot.map(|slot| call.result(slot)).unwrap_or_default())
    }

    pub fn alloc_pd(&self) -> Result<Handle, UverbsError> {
        let (mut call, slot) = Call::legacy::<_, abi::AllocPdResp>(abi::CMD_ALLOC_PD, &abi::AllocPd::default(), true);
        self.run("alloc_pd", &mut call)?;
        Ok(Handle(slot.map_or(0, |slot| call.result::<abi::AllocPdResp>(slot).pd_handle)))
    }

    pub fn create_comp_channel(&self) -> Result<OwnedFd, UverbsError> {
        let (mut call, slot) = Call::legacy::<_, abi::CreateCompChannelResp>(
            abi::CMD_CREATE_COMP_CHANNEL,
            &abi::CreateCompChannel::default(),
            true,
        );
        self.run("create_comp_channel", &mut call)?;
        let fd = slot.map_or(u32::MAX, |slot| call.result::<abi::CreateCompChannelResp>(slot).fd);
        let fd = i32::try_from(fd)
            .map_err(|_| self.fail("create_comp_channel", io::Error::other("the kernel gave no descriptor")))?;
        // SAFETY: the kernel has just made this descriptor for us; nobody else owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    pub fn create_cq(&self, attr: &CqAttr<'_>) -> Result<NewCq, UverbsError> {
        let mut call = Call::new(abi::OBJECT_CQ, abi::METHOD_CQ_CREATE);
        let handle = call.handle(abi::ATTR_CREATE_CQ_HANDLE, 0);
        call.output::<u32>(abi::ATTR_CREATE_CQ_RESP_CQE);
        call.value32(abi::ATTR_CREATE_CQ_CQE, attr.cqe);
        call.value(abi::ATTR_CREATE_CQ_USER_HANDLE, attr.user_handle);
        if let Some(channel) = attr.channel {
            call.fd(abi::ATTR_CREATE_CQ_COMP_CHANNEL, channel);
        }
        // A host with fewer completion vectors has fewer queues to steer to, not less function.
        call.value32(abi::ATTR_CREATE_CQ_COMP_VECTOR, attr.comp_vector % self.comp_vectors);
        call.fd(abi::ATTR_CREATE_CQ_EVENT_FD, self.events.as_fd());
        let extra = self.provider.ask_cq(&mut call);
        self.run("create_cq", &mut call)?;
        Ok(NewCq { handle: handle_of(&call, handle), map: extra.and_then(|slot| self.provider.cq(&call, slot)) })
    }

    pub fn create_srq(&self, attr: &SrqAttr) -> Result<NewSrq, UverbsError> {
        let mut call = Call::new(abi::OBJECT_SRQ, abi::METHOD_SRQ_CREATE);
        let handle = call.handle(abi::ATTR_CREATE_SRQ_HANDLE, 0);
        call.value(abi::ATTR_CREATE_SRQ_TYPE, abi::SRQT_BASIC);
        call.value(abi::ATTR_CREATE_SRQ_USER_HANDLE, attr.user_handle);
        call.handle(abi::ATTR_CREATE_SRQ_PD_HANDLE, attr.pd.0);
        call.value32(abi::ATTR_CREATE_SRQ_MAX_WR, attr.max_wr);
        call.value32(abi::ATTR_CREATE_SRQ_MAX_SGE, attr.max_sge);
        call.value32(abi::ATTR_CREATE_SRQ_LIMIT, attr.limit);
        call.fd(abi::ATTR_CREATE_SRQ_EVENT_FD, self.events.as_fd());
        call.output::<u32>(abi::ATTR_CREATE_SRQ_RESP_MAX_WR);
        call.output::<u32>(abi::ATTR_CREATE_SRQ_RESP_MAX_SGE);
        let extra = self.provider.ask_srq(&mut call);
        self.run("create_srq", &mut call)?;
        Ok(NewSrq { handle: handle_of(&call, handle), map: extra.and_then(|slot| self.provider.srq(&call, slot)) })
    }

    pub fn create_qp(&self, attr: &QpAttr) -> Result<NewQp, UverbsError> {
        let mut call = Call::new(abi::OBJECT_QP, abi::METHOD_QP_CREATE);
        let handle = call.handle(abi::ATTR_CREATE_QP_HANDLE, 0);
        call.handle(abi::ATTR_CREATE_QP_PD_HANDLE, attr.pd.0);
        call.handle(abi::ATTR_CREATE_QP_SEND_CQ_HANDLE, attr.send_cq.0);
        call.handle(abi::ATTR_CREATE_QP_RECV_CQ_HANDLE, attr.recv_cq.0);
        if let Some(srq) = attr.srq {
            call.handle(abi::ATTR_CREATE_QP_SRQ_HANDLE, srq.0);
        }
        call.value(abi::ATTR_CREATE_QP_TYPE, u64::from(attr.qp_type));
        call.value(abi::ATTR_CREATE_QP_USER_HANDLE, attr.user_handle);
        call.input(abi::ATTR_CREATE_QP_CAP, &attr.cap);
        if attr.sq_sig_all {
            call.value32(abi::ATTR_CREATE_QP_FLAGS, abi::QP_CREATE_SQ_SIG_ALL);
        }
        call.fd(abi::ATTR_CREATE_QP_EVENT_FD, self.events.as_fd());
        call.output::<abi::QpCap>(abi::ATTR_CREATE_QP_RESP_CAP);
        let qpn = call.output::<u32>(abi::ATTR_CREATE_QP_RESP_QP_NUM);
        let extra = self.provider.ask_qp(&mut call);
        self.run("create_qp", &mut call)?;
        Ok(NewQp {
            handle: handle_of(&call, handle),
            qpn: PQpn(call.result::<u32>(qpn)),
            maps: extra.map(|slot| self.provider.qp(&call, slot)).unwrap_or_default(),
        })
    }

    /// Registers memory of the calling process; `iova` is the address work requests will use.
    pub fn reg_mr(&self, pd: Handle, start: u64, length: u64, iova: u64, access: u32) -> Result<NewMr, UverbsError> {
        let req = abi::RegMr { response: 0, start, length, hca_va: iova, pd_handle: pd.0, access_flags: access };
        let (mut call, slot) = Call::legacy::<_, abi::RegMrResp>(abi::CMD_REG_MR, &req, true);
        self.run("reg_mr", &mut call)?;
        let resp = slot.map(|slot| call.result::<abi::RegMrResp>(slot)).unwrap_or_default();
        Ok(NewMr { handle: Handle(resp.mr_handle), lkey: PLkey(resp.lkey), rkey: PRkey(resp.rkey) })
    }

    /// Changes a QP. `req.attr_mask` says which fields are meant ([`qp_mask`]).
    pub fn modify_qp(&self, verb: &'static str, req: &abi::ModifyQp) -> Result<(), UverbsError> {
        let (mut call, _) = Call::legacy::<_, u32>(abi::CMD_MODIFY_QP, req, false);
        self.run(verb, &mut call)
    }

    /// Puts a QP into RESET (0), SQD (4) or ERR (6): states that need nothing but their name.
    pub fn modify_qp_state(&self, verb: &'static str, qp: Handle, state: u8) -> Result<(), UverbsError> {
        let req = abi::ModifyQp { qp_handle: qp.0, attr_mask: qp_mask::STATE, qp_state: state, ..Default::default() };
        self.modify_qp(verb, &req)
    }

    /// Arms (or with 0 disarms) the limit event of an SRQ.
    pub fn modify_srq_limit(&self, srq: Handle, limit: u32) -> Result<(), UverbsError> {
        let req = abi::ModifySrq { srq_handle: srq.0, attr_mask: abi::SRQ_ATTR_LIMIT, max_wr: 0, srq_limit: limit };
        let (mut call, _) = Call::legacy::<_, u32>(abi::CMD_MODIFY_SRQ, &req, false);
        self.provider.change_srq(&mut call);
        self.run("modify_srq", &mut call)
    }

    pub fn destroy_pd(&self, pd: Handle) -> Result<(), UverbsError> {
        let mut call = Call::new(abi::OBJECT_PD, abi::METHOD_PD_DESTROY);
        call.handle(abi::ATTR_DESTROY_PD_HANDLE, pd.0);
        self.run("dealloc_pd", &mut call)
    }

    pub fn destroy_cq(&self, cq: Handle) -> Result<(), UverbsError> {
        let mut call = Call::new(abi::OBJECT_CQ, abi::METHOD_CQ_DESTROY);
        call.output::<abi::DestroyCqResp>(abi::ATTR_DESTROY_CQ_RESP);
        call.handle(abi::ATTR_DESTROY_CQ_HANDLE, cq.0);
        self.run("destroy_cq", &mut call)
    }

    pub fn destroy_srq(&self, srq: Handle) -> Result<(), UverbsError> {
        let mut call = Call::new(abi::OBJECT_SRQ, abi::METHOD_SRQ_DESTROY);
        call.output::<u32>(abi::ATTR_DESTROY_SRQ_RESP);
        call.handle(abi::ATTR_DESTROY_SRQ_HANDLE, srq.0);
        self.run("destroy_srq", &mut call)
    }

    pub fn destroy_qp(&self, qp: Handle) -> Result<(), UverbsError> {
        let mut call = Call::new(abi::OBJECT_QP, abi::METHOD_QP_DESTROY);
        call.output::<u32>(abi::ATTR_DESTROY_QP_RESP);
        call.handle(abi::ATTR_DESTROY_QP_HANDLE, qp.0);
        self.run("destroy_qp", &mut call)
    }

    pub fn destroy_mr(&self, mr: Handle) -> Result<(), UverbsError> {
        let mut call = Call::new(abi::OBJECT_MR, abi::METHOD_MR_DESTROY);
        call.handle(abi::ATTR_DESTROY_MR_HANDLE, mr.0);
        self.run("dereg_mr", &mut call)
    }
}

fn handle_of(call: &Call, slot: Slot) -> Handle {
    Handle(call.number(slot) as u32)
}

impl AsRawFd for Context {
    fn as_raw_fd(&self) -> i32 {
        self.cmd.as_raw_fd()
    }
}
