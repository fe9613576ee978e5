//! `cargo xtask`: setup, test, lab, tidy, bench, ebpf, vm.

fn main() {}
