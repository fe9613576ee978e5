//! Figures of the part `proxy`: cold start, one endpoint's change, adoption and memory, at 10,000 and 100,000 Services of ten endpoints,
//! from typed deltas to the maps in the kernel.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kun_cluster::{
    Delta, Endpoint, EndpointPort, EndpointSlice, Event, Meta, Object, ObjectName, Origin,
    Protocol, Service, ServicePort, ServiceType, TrafficPolicy,
};
use kun_config::Config;
use kun_harness::{BpfFs, skip};
use kun_proxy::EbpfBackend;
use kun_proxy_core::{Backend, Here, Op, Planner};

use super::{Context, Row};

const ENDPOINTS: u16 = 10;

/// Changes of one endpoint; the best counts, as the machine is shared.
const CHANGES: usize = 200;

/// Measures the part.
pub fn run(_context: &Context) -> anyhow::Result<Vec<Row>> {
    if !rustix::process::geteuid().is_root() {
        skip("because proxy figures need eBPF maps, and so root");
        return Ok(Vec::new());
    }
    let mut rows = Vec::new();
    for (services, name) in [(10_000, "10,000"), (100_000, "100,000")] {
        rows.extend(measure(services, name)?);
    }
    Ok(rows)
}

fn measure(services: u32, name: &str) -> anyhow::Result<Vec<Row>> {
    let bpffs = BpfFs::new()?;
    let config = config(&bpffs, services)?;
    // What the cluster source holds anyway, made before the clock runs.
    let deltas: Vec<Delta> = (0..services)
        .flat_map(|i| {
            [
                Delta::Upsert(service(i)),
                Delta::Upsert(slice(i, ENDPOINTS)),
            ]
        })
        .collect();
    let changes: Vec<[Event; 2]> = (0..CHANGES as u32)
        .map(|i| i * (services / CHANGES as u32))
        .map(|i| {
            [ENDPOINTS - 1, ENDPOINTS].map(|n| Event::Deltas(vec![Delta::Upsert(slice(i, n))]))
        })
        .collect();
    let events = [Event::Deltas(deltas), Event::Synced];

    let (mut backend, adopted) = EbpfBackend::open(&config)?;
    ensure!(adopted.maps == 0, "the maps are not new");
    let here = Here {
        node: "node-0".into(),
        zone: None,
    };
    let before = resident()?;
    let begin = Instant::now();
    let mut planner = Planner::new(here.clone(), backend.limits());
    events.iter().for_each(|e| planner.on_event(e));
    while let Some(ops) = planner.step() {
        ops.iter().try_for_each(|op| backend.apply(op))?;
    }
    let cold = begin.elapsed();
    let weight = resident()?.saturating_sub(before);
    let totals = planner.totals();
    ensure!(
        totals.frontends == services as usize && totals.backends == services * u32::from(ENDPOINTS),
        "{totals:?}"
    );

    let published = one_by_one(&mut planner, &mut backend, &changes, false)?;
    let whole = one_by_one(&mut planner, &mut backend, &changes, true)?;

    drop(backend);
    let begin = Instant::now();
    let (mut backend, adopted) = EbpfBackend::open(&config)?;
    let loaded = begin.elapsed();
    ensure!(adopted.maps > 0, "nothing was adopted");
    let observed = backend.observe()?;
    let mut planner = Planner::adopt(here, backend.limits(), &observed);
    events.iter().for_each(|e| planner.on_event(e));
    let mut ops = 0;
    while let Some(step) = planner.step() {
        ops += step.iter().filter(|op| **op != Op::Grace).count();
        step.iter().try_for_each(|op| backend.apply(op))?;
    }
    let adoption = begin.elapsed() - loaded;
    ensure!(ops == 0, "adoption changed {ops} things");
    EbpfBackend::remove(&config, &[])?;

    let large = services == 100_000;
    let budget = |row: Row, most: f64| if large { row.at_most(most) } else { row };
    let row = |what: &str, value: f64, unit: &str| {
        Row::new(format!("proxy/{name} services: {what}"), value, unit)
    };
    Ok(vec![
        budget(
            row("cold start to the kernel", cold.as_secs_f64(), "s"),
            2.0,
        ),
        budget(
            row("one endpoint, change to published", micros(published), "µs"),
            10.0,
        ),
        row(
            "one endpoint, grace period included",
            micros(whole) / 1e3,
            "ms",
        ),
        row("adoption, nothing to do", adoption.as_secs_f64(), "s"),
        budget(row("planner's memory", weight as f64 / 1e6, "MB"), 64.0),
    ])
}

