//! Whole messages taken apart and put together, for the slow lane: names in record data are decompressed on the way in
//! (RFC 1035 §3.3, RFC 3597 §4), owner names compressed on the way out.

use crate::wire::{HEADER, IN, flag, read_name, rtype, u16_at, u32_at};

/// One resource record; data uncompressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Owner, wire form, case as received.
    pub owner: Vec<u8>,
    /// Type.
    pub rtype: u16,
    /// Class.
    pub class: u16,
    /// TTL in seconds; the top bit, which RFC 2181 §8 forbids, is read as zero seconds.
    pub ttl: u32,
    /// Data.
    pub data: Vec<u8>,
}

impl Record {
    /// A record of class IN.
    pub fn new(owner: &[u8], rtype: u16, ttl: u32, data: Vec<u8>) -> Self {
        Self {
            owner: owner.to_vec(),
            rtype,
            class: IN,
            ttl,
            data,
        }
    }
}

/// A response. OPT is taken out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Header flags with the lower four bits of the response code.
    pub flags: u16,
    /// Question name, lower case.
    pub name: Vec<u8>,
    /// Question type.
    pub qtype: u16,
    /// Answer section.
    pub answers: Vec<Record>,
    /// Authority section.
    pub authority: Vec<Record>,
    /// Additional section.
    pub additional: Vec<Record>,
}

/// Why octets are no usable response.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than a header, or a record or name runs past the end.
    #[error("malformed message")]
    Octets,
    /// The question is not the one that was asked (RFC 5452 §9.1).
    #[error("answer to another question")]
    OtherQuestion,
}

impl Message {
    /// An empty response to `name`, `qtype`.
    pub fn empty(name: &[u8], qtype: u16, rcode: u8) -> Self {
        Self {
            flags: flag::QR | flag::RA | u16::from(rcode),
            name: name.to_ascii_lowercase(),
            qtype,
            answers: Vec::new(),
            authority: Vec::new(),
            additional: Vec::new(),
        }
    }

    /// Response code, lower four bits.
    pub fn rcode(&self) -> u8 {
        (self.flags & flag::RCODE) as u8
    }

    /// Takes a response apart. A truncated one (TC) may end anywhere behind its question.
    pub fn parse(m: &[u8]) -> Result<Self, Malformed> {
        let bad = Malformed::Octets;
        if m.len() < HEADER {
            return Err(bad);
        }
        let flags = u16_at(m, 2).ok_or(bad)?;
        if flags & flag::QR == 0 || u16_at(m, 4) != Some(1) {
            return Err(Malformed::OtherQuestion);
        }
        let mut name = Vec::new();
        let mut at = read_name(m, HEADER, &mut name).ok_or(bad)?;
        name.make_ascii_lowercase();
        let qtype = u16_at(m, at).ok_or(bad)?;
        if u16_at(m, at + 2) != Some(IN) {
            return Err(Malformed::OtherQuestion);
        }
        at += 4;
        let mut message = Message {
            flags,
            name,
            qtype,
            answers: Vec::new(),
            authority: Vec::new(),
            additional: Vec::new(),
        };
        if flags & flag::TC != 0 {
            return Ok(message);
        }
        for section in 0..3 {
            for _ in 0..u16_at(m, 6 + 2 * section).ok_or(bad)? {
                let record = read_record(m, &mut at).ok_or(bad)?;
                match (section, record.rtype) {
                    (2, rtype::OPT) => {}
                    (0, _) => message.answers.push(record),
                    (1, _) => message.authority.push(record),
                    _ => message.additional.push(record),
                }
            }
        }
        Ok(message)
    }
}

fn read_record(m: &[u8], at: &mut usize) -> Option<Record> {
    let mut owner = Vec::new();
    let after = read_name(m, *at, &mut owner)?;
    let (rtype, class, ttl) = (
        u16_at(m, after)?,
        u16_at(m, after + 2)?,
        u32_at(m, after + 4)?,
    );
    let start = after + 10;
    let end = start + usize::from(u16_at(m, after + 8)?);
    m.get(start..end)?;
    *at = end;
    Some(Record {
        owner,
        rtype,
        class,
        ttl: if ttl >> 31 == 1 { 0 } else { ttl },
        data: read_data(m, rtype, start, end)?,
    })
}

