//! What Kubernetes says about Services, rule by rule: which endpoints a client sees, and which Services are none of ours.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster_core::{
    Delta, Endpoint, EndpointPort, EndpointSlice, Event, Meta, Object, ObjectName, Origin,
    Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use kun_ebpf_abi::Port;
use kun_ebpf_abi::service::{ServiceKey, state};
use kun_proxy_core::{Backend, Here, Limits, Model, Op, Planner, Problem, Question, addr, ip};

const LIMITS: Limits = Limits {
    services: 16,
    backends: 32,
    slots: 4096,
};

const VIP: &str = "10.96.0.1";
const VIP6: &str = "fd00:96::1";
const LB: &str = "192.0.2.1";

fn a(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn meta(name: &str) -> Meta {
    Meta {
        name: ObjectName::new("default", name),
        uid: "".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        origin: Origin::File {
            path: "web.yaml".into(),
            line: 7,
        },
    }
}

fn service(name: &str) -> Service {
    Service {
        meta: meta(name),
        kind: ServiceType::LoadBalancer,
        cluster_ips: vec![a(VIP), a(VIP6)],
        families: Vec::new(),
        load_balancer_ips: vec![a(LB)],
        load_balancer_named: false,
        load_balancer_class: None,
        external_name: None,
        ports: vec![port("http", Protocol::Tcp, 80)],
        affinity_secs: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        publish_not_ready: false,
    }
}

fn port(name: &str, protocol: Protocol, port: u16) -> ServicePort {
    ServicePort {
        name: name.into(),
        protocol,
        port,
        node_port: None,
    }
}

/// ready, serving, terminating.
const READY: (bool, bool, bool) = (true, true, false);
const UNREADY: (bool, bool, bool) = (false, false, false);
const ENDING: (bool, bool, bool) = (false, true, true);
const ENDED: (bool, bool, bool) = (false, false, true);

fn endpoint(address: &str, conditions: (bool, bool, bool), node: &str) -> Endpoint {
    Endpoint {
        address: a(address),
        ready: conditions.0,
        serving: conditions.1,
        terminating: conditions.2,
        node: Some(node.into()),
        zone: None,
        hostname: None,
        pod: Some(ObjectName::new("default", "pod-1")),
    }
}

fn slice(name: &str, target: u16, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        meta: meta(name),
        service: ObjectName::new("default", "web"),
        ports: vec![EndpointPort {
            name: "http".into(),
            protocol: Protocol::Tcp,
            port: target,
        }],
        endpoints,
    }
}

/// A planner and the maps that it fills.
struct World {
    planner: Planner,
    model: Model,
}

impl World {
    fn new() -> Self {
        Self::with(LIMITS)
    }

    fn with(limits: Limits) -> Self {
        let here = Here {
            node: "here".into(),
            zone: None,
        };
        let mut planner = Planner::new(here, limits);
        planner.on_event(&Event::Synced);
        Self {
            planner,
            model: Model::default(),
        }
    }

    fn tell(&mut self, deltas: Vec<Delta>) -> Vec<Op> {
        self.planner.on_event(&Event::Deltas(deltas));
        let mut all = Vec::new();
        while let Some(ops) = self.planner.step() {
            for op in ops {
                let Ok(()) = self.model.apply(&op);
                all.push(op);
            }
        }
        self.model.check().unwrap();
        all
    }

    fn set(&mut self, service: Service, slices: Vec<EndpointSlice>) -> Vec<Op> {
        let mut deltas = vec![Delta::Upsert(Object::Service(Arc::new(service)))];
        deltas.extend(
            slices
                .into_iter()
                .map(|s| Delta::Upsert(Object::EndpointSlice(Arc::new(s)))),
        );
        self.tell(deltas)
    }

    /// `None`: no frontend.
    fn seen(&self, vip: &str, external: bool) -> Option<BTreeSet<String>> {
        self.seen_at(vip, 80, external)
    }

    fn seen_at(&self, vip: &str, port: u16, external: bool) -> Option<BTreeSet<String>> {
        let key = ServiceKey {
            addr: addr(a(vip)),
            port: Port::new(port),
            proto: 6,
            pad: 0,
        };
        let found = self.model.lookup(&key, external)?;
        Some(
            found
                .values()
                .map(|(r, _)| format!("{}:{}", ip(r.addr), r.port.get()))
                .collect(),
        )
    }
}

fn set(names: &[&str]) -> Option<BTreeSet<String>> {
    Some(names.iter().map(|n| (*n).to_owned()).collect())
}

