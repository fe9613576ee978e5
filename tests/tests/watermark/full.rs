//! A dataplane that does not take an op: somebody else has filled its map of frontends, and fills it again as fast as the agent clears it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kun_ebpf_abi::service::{ServiceKey, ServiceValue};
use kun_ebpf_abi::{Addr, Port};
use kun_ebpf_loader::{ServiceConfig, ServiceDataplane};
use kun_harness::{wait_for, wait_until};
use serde_json::json;

use crate::lab::{Lab, MAX_BACKENDS, MAX_SERVICES, MAX_SLOTS, Node, SOON};

/// More than two publications, which are two seconds apart.
const WATCHED: Duration = Duration::from_secs(6);

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

/// Frontends that nobody wants, as many as there is room for.
fn fill(dataplane: &mut ServiceDataplane) {
    let value = ServiceValue {
        service: MAX_SERVICES - 1,
        scope: 0,
        internal_view: 0,
        external_view: 0,
        pad: 0,
        affinity_secs: 0,
    };
    for port in 1..=u16::MAX {
        let key = ServiceKey {
            addr: Addr::v4([203, 0, 113, 1]),
            port: Port::new(port),
            proto: 6,
            pad: 0,
        };
        if dataplane.maps().upsert_service(&key, &value).is_err() {
            return;
        }
    }
}

fn failures(node: &Node) -> usize {
    node.log().matches("an op failed").count()
}

/// What its dataplane could not take in a node has not applied, however often the other publishes it.
pub(crate) fn what_the_dataplane_refused_is_not_published(lab: &mut Lab) {
    let (here, there) = (&lab.nodes[0], &lab.nodes[1]);
    let mut dataplane = dataplane(here);
    let failed = failures(here);
    let stop = AtomicBool::new(false);
    let revision = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                fill(&mut dataplane);
            }
        });
        let asserted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
                {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "more", "namespace": "default"},
                    "spec": {"ports": [{"name": "http", "port": 80}]}},
                {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                    "metadata": {"name": "more-4", "namespace": "default", "labels": {"kubernetes.io/service-name": "more"}},
                    "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
                    "endpoints": [{"addresses": ["198.51.100.7"], "conditions": {"ready": true}}]},
            ]});
            lab.plane
                .kubectl(&["apply", "-f", "-"], &objects.to_string())
                .unwrap();
            let slice = lab.get(&["-n", "default", "endpointslice", "more-4"]);
            let revision = slice["metadata"]["resourceVersion"].as_str().unwrap();
            let revision: u64 = revision.parse().unwrap();
            wait_for("an op to fail", SOON, || {
                (failures(here) > failed).then_some(())
            })
            .unwrap_or_else(|e| panic!("{e:#}\n{}", here.log()));
            wait_for("the other node", SOON, || {
                (lab.published(there.name) >= revision).then_some(())
            })
            .unwrap();
            let told = wait_until(WATCHED, || lab.published(here.name) >= revision);
            assert!(
                !told,
                "{revision} is published, and the maps do not hold it: {}",
                here.log()
            );
            assert!(lab.folded() < revision);
            revision
        }));
        stop.store(true, Ordering::Relaxed);
        asserted.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    wait_for("what is applied to be published", SOON, || {
        (lab.published(here.name) >= revision).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e:#}\n{}", here.log()));
    let words = [
        "-n",
        "default",
        "delete",
        "service/more",
        "endpointslice/more-4",
    ];
    lab.plane.kubectl(&words, "").unwrap();
}
