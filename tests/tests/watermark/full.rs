//! A dataplane that does not take an op: somebody else has filled its map of frontends, and fills it again as fast as the agent clears it.

use std::net::Ipv4Addr;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kun_ebpf_abi::service::{ServiceKey, ServiceValue};
use kun_ebpf_abi::{Addr, Port};
use kun_ebpf_loader::{ServiceConfig, ServiceDataplane};
use kun_harness::{wait_for, wait_until};
use serde_json::{Value, json};

use crate::lab::{Lab, MAX_BACKENDS, MAX_SERVICES, MAX_SLOTS, Node, SOON};

/// More than two publications, which are two seconds apart.
const WATCHED: Duration = Duration::from_secs(6);

const ATTEMPTS: usize = 5;

fn dataplane(node: &Node) -> ServiceDataplane {
    let config = ServiceConfig {
        bpffs_root: node.bpffs.path().join("kun"),
        mount_bpffs: false,
        cgroup_root: node.cgroup.path().to_owned(),
        max_services: MAX_SERVICES,
        max_backends: MAX_BACKENDS,
        max_slots: MAX_SLOTS,
        max_flows: MAX_SLOTS,
    };
    node.netns
        .run(|| ServiceDataplane::open(&config))
        .unwrap()
        .0
}

fn key(address: Ipv4Addr, port: u16) -> ServiceKey {
    ServiceKey {
        addr: Addr::v4(address.octets()),
        port: Port::new(port),
        proto: 6,
        pad: 0,
    }
}

/// Frontends that nobody wants, as many as there is room for.
fn fill(dataplane: &Mutex<ServiceDataplane>, stop: &AtomicBool) {
    let value = ServiceValue {
        service: MAX_SERVICES - 1,
        scope: 0,
        internal_view: 0,
        external_view: 0,
        pad: 0,
        affinity_secs: 0,
    };
    let ports = 1..=u16::try_from(2 * MAX_SERVICES).unwrap();
    let keys: Vec<ServiceKey> = ports
        .map(|port| key([203, 0, 113, 1].into(), port))
        .collect();
    let values = vec![value; keys.len()];
    while !stop.load(Ordering::Relaxed) {
        let mut dataplane = dataplane.lock().unwrap();
        let full = dataplane.maps().upsert_services(&keys, &values);
        assert!(full.is_err(), "there was room for all");
    }
}

fn failures(node: &Node) -> usize {
    node.log().matches("an op failed").count()
}

/// A Service with an endpoint: its address, and the revision of its slice.
fn serve(lab: &Lab, name: &str) -> (Ipv4Addr, u64) {
    let slice = format!("{name}-4");
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
            "spec": {"ports": [{"name": "http", "port": 80}]}},
        {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": slice, "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["198.51.100.7"], "conditions": {"ready": true}}]},
    ]});
    let words = ["apply", "-f", "-"];
    lab.plane.kubectl(&words, &objects.to_string()).unwrap();
    let service = lab.get(&["-n", "default", "service", name]);
    let slice = lab.get(&["-n", "default", "endpointslice", &slice]);
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let address = text(&service["spec"]["clusterIP"]).parse().unwrap();
    let revision = text(&slice["metadata"]["resourceVersion"]).parse().unwrap();
    (address, revision)
}

/// What its dataplane could not take in a node has not applied, however often the other publishes it. Once in a while the agent is faster
/// than who fills the map; then the map has the Service, and another one is tried.
pub(crate) fn what_the_dataplane_refused_is_not_published(lab: &Lab) {
    let (here, there) = (&lab.nodes[0], &lab.nodes[1]);
    let dataplane = Mutex::new(dataplane(here));
    let (failed, stop) = (failures(here), AtomicBool::new(false));
    let names: Vec<String> = (0..ATTEMPTS).map(|n| format!("more-{n}")).collect();
    let refused = |name: &String| {
        let (address, revision) = serve(lab, name);
        wait_for("the other node", SOON, || {
            (lab.published(there.name) >= revision).then_some(())
        })
        .unwrap();
        let told = wait_until(WATCHED, || lab.published(here.name) >= revision);
        if told {
            let mut dataplane = dataplane.lock().unwrap();
            let served = dataplane.maps().service(&key(address, 80)).unwrap();
            assert!(
                served.is_some(),
                "{revision} is published and not applied: {}",
                here.log()
            );
            return None;
        }
        assert!(lab.folded() < revision);
        Some(revision)
    };
    let revision = std::thread::scope(|scope| {
        scope.spawn(|| fill(&dataplane, &stop));
        let tried = AssertUnwindSafe(|| names.iter().find_map(refused));
        let tried = std::panic::catch_unwind(tried);
        stop.store(true, Ordering::Relaxed);
        tried.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    assert!(failures(here) > failed, "no op failed: {}", here.log());
    let revision = revision.expect("the agent was faster each time");
    wait_for("what is applied to be published", SOON, || {
        (lab.published(here.name) >= revision).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", here.log()));
    for name in &names {
        let objects = [format!("service/{name}"), format!("endpointslice/{name}-4")];
        let words = [
            "-n",
            "default",
            "delete",
            "--ignore-not-found",
            &objects[0],
            &objects[1],
        ];
        lab.plane.kubectl(&words, "").unwrap();
    }
}
