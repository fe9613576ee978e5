//! Which crate may depend on which, and what a core may not depend on at all.

use cargo_metadata::{DependencyKind, Metadata};

/// Normal dependencies inside the workspace: the map's arrows. `tests`, `xtask` and dev-dependencies are free.
const ARROWS: &[(&str, &[&str])] = &[
    ("kun-config", &[]),
    ("kun-cluster-core", &["kun-config"]),
    ("kun-cluster", &["kun-config", "kun-cluster-core"]),
    ("kun-control", &["kun-config"]),
    ("kun-telemetry", &["kun-config"]),
    ("kun-ebpf-abi", &[]),
    ("kun-ebpf-build", &[]),
    ("kun-ebpf-loader", &["kun-ebpf-abi", "kun-ebpf-build"]),
    ("kun-cni-core", &["kun-config"]),
    (
        "kun-cni",
        &[
            "kun-cni-core",
            "kun-config",
            "kun-cluster-core",
            "kun-control",
            "kun-telemetry",
        ],
    ),
    (
        "kun-proxy-core",
        &["kun-config", "kun-cluster-core", "kun-ebpf-abi"],
    ),
    // The node agent: its main joins the shells of a node.
    (
        "kun-proxy",
        &[
            "kun-proxy-core",
            "kun-config",
            "kun-cluster",
            "kun-control",
            "kun-telemetry",
            "kun-ebpf-loader",
            "kun-ebpf-abi",
            "kun-cni",
            "kun-bgp",
        ],
    ),
    ("kun-dns-core", &["kun-config", "kun-cluster-core"]),
    (
        "kun-dns",
        &["kun-dns-core", "kun-config", "kun-cluster", "kun-telemetry"],
    ),
    ("kun-bgp-core", &["kun-config"]),
    ("kun-bgp", &["kun-bgp-core", "kun-config"]),
    // How addresses come back is decided in one core, of which the fold of watermarks is the operator's part.
    (
        "kun-operator",
        &["kun-config", "kun-cluster", "kun-cni-core", "kun-telemetry"],
    ),
    // The manifest folder gives `kunctl why` the address of a Service by its name; a damaged address store is rebuilt without
    // an agent, which does not start on one.
    (
        "kunctl",
        &[
            "kun-config",
            "kun-cluster",
            "kun-control",
            "kun-telemetry",
            "kun-cni",
        ],
    ),
    ("kun-conformance", &[]),
    // It knows where peers are cached.
    ("kun-harness", &["kun-ebpf-build"]),
];

/// Free to depend on anything.
const FREE: &[&str] = &["kun-tests", "xtask"];

/// Only these dependencies, where they say `main`, may be used nowhere but in `main.rs` and `agent/`.
pub(super) const MAIN_ONLY: &[(&str, &str)] = &[("kun-proxy", "kun_cni"), ("kun-proxy", "kun_bgp")];

/// Crates that do I/O, read clocks or draw randomness: never in a core.
const IMPURE: &[&str] = &[
    "tokio",
    "tokio-util",
    "aya",
    "aya-obj",
    "kube",
    "netlink-sys",
    "netlink-packet-core",
    "netlink-packet-route",
    "hickory-server",
    "hickory-resolver",
    "notify",
    "redb",
    "rustix",
    "libc",
    "socket2",
    "tempfile",
    "rand",
    "getrandom",
    "tracing-subscriber",
    "prometheus-client",
    "mio",
    "anyhow",
];

/// The cores, and what is pure besides.
pub(super) const PURE: &[&str] = &[
    "kun-config",
    "kun-cluster-core",
    "kun-ebpf-abi",
    "kun-cni-core",
    "kun-proxy-core",
    "kun-dns-core",
    "kun-bgp-core",
];

pub(super) fn check(metadata: &Metadata, wrong: &mut Vec<String>) {
    for package in metadata.workspace_packages() {
        let name = package.name.as_str();
        let normal = package
            .dependencies
            .iter()
            .filter(|d| d.kind != DependencyKind::Development);
        if PURE.contains(&name) {
            for dependency in normal.clone().filter(|d| IMPURE.contains(&d.name.as_str())) {
                wrong.push(format!(
                    "{name}: a core may not depend on {}",
                    dependency.name
                ));
            }
        }
        if FREE.contains(&name) {
            continue;
        }
        let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == name) else {
            wrong.push(format!("{name}: a crate that the map does not know; add its arrows to xtask/src/tidy/arrows.rs"));
            continue;
        };
        for dependency in normal.filter(|d| d.path.is_some()) {
            if !allowed.contains(&dependency.name.as_str()) {
                wrong.push(format!(
                    "{name} → {}: no such arrow in the map",
                    dependency.name
                ));
            }
        }
    }
}
