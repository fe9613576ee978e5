//! From manifests to what a cluster's controllers would make of them: pods on nodes, cluster addresses, EndpointSlices.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::manifests::{Application, ContainerPort, Service, ServicePort, TargetPort, Workload};
use super::names::{MACHINES, Machine, cluster_ip};

/// More pods than this on one machine's lab is a slip of the pen in `replicas`.
const MOST_PODS: usize = 150;

/// A pod, placed.
#[derive(Debug, Clone)]
pub struct PodPlan {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Its node.
    pub node: &'static Machine,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
    /// hostname, where the pod has one of its own.
    pub hostname: Option<String>,
    /// subdomain.
    pub subdomain: Option<String>,
    /// What it listens on.
    pub ports: Vec<ContainerPort>,
}

impl PodPlan {
    /// Whether the annotation asks for IPv6 alone.
    pub fn v6_only(&self) -> bool {
        self.annotations
            .get("kun.network/ipv4")
            .is_some_and(|v| v == "false")
    }

    fn matches(&self, namespace: &str, selector: &BTreeMap<String, String>) -> bool {
        self.namespace == namespace
            && selector
                .iter()
                .all(|(key, value)| self.labels.get(key) == Some(value))
    }
}

/// A container may listen on ports that it does not declare: those that services name by number.
pub fn listen_where_services_point(pods: &mut [PodPlan], services: &[ServicePlan]) {
    for pod in pods {
        for plan in services {
            let service = &plan.service;
            if service.spec.selector.is_empty()
                || !pod.matches(&service.metadata.namespace, &service.spec.selector)
            {
                continue;
            }
            for port in &service.spec.ports {
                let Some(number) = resolve(port, pod) else {
                    continue;
                };
                if !pod
                    .ports
                    .iter()
                    .any(|p| p.container_port == number && p.protocol == port.protocol)
                {
                    pod.ports.push(ContainerPort {
                        name: None,
                        container_port: number,
                        protocol: port.protocol.clone(),
                    });
                }
            }
        }
    }
}

/// A service with its addresses.
#[derive(Debug, Clone)]
pub struct ServicePlan {
    /// As written.
    pub service: Service,
    /// Cluster addresses; empty: headless or ExternalName.
    pub cluster_ips: Vec<IpAddr>,
}

impl ServicePlan {
    /// `name.namespace.svc.cluster.local.`
    pub fn dns_name(&self) -> String {
        let meta = &self.service.metadata;
        format!(
            "{}.{}.svc.{}.",
            meta.name,
            meta.namespace,
            super::names::CLUSTER_DOMAIN
        )
    }

    /// `namespace/name`
    pub fn object(&self) -> String {
        format!(
            "{}/{}",
            self.service.metadata.namespace, self.service.metadata.name
        )
    }
}

/// The pods of every workload, spread over the nodes in turn.
pub fn pods(application: &Application, notes: &mut Vec<String>) -> Result<Vec<PodPlan>> {
    let nodes: Vec<&'static Machine> = MACHINES.iter().filter(|m| m.schedulable).collect();
    let mut pods = Vec::new();
    let mut turn = 0;
    for workload in &application.workloads {
        let object = format!("{} {}/{}", workload.kind, workload.namespace, workload.name);
        if workload.template.spec.host_network {
            notes.push(format!("{object}: hostNetwork: the lab does not run these"));
            continue;
        }
        let replicas = if workload.kind == "DaemonSet" {
            nodes.len()
        } else {
            workload.replicas as usize
        };
        for index in 0..replicas {
            let node = match &workload.template.spec.node_name {
                Some(wanted) => nodes
                    .iter()
                    .copied()
                    .find(|n| n.name == wanted)
                    .ok_or_else(|| {
                        anyhow::anyhow!(
                            "{object}: nodeName {wanted}: the lab's nodes are node-a and node-b"
                        )
                    })?,
                None if workload.kind == "DaemonSet" => nodes[index],
                None => {
                    turn += 1;
                    nodes[(turn - 1) % nodes.len()]
                }
            };
            pods.push(pod(workload, index, node));
        }
        ensure!(
            pods.len() <= MOST_PODS,
            "{object}: more than {MOST_PODS} pods in all; lower spec.replicas"
        );
    }
    Ok(pods)
}

