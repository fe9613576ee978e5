//! Go: found, or installed from Debian's backports into the cache; and how it is called.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::table::Peer;
use crate::{apt, command, setup};

/// The first that fetches another toolchain by itself.
const LEAST: (u32, u32) = (1, 21);
/// The toolchain of every build: whoever builds, the same programs come out, and the standard library is compiled once. The peers' own
/// modules ask for no newer one.
const TOOLCHAIN: &str = "go1.26.8";
/// What is unpacked where there is no such Go: Debian 12's own is 1.19, too old to fetch another.
const SUITE: &str = "bookworm-backports";
const PACKAGES: [&str; 2] = ["golang-1.23-go", "golang-1.23-src"];
/// Where the packages have it, from their root.
const PROGRAM: &str = "usr/lib/go-1.23/bin/go";

/// A Go that is new enough.
pub(super) struct Go {
    program: PathBuf,
    version: String,
}

impl Go {
    pub(super) fn find_or_install() -> Result<Self> {
        if let Some(found) = Self::at(Path::new("go")) {
            return Ok(found);
        }
        setup::packages(&[(
            "debian-archive-keyring",
            "the keys of the packages that Go is taken from",
        )])?;
        let cache = kun_ebpf_build::cache_dir();
        let root = cache.join("go-1.23");
        apt::unpacked(&root, &cache.join("apt-backports"), SUITE, &PACKAGES)?;
        let program = root.join(PROGRAM);
        Self::at(&program).with_context(|| format!("peers: {} does not run", program.display()))
    }

    fn at(program: &Path) -> Option<Self> {
        let told = Command::new(program)
            .arg("version")
            .env("GOTOOLCHAIN", "local")
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        let version = parsed(&String::from_utf8_lossy(&told.stdout))?;
        (numbers(&version)? >= LEAST).then(|| Self {
            program: program.to_owned(),
            version,
        })
    }

    pub(super) fn describe(&self) -> String {
        format!("Go {}, by {TOOLCHAIN},", self.version)
    }

    /// `go <verb>` with the flags of every build: reproducible, and nothing that a person has set for work of their own.
    pub(super) fn command(&self, verb: &str, cgo: bool) -> Command {
        let mut command = Command::new("nice");
        command
            .args(["-n", "5"])
            .arg(&self.program)
            .args([verb, "-trimpath", "-buildvcs=false"])
            .env("GOFLAGS", "")
            .env("GOWORK", "off")
            .env("GOTOOLCHAIN", TOOLCHAIN)
            .env("CGO_ENABLED", if cgo { "1" } else { "0" })
            .env_remove("GOROOT")
            .env_remove("GOBIN");
        command
    }

    /// Builds a peer's programs into a directory, and proves that they are of the sources that the table names.
    pub(super) fn install(&self, peer: &Peer, into: &Path) -> Result<()> {
        // Static: a program runs in whatever root its namespace has.
        let mut install = self.command("install", false);
        install.env("GOBIN", into).arg(peer.flags());
        if !peer.tags.is_empty() {
            install.args(["-tags", peer.tags]);
        }
        install.args(peer.targets());
        command::run(&mut install)?;
        for program in peer.programs() {
            let program = into.join(program.file_name().unwrap_or_default());
            let told = Command::new(&self.program)
                .args(["version", "-m"])
                .arg(&program)
                .env("GOTOOLCHAIN", "local")
                .output()
                .context("running go version -m")?;
            let told = String::from_utf8_lossy(&told.stdout).into_owned();
            let Some(sum) = sum_of(&told, peer.module, peer.version) else {
                bail!(
                    "{}: says not that it is of {} {}",
                    program.display(),
                    peer.module,
                    peer.version
                );
            };
            ensure!(
                sum == peer.sum,
                "{} {}: its sum is {sum}, the table in xtask/src/peers/table.rs says {}",
                peer.module,
                peer.version,
                peer.sum
            );
        }
        Ok(())
    }
}

/// `go version go1.26.8 linux/amd64` → `1.26.8`.
fn parsed(told: &str) -> Option<String> {
    let version = told.split_whitespace().nth(2)?.strip_prefix("go")?;
    Some(version.to_owned())
}

/// `1.26.8`, `1.21rc2` → (1, 26), (1, 21).
fn numbers(version: &str) -> Option<(u32, u32)> {
    let (major, rest) = version.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The sum in the line `mod <module> <version> <sum>`.
fn sum_of<'a>(told: &'a str, module: &str, version: &str) -> Option<&'a str> {
    told.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["mod", m, v, sum] if m == module && v == version => Some(sum),
            _ => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gos_lines_are_read() {
        let version = parsed("go version go1.26.8 linux/amd64\n").unwrap();
        assert_eq!(version, "1.26.8");
        assert!(numbers(&version).unwrap() >= LEAST);
        assert!(
            numbers("1.19.8").unwrap() < LEAST,
            "Debian 12's cannot fetch another"
        );
        assert_eq!(numbers("1.21rc2"), Some((1, 21)));
        let told = "x: go1.26.8\n\tpath\ta/cmd/x\n\tmod\ta\tv1.0.0\th1:abc=\n\tdep\tb\tv1\th1:d=\n";
        assert_eq!(sum_of(told, "a", "v1.0.0"), Some("h1:abc="));
        assert_eq!(sum_of(told, "a", "v1.0.1"), None);
    }
}
