//! Which devices a container may open, on the unified hierarchy: the
//! specification's device rules as a small BPF program on its cgroup.
//!
//! libcgroups leaves this out unless built with a C BPF library; without it a
//! container with CAP_MKNOD (Docker's default) reaches every disk. The rules
//! mean what they mean under runc: later ones win, what none names is denied,
//! and a few harmless devices are always allowed.

#![expect(unsafe_code, reason = "bpf(2) has no safe interface")]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};

const MAX_RULES: usize = 512;
const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    /// 1 block, 2 character, `None` both.
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

const fn character(major: u32, minor: Option<u32>) -> Rule {
    Rule { allow: true, kind: Some(2), major: Some(major), minor, access: ALL }
}

/// What every container may use: any node may be made (not opened), and
/// null, zero, full, random, urandom, tty, ptmx and pseudo terminals.
const ALWAYS: [Rule; 10] = [
    Rule { allow: true, kind: Some(2), major: None, minor: None, access: MKNOD },
    Rule { allow: true, kind: Some(1), major: None, minor: None, access: MKNOD },
    character(1, Some(3)),
    character(1, Some(5)),
    character(1, Some(7)),
    character(1, Some(8)),
    character(1, Some(9)),
    character(5, Some(0)),
    character(5, Some(2)),
    character(136, None),
];

/// Attaches the specification's rules to the cgroup at `cgroup`.
pub fn restrict(spec: &Spec, cgroup: &Path) -> Result<()> {
    let program = program(&rules(spec)?);
    let dir = File::open(cgroup).with_context(|| format!("cannot open {}", cgroup.display()))?;
    let loaded = load(&program).context("cannot load the device filter")?;
    attach(&loaded, &dir).with_context(|| format!("cannot attach the device filter to {}", cgroup.display()))
}

fn rules(spec: &Spec) -> Result<Vec<Rule>> {
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let listed = resources.and_then(|resources| resources.devices().as_ref());
    let mut rules = Vec::new();
    for device in listed.into_iter().flatten() {
        rules.push(rule(device)?);
    }
    rules.extend(ALWAYS);
    if rules.len() > MAX_RULES {
        bail!("linux.resources.devices has {} rules, more than {MAX_RULES}", rules.len());
    }
    Ok(rules)
}

fn rule(device: &LinuxDeviceCgroup) -> Result<Rule> {
    let number = |n: Option<i64>| -> Result<Option<u32>> {
        match n {
            None | Some(-1) => Ok(None),
            Some(n) => u32::try_from(n).map(Some).context("a device number is out of range"),
        }
    };
    let mut access = 0;
    for letter in device.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            other => bail!("device access {other:?} is none of r, w, m"),
        };
    }
    Ok(Rule {
        allow: device.allow(),
        kind: match device.typ() {
            Some(LinuxDeviceType::B) => Some(1),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(2),
            Some(LinuxDeviceType::P) => bail!("a pipe cannot be restricted as a device"),
            Some(LinuxDeviceType::A) | None => None,
        },
        major: number(device.major())?,
        minor: number(device.minor())?,
        access,
    })
}

/// One BPF instruction as the kernel reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Insn {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61;
const AND: u8 = 0x54;
const SHIFT_RIGHT: u8 = 0x74;
const MOVE: u8 = 0xb4;
const MOVE_REGISTER: u8 = 0xbc;
const UNLESS_EQUAL: u8 = 0x56;
const UNLESS_EQUAL_REGISTER: u8 = 0x5e;
const IF_EQUAL: u8 = 0x16;
const EXIT: u8 = 0x95;

const fn insn(code: u8, destination: u8, source: u8, offset: i16, immediate: u32) -> Insn {
    Insn { code, registers: source << 4 | destination, offset, immediate: immediate as i32 }
}

/// Registers: 2 type, 3 requested access, 4 major, 5 minor.
fn program(rules: &[Rule]) -> Vec<Insn> {
    let mut out = vec![
        insn(LOAD_WORD, 2, 1, 0, 0),
        insn(AND, 2, 0, 0, 0xffff),
        insn(LOAD_WORD, 3, 1, 0, 0),
        insn(SHIFT_RIGHT, 3, 0, 0, 16),
        insn(LOAD_WORD, 4, 1, 4, 0),
        insn(LOAD_WORD, 5, 1, 8, 0),
    ];
    // The first match from the end decides.
    for rule in rules.iter().rev() {
        let mut block = Vec::new();
        if let Some(kind) = rule.kind {
            block.push(insn(UNLESS_EQUAL, 2, 0, 0, kind));
        }
        if rule.access != ALL {
            block.push(insn(MOVE_REGISTER, 1, 3, 0, 0));
            block.push(insn(AND, 1, 0, 0, rule.access));
            match rule.allow {
                // All that is asked for must be granted,
                true => block.push(insn(UNLESS_EQUAL_REGISTER, 1, 3, 0, 0)),
                // one bit denied is enough.
                false => block.push(insn(IF_EQUAL, 1, 0, 0, 0)),
            }
        }
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                block.push(insn(UNLESS_EQUAL, register, 0, 0, number));
            }
        }
        let always = block.is_empty();
        block.push(insn(MOVE, 0, 0, 0, u32::from(rule.allow)));
        block.push(insn(EXIT, 0, 0, 0, 0));
        let end = block.len();
        for (n, one) in block.iter_mut().enumerate() {
            if matches!(one.code, UNLESS_EQUAL | UNLESS_EQUAL_REGISTER | IF_EQUAL) {
                one.offset = (end - n - 1) as i16;
            }
        }
        out.extend(block);
        if always {
            // The kernel refuses programs with instructions nothing reaches.
            return out;
        }
    }
    out.push(insn(MOVE, 0, 0, 0, 0));
    out.push(insn(EXIT, 0, 0, 0, 0));
    out
}