fn pod(workload: &Workload, index: usize, node: &'static Machine) -> PodPlan {
    let spec = &workload.template.spec;
    let ordinal = format!("{}-{index}", workload.name);
    let stateful = workload.kind == "StatefulSet";
    let name = match workload.kind.as_str() {
        "Pod" => workload.name.clone(),
        "StatefulSet" => ordinal.clone(),
        _ => format!("{}-{}", workload.name, suffix(&ordinal)),
    };
    PodPlan {
        namespace: workload.namespace.clone(),
        node,
        labels: workload.template.metadata.labels.clone(),
        annotations: workload.template.metadata.annotations.clone(),
        hostname: if stateful {
            Some(name.clone())
        } else {
            spec.hostname.clone()
        },
        subdomain: if stateful {
            workload.service_name.clone()
        } else {
            spec.subdomain.clone()
        },
        ports: spec.ports().cloned().collect(),
        name,
    }
}

/// Five letters that look as a ReplicaSet's do, and are the same in every run.
fn suffix(of: &str) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    // FNV-1a: any mixing does.
    let mut hash = of.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut letters = String::new();
    for _ in 0..5 {
        letters.push(char::from(LETTERS[(hash % LETTERS.len() as u64) as usize]));
        hash /= LETTERS.len() as u64;
    }
    letters
}

/// Gives each service its addresses: those it asks for, else the next ones, in the families it asks for (else both).
pub fn services(application: &Application) -> Result<Vec<ServicePlan>> {
    // The tenth is the DNS service's.
    let mut next = 11_u16;
    let mut plans = Vec::new();
    for service in &application.services {
        let spec = &service.spec;
        let external = spec.kind.as_deref() == Some("ExternalName");
        let headless = spec.cluster_ip.as_deref() == Some("None");
        let mut cluster_ips = Vec::new();
        if !external && !headless {
            let given: Vec<&String> = spec
                .cluster_ip
                .iter()
                .chain(&spec.cluster_ips)
                .filter(|ip| !ip.is_empty())
                .collect();
            for ip in given {
                let ip: IpAddr = ip.parse().map_err(|_| {
                    anyhow::anyhow!(
                        "Service {}: clusterIP {ip} is not an IP address",
                        service.metadata.name
                    )
                })?;
                if !cluster_ips.contains(&ip) {
                    cluster_ips.push(ip);
                }
            }
            if cluster_ips.is_empty() {
                cluster_ips = families(spec)
                    .iter()
                    .map(|&v6| cluster_ip(next, v6))
                    .collect();
                next += 1;
            }
        }
        plans.push(ServicePlan {
            service: service.clone(),
            cluster_ips,
        });
    }
    Ok(plans)
}

/// `true`: IPv6. The first is the primary; an IPv6-first cluster names IPv6 first.
fn families(spec: &super::manifests::ServiceSpec) -> Vec<bool> {
    if spec.ip_families.is_empty() {
        return vec![true, false];
    }
    spec.ip_families
        .iter()
        .map(|family| family == "IPv6")
        .collect()
}

/// A running pod: what the endpoint controller knows of it.
#[derive(Debug, Clone)]
pub struct Endpoint<'a> {
    /// The pod.
    pub pod: &'a PodPlan,
    /// Its addresses.
    pub addresses: &'a [IpAddr],
    /// Whether it answers.
    pub ready: bool,
}

