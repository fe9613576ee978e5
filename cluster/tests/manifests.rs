//! Manifests to objects: what is read, what is forgiven as the API server forgives it, and what is refused with which words.

use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster::folder::parse_manifest;
use kun_cluster::{
    EndpointSlice, IpFamily, Node, Object, Origin, Pod, Protocol, Service, ServiceType,
    TrafficPolicy,
};

fn objects(text: &str) -> Vec<Object> {
    parse_manifest("m.yaml", text)
        .unwrap_or_else(|faults| panic!("{faults}"))
        .objects
}

fn only(text: &str) -> Object {
    let mut objects = objects(text);
    assert_eq!(objects.len(), 1, "{objects:?}");
    objects.remove(0)
}

fn service(text: &str) -> Arc<Service> {
    match only(text) {
        Object::Service(service) => service,
        other => panic!("{other:?}"),
    }
}

fn slice(text: &str) -> Arc<EndpointSlice> {
    match only(text) {
        Object::EndpointSlice(slice) => slice,
        other => panic!("{other:?}"),
    }
}

fn node(text: &str) -> Arc<Node> {
    match only(text) {
        Object::Node(node) => node,
        other => panic!("{other:?}"),
    }
}

fn pod(text: &str) -> Arc<Pod> {
    match only(text) {
        Object::Pod(pod) => pod,
        other => panic!("{other:?}"),
    }
}

fn refused(text: &str) -> String {
    match parse_manifest("m.yaml", text) {
        Err(faults) => faults.to_string(),
        Ok(manifest) => panic!("accepted: {manifest:?}"),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

#[test]
fn a_service_with_everything() {
    let service = service(
        r#"
apiVersion: v1
kind: Service
metadata:
  name: web
  namespace: shop
  uid: 1b4e28ba-2fa1-11d2-883f-0016d3cca427
  labels: {app: web, version: "1.10", numeric: 5}
  annotations:
    kun.network/zone: balanced
    service.kubernetes.io/topology-mode: Auto
    kubectl.kubernetes.io/last-applied-configuration: "{}"
  resourceVersion: "12"
  managedFields: [{manager: x}]
spec:
  type: LoadBalancer
  clusterIP: fd00::1
  clusterIPs: [fd00::1, 10.96.0.1]
  ipFamilies: [IPv6, IPv4]
  ipFamilyPolicy: PreferDualStack
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
  internalTrafficPolicy: Cluster
  externalTrafficPolicy: Local
  publishNotReadyAddresses: true
  loadBalancerClass: kun.network/bgp
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: http, nodePort: 30080}
  - {name: dns, port: 53, protocol: UDP, targetPort: 5353, appProtocol: dns}
  - {name: sctp, port: "99", protocol: SCTP}
status:
  loadBalancer: {ingress: [{ip: 192.0.2.1, ipMode: VIP}, {hostname: lb.example}]}
"#,
    );
    assert_eq!(service.meta.name.to_string(), "shop/web");
    assert_eq!(service.meta.labels["version"].as_ref(), "1.10");
    assert_eq!(service.meta.labels["numeric"].as_ref(), "5");
    let annotations: Vec<&str> = service.meta.annotations.keys().map(AsRef::as_ref).collect();
    assert_eq!(
        annotations,
        ["kun.network/zone", "service.kubernetes.io/topology-mode"]
    );
    let (path, line) = ("m.yaml".into(), 2);
    assert_eq!(service.meta.origin, Origin::File { path, line });
    assert_eq!(service.kind, ServiceType::LoadBalancer);
    assert_eq!(service.cluster_ips, [ip("fd00::1"), ip("10.96.0.1")]);
    assert_eq!(service.families, [IpFamily::V6, IpFamily::V4]);
    assert_eq!(service.load_balancer_ips, [ip("192.0.2.1")]);
    assert!(service.load_balancer_named);
    assert_eq!(
        service.load_balancer_class.as_deref(),
        Some("kun.network/bgp")
    );
    assert_eq!(service.affinity_secs, Some(60));
    assert_eq!(
        (service.internal_policy, service.external_policy),
        (TrafficPolicy::Cluster, TrafficPolicy::Local)
    );
    assert!(service.publish_not_ready);
    let ports: Vec<_> = service
        .ports
        .iter()
        .map(|p| (p.name.as_ref(), p.protocol, p.port, p.node_port))
        .collect();
    assert_eq!(
        ports,
        [
            ("http", Protocol::Tcp, 80, Some(30080)),
            ("dns", Protocol::Udp, 53, None),
            ("sctp", Protocol::Sctp, 99, None)
        ]
    );
}

#[test]
fn what_a_service_leaves_out_is_as_the_api_server_has_it() {
    let service = service(
        "{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {sessionAffinity: ClientIP, ports: [{port: 80}]}}",
    );
    assert_eq!(service.meta.name.to_string(), "default/a");
    assert_eq!(service.kind, ServiceType::ClusterIp);
    assert_eq!(service.affinity_secs, Some(10_800));
    assert_eq!(
        (service.ports[0].name.as_ref(), service.ports[0].protocol),
        ("", Protocol::Tcp)
    );
    assert_eq!(
        (service.internal_policy, service.external_policy),
        (TrafficPolicy::Cluster, TrafficPolicy::Cluster)
    );
}

#[test]
fn headless_in_all_its_spellings() {
    for spec in [
        "{clusterIP: None}",
        "{clusterIP: ''}",
        "{clusterIPs: [None]}",
        "{clusterIP: null}",
        "{clusterIP: None, clusterIPs: [None]}",
    ] {
        let service = service(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: a}}, spec: {spec}}}"
        ));
        assert!(service.cluster_ips.is_empty(), "{spec}");
    }
}

