//! Newtypes for every number that exists twice: once as the application saw it first (virtual, `V…`) and once as the
//! NIC it runs on now knows it (physical, `P…`). There is deliberately no conversion between the two: only a table
//! that learnt the pair may translate.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! number {
    ($($(#[$doc:meta])* $name:ident($inner:ty), $fmt:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub $inner);
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, $fmt, self.0) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, $fmt, self.0) }
        }
    )*};
}

number! {
    /// QP number the application holds; never changes in the life of the QP. 24 bits.
    VQpn(u32), "vqpn {}";
    /// QP number the NIC uses now. 24 bits.
    PQpn(u32), "pqpn {}";
    /// Local key the application holds.
    VLkey(u32), "vlkey {:#x}";
    /// Local key the NIC accepts now.
    PLkey(u32), "plkey {:#x}";
    /// Remote key the application (or its peer) holds.
    VRkey(u32), "vrkey {:#x}";
    /// Remote key the NIC accepts now.
    PRkey(u32), "prkey {:#x}";
    /// Names one RDMA object of one process, over all kinds of objects, for the life of the process; given by the
    /// shim, never reused.
    ObjId(u32), "object {}";
    /// Process id as the process itself sees it, inside its own pid namespace.
    Vpid(i32), "pid {}";
    /// Kernel handle of a uverbs object in its context; valid for one context only.
    Handle(u32), "handle {}";
}

macro_rules! gid {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub [u8; 16]);
        impl $name {
            /// The IPv6 form of the GID; RoCE v2 puts an IPv4 address in as `::ffff:a.b.c.d`.
            pub fn ip(&self) -> std::net::IpAddr {
                let v6 = std::net::Ipv6Addr::from(self.0);
                v6.to_ipv4_mapped().map_or(std::net::IpAddr::V6(v6), std::net::IpAddr::V4)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}", self.ip()) }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result { write!(f, "{}", self.ip()) }
        }
    )*};
}

gid! {
    /// GID the application was shown: that of the host it opened the device on.
    VGid;
    /// GID that is on the wire now.
    PGid;
}

/// Names one migration attempt everywhere: in messages, records and logs.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MigrationId(pub [u8; 16]);

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "migration {self}")
    }
}

impl std::str::FromStr for MigrationId {
    type Err = InvalidMigrationId;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bytes = s.as_bytes();
        if bytes.len() != 32 || !bytes.iter().all(u8::is_ascii_hexdigit) {
            return Err(InvalidMigrationId);
        }
        let mut out = [0; 16];
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&s[2 * i..2 * i + 2], 16).map_err(|_| InvalidMigrationId)?;
        }
        Ok(Self(out))
    }
}

/// A migration id is 32 hexadecimal digits; this text is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a migration id is 32 hexadecimal digits")]
pub struct InvalidMigrationId;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_id_survives_its_text_form() {
        let id = MigrationId([0xab; 16]);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("zz".repeat(16).parse::<MigrationId>(), Err(InvalidMigrationId));
        assert_eq!("ab".parse::<MigrationId>(), Err(InvalidMigrationId));
    }

    #[test]
    fn a_roce_gid_shows_its_ipv4_address() {
        let mut raw = [0; 16];
        raw[10..].copy_from_slice(&[0xff, 0xff, 10, 10, 0, 3]);
        assert_eq!(PGid(raw).to_string(), "10.10.0.3");
    }
}
