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
