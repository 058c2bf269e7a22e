//! The protocol, against a scripted criu: this very test binary, started
//! through a two-line shell script, plays the other end of fd 3. Nothing here
//! says anything about the real CRIU; the lab's scenarios do.

#![expect(unsafe_code, reason = "the scripted criu takes over descriptors it was started with")]

use std::io::Write;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use protobuf::{Message, MessageField};

use super::rpc::{Criu_notify, Criu_opts, Criu_req, Criu_req_type, Criu_resp, Criu_restore_resp, Criu_version};
use super::*;

struct Fake {
    _dir: tempfile::TempDir,
    program: PathBuf,
}

fn fake(scene: &str) -> Fake {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("criu");
    let exe = std::env::current_exe().unwrap();
    let mut file = std::fs::File::create(&program).unwrap();
    writeln!(
        file,
        "#!/bin/sh\n[ \"$1 $2\" = 'swrk 3' ] || exit 9\nSCENE={scene} exec '{}' --ignored --exact criu::tests::scripted_criu",
        exe.display()
    )
    .unwrap();
    drop(file);
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    Fake { _dir: dir, program }
}

fn opts() -> Criu_opts {
    let mut opts = Criu_opts::new();
    opts.set_images_dir_fd(-1);
    opts
}

/// Not a test: the far end of the tests below.
#[test]
#[ignore = "started by the other tests as their criu"]
fn scripted_criu() {
    let scene = std::env::var("SCENE").expect("this is no test of its own");
    // SAFETY: fd 3 is the socket this process was started with; nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(3) };
    let hear = || {
        let mut buf = vec![0; 65536];
        let n = recv(3, &mut buf, MsgFlags::empty()).unwrap();
        Criu_req::parse_from_bytes(&buf[..n]).unwrap()
    };
    let say = |answer: &Criu_resp, fd: Option<i32>| {
        let bytes = answer.write_to_bytes().unwrap();
        let iov = [std::io::IoSlice::new(&bytes)];
        let fds: Vec<i32> = fd.into_iter().collect();
        let cmsg = [ControlMessage::ScmRights(&fds)];
        let cmsg: &[ControlMessage] = if fds.is_empty() { &[] } else { &cmsg };
        sendmsg::<()>(3, &iov, cmsg, MsgFlags::empty(), None).unwrap();
    };
    let tell = |script: &str, pid: Option<i32>, fd: Option<i32>| {
        let mut notify = Criu_notify::new();
        notify.set_script(script.into());
        if let Some(pid) = pid {
            notify.set_pid(pid);
        }
        let mut answer = Criu_resp::new();
        answer.set_type(Criu_req_type::NOTIFY);
        answer.set_success(true);
        answer.notify = MessageField::some(notify);
        say(&answer, fd);
        hear().notify_success()
    };
    let req = hear();
    let mut last = Criu_resp::new();
    last.set_type(req.type_());
    last.set_success(true);
    match scene.as_str() {
        "version" => {
            let mut v = Criu_version::new();
            v.set_major_number(4);
            v.set_minor_number(1);
            v.set_sublevel(1);
            last.version = MessageField::some(v);
        }
        "dump" => last.set_success(tell("pre-dump", None, None) && tell("post-dump", None, None)),
        "restore" => {
            assert_eq!(req.opts.inherit_fd[0].fd(), 4);
            let text = std::fs::read_to_string("/proc/self/fd/4").unwrap();
            assert_eq!(text, "inherited");
            tell("setup-namespaces", Some(77), None);
            tell("orphan-pts-master", None, Some(0));
            last.set_success(tell("post-restore", Some(77), None));
            let mut restored = Criu_restore_resp::new();
            restored.set_pid(77);
            last.restore = MessageField::some(restored);
        }
        "errmsg" => {
            last.set_success(false);
            last.set_cr_errno(3);
            last.set_cr_errmsg("Can't open: No such file or directory\nmore\n".into());
        }
        "silent" => std::thread::sleep(Duration::from_secs(60)),
        "dies" => return,
        other => panic!("no scene {other}"),
    }
    say(&last, None);
    drop(socket);
}

