//! Finds pods' network namespaces by what the kernel has recorded: the node's end of a pair names its other end's namespace by a
//! number, and each namespace that a runtime keeps, or that a process lives in, can be asked for its number.
//!
//! No path is remembered: paths are the runtimes', and a path that a pod left may lead to another pod by now. A number cannot,
//! as long as the pair is there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::netlink::{NetlinkError, Rtnl};
use crate::netns::Netns;

/// Where runtimes keep the namespaces of pods: containerd, CRI-O and podman; Docker.
const KEPT: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// Where the namespaces of processes are, which all pods have one of. Those of the node, where the agent sees them.
const PROCESSES: &str = "/proc";

/// Paths that are looked at in one search: several processes for each slot of the densest node. Beyond, a pod is not found.
const MAX_PATHS: usize = 1 << 16;

/// The namespaces of these numbers, as far as there are any to be found. `rtnl` is the node's.
pub(crate) fn find(
    rtnl: &mut Rtnl,
    mut wanted: BTreeSet<i32>,
) -> Result<BTreeMap<i32, Netns>, NetlinkError> {
    let mut found = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for path in kept().chain(of_processes()).take(MAX_PATHS) {
        if wanted.is_empty() {
            break;
        }
        let Ok(file) = rustix::fs::stat(&path) else {
            continue;
        };
        // Most processes share their namespace with others.
        if !seen.insert((file.st_dev, file.st_ino)) {
            continue;
        }
        // What is no namespace, is the node's own, or went away meanwhile is nobody's.
        let Ok(netns) = Netns::open(&path) else {
            continue;
        };
        if let Some(id) = rtnl.netns_id(netns.as_fd())?
            && wanted.remove(&id)
        {
            found.insert(id, netns);
        }
    }
    Ok(found)
}

fn kept() -> impl Iterator<Item = PathBuf> {
    KEPT.into_iter().flat_map(|path| inside(Path::new(path)))
}

fn of_processes() -> impl Iterator<Item = PathBuf> {
    inside(Path::new(PROCESSES))
        .filter(|path| path.file_name().is_some_and(is_number))
        .map(|path| path.join("ns/net"))
}

fn inside(directory: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = std::fs::read_dir(directory).ok();
    entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
}

fn is_number(name: &OsStr) -> bool {
    name.as_encoded_bytes().iter().all(u8::is_ascii_digit)
}
