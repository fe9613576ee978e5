//! Pref64: a prefix under which IPv4 addresses are embedded in IPv6 (RFC 6052).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::Ipv6Net;

/// 64:ff9b::/96 (RFC 6052 §2.1).
const WELL_KNOWN: u128 = 0x0064_ff9b << 96;

/// A translation prefix: /32, /40, /48, /56, /64 or /96, with bits 64 to 71 zero.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pref64 {
    bits: u128,
    len: u8,
}

/// Why a prefix is no Pref64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Pref64Error {
    /// Not one of the six lengths (RFC 6052 §2.2).
    #[error("/{0} is not a translation prefix length (32, 40, 48, 56, 64, 96)")]
    Length(u8),
    /// Bits 64 to 71 are not zero (RFC 6052 §2.2).
    #[error("bits 64 to 71 are not zero")]
    Octet8,
    /// Bits set beyond the prefix length.
    #[error("bits set beyond the prefix length")]
    HostBits,
}

impl Pref64 {
    /// The well-known prefix 64:ff9b::/96.
    pub const WELL_KNOWN: Pref64 = Pref64 {
        bits: WELL_KNOWN,
        len: 96,
    };

    /// Checks length, bits 64 to 71 and host bits.
    pub fn new(net: Ipv6Net) -> Result<Self, Pref64Error> {
        let len = net.prefix_len();
        if !matches!(len, 32 | 40 | 48 | 56 | 64 | 96) {
            return Err(Pref64Error::Length(len));
        }
        if net.trunc() != net {
            return Err(Pref64Error::HostBits);
        }
        let bits = u128::from(net.addr());
        if (bits >> 56) & 0xff != 0 {
            return Err(Pref64Error::Octet8);
        }
        Ok(Self { bits, len })
    }

    /// The prefix.
    pub fn net(self) -> Ipv6Net {
        Ipv6Net::new(Ipv6Addr::from(self.bits), self.len).expect("one of six lengths")
    }

    /// The IPv4-embedded IPv6 address: octet 8 and the suffix zero (RFC 6052 §2.2).
    pub fn embed(self, v4: Ipv4Addr) -> Ipv6Addr {
        let v4 = u128::from(u32::from(v4));
        let bits = match self.len {
            96 => v4,
            // The IPv4 bits that fit before bit 64, then the rest after the zero octet.
            len => {
                let before = 64 - u32::from(len);
                let head = if before == 0 {
                    0
                } else {
                    (v4 >> (32 - before)) << 64
                };
                let rest = v4 & ((1u128 << (32 - before)) - 1);
                head | (rest << (56 - (32 - before)))
            }
        };
        Ipv6Addr::from(self.bits | bits)
    }

    /// The IPv4 address inside `v6`; `None` unless it lies under the prefix with octet 8 zero. The suffix is ignored
    /// (RFC 6052 §2.3: "SHOULD be set to zero, ignored when extracting").
    pub fn extract(self, v6: Ipv6Addr) -> Option<Ipv4Addr> {
        let a = u128::from(v6);
        if (a ^ self.bits) >> (128 - u32::from(self.len)) != 0 {
            return None;
        }
        if self.len == 96 {
            return Some(Ipv4Addr::from((a & 0xffff_ffff) as u32));
        }
        if (a >> 56) & 0xff != 0 {
            return None;
        }
        let before = 64 - u32::from(self.len);
        let head = ((a >> 64) & ((1u128 << before) - 1)) << (32 - before);
        let rest = (a >> (56 - (32 - before))) & ((1u128 << (32 - before)) - 1);
        Some(Ipv4Addr::from((head | rest) as u32))
    }

    /// Whether this is the well-known prefix, which must not represent non-global IPv4 addresses (RFC 6052 §3.1).
    pub fn is_well_known(self) -> bool {
        self == Self::WELL_KNOWN
    }
}

impl TryFrom<Ipv6Net> for Pref64 {
    type Error = Pref64Error;
    fn try_from(net: Ipv6Net) -> Result<Self, Pref64Error> {
        Self::new(net)
    }
}

impl fmt::Display for Pref64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.net().fmt(f)
    }
}

impl fmt::Debug for Pref64 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pref64({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 6052 §2.4, table 2: 192.0.2.33 under the six prefixes.
    #[test]
    fn rfc6052_vectors() {
        let v4: Ipv4Addr = "192.0.2.33".parse().unwrap();
        for (prefix, address) in [
            ("2001:db8::/32", "2001:db8:c000:221::"),
            ("2001:db8:100::/40", "2001:db8:1c0:2:21::"),
            ("2001:db8:122::/48", "2001:db8:122:c000:2:2100::"),
            ("2001:db8:122:300::/56", "2001:db8:122:3c0:0:221::"),
            ("2001:db8:122:344::/64", "2001:db8:122:344:c0:2:2100::"),
            ("2001:db8:122:344::/96", "2001:db8:122:344::192.0.2.33"),
            ("64:ff9b::/96", "64:ff9b::192.0.2.33"),
        ] {
            let p = Pref64::new(prefix.parse().unwrap()).unwrap();
            let a: Ipv6Addr = address.parse().unwrap();
            assert_eq!(p.embed(v4), a, "{prefix}");
            assert_eq!(p.extract(a), Some(v4), "{prefix}");
        }
    }

    #[test]
    fn every_bit_survives_every_length() {
        for len in [32u8, 40, 48, 56, 64, 96] {
            let p = Pref64::new(Ipv6Net::new("2001:db8::".parse().unwrap(), len).unwrap()).unwrap();
            for bit in 0..32 {
                for v4 in [1u32 << bit, !(1u32 << bit)] {
                    let v4 = Ipv4Addr::from(v4);
                    let v6 = p.embed(v4);
                    assert_eq!(p.extract(v6), Some(v4), "/{len} {v4}");
                    assert_eq!(v6.octets()[8], 0, "/{len} {v4}");
                }
            }
        }
    }

    #[test]
    fn refuses_what_rfc6052_forbids() {
        let new = |s: &str| Pref64::new(s.parse().unwrap());
        assert_eq!(new("2001:db8::/72"), Err(Pref64Error::Length(72)));
        assert_eq!(new("2001:db8::1/96"), Err(Pref64Error::HostBits));
        assert_eq!(new("2001:db8:0:0:100::/96"), Err(Pref64Error::Octet8));
        let p = new("2001:db8::/32").unwrap();
        assert_eq!(p.extract("2001:db9:c000:221::".parse().unwrap()), None);
        assert_eq!(p.extract("2001:db8:c000:221:100::".parse().unwrap()), None);
    }
}
