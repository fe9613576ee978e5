//! From manifests to the objects that the API server is given: the workloads as they are written, but running the lab's image, and
//! listening where their services point. From there on, pods and EndpointSlices are the real controllers' work.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::super::expand::{PodPlan, ServicePlan, listen_where_services_point};
use super::super::manifests::{Application, ContainerPort, Service, Workload};
use super::super::names::MACHINES;
use super::super::node::machine;
use super::super::pod::{first_tcp, server_words};
use super::super::server::READY_PATH;
use super::image;

/// Every object, in the order in which it must be made.
pub fn of(application: &Application, services: &[ServicePlan]) -> Vec<Value> {
    let mut objects = namespaces(application);
    objects.extend(
        application
            .others
            .iter()
            .filter(|o| o["kind"] == "EndpointSlice")
            .cloned(),
    );
    objects.extend(application.services.iter().map(service));
    let workloads = application.workloads.iter();
    objects.extend(workloads.map(|given| workload(given, services)));
    objects
}

fn namespaces(application: &Application) -> Vec<Value> {
    let of_workloads = application.workloads.iter().map(|w| &w.namespace);
    let of_services = application.services.iter().map(|s| &s.metadata.namespace);
    let names: BTreeSet<&String> = of_workloads.chain(of_services).collect();
    // Those of every cluster exist.
    let made = names
        .into_iter()
        .filter(|name| !["default", "kube-system"].contains(&name.as_str()));
    made.map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}))
        .collect()
}

/// As it was written; a service that does not say gets both families, as it does from a folder.
fn service(service: &Service) -> Value {
    let meta = &service.metadata;
    let mut spec = service.raw.clone();
    let external = service.spec.kind.as_deref() == Some("ExternalName");
    if !external && spec["ipFamilyPolicy"].is_null() && spec["ipFamilies"].is_null() {
        spec["ipFamilyPolicy"] = json!("PreferDualStack");
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

fn workload(given: &Workload, services: &[ServicePlan]) -> Value {
    let mut labels = given.template.metadata.labels.clone();
    if labels.is_empty() {
        // A selector must select something.
        labels.insert("kun-lab/workload".to_owned(), given.name.clone());
    }
    let ports = ports(given, &labels, services);
    let mut spec = server_pod(&ports, given.kind == "StatefulSet");
    let template = &given.template.spec;
    for (field, value) in [
        ("hostname", &template.hostname),
        ("subdomain", &template.subdomain),
        ("nodeName", &template.node_name),
    ] {
        if let Some(value) = value {
            spec[field] = json!(value);
        }
    }
    let annotations = &given.template.metadata.annotations;
    let mut metadata = json!({"name": given.name, "namespace": given.namespace});
    if given.kind == "Pod" {
        metadata["labels"] = json!(labels);
        metadata["annotations"] = json!(annotations);
        return json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
    }
    let mut outer = json!({
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels, "annotations": annotations}, "spec": spec},
    });
    if given.kind != "DaemonSet" {
        outer["replicas"] = json!(given.replicas);
    }
    if given.kind == "StatefulSet" {
        outer["serviceName"] = json!(given.service_name.clone().unwrap_or_default());
    }
    json!({"apiVersion": "apps/v1", "kind": given.kind, "metadata": metadata, "spec": outer})
}

fn ports(
    given: &Workload,
    labels: &BTreeMap<String, String>,
    services: &[ServicePlan],
) -> Vec<ContainerPort> {
    let mut plans = [PodPlan {
        namespace: given.namespace.clone(),
        name: given.name.clone(),
        node: &MACHINES[0],
        labels: labels.clone(),
        annotations: BTreeMap::new(),
        hostname: None,
        subdomain: None,
        ports: given.template.spec.ports().cloned().collect(),
    }];
    listen_where_services_point(&mut plans, services);
    let [plan] = plans;
    plan.ports
}

fn server_pod(ports: &[ContainerPort], over_tcp: bool) -> Value {
    let mut container = container(
        "main",
        "kun-lab",
        &server_words("$(POD_NAME)", ports),
        ports,
    );
    if let Some(port) = first_tcp(ports) {
        // A database speaks no HTTP.
        let how = match over_tcp {
            true => json!({"tcpSocket": {"port": port}}),
            false => json!({"httpGet": {"path": READY_PATH, "port": port}}),
        };
        container["readinessProbe"] = probe(how);
    }
    json!({
        "containers": [container],
        "automountServiceAccountToken": false,
        // The server serves on for a moment after it is told to end.
        "terminationGracePeriodSeconds": 15,
    })
}

