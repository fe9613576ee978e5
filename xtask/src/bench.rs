//! `cargo xtask bench [PART] [--output json]`: builds with optimisation, then runs `kun-bench`.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::{command, setup};

/// Flags of `bench`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// One part alone: ebpf, cni, proxy, dns, nat64, bgp, cluster.
    part: Option<String>,
    /// `table` or `json`.
    #[arg(long, default_value = "table")]
    output: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    setup::packages(setup::PACKAGES)?;
    command::run(&mut command::cargo(&[
        "build",
        "--release",
        "--workspace",
        "--bins",
    ]))?;
    let mut bench = Command::new(command::target().join("release/kun-bench"));
    bench
        .args(&arguments.part)
        .args(["--output", &arguments.output]);
    // Rows out of budget are in the table; the exit code says so too.
    let status = bench.status()?;
    ensure!(
        status.success(),
        "a figure is out of its budget, or a part could not run"
    );
    Ok(())
}
