//! A packet in ordinary memory: the core in userspace, for tests, for predictions and for `kunctl why`.

use super::{FOUR, Packet, SIX, sum};

/// A packet with room before it, as an skb has.
#[derive(Debug)]
pub struct Buffer<'a> {
    bytes: &'a mut [u8],
    start: usize,
    end: usize,
    segment: u32,
    six: bool,
}

/// Octets that [`Packet::sum`] covers at most.
pub(super) const MAX_SUM: u32 = 9216;

impl<'a> Buffer<'a> {
    /// The packet is `bytes[start..end]`; translation wants 68 octets before it.
    pub fn new(bytes: &'a mut [u8], start: usize, end: usize) -> Self {
        let end = end.min(bytes.len());
        let start = start.min(end);
        Buffer {
            six: bytes.get(start).is_some_and(|o| o >> 4 == 6),
            start,
            end,
            bytes,
            segment: 0,
        }
    }

    /// As a super-packet whose segments carry so many octets each.
    pub fn segmented(self, segment: u32) -> Self {
        Buffer { segment, ..self }
    }

    /// The packet as it is now.
    pub fn packet(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn slice(&self, at: u32, len: usize) -> Option<&[u8]> {
        self.packet().get(at as usize..)?.get(..len)
    }

    fn slice_mut(&mut self, at: u32, len: usize) -> Option<&mut [u8]> {
        self.bytes[self.start..self.end]
            .get_mut(at as usize..)?
            .get_mut(..len)
    }

    /// Moves the first `keep` octets by `by` towards the front (or the back, when negative).
    fn shift(&mut self, keep: usize, by: i32) -> bool {
        let Some(start) = self.start.checked_add_signed(-(by as isize)) else {
            return false;
        };
        if start + keep > self.end || self.start + keep > self.end {
            return false;
        }
        self.bytes.copy_within(self.start..self.start + keep, start);
        self.start = start;
        true
    }
}

impl Packet for Buffer<'_> {
    fn len(&self) -> u32 {
        (self.end - self.start) as u32
    }

    fn segment(&self) -> u32 {
        self.segment
    }

    fn load<const N: usize>(&self, at: u32, into: &mut [u32; N]) -> bool {
        let Some(from) = self.slice(at, N * 4) else {
            return false;
        };
        for (word, octets) in into.iter_mut().zip(from.chunks_exact(4)) {
            *word = u32::from_ne_bytes([octets[0], octets[1], octets[2], octets[3]]);
        }
        true
    }

    fn store<const N: usize>(&mut self, at: u32, words: &[u32; N]) -> bool {
        let Some(to) = self.slice_mut(at, N * 4) else {
            return false;
        };
        for (word, octets) in words.iter().zip(to.chunks_exact_mut(4)) {
            octets.copy_from_slice(&word.to_ne_bytes());
        }
        true
    }

    fn store_half(&mut self, at: u32, half: u16) -> bool {
        let Some(to) = self.slice_mut(at, 2) else {
            return false;
        };
        to.copy_from_slice(&half.to_ne_bytes());
        true
    }

    fn octet(&self, at: u32) -> Option<u8> {
        self.packet().get(at as usize).copied()
    }

    fn change_family(&mut self, to_six: bool) -> bool {
        let (old, new) = if to_six { (FOUR, SIX) } else { (SIX, FOUR) };
        if self.len() < old {
            return false;
        }
        self.six = to_six;
        self.shift(0, new as i32 - old as i32)
    }

    fn make_room(&mut self, by: i32) -> bool {
        let keep = if self.six { SIX } else { FOUR };
        self.shift(keep as usize, by)
    }

    fn trim(&mut self, len: u32) -> bool {
        if len > self.len() {
            return false;
        }
        self.end = self.start + len as usize;
        true
    }

    fn fix_checksum(&mut self, at: u32, delta: u32, _pseudo: bool, udp: bool) -> bool {
        let Some(field) = self.slice_mut(at, 2) else {
            return false;
        };
        let old = u16::from_ne_bytes([field[0], field[1]]);
        if udp && old == 0 {
            return true;
        }
        let new = match sum::adjust(old, delta) {
            0 if udp => 0xffff,
            v => v,
        };
        field.copy_from_slice(&new.to_ne_bytes());
        true
    }

    fn forget<const N: usize>(&mut self, _values: &mut [u32; N]) {}

    fn sum(&self, at: u32, len: u32) -> Option<u32> {
        if len > MAX_SUM {
            return None;
        }
        let octets = self.slice(at, len as usize)?;
        let mut total = 0u32;
        let mut words = octets.chunks_exact(4);
        for w in &mut words {
            total = sum::add(total, u32::from_ne_bytes([w[0], w[1], w[2], w[3]]));
        }
        let mut last = [0u8; 4];
        let rest = words.remainder();
        last[..rest.len()].copy_from_slice(rest);
        Some(sum::add(total, u32::from_ne_bytes(last)))
    }
}
