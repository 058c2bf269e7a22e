//! Which entry of the destination's GID table stands in for one the application knows. The application goes on seeing
//! its own table; QPs are connected with the entry chosen here.

use crate::uverbs::{Device, Gid};
use rdma_virt::id::PGid;
use rdma_virt::saved::{GidEntry, SgidMap};

/// The maps for all entries that have a counterpart on this device, in the order of `entries`.
pub fn map(entries: &[GidEntry], device: &Device) -> Vec<SgidMap> {
    entries
        .iter()
        .filter_map(|entry| {
            let virtual_index = u8::try_from(entry.index).ok()?;
            let port = device.ports.iter().find(|port| port.number == entry.port)?;
            let best = best(PGid(entry.gid.0), entry.kind, &port.gids)?;
            let physical_index = u8::try_from(best.index).ok()?;
            Some(SgidMap { port: entry.port, virtual_index, physical_index, physical: best.gid })
        })
        .collect()
}

/// Same RoCE version and address family, then the longest common prefix (the same subnet, if there is one), then the
/// lowest index.
fn best(wanted: PGid, kind: u32, table: &[Gid]) -> Option<&Gid> {
    table
        .iter()
        .filter(|gid| gid.kind == kind && gid.gid.ip().is_ipv4() == wanted.ip().is_ipv4())
        .filter(|gid| is_link_local(gid.gid) == is_link_local(wanted))
        .max_by_key(|gid| (common_bits(gid.gid, wanted), std::cmp::Reverse(gid.index)))
}

fn is_link_local(gid: PGid) -> bool {
    gid.0[0] == 0xfe && gid.0[1] & 0xc0 == 0x80
}

fn common_bits(a: PGid, b: PGid) -> u32 {
    (u128::from_be_bytes(a.0) ^ u128::from_be_bytes(b.0)).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uverbs::Port;
    use rdma_virt::id::VGid;

    fn v4(a: u8, b: u8, c: u8, d: u8) -> [u8; 16] {
        let mut raw = [0; 16];
        raw[10..].copy_from_slice(&[0xff, 0xff, a, b, c, d]);
        raw
    }

    fn local(last: u8) -> [u8; 16] {
        let mut raw = [0; 16];
        (raw[0], raw[1], raw[15]) = (0xfe, 0x80, last);
        raw
    }

    fn device(gids: &[([u8; 16], u32)]) -> Device {
        let gids = gids
            .iter()
            .enumerate()
            .map(|(i, (gid, kind))| Gid { index: i as u16, gid: PGid(*gid), kind: *kind })
            .collect();
        Device {
            name: "rxe1".into(),
            uverbs: "uverbs1".into(),
            driver: "rxe".into(),
            node_guid: 0,
            ports: vec![Port { number: 1, active: true, gids }],
        }
    }

    #[test]
    fn the_entry_of_the_same_subnet_is_chosen_whatever_its_index() {
        let table = [(local(2), 2), (v4(192, 168, 7, 2), 2), (v4(10, 10, 0, 2), 1), (v4(10, 10, 0, 2), 2)];
        let entry = |index, gid| GidEntry { port: 1, index, gid: VGid(gid), kind: 2 };
        let maps = map(&[entry(0, local(1)), entry(1, v4(10, 10, 0, 1))], &device(&table));
        assert_eq!(maps.iter().map(|m| (m.virtual_index, m.physical_index)).collect::<Vec<_>>(), [(0, 0), (1, 3)]);
        assert_eq!(maps[1].physical, PGid(v4(10, 10, 0, 2)));
    }

    #[test]
    fn an_entry_without_counterpart_is_left_out() {
        let entry = GidEntry { port: 1, index: 0, gid: VGid(v4(10, 10, 0, 1)), kind: 2 };
        assert_eq!(map(&[entry], &device(&[(local(1), 2)])), []);
    }
}
