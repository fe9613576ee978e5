//! The service dataplane's programs.
#![no_std]
#![no_main]

use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::PerCpuArray;
use aya_ebpf::programs::TcContext;
use kun_ebpf_abi::reason::{REASONS, Reason};
use kun_ebpf_programs::packet;

kun_ebpf_programs::license!();

/// Packets dropped and connects refused, by [`Reason`].
#[map(name = "reasons")]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(REASONS, 0);

#[classifier]
fn pod_ingress(ctx: TcContext) -> i32 {
    if packet::at::<[u8; 14]>(&ctx, 0).is_none() {
        if let Some(counter) = COUNTERS.get_ptr_mut(Reason::Malformed as u32) {
            // SAFETY: a per-CPU slot of the map, which no other program uses on this CPU meanwhile.
            unsafe { *counter += 1 };
        }
    }
    -1
}