#[test]
fn endpoint_conditions_by_their_defaults() {
    let slice = slice(
        r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv6
ports: [{name: null, port: 8080}, {name: all, port: null}, {port: 53, protocol: UDP}]
endpoints:
- {addresses: ["fd00::1"]}
- {addresses: ["fd00::2"], conditions: {ready: null, serving: null, terminating: null}}
- {addresses: ["fd00::3"], conditions: {ready: false}}
- {addresses: ["fd00::4"], conditions: {ready: false, serving: true, terminating: true}, nodeName: n, zone: z, hostname: web-0,
   targetRef: {kind: Pod, namespace: shop, name: web-0}, deprecatedTopology: {a: b}}
- {addresses: ["fd00::5", "fd00::6"], targetRef: {kind: Node, name: n}}
"#,
    );
    assert_eq!(slice.service.to_string(), "shop/web");
    let ports: Vec<_> = slice
        .ports
        .iter()
        .map(|p| (p.name.as_ref(), p.protocol, p.port))
        .collect();
    assert_eq!(ports, [("", Protocol::Tcp, 8080), ("", Protocol::Udp, 53)]);
    let states: Vec<_> = slice
        .endpoints
        .iter()
        .map(|e| (e.address.to_string(), e.ready, e.serving, e.terminating))
        .collect();
    assert_eq!(
        states,
        [
            ("fd00::1".to_owned(), true, true, false),
            ("fd00::2".to_owned(), true, true, false),
            ("fd00::3".to_owned(), false, false, false),
            ("fd00::4".to_owned(), false, true, true),
            ("fd00::5".to_owned(), true, true, false),
        ]
    );
    let last = &slice.endpoints[3];
    assert_eq!(
        last.pod.as_ref().map(ToString::to_string).as_deref(),
        Some("shop/web-0")
    );
    assert_eq!(
        (
            last.node.as_deref(),
            last.zone.as_deref(),
            last.hostname.as_deref()
        ),
        (Some("n"), Some("z"), Some("web-0"))
    );
    assert_eq!(slice.endpoints[4].pod, None);
}

#[test]
fn slices_of_nobody_and_of_names_are_left_out() {
    for text in [
        "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: a}, addressType: IPv4}",
        "{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, metadata: {name: a, labels: {kubernetes.io/service-name: s}}, addressType: FQDN}",
    ] {
        let manifest = parse_manifest("m.yaml", text).unwrap_or_else(|faults| panic!("{faults}"));
        assert_eq!((manifest.objects.len(), manifest.ignored), (0, 1), "{text}");
    }
}

#[test]
fn nodes_and_pods() {
    let with_status = node(
        "{apiVersion: v1, kind: Node, metadata: {name: n, labels: {topology.kubernetes.io/zone: a}}, status: {addresses: [
          {type: Hostname, address: n}, {type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: 'fd00::1'}],
          conditions: [{type: MemoryPressure, status: 'False'}, {type: Ready, status: 'Unknown'}]}}",
    );
    assert_eq!(with_status.addresses, [ip("192.0.2.1"), ip("fd00::1")]);
    assert_eq!(with_status.zone().map(AsRef::as_ref), Some("a"));
    assert!(!with_status.ready);
    assert!(node("{apiVersion: v1, kind: Node, metadata: {name: n}}").ready);

    let running = pod(
        "{apiVersion: v1, kind: Pod, metadata: {name: p, annotations: {kun.network/ipv4: 'true', kubernetes.io/egress-bandwidth: 10M}},
          spec: {nodeName: n, hostname: h, subdomain: s, hostNetwork: true, containers: []},
          status: {phase: Running, podIP: 192.0.2.9, podIPs: [{ip: 'fd00::9'}, {ip: 192.0.2.9}]}}",
    );
    assert_eq!(running.ips, [ip("fd00::9"), ip("192.0.2.9")]);
    assert!(running.host_network && !running.finished);
    assert_eq!(running.meta.annotations.len(), 2);
    let finished = pod(
        "{apiVersion: v1, kind: Pod, metadata: {name: p}, status: {phase: Succeeded, podIP: 192.0.2.9}}",
    );
    assert!(finished.finished);
    assert_eq!(finished.ips, [ip("192.0.2.9")]);
}

