//! `cargo xtask build`: what is shipped, with optimisation, in `target/release`.
//!
//! The plugin is linked statically: an image's init container places it on a host whose C library is the host's own, and a
//! process that is started for each pod pays for what its loader does. At a fixed address for the same reason, as Go's plugins
//! are; it opens no port and reads only what the runtime and the node's administrator write.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::command;

/// For the last of the plugin's crates alone: its dependencies are the other programs' too.
const STATIC: [&str; 4] = [
    "-C",
    "target-feature=+crt-static",
    "-C",
    "relocation-model=static",
];

/// Flags of `build`.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Fail rather than change Cargo.lock, as an image's build should.
    #[arg(long)]
    locked: bool,
}

/// The programs that images and packages hold.
const SHIPPED: [&str; 4] = ["kun-proxy", "kun-dns", "kun-operator", "kunctl"];

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut words = vec!["build", "--release"];
    words.extend(arguments.locked.then_some("--locked"));
    for package in SHIPPED {
        words.extend(["--package", package]);
    }
    command::run(&mut command::cargo(&words))?;
    plugin(arguments.locked)
}

/// Builds the plugin as it is shipped, and sees that it starts without anything of its host.
pub(crate) fn plugin(locked: bool) -> Result<()> {
    let mut words = vec!["rustc", "--release"];
    words.extend(locked.then_some("--locked"));
    words.extend(["--package", "kun-cni", "--bin", "kun-cni", "--"]);
    words.extend(STATIC);
    command::run(&mut command::cargo(&words))?;
    let program = command::target().join("release/kun-cni");
    let headers = Command::new("readelf")
        .arg("-lW")
        .arg(&program)
        .output()
        .context("readelf, which comes with the linker (binutils)")?;
    let text = String::from_utf8_lossy(&headers.stdout);
    ensure!(
        headers.status.success() && text.contains("LOAD") && !text.contains("INTERP"),
        "{}: not linked statically",
        program.display()
    );
    Ok(())
}
