//! Kernels of Debian's packages, and their modules.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::apt;

/// Kernels for virtual machines: small, with virtiofs.
const CLOUD: &str = "linux-image-cloud-amd64";

/// An unpacked kernel.
pub(super) struct Kernel {
    /// `6.1.0-56-cloud-amd64`
    pub(super) version: String,
    /// The image that boots: a bzImage, or User Mode Linux's program.
    pub(super) image: PathBuf,
    /// The directory of its modules, with `modules.dep`.
    pub(super) modules: PathBuf,
}

/// The cloud kernel of a Debian release.
pub(super) fn kernel(cache: &Path, suite: &str) -> Result<Kernel> {
    let root = cache.join(format!("{suite}-cloud"));
    apt::unpacked(&root, &cache.join(format!("apt-{suite}")), suite, &[CLOUD])?;
    // From Debian 13 on, packages too know only /usr.
    let merged = root.join("usr/lib/modules");
    let modules = if merged.exists() {
        merged
    } else {
        root.join("lib/modules")
    };
    let (version, modules) = indexed(&root, &modules)?;
    let image = root.join(format!("boot/vmlinuz-{version}"));
    Ok(Kernel {
        version,
        image,
        modules,
    })
}

/// Debian 12's User Mode Linux.
pub(super) fn user_mode_linux(cache: &Path) -> Result<Kernel> {
    let root = cache.join("bookworm-uml");
    apt::unpacked(
        &root,
        &cache.join("apt-bookworm"),
        "bookworm",
        &["user-mode-linux"],
    )?;
    let (version, modules) = indexed(&root, &root.join("usr/lib/uml/modules"))?;
    let image = root.join("usr/bin/linux.uml");
    Ok(Kernel {
        version,
        image,
        modules,
    })
}

/// The one kernel version below `directory` and its modules, with `modules.dep` beside them.
fn indexed(root: &Path, directory: &Path) -> Result<(String, PathBuf)> {
    let modules = apt::only_entry(directory)?;
    let version = name_of(&modules);
    if !modules.join("modules.dep").exists() {
        // depmod looks below lib/modules alone.
        let view = root.join("view/lib/modules");
        fs::create_dir_all(&view)?;
        let link = view.join(&version);
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(&modules, &link)?;
        let status = Command::new("depmod")
            .arg("-b")
            .arg(root.join("view"))
            .arg(&version)
            .status();
        ensure!(
            status.context("vm: running depmod")?.success(),
            "vm: depmod {version} failed"
        );
    }
    Ok((version, modules))
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
