//! `cargo xtask peers`: builds what tests run beside kun and no package of Debian's offers, once, into the cache.
//!
//! So far the Kubernetes control plane (`tests/control-plane/`, the only Go in the project). Needs Go 1.21 or later, which fetches the
//! exact toolchain that `go.mod` names; takes about ten CPU minutes the first time.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use crate::command;

const CONTROL_PLANE: &str = "tests/control-plane";

/// Builds what is missing or older than its sources.
pub(crate) fn run() -> Result<()> {
    let sources = command::root().join(CONTROL_PLANE);
    let bin = kun_ebpf_build::cache_dir().join("peers/bin");
    let (binary, stamp) = (
        bin.join("kun-control-plane"),
        bin.join("kun-control-plane.sources"),
    );
    let digest = digest(&sources)?;
    if binary.is_file() && std::fs::read_to_string(&stamp).is_ok_and(|s| s == digest) {
        println!("peers: kun-control-plane is built");
        return Ok(());
    }
    let go = Command::new("go").arg("version").output();
    ensure!(
        go.is_ok_and(|o| o.status.success()),
        "peers: no `go` in PATH; install Go 1.21 or later (the control plane for tests is Kubernetes' own source)"
    );
    std::fs::create_dir_all(&bin).with_context(|| bin.display().to_string())?;
    let version = kubernetes_version(&sources)?;
    let minor = version.split('.').nth(1).unwrap_or_default();
    let set = "k8s.io/component-base/version";
    println!(
        "peers: building kun-control-plane (Kubernetes {version}); the first time takes about ten CPU minutes"
    );
    command::run(
        Command::new("go")
            .current_dir(&sources)
            .args(["build", "-trimpath", "-buildvcs=false", "-ldflags"])
            .arg(format!(
                "-s -w -X {set}.gitVersion={version} -X {set}.gitMajor=1 -X {set}.gitMinor={minor}"
            ))
            .arg("-o")
            .arg(&binary)
            .arg("."),
    )?;
    std::fs::write(&stamp, digest).with_context(|| stamp.display().to_string())
}

/// `v1.37.2` of the `require` line.
fn kubernetes_version(sources: &Path) -> Result<String> {
    let path = sources.join("go.mod");
    let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("k8s.io/kubernetes "))
        .map(str::to_owned)
        .with_context(|| format!("{}: requires no k8s.io/kubernetes", path.display()))
}

/// One digest over the module's files, by name.
fn digest(sources: &Path) -> Result<String> {
    let mut files: Vec<_> = std::fs::read_dir(sources)
        .with_context(|| sources.display().to_string())?
        .map(|entry| entry.map(|e| e.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    let mut hash = Sha256::new();
    for file in files.iter().filter(|f| f.is_file()) {
        hash.update(file.file_name().unwrap_or_default().as_encoded_bytes());
        hash.update(std::fs::read(file).with_context(|| file.display().to_string())?);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}
