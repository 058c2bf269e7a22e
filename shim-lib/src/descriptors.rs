//! A new open file behind a number the application knows, and behind the epoll registrations it made under that number.
//!
//! After a *rebuild* the files of a device are others than those that were restored: placeholders, on which nothing ever
//! happens. The application's numbers must not change, so each placeholder is replaced where it is. An epoll set holds
//! the file, not the number, and would go on watching the placeholder: what it was told about the number is told again.
//!
//! A thread that sleeps in a system call on the old file is not reached from here. It sleeps until it is interrupted;
//! then the kernel looks the number up again. The agent sees to that (it stops and continues the container once).
//! Sets that only another process holds are not found.
#![expect(unsafe_code, reason = "descriptors by number, as applications know them")]

use std::fs;
use std::io;
use std::os::fd::RawFd;

/// What an epoll set was told about one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watch {
    set: RawFd,
    events: u32,
    data: u64,
}

/// What to do with a number of the application's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// Nothing is open there: it was closed, and may be taken again.
    Free,
    /// What a restore put in the place of a device's file.
    Placeholder,
    /// Something of the application's.
    Foreign,
}

fn link(fd: RawFd) -> io::Result<String> {
    fs::read_link(format!("/proc/self/fd/{fd}")).map(|path| path.to_string_lossy().into_owned())
}

fn look(fd: RawFd) -> Found {
    match link(fd) {
        Ok(name) if name == "anon_inode:[eventfd]" => Found::Placeholder,
        Ok(_) => Found::Foreign,
        Err(_) => Found::Free,
    }
}

/// Puts the open file of `fresh` behind `number`, with the flags and the epoll registrations of what was there, and
/// closes `fresh`. Returns the number the file has now: `fresh` itself where the application has made `number` its own.
///
/// On failure `number` is as it was, and `fresh` still open.
pub fn take_place(fresh: RawFd, number: RawFd) -> io::Result<RawFd> {
    if fresh == number {
        return Ok(number);
    }
    match look(number) {
        Found::Foreign => return Ok(fresh),
        Found::Free => {
            duplicate(fresh, number, libc::O_CLOEXEC)?;
        }
        Found::Placeholder => replace(fresh, number)?,
    }
    // SAFETY: ours, and nobody was told about it.
    unsafe { libc::close(fresh) };
    Ok(number)
}

