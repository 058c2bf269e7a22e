//! What is packed comes out the same, what changed is found, and no archive gets out of its directory.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::list::{Listing, list};
use super::pack::pack;
use super::unpack::Target;

fn packed(dir: &Path, listing: &Listing) -> Vec<u8> {
    let mut out = Vec::new();
    pack(dir, listing.nodes.iter().map(|(p, n)| (p.as_path(), n)), &mut out, false).unwrap();
    out
}

fn unpacked(bytes: &[u8]) -> (tempfile::TempDir, BTreeSet<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let seen = Target::open(dir.path()).unwrap().unpack(bytes, 1 << 20).unwrap();
    (dir, seen)
}

fn source() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let at = |p: &str| dir.path().join(p);
    fs::create_dir_all(at("rootfs/deep/er")).unwrap();
    fs::write(at("config.json"), "{}").unwrap();
    fs::write(at("rootfs/tool"), "tool").unwrap();
    fs::set_permissions(at("rootfs/tool"), fs::Permissions::from_mode(0o4750)).unwrap();
    fs::hard_link(at("rootfs/tool"), at("rootfs/twin")).unwrap();
    symlink("../../../../etc/passwd", at("rootfs/deep/link")).unwrap();
    fs::write(at(&format!("rootfs/deep/{}", "long".repeat(50))), "x").unwrap();
    fs::set_permissions(at("rootfs/deep/er"), fs::Permissions::from_mode(0o1777)).unwrap();
    dir
}

#[test]
fn names_modes_links_and_contents_survive() {
    let from = source();
    let bytes = packed(from.path(), &list(from.path(), Path::new("rootfs")).unwrap());
    let (to, _) = unpacked(&bytes);
    let at = |p: &str| to.path().join(p);
    assert_eq!(fs::read_to_string(at("rootfs/twin")).unwrap(), "tool");
    let (tool, twin) = (fs::metadata(at("rootfs/tool")).unwrap(), fs::metadata(at("rootfs/twin")).unwrap());
    assert_eq!((tool.ino(), tool.mode() & 0o7777), (twin.ino(), 0o4750));
    assert_eq!(fs::read_link(at("rootfs/deep/link")).unwrap(), Path::new("../../../../etc/passwd"));
    assert_eq!(fs::metadata(at("rootfs/deep/er")).unwrap().mode() & 0o7777, 0o1777);
    assert_eq!(fs::read_to_string(at(&format!("rootfs/deep/{}", "long".repeat(50)))).unwrap(), "x");
    let time = |d: &Path| fs::metadata(d.join("rootfs/deep")).unwrap().mtime();
    assert_eq!(time(from.path()), time(to.path()));
}

#[test]
fn attributes_and_devices_survive_for_root() {
    let from = source();
    let tool = from.path().join("rootfs/tool");
    // cap_net_raw+ep, as `setcap` writes it.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let device = from.path().join("rootfs/null");
    let mode = nix::sys::stat::Mode::from_bits_truncate(0o666);
    let made = nix::sys::stat::mknod(&device, nix::sys::stat::SFlag::S_IFCHR, mode, libc::makedev(1, 3));
    if !nix::unistd::geteuid().is_root() {
        // Without the rights to make them there is nothing to carry, and that is refused by the kernel, not by us.
        assert!(made.is_err());
        return;
    }
    made.unwrap();
    xattr::set(&tool, "security.capability", &capability).unwrap();
    let bytes = packed(from.path(), &list(from.path(), Path::new("rootfs")).unwrap());
    let (to, _) = unpacked(&bytes);
    assert_eq!(xattr::get(to.path().join("rootfs/tool"), "security.capability").unwrap().unwrap(), capability);
    assert_eq!(fs::metadata(to.path().join("rootfs/null")).unwrap().rdev(), libc::makedev(1, 3));
}

