//! Debian's kernel packages, downloaded by apt with lists of their own, so that any release's kernel is had on any release.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
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
    unpacked(&root, cache, suite, CLOUD)?;
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
    unpacked(&root, cache, "bookworm", "user-mode-linux")?;
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
    let modules = only_entry(directory)?;
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

/// Makes sure that `package` of `suite` lies unpacked at `root`: whole, or not at all.
fn unpacked(root: &Path, cache: &Path, suite: &str, package: &str) -> Result<()> {
    if root.exists() {
        return Ok(());
    }
    ensure!(
        Path::new(KEYRING).exists(),
        "vm: {KEYRING} is missing, and nothing unsigned is booted; apt-get install debian-archive-keyring"
    );
    println!(
        "vm: downloading {package} of Debian {suite}, once, to {}",
        root.display()
    );
    let apt = Apt::new(&cache.join(format!("apt-{suite}")), suite)?;
    apt.run("apt-get", &["-qq", "update"], None)?;
    let package = apt.real_name(package)?;
    let fresh = root.with_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_dir_all(&fresh);
    fs::create_dir_all(fresh.join("deb"))?;
    apt.run(
        "apt-get",
        &["-qq", "download", &package],
        Some(&fresh.join("deb")),
    )?;
    let deb = only_entry(&fresh.join("deb"))?;
    let status = Command::new("dpkg-deb")
        .arg("-x")
        .arg(&deb)
        .arg(&fresh)
        .status();
    ensure!(
        status.context("vm: running dpkg-deb")?.success(),
        "vm: {} cannot be unpacked",
        deb.display()
    );
    fs::remove_dir_all(fresh.join("deb"))?;
    // Another run may have been faster; its result is as good.
    if fs::rename(&fresh, root).is_err() {
        fs::remove_dir_all(&fresh)?;
    }
    ensure!(root.exists(), "vm: {} cannot be made", root.display());
    Ok(())
}

/// apt, with a state of its own.
struct Apt {
    options: Vec<String>,
}

impl Apt {
    fn new(state: &Path, suite: &str) -> Result<Self> {
        for directory in ["lists/partial", "cache/archives/partial", "none"] {
            fs::create_dir_all(state.join(directory))?;
        }
        fs::write(state.join("status"), "")?;
        fs::write(
            state.join("sources.list"),
            format!("deb [signed-by={KEYRING}] {MIRROR} {suite} main\n"),
        )?;
        let state = state.display();
        let options = [
            format!("Dir::State={state}"),
            format!("Dir::State::Lists={state}/lists"),
            format!("Dir::State::status={state}/status"),
            format!("Dir::Cache={state}/cache"),
            format!("Dir::Etc::SourceList={state}/sources.list"),
            format!("Dir::Etc::SourceParts={state}/none"),
            "APT::Architecture=amd64".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::http::Timeout=30".to_owned(),
            "Acquire::Retries=2".to_owned(),
        ];
        Ok(Self {
            options: options
                .into_iter()
                .flat_map(|o| ["-o".to_owned(), o])
                .collect(),
        })
    }

    fn run(&self, program: &str, words: &[&str], directory: Option<&Path>) -> Result<String> {
        // A mirror that dribbles would hold us for ever.
        let mut command = Command::new("timeout");
        command.args(["300", program]);
        command.args(&self.options).args(words);
        if let Some(directory) = directory {
            command.current_dir(directory);
        }
        let output = command
            .output()
            .with_context(|| format!("vm: running {program}"))?;
        ensure!(
            output.status.success(),
            "vm: {program} {}: {} {}",
            words.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The package that a meta package stands for.
    fn real_name(&self, package: &str) -> Result<String> {
        let depends = self.run("apt-cache", &["depends", package], None)?;
        let kernel = depends.lines().find_map(|line| {
            let name = line.trim().strip_prefix("Depends: ")?;
            name.starts_with("linux-image-").then(|| name.to_owned())
        });
        Ok(kernel.unwrap_or_else(|| package.to_owned()))
    }
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    let mut entries =
        fs::read_dir(directory).with_context(|| format!("vm: reading {}", directory.display()))?;
    let first = entries
        .next()
        .with_context(|| format!("vm: {} is empty", directory.display()))?;
    Ok(first?.path())
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}
