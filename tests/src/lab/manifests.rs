//! Kubernetes manifests as people write them: what the lab expands into pods and services. Unknown kinds and fields are left
//! alone, as they are by an API server's clients; what is needed and missing is one clear line.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

/// An application's manifests are kilobytes; a file past this is not one.
const LARGEST_FILE: u64 = 16 << 20;

/// metadata.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// Namespace; empty: `default`.
    pub namespace: String,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Something that makes pods.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Deployment, StatefulSet, DaemonSet, ReplicaSet or Pod.
    pub kind: String,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Pods wanted; for a DaemonSet: one a node.
    pub replicas: u32,
    /// StatefulSet: the governing service, which is its pods' subdomain.
    pub service_name: Option<String>,
    /// The pod.
    pub template: Template,
}

/// A pod template.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Template {
    /// Labels and annotations.
    pub metadata: Metadata,
    /// The pod.
    pub spec: PodSpec,
}

/// What the lab reads of a pod.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct PodSpec {
    /// Containers.
    pub containers: Vec<Container>,
    /// Restartable init containers (sidecars) listen too.
    pub init_containers: Vec<Container>,
    /// hostNetwork
    pub host_network: bool,
    /// hostname
    pub hostname: Option<String>,
    /// subdomain
    pub subdomain: Option<String>,
    /// nodeName: a node of the lab.
    pub node_name: Option<String>,
}

/// A container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Container {
    /// Name.
    pub name: String,
    /// Ports.
    pub ports: Vec<ContainerPort>,
    /// `Always`: a sidecar.
    pub restart_policy: Option<String>,
}

/// A port of a container.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerPort {
    /// Name, for targetPort.
    #[serde(default)]
    pub name: Option<String>,
    /// Port.
    pub container_port: u16,
    /// TCP, UDP, SCTP.
    #[serde(default = "tcp")]
    pub protocol: String,
}

fn tcp() -> String {
    "TCP".to_owned()
}

impl PodSpec {
    /// Every port of a container that keeps running.
    pub fn ports(&self) -> impl Iterator<Item = &ContainerPort> {
        let sidecars = self
            .init_containers
            .iter()
            .filter(|c| c.restart_policy.as_deref() == Some("Always"));
        self.containers
            .iter()
            .chain(sidecars)
            .flat_map(|c| &c.ports)
    }
}

/// A Service.
#[derive(Debug, Clone)]
pub struct Service {
    /// Labels, annotations.
    pub metadata: Metadata,
    /// What the lab reads of its spec.
    pub spec: ServiceSpec,
    /// The whole spec, which goes into the cluster's folder as it is.
    pub raw: Value,
}

/// What the lab reads of a Service.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ServiceSpec {
    /// ClusterIP, NodePort, LoadBalancer, ExternalName.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// `None` as a string: headless.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// Given addresses.
    #[serde(rename = "clusterIPs")]
    pub cluster_ips: Vec<String>,
    /// IPv4, IPv6.
    pub ip_families: Vec<String>,
    /// Which pods.
    pub selector: BTreeMap<String, String>,
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// publishNotReadyAddresses
    pub publish_not_ready_addresses: bool,
}

/// A port of a Service.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Name, empty for the only one.
    #[serde(default)]
    pub name: String,
    /// Port.
    pub port: u16,
    /// TCP, UDP, SCTP.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// A number, or the name of a container's port; absent: `port`.
    #[serde(default)]
    pub target_port: Option<TargetPort>,
}

/// targetPort.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum TargetPort {
    /// A port.
    Number(u16),
    /// A container port's name.
    Name(String),
}

/// All that was read.
#[derive(Debug, Default)]
pub struct Application {
    /// What makes pods.
    pub workloads: Vec<Workload>,
    /// Services.
    pub services: Vec<Service>,
    /// Objects that the cluster's folder takes as they are: EndpointSlices, Namespaces, IPPools.
    pub others: Vec<Value>,
    /// What was left out, and why, for the person.
    pub notes: Vec<String>,
}

