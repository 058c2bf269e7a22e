//! Shows on a machine with Soft-RoCE what an incubator does with kernel objects: every kind, every QP state, repeated
//! and changing states, hand-over of files and queues, and that nothing is left. To be run in the lab as root:
//! `incubator_probe` (exit status 0 and one line for each claim).
//!
//! It plays the agent and, by asking for files and mapping queues, the restored process. No CRIU and no shim here.
#![expect(unsafe_code, reason = "maps queues to show that the kernel allows it exactly once")]

use checkpoint::incubator::wire::{Answer, Want};
use checkpoint::incubator::{Incubator, IncubatorError, Link, Rights, SUBCOMMAND, Spec};
use checkpoint::uverbs;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg, send, socket,
};
use rdma_virt::id::{Handle, ObjId, PGid, PQpn, VGid, VQpn, Vpid};
use rdma_virt::saved::{
    AdoptedProcess, ChannelState, ContextState, CqState, GidEntry, PdState, ProcessState, QpAttr, QpCap, QpPhase,
    QpState, QueueMap, Remote, SrqState,
};
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

const PHASES: [QpPhase; 6] = [QpPhase::Reset, QpPhase::Init, QpPhase::Rtr, QpPhase::Rts, QpPhase::Sqd, QpPhase::Err];

fn main() {
    if std::env::args().nth(1).as_deref() == Some(SUBCOMMAND) {
        std::process::exit(checkpoint::incubator::main());
    }
    let devices = uverbs::devices().expect("RDMA devices");
    let device = devices.iter().find(|device| uverbs::can_adopt(&device.driver)).expect("a device that can be adopted");
    let gid = device.ports[0].gids.iter().find(|gid| gid.kind == 2 && gid.gid.ip().is_ipv4()).expect("an IPv4 GID");
    let before = resources();
    let dir = std::env::temp_dir().join(format!("incubator-probe-{}", std::process::id()));
    std::fs::create_dir(&dir).expect("a directory");
    let socket = dir.join("incubator.sock");
    let mut rights = Rights::current();
    (rights.uid, rights.gid, rights.groups) = (65534, 65534, vec![]);
    rights.caps = vec!["CAP_NET_BIND_SERVICE".into()];
    let spec = Spec {
        program: "/proc/self/exe".into(),
        rights,
        devices: vec![],
        socket: socket.clone(),
        memory: None,
        log: None,
    };
    let mut incubator = Incubator::start(&spec, Duration::from_secs(30)).expect("an incubator");
    let status = std::fs::read_to_string(format!("/proc/{}/status", incubator.pid())).expect("its status");
    assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000400"), "{status}");
    println!("it runs with the rights it was given");

    let wanted = vec![process(1, VGid(gid.gid.0)), process(2, VGid(gid.gid.0))];
    let started = Instant::now();
    let made = incubator.converge(&wanted).expect("converge");
    println!("two processes, three contexts, {} QPs made in {:?}", qps(&made).count(), started.elapsed());
    assert_eq!(incubator.converge(&wanted).expect("converge again"), made);
    println!("the same state again changes nothing");

    let links: Vec<Link> = links(&wanted, PGid(gid.gid.0), PQpn(qps(&made).next().expect("a QP").pqpn.0));
    incubator.connect(&links).expect("connect");
    incubator.connect(&links).expect("connect again");
    let connected = incubator.converge(&wanted).expect("converge when connected");
    assert_eq!(qps(&connected).filter(|qp| qp.remote.is_some()).count(), links.len());
    println!("{} QPs connected; a later converge leaves them so", links.len());
    let states = qp_states();
    for phase in ["RESET", "INIT", "RTR", "RTS", "SQD", "ERR"] {
        assert!(states.contains(phase), "no QP in {phase}:\n{states}");
    }
    println!("there are QPs in RESET, INIT, RTR, RTS, SQD and ERR");

    let mut changed = wanted.clone();
    let context = &mut changed[0].contexts[0];
    context.qps.remove(0);
    context.qps[2].remote.as_mut().expect("connected").vqpn = VQpn(4242);
    context.cqs[0].cqe = 300;
    context.cqs[0].map = None;
    changed[1].contexts.pop();
    let after = incubator.converge(&changed).expect("converge to another state");
    assert_eq!(after[1].contexts.len(), 1);
    assert_eq!(after[0].contexts[0].qps.len(), 5);
    assert!(after[0].contexts[0].qps.iter().all(|qp| qp.remote.is_none()), "their CQ was made again, so they were too");
    println!("objects that are gone are destroyed, those that changed are made again");
    incubator.converge(&[]).expect("converge to nothing");
    assert_eq!(resources(), before);
    println!("an empty state leaves nothing");

    let made = incubator.converge(&wanted[..1]).expect("converge anew");
    let context = &wanted[0].contexts[0];
    let cq = context.cqs[0].map.expect("a map");
    let ask_cq = Want::Map { vpid: 1, addr: cq.addr, offset: 77 };
    assert!(ask(&socket, ask_cq).is_err(), "nothing is given away before a restore");
    incubator.arm().expect("arm");
    let (cmd, _) = ask(&socket, Want::File { vpid: 1, fd: context.cmd_fd }).expect("the command file");
    let (queue, offset) = ask(&socket, ask_cq).expect("the CQ");
    assert!(map(&queue, offset, cq.len), "the queue can be mapped");
    assert!(!map(&cmd, offset, cq.len), "but only once");
    println!("a queue can be mapped by who gets the file, once");
    let handed = incubator.handed().expect("handed");
    assert_eq!((handed.files, handed.maps), (1, 1));
    assert!(handed.missing.iter().any(|line| line.contains("send queue of QP 100")), "{handed:?}");
    println!("it says what nobody has taken ({} things)", handed.missing.len());

    let mut wrong = wanted[0].clone();
    wrong.contexts[0].id = ObjId(900);
    wrong.contexts[0].cqs[0].map = Some(QueueMap { len: cq.len + 4096, ..cq });
    match incubator.converge(&[wanted[0].clone(), ProcessState { vpid: Vpid(9), ..wrong }]) {
        Err(IncubatorError::Refused { why, .. }) => {
            assert!(why.contains("CQ") && why.contains(&(cq.len + 4096).to_string()), "{why}");
            println!("a queue of another size is refused: {why}");
        }
        other => panic!("{other:?}"),
    }
    let held = qps(&made).count();
    incubator.release().expect("release");
    assert!(count("qp") >= count_in(&before, "qp") + held, "objects live as long as somebody holds the file");
    drop((cmd, queue));
    std::thread::sleep(Duration::from_millis(500));
    // The mapped queue keeps its file, as in a restored process; unmapping is the process' exit.
    println!("objects outlive the incubator as long as a file is held");
    std::fs::remove_dir(&dir).expect("the socket is gone");
}