/// The EndpointSlices of a service: one for each family and each way in which its ports resolve.
pub fn endpoint_slices(plan: &ServicePlan, pods: &[Endpoint<'_>]) -> Vec<Value> {
    let service = &plan.service;
    if service.spec.selector.is_empty() {
        return Vec::new();
    }
    let meta = &service.metadata;
    let families = if plan.cluster_ips.is_empty() {
        families(&service.spec)
    } else {
        plan.cluster_ips.iter().map(IpAddr::is_ipv6).collect()
    };
    let mut slices = Vec::new();
    for v6 in families {
        let mut by_ports: BTreeMap<Vec<u16>, Vec<Value>> = BTreeMap::new();
        for endpoint in pods
            .iter()
            .filter(|e| e.pod.matches(&meta.namespace, &service.spec.selector))
        {
            let Some(address) = endpoint.addresses.iter().find(|a| a.is_ipv6() == v6) else {
                continue;
            };
            // A port whose name the pod does not have is left out of its slice (0 here).
            let ports: Vec<u16> = service
                .spec
                .ports
                .iter()
                .map(|port| resolve(port, endpoint.pod).unwrap_or(0))
                .collect();
            by_ports
                .entry(ports)
                .or_default()
                .push(endpoint_json(endpoint, *address, plan));
        }
        let kind = if v6 { "IPv6" } else { "IPv4" };
        if by_ports.is_empty() {
            by_ports.insert(Vec::new(), Vec::new());
        }
        for (number, (ports, endpoints)) in by_ports.into_iter().enumerate() {
            let ports: Vec<Value> = service
                .spec
                .ports
                .iter()
                .zip(&ports)
                .filter(|(_, number)| **number != 0)
                .map(|(port, number)| json!({"name": port.name, "port": number, "protocol": port.protocol}))
                .collect();
            let name = format!("{}-{}-{number}", meta.name, kind.to_lowercase());
            slices.push(json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {
                    "name": name,
                    "namespace": meta.namespace,
                    "labels": {
                        "kubernetes.io/service-name": meta.name,
                        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                    },
                },
                "addressType": kind,
                "ports": ports,
                "endpoints": endpoints,
            }));
        }
    }
    slices
}

fn endpoint_json(endpoint: &Endpoint<'_>, address: IpAddr, plan: &ServicePlan) -> Value {
    let pod = endpoint.pod;
    let mut json = json!({
        "addresses": [address],
        "conditions": {"ready": endpoint.ready, "serving": endpoint.ready, "terminating": false},
        "nodeName": pod.node.name,
        "zone": pod.node.zone,
        "targetRef": {"kind": "Pod", "namespace": pod.namespace, "name": pod.name},
    });
    // The endpoint has a hostname when the pod's subdomain is this service.
    if let Some(hostname) = &pod.hostname
        && pod.subdomain.as_deref() == Some(&plan.service.metadata.name)
    {
        json["hostname"] = Value::from(hostname.as_str());
    }
    json
}

/// The port on the pod that a service's port leads to; `None`: it has no port of that name.
pub fn resolve(port: &ServicePort, pod: &PodPlan) -> Option<u16> {
    match &port.target_port {
        None => Some(port.port),
        Some(TargetPort::Number(number)) => Some(*number),
        Some(TargetPort::Name(name)) => pod
            .ports
            .iter()
            .find(|p| p.name.as_ref() == Some(name) && p.protocol == port.protocol)
            .map(|p| p.container_port),
    }
}

/// The Service as an API server would show it.
pub fn service_json(plan: &ServicePlan) -> Value {
    let meta = &plan.service.metadata;
    let mut spec = plan.service.raw.clone();
    if !plan.cluster_ips.is_empty() {
        let families: Vec<&str> = plan
            .cluster_ips
            .iter()
            .map(|ip| if ip.is_ipv6() { "IPv6" } else { "IPv4" })
            .collect();
        spec["clusterIP"] = json!(plan.cluster_ips[0]);
        spec["clusterIPs"] = json!(plan.cluster_ips);
        spec["ipFamilies"] = json!(families);
        spec["ipFamilyPolicy"] = json!(if families.len() == 2 {
            "RequireDualStack"
        } else {
            "SingleStack"
        });
    }
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": meta.name, "namespace": meta.namespace, "labels": meta.labels, "annotations": meta.annotations,
        },
        "spec": spec,
    })
}