/// The best time of one endpoint's change: to its publication, back to back as nobody reads the maps here, or with the grace
/// period that follows.
fn one_by_one(
    planner: &mut Planner,
    backend: &mut EbpfBackend,
    changes: &[[Event; 2]],
    grace: bool,
) -> anyhow::Result<Duration> {
    let mut best = Duration::MAX;
    for event in changes.iter().flatten() {
        let begin = Instant::now();
        planner.on_event(event);
        while let Some(ops) = planner.step() {
            for op in ops.iter().filter(|op| grace || **op != Op::Grace) {
                backend.apply(op)?;
                if !grace && matches!(op, Op::Publish { .. }) {
                    best = best.min(begin.elapsed());
                }
            }
        }
        if grace {
            best = best.min(begin.elapsed());
        }
    }
    Ok(best)
}

fn micros(d: Duration) -> f64 {
    d.as_secs_f64() * 1e6
}

fn config(bpffs: &BpfFs, services: u32) -> anyhow::Result<Config> {
    let backends = services * (u32::from(ENDPOINTS) + 1);
    let text = serde_json::json!({
        "node": {"name": "node-0"},
        "cluster": {"folder": "/unused"},
        "ipam": {"podPrefix": "fd00::/96", "v4Pools": ["10.0.0.0/8"], "v6OnlyPool": "240.0.0.0/4"},
        "proxy": {
            "cgroupRoot": "/unused", "maxServices": services, "maxBackends": backends,
            // Ten ids take an extent of sixteen.
            "maxSlots": services * 16 + 4096, "maxFlows": 4096,
        },
        "agent": {"bpffsRoot": bpffs.path().join("kun")},
    });
    kun_config::parse_on("bench", &text.to_string(), "node-0").context("the bench's configuration")
}

fn meta(name: String) -> Meta {
    Meta {
        name: ObjectName::new("bench", &name),
        uid: "".into(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        origin: Origin::Api {
            resource_version: "1".into(),
        },
    }
}

fn service(i: u32) -> Object {
    Object::Service(Arc::new(Service {
        meta: meta(format!("s{i}")),
        kind: ServiceType::ClusterIp,
        cluster_ips: vec![Ipv4Addr::from(0x6400_0000 + i).into()],
        families: Vec::new(),
        load_balancer_ips: Vec::new(),
        load_balancer_named: false,
        load_balancer_class: None,
        external_name: None,
        ports: vec![ServicePort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 80,
            node_port: None,
        }],
        affinity_secs: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        publish_not_ready: false,
    }))
}

fn slice(i: u32, endpoints: u16) -> Object {
    Object::EndpointSlice(Arc::new(EndpointSlice {
        meta: meta(format!("s{i}-1")),
        service: ObjectName::new("bench", &format!("s{i}")),
        ports: vec![EndpointPort {
            name: "".into(),
            protocol: Protocol::Tcp,
            port: 8080,
        }],
        endpoints: (0..endpoints)
            .map(|n| Endpoint {
                address: IpAddr::from(Ipv4Addr::from(0x0a00_0000 + i * 16 + u32::from(n))),
                ready: true,
                serving: true,
                terminating: false,
                // One endpoint in five hundred is here, as on a node of a large cluster.
                node: (i.is_multiple_of(50) && n == 0).then(|| "node-0".into()),
                zone: None,
                hostname: None,
                pod: None,
            })
            .collect(),
    }))
}

/// Resident memory of this process without what it shares with files and maps.
fn resident() -> anyhow::Result<usize> {
    let text = std::fs::read_to_string("/proc/self/status").context("/proc/self/status")?;
    let kib: usize = text
        .lines()
        .find_map(|l| l.strip_prefix("RssAnon:"))
        .and_then(|l| l.trim().trim_end_matches(" kB").parse().ok())
        .context("RssAnon")?;
    Ok(kib * 1024)
}
