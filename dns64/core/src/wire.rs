//! Numbers and octets of the DNS message (RFC 1035 §4, RFC 6891), and names in it.

/// Length of the header.
pub const HEADER: usize = 12;
/// The longest message over TCP.
pub const MAX_MESSAGE: usize = 65_535;
/// What is promised and used over UDP: no fragments on any sane path (RFC 9715 §3).
pub const UDP_PAYLOAD: u16 = 1232;

/// Flags of the second header word.
pub mod flag {
    /// Response.
    pub const QR: u16 = 0x8000;
    /// Opcode mask.
    pub const OPCODE: u16 = 0x7800;
    /// Authoritative answer.
    pub const AA: u16 = 0x0400;
    /// Truncated.
    pub const TC: u16 = 0x0200;
    /// Recursion desired.
    pub const RD: u16 = 0x0100;
    /// Recursion available.
    pub const RA: u16 = 0x0080;
    /// Authentic data (RFC 4035).
    pub const AD: u16 = 0x0020;
    /// Checking disabled (RFC 4035).
    pub const CD: u16 = 0x0010;
    /// Response code mask.
    pub const RCODE: u16 = 0x000f;
}

/// Types (IANA).
#[allow(missing_docs, reason = "each is the type of its name")]
pub mod rtype {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const HINFO: u16 = 13;
    pub const MX: u16 = 15;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const DNAME: u16 = 39;
    pub const OPT: u16 = 41;
    pub const DS: u16 = 43;
    pub const RRSIG: u16 = 46;
    pub const NSEC: u16 = 47;
    pub const ANY: u16 = 255;
}

/// Response codes (IANA).
#[allow(missing_docs, reason = "each is the code of its name")]
pub mod rcode {
    pub const NOERROR: u8 = 0;
    pub const FORMERR: u8 = 1;
    pub const SERVFAIL: u8 = 2;
    pub const NXDOMAIN: u8 = 3;
    pub const NOTIMP: u8 = 4;
    pub const REFUSED: u8 = 5;
    /// RFC 6891 §9: needs an OPT record for its upper bits.
    pub const BADVERS: u8 = 16;
}

/// Class IN.
pub const IN: u16 = 1;

/// The text of a response code, as CoreDNS writes it.
pub fn rcode_text(code: u8) -> &'static str {
    match code {
        0 => "NOERROR",
        1 => "FORMERR",
        2 => "SERVFAIL",
        3 => "NXDOMAIN",
        4 => "NOTIMP",
        5 => "REFUSED",
        6 => "YXDOMAIN",
        7 => "YXRRSET",
        8 => "NXRRSET",
        9 => "NOTAUTH",
        10 => "NOTZONE",
        16 => "BADVERS",
        _ => "RESERVED",
    }
}

/// The text of a type; `None`: `TYPEnnn` (RFC 3597 §5).
pub fn type_text(t: u16) -> Option<&'static str> {
    Some(match t {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        13 => "HINFO",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        35 => "NAPTR",
        39 => "DNAME",
        41 => "OPT",
        43 => "DS",
        46 => "RRSIG",
        47 => "NSEC",
        48 => "DNSKEY",
        50 => "NSEC3",
        52 => "TLSA",
        64 => "SVCB",
        65 => "HTTPS",
        251 => "IXFR",
        252 => "AXFR",
        255 => "ANY",
        257 => "CAA",
        _ => return None,
    })
}

/// Big-endian u16 at `at`.
pub fn u16_at(m: &[u8], at: usize) -> Option<u16> {
    m.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]))
}

/// Big-endian u32 at `at`.
pub fn u32_at(m: &[u8], at: usize) -> Option<u32> {
    m.get(at..at + 4)
        .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
}

/// Writes a u16 at `at`, which is inside the message.
pub fn put_u16(m: &mut [u8], at: usize, v: u16) {
    m[at..at + 2].copy_from_slice(&v.to_be_bytes());
}

/// Writes a u32 at `at`, which is inside the message.
pub fn put_u32(m: &mut [u8], at: usize, v: u32) {
    m[at..at + 4].copy_from_slice(&v.to_be_bytes());
}

/// Appends the name at `at`, decompressed, to `out`, and returns where the octets behind it begin. `None`: not a name.
///
/// Each pointer must point before the last one: that bounds the walk.
pub fn read_name(m: &[u8], at: usize, out: &mut Vec<u8>) -> Option<usize> {
    let start = out.len();
    let mut at = at;
    let mut limit = at;
    let mut behind = None;
    loop {
        match *m.get(at)? {
            0 => {
                out.push(0);
                return Some(behind.unwrap_or(at + 1));
            }
            n @ 1..=63 => {
                let label = m.get(at..at + 1 + usize::from(n))?;
                // 254: the root octet must still fit.
                if out.len() - start + label.len() > 254 {
                    return None;
                }
                out.extend_from_slice(label);
                at += label.len();
            }
            n if n >= 0xc0 => {
                let to = usize::from(u16_at(m, at)? & 0x3fff);
                behind.get_or_insert(at + 2);
                if to >= limit {
                    return None;
                }
                limit = to;
                at = to;
            }
            _ => return None,
        }
    }
}

