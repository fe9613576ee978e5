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
use kun_ebpf_abi::translate::{Step, Verdict, Work, four, icmp, six};

use crate::skb::Skb;
use crate::tables::Maps;

kun_ebpf_programs::license!();

const ETH_P_IP: u32 = (0x0800u16).to_be() as u32;
const ETH_P_IPV6: u32 = (0x86ddu16).to_be() as u32;

/// Uplink, ingress: translates what is under Pref64 or to the pool, passes on the rest.
#[classifier]
pub fn nat64_uplink(ctx: TcContext) -> i32 {
    let Some(s) = tables::settings() else {
        return TC_ACT_UNSPEC;
    };
    let skb = ctx.skb.skb;
    // SAFETY: the kernel passes a valid context.
    let protocol = unsafe { (*skb).protocol };
    let Some(w) = tables::work() else {
        return TC_ACT_UNSPEC;
    };
    let code = match protocol {
        ETH_P_IPV6 => from_six(skb, s, w),
        ETH_P_IP => from_four(skb, s, w),
        _ => return TC_ACT_UNSPEC,
    };
    finish(code, s)
}

#[inline(always)]
fn from_six(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    let mut code = six_parse(skb, s, w);
    if code == Step::ERROR {
        code = verify(skb, w);
        if code == Step::NEXT {
            code = six_error(skb, s, w);
        }
        if code == Step::SEAL {
            code = seal(skb, w);
        }
        return code;
    }
    if code == Step::NEXT {
        code = six_map(s, w);
    }
    if code == Step::EXCEPTION {
        code = six_exception(s, w);
    }
    if code == Step::NEXT {
        code = six_write(skb, s, w);
    }
    code
}

#[inline(always)]
fn from_four(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    let mut code = four_parse(skb, s, w);
    if code == Step::ERROR {
        code = verify(skb, w);
        if code == Step::NEXT {
            code = four_error(skb, s, w);
        }
    }
    if code == Step::NEXT {
        code = four_map(s, w);
    }
    if code == Step::EXCEPTION {
        code = four_exception(w);
    }
    if code == Step::NEXT {
        code = four_write(skb, s, w);
    }
    if code == Step::TOO_BIG {
        code = four_too_big(skb, s, w);
    }
    if code == Step::SEAL {
        code = seal(skb, w);
    }
    code
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

// One function each, with what they tell each other in a map: the verifier goes through each once, and the kernel gives a chain
// of calls 512 octets of stack, which siblings share.

#[inline(never)]
fn six_parse(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    Step::of(six::parse(&mut Skb(skb), &mut Maps, s, w)).code()
}

#[inline(never)]
fn six_map(s: &Settings, w: &mut Work) -> u32 {
    Step::of(six::map(s, w)).code()
}

#[inline(never)]
fn six_exception(s: &Settings, w: &mut Work) -> u32 {
    Step::of(six::map_exception(&mut Maps, s, w)).code()
}

#[inline(never)]
fn six_write(skb: *mut __sk_buff, s: &Settings, w: &Work) -> u32 {
    Step::of(six::write(&mut Skb(skb), &mut Maps, s, w)).code()
}

#[inline(never)]
fn six_error(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    Step::of(icmp::to_four(&mut Skb(skb), &mut Maps, s, w)).code()
}

#[inline(never)]
fn verify(skb: *mut __sk_buff, w: &Work) -> u32 {
    Step::of(icmp::verify(&Skb(skb), w)).code()
}

#[inline(never)]
fn seal(skb: *mut __sk_buff, w: &Work) -> u32 {
    Step::of(icmp::seal(&mut Skb(skb), w)).code()
}

#[inline(never)]
fn four_parse(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    Step::of(four::parse(&mut Skb(skb), &mut Maps, s, w)).code()
}

#[inline(never)]
fn four_map(s: &Settings, w: &mut Work) -> u32 {
    Step::of(four::map(s, w)).code()
}

#[inline(never)]
fn four_exception(w: &mut Work) -> u32 {
    Step::of(four::map_exception(&mut Maps, w)).code()
}

#[inline(never)]
fn four_write(skb: *mut __sk_buff, s: &Settings, w: &Work) -> u32 {
    Step::of(four::write(&mut Skb(skb), &mut Maps, s, w)).code()
}

#[inline(never)]
fn four_error(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    Step::of(icmp::to_six(&mut Skb(skb), &mut Maps, s, w)).code()
}

#[inline(never)]
fn four_too_big(skb: *mut __sk_buff, s: &Settings, w: &mut Work) -> u32 {
    Step::of(icmp::too_big(&mut Skb(skb), &mut Maps, s, w)).code()
}
