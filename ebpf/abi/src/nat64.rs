//! NAT64 mapping: IPv4-embedded IPv6 addresses (RFC 6052) and deterministic port blocks, computed and not remembered.
//!
//! Owns the arithmetic and the layout of the `nat64_settings` map. The n-th client slot owns one block of 2^k external ports
//! for ever: external address = pool\[n / B\], block = first + n mod B, and the port inside the block is the pod's source port
//! modulo 2^k. Both directions are computed, so any gateway translates any packet of such a flow (the MAP-T idea, RFC 7599;
//! one line of the block table is the abuse log, RFC 7422). What does not fit is an *exception* and takes a stateful entry
//! ([`bib`]) on the pool's last address. Refuses external ports below 1024, overlapping ranges and prefixes other than RFC 6052's.

pub mod bib;
mod rfc6052;

pub use rfc6052::{PREFIX_LENGTHS, WELL_KNOWN, embed, extract, is_global, is_well_known};

/// Ranges of clients, and of the pool. Limit: each is walked per packet.
pub const MAX_RANGES: usize = 8;
/// Bits of a port that a stateful slice covers: slice i owns ports \[i·4096, (i+1)·4096).
pub const SLICE_BITS: u32 = 12;
/// Lowest external port ever used (RFC 6056 §3.2 leaves the well-known ones alone).
pub const FIRST_PORT: u16 = 1024;
/// Smallest and largest k.
pub const BLOCK_BITS: core::ops::RangeInclusive<u8> = 6..=12;

/// A run of addresses as numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First address.
    pub first: u32,
    /// How many; 0 = unused entry.
    pub count: u32,
    /// Addresses in the ranges before this one.
    pub before: u32,
}

/// Disjoint ranges in order; the index of an address is its place in their concatenation.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Ranges {
    /// Used entries come first.
    pub of: [Range; MAX_RANGES],
    /// Used entries.
    pub len: u32,
    /// Addresses in all of them.
    pub total: u32,
}

impl Ranges {
    /// From (first, count) pairs.
    pub fn new(pairs: impl IntoIterator<Item = (u32, u32)>) -> Result<Self, MappingError> {
        let mut out = Ranges::default();
        for (first, count) in pairs {
            let at = out.len as usize;
            if at == MAX_RANGES {
                return Err(MappingError::TooManyRanges);
            }
            if count == 0 || first.checked_add(count - 1).is_none() {
                return Err(MappingError::BadRange { first, count });
            }
            let last = first + (count - 1);
            for r in &out.of[..at] {
                if r.first <= last && first <= r.first + (r.count - 1) {
                    return Err(MappingError::Overlap {
                        one: r.first,
                        other: first,
                    });
                }
            }
            out.of[at] = Range {
                first,
                count,
                before: out.total,
            };
            out.total = out
                .total
                .checked_add(count)
                .ok_or(MappingError::BadRange { first, count })?;
            out.len += 1;
        }
        Ok(out)
    }

    /// Place of `address`.
    #[inline(always)]
    pub fn index(&self, address: u32) -> Option<u32> {
        for (i, r) in self.of.iter().enumerate() {
            if i as u32 >= self.len {
                break;
            }
            let d = address.wrapping_sub(r.first);
            if d < r.count {
                return Some(r.before.wrapping_add(d));
            }
        }
        None
    }

    /// The address at `index`.
    #[inline(always)]
    pub fn nth(&self, index: u32) -> Option<u32> {
        for (i, r) in self.of.iter().enumerate() {
            if i as u32 >= self.len {
                break;
            }
            let d = index.wrapping_sub(r.before);
            if d < r.count {
                return Some(r.first.wrapping_add(d));
            }
        }
        None
    }
}

/// Why a [`Mapping`] cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingError {
    /// More than [`MAX_RANGES`].
    TooManyRanges,
    /// Empty, or beyond 255.255.255.255.
    BadRange {
        /// First address.
        first: u32,
        /// Addresses.
        count: u32,
    },
    /// Two ranges share an address.
    Overlap {
        /// First address of one.
        one: u32,
        /// First address of the other.
        other: u32,
    },
    /// The pool is empty.
    NoPool,
    /// k outside [`BLOCK_BITS`].
    BlockBits(u8),
    /// Not a multiple of 2^k, or the range passes 65535.
    LocalPortBase(u16),
    /// Slices are 0..16.
    Slice(u8),
}

