//! Kubernetes DNS 1.1.0 as CoreDNS answers it, asked through the whole world: question octets in, answer octets out. hickory-proto,
//! which shares no code with us, reads the answers.

mod common;

use common::{Server, answer_texts, ask};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType::{self, A, AAAA, CNAME, MX, NS, PTR, SOA, SRV, TXT};

const MANIFESTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: testns}
---
apiVersion: v1
kind: Service
metadata: {name: svc1, namespace: testns}
spec: {clusterIP: 10.0.0.1, clusterIPs: [10.0.0.1, "fd00::1"], ports: [{name: http, port: 80, protocol: TCP}, {name: dns, port: 53, protocol: UDP}]}
---
apiVersion: v1
kind: Service
metadata: {name: v4only, namespace: testns}
spec: {clusterIP: 10.0.0.2, clusterIPs: [10.0.0.2], ports: [{port: 81}]}
---
apiVersion: v1
kind: Service
metadata: {name: hdls1, namespace: testns}
spec: {clusterIP: None, ports: [{name: http, port: 80, protocol: TCP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hdls1-a, namespace: testns, labels: {kubernetes.io/service-name: hdls1}}
addressType: IPv4
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: [172.0.0.2], conditions: {ready: true}, targetRef: {kind: Pod, name: pod-2, namespace: testns}}
- {addresses: [172.0.0.3], conditions: {ready: true}, hostname: dup-name}
- {addresses: [172.0.0.9], conditions: {ready: false}, hostname: not-ready}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: hdls1-b, namespace: testns, labels: {kubernetes.io/service-name: hdls1}}
addressType: IPv6
ports: [{name: http, port: 8080, protocol: TCP}]
endpoints:
- {addresses: ["5678:abcd::1"], conditions: {ready: true}}
- {addresses: ["5678:abcd::3"], conditions: {ready: true}, hostname: dup-name}
---
apiVersion: v1
kind: Service
metadata: {name: hdlsempty, namespace: testns}
spec: {clusterIP: None, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: external, namespace: testns}
spec: {type: ExternalName, externalName: ext.interwebs.test}
---
apiVersion: v1
kind: Service
metadata: {name: inward, namespace: testns}
spec: {type: ExternalName, externalName: svc1.testns.svc.cluster.local}
---
apiVersion: v1
kind: Service
metadata: {name: circle, namespace: testns}
spec: {type: ExternalName, externalName: circle.testns.svc.cluster.local}
---
apiVersion: v1
kind: Pod
metadata: {name: podns-1, namespace: podns}
spec: {}
status: {phase: Running, podIPs: [{ip: 10.240.0.1}, {ip: "fd00:240::1"}]}
"#;

fn server(options: &str) -> Server {
    Server::new(
        &format!(
            ". {{\nkubernetes cluster.local 0.10.in-addr.arpa 172.0.0.0/8 5678:abcd::/32 {{\n{options}\n}}\n}}"
        ),
        MANIFESTS,
    )
}

fn check(s: &Server, cases: &[(&str, RecordType, ResponseCode, &[&str])]) {
    for (name, t, code, want) in cases {
        let m = ask(s, name, *t);
        assert_eq!(m.metadata.response_code, *code, "{name} {t}");
        let mut got = answer_texts(&m);
        got.sort();
        let mut want: Vec<String> = want.iter().map(ToString::to_string).collect();
        want.sort();
        assert_eq!(got, want, "{name} {t}");
        if want.is_empty() && *code != ResponseCode::ServFail {
            let soa: Vec<_> = m.authorities.iter().map(|r| r.record_type()).collect();
            assert_eq!(
                soa,
                [SOA],
                "{name} {t}: a denial carries the SOA (RFC 2308)"
            );
            assert_eq!(m.authorities[0].ttl, 5);
        }
    }
}

use ResponseCode::{NXDomain as NX, NoError as OK};

