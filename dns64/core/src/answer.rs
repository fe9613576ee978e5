//! Answers in the form they are kept and sent: encoded once for the lower-case question, patched for each client.

use crate::message::{Compressor, Message, Record};
use crate::query::Query;
use crate::wire::{
    HEADER, IN, MAX_MESSAGE, UDP_PAYLOAD, flag, put_u16, put_u32, rcode, rtype, skip_name, u16_at,
};

/// An encoded answer without id, without OPT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    wire: Box<[u8]>,
    /// Where the TTLs stand.
    ttls: Box<[u16]>,
    /// First octet behind the question.
    body: u16,
    /// TTL that the message as a whole may live, seconds, before any bounds; `None`: it holds nothing that says so.
    lifetime: Option<u32>,
}

/// What differs between clients of one answer.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Largest UDP answer.
    pub cap: u16,
    /// All TTLs become this; `None`: they stay.
    pub ttl: Option<u32>,
    /// Address records are put in an order that this seed decides.
    pub shuffle: Option<u64>,
}

impl Answer {
    /// Encodes; `None` if it does not fit a message even without its additional section.
    pub fn from_message(m: &Message) -> Option<Self> {
        Self::encode(m, &m.additional).or_else(|| Self::encode(m, &[]))
    }

    fn encode(m: &Message, additional: &[Record]) -> Option<Self> {
        let mut out = vec![0, 0];
        let keep = m.flags & (flag::AA | flag::RA | flag::AD | flag::RCODE);
        out.extend_from_slice(&(flag::QR | keep).to_be_bytes());
        out.extend_from_slice(&[0, 1]);
        for section in [&m.answers[..], &m.authority, additional] {
            out.extend_from_slice(&u16::try_from(section.len()).ok()?.to_be_bytes());
        }
        let mut compressor = Compressor::default();
        compressor.name(&m.name, &mut out);
        out.extend_from_slice(&m.qtype.to_be_bytes());
        out.extend_from_slice(&IN.to_be_bytes());
        let body = out.len() as u16;
        let mut ttls = Vec::new();
        for record in m.answers.iter().chain(&m.authority).chain(additional) {
            ttls.push(compressor.record(record, &mut out));
            // OPT's 11 octets must fit too.
            if out.len() > MAX_MESSAGE - 11 {
                return None;
            }
        }
        Some(Self {
            wire: out.into(),
            ttls: ttls.into_iter().map(|t| t as u16).collect(),
            body,
            lifetime: lifetime(m),
        })
    }

    /// A message without records.
    pub fn bare(name: &[u8], qtype: u16, code: u8) -> Self {
        Self::from_message(&Message::empty(name, qtype, code)).expect("a header and a question fit")
    }

    /// Response code.
    pub fn rcode(&self) -> u8 {
        self.wire[3] & 15
    }

    /// Number of answer records.
    pub fn answer_count(&self) -> u16 {
        u16::from_be_bytes([self.wire[6], self.wire[7]])
    }

    /// Whether the name or type does not exist: NXDOMAIN, or no record of the type asked for at the end of the chain.
    pub fn is_denial(&self) -> bool {
        self.rcode() == rcode::NXDOMAIN
            || (self.rcode() == rcode::NOERROR && !self.has_final_type())
    }

    fn has_final_type(&self) -> bool {
        let qtype = u16_at(&self.wire, usize::from(self.body) - 4);
        let mut at = usize::from(self.body);
        for _ in 0..self.answer_count() {
            let Some(after) = skip_name(&self.wire, at) else {
                return false;
            };
            let (t, len) = (u16_at(&self.wire, after), u16_at(&self.wire, after + 8));
            if t == qtype || qtype == Some(rtype::ANY) {
                return true;
            }
            at = after + 10 + usize::from(len.unwrap_or(0));
        }
        false
    }

    /// How long it may live, seconds, before any bounds.
    pub fn lifetime(&self) -> Option<u32> {
        self.lifetime
    }

    /// Octets held.
    pub fn size(&self) -> usize {
        self.wire.len()
    }

    /// Writes the answer to `query`, which asks the same question up to letter case.
    pub fn write(&self, query: &Query<'_>, shape: Shape, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&self.wire);
        out[..2].copy_from_slice(&query.wire()[..2]);
        let mut flags = u16::from_be_bytes([self.wire[2], self.wire[3]]);
        // AD only for those who understand it (RFC 6840 §5.7).
        if !query.dnssec_ok() && query.flags() & flag::AD == 0 {
            flags &= !flag::AD;
        }
        put_u16(out, 2, flags | query.flags() & (flag::RD | flag::CD));
        let question = query.question();
        out[HEADER..HEADER + question.len()].copy_from_slice(question);
        if let Some(ttl) = shape.ttl {
            for &at in &self.ttls {
                put_u32(out, usize::from(at), ttl);
            }
        }
        finish(query, shape.cap, shape.shuffle, out);
    }
}