#[test]
fn only_ready_endpoints_and_else_those_that_terminate_and_serve() {
    // Conditions of two endpoints, the first on this node; what a cluster client sees, what a client of local endpoints sees.
    let (one, two) = ("10.0.0.1:8080", "10.0.0.2:8080");
    let table: &[(_, _, &[&str], &[&str])] = &[
        (READY, READY, &[one, two], &[one]),
        (READY, UNREADY, &[one], &[one]),
        (UNREADY, READY, &[two], &[]),
        (UNREADY, UNREADY, &[], &[]),
        (READY, ENDING, &[one], &[one]),
        (ENDING, READY, &[two], &[one]),
        (ENDING, ENDING, &[one, two], &[one]),
        (ENDING, ENDED, &[one], &[one]),
        (ENDED, ENDING, &[two], &[]),
        (ENDED, ENDED, &[], &[]),
        (ENDING, UNREADY, &[one], &[one]),
    ];
    for (first, second, cluster, local) in table {
        let mut world = World::new();
        let endpoints = vec![
            endpoint("10.0.0.1", *first, "here"),
            endpoint("10.0.0.2", *second, "there"),
        ];
        world.set(
            service("web"),
            vec![slice("web-x", 8080, endpoints.clone())],
        );
        let case = format!("{first:?} {second:?}");
        assert_eq!(world.seen(VIP, false), set(cluster), "{case}");
        // A client outside reaches the node that announced the address because of its own endpoint.
        assert_eq!(world.seen(LB, true), set(local), "{case}, from outside");
        // From inside, the LoadBalancer address is the whole Service.
        assert_eq!(world.seen(LB, false), set(cluster), "{case}, short cut");
        let vips = world.planner.vips();
        assert_eq!(vips.get(&a(LB)), Some(&!local.is_empty()), "{case}");

        let mut service = service("web");
        service.internal_policy = TrafficPolicy::Local;
        world.set(service, vec![slice("web-x", 8080, endpoints)]);
        assert_eq!(world.seen(VIP, false), set(local), "{case}, internal Local");
    }
}

#[test]
fn publish_not_ready_addresses_publishes_them() {
    let mut world = World::new();
    let mut service = service("web");
    service.publish_not_ready = true;
    let endpoints = vec![endpoint("10.0.0.1", UNREADY, "there")];
    world.set(service, vec![slice("web-x", 8080, endpoints)]);
    assert_eq!(world.seen(VIP, false), set(&["10.0.0.1:8080"]));
}

#[test]
fn headless_external_and_foreign_services_are_left_alone() {
    let mut headless = service("web");
    headless.cluster_ips.clear();
    let mut external = service("web");
    external.kind = ServiceType::ExternalName;
    let label = |key: &str| {
        let mut service = service("web");
        service.meta.labels.insert(key.into(), "x".into());
        service
    };
    for service in [
        headless,
        external,
        label("service.kubernetes.io/service-proxy-name"),
        label("service.kubernetes.io/headless"),
    ] {
        let mut world = World::new();
        let endpoints = vec![endpoint("10.0.0.1", READY, "here")];
        let ops = world.set(service, vec![slice("web-x", 8080, endpoints)]);
        assert_eq!(ops, []);
        let why = world.planner.why(&question(LB, 80));
        assert!(why[0].detail.starts_with("not served: "), "{why:?}");
    }
}

#[test]
fn named_ports_may_have_another_number_in_each_slice() {
    let mut world = World::new();
    let mut other = slice("web-y", 9090, vec![endpoint("10.0.0.2", READY, "there")]);
    other.ports.push(EndpointPort {
        name: "metrics".into(),
        protocol: Protocol::Tcp,
        port: 1,
    });
    other.ports.push(EndpointPort {
        name: "http".into(),
        protocol: Protocol::Udp,
        port: 2,
    });
    let first = slice("web-x", 8080, vec![endpoint("10.0.0.1", READY, "there")]);
    world.set(service("web"), vec![first, other]);
    assert_eq!(
        world.seen(VIP, false),
        set(&["10.0.0.1:8080", "10.0.0.2:9090"])
    );
}

#[test]
fn an_address_in_two_slices_counts_once_and_the_livelier_entry_is_true() {
    let mut world = World::new();
    // A new pod has the address of one that is not gone yet.
    let old = slice("web-x", 8080, vec![endpoint("10.0.0.1", ENDED, "there")]);
    let new = slice("web-y", 8080, vec![endpoint("10.0.0.1", READY, "here")]);
    world.set(service("web"), vec![old, new]);
    assert_eq!(world.seen(VIP, false), set(&["10.0.0.1:8080"]));
    assert_eq!(world.planner.totals().backends, 1);
}

