//! The build id of an ELF file: the linker's fingerprint of what a process has mapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Notes are short.
const MAX_NOTES: u64 = 64 << 10;

/// `PT_NOTE` and `NT_GNU_BUILD_ID`.
const PT_NOTE: u32 = 4;
const BUILD_ID: u32 = 3;

/// In hexadecimal; empty if the file has none.
pub fn build_id(path: &Path) -> io::Result<String> {
    let bad = |why| io::Error::new(io::ErrorKind::InvalidData, why);
    let file = File::open(path)?;
    let mut head = [0; 64];
    file.read_exact_at(&mut head, 0)?;
    if head[..4] != *b"\x7fELF" || head[4] != 2 || head[5] != 1 {
        return Err(bad("not a 64-bit little-endian ELF file"));
    }
    let (offset, size, count) = (u64_at(&head, 32), u64::from(u16_at(&head, 54)), u64::from(u16_at(&head, 56)));
    if size < 56 {
        return Err(bad("program headers that are too short"));
    }
    for i in 0..count {
        let mut header = [0; 56];
        let at =
            i.checked_mul(size).and_then(|n| offset.checked_add(n)).ok_or_else(|| bad("program headers nowhere"))?;
        file.read_exact_at(&mut header, at)?;
        if u32_at(&header, 0) != PT_NOTE {
            continue;
        }
        let len = u64_at(&header, 32);
        if len > MAX_NOTES {
            continue;
        }
        let mut notes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_exact_at(&mut notes, u64_at(&header, 8))?;
        if let Some(id) = find(&notes) {
            return Ok(id.iter().map(|b| format!("{b:02x}")).collect());
        }
    }
    Ok(String::new())
}

fn find(mut notes: &[u8]) -> Option<&[u8]> {
    while notes.len() >= 12 {
        let (name, desc, kind) = (u32_at(notes, 0) as usize, u32_at(notes, 4) as usize, u32_at(notes, 8));
        let padded = |n: usize| n.checked_add(3).map(|n| n & !3);
        let start = 12_usize.checked_add(padded(name)?)?;
        let body = notes.get(start..start.checked_add(desc)?)?;
        if kind == BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            return Some(body);
        }
        notes = notes.get(start.checked_add(padded(desc)?)?..)?;
    }
    None
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_libc_has_a_build_id() {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc =
            maps.lines().filter_map(|l| l.find('/').map(|at| &l[at..])).find(|p| p.contains("/libc.so")).unwrap();
        assert_eq!(build_id(Path::new(libc)).unwrap().len(), 40);
    }

    proptest::proptest! {
        #[test]
        fn damaged_notes_do_no_harm(notes in proptest::collection::vec(proptest::num::u8::ANY, 0..64)) {
            let _ = find(&notes);
        }
    }
}
