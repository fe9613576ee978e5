//! What the programs share: the context of a packet, and counting a reason.
//!
//! How to build: `cargo xtask ebpf` from the workspace's root compiles every `[[bin]]` of this crate to one BPF object and
//! puts it, with its manifest entry, into `ebpf/loader/prebuilt/`, where it is committed. `cargo xtask setup --ebpf` installs
//! what that needs. A bin is `#![no_std] #![no_main]`, uses this crate for its panic handler, declares its maps with
//! `#[map]` (the definitions without BTF, so that kernels without it load them) and its licence section with [`license!`].
//!
//! What the verifier wants from the sources: every byte of a packet read behind a check against `data_end` in the same
//! function (so: `#[inline(always)]` everywhere), no slice indexing (it panics; use pointers of [`Packet`]), at most 512 bytes
//! of stack, no `u128`, no division by a signed number.

#![no_std]

pub mod packet;

/// Puts the licence, which the kernel asks for. It is not compatible with the GPL: helpers that are GPL-only
/// (`bpf_fib_lookup`, `bpf_trace_printk`) are refused at load.
#[macro_export]
macro_rules! license {
    () => {
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 11] = *b"Apache-2.0\0";
    };
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {}
}
