//! What can be shown without an RDMA device: the process' life, its rights, and who gets an answer. Kernel objects are
//! made in the lab's tests.

use super::proto::{self, Command, Reply, Start};
use super::wire::{Answer, Want};
use super::{Rights, child, serve::Service};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use rdma_virt::id::Vpid;
use rdma_virt::saved::{ContextState, ProcessState};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

fn ask(path: &Path, packet: &[u8]) -> Answer {
    let client = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    connect(client.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    send(client.as_raw_fd(), packet, MsgFlags::empty()).unwrap();
    let mut reply = [0; 600];
    let len = recv(client.as_raw_fd(), &mut reply, MsgFlags::empty()).unwrap();
    Answer::decode(&reply[..len]).unwrap()
}

/// Runs the child's loop in a thread of this process, whose rights it leaves alone.
fn started(socket: &Path) -> (UnixStream, std::thread::JoinHandle<()>) {
    let (parent, mine) = UnixStream::pair().unwrap();
    let thread = std::thread::spawn(move || child::run(&mine).unwrap());
    let start = Start { rights: Rights::current(), devices: vec![], socket: socket.into(), memory: None };
    assert_eq!(talk(&parent, &Command::Start(start)), Reply::Done);
    (parent, thread)
}

fn talk(parent: &UnixStream, command: &Command) -> Reply {
    proto::send(parent, command).unwrap();
    proto::receive(parent).unwrap().unwrap()
}

#[test]
fn it_answers_the_plugin_only_while_armed_and_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("incubator.sock");
    let (parent, thread) = started(&path);
    let want = Want::File { vpid: 1, fd: 3 }.encode();
    let refused = |answer: Answer| match answer {
        Answer::Refused { why } => why,
        granted => panic!("{granted:?}"),
    };
    assert!(refused(ask(&path, &want)).contains("no restore"));
    assert_eq!(talk(&parent, &Command::Arm(true)), Reply::Done);
    assert!(refused(ask(&path, &want)).contains("process 1 has no RDMA file 3"));
    let all = Want::Maps { vpid: 1, first: 0 }.encode();
    assert!(refused(ask(&path, &all)).contains("process 1 has no RDMA objects"));
    assert!(refused(ask(&path, b"garbage")).contains("same version"));
    assert_eq!(talk(&parent, &Command::Arm(false)), Reply::Done);
    assert!(refused(ask(&path, &want)).contains("no restore"));
    assert_eq!(talk(&parent, &Command::Release), Reply::Done);
    thread.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn it_ends_when_its_parent_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("incubator.sock");
    let (parent, thread) = started(&path);
    drop(parent);
    thread.join().unwrap();
    assert!(!path.exists());
}

#[test]
fn a_process_on_a_device_this_host_does_not_have_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let (parent, thread) = started(&dir.path().join("s"));
    let context = ContextState {
        id: rdma_virt::id::ObjId(1),
        device: "mlx5_7".into(),
        driver: "no_such_driver".into(),
        node_guid: 0,
        cmd_fd: 3,
        async_fd: 4,
        gids: vec![],
        pds: vec![],
        channels: vec![],
        cqs: vec![],
        srqs: vec![],
        qps: vec![],
        mrs: vec![],
    };
    let process = ProcessState {
        vpid: Vpid(7),
        comm: "app".into(),
        builds: vec![],
        contexts: vec![context],
        blockers: vec![],
        memory: vec![],
    };
    match talk(&parent, &Command::Converge(vec![process])) {
        Reply::Refused(why) => assert!(why.contains("mlx5_7") && why.contains("process 7"), "{why}"),
        other => panic!("{other:?}"),
    }
    drop(parent);
    thread.join().unwrap();
}

#[test]
fn a_stale_socket_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    std::mem::forget(Service::bind(&path).unwrap());
    Service::bind(&path).unwrap();
    assert!(!path.exists(), "the second one has cleaned up after itself");
}
