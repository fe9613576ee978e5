//! Host-side interface names: computed from the attachment, so that every program finds them without asking.

use sha2::{Digest, Sha256};

use kun_config::Interfaces;
use kun_config::types::SlotClass;

use crate::ipam::Key;

/// IFNAMSIZ without its closing zero.
pub const MAX_NAME: usize = 15;

/// RFC 4648 §6 alphabet in lower case: every sign is allowed in an interface name.
const BASE32: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// What an interface pair carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Carries {
    /// IPv6 alone.
    V6,
    /// IPv4 alone.
    V4,
    /// Both (shared mode).
    Both,
}

/// What the pairs of a pod carry, in order: IPv6's first.
pub fn pairs(class: SlotClass, interfaces: Interfaces) -> &'static [Carries] {
    match (class, interfaces) {
        (SlotClass::V6Only, _) => &[Carries::V6],
        (SlotClass::Dual, Interfaces::Split) => &[Carries::V6, Carries::V4],
        (SlotClass::Dual, Interfaces::Shared) => &[Carries::Both],
    }
}

/// `kun6` (IPv6, or both) or `kun4` and 55 bits of the key's SHA-256: among 2,500 pods two collide once in 10^10 nodes, and
/// then the second ADD fails.
pub fn host_name(key: &Key, carries: Carries) -> String {
    let mut hash = Sha256::new();
    for part in [&key.network, &key.container_id, &key.ifname] {
        hash.update(part.as_bytes());
        // No part may contain a zero byte: parts cannot run into each other.
        hash.update([0]);
    }
    let digest = hash.finalize();
    let mut bits = u64::from_be_bytes(digest[..8].try_into().expect("a digest has 32 bytes"));
    let mut name = String::from(match carries {
        Carries::V6 | Carries::Both => "kun6",
        Carries::V4 => "kun4",
    });
    while name.len() < MAX_NAME {
        name.push(char::from(BASE32[(bits >> 59) as usize]));
        bits <<= 5;
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(container_id: &str, ifname: &str) -> Key {
        Key {
            network: "kun".into(),
            container_id: container_id.into(),
            ifname: ifname.into(),
        }
    }

    #[test]
    fn names_are_fixed_for_ever() {
        // The agent finds the interfaces of an older version's pods by these names: changing them strands live pods.
        let key = key("0123456789abcdef", "eth0");
        assert_eq!(host_name(&key, Carries::V6), "kun6yil5fpne5xa");
        assert_eq!(host_name(&key, Carries::Both), "kun6yil5fpne5xa");
        assert_eq!(host_name(&key, Carries::V4), "kun4yil5fpne5xa");
    }

    #[test]
    fn every_part_of_the_key_counts() {
        let name = |c, i| host_name(&key(c, i), Carries::V6);
        assert_ne!(name("a", "eth0"), name("b", "eth0"));
        assert_ne!(name("a", "eth0"), name("a", "eth1"));
        assert_ne!(name("ae", "th0"), name("a", "eth0"));
        assert_eq!(name("a", "eth0").len(), MAX_NAME);
    }
}
