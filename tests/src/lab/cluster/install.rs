//! kun on the lab's cluster, as `deploy/` installs it on any: its base with an overlay, applied by `kubectl apply -k`. Every program runs
//! under the ServiceAccount and the rights that stand there, so that a missing right is a lab that does not come up.
//!
//! The overlay says what differs from cluster to cluster (addresses, the API server's place, the upstream of names), and gives each
//! machine an agent of its own, as `deploy/overlays/nat64-gateway` does, since each has another AS and another router.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::names::{
    CLUSTER_DNS_V4, CLUSTER_DNS_V6, CONTROL, POD_V4, POD_V6_ONLY, VIPS_V4, VIPS_V6,
};
use super::super::node::{Node, shared_configuration};
use super::super::pod::corefile_text;
use super::{PORT, image};

/// Pods that serve names, by `deploy/base`.
pub const DNS_PODS: usize = 2;

/// The pods' and the services' addresses, as an administrator gives them.
pub fn pool() -> Value {
    json!({
        "apiVersion": "kun.network/v1alpha1",
        "kind": "IPPool",
        "metadata": {"name": "lab"},
        "spec": {"pods": [POD_V4, POD_V6_ONLY], "services": {"v4": [VIPS_V4], "v6": [VIPS_V6]}},
    })
}

/// Copies `deploy/` beside the lab's files and writes the overlay; where it is.
pub fn write(deploy: &Path, nodes: &[Node], lab: &Path) -> Result<PathBuf> {
    let copy = lab.join("deploy");
    copy_folder(deploy, &copy)?;
    let overlay = copy.join("here");
    fs::create_dir_all(&overlay)?;
    let mut resources = vec!["cluster".to_owned()];
    write_cluster(&overlay.join("cluster"))?;
    for node in nodes {
        let name = node.machine.name;
        write_agent(&overlay.join(name), node)?;
        resources.push(name.to_owned());
    }
    let here = json!({
        "apiVersion": VERSION,
        "kind": "Kustomization",
        "resources": resources,
        "images": [image_of(image::POD)],
    });
    yaml(&overlay.join("kustomization.yaml"), &here)?;
    Ok(overlay)
}

/// The base, with this cluster's addresses. Apart from the agents: a ConfigMap of the same name is theirs, too.
fn write_cluster(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory)?;
    yaml(&directory.join("kun.yaml"), &cluster_configuration())?;
    fs::write(directory.join("Corefile"), corefile_text())?;
    let keep_name = json!({"disableNameSuffixHash": true});
    let address = format!("KUBERNETES_SERVICE_HOST={}", CONTROL.v6());
    let port = format!("KUBERNETES_SERVICE_PORT={PORT}");
    let cluster = json!({
        "apiVersion": VERSION,
        "kind": "Kustomization",
        "resources": ["../../base"],
        "configMapGenerator": [
            {"name": "kun", "namespace": NAMESPACE, "behavior": "replace", "files": ["kun.yaml"]},
            {"name": "kun-dns", "namespace": NAMESPACE, "behavior": "replace", "files": ["Corefile"], "options": keep_name},
            {"name": "kun-api-server", "namespace": NAMESPACE, "literals": [address, port], "options": keep_name},
        ],
        "patches": [{"patch": NO_COMMON_AGENT}, {"patch": dns_service()?}],
    });
    yaml(&directory.join("kustomization.yaml"), &cluster)
}

const VERSION: &str = "kustomize.config.k8s.io/v1beta1";

const NAMESPACE: &str = "kube-system";

/// The base's own agent has one configuration for all nodes.
const NO_COMMON_AGENT: &str = "
$patch: delete
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: kun-proxy, namespace: kube-system}
";

fn image_of(name: &str) -> Value {
    let (name, tag) = name.rsplit_once(':').unwrap_or((name, "latest"));
    json!({"name": "kun", "newName": name, "newTag": tag})
}

fn dns_service() -> Result<String> {
    let patch = json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": NAMESPACE},
        "spec": {
            "clusterIP": CLUSTER_DNS_V6,
            "clusterIPs": [CLUSTER_DNS_V6.to_string(), CLUSTER_DNS_V4.to_string()],
            "ipFamilies": ["IPv6", "IPv4"],
            "ipFamilyPolicy": "RequireDualStack",
        },
    });
    serde_saphyr::to_string(&patch).context("writing YAML")
}

/// What the programs that are no agents read.
fn cluster_configuration() -> Value {
    let mut config = shared_configuration();
    config["cluster"] = json!({"kubernetes": {}});
    config
}

/// An agent for one machine.
fn write_agent(directory: &Path, node: &Node) -> Result<()> {
    fs::create_dir_all(directory)?;
    let name = node.machine.name;
    fs::copy(node.config(), directory.join("kun.yaml"))
        .with_context(|| format!("copying {}", node.config().display()))?;
    let label = "app.kubernetes.io~1name";
    let own = format!("kun-proxy-{name}");
    let patch = json!([
        {"op": "remove", "path": "/spec/template/spec/affinity"},
        {"op": "add", "path": "/spec/template/spec/nodeSelector/kubernetes.io~1hostname", "value": name},
        {"op": "replace", "path": format!("/spec/selector/matchLabels/{label}"), "value": own},
        {"op": "replace", "path": format!("/spec/template/metadata/labels/{label}"), "value": own},
    ]);
    let kustomization = json!({
        "apiVersion": VERSION,
        "kind": "Kustomization",
        "resources": ["../../agent"],
        "nameSuffix": format!("-{name}"),
        "configMapGenerator": [
            {"name": "kun", "namespace": NAMESPACE, "behavior": "replace", "files": ["kun.yaml"]},
        ],
        "patches": [{"target": {"kind": "DaemonSet", "name": "kun-proxy"}, "patch": patch.to_string()}],
    });
    yaml(&directory.join("kustomization.yaml"), &kustomization)
}

fn yaml(path: &Path, value: &Value) -> Result<()> {
    let text = serde_saphyr::to_string(value).context("writing YAML")?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_folder(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)
                .with_context(|| format!("copying {}", entry.path().display()))?;
        }
    }
    Ok(())
}
