//! `cargo xtask`: setup, test, lab, tidy, build, bench, ebpf, crds, peers, vm. Needs nothing but Rust to start; installs the rest by `setup`.

mod apt;
mod bench;
mod build;
mod command;
mod crds;
mod ebpf;
mod lab;
mod peers;
mod setup;
mod test;
mod tidy;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The tasks of the kun workspace.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what tests and the lab need; says what it installs.
    Setup(setup::Arguments),
    /// Everything that CI runs.
    Test(test::Arguments),
    /// Bring up a whole cluster network on this machine, probe it, take it down.
    Lab(lab::Arguments),
    /// Check the arrows between crates, the purity of the cores, module docs, and the ledgers.
    Tidy,
    /// Build what is shipped, with optimisation.
    Build(build::Arguments),
    /// Measure.
    Bench(bench::Arguments),
    /// Rebuild the eBPF objects.
    Ebpf {
        /// Rebuild and compare with the committed objects; change nothing.
        #[arg(long)]
        check: bool,
    },
    /// Write the CustomResourceDefinitions in deploy/crds/ as the Rust types have them.
    Crds {
        /// Compare with the committed ones; change nothing.
        #[arg(long)]
        check: bool,
    },
    /// Build the peers that Debian does not package in a current version: Kubernetes, containerd, CoreDNS and so on. Once, into the cache.
    Peers(peers::Arguments),
    /// Run a test binary under another kernel.
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().task {
        Task::Setup(arguments) => setup::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Lab(arguments) => lab::run(&arguments),
        Task::Tidy => tidy::run(),
        Task::Build(arguments) => build::run(&arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Ebpf { check } => ebpf::ebpf(check),
        Task::Crds { check } => crds::crds(check),
        Task::Peers(arguments) => peers::run(&arguments),
        // Its exit status is the command's.
        Task::Vm(arguments) => match vm::run(&arguments) {
            Ok(status) => return status,
            Err(e) => Err(e),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("xtask: {e:#}");
            ExitCode::FAILURE
        }
    }
}