fn process(vpid: i32, gid: VGid) -> ProcessState {
    let contexts = (1..=vpid as u32).map(|n| context(n, gid)).collect();
    ProcessState { vpid: Vpid(vpid), comm: "probe".into(), builds: vec![], contexts, blockers: vec![], memory: vec![] }
}

/// One context with every kind of object. Sizes are what rxe makes of these numbers.
fn context(n: u32, gid: VGid) -> ContextState {
    let id = |k: u32| ObjId(1000 * n + k);
    let fd = 10 * n as i32;
    let map = |k: u64, len: u64| Some(QueueMap { addr: (u64::from(n) << 32) + (k << 20), len, offset: k << 12 });
    let cq = |k: u32, channel| CqState {
        id: id(k),
        handle: Handle(k),
        cqe: 100,
        comp_vector: 3,
        channel,
        user_handle: 0x7f00_0000 + u64::from(k),
        map: map(u64::from(k), 20480),
        armed: None,
    };
    let qp = |(i, phase): (usize, QpPhase)| {
        let k = 20 + i as u32;
        let connected = matches!(phase, QpPhase::Rtr | QpPhase::Rts | QpPhase::Sqd);
        QpState {
            id: id(k),
            handle: Handle(k),
            pd: id(1),
            send_cq: id(3),
            recv_cq: id(4),
            srq: (i % 2 == 1).then(|| id(5)),
            qp_type: 2,
            sq_sig_all: i % 2 == 0,
            cap: QpCap { max_send_wr: 64, max_recv_wr: 64, max_send_sge: 1, max_recv_sge: 1, max_inline_data: 16 },
            user_handle: 0x7f10_0000 + u64::from(k),
            vqpn: VQpn(100 * n + i as u32),
            pqpn: PQpn(100 * n + i as u32),
            sq_map: map(u64::from(2 * k), 36864),
            rq_map: if i % 2 == 1 { None } else { map(u64::from(2 * k + 1), 12288) },
            phase,
            attr: if phase == QpPhase::Reset {
                QpAttr::default()
            } else {
                QpAttr {
                    port_num: 1,
                    access: 7,
                    path_mtu: 3,
                    is_global: true,
                    sgid_index: 0,
                    hop_limit: 64,
                    max_dest_rd_atomic: 4,
                    min_rnr_timer: 12,
                    timeout: 18,
                    retry_cnt: 7,
                    rnr_retry: 7,
                    max_rd_atomic: 4,
                    ..QpAttr::default()
                }
            },
            remote: connected.then_some(Remote { vgid: gid, vqpn: VQpn(17), pgid: PGid(gid.0), pqpn: PQpn(17) }),
        }
    };
    ContextState {
        id: id(0),
        device: "rxe0".into(),
        driver: "rxe".into(),
        node_guid: 0,
        cmd_fd: fd,
        async_fd: fd + 1,
        gids: vec![GidEntry { port: 1, index: 0, gid, kind: 2 }],
        pds: vec![PdState { id: id(1), handle: Handle(0) }],
        channels: vec![ChannelState { id: id(2), fd: fd + 2, nonblock: true }],
        cqs: vec![cq(3, Some(id(2))), cq(4, None)],
        srqs: vec![SrqState {
            id: id(5),
            handle: Handle(5),
            pd: id(1),
            max_wr: 64,
            max_sge: 1,
            limit: 0,
            user_handle: 0x7f20_0000,
            map: map(5, 12288),
        }],
        qps: PHASES.into_iter().enumerate().map(qp).collect(),
        mrs: vec![],
    }
}

