//! Directories of the cgroup trees, most often of v2's, wherever it is mounted (alone, or as the `unified` part of a hybrid).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::names;
use crate::process::{Process, kill_now};

/// Where cgroup v2 is mounted.
pub fn cgroup2_mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let (_device, directory, kind) = (fields.next()?, fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(directory))
        })
        .context("/proc/mounts: no cgroup2 is mounted; mount -t cgroup2 none /sys/fs/cgroup")
}

/// The roots of all hierarchies: v2, and the v1 controllers where the machine has them beside it.
pub fn cgroup_mounts() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    let roots = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (_device, directory, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2" || kind == "cgroup").then(|| PathBuf::from(directory))
    });
    Ok(roots.collect())
}

/// A cgroup directory; it, its children and the processes in them are gone on drop.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// A new directory below the root of the tree. Needs root.
    pub fn new() -> Result<Self> {
        names::sweep_once();
        Self::create(cgroup2_mount()?.join(names::unique("cg")))
    }

    /// A new child.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::create(self.path.join(name))
    }

    /// A new directory at exactly this path.
    pub fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("making the cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// A directory that exists, adopted: removed on drop.
    pub fn adopt(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Moves a process into it. Not the test's own, unless every test of the binary takes turns: what another thread starts
    /// meanwhile is born inside, and dies with the cgroup.
    pub fn add(&self, pid: u32) -> Result<()> {
        let file = self.path.join("cgroup.procs");
        fs::write(&file, pid.to_string())
            .with_context(|| format!("moving process {pid} into {}", file.display()))
    }

    /// The same command, entering the cgroup before its program starts: no syscall of the program happens outside.
    pub fn wrap(&self, command: &Command) -> Command {
        let mut wrapped = Command::new("/bin/sh");
        wrapped
            .arg("-c")
            .arg("echo $$ > \"$0\" && exec \"$@\"")
            .arg(self.path.join("cgroup.procs"))
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => wrapped.env(name, value),
                None => wrapped.env_remove(name),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            wrapped.current_dir(directory);
        }
        wrapped
    }

    /// Starts the command inside the cgroup, in the caller's network namespace. Redirections of the command are not kept:
    /// set them on what [`Cgroup::wrap`] gives.
    pub fn spawn(&self, command: &Command) -> Result<Process> {
        Process::spawn(&mut self.wrap(command))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    let Ok(entries) = fs::read_dir(path) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            remove(&entry.path());
        }
    }
    for pid in members(path) {
        kill_now(pid);
    }
    // A process leaves its cgroup a moment after it is gone from /proc.
    crate::wait_until(Duration::from_secs(2), || {
        fs::remove_dir(path).is_ok() || !path.exists()
    });
}

fn members(path: &Path) -> Vec<u32> {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

pub(crate) fn sweep() {
    let Ok(entries) = cgroup2_mount().and_then(|root| Ok(fs::read_dir(root)?)) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().to_str().is_some_and(names::orphaned) {
            remove(&entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_starts_inside_and_goes_with_it() {
        if !crate::require_root() {
            return;
        }
        let group = Cgroup::new().unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = group.spawn(&command).unwrap();
        let member = format!("{}\n", process.pid());
        let procs = group.path().join("cgroup.procs");
        crate::wait_for("the process in its cgroup", Duration::from_secs(5), || {
            (fs::read_to_string(&procs).ok()? == member).then_some(())
        })
        .unwrap();
        let path = group.path().to_owned();
        drop(process);
        drop(group);
        assert!(!path.exists());
    }
}