/// The Pod as an API server would show it.
pub fn pod_json(pod: &PodPlan, addresses: &[IpAddr]) -> Value {
    let ips: Vec<Value> = addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let mut spec = json!({"nodeName": pod.node.name, "containers": [{"name": "main"}]});
    if let Some(hostname) = &pod.hostname {
        spec["hostname"] = json!(hostname);
    }
    if let Some(subdomain) = &pod.subdomain {
        spec["subdomain"] = json!(subdomain);
    }
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod.name, "namespace": pod.namespace, "labels": pod.labels, "annotations": pod.annotations,
        },
        "spec": spec,
        "status": {"phase": "Running", "podIP": addresses.first(), "podIPs": ips},
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::manifests;

    fn application(text: &str) -> Application {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a.yaml"), text).unwrap();
        manifests::read(directory.path()).unwrap()
    }

    const APP: &str = r#"
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
---
kind: Pod
metadata: {name: old, labels: {app: web}, annotations: {kun.network/ipv4: "false"}}
spec: {containers: [{name: c, ports: [{name: http, containerPort: 9090}]}]}
---
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  template:
    metadata: {labels: {app: db}}
    spec: {containers: [{name: c, ports: [{containerPort: 5432}]}]}
---
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 5432}]}
"#;

    #[test]
    fn pods_are_spread_and_named_as_controllers_do() {
        let pods = pods(&application(APP), &mut Vec::new()).unwrap();
        let nodes: Vec<_> = pods.iter().map(|p| p.node.name).collect();
        assert_eq!(nodes, ["node-a", "node-b", "node-a", "node-b", "node-a"]);
        assert!(pods[0].name.starts_with("web-") && pods[0].name != pods[1].name);
        assert_eq!(pods[3].name, "old");
        assert_eq!(
            (pods[4].name.as_str(), pods[4].hostname.as_deref()),
            ("db-0", Some("db-0"))
        );
    }

    #[test]
    fn a_pod_listens_where_a_service_points() {
        let mut text = APP.to_owned();
        text.push_str("---\nkind: Service\nmetadata: {name: more}\nspec: {selector: {app: db}, ports: [{port: 1, targetPort: 99}]}\n");
        let application = application(&text);
        let mut pods = pods(&application, &mut Vec::new()).unwrap();
        listen_where_services_point(&mut pods, &services(&application).unwrap());
        let numbers: Vec<u16> = pods[4].ports.iter().map(|p| p.container_port).collect();
        assert_eq!(numbers, [5432, 99]);
    }

    #[test]
    fn slices_are_one_a_family_and_port_resolution() {
        let application = application(APP);
        let pods = pods(&application, &mut Vec::new()).unwrap();
        let services = services(&application).unwrap();
        let dual: [IpAddr; 2] = ["2001:db8::1".parse().unwrap(), "10.0.0.1".parse().unwrap()];
        let endpoints: Vec<Endpoint<'_>> = pods
            .iter()
            .map(|pod| Endpoint {
                pod,
                addresses: if pod.v6_only() { &dual[..1] } else { &dual },
                ready: true,
            })
            .collect();
        let web = endpoint_slices(&services[0], &endpoints);
        let shape: Vec<_> = web
            .iter()
            .map(|s| {
                (
                    s["addressType"].as_str().unwrap(),
                    s["ports"][0]["port"].as_u64().unwrap(),
                    s["endpoints"].as_array().unwrap().len(),
                )
            })
            .collect();
        assert_eq!(
            shape,
            [("IPv6", 8080, 3), ("IPv6", 9090, 1), ("IPv4", 8080, 3)]
        );

        let db = endpoint_slices(&services[1], &endpoints);
        assert_eq!(db[0]["endpoints"][0]["hostname"], "db-0");
        assert_eq!(db[0]["endpoints"][0]["zone"], "a");
    }

    #[test]
    fn services_get_addresses_in_their_families() {
        let mut text = APP.to_owned();
        text.push_str("---\nkind: Service\nmetadata: {name: six}\nspec: {ipFamilies: [IPv6], ports: [{port: 1}]}\n");
        let services = services(&application(&text)).unwrap();
        assert_eq!(
            services[0].cluster_ips,
            [cluster_ip(11, true), cluster_ip(11, false)]
        );
        assert!(services[1].cluster_ips.is_empty());
        assert_eq!(services[2].cluster_ips, [cluster_ip(12, true)]);
        assert_eq!(
            service_json(&services[2])["spec"]["ipFamilyPolicy"],
            "SingleStack"
        );
    }
}
