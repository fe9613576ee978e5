//! What the node's end of a pod's pair says in its ifalias: whose it is, and of which generation of the slot. By it interfaces are known
//! as kun's, leaks are found, and a lost store is rebuilt.

use crate::ipam::Key;
use crate::plan::Mac;
use crate::spec::{MAX_IDENTIFIER, MAX_IFNAME};

/// IFALIASZ without its closing zero.
const MAX_ALIAS: usize = 255;

/// `kun:`, the last generation, `,` and an address, `:`, the key with its two `/`: no tag of what ADD takes is cut off, and one that
/// was fills all of it.
const _: () = assert!(4 + 20 + 13 + 1 + 2 * MAX_IDENTIFIER + 2 + MAX_IFNAME < MAX_ALIAS);

/// The generation in the tag of an interface whose slot is not known yet. No slot has it: the first allocation is of generation 1.
pub const UNFINISHED: u64 = 0;

/// The tag: the generation stands before the key, so that a long key cannot cut it off. With the pod's hardware address where that was
/// asked for: whoever restores a neighbour entry cannot compute it.
pub fn of(key: &Key, generation: u64, mac: Option<Mac>) -> String {
    let mac = mac.map_or_else(String::new, |mac| {
        let bytes = mac.0.map(|byte| format!("{byte:02x}"));
        format!(",{}", bytes.concat())
    });
    let mut alias = format!(
        "kun:{generation}{mac}:{}/{}/{}",
        key.network, key.container_id, key.ifname
    );
    // Every part is ASCII by the specification's rule.
    alias.truncate(MAX_ALIAS);
    alias
}

/// Generation, hardware address, and the text of the key.
fn parts(text: &str) -> Option<(u64, Option<Mac>, &str)> {
    let (head, key) = text.strip_prefix("kun:")?.split_once(':')?;
    let (generation, mac) = match head.split_once(',') {
        None => (head, None),
        Some((generation, digits)) => {
            let number = u64::from_str_radix(digits, 16).ok()?;
            let [_, _, bytes @ ..] = number.to_be_bytes();
            (generation, Some(Mac(bytes)))
        }
    };
    Some((generation.parse().ok()?, mac, key))
}

/// The generation in an ifalias, if it is this key's; [`UNFINISHED`] of one whose ADD had no slot yet.
pub fn generation_in(text: &str, key: &Key) -> Option<u64> {
    let (generation, mac, _) = parts(text)?;
    (of(key, generation, mac) == text).then_some(generation)
}

/// The key in an ifalias of ours. `None` for one that was cut off: its interface goes with its container's DEL.
pub fn key_in(text: &str) -> Option<Key> {
    let (generation, mac, key) = parts(text)?;
    let mut parts = key.split('/');
    let key = Key {
        network: parts.next()?.to_owned(),
        container_id: parts.next()?.to_owned(),
        ifname: parts.next()?.to_owned(),
    };
    (text.len() < MAX_ALIAS && of(&key, generation, mac) == text).then_some(key)
}

/// The hardware address in an ifalias, where the pod asked for one.
pub fn mac_in(text: &str) -> Option<Mac> {
    parts(text)?.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_tells_generation_and_owner_however_long() {
        let mut key = Key {
            container_id: "c1".into(),
            ifname: "eth0".into(),
            network: "kun".into(),
        };
        assert_eq!(generation_in(&of(&key, 7, None), &key), Some(7));
        assert_eq!(key_in(&of(&key, 7, None)), Some(key.clone()));
        let other = Key {
            container_id: "c2".into(),
            ..key.clone()
        };
        assert_eq!(generation_in(&of(&other, 7, None), &key), None);
        for foreign in [
            "",
            "kun:",
            "kun:x:kun/c1/eth0",
            "kun:+7:kun/c1/eth0",
            "uplink",
        ] {
            assert_eq!(generation_in(foreign, &key), None, "{foreign}");
        }
        for foreign in [
            "",
            "kun:",
            "kun:7:kun/c1",
            "kun:07:kun/c1/eth0",
            "kun:7:kun/c1/eth0/x",
        ] {
            assert_eq!(key_in(foreign), None, "{foreign}");
        }
        let mac = Mac([2, 0, 0, 0, 0xbe, 0xef]);
        let text = of(&key, 7, Some(mac));
        assert_eq!(text, "kun:7,02000000beef:kun/c1/eth0");
        assert_eq!(generation_in(&text, &key), Some(7));
        assert_eq!(key_in(&text), Some(key.clone()));
        assert_eq!(
            (mac_in(&text), mac_in(&of(&key, 7, None))),
            (Some(mac), None)
        );
        let longest = Key {
            container_id: "c".repeat(MAX_IDENTIFIER),
            ifname: "i".repeat(MAX_IFNAME),
            network: "n".repeat(MAX_IDENTIFIER),
        };
        let text = of(&longest, u64::MAX, Some(mac));
        assert_eq!(key_in(&text), Some(longest), "{text}");
        // Made by an earlier version, which took longer ones.
        key.container_id = "c".repeat(400);
        assert_eq!(of(&key, 7, None).len(), MAX_ALIAS);
        assert_eq!(generation_in(&of(&key, 7, None), &key), Some(7));
    }
}