/// Reads a file, or every manifest below a folder.
pub fn read(path: &Path) -> Result<Application> {
    let mut application = Application::default();
    for file in files(path)? {
        read_file(&file, &mut application)?;
    }
    ensure!(
        !application.workloads.is_empty(),
        "{}: no Deployment, StatefulSet, DaemonSet, ReplicaSet or Pod in it; a lab needs something to run",
        path.display()
    );
    Ok(application)
}

fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let metadata = std::fs::metadata(path)
        .with_context(|| format!("{}: no such file or folder of manifests", path.display()))?;
    if metadata.is_file() {
        return Ok(vec![path.to_owned()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).with_context(|| format!("reading {}", path.display()))? {
        let file = entry?.path();
        let is_manifest = file
            .extension()
            .is_some_and(|e| e == "yaml" || e == "yml" || e == "json");
        if file.is_dir() {
            found.extend(files(&file)?);
        } else if is_manifest {
            found.push(file);
        }
    }
    found.sort();
    Ok(found)
}

fn read_file(path: &Path, application: &mut Application) -> Result<()> {
    let size = std::fs::metadata(path)?.len();
    ensure!(
        size <= LARGEST_FILE,
        "{}: {size} bytes; a manifest has at most {LARGEST_FILE}",
        path.display()
    );
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse_into(&path.display().to_string(), &text, application)
}

/// Every document, `null` ones included. Booleans are YAML 1.2's, so that a namespace may be called `n`.
pub fn documents(text: &str) -> Result<Vec<Value>, serde_saphyr::Error> {
    serde_saphyr::from_multiple_with_options(text, serde_saphyr::options! { strict_booleans: true })
}

/// Parses a text of manifests that has no file of its own.
pub fn parse(name: &str, text: &str) -> Result<Application> {
    let mut application = Application::default();
    parse_into(name, text, &mut application)?;
    Ok(application)
}

fn parse_into(name: &str, text: &str, application: &mut Application) -> Result<()> {
    let documents = documents(text).map_err(|e| {
        // The parser draws a picture of the place; its first line says it all.
        let line = e.to_string().lines().next().unwrap_or_default().to_owned();
        anyhow::anyhow!("{name}: not YAML: {line}")
    })?;
    for document in documents {
        if document.is_null() {
            continue;
        }
        let what = name_of(&document);
        take(document, application).with_context(|| format!("{name}: {what}"))?;
    }
    Ok(())
}

fn name_of(document: &Value) -> String {
    let word = |pointer: &str| {
        document
            .pointer(pointer)
            .and_then(Value::as_str)
            .unwrap_or("?")
            .to_owned()
    };
    if document.is_object() {
        format!("{} {}", word("/kind"), word("/metadata/name"))
    } else {
        "a document that is no mapping".to_owned()
    }
}

fn take(document: Value, application: &mut Application) -> Result<()> {
    let kind = document
        .get("kind")
        .and_then(Value::as_str)
        .context("kind: missing; every object has one")?
        .to_owned();
    if kind == "List" {
        for item in document
            .get("items")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default()
        {
            take(item, application)?;
        }
        return Ok(());
    }
    let metadata: Metadata = section(&document, "metadata")?;
    ensure!(
        !metadata.name.is_empty(),
        "metadata.name: missing; every object has one"
    );
    let namespace = if metadata.namespace.is_empty() {
        "default"
    } else {
        &metadata.namespace
    }
    .to_owned();
    match kind.as_str() {
        "Deployment" | "StatefulSet" | "ReplicaSet" | "DaemonSet" => {
            let spec = document.get("spec").context("spec: missing")?;
            let template: Template = section(spec, "template")?;
            ensure!(
                !template.spec.containers.is_empty(),
                "spec.template.spec.containers: a pod has at least one"
            );
            let replicas = spec
                .get("replicas")
                .map_or(Some(1), Value::as_u64)
                .context("spec.replicas: not a number")?;
            application.workloads.push(Workload {
                service_name: spec
                    .get("serviceName")
                    .and_then(Value::as_str)
                    .map(str::to_owned),
                replicas: u32::try_from(replicas)?,
                name: metadata.name,
                namespace,
                kind,
                template,
            });
        }
        "Pod" => {
            let spec: PodSpec = section(&document, "spec")?;
            ensure!(
                !spec.containers.is_empty(),
                "spec.containers: a pod has at least one"
            );
            application.workloads.push(Workload {
                service_name: None,
                replicas: 1,
                name: metadata.name.clone(),
                namespace,
                kind,
                template: Template { metadata, spec },
            });
        }
        "Service" => {
            let spec: ServiceSpec = section(&document, "spec")?;
            let external = spec.kind.as_deref() == Some("ExternalName");
            let headless = spec.cluster_ip.as_deref() == Some("None");
            ensure!(
                external || headless || !spec.ports.is_empty(),
                "spec.ports: missing; only headless and ExternalName services have none"
            );
            let raw = document.get("spec").cloned().unwrap_or_default();
            application.services.push(Service {
                metadata: Metadata {
                    namespace,
                    ..metadata
                },
                spec,
                raw,
            });
        }
        "EndpointSlice" | "Namespace" | "IPPool" => application.others.push(document),
        "ServiceAccount"
        | "ConfigMap"
        | "Secret"
        | "Role"
        | "RoleBinding"
        | "ClusterRole"
        | "ClusterRoleBinding"
        | "PersistentVolumeClaim"
        | "HorizontalPodAutoscaler"
        | "PodDisruptionBudget" => {}
        other => application.notes.push(format!(
            "{other} {namespace}/{}: the lab does not run these",
            metadata.name
        )),
    }
    Ok(())
}

/// A part of an object, typed; an error names the field.
fn section<T: serde::de::DeserializeOwned>(object: &Value, name: &str) -> Result<T> {
    let Some(value) = object.get(name) else {
        bail!("{name}: missing");
    };
    serde_json::from_value(value.clone())
        .with_context(|| format!("{name}: not as Kubernetes has it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Result<Application> {
        let directory = tempfile::tempdir()?;
        std::fs::write(directory.path().join("a.yaml"), text)?;
        read(directory.path())
    }

    const POD: &str = "kind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, ports: [{containerPort: 80}]}]}\n";

    #[test]
    fn what_people_write_is_read() {
        let application = read_text(&format!(
            "{POD}---\nkind: Service\nmetadata: {{name: s, namespace: n}}\nspec:\n  selector: {{a: b}}\n  ports:\n  - \
             {{port: 80, targetPort: web}}\n  - {{name: x, port: 53, protocol: UDP, targetPort: 5353}}\n---\n"
        ))
        .unwrap();
        assert_eq!(application.workloads[0].namespace, "default");
        assert_eq!(application.workloads[0].template.spec.ports().count(), 1);
        let ports = &application.services[0].spec.ports;
        assert_eq!(ports[0].target_port, Some(TargetPort::Name("web".into())));
        assert_eq!(ports[1].target_port, Some(TargetPort::Number(5353)));
        assert_eq!(ports[0].protocol, "TCP");
    }

    #[test]
    fn what_is_wrong_is_one_line_with_file_and_object() {
        for (text, says) in [
            ("kind: [", "a.yaml: not YAML"),
            ("metadata: {name: x}\n", "kind: missing"),
            (
                "kind: Service\nmetadata: {name: s}\nspec: {ports: [{port: http}]}\n",
                "Service s: spec",
            ),
            (
                "kind: Deployment\nmetadata: {name: d}\nspec: {}\n",
                "Deployment d: template: missing",
            ),
            (
                "kind: ConfigMap\nmetadata: {name: c}\n",
                "needs something to run",
            ),
        ] {
            let error = format!("{:#}", read_text(text).unwrap_err());
            assert!(error.contains(says), "{error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }
}
