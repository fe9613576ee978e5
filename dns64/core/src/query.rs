//! A request as it came: checked once, then used in place (RFC 1035 §4.1, RFC 6891 §6.1, RFC 9619).

use crate::wire::{
    HEADER, IN, MAX_MESSAGE, UDP_PAYLOAD, flag, put_u16, rcode, rtype, skip_name, u16_at,
};

/// How it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One datagram; the answer is bounded by what the client can take.
    Udp,
    /// A stream.
    Tcp,
}

/// The OPT record of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edns {
    /// The payload size that the client can take.
    pub udp_size: u16,
    /// DNSSEC OK.
    pub dnssec_ok: bool,
}

/// A request.
#[derive(Debug, Clone)]
pub struct Query<'a> {
    wire: &'a [u8],
    /// Lower-case wire form.
    name: [u8; 255],
    name_len: u8,
    /// Type asked for.
    pub qtype: u16,
    /// OPT.
    pub edns: Option<Edns>,
    /// UDP or TCP.
    pub transport: Transport,
}

/// Why a request gets no look at any zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// Not a request: answering could start a loop between two servers.
    Silent,
    /// Answered with this code.
    Rcode(u8),
}

impl<'a> Query<'a> {
    /// Checks header, question and OPT.
    pub fn parse(wire: &'a [u8], transport: Transport) -> Result<Self, Reject> {
        let flags = match u16_at(wire, 2) {
            Some(f) if wire.len() >= HEADER && f & flag::QR == 0 => f,
            _ => return Err(Reject::Silent),
        };
        if flags & flag::OPCODE != 0 {
            return Err(Reject::Rcode(rcode::NOTIMP));
        }
        let formerr = Reject::Rcode(rcode::FORMERR);
        let count = |i: usize| u16::from_be_bytes([wire[i], wire[i + 1]]);
        // One question (RFC 9619); no answers; authority only in IXFR and UPDATE, which are not served.
        if count(4) != 1 || count(6) != 0 || count(8) != 0 || flags & flag::TC != 0 {
            return Err(formerr);
        }
        let mut name = [0u8; 255];
        let mut at = HEADER;
        loop {
            match wire.get(at) {
                Some(0) => break,
                Some(&n @ 1..=63) => at += 1 + usize::from(n),
                _ => return Err(formerr),
            }
            // Of 255 octets the last is the root's.
            if at - HEADER > 254 {
                return Err(formerr);
            }
        }
        let name_len = at + 1 - HEADER;
        let text = &wire[HEADER..=at];
        for (to, from) in name.iter_mut().zip(text) {
            *to = from.to_ascii_lowercase();
        }
        let (Some(qtype), Some(qclass)) = (u16_at(wire, at + 1), u16_at(wire, at + 3)) else {
            return Err(formerr);
        };
        let mut edns = None;
        let mut at = at + 5;
        for _ in 0..count(10) {
            let after = skip_name(wire, at).ok_or(formerr)?;
            let (Some(t), Some(class), Some(len)) = (
                u16_at(wire, after),
                u16_at(wire, after + 2),
                u16_at(wire, after + 8),
            ) else {
                return Err(formerr);
            };
            if t == rtype::OPT {
                if edns.is_some() || wire[at] != 0 {
                    return Err(formerr);
                }
                if wire[after + 5] != 0 {
                    return Err(Reject::Rcode(rcode::BADVERS));
                }
                edns = Some(Edns {
                    udp_size: class,
                    dnssec_ok: wire[after + 6] & 0x80 != 0,
                });
            }
            at = after + 10 + usize::from(len);
            if at > wire.len() {
                return Err(formerr);
            }
        }
        match qtype {
            // Meta types that are no question to a resolver.
            0 | rtype::OPT => return Err(formerr),
            249..=254 => return Err(Reject::Rcode(rcode::NOTIMP)),
            _ => {}
        }
        if qclass != IN {
            return Err(Reject::Rcode(rcode::REFUSED));
        }
        Ok(Self {
            wire,
            name,
            name_len: name_len as u8,
            qtype,
            edns,
            transport,
        })
    }

