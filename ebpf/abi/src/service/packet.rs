//! A packet as the service hooks see it: its tuple, and the tuple's replacement with every checksum kept right.
//!
//! Ethernet, IPv4 (options allowed) or IPv6 without extension headers, TCP or UDP. Everything else is none of ours and is
//! [`Parsed::Other`]; what claims to be ours and is cut short is [`Parsed::Malformed`].
//! RFC 791, 8200, 768, 9293; checksums by RFC 1624.

use crate::checksum::{difference, finish, sum};
use crate::service::{FlowKey, flow};
use crate::{Addr, Port};

/// IP protocol numbers.
pub const TCP: u8 = 6;
/// See [`TCP`].
pub const UDP: u8 = 17;

/// Bytes before the IP header.
pub const ETHERNET: usize = 14;

/// Flags of a TCP header's byte 13.
pub mod tcp {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// Acknowledgement.
    pub const ACK: u8 = 0x10;
}

/// Access to a packet that starts at its Ethernet header. Words and halves are as they lie in memory.
pub trait Packet {
    /// `N` words from octet `at`, or nothing if the packet ends before.
    fn read<const N: usize>(&self, at: usize) -> Option<[u32; N]>;
    /// The half word at octet `at`.
    fn read_half(&self, at: usize) -> Option<u16>;
    /// Overwrites `N` words from octet `at`.
    fn write<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()>;
    /// Applies a difference to the IPv4 header checksum at `at`.
    fn fix_l3(&mut self, at: usize, diff: u32) -> Option<()>;
    /// Applies a difference to the TCP or UDP checksum at `at`.
    fn fix_l4(&mut self, at: usize, diff: u32, fix: L4Fix) -> Option<()>;
}

/// What a difference to a transport checksum stems from; a checksum that hardware will complete covers only the first kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct L4Fix {
    /// Addresses, which are in the pseudo-header alone.
    pub pseudo: bool,
    /// IPv6: there is no header checksum that offsets the change of the addresses.
    pub v6: bool,
    /// UDP: zero means "none" (IPv4) and is never a result.
    pub udp: bool,
}

/// What the hooks need to know of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers {
    /// Its tuple; the direction is [`flow::FORWARD`].
    pub tuple: FlowKey,
    /// Where the TCP or UDP header starts.
    pub l4: usize,
    /// True for IPv6.
    pub v6: bool,
    /// Flags of a TCP header, 0 for UDP.
    pub flags: u8,
    /// The first fragment of several.
    pub fragment: bool,
}

/// What a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// TCP or UDP.
    Ours(Headers),
    /// Something else.
    Other,
    /// Cut short or contradictory.
    Malformed,
}

/// Looks at the headers.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P) -> Parsed {
    let Some(ethertype) = packet.read_half(12) else {
        return Parsed::Malformed;
    };
    match u16::from_be(ethertype) {
        0x0800 => parse_v4(packet),
        0x86dd => parse_v6(packet),
        _ => Parsed::Other,
    }
}

#[inline(always)]
fn parse_v4<P: Packet>(packet: &P) -> Parsed {
    let Some([first, second, third, src, dst]) = packet.read::<5>(ETHERNET) else {
        return Parsed::Malformed;
    };
    let version = first.to_ne_bytes()[0];
    let header = ((version & 0x0f) as usize) * 4;
    if version >> 4 != 4 || header < 20 {
        return Parsed::Malformed;
    }
    let proto = third.to_ne_bytes()[1];
    if proto != TCP && proto != UDP {
        return Parsed::Other;
    }
    let fragment = u32::from_be(second) as u16;
    if fragment & 0x1fff != 0 {
        return Parsed::Other;
    }
    let (src, dst) = (Addr::v4_word(src), Addr::v4_word(dst));
    transport(
        packet,
        ETHERNET + header,
        src,
        dst,
        proto,
        false,
        fragment & 0x2000 != 0,
    )
}

#[inline(always)]
fn parse_v6<P: Packet>(packet: &P) -> Parsed {
    let Some(ip) = packet.read::<10>(ETHERNET) else {
        return Parsed::Malformed;
    };
    if ip[0].to_ne_bytes()[0] >> 4 != 6 {
        return Parsed::Malformed;
    }
    let proto = ip[1].to_ne_bytes()[2];
    if proto != TCP && proto != UDP {
        return Parsed::Other;
    }
    let src = Addr([ip[2], ip[3], ip[4], ip[5]]);
    let dst = Addr([ip[6], ip[7], ip[8], ip[9]]);
    // A mapped address never travels on the wire (RFC 4291 §2.5.5.2); it would be taken for an IPv4 one.
    if src.is_v4() || dst.is_v4() {
        return Parsed::Malformed;
    }
    transport(packet, ETHERNET + 40, src, dst, proto, true, false)
}

