//! Which peers are built from Go modules, in which version, and what for.
//!
//! A version at the module proxy never changes; the sum proves it, as a line of `go.sum` would, and what the module itself is built from
//! is pinned by its own `go.mod`. To move to a newer version: change `version`, build, and take the sum that the error tells.

use std::path::{Path, PathBuf};

/// Programs of one Go module.
pub(super) struct Peer {
    /// What `--only` takes.
    pub(super) name: &'static str,
    pub(super) module: &'static str,
    pub(super) version: &'static str,
    /// Of the module's sources: `go version -m` of what was built from them tells the same.
    pub(super) sum: &'static str,
    /// Packages below the module; the last element is the program's name, that of an empty one the module's.
    pub(super) packages: &'static [&'static str],
    /// Where its programs go, below the peers' directory.
    pub(super) to: &'static str,
    pub(super) tags: &'static str,
    /// Variables that its own build sets: `package.name=value`.
    pub(super) set: &'static [&'static str],
    /// Parts of `cargo xtask test` whose tests run it; none: it is for a person's hands.
    pub(super) parts: &'static [&'static str],
    pub(super) what_for: &'static str,
}

/// The parts that run `conformance/`, whose suites stand in one crate.
const CONFORMANCE: &[&str] = &["cni", "dns"];

/// Smallest first: what fails for want of a network or a compiler fails early.
pub(super) const PEERS: &[Peer] = &[
    Peer {
        name: "cnitool",
        module: "github.com/containernetworking/cni",
        version: "v1.3.1",
        sum: "h1:gnHlU/YC1bJcS+CSh+pYQKeuu4O4gsMGW1NMaLhkzW4=",
        packages: &["cnitool"],
        to: "bin",
        tags: "",
        set: &[],
        parts: CONFORMANCE,
        what_for: "libcni, as container runtimes use it, drives kun-cni",
    },
    Peer {
        name: "cni-plugins",
        module: "github.com/containernetworking/plugins",
        version: "v1.10.0",
        sum: "h1:4lwzpgsn5NdIneXrag/EEfKzhNSriJc1zTxZxfdfPLQ=",
        packages: &[
            "plugins/main/bridge",
            "plugins/main/host-device",
            "plugins/main/ipvlan",
            "plugins/main/loopback",
            "plugins/main/macvlan",
            "plugins/main/ptp",
            "plugins/main/vlan",
            "plugins/ipam/host-local",
            "plugins/ipam/static",
            "plugins/meta/bandwidth",
            "plugins/meta/firewall",
            "plugins/meta/portmap",
            "plugins/meta/sbr",
            "plugins/meta/tuning",
            "plugins/meta/vrf",
        ],
        // CNI_PATH names a directory of plugins and nothing else.
        to: "cni",
        tags: "",
        set: &[],
        parts: CONFORMANCE,
        what_for: "the CNI suite's subjects, and neighbours of kun-cni in a chain",
    },
    Peer {
        name: "gobgp",
        module: "github.com/osrg/gobgp/v4",
        version: "v4.8.0",
        sum: "h1:CoprkOZ2nsH8aTHij6xWj18QOrsBwG9D00l1PGw7394=",
        packages: &["cmd/gobgp", "cmd/gobgpd"],
        to: "bin",
        tags: "",
        set: &[],
        parts: &["bgp"],
        what_for: "a second BGP speaker for ours to peer with",
    },
    Peer {
        name: "crictl",
        module: "sigs.k8s.io/cri-tools",
        version: "v1.37.0",
        sum: "h1:BmTImEoTX3KPXCLwmIU9mfCC8umUqF4R8WibY9eVU9Y=",
        packages: &["cmd/crictl"],
        to: "bin",
        tags: "",
        set: &[],
        parts: &["cluster"],
        what_for: "the client that drives containerd by itself, as a kubelet does",
    },
    Peer {
        name: "containerd",
        module: "github.com/containerd/containerd/v2",
        version: "v2.4.2",
        sum: "h1:p6Qg+xbEz8lvwdhHDx0U469xENvp4LgGBx+E7djXkGw=",
        packages: &["cmd/containerd", "cmd/containerd-shim-runc-v2", "cmd/ctr"],
        to: "bin",
        // Snapshotters that no lab uses.
        tags: "no_btrfs no_devmapper no_zfs",
        set: &["github.com/containerd/containerd/v2/version.Version=v2.4.2"],
        parts: &["cluster"],
        what_for: "the container runtime of the lab's nodes: current kubelets ask for what Debian's 1.6 has not",
    },
    Peer {
        name: "coredns",
        module: "github.com/coredns/coredns",
        version: "v1.15.0",
        sum: "h1:OBT+OEyHVdUiVxPhrNlC5XZVq3RkSxzQXfZQ76gm5ck=",
        packages: &[""],
        to: "bin",
        tags: "",
        set: &[],
        parts: CONFORMANCE,
        what_for: "the DNS suite's subject that kun-dns replaces",
    },
];

impl Peer {
    /// `module/package@version`, as `go install` takes it.
    pub(super) fn targets(&self) -> impl Iterator<Item = String> {
        self.packages.iter().map(|package| {
            let slash = if package.is_empty() { "" } else { "/" };
            format!("{}{slash}{package}@{}", self.module, self.version)
        })
    }

    /// Its programs, from the peers' directory.
    pub(super) fn programs(&self) -> Vec<PathBuf> {
        let name = |package: &&'static str| {
            let from = if package.is_empty() {
                self.module
            } else {
                package
            };
            from.rsplit('/').next().unwrap_or(from)
        };
        self.packages
            .iter()
            .map(|package| Path::new(self.to).join(name(package)))
            .collect()
    }

    pub(super) fn flags(&self) -> String {
        let set: String = self.set.iter().map(|set| format!(" -X {set}")).collect();
        format!("-ldflags=-s -w{set}")
    }

    /// All that decides what is built.
    pub(super) fn stamp(&self) -> String {
        format!(
            "{} {} {}\n{}\n{}\n{}\n",
            self.module,
            self.version,
            self.sum,
            self.packages.join(" "),
            self.tags,
            self.flags()
        )
    }
}
