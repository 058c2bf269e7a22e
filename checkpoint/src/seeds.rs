//! The fuzzer's first inputs (`checkpoint/fuzz/seeds`): one well-formed message or image of each kind, so that mutation
//! begins behind the first checks. They are part of the source and checked here: a change of a format changes them, and
//! `MIGRRDMA_WRITE_SEEDS=1 cargo test -p checkpoint seeds` writes them anew.

use std::fs;
use std::path::Path;

use rdma_virt::id::{MigrationId, PGid, PQpn, PRkey, VGid, VQpn, VRkey, Vpid};
use rdma_virt::msg;
use serde::Serialize;

use crate::engine::fixture::{process, qp};
use crate::image::{HandOver, ImagedProcess, RdmaImage, Secret, SourceDevice, SourceGid};
use crate::incubator::proto;
use crate::incubator::wire::Want;
use crate::net::msg::{Answer, Back, Call, MemoryBlocks, MemoryFile, Order, Return};

fn body(message: &impl Serialize) -> Vec<u8> {
    postcard::to_stdvec(message).expect("a message")
}

fn state() -> rdma_virt::saved::ProcessState {
    process(5, vec![qp(1, 17, Some(33)), qp(2, 18, None)])
}

fn order(order: Order) -> Vec<u8> {
    body(&Call { migration: Some(MigrationId([4; 16])), seq: 1, order })
}

/// Target, name, content.
fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let image = RdmaImage {
        generation: 7,
        secret: Secret([3; 32]),
        container: "c1".into(),
        hand_over: HandOver::Adopt,
        host: "src".into(),
        devices: vec![SourceDevice {
            name: "rxe0".into(),
            driver: "rxe".into(),
            node_guid: 9,
            gids: vec![SourceGid { port: 1, index: 1, gid: PGid([1; 16]), kind: 2 }],
        }],
        processes: vec![ImagedProcess { state: state(), host_pid: 4711 }],
        session: None,
    };
    let file = MemoryFile { name: "7.1".into(), id: 1, len: 1 << 20, mode: 0o600, uid: 0, gid: 0 };
    let memory = Order::Memory { files: vec![file] };
    let (runs, zeros) = (vec![(0, 1)], vec![(4, 2)]);
    let blocks = MemoryBlocks { file: "7.1".into(), first: 0, runs, zeros, bytes: vec![7; 1024] };
    let mut archive = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    header.set_mode(0o644);
    header.set_mtime(1);
    header.set_uid(0);
    header.set_gid(0);
    archive.append_data(&mut header, "etc/hosts", &b"abc"[..]).expect("a file");
    header.set_entry_type(tar::EntryType::Symlink);
    header.set_size(0);
    archive.append_link(&mut header, "etc/link", "../hosts").expect("a link");
    let mut spoken = Vec::new();
    proto::send(&mut spoken, &proto::Command::Converge(vec![state()])).expect("a command");
    let hello = msg::Hello { version: msg::VERSION, vpid: Vpid(5), comm: "app".into(), role: msg::Role::Control };
    let resolve = msg::Ask::Resolve { vgid: VGid([2; 16]), vqpn: VQpn(33) };
    let report = msg::FromShim { seq: 1, reply: msg::Reply::State(Box::new(state())) };
    let switch = msg::Request::Switch {
        links: vec![msg::SwitchLink { vqpn: VQpn(17), remote_gid: PGid([1; 16]), remote_qpn: PQpn(40), table: 0 }],
        tables: vec![msg::KeyTable(vec![(VRkey(1), PRkey(2))])],
    };
    let switch = msg::ToShim { seq: 2, migration: Some(MigrationId([4; 16])), request: switch };
    vec![
        ("rdma_image", "image", body(&image)),
        ("memory_image", "files-and-blocks", [body(&memory), vec![0xfe], body(&Order::Blocks(vec![blocks]))].concat()),
        ("agent_protocol", "incubate", order(Order::Incubate { states: vec![state()] })),
        ("agent_protocol", "claim", order(Order::Claim { containers: vec!["c1".into()], port: 7477 })),
        ("agent_protocol", "file", order(Order::FileStart { name: "core-1.img".into(), mode: 0o600 })),
        ("agent_protocol", "return", body(&Back::Return(Return { seq: 1, answer: Ok(Answer::Done) }))),
        ("container_socket", "hello", body(&hello)),
        ("container_socket", "resolve", body(&resolve)),
        ("container_socket", "report", body(&report)),
        ("container_socket", "switch", body(&switch)),
        ("incubator_socket", "converge", spoken),
        ("incubator_socket", "want", Want::Map { vpid: 1, addr: 1 << 40, offset: 4096 }.encode().to_vec()),
        ("incubator_socket", "want_all", Want::Maps { vpid: 1, first: 0 }.encode().to_vec()),
        ("bundle_archive", "file-and-link", archive.into_inner().expect("an archive")),
    ]
}

#[test]
fn the_fuzzers_seeds_are_messages_of_this_version() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    for (target, name, bytes) in seeds() {
        let path = dir.join(target).join(name);
        if std::env::var_os("MIGRRDMA_WRITE_SEEDS").is_some() {
            fs::create_dir_all(dir.join(target)).expect("a directory");
            fs::write(&path, &bytes).expect("a seed");
        }
        let kept = fs::read(&path).unwrap_or_default();
        assert!(kept == bytes, "{} is not up to date: see the head of src/seeds.rs", path.display());
    }
}
