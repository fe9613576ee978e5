//! Slots and blocks (DESIGN: one slot = one pod = one IPv6 whose last 32 bits are its IPv4).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

/// Slots in a block: one /26 of IPv4 and one /122 of IPv6.
pub const BLOCK_SLOTS: u32 = 64;

/// A pod's address as a number: the IPv4 address itself, and the last 32 bits of the IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u32);

/// What a slot's IPv4 half is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotClass {
    /// Inside the IPv4 pool: the pod has both addresses.
    Dual,
    /// Inside the shadow range 240.0.0.0/4: an identifier only, never announced, never translated.
    V6Only,
}

impl Slot {
    /// The IPv4 address that this slot is. Only meaningful on the wire for [`SlotClass::Dual`].
    pub fn ipv4(self) -> Ipv4Addr {
        Ipv4Addr::from(self.0)
    }

    /// The pod's IPv4 address, if its slot gives it one.
    pub fn v4(self) -> Option<Ipv4Addr> {
        match self.class() {
            SlotClass::Dual => Some(self.ipv4()),
            SlotClass::V6Only => None,
        }
    }

    /// The class, which the number alone decides: 240.0.0.0/4 is the shadow range.
    pub fn class(self) -> SlotClass {
        if self.0 >> 28 == 0xf {
            SlotClass::V6Only
        } else {
            SlotClass::Dual
        }
    }

    /// The block that this slot is in.
    pub fn block(self) -> BlockId {
        BlockId(self.0 & !(BLOCK_SLOTS - 1))
    }
}

impl From<Ipv4Addr> for Slot {
    fn from(a: Ipv4Addr) -> Self {
        Slot(u32::from(a))
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ipv4().fmt(f)
    }
}

/// A block, named by its first slot (a multiple of [`BLOCK_SLOTS`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockId(u32);

impl BlockId {
    /// The block that starts at `first`; `None` unless aligned.
    pub fn new(first: Slot) -> Option<Self> {
        first
            .0
            .is_multiple_of(BLOCK_SLOTS)
            .then_some(BlockId(first.0))
    }

    /// First slot.
    pub fn first(self) -> Slot {
        Slot(self.0)
    }

    /// All 64 slots, ascending.
    pub fn slots(self) -> impl Iterator<Item = Slot> {
        (self.0..=self.0 + (BLOCK_SLOTS - 1)).map(Slot)
    }

    /// Whether the block's slots have IPv4.
    pub fn class(self) -> SlotClass {
        self.first().class()
    }

    /// The /26. Announced only for [`SlotClass::Dual`].
    pub fn v4(self) -> Ipv4Net {
        Ipv4Net::new(self.first().ipv4(), 26).expect("26 is a prefix length")
    }

    /// The /122 under the pod prefix.
    pub fn v6(self, prefix: PodPrefix) -> Ipv6Net {
        Ipv6Net::new(prefix.address(self.first()), 122).expect("122 is a prefix length")
    }
}

impl fmt::Display for BlockId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.v4().fmt(f)
    }
}

/// The /96 under which every pod's IPv6 address lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Ipv6Net", into = "Ipv6Net")]
pub struct PodPrefix(u128);

impl PodPrefix {
    /// `None` unless the prefix is a /96 without host bits.
    pub fn new(net: Ipv6Net) -> Option<Self> {
        (net.prefix_len() == 96 && net.trunc() == net).then_some(PodPrefix(u128::from(net.addr())))
    }

    /// The prefix itself.
    pub fn net(self) -> Ipv6Net {
        Ipv6Net::new(Ipv6Addr::from(self.0), 96).expect("96 is a prefix length")
    }

    /// prefix ∥ slot.
    pub fn address(self, slot: Slot) -> Ipv6Addr {
        Ipv6Addr::from(self.0 | u128::from(slot.0))
    }

    /// The slot of an address under this prefix.
    pub fn slot(self, address: Ipv6Addr) -> Option<Slot> {
        let a = u128::from(address);
        (a & !0xffff_ffff == self.0).then_some(Slot((a & 0xffff_ffff) as u32))
    }
}

impl TryFrom<Ipv6Net> for PodPrefix {
    type Error = &'static str;
    fn try_from(net: Ipv6Net) -> Result<Self, Self::Error> {
        Self::new(net).ok_or("a pod prefix is a /96 without host bits")
    }
}

