//! `cargo xtask bench [PART] [--output json]`: builds with optimisation, then runs `kun-bench`.

use std::process::Command;

use anyhow::{Result, ensure};

use crate::{build, command, setup, vm};

/// Flags of `bench`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// One part alone: ebpf, cni, dense, proxy, dns, nat64, bgp, cluster.
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
        // As it is shipped, below.
        "--exclude=kun-cni",
        "--bins",
    ]))?;
    build::plugin(false)?;
    let mut bench = Command::new(command::target().join("release/kun-bench"));
    bench
        .args(&arguments.part)
        .args(["--output", &arguments.output]);
    // What runs in the kernel is counted too, in instructions, which a busy machine does not change.
    if matches!(arguments.part.as_deref(), None | Some("ebpf" | "nat64")) {
        vm::setup()?;
        let rows = command::target().join("kun-instructions.json");
        let program = std::fs::canonicalize(bench.get_program())?;
        let mut words = vec![program.display().to_string(), "--instructions".to_owned()];
        words.extend(arguments.part.clone());
        eprintln!("counting instructions in a guest …");
        vm::count_instructions(&words, &rows)?;
        bench.arg("--rows").arg(rows);
    }
    // Rows out of budget are in the table; the exit code says so too.
    let status = bench.status()?;
    ensure!(
        status.success(),
        "a figure is out of its budget, or a part could not run"
    );
    Ok(())
}
