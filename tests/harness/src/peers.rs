//! Peers that `cargo xtask peers` builds: where they are.

use std::path::PathBuf;

use crate::skip;

/// Where `cargo xtask peers` leaves the programs.
pub fn directory() -> PathBuf {
    kun_ebpf_build::cache_dir().join("peers/bin")
}

/// Where it leaves this one.
pub fn path(name: &str) -> PathBuf {
    directory().join(name)
}

/// The program's path; `None`, with a skip recorded, when it is not built.
pub fn require(name: &str) -> Option<PathBuf> {
    let path = path(name);
    if path.is_file() {
        return Some(path);
    }
    skip(&format!("{name} is not built; `cargo xtask peers` does it"));
    None
}

/// The directory of the reference CNI plugins, as CNI_PATH takes it; `None`, with a skip recorded, when they are not built.
pub fn cni_plugins() -> Option<PathBuf> {
    let directory = kun_ebpf_build::cache_dir().join("peers/cni");
    if directory.join("bridge").is_file() {
        return Some(directory);
    }
    skip("the CNI plugins are not built; `cargo xtask peers` does it");
    None
}
