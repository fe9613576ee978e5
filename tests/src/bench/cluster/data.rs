//! The cluster that is measured: Services as kubectl prints them, slices as the controller makes them, Nodes as kubelets write them
//! (labels, conditions, images; some eight kilobytes with what the server adds). In a folder Nodes are as people write them down.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};

const FILES: usize = 100;
pub(super) const SERVICES_PER_FILE: usize = 100;
pub(super) const SERVICES: usize = FILES * SERVICES_PER_FILE;
const PER_SLICE: usize = 10;
pub(super) const ENDPOINTS: usize = SERVICES * PER_SLICE;
pub(super) const NODES: usize = 10_000;
/// Namespaces.
pub(super) const TEAMS: usize = 50;

/// Images that a kubelet reports: at most 50.
const IMAGES: usize = 25;

pub(super) fn path(folder: &Path, file: usize) -> PathBuf {
    folder.join(format!("services-{file:03}.yaml"))
}

/// Writes all files; how many bytes they are.
pub(super) fn write_files(folder: &Path) -> anyhow::Result<usize> {
    let mut bytes = 0;
    for file in 0..FILES {
        let services = manifests(file, 8080);
        let nodes = node_manifests(file);
        bytes += services.len() + nodes.len();
        fs::write(path(folder, file), services).context("writing a manifest")?;
        fs::write(folder.join(format!("nodes-{file:03}.yaml")), nodes)
            .context("writing a manifest")?;
    }
    Ok(bytes)
}

fn address(i: usize, endpoint: usize) -> String {
    let n = i * PER_SLICE + endpoint;
    format!("10.{}.{}.{}", 64 + n / 65_025, n / 255 % 255, n % 255 + 1)
}

/// Services as kubectl prints them, each with a slice of ten endpoints.
pub(super) fn manifests(file: usize, target_port: u16) -> String {
    let mut text = String::new();
    for i in file * SERVICES_PER_FILE..(file + 1) * SERVICES_PER_FILE {
        let (namespace, high, low) = (i % TEAMS, i / 250, i % 250 + 1);
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata:\n  name: service-{i}\n  namespace: team-{namespace}\n  labels:\n    \
             app: service-{i}\nspec:\n  type: ClusterIP\n  clusterIP: 10.96.{high}.{low}\n  clusterIPs:\n  - 10.96.{high}.{low}\n  \
             ipFamilies:\n  - IPv4\n  ipFamilyPolicy: SingleStack\n  selector:\n    app: service-{i}\n  ports:\n  - name: http\n    \
             port: 80\n    protocol: TCP\n    targetPort: {target_port}\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata:\n  name: service-{i}-x\n  namespace: team-{namespace}\n  labels:\n    kubernetes.io/service-name: service-{i}\n\
             addressType: IPv4\nports:\n- name: http\n  port: {target_port}\n  protocol: TCP\nendpoints:\n"
        );
        for endpoint in 0..PER_SLICE {
            let _ = write!(
                text,
                "- addresses:\n  - {}\n  conditions:\n    ready: true\n    serving: true\n    terminating: false\n  \
                 nodeName: node-{}\n  zone: zone-{}\n  targetRef:\n    kind: Pod\n    namespace: team-{namespace}\n    \
                 name: service-{i}-{endpoint}\n",
                address(i, endpoint),
                (i * PER_SLICE + endpoint) % NODES,
                endpoint % 3
            );
        }
    }
    text
}

fn node_manifests(file: usize) -> String {
    let mut text = String::new();
    for i in file * (NODES / FILES)..(file + 1) * (NODES / FILES) {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Node\nmetadata:\n  name: node-{i}\n  labels:\n    kubernetes.io/hostname: node-{i}\n    \
             topology.kubernetes.io/zone: zone-{}\nstatus:\n  addresses:\n  - type: InternalIP\n    address: 10.{}.{}.{}\n",
            i % 3,
            i / 65_025,
            i / 255 % 255,
            i % 255 + 1
        );
    }
    text
}

pub(super) fn service(i: usize) -> Value {
    json!({
        "metadata": {"name": format!("service-{i}"), "namespace": format!("team-{}", i % TEAMS), "labels": {"app": format!("service-{i}")}},
        "spec": {"type": "ClusterIP", "selector": {"app": format!("service-{i}")},
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
    })
}

pub(super) fn slice(i: usize) -> Value {
    let namespace = format!("team-{}", i % TEAMS);
    let endpoint = |endpoint| {
        json!({
            "addresses": [address(i, endpoint)],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": format!("node-{}", (i * PER_SLICE + endpoint) % NODES),
            "zone": format!("zone-{}", endpoint % 3),
            "targetRef": {"kind": "Pod", "namespace": namespace, "name": format!("service-{i}-6d4cf56db6-x{endpoint}"),
                "uid": format!("00000000-0000-4000-8000-{:012}", i * PER_SLICE + endpoint)},
        })
    };
    json!({
        "addressType": "IPv4",
        "metadata": {"name": format!("service-{i}-x"), "namespace": namespace, "labels": {
            "kubernetes.io/service-name": format!("service-{i}"), "app": format!("service-{i}"),
            "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}},
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": (0..PER_SLICE).map(endpoint).collect::<Vec<_>>(),
    })
}

pub(super) fn node(i: usize) -> Value {
    let name = format!("node-{i}");
    let image = |n: usize| {
        let digest = format!("{n:064x}");
        json!({"names": [format!("registry.example/team/image-{n}@sha256:{digest}"), format!("registry.example/team/image-{n}:v1.{n}")],
            "sizeBytes": 100_000_000 + n})
    };
    let condition = |kind: &str, status: &str| {
        json!({"type": kind, "status": status, "reason": format!("Kubelet{kind}"), "message": format!("kubelet says {status} of {kind}"),
            "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z"})
    };
    json!({
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
            "beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": "amd64",
            "topology.kubernetes.io/zone": format!("zone-{}", i % 3), "topology.kubernetes.io/region": "region-1",
            "node.kubernetes.io/instance-type": "large", "example.com/rack": format!("rack-{}", i % 400)},
            "annotations": {"node.alpha.kubernetes.io/ttl": "0", "volumes.kubernetes.io/controller-managed-attach-detach": "true"}},
        "spec": {"podCIDRs": []},
        "status": {
            "addresses": [{"type": "InternalIP", "address": format!("10.{}.{}.{}", i / 65_025, i / 255 % 255, i % 255 + 1)}, {"type": "Hostname", "address": name}],
            "capacity": {"cpu": "32", "memory": "131072Mi", "pods": "110", "ephemeral-storage": "1Ti"},
            "allocatable": {"cpu": "31", "memory": "126976Mi", "pods": "110", "ephemeral-storage": "1000Gi"},
            "conditions": [condition("MemoryPressure", "False"), condition("DiskPressure", "False"), condition("PIDPressure", "False"), condition("Ready", "True")],
            "images": (0..IMAGES).map(image).collect::<Vec<_>>(),
            "nodeInfo": {"machineID": format!("{i:032x}"), "systemUUID": format!("{i:032x}"), "bootID": format!("{i:032x}"), "kernelVersion": "6.12.0",
                "osImage": "Debian GNU/Linux 13", "containerRuntimeVersion": "containerd://2.1.0", "kubeletVersion": "v1.37.2",
                "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64"},
        },
    })
}
