//! IPv4-embedded IPv6 addresses (RFC 6052 §2.2): six prefix lengths, bits 64 to 71 zero, suffix zero.

/// The prefix lengths of RFC 6052 §2.2.
pub const PREFIX_LENGTHS: [u8; 6] = [32, 40, 48, 56, 64, 96];

/// 64:ff9b::, whose /96 is the Well-Known Prefix (RFC 6052 §2.1).
pub const WELL_KNOWN: [u8; 16] = [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Index of the octet that stays zero below /96.
const U_OCTET: usize = 8;

/// Where the four octets of the IPv4 address go; `None` for another length.
const fn positions(len: u8) -> Option<[usize; 4]> {
    Some(match len {
        32 => [4, 5, 6, 7],
        40 => [5, 6, 7, 9],
        48 => [6, 7, 9, 10],
        56 => [7, 9, 10, 11],
        64 => [9, 10, 11, 12],
        96 => [12, 13, 14, 15],
        _ => return None,
    })
}

/// The IPv6 address of `v4` under `prefix`/`len` (bits of `prefix` beyond `len` are ignored). `None`: not a length of
/// [`PREFIX_LENGTHS`], or a /96 whose bits 64 to 71 are not zero.
pub fn embed(prefix: [u8; 16], len: u8, v4: [u8; 4]) -> Option<[u8; 16]> {
    let at = positions(len)?;
    let mut out = [0; 16];
    let octets = usize::from(len / 8);
    out[..octets].copy_from_slice(&prefix[..octets]);
    if out[U_OCTET] != 0 {
        return None;
    }
    for (position, octet) in at.into_iter().zip(v4) {
        out[position] = octet;
    }
    Some(out)
}

/// The IPv4 address inside `v6`. `None`: not under `prefix`/`len`, or bits 64 to 71 are not zero. The suffix is not looked at
/// (RFC 6052 §2.2: reserved, to be ignored).
pub fn extract(prefix: [u8; 16], len: u8, v6: [u8; 16]) -> Option<[u8; 4]> {
    let at = positions(len)?;
    let octets = usize::from(len / 8);
    if v6[..octets] != prefix[..octets] || v6[U_OCTET] != 0 {
        return None;
    }
    Some(at.map(|position| v6[position]))
}

/// Whether `prefix`/`len` is 64:ff9b::/96.
pub fn is_well_known(prefix: [u8; 16], len: u8) -> bool {
    len == 96 && prefix[..12] == WELL_KNOWN[..12]
}

/// Whether an IPv4 address (as a number) is globally reachable unicast: not in the special-purpose registry (RFC 6890 and
/// its updates). Only these may be written under the Well-Known Prefix (RFC 6052 §3.1).
#[inline(always)]
pub const fn is_global(v4: u32) -> bool {
    let (a, b, c) = (v4 >> 24, (v4 >> 16) & 0xff, (v4 >> 8) & 0xff);
    !matches!(
        (a, b, c),
        (0 | 10 | 127, _, _)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)
            | (192, 168, _)
            | (198, 18 | 19, _)
            | (198, 51, 100)
            | (203, 0, 113)
            | (224..=255, _, _)
    )
}