fn links(processes: &[ProcessState], gid: PGid, remote: PQpn) -> Vec<Link> {
    let all = processes.iter().flat_map(|process| process.contexts.iter().map(move |context| (process.vpid, context)));
    all.flat_map(|(vpid, context)| {
        context.qps.iter().filter_map(move |qp| {
            let at = qp.remote?;
            Some(Link {
                vpid,
                ctx: context.id,
                qp: qp.id,
                remote: Remote { pgid: gid, pqpn: remote, ..at },
                sq_psn: 1000,
                rq_psn: 2000,
            })
        })
    })
    .collect()
}

fn qps(made: &[AdoptedProcess]) -> impl Iterator<Item = &rdma_virt::saved::AdoptedQp> {
    made.iter().flat_map(|process| process.contexts.iter().flat_map(|context| &context.qps))
}

fn rdma(args: &[&str]) -> String {
    let output = Command::new("rdma").args(args).output().expect("the program rdma (package iproute2)");
    String::from_utf8(output.stdout).expect("text")
}

fn resources() -> String {
    rdma(&["resource"])
}

fn qp_states() -> String {
    rdma(&["resource", "show", "qp"])
}

fn count(kind: &str) -> usize {
    count_in(&resources(), kind)
}

fn count_in(text: &str, kind: &str) -> usize {
    let mut words = text.split_whitespace();
    words.find(|word| *word == kind);
    words.next().and_then(|number| number.parse().ok()).expect("a number")
}

fn ask(path: &Path, want: Want) -> Result<(OwnedFd, u64), String> {
    let talk = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).expect("socket");
    connect(talk.as_raw_fd(), &UnixAddr::new(path).expect("path")).expect("connect");
    send(talk.as_raw_fd(), &want.encode(), MsgFlags::empty()).expect("send");
    let mut packet = [0; 600];
    let mut control = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut packet)];
    let (len, fd) = {
        let reply = recvmsg::<()>(talk.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty()).expect("reply");
        let fd = reply.cmsgs().expect("whole").find_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        (reply.bytes, fd)
    };
    match Answer::decode(&packet[..len]).expect("a reply") {
        // SAFETY: the kernel has just made this descriptor for us.
        Answer::Granted { offset } => Ok((unsafe { OwnedFd::from_raw_fd(fd.expect("a descriptor")) }, offset)),
        Answer::Refused { why } => Err(why),
        Answer::Places(_) => panic!("nobody asked for all places"),
    }
}

/// Maps a queue for good; false if the kernel refuses.
fn map(fd: &OwnedFd, offset: u64, len: u64) -> bool {
    // SAFETY: a new mapping at an address of the kernel's choice, which nothing else uses.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            offset as i64,
        )
    };
    at != libc::MAP_FAILED
}