    /// The octets.
    pub fn wire(&self) -> &'a [u8] {
        self.wire
    }

    /// The name asked for, lower-case wire form.
    pub fn name(&self) -> &[u8] {
        &self.name[..usize::from(self.name_len)]
    }

    /// The question as the client wrote it: name, type, class.
    pub fn question(&self) -> &'a [u8] {
        &self.wire[HEADER..HEADER + usize::from(self.name_len) + 4]
    }

    /// Message id.
    pub fn id(&self) -> u16 {
        u16::from_be_bytes([self.wire[0], self.wire[1]])
    }

    /// Header flags.
    pub fn flags(&self) -> u16 {
        u16::from_be_bytes([self.wire[2], self.wire[3]])
    }

    /// DNSSEC OK.
    pub fn dnssec_ok(&self) -> bool {
        self.edns.is_some_and(|e| e.dnssec_ok)
    }

    /// Checking disabled.
    pub fn checking_disabled(&self) -> bool {
        self.flags() & flag::CD != 0
    }

    /// The longest answer: over UDP what client and `cap` allow, at least 512 (RFC 6891 §6.2.3).
    pub fn limit(&self, cap: u16) -> usize {
        match (self.transport, self.edns) {
            (Transport::Tcp, _) => MAX_MESSAGE,
            (Transport::Udp, None) => 512,
            (Transport::Udp, Some(e)) => usize::from(e.udp_size.min(cap).max(512)),
        }
    }
}

