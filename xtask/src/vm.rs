//! `cargo xtask vm`: runs a command under another kernel, with this machine's files visible.

use anyhow::{Result, bail};

/// Flags of `vm`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// The command and its arguments.
    #[arg(trailing_var_arg = true)]
    pub(crate) command: Vec<String>,
}

pub(crate) fn run(_arguments: &Arguments) -> Result<()> {
    bail!("vm: no guest is described in this tree yet")
}

/// Installs the kernels and the emulator.
pub(crate) fn setup() -> Result<()> {
    bail!("setup --vm: no guest is described in this tree yet")
}