impl core::fmt::Display for MappingError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        use core::net::Ipv4Addr as A;
        match *self {
            MappingError::TooManyRanges => {
                write!(
                    f,
                    "more than {MAX_RANGES} ranges; merge neighbouring networks"
                )
            }
            MappingError::BadRange { first, count } => {
                write!(f, "{count} addresses from {} are no range", A::from(first))
            }
            MappingError::Overlap { one, other } => write!(
                f,
                "the ranges at {} and {} overlap",
                A::from(one),
                A::from(other)
            ),
            MappingError::NoPool => write!(f, "the pool is empty; it needs at least one address"),
            MappingError::BlockBits(k) => {
                write!(f, "port blocks of 2^{k} ports; 2^6 to 2^12 are possible")
            }
            MappingError::LocalPortBase(b) => write!(
                f,
                "local port base {b} must be a multiple of the block size, at least {FIRST_PORT}, with the block inside 65535"
            ),
            MappingError::Slice(s) => write!(f, "slice {s}; 0 to 15 are possible"),
        }
    }
}

impl core::error::Error for MappingError {}

/// What [`Mapping::new`] takes.
#[derive(Debug, Clone, Copy)]
pub struct MappingParams {
    /// Slots that have blocks.
    pub clients: Ranges,
    /// External addresses; the last one is for exceptions.
    pub pool: Ranges,
    /// k.
    pub block_bits: u8,
    /// First local port of every pod.
    pub local_port_base: u16,
    /// This gateway's slice of the exceptions' address.
    pub slice: u8,
}

/// An IPv4 transport address as numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct External {
    /// Address.
    pub addr: u32,
    /// Port, or ICMP identifier.
    pub port: u16,
}

/// The bijection between (slot, local port) and (external address, external port). Part of [`Settings`].
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mapping {
    /// Slots that have blocks.
    pub clients: Ranges,
    /// External addresses.
    pub pool: Ranges,
    /// k.
    pub bits: u32,
    /// First local port.
    pub local_port_base: u32,
    /// First block whose ports are all ≥ 1024.
    pub first_block: u32,
    /// B: blocks per external address.
    pub blocks: u32,
    /// External addresses that hold blocks: all but the last.
    pub block_addresses: u32,
    /// The pool's last address.
    pub exception_addr: u32,
    /// First port of this gateway's slice.
    pub slice_first: u32,
    /// Ports in it.
    pub slice_count: u32,
}

impl Mapping {
    /// Checks and derives.
    pub fn new(p: &MappingParams) -> Result<Self, MappingError> {
        if !BLOCK_BITS.contains(&p.block_bits) {
            return Err(MappingError::BlockBits(p.block_bits));
        }
        let size = 1u32 << p.block_bits;
        let base = u32::from(p.local_port_base);
        if base % size != 0 || base + size > 65536 || base < u32::from(FIRST_PORT) {
            return Err(MappingError::LocalPortBase(p.local_port_base));
        }
        if p.slice > 15 {
            return Err(MappingError::Slice(p.slice));
        }
        let exceptions = p
            .pool
            .total
            .checked_sub(1)
            .and_then(|last| p.pool.nth(last))
            .ok_or(MappingError::NoPool)?;
        let first_block = u32::from(FIRST_PORT).div_ceil(size);
        let slice_start = u32::from(p.slice) << SLICE_BITS;
        let slice_first = slice_start.max(u32::from(FIRST_PORT));
        Ok(Mapping {
            clients: p.clients,
            pool: p.pool,
            bits: u32::from(p.block_bits),
            local_port_base: base,
            first_block,
            blocks: (1 << (16 - p.block_bits)) - first_block,
            block_addresses: p.pool.total - 1,
            exception_addr: exceptions,
            slice_first,
            slice_count: slice_start + (1 << SLICE_BITS) - slice_first,
        })
    }

    /// Blocks that the pool holds. Clients beyond it have none and are served as exceptions.
    pub fn capacity(&self) -> u64 {
        u64::from(self.block_addresses) * u64::from(self.blocks)
    }

    /// Where (slot, local port) appears outside; `None`: an exception.
    #[inline(always)]
    pub fn forward(&self, slot: u32, port: u16) -> Option<External> {
        let offset = u32::from(port).wrapping_sub(self.local_port_base);
        if offset >> self.bits != 0 {
            return None;
        }
        let (addr, first) = self.block(slot)?;
        Some(External {
            addr,
            port: (first | offset) as u16,
        })
    }

    /// External address and first port of a slot's block.
    #[inline(always)]
    pub fn block(&self, slot: u32) -> Option<(u32, u32)> {
        let n = self.clients.index(slot)?;
        let a = n.checked_div(self.blocks)?;
        if a >= self.block_addresses {
            return None;
        }
        let block = self.first_block + (n - a * self.blocks);
        Some((self.pool.nth(a)?, block << self.bits))
    }

