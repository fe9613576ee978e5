//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Sums are over words in memory order, as the kernel's `__wsum` is: the same code serves both byte orders, and what it
//! returns can be handed to `bpf_l3_csum_replace` and `bpf_l4_csum_replace`.

/// One's-complement sum of words as they lie in memory, not folded.
#[inline(always)]
pub fn sum<const N: usize>(words: &[u32; N]) -> u64 {
    let mut sum = 0u64;
    let mut i = 0;
    while i < N {
        sum += words[i] as u64;
        i += 1;
    }
    sum
}

/// What replacing `old` by `new` adds to a sum, folded to 32 bits: RFC 1624's ~m + m'.
#[inline(always)]
pub fn difference(old: u64, new: u64) -> u32 {
    // Both are sums of at most 2^16 words, so they fit 48 bits and the complement is taken of the folded one.
    fold32((!fold32(old)) as u64 + fold32(new) as u64)
}

/// Folds to 32 bits with end-around carry.
#[inline(always)]
pub const fn fold32(sum: u64) -> u32 {
    let once = (sum & 0xffff_ffff) + (sum >> 32);
    (once + (once >> 32)) as u32
}

/// Folds to 16 bits with end-around carry.
#[inline(always)]
pub const fn fold16(sum: u64) -> u16 {
    let sum = fold32(sum);
    let once = (sum & 0xffff) + (sum >> 16);
    (once + (once >> 16)) as u16
}

/// The checksum field as it lies in memory, over a sum of everything it covers.
#[inline(always)]
pub const fn finish(sum: u64) -> u16 {
    !fold16(sum)
}

/// A checksum field after its data changed by `diff` ([`difference`]).
#[inline(always)]
pub const fn update(field: u16, diff: u32) -> u16 {
    finish(!field as u64 + diff as u64)
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// RFC 1071 §4.1, word by word in network order.
    fn slow(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
        core::array::from_fn(|i| {
            u32::from_ne_bytes(bytes[i * 4..i * 4 + 4].try_into().expect("four"))
        })
    }

    #[test]
    fn rfc1071_example() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(
            finish(sum(&words::<2>(&data))).to_ne_bytes(),
            (!0xddf2u16).to_be_bytes()
        );
    }

    proptest! {
        #[test]
        fn sums_as_the_rfc_says(data: [u8; 40]) {
            prop_assert_eq!(u16::from_be(finish(sum(&words::<10>(&data)))), slow(&data));
        }

        #[test]
        fn update_equals_a_new_sum(rest: [u8; 24], old: [u8; 16], new: [u8; 16]) {
            prop_assume!(rest.iter().any(|b| *b != 0));
            let before: Vec<u8> = rest.iter().chain(&old).copied().collect();
            let after: Vec<u8> = rest.iter().chain(&new).copied().collect();
            let field = slow(&before).to_be();
            let diff = difference(sum(&words::<4>(&old)), sum(&words::<4>(&new)));
            // 0x0000 and 0xffff are the same number in one's complement (RFC 1624 §3).
            let normal = |f: u16| if f == 0xffff { 0 } else { f };
            prop_assert_eq!(normal(u16::from_be(update(field, diff))), normal(slow(&after)));
        }
    }
}
