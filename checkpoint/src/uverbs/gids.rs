//! The filled entries of a device's GID tables in one question to the kernel.
//!
//! Sysfs has a file for every place of a table, and most of the thousand places of a Soft-RoCE device are empty: reading
//! them all costs seconds of a busy host. The question belongs to an open context, so it is asked where opening one
//! needs nothing of the driver; [`super::sysfs`] knows the other way.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rdma_virt::id::PGid;

use super::abi;
use super::call::Call;
use super::sysfs::Gid;

/// Bytes of `struct ib_uverbs_gid_entry`.
pub const ENTRY: usize = 32;

/// More entries than any device has filled; the kernel refuses when there are more.
const MOST: usize = 2000;

/// `(port, entry)` of all filled places, asked of the device behind `node`. An error means that another way has to be
/// gone: the driver wants more to open a context, the kernel is too old, the node is not accessible.
pub fn of(node: &Path, driver_id: u32) -> io::Result<Vec<(u8, Gid)>> {
    let file = OpenOptions::new().read(true).write(true).open(node)?;
    let mut call = Call::new(abi::OBJECT_DEVICE, abi::METHOD_GET_CONTEXT);
    call.output::<u32>(abi::ATTR_GET_CONTEXT_NUM_COMP_VECTORS);
    call.output::<u64>(abi::ATTR_GET_CONTEXT_CORE_SUPPORT);
    call.run(file.as_fd(), driver_id)?;
    let mut call = Call::new(abi::OBJECT_DEVICE, abi::METHOD_QUERY_GID_TABLE);
    call.value(abi::ATTR_QUERY_GID_TABLE_ENTRY_SIZE, ENTRY as u64);
    call.value32(abi::ATTR_QUERY_GID_TABLE_FLAGS, 0);
    let entries = call.room(abi::ATTR_QUERY_GID_TABLE_ENTRIES, ENTRY * MOST);
    let count = call.output::<u64>(abi::ATTR_QUERY_GID_TABLE_COUNT);
    call.run(file.as_fd(), driver_id)?;
    let count = usize::try_from(call.result::<u64>(count)).unwrap_or(0);
    let words = call.words(entries);
    Ok(words.chunks_exact(ENTRY / 8).take(count).map(entry).collect())
}

/// `struct ib_uverbs_gid_entry`: the GID, then index, port, type and interface, 32 bits each.
fn entry(words: &[u64]) -> (u8, Gid) {
    let mut gid = [0; 16];
    gid[..8].copy_from_slice(&words[0].to_ne_bytes());
    gid[8..].copy_from_slice(&words[1].to_ne_bytes());
    let half = |at: usize| {
        let bytes = words[2 + at / 2].to_ne_bytes();
        let from = at % 2 * 4;
        u32::from_ne_bytes([bytes[from], bytes[from + 1], bytes[from + 2], bytes[from + 3]])
    };
    (half(1) as u8, Gid { index: half(0) as u16, gid: PGid(gid), kind: half(2) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_read_as_the_kernel_lays_it_out() {
        let mut raw = [0u8; ENTRY];
        raw[..16].copy_from_slice(&[7; 16]);
        for (at, value) in [(16, 3u32), (20, 1), (24, 2), (28, 99)] {
            raw[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let words: Vec<u64> = raw.chunks(8).map(|b| u64::from_ne_bytes(b.try_into().unwrap())).collect();
        assert_eq!(entry(&words), (1, Gid { index: 3, gid: PGid([7; 16]), kind: 2 }));
    }

    #[test]
    fn a_file_that_is_no_device_is_an_error() {
        assert!(of(Path::new("/dev/null"), abi::DRIVER_RXE).is_err());
    }
}
