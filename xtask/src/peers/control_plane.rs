//! The Kubernetes control plane (`tests/control-plane/`, the only Go in the project): Kubernetes and etcd as modules of one binary.

use std::path::Path;

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use super::go::Go;
use super::{Item, Source};
use crate::command;

const SOURCES: &str = "tests/control-plane";
const PROGRAM: &str = "kun-control-plane";

pub(super) fn item() -> Result<Item> {
    let sources = command::root().join(SOURCES);
    Ok(Item {
        name: "control-plane",
        version: kubernetes_version(&sources)?,
        what_for: "kube-apiserver, etcd, controllers, scheduler, kubelet and kubectl: the cluster of tests and lab",
        parts: &["cluster", "proxy"],
        programs: vec![Path::new("bin").join(PROGRAM)],
        stamp: digest(&sources)?,
        source: Source::ControlPlane,
    })
}

/// Leaves the program in `into`.
pub(super) fn build(go: &Go, into: &Path) -> Result<()> {
    let sources = command::root().join(SOURCES);
    let version = kubernetes_version(&sources)?;
    let minor = version.split('.').nth(1).unwrap_or_default();
    let set = "k8s.io/component-base/version";
    let flags = format!(
        "-s -w -X {set}.gitVersion={version} -X {set}.gitMajor=1 -X {set}.gitMinor={minor}"
    );
    // With cgo, as the kubelet of Kubernetes' releases is.
    let mut build = go.command("build", true);
    build
        .current_dir(&sources)
        .arg(format!("-ldflags={flags}"))
        .arg("-o")
        .arg(into.join(PROGRAM))
        .arg(".");
    command::run(&mut build)
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