impl From<PodPrefix> for Ipv6Net {
    fn from(p: PodPrefix) -> Self {
        p.net()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The lowest prefix, the highest, ULA, and one whose last bits could run into the slot's first.
    const PREFIXES: [&str; 4] = [
        "::/96",
        "ffff:ffff:ffff:ffff:ffff:ffff::/96",
        "fd00:64::/96",
        "fd00::1:0:0/96",
    ];

    /// Everything that a slot is, against the rule in words: IPv4 is the number; IPv6 is the prefix's 96 bits before it; the top
    /// four bits decide whether there is IPv4 at all; a block is 64 neighbours of one class.
    fn hold(slots: std::ops::RangeInclusive<u32>, prefix: PodPrefix) -> u32 {
        let before = u128::from(prefix.net().addr());
        assert_eq!(before & 0xffff_ffff, 0);
        let mut with_v4 = 0;
        for number in slots {
            let slot = Slot(number);
            let octets = number.to_be_bytes();
            let v6 = prefix.address(slot);
            let dual = octets[0] < 240;
            let v4 = slot.v4();
            let block = slot.block();
            // One branch a slot: there are many.
            let holds = u128::from(v6) == before | u128::from(number)
                && prefix.slot(v6) == Some(slot)
                && slot.ipv4().octets() == octets
                && Slot::from(slot.ipv4()) == slot
                && v4 == dual.then_some(slot.ipv4())
                && (slot.class() == SlotClass::Dual) == dual
                && block.first().0 == number / 64 * 64
                && block.class() == slot.class();
            assert!(holds, "{slot} {v6} {v4:?} {block}");
            with_v4 += u32::from(v4.is_some());
        }
        with_v4
    }

    /// All 2^32, on as many threads as there are processors. This package is optimised in tests for this one.
    #[test]
    fn every_slot_is_one_ipv6_and_at_most_one_ipv4_address() {
        const CHUNK: u64 = 1 << 24;
        let prefix = PodPrefix::try_from(PREFIXES[2].parse::<Ipv6Net>().unwrap()).unwrap();
        let next = std::sync::atomic::AtomicU64::new(0);
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let with_v4: u64 = std::thread::scope(|scope| {
            let work = || {
                let mut with_v4 = 0;
                loop {
                    let first = next.fetch_add(CHUNK, std::sync::atomic::Ordering::Relaxed);
                    let Ok(first) = u32::try_from(first) else {
                        return with_v4;
                    };
                    let last = first + u32::try_from(CHUNK - 1).unwrap();
                    with_v4 += u64::from(hold(first..=last, prefix));
                }
            };
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        // All but 240.0.0.0/4.
        assert_eq!(with_v4, 15 << 28);
    }

    #[test]
    fn a_prefix_keeps_out_of_its_slots() {
        for text in PREFIXES {
            let prefix = PodPrefix::try_from(text.parse::<Ipv6Net>().unwrap()).unwrap();
            // Where a bit of one could be taken for the other's, and both ends.
            for bit in 0..32 {
                let power = 1_u32 << bit;
                hold(power - 1..=power, prefix);
                hold(u32::MAX - power..=u32::MAX - (power - 1), prefix);
            }
            for bit in 32..128 {
                let outside = u128::from(prefix.net().addr()) ^ (1 << bit);
                assert_eq!(prefix.slot(Ipv6Addr::from(outside)), None);
            }
        }
    }

    #[test]
    fn a_block_is_its_slots() {
        for first in [0, 64, 0x0a40_0000, 0xefff_ffc0, 0xf000_0000, 0xffff_ffc0] {
            let block = BlockId::new(Slot(first)).unwrap();
            let slots: Vec<Slot> = block.slots().collect();
            assert_eq!(slots.len(), 64);
            assert!(slots.iter().all(|slot| slot.block() == block));
            assert!(slots.iter().all(|slot| block.v4().contains(&slot.ipv4())));
            let prefix = PodPrefix::try_from(PREFIXES[0].parse::<Ipv6Net>().unwrap()).unwrap();
            let v6 = block.v6(prefix);
            assert!(slots.iter().all(|slot| v6.contains(&prefix.address(*slot))));
            assert_eq!(BlockId::new(Slot(first + 1)), None);
        }
    }
}