    /// Which (slot, local port) appears as `addr`:`port`; `None`: not a port of any block.
    #[inline(always)]
    pub fn reverse(&self, addr: u32, port: u16) -> Option<(u32, u16)> {
        let a = self.pool.index(addr)?;
        if a >= self.block_addresses {
            return None;
        }
        let b = (u32::from(port) >> self.bits).wrapping_sub(self.first_block);
        if b >= self.blocks {
            return None;
        }
        let n = a.wrapping_mul(self.blocks).wrapping_add(b);
        let slot = self.clients.nth(n)?;
        let offset = u32::from(port) & ((1 << self.bits) - 1);
        Some((slot, (self.local_port_base | offset) as u16))
    }
}

/// An entry of `nat64_settings`. One gateway has one Pref64: the way back into IPv6 is computed from the packet alone.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Settings {
    /// The mapping.
    pub mapping: Mapping,
    /// First 96 bits of every pod's address, network order.
    pub pod_prefix: [u32; 3],
    /// The /96 under which IPv4 is reached, network order.
    pub pref64: [u32; 3],
    /// 1: `pref64` is 64:ff9b::/96, which must not carry non-global IPv4 (RFC 6052 §3.1).
    pub well_known: u32,
    /// Interface that packets leave by.
    pub uplink: u32,
    /// Its MTU.
    pub mtu: u32,
}

/// Indices of the steps' programs in `nat64_steps`, in the order of [`NAMES`](step::NAMES).
pub mod step {
    /// No step.
    pub const NONE: u32 = u32::MAX;
    /// From IPv6: is it ours, and what is it.
    pub const SIX_PARSE: u32 = 0;
    /// From IPv6: the external address of a port block.
    pub const SIX_MAP: u32 = 1;
    /// From IPv6: that of an exception.
    pub const SIX_EXCEPTION: u32 = 2;
    /// From IPv6: the rewrite.
    pub const SIX_WRITE: u32 = 3;
    /// From IPv6: an ICMP error's checksum.
    pub const SIX_VERIFY: u32 = 4;
    /// From IPv6: an ICMP error's rewrite.
    pub const SIX_ERROR: u32 = 5;
    /// From IPv4: likewise.
    pub const FOUR_PARSE: u32 = 6;
    /// From IPv4: likewise.
    pub const FOUR_MAP: u32 = 7;
    /// From IPv4: likewise.
    pub const FOUR_EXCEPTION: u32 = 8;
    /// From IPv4: likewise.
    pub const FOUR_WRITE: u32 = 9;
    /// From IPv4: likewise.
    pub const FOUR_VERIFY: u32 = 10;
    /// From IPv4: likewise.
    pub const FOUR_ERROR: u32 = 11;
    /// The answer to what does not fit.
    pub const TOO_BIG: u32 = 12;
    /// The new ICMP checksum.
    pub const SEAL: u32 = 13;
    /// How many there are.
    pub const COUNT: u32 = 14;
    /// The programs' names.
    pub const NAMES: [&str; COUNT as usize] = [
        "nat64_six_parse",
        "nat64_six_map",
        "nat64_six_exc",
        "nat64_six_write",
        "nat64_six_check",
        "nat64_six_error",
        "nat64_four_parse",
        "nat64_four_map",
        "nat64_four_exc",
        "nat64_four_write",
        "nat64_four_check",
        "nat64_four_error",
        "nat64_too_big",
        "nat64_seal",
    ];
}

/// Index into the `nat64_counters` per-CPU array.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Counter {
    /// Packets translated from IPv6 to IPv4 (a super-packet counts once).
    SixToFour = 0,
    /// Packets translated from IPv4 to IPv6.
    FourToSix = 1,
    /// Packets from pod to pod through the pool (RFC 6146 §3.8).
    Hairpin = 2,
    /// Packets, of the above, that used a stateful entry.
    Exception = 3,
    /// BIB entries made.
    BibCreated = 4,
    /// ICMP errors translated.
    IcmpError = 5,
    /// Fragments translated.
    Fragment = 6,
    /// ICMPv4 "fragmentation needed" that the gateway sent itself.
    TooBig = 7,
    /// Packets left to the stack, which answers with Time Exceeded.
    ToStack = 8,
}

/// How many counters there are.
pub const COUNTERS: u32 = 9;

const _: () = {
    assert!(size_of::<Range>() == 12);
    assert!(size_of::<Ranges>() == 104);
    assert!(size_of::<Mapping>() == 240);
    assert!(size_of::<Settings>() == 276);
};

#[cfg(test)]
mod tests;