fn container(name: &str, program: &str, words: &[String], ports: &[ContainerPort]) -> Value {
    let field = |name: &str, path: &str| json!({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}});
    let ports: Vec<Value> = ports
        .iter()
        .map(|port| {
            let mut json = json!({"containerPort": port.container_port, "protocol": port.protocol});
            if let Some(name) = &port.name {
                json["name"] = json!(name);
            }
            json
        })
        .collect();
    json!({
        "name": name,
        "image": image::POD,
        "imagePullPolicy": "Never",
        "command": [format!("{}/{program}", image::PROGRAMS)],
        "args": words,
        "env": [field("POD_NAME", "metadata.name"), field("NODE_NAME", "spec.nodeName")],
        "ports": ports,
    })
}

fn probe(mut how: Value) -> Value {
    how["periodSeconds"] = json!(1);
    how["failureThreshold"] = json!(2);
    how["timeoutSeconds"] = json!(2);
    how
}

/// LoadBalancer addresses by `namespace/name`, from the Services' status.
pub fn load_balancers(services: &[Value]) -> BTreeMap<String, Vec<IpAddr>> {
    let mut found = BTreeMap::new();
    for service in services
        .iter()
        .filter(|s| s["spec"]["type"] == "LoadBalancer")
    {
        let word = |field: &str| service["metadata"][field].as_str().unwrap_or_default();
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
        let ips = ingress.into_iter().flatten();
        let ips = ips.filter_map(|entry| entry["ip"].as_str()?.parse().ok());
        found.insert(
            format!("{}/{}", word("namespace"), word("name")),
            ips.collect(),
        );
    }
    found
}

/// A pod of the API server's, as the lab's probes want it. `None`: not on a node, or without addresses.
pub fn pod_plan(pod: &Value) -> Result<Option<PodPlan>> {
    let meta = &pod["metadata"];
    let spec = &pod["spec"];
    let word = |value: &Value| value.as_str().map(str::to_owned);
    let words = |value: &Value| -> Result<BTreeMap<String, String>> {
        match value {
            Value::Null => Ok(BTreeMap::new()),
            given => serde_json::from_value(given.clone()).context("labels or annotations"),
        }
    };
    let Some(node) = spec["nodeName"].as_str() else {
        return Ok(None);
    };
    let containers = spec["containers"].as_array().into_iter().flatten();
    let ports = containers
        .flat_map(|c| c["ports"].as_array().cloned().unwrap_or_default())
        .map(serde_json::from_value)
        .collect::<Result<_, _>>()
        .context("ports of a pod")?;
    Ok(Some(PodPlan {
        namespace: word(&meta["namespace"]).unwrap_or_default(),
        name: word(&meta["name"]).unwrap_or_default(),
        node: machine(node).with_context(|| format!("{node}: no such machine"))?,
        labels: words(&meta["labels"])?,
        annotations: words(&meta["annotations"])?,
        hostname: word(&spec["hostname"]),
        subdomain: word(&spec["subdomain"]),
        ports,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::{expand, manifests};

    const SHOP: &str = "
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  template:
    metadata: {labels: {app: web}, annotations: {kun.network/ipv4: \"false\"}}
    spec: {containers: [{name: c, image: example.net/web, ports: [{name: http, containerPort: 8080}]}]}
---
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}, {name: more, port: 1, targetPort: 99}]}
";

    #[test]
    fn a_workload_runs_the_labs_image_and_listens_where_services_point() {
        let application = manifests::parse("test", SHOP).unwrap();
        let services = expand::services(&application).unwrap();
        let objects = of(&application, &services);
        let kinds: Vec<&str> = objects
            .iter()
            .map(|o| o["kind"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["Service", "Deployment"]);
        assert_eq!(objects[0]["spec"]["ipFamilyPolicy"], "PreferDualStack");
        let spec = &objects[1]["spec"];
        assert_eq!(spec["replicas"], 3);
        let container = &spec["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], image::POD);
        assert_eq!(
            container["args"],
            json!([
                "serve",
                "--name",
                "$(POD_NAME)",
                "--tcp",
                "8080",
                "--tcp",
                "99"
            ])
        );
        assert_eq!(container["readinessProbe"]["httpGet"]["port"], 8080);
        let mut pod = spec["template"].clone();
        pod["metadata"]["name"] = json!("web-1");
        assert!(pod_plan(&pod).unwrap().is_none(), "it is on no node yet");
        pod["spec"]["nodeName"] = json!("node-b");
        let plan = pod_plan(&pod).unwrap().unwrap();
        assert!(plan.v6_only() && plan.ports.len() == 2);
    }
}
