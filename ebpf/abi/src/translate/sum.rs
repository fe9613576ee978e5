//! The Internet checksum's arithmetic (RFC 1071, RFC 1624) on words as they lie in memory.

/// One's complement addition.
#[inline(always)]
pub const fn add(a: u32, b: u32) -> u32 {
    let s = a as u64 + b as u64;
    (s as u32).wrapping_add((s >> 32) as u32)
}

/// Sum of all words.
#[inline(always)]
pub fn of(words: &[u32]) -> u32 {
    let mut s = 0u64;
    for w in words {
        s += u64::from(*w);
    }
    s = (s & 0xffff_ffff) + (s >> 32);
    (s as u32).wrapping_add((s >> 32) as u32)
}

/// To 16 bits.
#[inline(always)]
pub const fn fold(s: u32) -> u16 {
    let s = (s & 0xffff) + (s >> 16);
    ((s & 0xffff) + (s >> 16)) as u16
}

/// What a change from the sum `old` to the sum `new` adds to the whole.
#[inline(always)]
pub const fn delta(new: u32, old: u32) -> u32 {
    add(new, !old)
}

/// A checksum field (as it lies in memory) after a change by `delta` (RFC 1624 eqn. 3).
#[inline(always)]
pub const fn adjust(field: u16, delta: u32) -> u16 {
    !fold(add((!field) as u32, delta))
}