#[test]
fn services() {
    let s = server("");
    check(
        &s,
        &[
            (
                "svc1.testns.svc.cluster.local",
                A,
                OK,
                &["svc1.testns.svc.cluster.local. 5 A 10.0.0.1"],
            ),
            (
                "SVC1.TestNS.svc.Cluster.Local",
                A,
                OK,
                &["SVC1.TestNS.svc.Cluster.Local. 5 A 10.0.0.1"],
            ),
            (
                "svc1.testns.svc.cluster.local",
                AAAA,
                OK,
                &["svc1.testns.svc.cluster.local. 5 AAAA fd00::1"],
            ),
            ("v4only.testns.svc.cluster.local", AAAA, OK, &[]),
            ("svc1.testns.svc.cluster.local", MX, OK, &[]),
            (
                "_http._tcp.svc1.testns.svc.cluster.local",
                SRV,
                OK,
                &[
                    "_http._tcp.svc1.testns.svc.cluster.local. 5 SRV 0 100 80 svc1.testns.svc.cluster.local.",
                ],
            ),
            (
                "_http._tcp.svc1.testns.svc.cluster.local",
                A,
                OK,
                &["_http._tcp.svc1.testns.svc.cluster.local. 5 A 10.0.0.1"],
            ),
            ("_http._udp.svc1.testns.svc.cluster.local", SRV, NX, &[]),
            (
                "_dns._udp.svc1.testns.svc.cluster.local",
                SRV,
                OK,
                &[
                    "_dns._udp.svc1.testns.svc.cluster.local. 5 SRV 0 100 53 svc1.testns.svc.cluster.local.",
                ],
            ),
            (
                "svc1.testns.svc.cluster.local",
                SRV,
                OK,
                &[
                    "svc1.testns.svc.cluster.local. 5 SRV 0 50 53 svc1.testns.svc.cluster.local.",
                    "svc1.testns.svc.cluster.local. 5 SRV 0 50 80 svc1.testns.svc.cluster.local.",
                ],
            ),
            ("bogusservice.testns.svc.cluster.local", A, NX, &[]),
            ("svc1.bogusns.svc.cluster.local", A, NX, &[]),
            ("bogusendpoint.svc1.testns.svc.cluster.local", A, NX, &[]),
            ("testns.svc.cluster.local", A, OK, &[]),
            ("bogusns.svc.cluster.local", A, NX, &[]),
            ("svc.cluster.local", A, OK, &[]),
            ("pod.cluster.local", A, OK, &[]),
            ("bogus.cluster.local", A, NX, &[]),
            ("cluster.local", A, OK, &[]),
            (
                "dns-version.cluster.local",
                TXT,
                OK,
                &["dns-version.cluster.local. 5 TXT 1.1.0"],
            ),
            ("dns-version.cluster.local", A, OK, &[]),
            (
                "cluster.local",
                NS,
                OK,
                &["cluster.local. 5 NS ns.dns.cluster.local."],
            ),
        ],
    );
    let m = ask(&s, "_http._tcp.svc1.testns.svc.cluster.local", SRV);
    let extra: Vec<String> = m
        .additionals
        .iter()
        .map(|r| format!("{} {}", r.name, r.data))
        .collect();
    assert_eq!(
        extra,
        [
            "svc1.testns.svc.cluster.local. 10.0.0.1",
            "svc1.testns.svc.cluster.local. fd00::1"
        ]
    );
    assert!(m.metadata.authoritative);
}

#[test]
fn headless() {
    let own = "hdls1.testns.svc.cluster.local";
    let s = server("");
    check(
        &s,
        &[
            (
                own,
                A,
                OK,
                &[
                    "hdls1.testns.svc.cluster.local. 5 A 172.0.0.2",
                    "hdls1.testns.svc.cluster.local. 5 A 172.0.0.3",
                ],
            ),
            (
                own,
                AAAA,
                OK,
                &[
                    "hdls1.testns.svc.cluster.local. 5 AAAA 5678:abcd::1",
                    "hdls1.testns.svc.cluster.local. 5 AAAA 5678:abcd::3",
                ],
            ),
            (
                "dup-name.hdls1.testns.svc.cluster.local",
                A,
                OK,
                &["dup-name.hdls1.testns.svc.cluster.local. 5 A 172.0.0.3"],
            ),
            (
                "dup-name.hdls1.testns.svc.cluster.local",
                AAAA,
                OK,
                &["dup-name.hdls1.testns.svc.cluster.local. 5 AAAA 5678:abcd::3"],
            ),
            (
                "172-0-0-2.hdls1.testns.svc.cluster.local",
                A,
                OK,
                &["172-0-0-2.hdls1.testns.svc.cluster.local. 5 A 172.0.0.2"],
            ),
            (
                "5678-abcd--1.hdls1.testns.svc.cluster.local",
                AAAA,
                OK,
                &["5678-abcd--1.hdls1.testns.svc.cluster.local. 5 AAAA 5678:abcd::1"],
            ),
            ("not-ready.hdls1.testns.svc.cluster.local", A, NX, &[]),
            ("pod-2.hdls1.testns.svc.cluster.local", A, NX, &[]),
            ("hdlsempty.testns.svc.cluster.local", A, OK, &[]),
            (
                "_http._tcp.hdls1.testns.svc.cluster.local",
                SRV,
                OK,
                &[
                    "_http._tcp.hdls1.testns.svc.cluster.local. 5 SRV 0 33 8080 172-0-0-2.hdls1.testns.svc.cluster.local.",
                    "_http._tcp.hdls1.testns.svc.cluster.local. 5 SRV 0 33 8080 5678-abcd--1.hdls1.testns.svc.cluster.local.",
                    "_http._tcp.hdls1.testns.svc.cluster.local. 5 SRV 0 33 8080 dup-name.hdls1.testns.svc.cluster.local.",
                ],
            ),
        ],
    );
    check(
        &server("endpoint_pod_names"),
        &[
            (
                "pod-2.hdls1.testns.svc.cluster.local",
                A,
                OK,
                &["pod-2.hdls1.testns.svc.cluster.local. 5 A 172.0.0.2"],
            ),
            ("172-0-0-2.hdls1.testns.svc.cluster.local", A, NX, &[]),
        ],
    );
    check(
        &server("noendpoints"),
        &[
            (own, A, NX, &[]),
            (
                "svc1.testns.svc.cluster.local",
                A,
                OK,
                &["svc1.testns.svc.cluster.local. 5 A 10.0.0.1"],
            ),
        ],
    );
    check(
        &server("ignore empty_service"),
        &[
            ("hdlsempty.testns.svc.cluster.local", A, NX, &[]),
            ("v4only.testns.svc.cluster.local", A, NX, &[]),
        ],
    );
    check(
        &server("namespaces other"),
        &[("svc1.testns.svc.cluster.local", A, NX, &[])],
    );
}