#[inline(always)]
fn transport<P: Packet>(
    packet: &P,
    l4: usize,
    src: Addr,
    dst: Addr,
    proto: u8,
    v6: bool,
    fragment: bool,
) -> Parsed {
    let mut flags = 0;
    let ports = if proto == TCP {
        let Some(tcp) = packet.read::<5>(l4) else {
            return Parsed::Malformed;
        };
        flags = tcp[3].to_ne_bytes()[1];
        tcp[0]
    } else {
        let Some(udp) = packet.read::<2>(l4) else {
            return Parsed::Malformed;
        };
        udp[0]
    };
    let (sport, dport) = halves(ports);
    Parsed::Ours(Headers {
        tuple: FlowKey {
            src,
            dst,
            sport,
            dport,
            proto,
            dir: flow::FORWARD,
            pad: 0,
        },
        l4,
        v6,
        flags,
        fragment,
    })
}

/// Source and destination port of a word of the packet.
#[inline(always)]
fn halves(word: u32) -> (Port, Port) {
    let b = word.to_ne_bytes();
    (
        Port(u16::from_ne_bytes([b[0], b[1]])),
        Port(u16::from_ne_bytes([b[2], b[3]])),
    )
}

/// The word of a packet that holds these ports.
#[inline(always)]
fn word(source: Port, destination: Port) -> u32 {
    let (s, d) = (source.0.to_ne_bytes(), destination.0.to_ne_bytes());
    u32::from_ne_bytes([s[0], s[1], d[0], d[1]])
}

/// Replaces addresses and ports by those of a packet that is answered by `answer` (so its destination is the new source), and
/// mends the checksums. `None`: the families differ, or a write failed; the packet may then be half rewritten and must be
/// dropped.
///
/// The tuple of the answer and not the packet's own, because a caller has that one at hand as a map's key, and the kernel's
/// stack has no room for both.
#[inline(always)]
pub fn rewrite<P: Packet>(packet: &mut P, headers: &Headers, answer: &FlowKey) -> Option<()> {
    let old = &headers.tuple;
    let (src, dst) = (&answer.dst, &answer.src);
    if src.is_v4() == headers.v6 || dst.is_v4() == headers.v6 {
        return None;
    }
    // Of mapped addresses the first three words are equal, so this is the difference of the IPv4 addresses too.
    let addresses = difference(sum(&old.src.0) + sum(&old.dst.0), sum(&src.0) + sum(&dst.0));
    let before = word(old.sport, old.dport);
    let after = word(answer.dport, answer.sport);
    if headers.v6 {
        packet.write(ETHERNET + 8, &src.0)?;
        packet.write(ETHERNET + 24, &dst.0)?;
    } else {
        packet.write(ETHERNET + 12, &[src.0[3], dst.0[3]])?;
        packet.fix_l3(ETHERNET + 10, addresses)?;
    }
    let udp = old.proto == UDP;
    let field = headers.l4 + if udp { 6 } else { 16 };
    let fix = L4Fix {
        pseudo: true,
        v6: headers.v6,
        udp,
    };
    packet.fix_l4(field, addresses, fix)?;
    if before != after {
        let diff = difference(u64::from(before), u64::from(after));
        packet.fix_l4(
            field,
            diff,
            L4Fix {
                pseudo: false,
                ..fix
            },
        )?;
        packet.write(headers.l4, &[after])?;
    }
    Some(())
}

/// IPv4 and ICMP headers of "port unreachable" (RFC 792: type 3, code 3) about a packet that starts with `inner`: its IPv4
/// header without options and eight octets. The answer comes from the address that was asked for.
#[inline(always)]
pub fn unreachable_v4(inner: &[u32; 7]) -> [u32; 7] {
    let octets = u32::from_ne_bytes;
    // Version 4, five words of header, 56 octets in all; TTL 64, ICMP.
    let mut out = [
        octets([0x45, 0, 0, 56]),
        0,
        octets([64, 1, 0, 0]),
        inner[4],
        inner[3],
        octets([3, 3, 0, 0]),
        0,
    ];
    let header = sum(&[out[0], out[2], out[3], out[4]]);
    let check = finish(header).to_ne_bytes();
    out[2] = octets([64, 1, check[0], check[1]]);
    let check = finish(u64::from(out[5]) + sum(inner)).to_ne_bytes();
    out[5] = octets([3, 3, check[0], check[1]]);
    out
}

/// IPv6 and ICMPv6 headers of "port unreachable" (RFC 4443 §3.1: type 1, code 4) about a packet that starts with `inner`: its
/// IPv6 header and eight octets.
#[inline(always)]
pub fn unreachable_v6(inner: &[u32; 12]) -> [u32; 12] {
    let octets = u32::from_ne_bytes;
    // The addresses are the inner packet's, exchanged; the pseudo-header adds length 56 and next header 58 (RFC 8200 §8.1).
    let addresses = sum(&[
        inner[2], inner[3], inner[4], inner[5], inner[6], inner[7], inner[8], inner[9],
    ]);
    let pseudo = u64::from(octets([0, 0, 0, 56])) + u64::from(octets([0, 0, 0, 58]));
    let check =
        finish(addresses + pseudo + u64::from(octets([1, 4, 0, 0])) + sum(inner)).to_ne_bytes();
    [
        octets([0x60, 0, 0, 0]),
        // 56 octets of payload, ICMPv6, hop limit 64.
        octets([0, 56, 58, 64]),
        inner[6],
        inner[7],
        inner[8],
        inner[9],
        inner[2],
        inner[3],
        inner[4],
        inner[5],
        octets([1, 4, check[0], check[1]]),
        0,
    ]
}
