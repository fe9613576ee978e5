//! `cargo xtask build`: what is shipped, with optimisation, in `target/release`.
//!
//! The plugin is linked statically, against musl: an image's init container places it on a host whose C library is the host's own,
//! and a process that is started for each pod pays for what its C library does before `main`. glibc asks the processor for its
//! caches there, in a virtual machine a trap each time, and reads its own mappings. At a fixed address for the same reason, as
//! Go's plugins are; it opens no port and reads only what the runtime and the node's administrator write.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::command;

/// For the last of the plugin's crates alone: its dependencies are the other programs' too.
const AT_A_FIXED_ADDRESS: [&str; 2] = ["-C", "relocation-model=static"];

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
    let triple = format!("{}-unknown-linux-musl", std::env::consts::ARCH);
    standard_library(&triple)?;
    let mut words = vec!["rustc", "--release", "--target", &triple];
    words.extend(locked.then_some("--locked"));
    words.extend(["--package", "kun-cni", "--bin", "kun-cni", "--"]);
    words.extend(AT_A_FIXED_ADDRESS);
    command::run(&mut command::cargo(&words))?;
    let built = command::target().join(&triple).join("release/kun-cni");
    let headers = Command::new("readelf")
        .arg("-lW")
        .arg(&built)
        .output()
        .context("readelf, which comes with the linker (binutils)")?;
    let text = String::from_utf8_lossy(&headers.stdout);
    ensure!(
        headers.status.success() && text.contains("LOAD") && !text.contains("INTERP"),
        "{}: not linked statically",
        built.display()
    );
    place(&built, &command::target().join("release/kun-cni"))
}

/// Beside the other programs. By a new name first: a plugin that runs cannot be written over.
fn place(built: &Path, program: &Path) -> Result<()> {
    let new = program.with_extension("new");
    let failed = || format!("placing {}", program.display());
    std::fs::create_dir_all(program.parent().unwrap_or(Path::new("."))).with_context(failed)?;
    std::fs::copy(built, &new).with_context(failed)?;
    std::fs::rename(&new, program).with_context(failed)
}

/// Gets the target's standard library where the compiler has none.
fn standard_library(triple: &str) -> Result<()> {
    let mut ask = Command::new("rustc");
    ask.current_dir(command::root())
        .args(["--print", "sysroot"]);
    let told = ask.output().context("rustc --print sysroot")?;
    ensure!(
        told.status.success(),
        "rustc --print sysroot: {}",
        told.status
    );
    let sysroot = String::from_utf8(told.stdout)?;
    let library = Path::new(sysroot.trim_end())
        .join("lib/rustlib")
        .join(triple);
    if library.exists() {
        return Ok(());
    }
    let mut add = Command::new("rustup");
    command::run(add.current_dir(command::root()).args(["target", "add", triple]))
        .context("the plugin needs Rust's standard library for musl; without rustup, install it from where the compiler came")
}
