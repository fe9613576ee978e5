//! A bpf file system of one's own.

use std::ffi::CStr;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::names;

const DIRECTORY: &str = "/run/kun-test";

/// A private bpffs, mounted at a directory of its own; pins in it are gone on drop.
#[derive(Debug)]
pub struct BpfFs {
    path: PathBuf,
}

impl BpfFs {
    /// Mounts one. Needs root.
    pub fn new() -> Result<Self> {
        names::sweep_once();
        Self::create(Path::new(DIRECTORY).join(names::unique("bpf")))
    }

    /// Mounts one at exactly this directory, which is made.
    pub fn create(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        if let Err(e) = mount(c"kun", &path, c"bpf", MountFlags::empty(), None::<&CStr>) {
            let _ = fs::remove_dir(&path);
            return Err(e).with_context(|| format!("mounting a bpffs at {}", path.display()));
        }
        Ok(Self { path })
    }

    /// A bpffs that is mounted, adopted: unmounted on drop.
    pub fn adopt(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets it stand.
    pub fn keep(self) {
        std::mem::forget(self);
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    let _ = unmount(path, UnmountFlags::DETACH);
    let _ = fs::remove_dir(path);
}

pub(crate) fn sweep() {
    let Ok(entries) = fs::read_dir(DIRECTORY) else {
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
    fn it_is_a_bpffs_and_goes() {
        if !crate::require_root() {
            return;
        }
        let bpffs = BpfFs::new().unwrap();
        let path = bpffs.path().to_owned();
        let kind = rustix::fs::statfs(&path).unwrap().f_type;
        assert_eq!(kind, 0xcafe_4a11, "BPF_FS_MAGIC");
        drop(bpffs);
        assert!(!path.exists());
    }
}
