//! What the kernel programs and the agent share: map keys and values, drop reasons, and the pure packet cores.
//!
//! `no_std`, depends on nothing, allocates nothing. Numbers that travel on the wire (addresses, ports) are kept in network
//! order as byte arrays; every other number is native. Layouts are asserted at compile time; changing one changes
//! [`ABI_VERSION`], which is part of the pin path.

#![no_std]
#![forbid(unsafe_code)]

pub mod bandwidth;
pub mod checksum;
pub mod nat64;
pub mod reason;
pub mod service;
pub mod translate;

/// Version of all map layouts together: maps are pinned under `v{ABI_VERSION}`.
pub const ABI_VERSION: u32 = 1;

/// An IPv6 address, or an IPv4 one as ::ffff:a.b.c.d (RFC 4291 §2.5.5.2): the sixteen octets in network order, held as four
/// words as they lie in memory, because the kernel's programs move words and not octets.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Addr(pub [u32; 4]);

/// A port in network order, as it lies in memory.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Port(pub u16);

impl Port {
    /// From a number.
    pub const fn new(port: u16) -> Self {
        Port(port.to_be())
    }

    /// As a number.
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl Addr {
    /// From the octets of an IPv6 address.
    pub const fn v6(a: [u8; 16]) -> Self {
        Addr([
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ])
    }

    /// From an IPv4 address in network order.
    pub const fn v4(a: [u8; 4]) -> Self {
        Self::v4_word(u32::from_ne_bytes(a))
    }

    /// From an IPv4 address as it lies in memory.
    #[inline(always)]
    pub const fn v4_word(word: u32) -> Self {
        Addr([0, 0, MAPPED, word])
    }

    /// The sixteen octets in network order.
    pub const fn octets(&self) -> [u8; 16] {
        let [a, b, c, d] = self.0;
        let (a, b, c, d) = (
            a.to_ne_bytes(),
            b.to_ne_bytes(),
            c.to_ne_bytes(),
            d.to_ne_bytes(),
        );
        [
            a[0], a[1], a[2], a[3], b[0], b[1], b[2], b[3], c[0], c[1], c[2], c[3], d[0], d[1],
            d[2], d[3],
        ]
    }

    /// Equality word by word: `==` on an array may be a call in the kernel's programs.
    #[inline(always)]
    pub const fn same(&self, other: &Addr) -> bool {
        let (a, b) = (&self.0, &other.0);
        a[0] == b[0] && a[1] == b[1] && a[2] == b[2] && a[3] == b[3]
    }

    /// True for a mapped IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The IPv4 address, if this is a mapped one.
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        if self.is_v4() {
            Some(self.0[3].to_ne_bytes())
        } else {
            None
        }
    }
}

/// The third word of a mapped address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

impl Ord for Addr {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.octets().cmp(&other.octets())
    }
}

impl PartialOrd for Addr {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Port {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.get().cmp(&other.get())
    }
}

impl PartialOrd for Port {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
