//! A dataplane that fails at any op: the loop reads it back, plans anew, and arrives where it would have been.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster::{
    Delta, Endpoint, EndpointPort, EndpointSlice, Event, Meta, Object, ObjectName, Origin,
    Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use kun_proxy::Proxy;
use kun_proxy_core::{Backend, Here, Limits, Model, Observed, Op};

const LIMITS: Limits = Limits {
    services: 8,
    backends: 32,
    slots: 256,
};

/// A model whose op number `fails_at` is refused, once.
#[derive(Debug, Default)]
struct Flaky {
    model: Model,
    seen: usize,
    fails_at: Option<usize>,
}

#[derive(Debug, PartialEq, Eq)]
struct Refused;

impl Backend for Flaky {
    type Error = Refused;

    fn apply(&mut self, op: &Op) -> Result<(), Refused> {
        self.seen += 1;
        if self.fails_at == Some(self.seen) {
            return Err(Refused);
        }
        let Ok(()) = self.model.apply(op);
        Ok(())
    }

    fn observe(&mut self) -> Result<Observed, Refused> {
        let Ok(observed) = self.model.observe();
        Ok(observed)
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

fn service(n: u8) -> Delta {
    Delta::Upsert(Object::Service(Arc::new(Service {
        meta: meta(&format!("s{n}")),
        kind: ServiceType::ClusterIp,
        cluster_ips: vec![IpAddr::from([10, 96, 0, n])],
        families: Vec::new(),
        load_balancer_ips: vec![IpAddr::from([192, 0, 2, n])],
        load_balancer_named: false,
        load_balancer_class: None,
        external_name: None,
        ports: vec![ServicePort {
            name: "p".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        affinity_secs: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        publish_not_ready: false,
    })))
}

fn slice(n: u8, hosts: &[u8]) -> Delta {
    Delta::Upsert(Object::EndpointSlice(Arc::new(EndpointSlice {
        meta: meta(&format!("s{n}-x")),
        service: ObjectName::new("default", &format!("s{n}")),
        ports: vec![EndpointPort {
            name: "p".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: hosts
            .iter()
            .map(|h| Endpoint {
                address: IpAddr::from([10, 0, n, *h]),
                ready: true,
                serving: true,
                terminating: false,
                node: Some("here".into()),
                zone: None,
                hostname: None,
                pod: None,
            })
            .collect(),
    })))
}

fn batches() -> Vec<Event> {
    vec![
        Event::Deltas(vec![
            service(1),
            slice(1, &[1, 2]),
            service(2),
            slice(2, &[1]),
        ]),
        Event::Synced,
        Event::Deltas(vec![slice(1, &[2, 3]), service(3), slice(3, &[])]),
        Event::Deltas(vec![
            slice(2, &[]),
            Delta::Remove(kun_cluster::Kind::Service, ObjectName::new("default", "s1")),
        ]),
    ]
}

/// What a client can reach: frontends, and the addresses behind each.
fn reachable(model: &Model) -> BTreeMap<IpAddr, Vec<IpAddr>> {
    model
        .frontends()
        .map(|key| {
            let found = model.lookup(key, false).unwrap();
            let mut behind: Vec<IpAddr> = found
                .values()
                .map(|(r, _)| kun_proxy_core::ip(r.addr))
                .collect();
            behind.sort_unstable();
            (kun_proxy_core::ip(key.addr), behind)
        })
        .collect()
}

/// Which virtual addresses are ready here.
type Vips = BTreeMap<IpAddr, bool>;

/// Runs everything; how many ops were tried, and where it ended.
fn run(fails_at: Option<usize>) -> (usize, BTreeMap<IpAddr, Vec<IpAddr>>, Option<Vips>) {
    let here = Here {
        node: "here".into(),
        zone: None,
    };
    let backend = Flaky {
        fails_at,
        ..Flaky::default()
    };
    let (mut proxy, _) = Proxy::adopt(here, LIMITS, backend).unwrap();
    let mut failures = 0;
    for event in batches() {
        let before = proxy.vips().cloned();
        proxy.on_event(&event);
        loop {
            match proxy.advance(1) {
                Ok(progress) if progress.done => break,
                Ok(_) => {}
                Err(Refused) => failures += 1,
            }
            assert_eq!(proxy.vips(), before.as_ref(), "told before it is whole");
            proxy.backend().model.check().unwrap();
        }
    }
    assert_eq!(failures, usize::from(fails_at.is_some()));
    (
        proxy.backend().seen,
        reachable(&proxy.backend().model),
        proxy.vips().cloned(),
    )
}

#[test]
fn every_op_may_fail_once() {
    let (ops, wanted, vips) = run(None);
    assert!(ops > 20, "{ops} ops are too few to say anything");
    assert_eq!(
        wanted.keys().copied().collect::<Vec<_>>(),
        [2, 3]
            .map(|n| IpAddr::from([10, 96, 0, n]))
            .into_iter()
            .chain([2, 3].map(|n| IpAddr::from([192, 0, 2, n])))
            .collect::<Vec<_>>()
    );
    let ready = [2, 3].map(|n| (IpAddr::from([192, 0, 2, n]), false));
    assert_eq!(vips, Some(ready.into()));
    for n in 1..=ops {
        let (_, reached, ready) = run(Some(n));
        assert_eq!(ready, vips, "after op {n} failed");
        assert_eq!(reached, wanted, "after op {n} failed");
    }
}

#[test]
fn nothing_is_applied_before_the_cluster_is_synced() {
    let here = Here {
        node: "here".into(),
        zone: None,
    };
    let (mut proxy, _) = Proxy::adopt(here, LIMITS, Flaky::default()).unwrap();
    proxy.on_event(&batches()[0]);
    assert!(proxy.advance(100).unwrap().done);
    assert_eq!(proxy.backend().seen, 0);
    proxy.on_event(&Event::Synced);
    assert!(proxy.advance(100).unwrap().ops > 0);
    // Trouble at the source changes nothing that stands.
    let before = reachable(&proxy.backend().model);
    proxy.on_event(&Event::Trouble("unreadable".into()));
    proxy.advance(100).unwrap();
    assert_eq!(reachable(&proxy.backend().model), before);
    assert_eq!(before.len(), 4);
}
