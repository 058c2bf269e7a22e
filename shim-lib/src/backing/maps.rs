//! What is mapped where, as `/proc/self/smaps` and `/proc/self/maps` tell.

use std::fs::File;
use std::io::{self, BufRead, BufReader};

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    pub start: usize,
    pub end: usize,
    /// `rw-p` and the like.
    pub perms: String,
    /// In the file, bytes.
    pub offset: u64,
    pub inode: u64,
    /// Path or name; empty for anonymous memory.
    pub name: String,
    /// `VmFlags`, from smaps only.
    pub flags: Vec<String>,
}

/// Properties that memory keeps, or does not need, when a file takes its place. Memory with any other (locked, huge
/// pages reserved, watched, sealed, guarded …) is left alone.
const KEPT: [&str; 12] = ["rd", "wr", "mr", "mw", "me", "ac", "nr", "sd", "hg", "nh", "dc", "lf"];

impl Mapping {
    /// Private anonymous memory that can be read and written, and nothing special.
    pub fn is_plain(&self) -> bool {
        let named = self.name.is_empty() || self.name == "[heap]" || self.name.starts_with("[anon:");
        self.perms == "rw-p" && self.inode == 0 && named && self.flags.iter().all(|f| KEPT.contains(&f.as_str()))
    }

    /// As `mprotect` takes it.
    pub fn protection(&self) -> i32 {
        let bits = [('r', libc::PROT_READ), ('w', libc::PROT_WRITE), ('x', libc::PROT_EXEC)];
        bits.into_iter().filter(|(letter, _)| self.perms.contains(*letter)).fold(0, |all, (_, bit)| all | bit)
    }

    /// A child of fork does not get it.
    pub fn is_not_forked(&self) -> bool {
        self.flags.iter().any(|f| f == "dc")
    }
}

/// The mappings that have something in `[start, end)`, with their flags.
pub fn within(start: usize, end: usize) -> io::Result<Vec<Mapping>> {
    parse(BufReader::new(File::open("/proc/self/smaps")?), |m| m.end > start, |m| m.start >= end)
}

/// The mappings of files whose path begins like this, without flags.
pub fn of_files(path: &str) -> io::Result<Vec<Mapping>> {
    parse(BufReader::new(File::open("/proc/self/maps")?), |m| m.name.starts_with(path), |_| false)
}

fn parse(
    mut input: impl BufRead,
    wanted: impl Fn(&Mapping) -> bool,
    past: impl Fn(&Mapping) -> bool,
) -> io::Result<Vec<Mapping>> {
    let mut found: Vec<Mapping> = Vec::new();
    let mut of_last = false;
    let mut line = String::new();
    loop {
        line.clear();
        if input.read_line(&mut line)? == 0 {
            return Ok(found);
        }
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = found.last_mut().filter(|_| of_last) {
                last.flags = flags.split_whitespace().map(str::to_owned).collect();
            }
        } else if let Some(mapping) = head(line.trim_end_matches('\n')) {
            if past(&mapping) {
                return Ok(found);
            }
            of_last = wanted(&mapping);
            if of_last {
                found.push(mapping);
            }
        }
    }
}

/// `7f..-7f.. rw-p 00000000 00:00 0    [heap]`
fn head(line: &str) -> Option<Mapping> {
    let mut rest = line;
    let mut field = || {
        let (field, after) = rest.split_once(' ').unwrap_or((rest, ""));
        rest = after.trim_start_matches(' ');
        field
    };
    let (start, end) = field().split_once('-')?;
    let (start, end) = (usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?);
    let perms = field().to_owned();
    let offset = u64::from_str_radix(field(), 16).ok()?;
    let _device = field();
    let inode = field().parse().ok()?;
    Some(Mapping { start, end, perms, offset, inode, name: rest.to_owned(), flags: Vec::new() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
559a4f200000-559a4f221000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
VmFlags: rd wr mr mw me ac sd 
7f0000000000-7f0000010000 rw-p 00000000 00:00 0 
VmFlags: rd wr mr mw me ac lo sd 
7f0000010000-7f0000020000 rw-s 00001000 00:2a 17                         /run/a file
VmFlags: rd wr sh mr mw me ms dc sd 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex 
";

    #[test]
    fn mappings_are_read_with_their_names_and_flags() {
        let all = parse(SMAPS.as_bytes(), |_| true, |_| false).unwrap();
        assert_eq!(all.len(), 4);
        assert_eq!((all[2].offset, all[2].inode, all[2].name.as_str()), (0x1000, 17, "/run/a file"));
        assert!(all[2].is_not_forked() && !all[0].is_not_forked());
        let plain: Vec<bool> = all.iter().map(Mapping::is_plain).collect();
        assert_eq!(plain, [true, false, false, false], "locked and shared memory is not plain");
        let some = parse(SMAPS.as_bytes(), |m| m.end > 0x7f00_0000_0000, |m| m.start >= 0x7f00_0001_0000).unwrap();
        assert_eq!(some.len(), 1);
        assert_eq!(some[0].start, 0x7f00_0000_0000);
    }

    #[test]
    fn our_own_stack_is_found() {
        let here = 0u8;
        let at = std::ptr::from_ref(&here) as usize;
        let found = within(at, at + 1).unwrap();
        assert!(found.len() == 1 && found[0].start <= at && at < found[0].end, "{found:?}");
        assert!(!found[0].flags.is_empty());
    }
}
