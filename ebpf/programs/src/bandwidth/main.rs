//! Bandwidth limits of pods: the bucket of a pod's direction decides about each packet; `kun_ebpf_abi::bandwidth` says how.
//!
//! | program | hook |
//! |---|---|
//! | `limit_ingress` | ingress of a pod's veth on the node, before the service programs: what the pod sends |
//! | `limit_egress` | egress of a pod's veth on the node, before the service programs: what reaches the pod |
//!
//! Before the service programs, since those may send a packet elsewhere and so end the chain; they never change its length.
//! Only interfaces of pods with a limit carry these programs: nobody else pays for them.

#![no_std]
#![no_main]
// The bpf target has the instructions of compare-and-exchange and says that it has not, so `core::sync::atomic` lacks them.
#![allow(internal_features)]
#![feature(core_intrinsics)]

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, HashMap};
use aya_ebpf::programs::TcContext;
use kun_ebpf_abi::bandwidth::{Bucket, Clock, Limits, Octets, Verdict, admit, wire_length};

kun_ebpf_programs::license!();

#[map(name = "limited")]
static LIMITED: HashMap<u32, Limits> = HashMap::with_max_entries(1, BPF_F_NO_PREALLOC);

#[map(name = "buckets")]
static BUCKETS: Array<Bucket> = Array::with_max_entries(1, BPF_F_MMAPABLE);

#[classifier]
fn limit_ingress(ctx: TcContext) -> i32 {
    limit(&ctx, |limits| limits.sends)
}

#[classifier]
fn limit_egress(ctx: TcContext) -> i32 {
    limit(&ctx, |limits| limits.receives)
}

/// UNSPEC is "no opinion" to clsact and NEXT to tcx (both −1): the service programs run next.
#[inline(always)]
fn limit(ctx: &TcContext, number: fn(&Limits) -> u32) -> i32 {
    let skb = ctx.skb.skb;
    // SAFETY: the context is the program's own.
    let interface = unsafe { (*skb).ifindex };
    // SAFETY: the element lives until the program ends (RCU, no preallocation).
    let Some(limits) = (unsafe { LIMITED.get(interface) }) else {
        return TC_ACT_UNSPEC;
    };
    // Counted from one; 0, no bucket, is no index of the array either.
    let Some(bucket) = BUCKETS.get_ptr_mut(number(limits).wrapping_sub(1)) else {
        return TC_ACT_UNSPEC;
    };
    // SAFETY: an element of the array; user space may store to a word of it meanwhile, which this packet then sees or not.
    let terms = unsafe { (&raw const (*bucket).terms).read_volatile() };
    // SAFETY: the context is the program's own.
    let segment = unsafe { (*skb).gso_size };
    let bytes = wire_length(&Packet(ctx), ctx.len(), segment);
    // SAFETY: takes nothing, returns a number.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the element's first word.
    let clock = Word(unsafe { &raw mut (*bucket).next });
    match admit(&clock, &terms, bytes, now) {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::At(then) => {
            // SAFETY: the context is the program's own; the queue of the interface reads it.
            unsafe { (*skb).tstamp = then };
            TC_ACT_UNSPEC
        }
        Verdict::Drop => {
            // SAFETY: words of the element.
            unsafe {
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(
                    &raw mut (*bucket).dropped_packets,
                    1,
                );
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(
                    &raw mut (*bucket).dropped_bytes,
                    bytes,
                );
            }
            TC_ACT_SHOT
        }
    }
}

/// The clock of a bucket.
struct Word(*mut u64);

impl Clock for Word {
    #[inline(always)]
    fn load(&self) -> u64 {
        // SAFETY: the word that `limit` took from the map.
        unsafe { self.0.read_volatile() }
    }

    #[inline(always)]
    fn exchange(&self, old: u64, new: u64) -> Result<(), u64> {
        // SAFETY: as above.
        let (held, done) = unsafe {
            atomic_cxchg::<u64, { AtomicOrdering::SeqCst }, { AtomicOrdering::SeqCst }>(
                self.0, old, new,
            )
        };
        if done { Ok(()) } else { Err(held) }
    }
}

struct Packet<'a>(&'a TcContext);

impl Octets for Packet<'_> {
    #[inline(always)]
    fn octet(&self, at: usize) -> Option<u8> {
        // Through the helper: only super-packets are asked, and their headers need not be in the linear part.
        self.0.load(at).ok()
    }
}
