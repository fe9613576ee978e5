//! Debian's packages, downloaded by apt with lists of their own and unpacked into the cache: any release's on any release.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

const MIRROR: &str = "http://deb.debian.org/debian";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Makes sure that `packages` of `suite` lie unpacked at `root`: whole, or not at all. apt's lists are kept in `state`.
pub(crate) fn unpacked(root: &Path, state: &Path, suite: &str, packages: &[&str]) -> Result<()> {
    if root.exists() {
        return Ok(());
    }
    ensure!(
        Path::new(KEYRING).exists(),
        "apt: {KEYRING} is missing, and nothing unsigned is run; apt-get install debian-archive-keyring"
    );
    println!(
        "apt: downloading {} of Debian {suite}, once, to {}",
        packages.join(" and "),
        root.display()
    );
    let apt = Apt::new(state, suite)?;
    apt.run("apt-get", &["-qq", "update"], None)?;
    let fresh = root.with_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_dir_all(&fresh);
    for package in packages {
        let package = apt.real_name(package)?;
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
            status.context("apt: running dpkg-deb")?.success(),
            "apt: {} cannot be unpacked",
            deb.display()
        );
        fs::remove_dir_all(fresh.join("deb"))?;
    }
    // Another run may have been faster; its result is as good.
    if fs::rename(&fresh, root).is_err() {
        fs::remove_dir_all(&fresh)?;
    }
    ensure!(root.exists(), "apt: {} cannot be made", root.display());
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
            .with_context(|| format!("apt: running {program}"))?;
        ensure!(
            output.status.success(),
            "apt: {program} {}: {} {}",
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

/// The one entry of a directory.
pub(crate) fn only_entry(directory: &Path) -> Result<PathBuf> {
    let mut entries =
        fs::read_dir(directory).with_context(|| format!("apt: reading {}", directory.display()))?;
    let first = entries
        .next()
        .with_context(|| format!("apt: {} is empty", directory.display()))?;
    Ok(first?.path())
}
