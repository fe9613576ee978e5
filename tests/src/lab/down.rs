//! Taking a lab down. Everything is found by the lab's name: processes by the namespaces and cgroups they are in, not by
//! remembered ids, so it works after a crash of anything and kills nothing else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kun_harness::{BpfFs, Cgroup, Netns, cgroup_mounts, netns_names};
use rustix::fs::{FlockOperation, flock};

use super::names::{LabName, RUN, STATE};

/// Held by whoever brings a lab up or takes it down.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Fails when another process holds it.
    pub fn take(name: &LabName) -> Result<Self> {
        fs::create_dir_all(RUN).with_context(|| format!("making {RUN}: labs need root"))?;
        let path = lock_path(name);
        let file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening {}: labs need root", path.display()))?;
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            bail!(
                "the lab `{}` is being brought up or down by another process; stop that, or give --name",
                name.as_str()
            );
        }
        Ok(Self { _file: file, path })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        release(&self.path);
    }
}

fn release(path: &Path) {
    let _ = fs::remove_file(path);
    // The directory goes with the last lab.
    let _ = fs::remove_dir(RUN);
}

/// For a process that holds the lock and is about to end: removes the lab and the lock's file. Twice, because another thread may
/// have been in the midst of making something.
pub fn down_and_release(name: &LabName) {
    down(name);
    down(name);
    release(&lock_path(name));
}

fn lock_path(name: &LabName) -> PathBuf {
    Path::new(RUN).join(format!("{}.lock", name.as_str()))
}

/// Whether anything of the lab is there.
pub fn stands(name: &LabName) -> bool {
    name.directory().exists()
        || name.state().exists()
        || netns_names().any(|netns| name.owns_netns(&netns))
}

/// The labs of this machine.
pub fn all() -> Vec<LabName> {
    let entries = fs::read_dir(RUN).into_iter().flatten().flatten();
    let named =
        entries.filter_map(|e| Some(e.file_name().to_str()?.trim_end_matches(".lock").to_owned()));
    let in_netns = netns_names()
        .filter_map(|n| Some(n.strip_prefix("kun-lab-")?.split_once('-')?.0.to_owned()));
    let mut names: Vec<String> = named.chain(in_netns).collect();
    names.sort();
    names.dedup();
    names
        .iter()
        .filter_map(|name| LabName::new(name).ok())
        .collect()
}

/// Removes everything; what is not there is no error.
pub fn down(name: &LabName) {
    // Processes first: they hold pins, sockets and mounts.
    for netns in netns_names().filter(|netns| name.owns_netns(netns)) {
        drop(Netns::adopt(&netns));
    }
    // Containers are in namespaces that the lab does not know by name, but in its cgroups.
    for root in cgroup_mounts().unwrap_or_default() {
        drop(Cgroup::adopt(name.cgroup(&root)));
    }
    let bpffs = name.directory().join("bpf");
    if bpffs.exists() {
        drop(BpfFs::adopt(bpffs));
    }
    let _ = fs::remove_dir_all(name.directory());
    let _ = fs::remove_dir_all(name.state());
    let _ = fs::remove_dir(STATE);
}

/// Everything of a lab that is on the machine, by its name: what must be gone when it is down.
pub fn traces(name: &LabName) -> Vec<String> {
    let mut traces: Vec<String> = netns_names()
        .filter(|netns| name.owns_netns(netns))
        .collect();
    let groups = cgroup_mounts().unwrap_or_default();
    let mut paths: Vec<PathBuf> = groups.iter().map(|root| name.cgroup(root)).collect();
    let directories = [name.directory(), name.state()];
    paths.extend(directories.clone());
    let there = paths.into_iter().filter(|path| path.exists());
    traces.extend(there.map(|path| path.display().to_string()));
    let ours = |line: &str| {
        directories
            .iter()
            .any(|d| line.contains(&*d.to_string_lossy()))
    };
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    // Mounts are in namespaces of their own: as long as a process is in one, they are there.
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let line = read(&process.path().join("cmdline")).replace('\0', " ");
        let mounts = read(&process.path().join("mounts"));
        if ours(&line) || mounts.lines().any(ours) {
            traces.push(format!("process {}: {line}", process.path().display()));
        }
    }
    traces
}