/// Where the octets behind the name at `at` begin, without following pointers.
pub fn skip_name(m: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *m.get(at)? {
            0 => return Some(at + 1),
            n @ 1..=63 => at += 1 + usize::from(n),
            n if n >= 0xc0 => return (at + 2 <= m.len()).then_some(at + 2),
            _ => return None,
        }
    }
}

/// The owner name of the reverse lookup of `address`, in wire form.
pub fn reverse_name(address: std::net::IpAddr) -> Vec<u8> {
    let mut out = Vec::with_capacity(80);
    match address {
        std::net::IpAddr::V4(a) => {
            for octet in a.octets().iter().rev() {
                let text = octet.to_string();
                out.push(text.len() as u8);
                out.extend_from_slice(text.as_bytes());
            }
            out.extend_from_slice(b"\x07in-addr\x04arpa\0");
        }
        std::net::IpAddr::V6(a) => {
            for octet in a.octets().iter().rev() {
                for nibble in [octet & 15, octet >> 4] {
                    out.push(1);
                    out.push(b"0123456789abcdef"[usize::from(nibble)]);
                }
            }
            out.extend_from_slice(b"\x03ip6\x04arpa\0");
        }
    }
    out
}

/// The address whose reverse name `name` (lower-case wire form) is, complete ones only.
pub fn reverse_address(name: &[u8]) -> Option<std::net::IpAddr> {
    if let Some(head) = name.strip_suffix(b"\x03ip6\x04arpa\0".as_slice()) {
        if head.len() != 64 {
            return None;
        }
        let mut value = 0u128;
        for pair in head.chunks_exact(2).rev() {
            let digit = (pair[0] == 1).then(|| char::from(pair[1]).to_digit(16))??;
            value = value << 4 | u128::from(digit);
        }
        return Some(std::net::Ipv6Addr::from(value).into());
    }
    let mut rest = name.strip_suffix(b"\x07in-addr\x04arpa\0".as_slice())?;
    let mut octets = [0u8; 4];
    for octet in octets.iter_mut().rev() {
        let (&n, tail) = rest.split_first()?;
        let label = tail.get(..usize::from(n))?;
        // "01" is not how an octet is written: it would be a second name for one address.
        if label.is_empty()
            || (label.len() > 1 && label[0] == b'0')
            || !label.iter().all(u8::is_ascii_digit)
        {
            return None;
        }
        *octet = std::str::from_utf8(label).ok()?.parse().ok()?;
        rest = &tail[usize::from(n)..];
    }
    rest.is_empty()
        .then(|| std::net::Ipv4Addr::from(octets).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reverse_names_go_both_ways() {
        for a in [
            "192.0.2.33",
            "0.0.0.0",
            "255.255.255.255",
            "2001:db8::1",
            "::",
        ] {
            let a = a.parse().unwrap();
            assert_eq!(reverse_address(&reverse_name(a)), Some(a));
        }
        assert_eq!(
            reverse_name("10.2.3.4".parse().unwrap()),
            b"\x014\x013\x012\x0210\x07in-addr\x04arpa\0"
        );
        assert_eq!(
            reverse_address(b"\x013\x012\x0210\x07in-addr\x04arpa\0"),
            None,
            "three octets"
        );
        assert_eq!(
            reverse_address(b"\x0204\x013\x012\x0210\x07in-addr\x04arpa\0"),
            None,
            "a leading zero"
        );
        assert_eq!(
            reverse_address(b"\x03256\x013\x012\x0210\x07in-addr\x04arpa\0"),
            None
        );
    }

    #[test]
    fn pointers_only_go_back() {
        let m = b"\x01a\x00\xc0\x00\xc0\x05";
        let mut out = Vec::new();
        assert_eq!(read_name(m, 3, &mut out), Some(5));
        assert_eq!(out, b"\x01a\0");
        assert_eq!(
            read_name(m, 5, &mut Vec::new()),
            None,
            "a pointer to itself"
        );
        assert_eq!(
            read_name(b"\xc0\x02\xc0\x00", 2, &mut Vec::new()),
            None,
            "a circle"
        );
        assert_eq!(
            read_name(b"\x40", 0, &mut Vec::new()),
            None,
            "a label type nobody uses"
        );
    }
}