const PROG_LOAD: libc::c_long = 5;
const PROG_ATTACH: libc::c_long = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
/// Others' filters (systemd's) stay in force beside ours.
const ALLOW_MULTI: u32 = 2;

#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
struct AttachAttr {
    target_fd: u32,
    attach_bpf_fd: u32,
    attach_type: u32,
    attach_flags: u32,
}

fn load(program: &[Insn]) -> nix::Result<OwnedFd> {
    let attr = LoadAttr {
        prog_type: TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..LoadAttr::default()
    };
    // SAFETY: the attribute and what it points to outlive the call, and its
    // size is passed with it.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, PROG_LOAD, &attr, size_of::<LoadAttr>()) };
    let fd = nix::errno::Errno::result(fd)?;
    // SAFETY: the kernel just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn attach(program: &OwnedFd, cgroup: &File) -> nix::Result<()> {
    let attr = AttachAttr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: ATTACH_CGROUP_DEVICE,
        attach_flags: ALLOW_MULTI,
    };
    // SAFETY: as above.
    let done = unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &attr, size_of::<AttachAttr>()) };
    nix::errno::Errno::result(done).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, for (type, access, major, minor).
    fn verdict(program: &[Insn], device: (u32, u32, u32, u32)) -> u32 {
        let (kind, access, major, minor) = device;
        let context = [access << 16 | kind, major, minor];
        let mut r = [0u32; 6];
        let mut at = 0;
        loop {
            let one = program[at];
            let (to, from) = ((one.registers & 15) as usize, (one.registers >> 4) as usize);
            let value = one.immediate as u32;
            at += 1;
            let jump = match one.code {
                LOAD_WORD => {
                    r[to] = context[one.offset as usize / 4];
                    false
                }
                AND => {
                    r[to] &= value;
                    false
                }
                SHIFT_RIGHT => {
                    r[to] >>= value;
                    false
                }
                MOVE => {
                    r[to] = value;
                    false
                }
                MOVE_REGISTER => {
                    r[to] = r[from];
                    false
                }
                UNLESS_EQUAL => r[to] != value,
                UNLESS_EQUAL_REGISTER => r[to] != r[from],
                IF_EQUAL => r[to] == value,
                EXIT => return r[0],
                other => panic!("instruction {other:#x}"),
            };
            if jump {
                at += one.offset as usize;
            }
        }
    }

    fn of(json: &str) -> Vec<Insn> {
        let devices: Vec<LinuxDeviceCgroup> = serde_json::from_str(json).unwrap();
        let mut rules: Vec<Rule> = devices.iter().map(|d| rule(d).unwrap()).collect();
        rules.extend(ALWAYS);
        program(&rules)
    }

    #[test]
    fn dockers_rules_deny_disks_and_allow_what_is_named() {
        let p = of(r#"[{"allow":false,"access":"rwm"},
                       {"allow":true,"type":"c","major":231,"minor":192,"access":"rw"}]"#);
        assert_eq!(verdict(&p, (2, READ | WRITE, 1, 3)), 1, "/dev/null");
        assert_eq!(verdict(&p, (2, READ | WRITE, 231, 192)), 1, "uverbs0");
        assert_eq!(verdict(&p, (2, READ, 231, 193)), 0, "uverbs1");
        assert_eq!(verdict(&p, (1, READ, 8, 0)), 0, "a disk");
        assert_eq!(verdict(&p, (1, MKNOD, 8, 0)), 1, "a disk's node without opening it");
        assert_eq!(verdict(&p, (1, MKNOD | READ, 8, 0)), 0);
    }

    #[test]
    fn later_rules_win_and_privileged_means_all() {
        let p = of(r#"[{"allow":true,"access":"rwm"}]"#);
        assert_eq!(verdict(&p, (1, READ | WRITE | MKNOD, 8, 0)), 1);
        let p = of(r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":8,"access":"w"}]"#);
        assert_eq!(verdict(&p, (1, READ, 8, 0)), 1);
        assert_eq!(verdict(&p, (1, READ | WRITE, 8, 0)), 0);
        let p = of("[]");
        assert_eq!(verdict(&p, (2, READ, 10, 200)), 0);
    }
}