#[test]
fn what_changed_is_sent_again_and_what_went_away_goes() {
    let from = source();
    let before = list(from.path(), Path::new("rootfs")).unwrap();
    let (to, _) = unpacked(&packed(from.path(), &before));
    fs::write(from.path().join("rootfs/late"), "late").unwrap();
    fs::write(from.path().join("rootfs/tool"), "other").unwrap();
    fs::remove_file(from.path().join("rootfs/deep/link")).unwrap();
    let now = list(from.path(), Path::new("rootfs")).unwrap();
    let (changed, gone) = before.changes(&now);
    let names: Vec<&Path> = changed.iter().map(|(p, _)| *p).collect();
    assert!(names.contains(&Path::new("rootfs/late")) && names.contains(&Path::new("rootfs/twin")), "{names:?}");
    assert_eq!(gone, [PathBuf::from("rootfs/deep/link")]);
    let mut bytes = Vec::new();
    pack(from.path(), changed.into_iter(), &mut bytes, false).unwrap();
    let target = Target::open(to.path()).unwrap();
    gone.iter().for_each(|path| target.remove(path).unwrap());
    target.unpack(&bytes[..], 1 << 20).unwrap();
    assert_eq!(fs::read_to_string(to.path().join("rootfs/late")).unwrap(), "late");
    assert_eq!(fs::read_to_string(to.path().join("rootfs/twin")).unwrap(), "other");
    assert!(fs::symlink_metadata(to.path().join("rootfs/deep/link")).is_err());
}

#[test]
fn a_file_that_shrinks_or_goes_while_it_is_read_harms_nothing() {
    let from = source();
    let listing = list(from.path(), Path::new("rootfs")).unwrap();
    fs::write(from.path().join("config.json"), "").unwrap();
    fs::remove_file(from.path().join("rootfs/deep/link")).unwrap();
    let mut bytes = Vec::new();
    pack(from.path(), listing.nodes.iter().map(|(p, n)| (p.as_path(), n)), &mut bytes, true).unwrap();
    let (to, seen) = unpacked(&bytes);
    assert_eq!(fs::read(to.path().join("config.json")).unwrap(), [0, 0]);
    assert!(!seen.contains(Path::new("rootfs/deep/link")));
}

#[test]
fn a_container_that_swaps_a_directory_for_a_link_shows_nothing_of_the_host() {
    let (from, host) = (source(), tempfile::tempdir().unwrap());
    fs::write(from.path().join("rootfs/deep/file"), "inside").unwrap();
    fs::write(host.path().join("file"), "secret").unwrap();
    let listing = list(from.path(), Path::new("rootfs")).unwrap();
    fs::rename(from.path().join("rootfs/deep"), from.path().join("rootfs/away")).unwrap();
    symlink(host.path(), from.path().join("rootfs/deep")).unwrap();
    let mut bytes = Vec::new();
    let packed = pack(from.path(), listing.nodes.iter().map(|(p, n)| (p.as_path(), n)), &mut bytes, true);
    assert!(packed.is_ok(), "the second pass finds what it is now");
    assert!(!bytes.windows(6).any(|w| w == b"secret"));
}

#[test]
fn an_older_copy_loses_what_the_new_one_has_not() {
    let from = source();
    let (to, seen) = unpacked(&packed(from.path(), &list(from.path(), Path::new("rootfs")).unwrap()));
    fs::write(to.path().join("rootfs/stale"), "").unwrap();
    Target::open(to.path()).unwrap().prune(&seen, Path::new("rootfs")).unwrap();
    assert!(!to.path().join("rootfs/stale").exists() && to.path().join("rootfs/twin").exists());
}

/// One entry with a path as it stands: the crate's own writer would not write it.
fn hostile(path: &str, kind: tar::EntryType, link: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(if kind == tar::EntryType::Regular { 4 } else { 0 });
    header.set_cksum();
    let mut out = header.as_bytes().to_vec();
    if kind == tar::EntryType::Regular {
        out.extend([b'x'; 4]);
        out.resize(1024, 0);
    }
    out
}