#[test]
fn reverse() {
    check(
        &server(""),
        &[
            (
                "1.0.0.10.in-addr.arpa",
                PTR,
                OK,
                &["1.0.0.10.in-addr.arpa. 5 PTR svc1.testns.svc.cluster.local."],
            ),
            (
                "3.0.0.172.in-addr.arpa",
                PTR,
                OK,
                &["3.0.0.172.in-addr.arpa. 5 PTR dup-name.hdls1.testns.svc.cluster.local."],
            ),
            ("2.0.0.172.in-addr.arpa", PTR, NX, &[]),
            ("77.0.0.10.in-addr.arpa", PTR, NX, &[]),
            ("1.0.0.10.in-addr.arpa", A, OK, &[]),
        ],
    );
    let m = ask(
        &server(""),
        "3.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.c.b.a.8.7.6.5.ip6.arpa",
        PTR,
    );
    assert!(answer_texts(&m)[0].ends_with("PTR dup-name.hdls1.testns.svc.cluster.local."));
    let m = ask(
        &server("fallthrough 0.10.in-addr.arpa"),
        "77.0.0.10.in-addr.arpa",
        PTR,
    );
    assert_eq!(
        m.metadata.response_code,
        ResponseCode::ServFail,
        "it fell through, and nobody is behind"
    );
}

#[test]
fn pods() {
    let name = "10-240-0-1.podns.pod.cluster.local";
    let v6 = "fd00-240--1.podns.pod.cluster.local";
    let a: &[&str] = &["10-240-0-1.podns.pod.cluster.local. 5 A 10.240.0.1"];
    check(
        &server(""),
        &[(name, A, NX, &[]), ("podns.pod.cluster.local", A, OK, &[])],
    );
    check(
        &server("pods insecure"),
        &[
            (name, A, OK, a),
            (name, AAAA, OK, &[]),
            (
                v6,
                AAAA,
                OK,
                &["fd00-240--1.podns.pod.cluster.local. 5 AAAA fd00:240::1"],
            ),
            (
                "1-2-3-4.testns.pod.cluster.local",
                A,
                OK,
                &["1-2-3-4.testns.pod.cluster.local. 5 A 1.2.3.4"],
            ),
            ("1-2-3-4.bogusns.pod.cluster.local", A, NX, &[]),
            ("blah.podns.pod.cluster.local", A, NX, &[]),
        ],
    );
    check(
        &server("pods verified"),
        &[
            (name, A, OK, a),
            ("10-240-0-1.testns.pod.cluster.local", A, NX, &[]),
            ("1-2-3-4.podns.pod.cluster.local", A, NX, &[]),
        ],
    );
}

#[test]
fn external_names() {
    let s = server("");
    let alias = "external.testns.svc.cluster.local. 5 CNAME ext.interwebs.test.";
    check(
        &s,
        &[
            ("external.testns.svc.cluster.local", CNAME, OK, &[alias]),
            // Nobody forwards here: the alias is all there is.
            ("external.testns.svc.cluster.local", A, OK, &[alias]),
            (
                "inward.testns.svc.cluster.local",
                A,
                OK,
                &[
                    "inward.testns.svc.cluster.local. 5 CNAME svc1.testns.svc.cluster.local.",
                    "svc1.testns.svc.cluster.local. 5 A 10.0.0.1",
                ],
            ),
        ],
    );
    assert_eq!(
        ask(&s, "circle.testns.svc.cluster.local", A)
            .metadata
            .response_code,
        ResponseCode::ServFail
    );
}

#[test]
fn before_the_first_snapshot_is_complete() {
    let s = Server::unsynced(". {\nkubernetes cluster.local\n}");
    assert_eq!(
        ask(&s, "svc1.testns.svc.cluster.local", A)
            .metadata
            .response_code,
        ResponseCode::ServFail
    );
    assert!(!s.world.synced());
    assert!(server("").world.synced());
}

#[test]
fn kubernetes_names_are_never_synthesised() {
    let s = Server::new(
        ". {\nkubernetes cluster.local\ndns64 {\nallow_ipv4\ntranslate_all\n}\n}",
        MANIFESTS,
    );
    check(
        &s,
        &[
            ("v4only.testns.svc.cluster.local", AAAA, OK, &[]),
            (
                "svc1.testns.svc.cluster.local",
                AAAA,
                OK,
                &["svc1.testns.svc.cluster.local. 5 AAAA fd00::1"],
            ),
        ],
    );
}