fn replace(fresh: RawFd, number: RawFd) -> io::Result<()> {
    let status = flags(number, libc::F_GETFL)?;
    let close_on_exec = flags(number, libc::F_GETFD)? & libc::FD_CLOEXEC != 0;
    let ours = flags(fresh, libc::F_GETFL)?;
    let wanted = ours & !libc::O_NONBLOCK | status & libc::O_NONBLOCK;
    // SAFETY: a descriptor of ours and flags it can have.
    if wanted != ours && unsafe { libc::fcntl(fresh, libc::F_SETFL, wanted) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // The old file's registrations go first: somebody else may hold that file open, and a set that had both would report
    // everything twice. A registration of another file under this number answers ENOENT and stays.
    let mut watches = watches_of(number);
    watches.retain(|watch| control(watch, libc::EPOLL_CTL_DEL, number).is_ok());
    let done = duplicate(fresh, number, if close_on_exec { libc::O_CLOEXEC } else { 0 });
    let mut lost = None;
    for watch in &watches {
        match control(watch, libc::EPOLL_CTL_ADD, number) {
            // The application itself was quicker.
            Err(e) if e.raw_os_error() == Some(libc::EEXIST) => {}
            Err(e) => lost = Some(e),
            Ok(()) => {}
        }
    }
    done?;
    lost.map_or(Ok(()), Err)
}

fn duplicate(from: RawFd, to: RawFd, flags: i32) -> io::Result<()> {
    // SAFETY: both are numbers; what was behind `to` is replaced at one stroke.
    if unsafe { libc::dup3(from, to, flags) } < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn flags(fd: RawFd, which: i32) -> io::Result<i32> {
    // SAFETY: asks only.
    let found = unsafe { libc::fcntl(fd, which) };
    if found < 0 { Err(io::Error::last_os_error()) } else { Ok(found) }
}

fn control(watch: &Watch, what: i32, number: RawFd) -> io::Result<()> {
    let mut event = libc::epoll_event { events: watch.events, u64: watch.data };
    // SAFETY: an event of ours; any numbers may be given.
    let done = unsafe { libc::epoll_ctl(watch.set, what, number, &raw mut event) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What the epoll sets of this process say about a number. A set that is open twice is found once.
fn watches_of(number: RawFd) -> Vec<Watch> {
    let mut found: Vec<Watch> = Vec::new();
    let Ok(list) = fs::read_dir("/proc/self/fd") else { return found };
    let sets: Vec<RawFd> = list.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    for set in sets {
        if !link(set).is_ok_and(|name| name == "anon_inode:[eventpoll]") {
            continue;
        }
        let Ok(text) = fs::read_to_string(format!("/proc/self/fdinfo/{set}")) else { continue };
        for (fd, events, data) in text.lines().filter_map(registration) {
            if fd == number {
                found.push(Watch { set, events, data });
            }
        }
    }
    found
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:61 sdev:10`
fn registration(line: &str) -> Option<(RawFd, u32, u64)> {
    let mut words = line.split_whitespace();
    let mut value = |key: &str| (words.next()? == key).then(|| words.next()).flatten();
    let fd = value("tfd:")?.parse().ok()?;
    let events = u32::from_str_radix(value("events:")?, 16).ok()?;
    let data = u64::from_str_radix(value("data:")?, 16).ok()?;
    Some((fd, events, data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    fn eventfd(nonblock: bool) -> OwnedFd {
        let flags = libc::EFD_CLOEXEC | if nonblock { libc::EFD_NONBLOCK } else { 0 };
        // SAFETY: a new descriptor, owned at once.
        unsafe { OwnedFd::from_raw_fd(libc::eventfd(0, flags)) }
    }

    fn set() -> OwnedFd {
        // SAFETY: as above.
        unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) }
    }

    fn add(set: &OwnedFd, fd: RawFd, events: i32, data: u64) {
        let watch = Watch { set: set.as_raw_fd(), events: events as u32, data };
        control(&watch, libc::EPOLL_CTL_ADD, fd).expect("an fd that can be watched");
    }

    /// Data of the events that are there within a moment.
    fn ready(set: &OwnedFd, patience: Duration) -> Vec<u64> {
        let mut room = [libc::epoll_event { events: 0, u64: 0 }; 8];
        // SAFETY: room for eight.
        let n = unsafe { libc::epoll_wait(set.as_raw_fd(), room.as_mut_ptr(), 8, patience.as_millis() as i32) };
        room[..usize::try_from(n).expect("no error")].iter().map(|e| e.u64).collect()
    }

    /// A file that becomes readable when told to, as the device's new one does.
    fn fresh() -> (RawFd, UnixDatagram) {
        let (a, b) = UnixDatagram::pair().expect("sockets");
        (a.into_raw_fd(), b)
    }

    #[test]
    fn a_line_of_the_kernel_is_understood_and_other_lines_are_not() {
        let line = "tfd:        5 events: 80000019 data: ffffffff00000005  pos:0 ino:61 sdev:10";
        assert_eq!(registration(line), Some((5, 0x8000_0019, 0xffff_ffff_0000_0005)));
        for other in ["pos:\t0", "tfd: x events: 1 data: 1", "tfd:", "", "events: 1 tfd: 2 data: 3"] {
            assert_eq!(registration(other), None, "{other}");
        }
    }

    #[test]
    fn every_epoll_set_goes_on_with_the_new_file_under_the_same_number_events_and_data() {
        let (one, two) = (set(), set());
        let place = eventfd(true);
        let number = place.as_raw_fd();
        add(&one, number, libc::EPOLLIN, 77);
        add(&two, number, libc::EPOLLIN | libc::EPOLLET, u64::MAX);
        let before: Vec<_> = watches_of(number);
        let (file, far) = fresh();
        assert_eq!(take_place(file, number).expect("replaced"), number);
        assert_eq!(watches_of(number), before, "same sets, events and data");
        assert!(flags(number, libc::F_GETFL).expect("flags") & libc::O_NONBLOCK != 0, "still non-blocking");
        assert!(flags(number, libc::F_GETFD).expect("flags") & libc::FD_CLOEXEC != 0);
        assert_eq!(ready(&one, Duration::ZERO), []);
        far.send(b"x").expect("sent");
        assert_eq!(ready(&one, Duration::from_secs(5)), [77]);
        assert_eq!(ready(&two, Duration::from_secs(5)), [u64::MAX]);
        assert_eq!(ready(&two, Duration::ZERO), [], "edge-triggered as before");
        assert_eq!(ready(&one, Duration::ZERO), [77], "level-triggered as before");
    }

    #[test]
    fn somebody_else_who_holds_the_old_file_does_not_double_events() {
        let watcher = set();
        let place = eventfd(false);
        let elsewhere = place.try_clone().expect("as a child of fork has it");
        let number = place.as_raw_fd();
        add(&watcher, number, libc::EPOLLIN, 5);
        let (file, far) = fresh();
        take_place(file, number).expect("replaced");
        far.send(b"x").expect("sent");
        let one = 1_u64;
        // SAFETY: eight bytes into an eventfd.
        unsafe { libc::write(elsewhere.as_raw_fd(), (&raw const one).cast(), 8) };
        assert_eq!(ready(&watcher, Duration::from_secs(5)), [5], "once, for the new file");
    }

    #[test]
    fn an_event_that_is_there_already_is_reported() {
        let watcher = set();
        let place = eventfd(false);
        add(&watcher, place.as_raw_fd(), libc::EPOLLIN | libc::EPOLLET, 9);
        let (file, far) = fresh();
        far.send(b"x").expect("sent");
        take_place(file, place.as_raw_fd()).expect("replaced");
        assert_eq!(ready(&watcher, Duration::from_secs(5)), [9]);
    }

    #[test]
    fn a_thread_that_waits_on_the_set_meanwhile_is_woken_by_the_new_file() {
        let watcher = set();
        let place = eventfd(false);
        add(&watcher, place.as_raw_fd(), libc::EPOLLIN, 3);
        let (file, far) = fresh();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ready(&watcher, Duration::from_secs(20)));
            std::thread::sleep(Duration::from_millis(50));
            take_place(file, place.as_raw_fd()).expect("replaced");
            far.send(b"x").expect("sent");
            assert_eq!(waiting.join().expect("no panic"), [3]);
        });
    }

    #[test]
    fn a_number_the_application_made_its_own_is_left_alone_and_a_closed_one_is_taken() {
        let theirs = fs::File::open("/dev/null").expect("a file");
        let (file, _far) = fresh();
        assert_eq!(take_place(file, theirs.as_raw_fd()).expect("no error"), file);
        assert_eq!(link(theirs.as_raw_fd()).expect("open"), "/dev/null");
        let number = 900;
        assert_eq!(look(number), Found::Free);
        assert_eq!(take_place(file, number).expect("taken"), number);
        assert_eq!(look(number), Found::Foreign);
        // SAFETY: opened by this test.
        unsafe { libc::close(number) };
    }
}