/// RFC 2308 §5 for denials, the least TTL of all records otherwise.
fn lifetime(m: &Message) -> Option<u32> {
    let all = m.answers.iter().chain(&m.authority).chain(&m.additional);
    all.map(|r| match r.rtype {
        rtype::SOA if r.data.len() >= 20 => {
            let minimum = &r.data[r.data.len() - 4..];
            r.ttl.min(u32::from_be_bytes([
                minimum[0], minimum[1], minimum[2], minimum[3],
            ]))
        }
        _ => r.ttl,
    })
    .min()
}

/// Header and question of an answer made in place; `flags` are AA, RA and the response code.
pub fn begin(query: &Query<'_>, flags: u16, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(&query.wire()[..2]);
    out.extend_from_slice(
        &(flag::QR | flags | query.flags() & (flag::RD | flag::CD)).to_be_bytes(),
    );
    out.extend_from_slice(&[0, 1, 0, 0, 0, 0, 0, 0]);
    out.extend_from_slice(query.question());
}

/// Order, truncation and OPT: the last touch of every answer.
///
/// What does not fit is answered by header and question alone with TC set: half an RRset is worse than none (RFC 2181 §9).
pub fn finish(query: &Query<'_>, cap: u16, shuffle_seed: Option<u64>, out: &mut Vec<u8>) {
    let opt = if query.edns.is_some() { 11 } else { 0 };
    if out.len() + opt > query.limit(cap) {
        out.truncate(HEADER + query.question().len());
        out[2] |= (flag::TC >> 8) as u8;
        out[6..12].fill(0);
    } else if let Some(seed) = shuffle_seed {
        shuffle(HEADER + query.question().len(), seed, out);
    }
    if let Some(edns) = query.edns {
        let additional = u16::from_be_bytes([out[10], out[11]]);
        put_u16(out, 10, additional + 1);
        out.extend_from_slice(&[0, 0, rtype::OPT as u8]);
        out.extend_from_slice(&UDP_PAYLOAD.to_be_bytes());
        out.extend_from_slice(&[0, 0, if edns.dnssec_ok { 0x80 } else { 0 }, 0, 0, 0]);
    }
}

/// Address records that are shuffled; those behind keep their places.
const MAX_SHUFFLE: usize = 32;

/// Swaps the data of the answer section's A or AAAA records that share owner and type: TTLs are equal within an RRset.
fn shuffle(body: usize, seed: u64, out: &mut [u8]) {
    let count = u16::from_be_bytes([out[6], out[7]]);
    if count < 2 {
        return;
    }
    let mut data = [0usize; MAX_SHUFFLE];
    let mut n = 0;
    let mut first: Option<(usize, usize, u16)> = None;
    let mut at = body;
    for _ in 0..count {
        let Some(after) = skip_name(out, at) else {
            return;
        };
        let (Some(t), Some(len)) = (u16_at(out, after), u16_at(out, after + 8)) else {
            return;
        };
        if (t == rtype::A && len == 4) || (t == rtype::AAAA && len == 16) {
            let (start, end, t0) = *first.get_or_insert((at, after, t));
            if t == t0 && out[start..end] == out[at..after] && n < MAX_SHUFFLE {
                data[n] = after + 10;
                n += 1;
            }
        }
        at = after + 10 + usize::from(len);
    }
    let Some((_, _, t)) = first else { return };
    let len = if t == rtype::A { 4 } else { 16 };
    let mut state = seed | 1;
    for i in (1..n).rev() {
        // xorshift64: the order need only vary.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let j = (state % (i as u64 + 1)) as usize;
        if i != j {
            let (a, b) = (data[j], data[i]);
            for k in 0..len {
                out.swap(a + k, b + k);
            }
        }
    }
}

/// The encoded key under which an answer is kept and queries are coalesced.
#[derive(Debug, Clone, Copy)]
pub struct Key {
    bytes: [u8; 258],
    len: u16,
}

/// What besides the question decides an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Profile {
    /// DNSSEC OK.
    pub dnssec_ok: bool,
    /// Checking disabled.
    pub checking_disabled: bool,
    /// AAAA records may be made for this client.
    pub synthesise: bool,
}

impl Key {
    /// Of a lower-case name, a type and a profile.
    pub fn new(name: &[u8], qtype: u16, profile: Profile) -> Self {
        let mut bytes = [0; 258];
        let bits = u8::from(profile.dnssec_ok)
            | u8::from(profile.checking_disabled) << 1
            | u8::from(profile.synthesise) << 2;
        let t = qtype.to_be_bytes();
        bytes[..3].copy_from_slice(&[bits, t[0], t[1]]);
        bytes[3..3 + name.len()].copy_from_slice(name);
        Self {
            bytes,
            len: (3 + name.len()) as u16,
        }
    }

    /// The octets.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}
