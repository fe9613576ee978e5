//! The NAT64 gateway: one classifier at the uplink's tcx (or clsact) ingress.
//!
//! Everything that decides is `kun_ebpf_abi::translate`; here are the skb as its packet and the maps as its tables.
//! A translated packet leaves by `bpf_redirect_neigh` on the same uplink: it routes in the new family, resolves the neighbour
//! (queueing the packet meanwhile) and writes the link header. `bpf_fib_lookup` does neither of the last two and is GPL-only.
//! The programs do not check the uplink's MTU after that: the core did, for each segment of a super-packet.

#![no_std]
#![no_main]
#![allow(unsafe_code)]

mod skb;
mod tables;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use kun_ebpf_abi::nat64::{Settings, step};
use kun_ebpf_abi::reason::Reason;
use kun_ebpf_abi::translate::{Step, Verdict, Work, four, icmp, six};

use crate::skb::Skb;
use crate::tables::Maps;

kun_ebpf_programs::license!();

const ETH_P_IP: u32 = (0x0800u16).to_be() as u32;
const ETH_P_IPV6: u32 = (0x86ddu16).to_be() as u32;

/// Uplink, ingress: translates what is under Pref64 or to the pool, passes on the rest.
#[classifier]
pub fn nat64_uplink(ctx: TcContext) -> i32 {
    // SAFETY: the kernel passes a valid context.
    match unsafe { (*ctx.skb.skb).protocol } {
        ETH_P_IPV6 => go(&ctx, step::SIX_PARSE),
        ETH_P_IP => go(&ctx, step::FOUR_PARSE),
        _ => TC_ACT_UNSPEC,
    }
}

// Each step is a program of its own, called by tail, and what they tell each other lies in a map: the verifier goes through each
// once and not once for each way through those before it, and each has all of the stack. (Functions would do on new kernels;
// before 6.4 the verifier gives up tracking precision at a call, and with it nearly all pruning.)

/// Calls a step; comes back only when it is not there.
#[inline(always)]
fn go(ctx: &TcContext, index: u32) -> i32 {
    // SAFETY: the array holds programs of this object alone.
    unsafe { tables::STEPS.tail_call(ctx, index) };
    tables::count_reason(Reason::Malformed as u32);
    TC_ACT_SHOT
}

/// After a step: the one that its answer names among these, or the end.
#[inline(always)]
fn after(ctx: &TcContext, s: &Settings, done: Step, next: u32, exception: u32, error: u32) -> i32 {
    match done {
        Step::Next => go(ctx, next),
        Step::Exception => go(ctx, exception),
        Step::Error => go(ctx, error),
        Step::TooBig => go(ctx, step::TOO_BIG),
        Step::Seal => go(ctx, step::SEAL),
        Step::Done(Verdict::Pass | Verdict::ToStack) => TC_ACT_UNSPEC,
        // SAFETY: no parameters are passed, the kernel looks the next hop up.
        Step::Done(Verdict::Send) => unsafe {
            bpf_redirect_neigh(s.uplink, core::ptr::null_mut(), 0, 0) as i32
        },
        Step::Done(Verdict::Drop(reason)) => {
            tables::count_reason(reason as u32);
            TC_ACT_SHOT
        }
    }
}

/// Defines the program of a step: what it runs, and the steps after it (next, exception, error).
macro_rules! step {
    ($name:ident, |$p:ident, $s:ident, $w:ident| $run:expr, $next:expr, $exception:expr, $error:expr) => {
        #[doc = "A step."]
        #[classifier]
        pub fn $name(ctx: TcContext) -> i32 {
            let (Some($s), Some($w)) = (tables::settings(), tables::work()) else {
                return TC_ACT_UNSPEC;
            };
            let $p = &mut Skb(ctx.skb.skb);
            let done = Step::of($run);
            after(&ctx, $s, done, $next, $exception, $error)
        }
    };
}

step!(nat64_six_parse, |p, s, w| six::parse(p, &mut Maps, s, w), step::SIX_MAP, step::NONE, step::SIX_VERIFY);
step!(nat64_six_map, |_p, s, w| six::map(s, w), step::SIX_WRITE, step::SIX_EXCEPTION, step::NONE);
step!(nat64_six_exc, |_p, s, w| six::map_exception(&mut Maps, s, w), step::SIX_WRITE, step::NONE, step::NONE);
step!(nat64_six_write, |p, s, w| six::write(p, &mut Maps, s, w), step::NONE, step::NONE, step::NONE);
step!(nat64_six_check, |p, _s, w| icmp::verify(p, w), step::SIX_ERROR, step::NONE, step::NONE);
step!(nat64_six_error, |p, s, w| icmp::to_four(p, &mut Maps, s, w), step::NONE, step::NONE, step::NONE);
step!(nat64_four_parse, |p, s, w| four::parse(p, &mut Maps, s, w), step::FOUR_MAP, step::NONE, step::FOUR_VERIFY);
step!(nat64_four_map, |_p, s, w| four::map(s, w), step::FOUR_WRITE, step::FOUR_EXCEPTION, step::NONE);
step!(nat64_four_exc, |_p, _s, w| four::map_exception(&mut Maps, w), step::FOUR_WRITE, step::NONE, step::NONE);
step!(nat64_four_write, |p, s, w| four::write(p, &mut Maps, s, w), step::NONE, step::NONE, step::NONE);
step!(nat64_four_check, |p, _s, w| icmp::verify(p, w), step::FOUR_ERROR, step::NONE, step::NONE);
step!(nat64_four_error, |p, s, w| icmp::to_six(p, &mut Maps, s, w), step::NONE, step::NONE, step::NONE);
step!(nat64_too_big, |p, s, w| icmp::too_big(p, &mut Maps, s, w), step::NONE, step::NONE, step::NONE);
step!(nat64_seal, |p, _s, w| icmp::seal(p, w), step::NONE, step::NONE, step::NONE);