#[test]
fn lists_are_opened() {
    for text in [
        "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Namespace, metadata: {name: a}}, {apiVersion: apps/v1, kind: Deployment}]}",
        "{apiVersion: v1, kind: NamespaceList, items: [{metadata: {name: a}}]}",
        "{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Namespace, metadata: {name: a}}]}]}",
    ] {
        assert_eq!(only(text).meta().name.to_string(), "a", "{text}");
    }
}

#[test]
fn our_kinds() {
    let text = "
apiVersion: kun.network/v1alpha1
kind: IPPool
metadata: {name: main}
spec: {pods: [10.64.0.0/16, 240.0.0.0/20], services: {v4: [192.0.2.0/24], v6: ['2001:db8::/112']}}
---
apiVersion: kun.network/v1alpha1
kind: IPAMBlock
metadata: {name: block-10-64-0-64}
spec: {first: 10.64.0.64, node: node-a}
";
    let objects = objects(text);
    let [Object::IpPool(pool), Object::IpamBlock(block)] = &objects[..] else {
        panic!("{objects:?}")
    };
    assert_eq!(
        (
            pool.spec.pods.len(),
            pool.spec.services.v4.len(),
            pool.spec.services.v6.len()
        ),
        (2, 1, 1)
    );
    assert_eq!(
        (block.block().to_string().as_str(), block.node().as_ref()),
        ("10.64.0.64/26", "node-a")
    );
    let (path, line) = ("m.yaml".into(), 7);
    assert_eq!(block.meta.origin, Origin::File { path, line });
}

#[test]
fn what_is_wrong_is_told_all_at_once_with_its_place() {
    let faults = refused(
        "apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: Loadbalancer
  clusterIPs: [10.96.0.300]
  ports:
  - {port: 0}
  - {name: http}
  - {port: 80, protocol: tcp}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-x, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints:
- {addresses: ['fd00::1']}
- {addresses: []}
- {conditions: {ready: maybe}, addresses: [10.0.0.1]}
",
    );
    assert_eq!(
        faults,
        "m.yaml:5:9: spec.type: `Loadbalancer` is not known here; write ClusterIP or NodePort or LoadBalancer or ExternalName
m.yaml:6:16: spec.clusterIPs[0]: `10.96.0.300` is not an IP address; write one such as 192.0.2.1 or 2001:db8::1
m.yaml:8:12: spec.ports[0].port: `0` is not a port; write a number from 1 to 65535
m.yaml:9:5: spec.ports[1]: the field `port` is missing; a port has a number
m.yaml:10:26: spec.ports[2].protocol: `tcp` is not known here; write TCP or UDP or SCTP
m.yaml:17:16: endpoints[0].addresses[0]: fd00::1 is of another family than addressType; a slice has one family
m.yaml:18:15: endpoints[1].addresses: an empty list; an endpoint has one address
m.yaml:19:24: endpoints[2].conditions.ready: `maybe` is not true or false; write true or false"
    );
}

#[test]
fn our_kinds_refuse_what_they_do_not_know() {
    let faults = refused(
        "apiVersion: kun.network/v1alpha1
kind: IPPool
metadata: {name: main}
spec: {pod: [10.64.0.0/16], pods: [10.64.0.0/27], services: {v4: [2001:db8::/64], ipv6: []}}
---
apiVersion: kun.network/v1alpha1
kind: IPAMBlock
metadata: {name: x}
spec: {first: 10.64.0.1}
---
apiVersion: kun.network/v1alpha1
kind: IPAMBlok
metadata: {name: x}
---
apiVersion: kun.network/v1alpha1
kind: ServiceAddress
metadata: {name: x}
spec: {addresses: [192.0.2.1, 192.0.2.2]}
---
metadata: {name: x}
",
    );
    assert_eq!(
        faults,
        "m.yaml:4:8: spec.pod: unknown field; did you mean `pods`?
m.yaml:4:36: spec.pods[0]: `10.64.0.0/27` is not a range for pods: an IPv4 prefix without host bits, of /26 or larger, outside 0.0.0.0/8, 127.0.0.0/8 and 224.0.0.0/4; write 10.64.0.0/26
m.yaml:4:67: spec.services.v4[0]: `2001:db8::/64` is not an IPv4 prefix without host bits; write one such as 192.0.2.0/24
m.yaml:4:83: spec.services.ipv6: unknown field; known here: v4, v6
m.yaml:9:7: spec: the field `node` is missing; write the name of the Node that owns it
m.yaml:9:15: spec.first: `10.64.0.1` is not the first slot of a block: an IPv4 address that is a multiple of 64; write 10.64.0.0
m.yaml:11:1: no kind `IPAMBlok` in kun.network/v1alpha1; did you mean `IPAMBlock`?
m.yaml:18:31: spec.addresses[1]: 192.0.2.2 is a second one of its family; a Service has one of each
m.yaml:20:1: the field `kind` is missing; every document is a Kubernetes object with apiVersion and kind"
    );
}
