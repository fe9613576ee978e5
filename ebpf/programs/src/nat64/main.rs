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

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use kun_ebpf_abi::nat64::Settings;
use kun_ebpf_abi::translate::{
    ErrorPacket, Verdict, error_to_four, error_to_six, four_to_six_plain, six_to_four_plain,
};

use crate::skb::Skb;
use crate::tables::Maps;

kun_ebpf_programs::license!();

const ETH_P_IP: u32 = (0x0800u16).to_be() as u32;
const ETH_P_IPV6: u32 = (0x86ddu16).to_be() as u32;

/// What the plain half leaves to the other.
const SLOW: u32 = u32::MAX;

/// Uplink, ingress: translates what is under Pref64 or to the pool, passes on the rest.
#[classifier]
pub fn nat64_uplink(ctx: TcContext) -> i32 {
    let Some(s) = tables::settings() else {
        return TC_ACT_UNSPEC;
    };
    let skb = ctx.skb.skb;
    // SAFETY: the kernel passes a valid context.
    let protocol = unsafe { (*skb).protocol };
    // In a map, not on the stack: there the verifier forgets what each path of the plain half knew about it, and goes through
    // the slow half once instead of once for each.
    let Some(error) = tables::error_packet() else {
        return TC_ACT_UNSPEC;
    };
    let mut code = match protocol {
        ETH_P_IPV6 => six(skb, s, error),
        ETH_P_IP => four(skb, s, error),
        _ => return TC_ACT_UNSPEC,
    };
    if code == SLOW {
        code = if protocol == ETH_P_IPV6 {
            six_error(skb, s, error)
        } else {
            four_error(skb, s, error)
        };
    }
    finish(code, s)
}

#[inline(always)]
fn finish(code: u32, s: &Settings) -> i32 {
    const PASS: u32 = Verdict::Pass.code();
    const TO_STACK: u32 = Verdict::ToStack.code();
    const SEND: u32 = Verdict::Send.code();
    match code {
        PASS | TO_STACK => TC_ACT_UNSPEC,
        // SAFETY: no parameters are passed, the kernel looks the next hop up.
        SEND => unsafe { bpf_redirect_neigh(s.uplink, core::ptr::null_mut(), 0, 0) as i32 },
        _ => {
            tables::count_reason(code.wrapping_sub(16));
            TC_ACT_SHOT
        }
    }
}

// One function each: the kernel gives a chain of calls 512 octets of stack, and siblings share them.

#[inline(never)]
fn six(skb: *mut __sk_buff, s: &Settings, error: &mut ErrorPacket) -> u32 {
    six_to_four_plain(&mut Skb(skb), &mut Maps, s, error).map_or(SLOW, Verdict::code)
}

#[inline(never)]
fn four(skb: *mut __sk_buff, s: &Settings, error: &mut ErrorPacket) -> u32 {
    four_to_six_plain(&mut Skb(skb), &mut Maps, s, error).map_or(SLOW, Verdict::code)
}

#[inline(never)]
fn six_error(skb: *mut __sk_buff, s: &Settings, error: &ErrorPacket) -> u32 {
    error_to_four(&mut Skb(skb), &mut Maps, s, error)
        .unwrap_or_else(Verdict::Drop)
        .code()
}

#[inline(never)]
fn four_error(skb: *mut __sk_buff, s: &Settings, error: &ErrorPacket) -> u32 {
    error_to_six(&mut Skb(skb), &mut Maps, s, error)
        .unwrap_or_else(Verdict::Drop)
        .code()
}