#[test]
fn each_family_has_its_own_endpoints() {
    let mut world = World::new();
    let v4 = slice("web-4", 8080, vec![endpoint("10.0.0.1", READY, "here")]);
    let v6 = slice("web-6", 8080, vec![endpoint("fd00::1", READY, "here")]);
    world.set(service("web"), vec![v4, v6]);
    assert_eq!(world.seen(VIP, false), set(&["10.0.0.1:8080"]));
    assert_eq!(world.seen(VIP6, false), set(&["fd00::1:8080"]));
}

#[test]
fn flows_live_as_long_as_kubernetes_lets_them() {
    for (protocol, conditions, keeps) in [
        (Protocol::Tcp, UNREADY, true),
        (Protocol::Tcp, ENDING, true),
        (Protocol::Udp, ENDING, true),
        // conntrack entries of an unready UDP endpoint are removed by kube-proxy as well.
        (Protocol::Udp, UNREADY, false),
    ] {
        let mut world = World::new();
        let mut service = service("web");
        service.ports = vec![port("http", protocol, 80)];
        let mut of = |conditions| {
            let mut slice = slice(
                "web-x",
                8080,
                vec![
                    endpoint("10.0.0.1", conditions, "there"),
                    endpoint("10.0.0.2", READY, "there"),
                ],
            );
            slice.ports[0].protocol = protocol;
            world.set(service.clone(), vec![slice]);
            let Ok(observed) = world.model.observe();
            observed
                .backends
                .into_values()
                .find(|r| ip(r.addr) == a("10.0.0.1"))
                .unwrap()
        };
        let (before, after) = (of(READY), of(conditions));
        assert_eq!(before.state, state::ACTIVE);
        let case = format!("{protocol:?} {conditions:?}");
        if keeps {
            assert_eq!(after.state, state::DRAINING, "{case}");
            assert_eq!(after.generation, before.generation, "{case}");
        } else {
            assert_eq!(after.state, state::DEAD, "{case}");
            assert_ne!(after.generation, before.generation, "{case}");
        }
    }
}

#[test]
fn a_renamed_port_keeps_its_flows() {
    let mut world = World::new();
    let slice_of = |name: &str| {
        let mut slice = slice("web-x", 8080, vec![endpoint("10.0.0.1", READY, "here")]);
        slice.ports[0].name = name.into();
        slice
    };
    world.set(service("web"), vec![slice_of("http")]);
    let mut renamed = service("web");
    renamed.ports = vec![port("web", Protocol::Tcp, 80)];
    let ops = world.set(renamed, vec![slice_of("web")]);
    assert!(
        ops.iter().all(|op| *op == Op::Grace),
        "a name changes nothing in the kernel: {ops:?}"
    );
}

#[test]
fn a_contested_frontend_is_the_first_ones_by_name_and_falls_to_the_next() {
    let mut world = World::new();
    let mut late = slice("a-x", 8080, vec![endpoint("10.0.0.9", READY, "here")]);
    late.service = ObjectName::new("default", "a-web");
    let own = slice("web-x", 8080, vec![endpoint("10.0.0.1", READY, "here")]);
    world.set(service("web"), vec![own]);
    world.set(service("a-web"), vec![late]);
    assert_eq!(world.seen(VIP, false), set(&["10.0.0.9:8080"]));
    let problems: Vec<_> = world.planner.problems().collect();
    assert!(
        problems.iter().any(|(name, p)| **name == ObjectName::new("default", "web")
            && matches!(p, Problem::Taken { holder, .. } if *holder == ObjectName::new("default", "a-web"))),
        "{problems:?}"
    );
    world.tell(vec![Delta::Remove(
        kun_cluster_core::Kind::Service,
        ObjectName::new("default", "a-web"),
    )]);
    assert_eq!(world.seen(VIP, false), set(&["10.0.0.1:8080"]));
    assert_eq!(world.planner.problems().count(), 0);
}

