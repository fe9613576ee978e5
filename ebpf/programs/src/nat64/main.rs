//! The NAT64 gateway's programs.
#![no_std]
#![no_main]

kun_ebpf_programs::license!();
