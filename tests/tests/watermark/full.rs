//! A dataplane that does not take an op: somebody else has filled its map of frontends, with what cannot be read back.

use std::net::Ipv4Addr;
use std::time::Duration;

use kun_ebpf_abi::service::{ServiceKey, ServiceValue, View, ViewKind};
use kun_ebpf_abi::{Addr, Port};
use kun_ebpf_loader::{ServiceConfig, ServiceDataplane, ServiceMaps};
use kun_harness::{wait_for, wait_until};
use serde_json::{Value, json};

use crate::lab::{Lab, MAX_BACKENDS, MAX_SERVICES, MAX_SLOTS, Node, SOON};

/// More than two publications, which are two seconds apart.
const WATCHED: Duration = Duration::from_secs(6);

/// A service id that nobody has.
const SPOILT: u32 = MAX_SERVICES - 1;

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

/// As many frontends as there is room for, all of a service whose slots lie beyond all slots: an agent that reads the maps back, as it
/// does after an op that failed, cannot do that either.
fn fill(maps: &mut ServiceMaps) {
    let value = ServiceValue {
        service: SPOILT,
        scope: 0,
        internal_view: 0,
        external_view: 0,
        pad: 0,
        affinity_secs: 0,
    };
    let nowhere = View {
        epoch: 1,
        count: 1,
        base: 1 << 30,
    };
    maps.publish(SPOILT, ViewKind::Cluster, nowhere).unwrap();
    for port in 1..u16::MAX {
        let key = key([203, 0, 113, 1].into(), port);
        if maps.upsert_service(&key, &value).is_err() {
            return;
        }
    }
    panic!("there is no end to the map");
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

/// What its dataplane could not take in a node has not applied, however often the other publishes it.
pub(crate) fn what_the_dataplane_refused_is_not_published(lab: &Lab) {
    let (here, there) = (&lab.nodes[0], &lab.nodes[1]);
    let mut dataplane = dataplane(here);
    let failed = failures(here);
    fill(dataplane.maps());
    let (address, revision) = serve(lab, "more");
    wait_for("an op to fail", SOON, || {
        (failures(here) > failed).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}: {}", here.log()));
    wait_for("the other node", SOON, || {
        (lab.published(there.name) >= revision).then_some(())
    })
    .unwrap();
    let told = wait_until(WATCHED, || lab.published(here.name) >= revision);
    assert!(
        !told,
        "{revision} is published and not applied: {}",
        here.log()
    );
    assert!(lab.folded() < revision);
    let served = |maps: &ServiceMaps| maps.service(&key(address, 80)).unwrap().is_some();
    assert!(!served(dataplane.maps()));
    // The maps can be read again; what nobody wants the agent removes.
    let nothing = View::default();
    dataplane
        .maps()
        .publish(SPOILT, ViewKind::Cluster, nothing)
        .unwrap();
    wait_for("what is applied to be published", SOON, || {
        (lab.published(here.name) >= revision).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", here.log()));
    assert!(served(dataplane.maps()));
    let words = [
        "-n",
        "default",
        "delete",
        "service/more",
        "endpointslice/more-4",
    ];
    lab.plane.kubectl(&words, "").unwrap();
}