#[test]
fn version_is_one_comparable_number() {
    let fake = fake("version");
    let version = Criu::new(&fake.program).version().unwrap();
    assert_eq!(version, Version(40101));
    assert_eq!(version.to_string(), "4.1.1");
    assert!(version > Version(31600));
}

#[test]
fn the_gate_can_hold_post_dump_for_longer_than_the_deadline() {
    let fake = fake("dump");
    let mut criu = Criu::new(&fake.program);
    criu.deadline(Duration::from_millis(2500));
    let mut heard = Vec::new();
    criu.dump(opts(), &mut |n| {
        if n.script == "post-dump" {
            std::thread::sleep(Duration::from_secs(3));
        }
        heard.push(n.script);
        Verdict::Go
    })
    .unwrap();
    assert_eq!(heard, ["pre-dump", "post-dump"]);
}

#[test]
fn a_refusal_names_the_moment_and_the_reason() {
    let fake = fake("dump");
    let err = Criu::new(&fake.program)
        .dump(opts(), &mut |n| match n.script.as_str() {
            "post-dump" => Verdict::Refuse("destination is gone".into()),
            _ => Verdict::Go,
        })
        .unwrap_err();
    assert_eq!(err.to_string(), "dump refused at post-dump: destination is gone");
}

#[test]
fn restore_inherits_descriptors_and_yields_pid_and_terminal() {
    let fake = fake("restore");
    let mut criu = Criu::new(&fake.program);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"inherited").unwrap();
    let number = criu.pass_fd(file.into());
    let mut opts = opts();
    let mut inherit = super::rpc::Inherit_fd::new();
    inherit.set_key("extRootNetNS".into());
    inherit.set_fd(number);
    opts.inherit_fd.push(inherit);
    let mut placed = 0;
    let mut heard = Vec::new();
    criu.place(Box::new(|pid, _| {
        placed = pid;
        Ok(())
    }));
    let pid = criu
        .restore(opts, &mut |n| {
            heard.push((n.script, n.pid, n.fd.is_some()));
            Verdict::Go
        })
        .unwrap();
    assert_eq!(pid, 77);
    assert!(placed > 1);
    assert_eq!(
        heard,
        [
            ("setup-namespaces".into(), Some(77), false),
            ("orphan-pts-master".into(), None, true),
            ("post-restore".into(), Some(77), false),
        ]
    );
}

#[test]
fn a_failed_placement_asks_criu_for_nothing() {
    let fake = fake("dump");
    let mut criu = Criu::new(&fake.program);
    criu.place(Box::new(|_, _| Err("no such cgroup".into())));
    let err = criu.dump(opts(), &mut |_| panic!("nothing was asked")).unwrap_err();
    assert!(matches!(err, CriuError::Placement(why) if why == "no such cgroup"));
}

#[test]
fn the_log_explains_better_than_the_answer() {
    let fake = fake("errmsg");
    let err = Criu::new(&fake.program).dump(opts(), &mut |_| Verdict::Go).unwrap_err();
    assert_eq!(err.to_string(), "CRIU dump failed: Can't open: ENOENT");
    let mut log = tempfile::NamedTempFile::new().unwrap();
    writeln!(log, "(00.1) Error (criu/x.c:1): the real reason").unwrap();
    let mut criu = Criu::new(&fake.program);
    criu.log_at(log.path());
    let err = criu.dump(opts(), &mut |_| Verdict::Go).unwrap_err();
    assert_eq!(err.to_string(), "CRIU dump failed: the real reason");
}

#[test]
fn a_silent_criu_is_ended_at_the_deadline() {
    let fake = fake("silent");
    let mut criu = Criu::new(&fake.program);
    criu.deadline(Duration::from_millis(300));
    let begin = Instant::now();
    let err = criu.dump(opts(), &mut |_| Verdict::Go).unwrap_err();
    assert!(matches!(err, CriuError::Deadline { op: "dump", .. }));
    assert!(begin.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_dying_or_missing_criu_is_an_error_with_a_way_out() {
    let err = Criu::new(&fake("dies").program).dump(opts(), &mut |_| Verdict::Go).unwrap_err();
    assert!(err.to_string().contains("ended without an answer"), "{err}");
    let err = Criu::new("/nowhere/criu").version().unwrap_err();
    assert!(err.to_string().contains("install the package criu"), "{err}");
}
