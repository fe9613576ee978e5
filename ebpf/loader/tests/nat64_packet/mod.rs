//! Packets by hand, with checksums computed from scratch (nothing here shares code with the translator), and the translator in
//! userspace with tables in ordinary memory.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use kun_ebpf_abi::nat64::bib::{Bib4, Bib6, Fragment, FragmentKey, Session, SessionKey};
use kun_ebpf_abi::nat64::{COUNTERS, Counter, Settings};
use kun_ebpf_abi::translate::{Buffer, Tables, Verdict, four_to_six, six_to_four};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP4: u8 = 1;
pub(crate) const ICMP6: u8 = 58;

/// RFC 1071 as its §4.1 writes it.
pub(crate) fn checksum(octets: &[u8]) -> u16 {
    let mut sum = 0u64;
    for pair in octets.chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

pub(crate) fn a6(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

pub(crate) fn a4(text: &str) -> Ipv4Addr {
    text.parse().unwrap()
}

/// An IPv6 header's variable parts.
#[derive(Clone)]
pub(crate) struct Six {
    pub(crate) src: Ipv6Addr,
    pub(crate) dst: Ipv6Addr,
    pub(crate) hop: u8,
    pub(crate) class: u8,
}

/// An IPv4 header's variable parts.
#[derive(Clone)]
pub(crate) struct Four {
    pub(crate) src: Ipv4Addr,
    pub(crate) dst: Ipv4Addr,
    pub(crate) ttl: u8,
    pub(crate) tos: u8,
    pub(crate) id: u16,
    /// Flags and offset.
    pub(crate) flags: u16,
    pub(crate) options: Vec<u8>,
}

impl Six {
    pub(crate) fn new(src: &str, dst: &str) -> Six {
        Six {
            src: a6(src),
            dst: a6(dst),
            hop: 64,
            class: 0,
        }
    }

    pub(crate) fn hop(mut self, hop: u8) -> Six {
        self.hop = hop;
        self
    }

    /// Header and payload; `next` is what the payload begins with.
    pub(crate) fn raw(&self, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut p = vec![0x60 | self.class >> 4, self.class << 4, 0, 0];
        p.extend((payload.len() as u16).to_be_bytes());
        p.extend([next, self.hop]);
        p.extend(self.src.octets());
        p.extend(self.dst.octets());
        p.extend(payload);
        p
    }

    /// The transport part with its checksum filled in.
    pub(crate) fn sealed(&self, next: u8, l4: &[u8]) -> Vec<u8> {
        let mut pseudo = Vec::new();
        pseudo.extend(self.src.octets());
        pseudo.extend(self.dst.octets());
        pseudo.extend((l4.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, next]);
        seal(next, &pseudo, l4)
    }

    pub(crate) fn packet(&self, next: u8, l4: &[u8]) -> Vec<u8> {
        self.raw(next, &self.sealed(next, l4))
    }
}

impl Four {
    pub(crate) fn new(src: &str, dst: &str) -> Four {
        Four {
            src: a4(src),
            dst: a4(dst),
            ttl: 64,
            tos: 0,
            id: 0,
            flags: 0x4000,
            options: Vec::new(),
        }
    }

    pub(crate) fn ttl(mut self, ttl: u8) -> Four {
        self.ttl = ttl;
        self
    }

    pub(crate) fn fragment(mut self, id: u16, flags: u16) -> Four {
        self.id = id;
        self.flags = flags;
        self
    }

    pub(crate) fn raw(&self, proto: u8, payload: &[u8]) -> Vec<u8> {
        let header = 20 + self.options.len();
        let mut p = vec![0x40 | (header / 4) as u8, self.tos];
        p.extend(((header + payload.len()) as u16).to_be_bytes());
        p.extend(self.id.to_be_bytes());
        p.extend(self.flags.to_be_bytes());
        p.extend([self.ttl, proto, 0, 0]);
        p.extend(self.src.octets());
        p.extend(self.dst.octets());
        p.extend(&self.options);
        let c = checksum(&p);
        p[10..12].copy_from_slice(&c.to_be_bytes());
        p.extend(payload);
        p
    }

    pub(crate) fn sealed(&self, proto: u8, l4: &[u8]) -> Vec<u8> {
        let mut pseudo = Vec::new();
        if proto != ICMP4 {
            pseudo.extend(self.src.octets());
            pseudo.extend(self.dst.octets());
            pseudo.extend([0, proto]);
            pseudo.extend((l4.len() as u16).to_be_bytes());
        }
        seal(proto, &pseudo, l4)
    }

    pub(crate) fn packet(&self, proto: u8, l4: &[u8]) -> Vec<u8> {
        self.raw(proto, &self.sealed(proto, l4))
    }
}

fn seal(proto: u8, pseudo: &[u8], l4: &[u8]) -> Vec<u8> {
    let at = match proto {
        TCP => 16,
        UDP => 6,
        _ => 2,
    };
    let mut l4 = l4.to_vec();
    l4[at..at + 2].fill(0);
    let whole: Vec<u8> = pseudo.iter().chain(&l4).copied().collect();
    let mut c = checksum(&whole);
    if proto == UDP && c == 0 {
        c = 0xffff;
    }
    l4[at..at + 2].copy_from_slice(&c.to_be_bytes());
    l4
}

pub(crate) fn udp(sport: u16, dport: u16, data: &[u8]) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(sport.to_be_bytes());
    p.extend(dport.to_be_bytes());
    p.extend(((8 + data.len()) as u16).to_be_bytes());
    p.extend([0, 0]);
    p.extend(data);
    p
}

pub(crate) fn tcp(sport: u16, dport: u16, flags: u8, options: &[u8], data: &[u8]) -> Vec<u8> {
    let mut p = Vec::new();
    p.extend(sport.to_be_bytes());
    p.extend(dport.to_be_bytes());
    p.extend([1, 2, 3, 4, 5, 6, 7, 8]);
    p.extend([
        (((20 + options.len()) / 4) << 4) as u8,
        flags,
        0x10,
        0,
        0,
        0,
        0,
        0,
    ]);
    p.extend(options);
    p.extend(data);
    p
}

/// Type, code, second word, the rest.
pub(crate) fn icmp(ty: u8, code: u8, word: u32, rest: &[u8]) -> Vec<u8> {
    let mut p = vec![ty, code, 0, 0];
    p.extend(word.to_be_bytes());
    p.extend(rest);
    p
}

pub(crate) fn echo(ty: u8, id: u16, seq: u16, data: &[u8]) -> Vec<u8> {
    icmp(ty, 0, u32::from(id) << 16 | u32::from(seq), data)
}

/// A fragment header.
pub(crate) fn fragment6(next: u8, offset: u16, more: bool, id: u32, part: &[u8]) -> Vec<u8> {
    let mut p = vec![next, 0];
    p.extend((offset | u16::from(more)).to_be_bytes());
    p.extend(id.to_be_bytes());
    p.extend(part);
    p
}

/// Tables in memory; the clock and the dice are set by hand.
#[derive(Default)]
pub(crate) struct Memory {
    pub(crate) now: u64,
    pub(crate) dice: u32,
    pub(crate) counters: [u64; COUNTERS as usize],
    pub(crate) bib6: HashMap<Bib6, Bib4>,
    pub(crate) bib4: HashMap<Bib4, Bib6>,
    pub(crate) sessions: HashMap<SessionKey, Session>,
    pub(crate) fragments: HashMap<FragmentKey, Fragment>,
    /// How many sessions fit; 0: any number.
    pub(crate) max_sessions: usize,
}

impl Tables for Memory {
    fn now(&self) -> u64 {
        self.now
    }
    fn random(&mut self) -> u32 {
        self.dice = self
            .dice
            .wrapping_mul(1_664_525)
            .wrapping_add(1_013_904_223);
        self.dice
    }
    fn count(&mut self, counter: Counter) {
        self.counters[counter as usize] += 1;
    }
    fn bib6(&self, key: &Bib6) -> Option<Bib4> {
        self.bib6.get(key).copied()
    }
    fn bib4(&self, key: &Bib4) -> Option<Bib6> {
        self.bib4.get(key).copied()
    }
    fn bib6_add(&mut self, key: &Bib6, value: &Bib4) -> bool {
        self.bib6.insert(*key, *value).is_none()
    }
    fn bib4_add(&mut self, key: &Bib4, value: &Bib6) -> bool {
        if self.bib4.contains_key(key) {
            return false;
        }
        self.bib4.insert(*key, *value);
        true
    }
    fn bib4_remove(&mut self, key: &Bib4) {
        self.bib4.remove(key);
    }
    fn session(&self, key: &SessionKey) -> Option<Session> {
        self.sessions.get(key).copied()
    }
    fn session_put(&mut self, key: &SessionKey, value: &Session) -> bool {
        let full = self.max_sessions != 0 && self.sessions.len() >= self.max_sessions;
        if full && !self.sessions.contains_key(key) {
            return false;
        }
        self.sessions.insert(*key, *value);
        true
    }
    fn fragment(&self, key: &FragmentKey) -> Option<Fragment> {
        self.fragments.get(key).copied()
    }
    fn fragment_put(&mut self, key: &FragmentKey, value: &Fragment) {
        self.fragments.insert(*key, *value);
    }
}

/// Runs the translator on one packet.
pub(crate) fn translate(s: &Settings, t: &mut Memory, packet: &[u8]) -> (Verdict, Vec<u8>) {
    const ROOM: usize = 128;
    let mut bytes = vec![0xa5; ROOM];
    bytes.extend(packet);
    let end = bytes.len();
    let mut buffer = Buffer::new(&mut bytes, ROOM, end);
    let verdict = match packet.first().map(|o| o >> 4) {
        Some(6) => six_to_four(&mut buffer, t, s),
        Some(4) => four_to_six(&mut buffer, t, s),
        _ => Verdict::Pass,
    };
    (verdict, buffer.packet().to_vec())
}

/// Small IPv4 packets get a random identification: it is taken out, and the header checksum with it, after that is found right.
pub(crate) fn without_id(mut packet: Vec<u8>) -> Vec<u8> {
    let small = packet.len() >= 20 && packet[0] == 0x45 && packet[6] & 0x7f == 0 && packet[7] == 0;
    if small && packet[6] & 0x40 == 0 {
        assert_eq!(checksum(&packet[..20]), 0, "header checksum");
        packet[4..6].fill(0);
        packet[10..12].fill(0);
    }
    packet
}