#[test]
fn no_archive_reaches_anything_outside() {
    use tar::EntryType::{Link, Regular, Symlink};
    let outer = tempfile::tempdir().unwrap();
    let dir = outer.path().join("bundle");
    fs::create_dir(&dir).unwrap();
    fs::write(outer.path().join("victim"), "safe").unwrap();
    let absolute = outer.path().join("victim").display().to_string();
    let target = Target::open(&dir).unwrap();
    let through = [hostile("out", Symlink, ".."), hostile("out/victim", Regular, "")].concat();
    for bytes in [
        hostile("../victim", Regular, ""),
        hostile(&absolute, Regular, ""),
        hostile("stolen", Link, "../victim"),
        hostile("a/../../victim", Regular, ""),
        through,
    ] {
        assert!(target.unpack(&bytes[..], 1 << 20).is_err());
        assert_eq!(fs::read_to_string(outer.path().join("victim")).unwrap(), "safe");
    }
    assert!(target.unpack(&hostile("big", Regular, "")[..], 3).is_err(), "more than announced");
    assert!(target.remove(Path::new("../victim")).is_err());
}

proptest::proptest! {
    #[test]
    fn no_bytes_at_all_make_it_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..2048)) {
        let dir = tempfile::tempdir().unwrap();
        let _ = Target::open(dir.path()).unwrap().unpack(&bytes[..], 1 << 20);
    }
}

/// In a mount namespace of its own, as root.
fn with_mounts(run: impl FnOnce() + Send + 'static) {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};
    let thread = std::thread::spawn(move || {
        if !nix::unistd::geteuid().is_root() {
            // The kernel refuses, and there is nothing to show.
            assert!(unshare(CloneFlags::CLONE_NEWNS).is_err());
            return;
        }
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_PRIVATE | MsFlags::MS_REC, None::<&str>).unwrap();
        run();
    });
    thread.join().unwrap();
}

#[test]
fn of_one_file_system_what_is_mounted_over_it_leaves_its_place() {
    use nix::mount::{MsFlags, mount};
    with_mounts(|| {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tmpfs = |at: &Path| mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        let at = |p: &str| from.path().join(p);
        tmpfs(from.path());
        fs::create_dir(at("inner")).unwrap();
        tmpfs(&at("inner"));
        fs::write(at("inner/hidden"), "x").unwrap();
        fs::write(at("log"), "covered").unwrap();
        mount(Some("/dev/null"), &at("log"), None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
        fs::write(at("kept"), "kept").unwrap();
        let listing = super::list::list_one(from.path()).unwrap();
        let bytes = packed(from.path(), &listing);
        Target::any(to.path()).unwrap().unpack(bytes.as_slice(), 1 << 20).unwrap();
        assert_eq!(fs::read_to_string(to.path().join("kept")).unwrap(), "kept");
        assert!(fs::read_dir(to.path().join("inner")).unwrap().next().is_none(), "the place of a mount is empty");
        assert_eq!(fs::read_to_string(to.path().join("log")).unwrap(), "");
    });
}

#[test]
fn holes_come_out_as_holes() {
    use std::os::unix::fs::FileExt;
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = fs::File::create(from.path().join("holes")).unwrap();
    file.write_all_at(b"begin", 0).unwrap();
    file.write_all_at(b"middle", (4 << 20) + 5).unwrap();
    file.set_len(8 << 20).unwrap();
    let listing = super::list::list_one(from.path()).unwrap();
    assert!(listing.bytes() == 8 << 20 && listing.held < 1 << 20, "{} of {}", listing.held, listing.bytes());
    let bytes = packed(from.path(), &listing);
    Target::any(to.path()).unwrap().unpack(bytes.as_slice(), 16 << 20).unwrap();
    let there = fs::metadata(to.path().join("holes")).unwrap();
    assert!(there.len() == 8 << 20 && there.blocks() * 512 < 1 << 20, "{} blocks", there.blocks());
    let same = fs::read(to.path().join("holes")).unwrap() == fs::read(from.path().join("holes")).unwrap();
    assert!(same, "the content is another");
}
