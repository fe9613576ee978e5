//! An skb as the translator's packet. Helpers read and write, so that fragments of a super-packet need no pulling.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_ADJ_ROOM_FIXED_GSO, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR,
    BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_NET,
};
use aya_ebpf::helpers::generated::{
    bpf_csum_diff, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_proto,
    bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use kun_ebpf_abi::translate::{Packet, sum};

use crate::tables;

/// The link header that the uplink's packets begin with.
const ETHERNET: u32 = 14;
/// Octets that [`Packet::sum`] covers at most.
const MAX_SUM: u32 = 9216;
/// Octets summed in one step.
pub(crate) const STEP: u32 = 512;

/// An skb.
pub(crate) struct Skb(pub(crate) *mut __sk_buff);

impl Packet for Skb {
    #[inline(always)]
    fn len(&self) -> u32 {
        // SAFETY: the kernel passes a valid context.
        unsafe { (*self.0).len }.wrapping_sub(ETHERNET)
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).gso_size }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, at: u32, into: &mut [u32; N]) -> bool {
        // SAFETY: `into` has room for 4·N octets; the helper checks the packet's end.
        unsafe {
            bpf_skb_load_bytes(
                self.0.cast(),
                at + ETHERNET,
                into.as_mut_ptr().cast(),
                4 * N as u32,
            ) == 0
        }
    }

    #[inline(always)]
    fn store<const N: usize>(&mut self, at: u32, words: &[u32; N]) -> bool {
        // SAFETY: `words` has 4·N octets; the helper checks the packet's end.
        unsafe {
            bpf_skb_store_bytes(
                self.0,
                at + ETHERNET,
                words.as_ptr().cast(),
                4 * N as u32,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            ) == 0
        }
    }

    #[inline(always)]
    fn store_half(&mut self, at: u32, half: u16) -> bool {
        // SAFETY: as above, with two octets.
        unsafe {
            bpf_skb_store_bytes(
                self.0,
                at + ETHERNET,
                (&raw const half).cast(),
                2,
                u64::from(BPF_F_RECOMPUTE_CSUM),
            ) == 0
        }
    }

    #[inline(always)]
    fn octet(&self, at: u32) -> Option<u8> {
        let mut o = MaybeUninit::<u8>::uninit();
        // SAFETY: one octet of room; read only when the helper has written it.
        unsafe {
            if bpf_skb_load_bytes(self.0.cast(), at + ETHERNET, o.as_mut_ptr().cast(), 1) != 0 {
                return None;
            }
            Some(o.assume_init())
        }
    }

    #[inline(always)]
    fn change_family(&mut self, to_six: bool) -> bool {
        let proto: u16 = if to_six { 0x86dd } else { 0x0800 };
        // SAFETY: the helper checks everything.
        unsafe { bpf_skb_change_proto(self.0, proto.to_be(), 0) == 0 }
    }

    #[inline(always)]
    fn make_room(&mut self, by: i32) -> bool {
        // SAFETY: the helper checks everything.
        unsafe {
            bpf_skb_adjust_room(
                self.0,
                by,
                BPF_ADJ_ROOM_NET,
                u64::from(BPF_F_ADJ_ROOM_FIXED_GSO),
            ) == 0
        }
    }

    #[inline(always)]
    fn trim(&mut self, len: u32) -> bool {
        // SAFETY: the helper checks everything.
        unsafe { bpf_skb_change_tail(self.0, len + ETHERNET, 0) == 0 }
    }

    #[inline(always)]
    fn fix_checksum(&mut self, at: u32, delta: u32, pseudo: bool, udp: bool) -> bool {
        let mut flags = 0;
        if pseudo {
            flags |= BPF_F_PSEUDO_HDR;
        }
        if udp {
            flags |= BPF_F_MARK_MANGLED_0;
        }
        // SAFETY: the helper checks everything.
        unsafe {
            bpf_l4_csum_replace(self.0, at + ETHERNET, 0, u64::from(delta), u64::from(flags)) == 0
        }
    }

    #[inline(always)]
    fn forget<const N: usize>(&mut self, values: &mut [u32; N]) {
        let Some(buffer) = tables::scratch() else {
            return;
        };
        let words: *mut u32 = buffer.cast();
        for (i, value) in values.iter_mut().enumerate() {
            // SAFETY: N is far below the buffer's length; volatile, so that the compiler does not see through it either.
            unsafe {
                words.add(i).write_volatile(*value);
                *value = words.add(i).read_volatile();
            }
        }
    }

    #[inline(always)]
    fn sum(&self, at: u32, len: u32) -> Option<u32> {
        let s = sum_octets(self.0, at, len);
        if s > u64::from(u32::MAX) {
            return None;
        }
        Some(s as u32)
    }
}

/// The sum, or a number beyond 32 bits. Through a scratch buffer in a map and the kernel's own loop: one written here costs
/// the verifier every iteration in every place that calls it.
#[inline(always)]
fn sum_octets(skb: *mut __sk_buff, at: u32, len: u32) -> u64 {
    const FAILED: u64 = u64::MAX;
    if len > MAX_SUM {
        return FAILED;
    }
    let Some(buffer) = tables::scratch() else {
        return FAILED;
    };
    let start: *mut u8 = buffer.cast();
    let mut o = at + ETHERNET;
    let mut left = len;
    let mut total = 0u32;
    for _ in 0..=MAX_SUM / STEP {
        if left == 0 {
            break;
        }
        let most = if left > STEP { STEP } else { left };
        // The compiler knows that this changes nothing and would leave it out, but verifiers before 6.8 do not know that a
        // number that is not 0 is at least 1: so it goes through memory.
        let mut less = [most - 1];
        Skb(skb).forget(&mut less);
        let n = (less[0] & (STEP - 1)) + 1;
        // SAFETY: n is at most STEP, and the buffer is four octets longer; the helpers check the packet's end.
        let sum = unsafe {
            if bpf_skb_load_bytes(skb.cast(), o, buffer.cast(), n) != 0 {
                return FAILED;
            }
            // What is left of the last word counts as zero.
            let end = start.add(n as usize);
            end.write(0);
            end.add(1).write(0);
            end.add(2).write(0);
            bpf_csum_diff(core::ptr::null_mut(), 0, buffer.cast(), (n + 3) & !3, 0)
        };
        if sum < 0 {
            return FAILED;
        }
        total = sum::add(total, sum as u32);
        o += STEP;
        left -= n;
    }
    u64::from(total)
}
