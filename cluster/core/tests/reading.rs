//! Objects of the API go through the reader of manifests. What Kubernetes' own kinds hold is for the API server to judge: a value that
//! kun does not know costs the part that it makes unusable, and never the object.

use kun_cluster_core::{
    Interner, Kind, Object, Origin, Reading, ServiceType, TrafficPolicy, read_api,
};
use kun_config::yaml::documents;

fn read(kind: Kind, json: &str) -> Reading {
    let trees = documents("test", json).expect("JSON");
    read_api(&mut Interner::default(), kind, "Kind shop/name", &trees[0])
}

fn faults(reading: &Reading) -> Vec<String> {
    reading.faults.0.iter().map(ToString::to_string).collect()
}

#[test]
fn an_unknown_value_costs_only_what_it_makes_unusable() {
    let reading = read(
        Kind::Service,
        r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "name", "namespace": "shop", "uid": "u", "resourceVersion": "7"},
            "spec": {"type": "Quantum", "clusterIPs": ["10.96.0.1", "010.96.0.2", "None"], "ipFamilies": ["IPv4", "IPv7"],
                "internalTrafficPolicy": "Somewhere", "sessionAffinity": "Cookie",
                "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81, "protocol": "QUIC"}, {"name": "c", "port": 0}]}}"#,
    );
    let Some(Object::Service(service)) = &reading.object else {
        panic!("the service is lost: {:?}", faults(&reading))
    };
    assert_eq!(service.kind, ServiceType::ClusterIp);
    assert_eq!(
        service.cluster_ips,
        ["10.96.0.1".parse::<std::net::IpAddr>().expect("an address")]
    );
    assert_eq!(service.families.len(), 1);
    assert_eq!(
        (service.internal_policy, service.affinity_secs),
        (TrafficPolicy::Cluster, None)
    );
    // A protocol that nobody knows is not TCP.
    assert_eq!(
        service.ports.iter().map(|p| p.port).collect::<Vec<_>>(),
        [80]
    );
    assert_eq!(
        service.meta.origin,
        Origin::Api {
            resource_version: "7".into()
        }
    );
    let told = faults(&reading);
    assert_eq!(told.len(), 7, "{told:?}");
    for path in [
        "spec.type",
        "spec.clusterIPs[1]",
        "spec.ipFamilies[1]",
        "spec.internalTrafficPolicy",
        "spec.sessionAffinity",
        "spec.ports[1].protocol",
        "spec.ports[2].port",
    ] {
        let named = format!("Kind shop/name: {path}: ");
        assert!(
            told.iter().any(|t| t.starts_with(&named)),
            "{path}: {told:?}"
        );
    }
}

#[test]
fn an_endpoint_that_cannot_be_used_leaves_the_others() {
    let reading = read(
        Kind::EndpointSlice,
        r#"{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "front", "service.kubernetes.io/headless": ""}},
            "ports": [{"port": 80, "protocol": "QUIC"}, {"port": 81}, {"name": "all"}],
            "endpoints": [{"addresses": ["10.0.0.1"]}, {"addresses": ["2001:db8::1"]}, {"addresses": []}, {"addresses": ["10.0.0.2"], "hints": {"forNew": 1}}]}"#,
    );
    let Some(Object::EndpointSlice(slice)) = &reading.object else {
        panic!("the slice is lost: {:?}", faults(&reading))
    };
    assert_eq!(slice.endpoints.len(), 2);
    assert_eq!(slice.ports.iter().map(|p| p.port).collect::<Vec<_>>(), [81]);
    assert_eq!(reading.faults.0.len(), 3, "{:?}", faults(&reading));
}

#[test]
fn a_slice_that_is_not_ours_is_none_and_no_fault() {
    for (labels, family) in [
        (r#"{"app": "x"}"#, "IPv4"),
        (r#"{"kubernetes.io/service-name": "x"}"#, "FQDN"),
    ] {
        let json = format!(
            r#"{{"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "{family}", "metadata": {{"name": "x", "labels": {labels}}}}}"#
        );
        let reading = read(Kind::EndpointSlice, &json);
        assert!(
            reading.object.is_none() && reading.faults.0.is_empty(),
            "{:?}",
            faults(&reading)
        );
    }
}

#[test]
fn our_own_kinds_are_right_or_refused() {
    let block = |first: &str, more: &str| {
        let json = format!(
            r#"{{"apiVersion": "kun.network/v1alpha1", "kind": "IPAMBlock", "metadata": {{"name": "block-10-64-0-64"}}, "spec": {{"first": "{first}", "node": "a"{more}}}}}"#
        );
        read(Kind::IpamBlock, &json)
    };
    assert!(block("10.64.0.64", "").object.is_some());
    // The server let it in, so a newer definition than ours has it: an agent of before must not lose the object in the meantime.
    assert!(block("10.64.0.64", r#", "extra": 1"#).object.is_some());
    for (reading, path) in [
        (block("10.64.0.1", ""), "spec.first"),
        (block("10.64.0.64", r#", "epoch": 0"#), "spec.epoch"),
    ] {
        assert!(reading.object.is_none());
        let told = faults(&reading);
        assert!(
            told.len() == 1 && told[0].starts_with(&format!("Kind shop/name: {path}: ")),
            "{told:?}"
        );
    }
}

#[test]
fn a_lease_keeps_its_holders_times_as_they_are_written() {
    let reading = read(
        Kind::Lease,
        r#"{"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "leader", "namespace": "kun"},
            "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15, "leaseTransitions": 3, "renewTime": "2026-01-01T00:00:00.000001Z"}}"#,
    );
    let Some(Object::Lease(lease)) = &reading.object else {
        panic!("{:?}", faults(&reading))
    };
    assert_eq!(
        (
            lease.holder.as_deref(),
            lease.duration_secs,
            lease.transitions
        ),
        (Some("a"), Some(15), 3)
    );
    assert_eq!(
        (lease.renew_time.as_deref(), lease.acquire_time.as_deref()),
        (Some("2026-01-01T00:00:00.000001Z"), None)
    );
}
