//! Random cluster histories: the programmed model equals a naive reading of the cluster, no reader ever sees torn state, nothing
//! live is withdrawn on the way, and a planner that dies between any two ops is adopted by the next.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster_core::{
    Delta, Endpoint, EndpointPort, EndpointSlice, Event, Kind, Meta, Object, ObjectName, Origin,
    Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use kun_ebpf_abi::Port;
use kun_ebpf_abi::service::{ServiceKey, state};
use kun_proxy_core::{Backend, Here, Limits, Model, Op, Planner, addr, ip};
use proptest::prelude::*;

const LIMITS: Limits = Limits {
    services: 64,
    backends: 512,
    slots: 1 << 14,
};

fn here() -> Here {
    Here {
        node: "node-a".into(),
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

/// An endpoint in few bits: which address, its conditions, whether it is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tiny {
    host: u8,
    ready: bool,
    serving: bool,
    terminating: bool,
    here: bool,
}

/// A change of the cluster.
#[derive(Debug, Clone)]
enum Change {
    Service {
        which: u8,
        vip: u8,
        ports: u8,
        external: bool,
        local: bool,
        affinity: bool,
        udp: bool,
    },
    Slice {
        which: u8,
        part: u8,
        v6: bool,
        endpoints: Vec<Tiny>,
    },
    DropService(u8),
    DropSlice(u8, u8, bool),
}

fn tiny() -> impl Strategy<Value = Tiny> {
    (0_u8..6, any::<[bool; 4]>()).prop_map(|(host, [ready, serving, terminating, here])| Tiny {
        host,
        // What the endpoint controller writes: ready implies serving and not terminating.
        ready: ready && !terminating,
        serving: serving || (ready && !terminating),
        terminating,
        here,
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        3 => (0_u8..4, 0_u8..4, 1_u8..3, any::<[bool; 4]>()).prop_map(
            |(which, vip, ports, [external, local, affinity, udp])| Change::Service {
                which, vip, ports, external, local, affinity, udp,
            }
        ),
        6 => (0_u8..4, 0_u8..2, any::<bool>(), prop::collection::vec(tiny(), 0..6)).prop_map(
            |(which, part, v6, endpoints)| Change::Slice { which, part, v6, endpoints }
        ),
        1 => (0_u8..4).prop_map(Change::DropService),
        1 => (0_u8..4, 0_u8..2, any::<bool>()).prop_map(|(w, p, v)| Change::DropSlice(w, p, v)),
    ]
}

fn slice_name(which: u8, part: u8, v6: bool) -> String {
    format!("s{which}-{part}-{}", if v6 { 6 } else { 4 })
}

fn host(host: u8, v6: bool) -> IpAddr {
    if v6 {
        format!("fd00::{host:x}").parse().unwrap()
    } else {
        IpAddr::from([10, 0, 0, host])
    }
}

fn delta(change: &Change) -> Delta {
    match change {
        Change::Service {
            which,
            vip,
            ports,
            external,
            local,
            affinity,
            udp,
        } => Delta::Upsert(Object::Service(Arc::new(Service {
            meta: meta(&format!("s{which}")),
            kind: ServiceType::LoadBalancer,
            cluster_ips: vec![
                IpAddr::from([172, 16, 0, *vip]),
                format!("fd10::{vip:x}").parse().unwrap(),
            ],
            load_balancer_ips: external
                .then(|| IpAddr::from([192, 0, 2, *which]))
                .into_iter()
                .collect(),
            external_name: None,
            ports: (0..*ports)
                .map(|p| ServicePort {
                    name: format!("p{p}").into(),
                    protocol: if *udp { Protocol::Udp } else { Protocol::Tcp },
                    port: 80 + u16::from(p),
                    node_port: None,
                })
                .collect(),
            affinity_secs: affinity.then_some(60),
            internal_policy: if *local {
                TrafficPolicy::Local
            } else {
                TrafficPolicy::Cluster
            },
            external_policy: TrafficPolicy::Cluster,
            publish_not_ready: false,
            families: Vec::new(),
            load_balancer_named: false,
            load_balancer_class: None,
        }))),
        Change::Slice {
            which,
            part,
            v6,
            endpoints,
        } => Delta::Upsert(Object::EndpointSlice(Arc::new(EndpointSlice {
            meta: meta(&slice_name(*which, *part, *v6)),
            service: ObjectName::new("default", &format!("s{which}")),
            ports: [Protocol::Tcp, Protocol::Udp]
                .into_iter()
                .flat_map(|protocol| {
                    (0_u16..2).map(move |p| EndpointPort {
                        name: format!("p{p}").into(),
                        protocol,
                        // Named ports may differ from slice to slice.
                        port: 8000 + p + 10 * u16::from(*part),
                    })
                })
                .collect(),
            endpoints: endpoints
                .iter()
                .map(|t| Endpoint {
                    address: host(t.host, *v6),
                    ready: t.ready,
                    serving: t.serving,
                    terminating: t.terminating,
                    node: Some(if t.here { "node-a" } else { "node-b" }.into()),
                    zone: None,
                    hostname: None,
                    pod: None,
                })
                .collect(),
        }))),
        Change::DropService(which) => Delta::Remove(
            Kind::Service,
            ObjectName::new("default", &format!("s{which}")),
        ),
        Change::DropSlice(which, part, v6) => Delta::Remove(
            Kind::EndpointSlice,
            ObjectName::new("default", &slice_name(*which, *part, *v6)),
        ),
    }
}

/// The cluster as the naive reader has it.
#[derive(Debug, Clone, Default)]
struct Cluster {
    services: BTreeMap<ObjectName, Arc<Service>>,
    slices: BTreeMap<ObjectName, Arc<EndpointSlice>>,
}

/// Frontend and side (external?) to the endpoints that new flows may get.
type Answers = BTreeMap<(ServiceKey, bool), BTreeSet<(IpAddr, u16)>>;

impl Cluster {
    fn apply(&mut self, delta: &Delta) {
        match delta {
            Delta::Upsert(Object::Service(s)) => {
                self.services.insert(s.meta.name.clone(), s.clone());
            }
            Delta::Upsert(Object::EndpointSlice(s)) => {
                self.slices.insert(s.meta.name.clone(), s.clone());
            }
            Delta::Remove(Kind::Service, n) => {
                self.services.remove(n);
            }
            Delta::Remove(Kind::EndpointSlice, n) => {
                self.slices.remove(n);
            }
            _ => unreachable!("the strategy makes no other"),
        }
    }

    fn event(&self) -> Event {
        let services = self.services.values().cloned().map(Object::Service);
        let slices = self.slices.values().cloned().map(Object::EndpointSlice);
        Event::Deltas(slices.chain(services).map(Delta::Upsert).collect())
    }

    /// Straight from the words of the specification, per frontend, with no index and no increments.
    fn answers(&self) -> Answers {
        let mut answers = Answers::new();
        for service in self.services.values() {
            for port in &service.ports {
                let frontends = service
                    .cluster_ips
                    .iter()
                    .map(|a| (a, false))
                    .chain(service.load_balancer_ips.iter().map(|a| (a, true)));
                for (address, lb) in frontends {
                    let key = ServiceKey {
                        addr: addr(*address),
                        port: Port::new(port.port),
                        proto: port.protocol.number(),
                        pad: 0,
                    };
                    for external in [false, true] {
                        let local =
                            external || (!lb && service.internal_policy == TrafficPolicy::Local);
                        let endpoints = self.endpoints(service, port, address.is_ipv4());
                        // Services come in the order of their names: the first one has a contested frontend.
                        answers
                            .entry((key, external))
                            .or_insert_with(|| select(&endpoints, local));
                    }
                }
            }
        }
        answers
    }

    fn endpoints(
        &self,
        service: &Service,
        port: &ServicePort,
        v4: bool,
    ) -> BTreeMap<(IpAddr, u16), Endpoint> {
        let mut all: BTreeMap<(IpAddr, u16), Endpoint> = BTreeMap::new();
        for slice in self.slices.values() {
            if slice.service != service.meta.name {
                continue;
            }
            for p in &slice.ports {
                if p.name != port.name || p.protocol != port.protocol {
                    continue;
                }
                for e in slice.endpoints.iter().filter(|e| e.address.is_ipv4() == v4) {
                    let rank = |e: &Endpoint| (e.ready, e.serving, !e.terminating);
                    let old = all.get(&(e.address, p.port));
                    if old.is_none_or(|o| rank(o) < rank(e)) {
                        all.insert((e.address, p.port), e.clone());
                    }
                }
            }
        }
        all
    }
}

fn select(all: &BTreeMap<(IpAddr, u16), Endpoint>, local: bool) -> BTreeSet<(IpAddr, u16)> {
    let pick = |f: &dyn Fn(&Endpoint) -> bool| -> BTreeSet<(IpAddr, u16)> {
        all.iter()
            .filter(|(_, e)| (!local || e.node.as_deref() == Some("node-a")) && f(e))
            .map(|(k, _)| *k)
            .collect()
    };
    let ready = pick(&|e| e.ready);
    if ready.is_empty() {
        pick(&|e| e.serving && e.terminating)
    } else {
        ready
    }
}

/// What the model offers, per frontend and side.
fn offered(model: &Model) -> Answers {
    let mut answers = Answers::new();
    for key in model.frontends() {
        for external in [false, true] {
            let found = model.lookup(key, external).expect("it is a frontend");
            let set = found
                .values()
                .map(|(r, _)| (ip(r.addr), r.port.get()))
                .collect();
            answers.insert((*key, external), set);
        }
    }
    answers
}

/// Flows that clients hold: each backend id with the generation that it had when a flow was made.
type Flows = BTreeMap<(ServiceKey, bool, IpAddr, u16), (u32, u32)>;

fn flows(model: &Model) -> Flows {
    let mut flows = Flows::new();
    for key in model.frontends() {
        for external in [false, true] {
            for (id, (r, _)) in model.lookup(key, external).expect("it is a frontend") {
                flows.insert(
                    (*key, external, ip(r.addr), r.port.get()),
                    (id, r.generation),
                );
            }
        }
    }
    flows
}

/// What must hold after every single op on the way from `before` to `after`.
fn on_the_way(
    model: &Model,
    before: &Answers,
    after: &Answers,
    old_flows: &Flows,
    same_policies: bool,
) -> Result<(), TestCaseError> {
    let now = offered(model);
    for (key, old) in before {
        let Some(new) = after.get(key) else { continue };
        let Some(now) = now.get(key) else {
            return Err(TestCaseError::fail(format!(
                "{key:?} was withdrawn for a moment"
            )));
        };
        if !old.is_empty() && !new.is_empty() {
            prop_assert!(!now.is_empty(), "{key:?} had no endpoint for a moment");
        }
        for endpoint in old.intersection(new) {
            prop_assert!(
                now.contains(endpoint),
                "{key:?}: {endpoint:?} was withdrawn for a moment"
            );
        }
        for endpoint in now {
            prop_assert!(
                !same_policies || old.contains(endpoint) || new.contains(endpoint),
                "{key:?}: {endpoint:?} is neither of before nor of after"
            );
        }
    }
    // A frontend that the same Service keeps keeps the flows to the endpoints that stay.
    for ((key, external, address, port), (id, generation)) in old_flows {
        let stays = |a: &Answers| {
            a.get(&(*key, *external))
                .is_some_and(|s| s.contains(&(*address, *port)))
        };
        if stays(before) && stays(after) {
            let record = model.backend(*id).expect("it was written");
            prop_assert!(
                record.generation == *generation && record.state != state::DEAD,
                "a flow to {address} was cut though it lives on"
            );
        }
    }
    Ok(())
}

/// No number is used again before a grace period: nothing that an op frees is written by a later one of the same stretch.
#[derive(Default)]
struct Reuse {
    dead: BTreeSet<u32>,
    retired: Vec<(u32, u32)>,
    views: BTreeMap<(u32, u32), (u32, u32)>,
}

impl Reuse {
    fn see(&mut self, op: &Op) -> Result<(), TestCaseError> {
        match op {
            Op::Grace => {
                self.dead.clear();
                self.retired.clear();
            }
            Op::Backend { id, record } if record.state == state::DEAD => {
                self.dead.insert(*id);
            }
            Op::Backend { id, .. } => prop_assert!(!self.dead.contains(id), "backend {id} reused"),
            Op::Slots { base, ids } => {
                let end = base + ids.len() as u32;
                for (b, e) in self.retired.iter().chain(self.views.values()) {
                    prop_assert!(end <= *b || e <= base, "slots {base}..{end} are in use");
                }
            }
            Op::Publish {
                service,
                view,
                value,
            } => {
                let range = (value.base, value.base + u32::from(value.count));
                if let Some(old) = self.views.insert((*service, *view as u32), range) {
                    self.retired.push(old);
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// A frontend that changes hands between two Services has no continuity to keep: there the end counts, and that nothing is torn.
fn uncontested(before: &Cluster, after: &Cluster) -> bool {
    let mut owner: BTreeMap<IpAddr, &ObjectName> = BTreeMap::new();
    let services = before.services.iter().chain(&after.services);
    services
        .flat_map(|(name, s)| s.cluster_ips.iter().map(move |a| (*a, name)))
        .all(|(address, name)| *owner.entry(address).or_insert(name) == name)
}

fn run(history: &[Vec<Change>], crash_at: Option<usize>) -> Result<(), TestCaseError> {
    let mut cluster = Cluster::default();
    let mut model = Model::default();
    let mut planner = Planner::new(here(), LIMITS);
    planner.on_event(&Event::Synced);
    let mut reuse = Reuse::default();
    let mut applied = 0;
    for batch in history {
        let before = cluster.clone();
        let deltas: Vec<Delta> = batch.iter().map(delta).collect();
        deltas.iter().for_each(|d| cluster.apply(d));
        planner.on_event(&Event::Deltas(deltas));
        let (old, new) = (before.answers(), cluster.answers());
        let calm = uncontested(&before, &cluster);
        // While a policy changes, a client may see the new endpoints by the old policy for one op.
        let same_policies = cluster.services.iter().all(|(name, s)| {
            let old = before.services.get(name);
            old.is_none_or(|o| o.internal_policy == s.internal_policy)
        });
        let kept = flows(&model);
        'steps: while let Some(ops) = planner.step() {
            for op in &ops {
                if crash_at == Some(applied) {
                    // Everything but the maps is lost. The next planner learns the whole cluster again.
                    let observed = model.observe().expect("infallible");
                    planner = Planner::adopt(here(), LIMITS, &observed);
                    reuse = Reuse::default();
                    prop_assert!(planner.step().is_none(), "planned before it was synced");
                    planner.on_event(&cluster.event());
                    planner.on_event(&Event::Synced);
                    applied += 1;
                    continue 'steps;
                }
                applied += 1;
                reuse.see(op)?;
                model.apply(op).expect("infallible");
                model
                    .check()
                    .map_err(|t| TestCaseError::fail(t.to_string()))?;
                if calm {
                    on_the_way(&model, &old, &new, &kept, same_policies)?;
                }
            }
        }
        prop_assert_eq!(
            &offered(&model),
            &new,
            "the maps say otherwise than the cluster"
        );
        // Converged: another adoption over the same cluster finds nothing to do but to forget what is dead.
        let observed = model.observe().expect("infallible");
        let mut again = Planner::adopt(here(), LIMITS, &observed);
        again.on_event(&cluster.event());
        again.on_event(&Event::Synced);
        while let Some(ops) = again.step() {
            prop_assert!(
                ops.iter().all(|o| *o == Op::Grace),
                "adoption of a converged dataplane changes it: {:?}",
                ops
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn the_maps_follow_the_cluster(
        history in prop::collection::vec(prop::collection::vec(change(), 1..4), 1..12),
    ) {
        run(&history, None)?;
    }

    #[test]
    fn a_crash_between_any_two_ops_heals(
        history in prop::collection::vec(prop::collection::vec(change(), 1..4), 1..8),
        crash_at in 0_usize..60,
    ) {
        run(&history, Some(crash_at))?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// A planner that starts over full maps while some manifests cannot be read: what is in none of the others stays, and goes
    /// or is found again when all can be read.
    #[test]
    fn what_an_unreadable_manifest_may_hold_is_kept(
        history in prop::collection::vec(change(), 1..16),
        missing in prop::collection::vec(any::<bool>(), 24),
        gone in any::<bool>(),
        failed in any::<bool>(),
    ) {
        let mut cluster = Cluster::default();
        history.iter().map(delta).for_each(|d| cluster.apply(&d));
        prop_assume!(uncontested(&cluster, &cluster));
        let mut model = Model::default();
        let mut first = Planner::new(here(), LIMITS);
        first.on_event(&cluster.event());
        first.on_event(&Event::Synced);
        follow(&mut first, &mut model)?;
        let before = offered(&model);

        let mut missing = missing.into_iter();
        let mut readable = cluster.clone();
        readable.services.retain(|_, _| !missing.next().unwrap_or(false));
        readable.slices.retain(|_, _| !missing.next().unwrap_or(false));
        let told: BTreeSet<IpAddr> = (readable.slices.values())
            .flat_map(|s| s.endpoints.iter().map(|e| e.address))
            .collect();
        let mut next = Planner::adopt(here(), LIMITS, &model.observe().expect("infallible"));
        next.on_event(&readable.event());
        next.on_event(&Event::Partial);
        next.on_event(&Event::Synced);
        follow(&mut next, &mut model)?;
        if failed {
            next.adopt_again(&model.observe().expect("infallible"));
            follow(&mut next, &mut model)?;
        }
        let held = offered(&model);
        for (key, backends) in &before {
            let now = held.get(key);
            prop_assert!(now.is_some(), "{key:?} was taken away");
            let kept = backends.iter().filter(|(address, _)| !told.contains(address));
            for backend in kept {
                prop_assert!(now.is_some_and(|n| n.contains(backend)), "{key:?} lost {backend:?}");
            }
        }

        // Either the files were read at last, or they were removed.
        let end = if gone { &readable } else { &cluster };
        next.on_event(&end.event());
        next.on_event(&Event::Whole);
        follow(&mut next, &mut model)?;
        prop_assert_eq!(&offered(&model), &end.answers());
        let totals = next.totals();
        prop_assert_eq!((totals.held_frontends, totals.held_backends), (0, 0));
    }
}

fn follow(planner: &mut Planner, model: &mut Model) -> Result<(), TestCaseError> {
    while let Some(ops) = planner.step() {
        for op in &ops {
            model.apply(op).expect("infallible");
            model
                .check()
                .map_err(|t| TestCaseError::fail(t.to_string()))?;
        }
    }
    Ok(())
}
