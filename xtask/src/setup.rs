//! `cargo xtask setup`: installs what is missing from Debian's or Ubuntu's packages, and says what. Idempotent.
//!
//! Installed daemons must not start: the lab runs its own, in namespaces. A `policy-rc.d` that refuses stands for the time of
//! the one `apt-get` call, unless the administrator has one already.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{command, ebpf, vm};

/// What is needed, and what for.
pub(crate) const PACKAGES: &[(&str, &str)] = &[
    (
        "bird2",
        "the lab's ToR router and the peer of the BGP tests",
    ),
    ("build-essential", "the linker that Rust calls"),
    (
        "containernetworking-plugins",
        "the peers of the CNI tests and bench",
    ),
    (
        "iperf3",
        "the traffic that bandwidth limits are measured with",
    ),
    ("iproute2", "setting namespaces up"),
    ("iptables", "what the reference plugin `portmap` calls"),
    ("iputils-ping", "echo probes of the live tests"),
    ("nginx-light", "the web server of the lab's internet host"),
    (
        "nsd",
        "the authoritative DNS server of the lab's internet host",
    ),
    ("podman", "the CNI tests' client that is no Kubernetes"),
    ("runc", "what starts containers on the lab's nodes"),
    ("unbound", "the peer of the DNS bench"),
];

const POLICY: &str = "/usr/sbin/policy-rc.d";

/// Flags of `setup`.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Also what editing the eBPF programs needs.
    #[arg(long)]
    ebpf: bool,
    /// Also what `cargo xtask vm` needs.
    #[arg(long)]
    vm: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    packages(PACKAGES)?;
    if arguments.ebpf {
        ebpf::install_toolchain()?;
    }
    if arguments.vm {
        vm::setup()?;
    }
    Ok(())
}

/// Installs those that are missing.
pub(crate) fn packages(wanted: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = wanted
        .iter()
        .filter(|(name, _)| !is_installed(name))
        .collect();
    if missing.is_empty() {
        eprintln!("setup: nothing is missing ({} packages)", wanted.len());
        return Ok(());
    }
    ensure!(
        Path::new("/usr/bin/apt-get").exists(),
        "setup knows Debian and Ubuntu, and this machine has no apt-get; install by hand: {}",
        names(&missing)
    );
    ensure!(
        fs::metadata("/proc/self").is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0),
        "setup needs root to install: {}; run it as root, or install them by hand",
        names(&missing)
    );
    for (name, what_for) in &missing {
        eprintln!("setup: installing {name}: {what_for}");
    }
    let _policy = NoServices::stand()?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(missing.iter().map(|(name, _)| *name));
    // Lists may be old or absent: refresh them only when the install fails without.
    if apt(&arguments).is_err() {
        apt(&["update"])?;
        apt(&arguments)?;
    }
    Ok(())
}

fn names(packages: &[&(&str, &str)]) -> String {
    packages
        .iter()
        .map(|(name, _)| *name)
        .collect::<Vec<_>>()
        .join(" ")
}

fn is_installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Status}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|output| output.stdout == b"installed")
}

fn apt(words: &[&str]) -> Result<()> {
    command::run(
        Command::new("apt-get")
            .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
            .args(words)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdout(Stdio::null()),
    )
}

/// While it stands, installing a daemon does not start it.
struct NoServices {
    ours: bool,
}

impl NoServices {
    fn stand() -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let ours = !Path::new(POLICY).exists();
        if ours {
            fs::write(POLICY, "#!/bin/sh\nexit 101\n")
                .and_then(|()| fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755)))
                .with_context(|| format!("writing {POLICY}"))?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_file(POLICY);
        }
    }
}
