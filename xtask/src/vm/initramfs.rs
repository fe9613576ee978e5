//! The initramfs of a QEMU guest: busybox, the modules that mount the root, two scripts. Written as a "newc" archive, the format of the
//! kernel's Documentation/driver-api/early-userspace/buffer-format.rst.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::kernels::Kernel;

/// What stands between the kernel and its root.
const MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "overlay", "virtiofs"];

/// The whole archive.
pub(super) fn build(kernel: &Kernel, init: &str, command: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["bin", "modules", "dev", "proc", "sys", "lower", "up", "new"] {
        archive.add(directory, 0o040_755, &[]);
    }
    let busybox = ["/usr/bin/busybox", "/bin/busybox"]
        .iter()
        .find_map(|p| fs::read(p).ok());
    archive.add(
        "bin/busybox",
        0o100_755,
        &busybox.context("vm: no busybox")?,
    );
    for (n, file) in with_dependencies(kernel)?.iter().enumerate() {
        archive.add(
            &format!("modules/{n:03}.ko"),
            0o100_644,
            &module(&kernel.modules.join(file))?,
        );
    }
    archive.add("init", 0o100_755, init.as_bytes());
    archive.add("command", 0o100_644, command.as_bytes());
    Ok(archive.finish())
}

/// The files of [`MODULES`] that are not built in, each after what it needs.
fn with_dependencies(kernel: &Kernel) -> Result<Vec<String>> {
    let read = |name: &str| {
        let path = kernel.modules.join(name);
        fs::read_to_string(&path).with_context(|| format!("vm: reading {}", path.display()))
    };
    let (depends, builtin) = (read("modules.dep")?, read("modules.builtin")?);
    let mut order: Vec<String> = Vec::new();
    let mut seen = BTreeSet::new();
    for module in MODULES {
        if builtin.lines().any(|line| is_module(line, module)) {
            continue;
        }
        let line = depends
            .lines()
            .find(|line| is_module(line.split(':').next().unwrap_or_default(), module));
        let line =
            line.with_context(|| format!("vm: {} has no module {module}", kernel.version))?;
        let (file, needs) = line
            .split_once(':')
            .context("vm: modules.dep: a line without a colon")?;
        // modules.dep lists what is needed last-first.
        for file in needs.split_whitespace().rev().chain([file]) {
            if seen.insert(file.to_owned()) {
                order.push(file.to_owned());
            }
        }
    }
    Ok(order)
}

/// Whether a path is that of `module`, plain or compressed; `-` and `_` are one.
fn is_module(path: &str, module: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    name.split(".ko")
        .next()
        .is_some_and(|stem| stem.replace('-', "_") == module)
}

fn module(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|e| e == "xz") {
        let output = Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .context("vm: running xz")?;
        ensure!(
            output.status.success(),
            "vm: xz cannot unpack {}",
            path.display()
        );
        return Ok(output.stdout);
    }
    fs::read(path).with_context(|| format!("vm: reading {}", path.display()))
}

/// An archive in the making.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        let size = u32::try_from(content.len()).expect("a member below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("a short name");
        // Magic, then inode, mode, uid, gid, links, mtime, size, device ×2, rdevice ×2, name's size, checksum: eight hex digits each.
        self.bytes.extend_from_slice(b"070701");
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", 0, &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_where_the_kernel_looks_for_them() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081a4");
        // A header of 110 bytes and "a\0" end at 112, a multiple of four.
        assert_eq!(&bytes[110..117], b"a\0hello");
        assert_eq!(&bytes[120..126], b"070701");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn a_module_is_known_by_its_name_alone() {
        assert!(is_module(
            "kernel/drivers/virtio/virtio_pci.ko.xz",
            "virtio_pci"
        ));
        assert!(is_module("kernel/fs/fuse/virtiofs.ko", "virtiofs"));
        assert!(is_module("kernel/net/act-bpf.ko", "act_bpf"));
        assert!(!is_module(
            "kernel/drivers/virtio/virtio_pci_legacy_dev.ko",
            "virtio_pci"
        ));
    }
}
