//! `cargo xtask`: setup, test, lab, tidy, bench, ebpf, vm.

mod ebpf;

fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ebpf"] => ebpf::ebpf(false),
        ["ebpf", "--check"] => ebpf::ebpf(true),
        ["setup", "--ebpf"] => ebpf::install_toolchain(),
        _ => anyhow::bail!("cargo xtask ebpf [--check] | setup --ebpf"),
    }
}
