//! Host ports: served without a synced cluster, never in the way of a Service, and after a death between any two ops what the
//! attachments say.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster_core::{
    Delta, Endpoint, EndpointPort, EndpointSlice, Event, Kind, Meta, Object, ObjectName, Origin,
    Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use kun_ebpf_abi::Port;
use kun_ebpf_abi::service::{Scope, ServiceKey, state};
use kun_proxy_core::{
    Backend, Here, HostPort, HostPorts, Limits, Model, Op, Planner, Problem, addr, host_port_name,
    ip,
};
use proptest::prelude::*;

const LIMITS: Limits = Limits {
    services: 64,
    backends: 64,
    slots: 1024,
};

const NODE: [&str; 4] = ["192.0.2.1", "2001:db8::1", "127.0.0.1", "::1"];

fn a(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn here() -> Here {
    Here {
        node: "here".into(),
        zone: None,
    }
}

fn meta(name: &str) -> Meta {
    Meta {
        name: ObjectName::new("default", name),
        uid: "".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        origin: Origin::File {
            path: "m.yaml".into(),
            line: 1,
        },
    }
}

/// A Service that has the node's own address, as an external address may be, and its endpoint.
fn service(port: u16) -> Vec<Delta> {
    let service = Service {
        meta: meta("web"),
        kind: ServiceType::LoadBalancer,
        cluster_ips: vec![a("10.96.0.1")],
        families: Vec::new(),
        load_balancer_ips: vec![a(NODE[0])],
        load_balancer_named: false,
        load_balancer_class: None,
        external_name: None,
        ports: vec![ServicePort {
            name: "p".into(),
            protocol: Protocol::Udp,
            port,
            node_port: None,
        }],
        affinity_secs: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        publish_not_ready: false,
    };
    let slice = EndpointSlice {
        meta: meta("web-1"),
        service: ObjectName::new("default", "web"),
        ports: vec![EndpointPort {
            name: "p".into(),
            protocol: Protocol::Udp,
            port: 99,
        }],
        endpoints: vec![Endpoint {
            address: a("10.9.9.9"),
            ready: true,
            serving: true,
            terminating: false,
            node: Some("here".into()),
            zone: None,
            hostname: None,
            pod: None,
        }],
    };
    vec![
        Delta::Upsert(Object::Service(Arc::new(service))),
        Delta::Upsert(Object::EndpointSlice(Arc::new(slice))),
    ]
}

fn no_service() -> Vec<Delta> {
    vec![Delta::Remove(
        Kind::Service,
        ObjectName::new("default", "web"),
    )]
}

fn pod(number: u8, ports: &[u16]) -> HostPorts {
    HostPorts {
        pod: vec![
            IpAddr::from([10, 0, 0, number]),
            a(&format!("fd00::{number:x}")),
        ],
        ports: (ports.iter())
            .map(|port| HostPort {
                host_ip: None,
                port: *port,
                protocol: Protocol::Udp,
                target: 5353,
            })
            .collect(),
    }
}

fn name(number: u8) -> ObjectName {
    host_port_name(&format!("default/p{number} c{number}/eth0"))
}

fn key(address: &str, port: u16) -> ServiceKey {
    ServiceKey {
        addr: addr(a(address)),
        port: Port::new(port),
        proto: Protocol::Udp.number(),
        pad: 0,
    }
}

fn planner() -> Planner {
    let mut planner = Planner::new(here(), LIMITS);
    planner.set_node_addresses(NODE.map(a).to_vec());
    planner
}

fn run(planner: &mut Planner, model: &mut Model) -> Vec<Op> {
    let mut all = Vec::new();
    while let Some(ops) = planner.step() {
        for op in &ops {
            let Ok(()) = model.apply(op);
            model.check().unwrap();
        }
        all.extend(ops);
    }
    all
}

/// Where each frontend leads, from inside and from outside alike.
fn answers(model: &Model) -> BTreeMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>> {
    let to = |external, key: &ServiceKey| -> BTreeSet<(IpAddr, u16)> {
        let found = model.lookup(key, external).unwrap();
        found
            .values()
            .map(|(r, _)| (ip(r.addr), r.port.get()))
            .collect()
    };
    (model.frontends())
        .map(|key| {
            assert_eq!(to(true, key), to(false, key));
            ((ip(key.addr), key.port.get()), to(true, key))
        })
        .collect()
}

fn leads(model: &Model, at: &str, port: u16) -> Option<String> {
    let found = answers(model).get(&(a(at), port)).cloned()?;
    Some(found.iter().map(|(ip, _)| ip.to_string()).collect())
}

#[test]
fn a_pod_is_served_at_once_on_each_address_of_its_families() {
    let (mut planner, mut model) = (planner(), Model::default());
    planner.on_event(&Event::Deltas(service(80)));
    planner.set_host_ports(name(1), Some(pod(1, &[53])));
    for op in planner.plan_attachment(&name(1)) {
        let Ok(()) = model.apply(&op);
    }
    assert!(!planner.synced());
    for (at, to) in NODE
        .iter()
        .zip(["10.0.0.1", "fd00::1", "10.0.0.1", "fd00::1"])
    {
        assert_eq!(leads(&model, at, 53).as_deref(), Some(to), "{at}");
    }
    let scope = |at| planner.holder(&key(at, 53)).map(|(id, _)| id);
    assert!(scope(NODE[0]).is_some() && scope(NODE[0]) != scope(NODE[1]));
    let values = model.observe().unwrap().services;
    assert_eq!(values[&key(NODE[0], 53)].scope, Scope::HostPort as u8);
    assert_eq!(values[&key(NODE[3], 53)].scope, Scope::HostLoopback as u8);
    assert_eq!(
        leads(&model, "10.96.0.1", 80),
        None,
        "nothing else before the cluster is synced"
    );
    // One address of one family, and one that the node has not.
    let mut ports = pod(1, &[53, 54]);
    ports.ports[0].host_ip = Some(a("::"));
    ports.ports[1].host_ip = Some(a("192.0.2.77"));
    planner.set_host_ports(name(1), Some(ports));
    run(&mut planner, &mut model);
    let at: Vec<_> = answers(&model).into_keys().collect();
    assert_eq!(at, [(a("::1"), 53), (a("2001:db8::1"), 53)]);
    // A new address of the node.
    planner.set_node_addresses(vec![a("2001:db8::2")]);
    run(&mut planner, &mut model);
    let at: Vec<_> = answers(&model).into_keys().collect();
    assert_eq!(at, [(a("2001:db8::2"), 53)]);
}

/// What makes the next datagram of a flow choose anew: the old pod's record has another generation.
#[test]
fn a_replaced_pod_leaves_no_flow_alive() {
    let (mut planner, mut model) = (planner(), Model::default());
    planner.set_host_ports(name(1), Some(pod(1, &[53])));
    run(&mut planner, &mut model);
    let held: Vec<_> = (model.lookup(&key(NODE[0], 53), true).unwrap())
        .into_iter()
        .map(|(id, (record, _))| (id, record.generation))
        .collect();
    planner.set_host_ports(name(1), None);
    run(&mut planner, &mut model);
    assert_eq!(answers(&model), BTreeMap::new());
    planner.set_host_ports(name(2), Some(pod(2, &[53])));
    run(&mut planner, &mut model);
    assert_eq!(leads(&model, NODE[0], 53).as_deref(), Some("10.0.0.2"));
    for (id, generation) in held {
        assert_ne!(model.backend(id).unwrap().generation, generation);
    }
}

#[test]
fn a_service_has_its_address_and_port_before_any_pod() {
    let (mut planner, mut model) = (planner(), Model::default());
    planner.on_event(&Event::Synced);
    planner.set_host_ports(name(1), Some(pod(1, &[53])));
    run(&mut planner, &mut model);
    assert_eq!(leads(&model, NODE[0], 53).as_deref(), Some("10.0.0.1"));
    planner.on_event(&Event::Deltas(service(53)));
    run(&mut planner, &mut model);
    assert_eq!(leads(&model, NODE[0], 53).as_deref(), Some("10.9.9.9"));
    assert_eq!(
        leads(&model, NODE[2], 53).as_deref(),
        Some("10.0.0.1"),
        "elsewhere it stays"
    );
    let problems: Vec<_> = planner.problems_of(&name(1)).cloned().collect();
    let taken = Problem::Taken {
        address: a(NODE[0]),
        port: 53,
        holder: ObjectName::new("default", "web"),
    };
    assert_eq!(problems, [taken]);
    // A life that knows the attachment before the cluster does not touch what it adopted.
    let observed = model.observe().unwrap();
    let mut next = Planner::adopt(here(), LIMITS, &observed);
    next.set_node_addresses(NODE.map(a).to_vec());
    next.set_host_ports(name(1), Some(pod(1, &[53])));
    next.attachments_known();
    run(&mut next, &mut model);
    assert_eq!(leads(&model, NODE[0], 53).as_deref(), Some("10.9.9.9"));
    next.on_event(&Event::Deltas(service(53)));
    next.on_event(&Event::Synced);
    run(&mut next, &mut model);
    assert_eq!(leads(&model, NODE[0], 53).as_deref(), Some("10.9.9.9"));
    next.on_event(&Event::Deltas(no_service()));
    run(&mut next, &mut model);
    assert_eq!(leads(&model, NODE[0], 53).as_deref(), Some("10.0.0.1"));
}

/// What an earlier life left of a pod that is gone goes without a cluster, and a partial view holds it no longer either.
#[test]
fn what_no_attachment_explains_goes_at_once() {
    for partial in [false, true] {
        let (mut planner, mut model) = (planner(), Model::default());
        planner.set_host_ports(name(1), Some(pod(1, &[53])));
        planner.set_host_ports(name(2), Some(pod(2, &[54])));
        run(&mut planner, &mut model);
        let observed = model.observe().unwrap();
        let mut next = Planner::adopt(here(), LIMITS, &observed);
        next.set_node_addresses(NODE.map(a).to_vec());
        if partial {
            next.on_event(&Event::Partial);
            next.on_event(&Event::Synced);
        }
        next.set_host_ports(name(2), Some(pod(2, &[54])));
        assert!(next.host_ports_wait());
        next.attachments_known();
        let ops = run(&mut next, &mut model);
        assert!(!next.host_ports_wait());
        assert_eq!(leads(&model, NODE[0], 53), None);
        assert_eq!(leads(&model, NODE[0], 54).as_deref(), Some("10.0.0.2"));
        // The one that stays was not touched.
        let touched = ops.iter().any(|op| match op {
            Op::Frontend { key, .. } | Op::RemoveFrontend { key } => key.port.get() == 54,
            _ => false,
        });
        assert!(!touched, "{ops:?}");
    }
}

/// A change of what is wanted.
#[derive(Debug, Clone)]
enum Change {
    Pod(u8, Vec<u16>),
    NoPod(u8),
    Addresses(usize),
    Service(u16),
    NoService,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    // Each pod has ports of its own: two that want one are refused before.
    let ports = |pod: u8| {
        prop::collection::vec(0_u16..3, 0..3).prop_map(move |p| {
            let ports: BTreeSet<u16> = p.into_iter().map(|p| u16::from(pod) * 10 + p).collect();
            Change::Pod(pod, ports.into_iter().collect())
        })
    };
    let one = prop_oneof![
        4 => (1_u8..4).prop_flat_map(ports),
        2 => (1_u8..4).prop_map(Change::NoPod),
        1 => (1_usize..5).prop_map(Change::Addresses),
        1 => (10_u16..13).prop_map(Change::Service),
        1 => Just(Change::NoService),
    ];
    prop::collection::vec(one, 1..12)
}

/// What is wanted, naively.
#[derive(Debug, Clone, Default)]
struct World {
    pods: BTreeMap<u8, Vec<u16>>,
    addresses: Vec<IpAddr>,
    service: Option<u16>,
}

impl World {
    fn change(&mut self, change: &Change) {
        match change {
            Change::Pod(pod, ports) => drop(self.pods.insert(*pod, ports.clone())),
            Change::NoPod(pod) => drop(self.pods.remove(pod)),
            Change::Addresses(n) => self.addresses = NODE[..*n].iter().map(|t| a(t)).collect(),
            Change::Service(port) => self.service = Some(*port),
            Change::NoService => self.service = None,
        }
    }

    /// Tells a planner all of it.
    fn tell(&self, planner: &mut Planner) {
        planner.set_node_addresses(self.addresses.clone());
        for (pod_number, ports) in &self.pods {
            planner.set_host_ports(name(*pod_number), Some(pod(*pod_number, ports)));
        }
        planner.attachments_known();
        planner.on_event(&Event::Deltas(
            self.service.map_or_else(no_service, service),
        ));
        planner.on_event(&Event::Synced);
    }

    fn answers(&self) -> BTreeMap<(IpAddr, u16), BTreeSet<(IpAddr, u16)>> {
        let mut all = BTreeMap::new();
        for (pod, ports) in &self.pods {
            for address in &self.addresses {
                let to = if address.is_ipv4() {
                    IpAddr::from([10, 0, 0, *pod])
                } else {
                    a(&format!("fd00::{pod:x}"))
                };
                for port in ports {
                    all.insert((*address, *port), BTreeSet::from([(to, 5353)]));
                }
            }
        }
        if let Some(port) = self.service {
            for at in ["10.96.0.1", NODE[0]] {
                all.insert((a(at), port), BTreeSet::from([(a("10.9.9.9"), 99)]));
            }
        }
        all
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever happens, and wherever the planner dies, the maps come to say what is wanted.
    #[test]
    fn the_maps_follow_the_attachments(changes in changes(), dies in prop::collection::vec(0_usize..24, 12)) {
        let mut world = World { addresses: NODE.map(a).to_vec(), ..World::default() };
        let (mut planner, mut model) = (planner(), Model::default());
        world.tell(&mut planner);
        for (change, dies) in changes.iter().zip(dies) {
            world.change(change);
            match change {
                Change::Pod(number, ports) => planner.set_host_ports(name(*number), Some(pod(*number, ports))),
                Change::NoPod(number) => planner.set_host_ports(name(*number), None),
                Change::Addresses(_) => planner.set_node_addresses(world.addresses.clone()),
                Change::Service(port) => planner.on_event(&Event::Deltas(service(*port))),
                Change::NoService => planner.on_event(&Event::Deltas(no_service())),
            }
            let mut left = dies;
            'life: while let Some(ops) = planner.step() {
                for op in &ops {
                    if left == 0 {
                        // The next life reads the maps and is told everything again.
                        left = usize::MAX;
                        planner = Planner::adopt(here(), LIMITS, &model.observe().unwrap());
                        world.tell(&mut planner);
                        continue 'life;
                    }
                    left -= 1;
                    let Ok(()) = model.apply(op);
                    prop_assert_eq!(model.check(), Ok(()));
                }
            }
            prop_assert_eq!(answers(&model), world.answers());
        }
        // No record of a pod that is gone takes flows.
        let wanted: BTreeSet<_> = world.answers().into_values().flatten().collect();
        for record in model.observe().unwrap().backends.values() {
            prop_assert!(record.state == state::DEAD || wanted.contains(&(ip(record.addr), record.port.get())));
        }
    }
}