/// Writes the answer to a rejected request: header and, for BADVERS, an OPT record. The question is repeated where it stands whole.
pub fn reject(wire: &[u8], code: u8, out: &mut Vec<u8>) {
    out.clear();
    let flags = u16_at(wire, 2).unwrap_or(0);
    out.extend_from_slice(&wire[..2]);
    let keep = flags & (flag::OPCODE | flag::RD | flag::CD);
    out.extend_from_slice(&(flag::QR | keep | u16::from(code & 15)).to_be_bytes());
    out.extend_from_slice(&[0; 8]);
    let question = (u16_at(wire, 4) == Some(1))
        .then(|| skip_name(wire, HEADER))
        .flatten()
        .filter(|end| *end <= HEADER + 255);
    if let Some(question) = question.and_then(|end| wire.get(HEADER..end + 4)) {
        // A compressed name in a question points at nothing that is repeated here.
        if !question.iter().any(|b| *b >= 0xc0) {
            out.extend_from_slice(question);
            put_u16(out, 4, 1);
        }
    }
    if code > 15 {
        put_u16(out, 10, 1);
        out.extend_from_slice(&[0, 0, rtype::OPT as u8]);
        out.extend_from_slice(&UDP_PAYLOAD.to_be_bytes());
        out.extend_from_slice(&[code >> 4, 0, 0, 0, 0, 0]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(flags: u16, counts: [u16; 4], rest: &[u8]) -> Vec<u8> {
        let mut q = vec![0x12, 0x34];
        q.extend_from_slice(&flags.to_be_bytes());
        for c in counts {
            q.extend_from_slice(&c.to_be_bytes());
        }
        q.extend_from_slice(rest);
        q
    }

    const WWW: &[u8] = b"\x03wWw\x07example\x03org\0\0\x01\0\x01";

    fn rejected(q: &[u8]) -> Option<Reject> {
        Query::parse(q, Transport::Udp).err()
    }

    #[test]
    fn a_plain_question() {
        let q = query(flag::RD, [1, 0, 0, 0], WWW);
        let p = Query::parse(&q, Transport::Udp).unwrap();
        assert_eq!(p.name(), b"\x03www\x07example\x03org\0");
        assert_eq!(p.question(), WWW);
        assert_eq!((p.id(), p.qtype, p.limit(1232)), (0x1234, 1, 512));
    }

    #[test]
    fn edns() {
        let with = |opt: &[u8], n| {
            let mut rest = WWW.to_vec();
            rest.extend_from_slice(opt);
            query(0, [1, 0, 0, n], &rest)
        };
        let opt = b"\0\0\x29\x10\x00\0\0\x80\0\0\0";
        let q = with(opt, 1);
        let p = Query::parse(&q, Transport::Udp).unwrap();
        assert!(p.dnssec_ok());
        assert_eq!((p.limit(1232), p.limit(512)), (1232, 512));
        assert_eq!(
            rejected(&with(&[&opt[..], opt].concat(), 2)),
            Some(Reject::Rcode(rcode::FORMERR))
        );
        assert_eq!(
            rejected(&with(b"\0\0\x29\x10\x00\0\x01\0\0\0\0", 1)),
            Some(Reject::Rcode(rcode::BADVERS))
        );
        assert_eq!(
            rejected(&with(&opt[..10], 1)),
            Some(Reject::Rcode(rcode::FORMERR))
        );
        assert_eq!(
            rejected(&with(b"\0\0\x29\x10\x00\0\0\0\0\0\x04ab", 1)),
            Some(Reject::Rcode(rcode::FORMERR)),
            "rdata runs past the end"
        );
        let small = with(b"\0\0\x29\x00\x10\0\0\0\0\0\0", 1);
        assert_eq!(
            Query::parse(&small, Transport::Udp).unwrap().limit(1232),
            512,
            "below 512 counts as 512"
        );
    }

    #[test]
    fn header_checks() {
        for (q, want) in [
            (query(flag::QR, [1, 0, 0, 0], WWW), Reject::Silent),
            (vec![0; 11], Reject::Silent),
            (
                query(4 << 11, [1, 0, 0, 0], WWW),
                Reject::Rcode(rcode::NOTIMP),
            ),
            (query(0, [0, 0, 0, 0], b""), Reject::Rcode(rcode::FORMERR)),
            (
                query(0, [2, 0, 0, 0], &[WWW, WWW].concat()),
                Reject::Rcode(rcode::FORMERR),
            ),
            (query(0, [1, 1, 0, 0], WWW), Reject::Rcode(rcode::FORMERR)),
            (
                query(0, [1, 0, 0, 0], &WWW[..18]),
                Reject::Rcode(rcode::FORMERR),
            ),
            (
                query(0, [1, 0, 0, 0], b"\xc0\x0c\0\x01\0\x01"),
                Reject::Rcode(rcode::FORMERR),
            ),
            (
                query(0, [1, 0, 0, 0], b"\x01a\0\0\x01\0\x03"),
                Reject::Rcode(rcode::REFUSED),
            ),
            (
                query(0, [1, 0, 0, 0], b"\x01a\0\0\xfc\0\x01"),
                Reject::Rcode(rcode::NOTIMP),
            ),
        ] {
            assert_eq!(rejected(&q), Some(want), "{q:?}");
        }
    }

    #[test]
    fn names_up_to_255_octets() {
        let mut longest = b"\x3f".to_vec();
        longest.extend([b'a'; 63]);
        let mut name = longest.repeat(3);
        name.push(61);
        name.extend([b'b'; 61]);
        name.push(0);
        assert_eq!(name.len(), 255);
        let tail = b"\0\x01\0\x01";
        let q = query(0, [1, 0, 0, 0], &[&name[..], tail].concat());
        assert_eq!(Query::parse(&q, Transport::Udp).unwrap().name().len(), 255);
        name[192] = 62;
        name.insert(200, b'c');
        let q = query(0, [1, 0, 0, 0], &[&name[..], tail].concat());
        assert_eq!(rejected(&q), Some(Reject::Rcode(rcode::FORMERR)));
    }

    #[test]
    fn rejections_repeat_id_and_question() {
        let mut out = Vec::new();
        let q = query(flag::RD | 4 << 11, [1, 0, 0, 0], WWW);
        reject(&q, rcode::NOTIMP, &mut out);
        assert_eq!(&out[..12], b"\x12\x34\xa1\x04\0\x01\0\0\0\0\0\0");
        assert_eq!(&out[12..], WWW);
        reject(&query(0, [1, 0, 0, 1], WWW), rcode::BADVERS, &mut out);
        assert_eq!(&out[out.len() - 11..], b"\0\0\x29\x04\xd0\x01\0\0\0\0\0");
        reject(
            &query(0, [1, 0, 0, 0], b"\xc0\x0c\0\x01\0\x01"),
            1,
            &mut out,
        );
        assert_eq!(out.len(), 12);
    }
}
