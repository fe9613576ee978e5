//! The service dataplane's programs: glue between the hooks and the core in `kun_ebpf_abi::service`, which decides.
//!
//! | program | type | hook |
//! |---|---|---|
//! | `pod_ingress` | classifier | ingress of a pod's veth on the node: what the pod sends |
//! | `pod_egress` | classifier | egress of a pod's veth on the node: what reaches the pod |
//! | `uplink_ingress`, `uplink_egress` | classifier | the uplink |
//! | `connect4`, `connect6`, `getpeername4`, `getpeername6` | sock_addr | the cgroup of the pods and of the node's own processes |
//! | `sendmsg4`, `sendmsg6`, `recvmsg4`, `recvmsg6` | sock_addr | the same: UDP of the node's own processes |
//!
//! Map capacities are the loader's; those here are the least that load.

#![no_std]
#![no_main]

mod maps;
mod skb;
mod sock;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use kun_ebpf_abi::service::steer::{self, Verdict};

use crate::maps::Kernel;
use crate::skb::Skb;

kun_ebpf_programs::license!();

#[classifier]
fn pod_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    act(&ctx, steer::from_pod(&mut skb, &mut Kernel))
}

#[classifier]
fn pod_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    act(&ctx, steer::to_client(&mut skb, &mut Kernel))
}

#[classifier]
fn uplink_ingress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    act(&ctx, steer::from_uplink(&mut skb, &mut Kernel))
}

#[classifier]
fn uplink_egress(ctx: TcContext) -> i32 {
    let mut skb = Skb::new(&ctx);
    act(&ctx, steer::to_client(&mut skb, &mut Kernel))
}

/// UNSPEC is "no opinion" to clsact and NEXT to tcx (both −1): other programs of the chain still run.
#[inline(always)]
fn act(ctx: &TcContext, verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Pass => TC_ACT_UNSPEC,
        Verdict::Drop => TC_ACT_SHOT,
        Verdict::Bounce => skb::bounce(ctx).unwrap_or(TC_ACT_SHOT),
        // A flood with forged senders must not become one of ours.
        Verdict::Unreachable if !maps::may_answer() => TC_ACT_SHOT,
        Verdict::Unreachable => skb::unreachable(ctx).unwrap_or(TC_ACT_SHOT),
    }
}