#[test]
fn a_full_map_is_named_and_healed_when_there_is_room() {
    let mut world = World::with(Limits {
        services: 16,
        backends: 2,
        slots: 4096,
    });
    let endpoints = |n: u8| {
        (1..=n)
            .map(|i| endpoint(&format!("10.0.0.{i}"), READY, "there"))
            .collect()
    };
    world.set(service("web"), vec![slice("web-x", 8080, endpoints(3))]);
    let problem = world.planner.problems().next().unwrap().1.to_string();
    assert!(problem.contains("proxy.maxBackends is 2"), "{problem}");
    assert_eq!(
        world.seen(VIP, false),
        set(&["10.0.0.1:8080", "10.0.0.2:8080"])
    );
    world.set(service("web"), vec![slice("web-x", 8080, endpoints(2))]);
    assert_eq!(world.planner.problems().count(), 0);
}

#[test]
fn addresses_of_another_implementation_are_not_announced() {
    let mut world = World::new();
    let mut foreign = service("web");
    foreign.load_balancer_class = Some("example.com/lb".into());
    let own = slice("web-x", 8080, vec![endpoint("10.0.0.1", READY, "here")]);
    world.set(foreign, vec![own]);
    assert!(world.planner.vips().is_empty());
    assert_eq!(world.seen(LB, true), set(&["10.0.0.1:8080"]));
}

fn question(destination: &str, port: u16) -> Question {
    Question {
        protocol: Protocol::Tcp,
        source: None,
        external: false,
        destination: a(destination),
        port,
    }
}

#[test]
fn why_names_service_view_backend_endpoint_and_pod() {
    let mut world = World::new();
    let own = slice("web-x", 8080, vec![endpoint("10.0.0.1", READY, "here")]);
    world.set(service("web"), vec![own]);
    let why = world.planner.why(&question(VIP, 80));
    let whats: Vec<&str> = why.iter().map(|r| r.what).collect();
    assert_eq!(whats, ["service", "view", "backend", "endpoint", "pod"]);
    assert_eq!(why[0].object, "default/web:http");
    assert_eq!(why[0].source.as_deref(), Some("web.yaml:7"));
    assert_eq!(why[4].object, "default/pod-1");
    let outside = Question {
        external: true,
        ..question(LB, 80)
    };
    assert!(
        world.planner.why(&outside)[1]
            .detail
            .contains("on node here")
    );
    let none = world.planner.why(&question("203.0.113.1", 80));
    assert_eq!(none[0].what, "route");
    let pod = world.planner.why(&question("10.0.0.1", 80));
    assert_eq!(pod[0].what, "endpoint");
    world.set(service("web"), vec![slice("web-x", 8080, Vec::new())]);
    let why = world.planner.why(&question(VIP, 80));
    assert_eq!(why.last().unwrap().what, "drop");
}

/// Slots have run out: a Service whose endpoints changed keeps its table's size, but never a backend that is gone, whose record
/// may be another Service's by then.
#[test]
fn without_room_for_slots_the_old_ones_lead_to_the_new_endpoints() {
    let mut world = World::with(Limits {
        services: 16,
        backends: 8,
        slots: 4,
    });
    let plain = |name: &str, vip: &str| Service {
        kind: ServiceType::ClusterIp,
        cluster_ips: vec![a(vip)],
        load_balancer_ips: Vec::new(),
        ..service(name)
    };
    let slices = |of: &str, hosts: &[u8]| {
        let endpoints = hosts
            .iter()
            .map(|i| endpoint(&format!("10.0.0.{i}"), READY, "there"))
            .collect();
        let mut slice = slice(&format!("{of}-x"), 8080, endpoints);
        slice.service = ObjectName::new("default", of);
        vec![slice]
    };
    let web = plain("web", VIP);
    let other = plain("other", "10.96.0.2");
    world.set(web.clone(), slices("web", &[1, 2]));
    world.set(other.clone(), slices("other", &[11, 12]));
    assert_eq!(world.planner.problems().count(), 0);
    world.set(web.clone(), slices("web", &[3, 4]));
    let problem = world.planner.problems().next().unwrap().1.to_string();
    assert!(problem.contains("proxy.maxSlots is 4"), "{problem}");
    assert_eq!(
        world.seen(VIP, false),
        set(&["10.0.0.3:8080", "10.0.0.4:8080"])
    );
    // The other takes the records that are free now.
    world.set(other, slices("other", &[11, 12, 13, 14]));
    assert_eq!(
        world.seen(VIP, false),
        set(&["10.0.0.3:8080", "10.0.0.4:8080"])
    );
    world.model.check().unwrap();
    world.set(web, slices("web", &[5]));
    assert_eq!(world.seen(VIP, false), set(&["10.0.0.5:8080"]));
}