/// Octets before the names in the data of types whose names may be compressed, and how many names.
fn names_in(t: u16) -> Option<(usize, usize)> {
    Some(match t {
        rtype::NS | rtype::CNAME | rtype::PTR | rtype::DNAME | 3 | 4 | 7 | 8 | 9 => (0, 1),
        rtype::SOA | 14 | 17 => (0, 2),
        rtype::MX | 18 | 21 | 36 => (2, 1),
        rtype::SRV => (6, 1),
        26 => (2, 2),
        _ => return None,
    })
}

fn read_data(m: &[u8], t: u16, start: usize, end: usize) -> Option<Vec<u8>> {
    let Some((before, names)) = names_in(t) else {
        return Some(m[start..end].to_vec());
    };
    let mut out = m
        .get(start..start + before)
        .filter(|_| start + before <= end)?
        .to_vec();
    let mut at = start + before;
    for _ in 0..names {
        at = read_name(m, at, &mut out).filter(|at| *at <= end)?;
    }
    out.extend_from_slice(&m[at..end]);
    // SOA carries five numbers behind its names: what reads them later relies on it.
    if t == rtype::SOA && end - at != 20 {
        return None;
    }
    Some(out)
}

/// Writes records with compressed owner names.
#[derive(Debug, Default)]
pub struct Compressor {
    /// Lower-case suffixes written so far and where.
    seen: Vec<(u16, Vec<u8>)>,
}

/// Suffixes to remember: a linear search stays short, and past that a message gains little.
const MAX_SEEN: usize = 32;

impl Compressor {
    /// Remembers the suffixes of the question's name, which stands behind the header already.
    pub fn question(name: &[u8]) -> Self {
        let mut seen = Vec::new();
        let mut at = 0;
        while name[at] != 0 && seen.len() < MAX_SEEN {
            seen.push(((HEADER + at) as u16, name[at..].to_ascii_lowercase()));
            at += 1 + usize::from(name[at]);
        }
        Self { seen }
    }

    /// Appends `name` (wire form), and remembers it.
    pub fn name(&mut self, name: &[u8], out: &mut Vec<u8>) {
        let lower = name.to_ascii_lowercase();
        let mut at = 0;
        while lower[at] != 0 {
            if let Some((offset, _)) = self.seen.iter().find(|(_, s)| s[..] == lower[at..]) {
                out.extend_from_slice(&(0xc000 | offset).to_be_bytes());
                return;
            }
            if self.seen.len() < MAX_SEEN && out.len() < 0x4000 {
                self.seen.push((out.len() as u16, lower[at..].to_vec()));
            }
            let next = at + 1 + usize::from(name[at]);
            out.extend_from_slice(&name[at..next]);
            at = next;
        }
        out.push(0);
    }

    /// Appends a record; returns where its TTL stands.
    pub fn record(&mut self, r: &Record, out: &mut Vec<u8>) -> usize {
        self.name(&r.owner, out);
        out.extend_from_slice(&r.rtype.to_be_bytes());
        out.extend_from_slice(&r.class.to_be_bytes());
        let ttl_at = out.len();
        out.extend_from_slice(&r.ttl.to_be_bytes());
        let len_at = out.len();
        out.extend_from_slice(&[0, 0]);
        match r.rtype {
            // Others may not be compressed (RFC 3597 §4, RFC 2782).
            rtype::CNAME | rtype::NS | rtype::PTR => self.name(&r.data, out),
            _ => out.extend_from_slice(&r.data),
        }
        let len = (out.len() - len_at - 2) as u16;
        out[len_at..len_at + 2].copy_from_slice(&len.to_be_bytes());
        ttl_at
    }
}
