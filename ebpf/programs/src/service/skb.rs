//! A packet in an skb: read in place, written through the helpers, which copy a shared packet only when it is written.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC,
};
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_change_tail, bpf_skb_pull_data};
use aya_ebpf::programs::TcContext;
use kun_ebpf_abi::service::packet::{ETHERNET, L4Fix, Packet, unreachable_v4, unreachable_v6};
use kun_ebpf_programs::packet;

/// Enough for Ethernet, IPv4 with options or IPv6, and TCP.
const HEADERS: u32 = 14 + 60 + 20;

/// Tells the checksum helper that no IPv4 header checksum offsets the change (kernel ≥ 6.16; fixes a checksum that the NIC
/// computed over the whole packet).
const BPF_F_IPV6: u64 = 1 << 7;

/// The packet of one program run.
pub(crate) struct Skb<'a> {
    ctx: &'a TcContext,
}

impl<'a> Skb<'a> {
    /// Makes the headers readable in place where they are not yet.
    #[inline(always)]
    pub(crate) fn new(ctx: &'a TcContext) -> Self {
        let linear = (ctx.data_end() - ctx.data()) as u32;
        if linear < HEADERS && linear < ctx.len() {
            let want = if ctx.len() < HEADERS {
                ctx.len()
            } else {
                HEADERS
            };
            // SAFETY: the context is the program's own. When it fails, reading stops at what is there.
            unsafe { bpf_skb_pull_data(ctx.skb.skb, want) };
        }
        Skb { ctx }
    }
}

impl Packet for Skb<'_> {
    #[inline(always)]
    fn read<const N: usize>(&self, at: usize) -> Option<[u32; N]> {
        // SAFETY: `at` checked that the octets are there. The words may lie across their natural alignment, which every
        // kernel with a BPF JIT that we run on loads as well (the verifier refuses it elsewhere); the claim of alignment is
        // what makes the compiler load words and not octets.
        packet::at::<[u32; N]>(self.ctx, at).map(|p| unsafe { *p })
    }

    #[inline(always)]
    fn read_half(&self, at: usize) -> Option<u16> {
        // SAFETY: as above.
        packet::at::<u16>(self.ctx, at).map(|p| unsafe { *p })
    }

    #[inline(always)]
    fn write<const N: usize>(&mut self, at: usize, words: &[u32; N]) -> Option<()> {
        self.ctx.store(at, words, 0).ok()
    }

    #[inline(always)]
    fn fix_l3(&mut self, at: usize, diff: u32) -> Option<()> {
        self.ctx.l3_csum_replace(at, 0, u64::from(diff), 0).ok()
    }

    #[inline(always)]
    fn fix_l4(&mut self, at: usize, diff: u32, fix: L4Fix) -> Option<()> {
        let mut flags = 0;
        if fix.pseudo {
            flags |= u64::from(BPF_F_PSEUDO_HDR);
        }
        if fix.udp {
            flags |= u64::from(BPF_F_MARK_MANGLED_0);
        }
        let diff = u64::from(diff);
        if fix.v6
            && fix.pseudo
            && self
                .ctx
                .l4_csum_replace(at, 0, diff, flags | BPF_F_IPV6)
                .is_ok()
        {
            return Some(());
        }
        self.ctx.l4_csum_replace(at, 0, diff, flags).ok()
    }
}

/// Sends the packet back: MAC addresses exchanged, out of the interface that it came in by.
#[inline(always)]
pub(crate) fn bounce(ctx: &TcContext) -> Option<i32> {
    let mac: [u8; 12] = ctx.load(0).ok()?;
    let [a, b, c, d, e, f, g, h, i, j, k, l] = mac;
    ctx.store(0, &[g, h, i, j, k, l, a, b, c, d, e, f], 0)
        .ok()?;
    // SAFETY: the context is the program's own.
    let interface = unsafe { (*ctx.skb.skb).ifindex };
    // SAFETY: takes numbers only.
    Some(unsafe { bpf_redirect(interface, 0) } as i32)
}

/// Turns the packet into "port unreachable" to its sender and sends it back.
///
/// Of the packet go its IP header and eight bytes: enough for the sender's stack to find the socket, and a fixed length, over
/// which the verifier lets a checksum be computed. IPv4 with options is dropped: its header has another length.
///
/// A function of its own, and one for each family: the stack of a caller and a callee together is 512 bytes.
#[inline(always)]
pub(crate) fn unreachable(ctx: &TcContext) -> Option<i32> {
    let first: u8 = ctx.load(ETHERNET).ok()?;
    let done = match first >> 4 {
        4 => first == 0x45 && answer_v4(ctx.skb.skb),
        6 => answer_v6(ctx.skb.skb),
        _ => false,
    };
    if done { bounce(ctx) } else { None }
}

#[inline(never)]
fn answer_v4(skb: *mut __sk_buff) -> bool {
    let ctx = TcContext::new(skb);
    let Ok(inner) = ctx.load::<[u32; 7]>(ETHERNET) else {
        return false;
    };
    grow::<28>(&ctx) && ctx.store(ETHERNET, &unreachable_v4(&inner), 0).is_ok()
}

#[inline(never)]
fn answer_v6(skb: *mut __sk_buff) -> bool {
    let ctx = TcContext::new(skb);
    let Ok(inner) = ctx.load::<[u32; 12]>(ETHERNET) else {
        return false;
    };
    grow::<48>(&ctx) && ctx.store(ETHERNET, &unreachable_v6(&inner), 0).is_ok()
}

/// Cuts the packet to `N` bytes after the Ethernet header and makes as much room before them.
#[inline(always)]
fn grow<const N: usize>(ctx: &TcContext) -> bool {
    // SAFETY: the context is the program's own.
    let cut = unsafe { bpf_skb_change_tail(ctx.as_ptr().cast(), (ETHERNET + N) as u32, 0) };
    cut == 0 && ctx.adjust_room(N as i32, BPF_ADJ_ROOM_MAC, 0).is_ok()
}
