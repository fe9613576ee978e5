//! What the kernel programs and the agent share: map keys and values, drop reasons, and the pure packet cores.
//!
//! `no_std`, depends on nothing, allocates nothing. Numbers that travel on the wire (addresses, ports) are kept in network
//! order as byte arrays; every other number is native. Layouts are asserted at compile time; changing one changes
//! [`ABI_VERSION`], which is part of the pin path.

#![no_std]
#![forbid(unsafe_code)]

pub mod nat64;
pub mod reason;
pub mod service;
pub mod translate;

/// Version of all map layouts together: maps are pinned under `v{ABI_VERSION}`.
pub const ABI_VERSION: u32 = 1;

/// An IPv6 address, or an IPv4 one as ::ffff:a.b.c.d (RFC 4291 §2.5.5.2), in network order.
#[repr(C, align(4))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Addr(pub [u8; 16]);

/// A port in network order.
#[repr(C, align(2))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Port(pub [u8; 2]);

impl Port {
    /// From a number.
    pub const fn new(port: u16) -> Self {
        Port(port.to_be_bytes())
    }

    /// As a number.
    pub const fn get(self) -> u16 {
        u16::from_be_bytes(self.0)
    }
}

impl Addr {
    /// From an IPv4 address in network order.
    pub const fn v4(a: [u8; 4]) -> Self {
        Addr([
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3],
        ])
    }

    /// The IPv4 address, if this is a mapped one.
    pub const fn as_v4(&self) -> Option<[u8; 4]> {
        match self.0 {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }
}
