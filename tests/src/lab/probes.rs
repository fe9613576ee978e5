//! What must hold when a lab stands, probed from inside its pods and from outside.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ipnet::{Ipv4Net, Ipv6Net};
use kun_config::types::{PodPrefix, SlotClass};
use kun_harness::wait_for;

use super::client::{Ask, Client, Told};
use super::expand::{ServicePlan, resolve};
use super::names::{
    CLUSTER_DNS_V4, CLUSTER_DNS_V6, DNS_V4, MACHINES, NAT64_POOL, POD_PREFIX, PREF64, WEB_NAME,
    WEB_V4,
};
use super::outside::{TorRoute, tor_routes};
use super::pod::Pod;
use super::report::{Line, Report};
use super::server::Hello;
use super::{Lab, OWN_NAMESPACE};

/// Manifests reach programs, and routes their peers, within this; until then a probe that fails is tried again.
const SETTLES_WITHIN: Duration = Duration::from_secs(40);
/// Between two tries of a probe.
const REST: Duration = Duration::from_millis(200);

/// The pair of what a line is about and its family.
type Key = (String, &'static str);

/// One probe: its line, and how to make it.
struct Probe<'a> {
    key: Key,
    make: Box<Make<'a>>,
}

/// What was seen, or why it failed.
type Make<'a> = dyn Fn(&mut Client) -> Result<String> + Send + 'a;

impl<'a> Probe<'a> {
    fn new(
        what: impl Into<String>,
        v6: bool,
        make: impl Fn(&mut Client) -> Result<String> + Send + 'a,
    ) -> Self {
        Self {
            key: (what.into(), family(v6)),
            make: Box::new(make),
        }
    }
}

fn family(v6: bool) -> &'static str {
    if v6 { "IPv6" } else { "IPv4" }
}

/// Probes everything.
pub fn probe(lab: &Lab, step: &mut dyn FnMut(&str)) -> Result<Report> {
    let settled_by = Instant::now() + SETTLES_WITHIN;
    let mut report = Report::default();
    step("routes at the ToR");
    report.lines.extend(tor(lab, settled_by)?);
    let mut parts: Vec<(Client, Vec<Probe<'_>>)> = Vec::new();
    for pod in lab.clients() {
        let mut probes = pod_to_pod(lab, pod);
        probes.extend(by_name(lab, pod));
        if pod.plan.v6_only() {
            probes.push(without_ipv4(pod));
            probes.extend(to_ipv4_world()?);
        }
        parts.push((lab.client(pod)?, probes));
    }
    let virtual_addresses = lab.load_balancers()?;
    let outsiders = [(&lab.topology.internet, false), (&lab.topology.tor, true)];
    for (netns, v6) in outsiders {
        parts.push((
            lab.outside_client(netns)?,
            north_south(lab, &virtual_addresses, v6),
        ));
    }
    let total: usize = parts.iter().map(|(_, probes)| probes.len()).sum();
    step(&format!("{total} probes from {} clients", parts.len()));
    report.lines.extend(run(parts, settled_by));
    Ok(report)
}

/// All clients at once; lines in the order in which their first probe was planned.
fn run(parts: Vec<(Client, Vec<Probe<'_>>)>, settled_by: Instant) -> Vec<Line> {
    let outcomes: Vec<Vec<(Key, Result<String, String>)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .into_iter()
            .map(|(mut client, probes)| {
                scope.spawn(move || {
                    probes
                        .into_iter()
                        .map(|probe| (probe.key.clone(), attempt(&probe, &mut client, settled_by)))
                        .collect()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .collect()
    });
    let mut lines: Vec<Line> = Vec::new();
    for ((what, family), outcome) in outcomes.into_iter().flatten() {
        let at = lines
            .iter()
            .position(|line| line.what == what && line.family == family)
            .unwrap_or_else(|| {
                lines.push(Line::new(&what, family));
                lines.len() - 1
            });
        lines[at].count(outcome);
    }
    lines.sort_by_key(|line| (order(&line.what), line.what.clone()));
    lines
}

fn order(what: &str) -> usize {
    const ORDER: [&str; 6] = [
        "IPv6-only pods have",
        "pod →",
        "cluster DNS",
        "service",
        "IPv6-only",
        "outside",
    ];
    ORDER
        .iter()
        .position(|start| what.starts_with(start))
        .unwrap_or(ORDER.len())
}

fn attempt(probe: &Probe<'_>, client: &mut Client, settled_by: Instant) -> Result<String, String> {
    loop {
        match (probe.make)(client) {
            Ok(seen) => return Ok(seen),
            Err(e) if Instant::now() >= settled_by => return Err(format!("{e:#}")),
            Err(_) => std::thread::sleep(REST),
        }
    }
}

fn pod_to_pod<'a>(lab: &'a Lab, from: &'a Pod) -> Vec<Probe<'a>> {
    let mut probes = Vec::new();
    for to in lab.pods.iter().filter(|to| to.plan.name != from.plan.name) {
        let place = if to.plan.node == from.plan.node {
            "same node"
        } else {
            "across"
        };
        for v6 in [true, false] {
            let (Some(source), Some(target)) = (from.address(v6), to.address(v6)) else {
                continue;
            };
            let line = format!("pod → pod, {place}: ping");
            probes.push(Probe::new(line, v6, move |client| {
                ask(client, &Ask::Ping { to: target }).with_context(|| to.object())?;
                Ok(String::new())
            }));
            let port = to
                .plan
                .ports
                .iter()
                // The DNS servers answer as DNS servers do.
                .find(|p| p.protocol == "TCP" && to.plan.namespace != "kube-system");
            let Some(port) = port.map(|p| p.container_port) else {
                continue;
            };
            let line = format!("pod → pod, {place}: TCP");
            probes.push(Probe::new(line, v6, move |client| {
                let hello = hello(
                    ask(
                        client,
                        &Ask::Fetch {
                            to: (target, port).into(),
                        },
                    )
                    .with_context(|| to.object())?,
                )?;
                ensure!(
                    hello.pod == to.plan.name,
                    "{}: {} answered",
                    to.object(),
                    hello.pod
                );
                sees(&hello, source).with_context(|| to.object())?;
                Ok(String::new())
            }));
        }
    }
    probes
}

/// No translation on the way: the server sees the client's own address.
fn sees(hello: &Hello, source: IpAddr) -> Result<()> {
    let peer: SocketAddr = hello.peer.parse().context("peer")?;
    ensure!(
        peer.ip() == source,
        "the server saw {}, not the pod's {source}",
        peer.ip()
    );
    Ok(())
}

fn by_name<'a>(lab: &'a Lab, from: &'a Pod) -> Vec<Probe<'a>> {
    let mut probes = Vec::new();
    for v6 in [true, false] {
        if from.address(v6).is_none() {
            continue;
        }
        for tcp in [false, true] {
            let line = format!("cluster DNS over {}", if tcp { "TCP" } else { "UDP" });
            probes.push(Probe::new(line, v6, move |client| {
                let found = look_up(
                    client,
                    "kube-dns.kube-system.svc.cluster.local.",
                    v6,
                    v6,
                    tcp,
                )?;
                ensure!(found == [dns_server(v6)], "kube-dns is at {found:?}");
                Ok(dns_server(v6).to_string())
            }));
        }
        for service in lab
            .services
            .iter()
            .filter(|s| s.object() != "kube-system/kube-dns")
        {
            probes.extend(service_probes(lab, from, service, v6));
        }
    }
    probes
}

fn dns_server(v6: bool) -> IpAddr {
    if v6 {
        CLUSTER_DNS_V6.into()
    } else {
        CLUSTER_DNS_V4.into()
    }
}

fn look_up(
    client: &mut Client,
    name: &str,
    over_v6: bool,
    v6: bool,
    tcp: bool,
) -> Result<Vec<IpAddr>> {
    let server = dns_server(over_v6);
    match ask(
        client,
        &Ask::Resolve {
            server,
            name: name.to_owned(),
            v6,
            tcp,
        },
    )? {
        Told::Addresses { addresses } => Ok(addresses),
        other => bail!("{other:?}"),
    }
}

fn service_probes<'a>(
    lab: &'a Lab,
    from: &'a Pod,
    service: &'a ServicePlan,
    v6: bool,
) -> Vec<Probe<'a>> {
    let spec = &service.service.spec;
    let external = spec.kind.as_deref() == Some("ExternalName");
    let headless = service.cluster_ips.is_empty();
    let vip = service
        .cluster_ips
        .iter()
        .copied()
        .find(|ip| ip.is_ipv6() == v6);
    if external || spec.selector.is_empty() || (vip.is_none() && !headless) {
        return Vec::new();
    }
    let behind: Vec<&Pod> = lab
        .pods
        .iter()
        .filter(|pod| backs(service, pod) && pod.address(v6).is_some())
        .collect();
    let mut probes = Vec::new();
    for port in &spec.ports {
        let behind = behind.clone();
        let line = format!(
            "service {} by name, {}/{}",
            service.object(),
            port.port,
            port.protocol
        );
        probes.push(Probe::new(line, v6, move |client| {
            let found = look_up(client, &service.dns_name(), v6, v6, false)?;
            let to = match vip {
                Some(vip) => {
                    ensure!(found == [vip], "the name leads to {found:?}, not to {vip}");
                    SocketAddr::new(vip, port.port)
                }
                None => {
                    let mut expected: Vec<IpAddr> =
                        behind.iter().filter_map(|pod| pod.address(v6)).collect();
                    let mut got = found.clone();
                    expected.sort();
                    got.sort();
                    ensure!(
                        got == expected,
                        "the name leads to {got:?}, not to {expected:?}"
                    );
                    let first = behind.first().context("a headless service without pods")?;
                    let number = resolve(port, &first.plan).context("no such port on the pod")?;
                    SocketAddr::new(found[0], number)
                }
            };
            if behind.is_empty() {
                return refused(client, to);
            }
            let udp = port.protocol == "UDP";
            let question = if udp {
                Ask::Datagram { to }
            } else {
                Ask::Fetch { to }
            };
            let hello = hello(ask(client, &question).with_context(|| to.to_string())?)?;
            let answered = behind.iter().any(|pod| pod.plan.name == hello.pod);
            ensure!(
                answered,
                "{} answered, which is not behind the service",
                hello.pod
            );
            if let Some(source) = from.address(v6) {
                sees(&hello, source)?;
            }
            Ok(to.to_string())
        }));
    }
    probes
}

fn backs(service: &ServicePlan, pod: &Pod) -> bool {
    let meta = &service.service.metadata;
    pod.plan.namespace == meta.namespace
        && service
            .service
            .spec
            .selector
            .iter()
            .all(|(key, value)| pod.plan.labels.get(key) == Some(value))
}

/// A service without an endpoint refuses at once.
fn refused(client: &mut Client, to: SocketAddr) -> Result<String> {
    match client.ask(&Ask::Fetch { to })? {
        Told::Failed { because } if because.contains("refused") => {
            Ok("no endpoint: refused".to_owned())
        }
        other => bail!("{to}: no endpoint, and yet {other:?}"),
    }
}

fn without_ipv4<'a>(pod: &'a Pod) -> Probe<'a> {
    Probe {
        key: ("IPv6-only pods have no IPv4 address".to_owned(), ""),
        make: Box::new(move |client| {
            let told = ask(client, &Ask::OwnV4)?;
            let none = Told::Addresses { addresses: vec![] };
            ensure!(told == none, "{}: it has {told:?}", pod.object());
            ensure!(
                pod.addresses.iter().all(IpAddr::is_ipv6),
                "{}: its status shows {:?}",
                pod.object(),
                pod.addresses
            );
            Ok(pod
                .address(true)
                .map_or_else(String::new, |ip| ip.to_string()))
        }),
    }
}

/// The Pref64 address of an IPv4 address (RFC 6052 §2.2, /96).
fn synthesized(address: Ipv4Addr) -> Result<Ipv6Addr> {
    let prefix: Ipv6Net = PREF64.parse().context("PREF64")?;
    Ok(Ipv6Addr::from(
        u128::from(prefix.addr()) | u128::from(u32::from(address)),
    ))
}

fn to_ipv4_world<'a>() -> Result<Vec<Probe<'a>>> {
    let (web, dns) = (synthesized(WEB_V4)?, synthesized(DNS_V4)?);
    let pool: Ipv4Net = NAT64_POOL.parse().context("NAT64_POOL")?;
    let name = format!("{WEB_NAME}.");
    let by_name = name.clone();
    Ok(vec![
        Probe::new(
            "IPv6-only pod → IPv4-only host by name: AAAA",
            true,
            move |client| {
                let found = look_up(client, &name, true, true, false)?;
                ensure!(
                    found == [IpAddr::V6(web)],
                    "{name} leads to {found:?}, not to {web}"
                );
                Ok(web.to_string())
            },
        ),
        Probe::new(
            "IPv6-only pod → IPv4-only host by name: TCP",
            true,
            move |client| {
                let found = look_up(client, &by_name, true, true, false)?;
                let to = SocketAddr::new(*found.first().context("no address")?, 80);
                let hello = hello(ask(client, &Ask::Fetch { to })?)?;
                ensure!(hello.pod == "internet", "{} answered", hello.pod);
                let peer: SocketAddr = hello.peer.parse().context("peer")?;
                let IpAddr::V4(source) = peer.ip() else {
                    bail!("the server saw {peer}, not an IPv4 address");
                };
                ensure!(
                    pool.contains(&source),
                    "the server saw {source}, which is not of the pool {pool}"
                );
                Ok(format!("the server saw {peer}"))
            },
        ),
        Probe::new(
            "IPv6-only pod → IPv4-only host: ping",
            true,
            move |client| {
                ask(client, &Ask::Ping { to: web.into() })?;
                Ok(web.to_string())
            },
        ),
        Probe::new(
            "IPv6-only pod → IPv4-only host: UDP",
            true,
            move |client| {
                let question = Ask::Resolve {
                    server: dns.into(),
                    name: format!("{WEB_NAME}."),
                    v6: false,
                    tcp: false,
                };
                let told = ask(client, &question)?;
                ensure!(
                    told == Told::Addresses {
                        addresses: vec![WEB_V4.into()]
                    },
                    "{told:?}"
                );
                Ok(dns.to_string())
            },
        ),
    ])
}

fn north_south<'a>(
    lab: &'a Lab,
    addresses: &std::collections::BTreeMap<String, Vec<IpAddr>>,
    v6: bool,
) -> Vec<Probe<'a>> {
    let mut probes = Vec::new();
    for service in lab
        .services
        .iter()
        .filter(|s| s.service.spec.kind.as_deref() == Some("LoadBalancer"))
    {
        let vip = addresses
            .get(&service.object())
            .into_iter()
            .flatten()
            .copied()
            .find(|ip| ip.is_ipv6() == v6);
        for port in &service.service.spec.ports {
            let line = format!(
                "outside → LoadBalancer {}, {}/{}",
                service.object(),
                port.port,
                port.protocol
            );
            probes.push(Probe::new(line, v6, move |client| {
                let vip = vip.context("the operator gave it no address of this family")?;
                let to = SocketAddr::new(vip, port.port);
                let udp = port.protocol == "UDP";
                let question = if udp {
                    Ask::Datagram { to }
                } else {
                    Ask::Fetch { to }
                };
                let hello = hello(ask(client, &question).with_context(|| to.to_string())?)?;
                let behind = lab
                    .pods
                    .iter()
                    .any(|pod| backs(service, pod) && pod.plan.name == hello.pod);
                ensure!(
                    behind,
                    "{} answered, which is not behind the service",
                    hello.pod
                );
                Ok(to.to_string())
            }));
        }
    }
    probes
}

fn ask(client: &mut Client, question: &Ask) -> Result<Told> {
    match client.ask(question)? {
        Told::Failed { because } => bail!("{because}"),
        told => Ok(told),
    }
}

fn hello(told: Told) -> Result<Hello> {
    match told {
        Told::Hello(hello) => Ok(hello),
        other => bail!("{other:?}"),
    }
}

/// A route that the ToR must have.
struct Wanted {
    line: &'static str,
    prefix: String,
    /// Machines that may be next hops; at least one must be.
    via: Vec<&'static str>,
}

fn tor(lab: &Lab, settled_by: Instant) -> Result<Vec<Line>> {
    let left = settled_by.saturating_duration_since(Instant::now());
    let mut last = Vec::new();
    // Lines that hold end the wait; past it, the last look is the report.
    let _ = wait_for("the ToR's routes", left, || {
        let wanted = wanted_routes(lab).ok()?;
        last = compare(&wanted, &tor_routes(&lab.topology).ok()?);
        last.iter().all(Line::holds).then_some(())
    });
    ensure!(!last.is_empty(), "the ToR's routes cannot be read");
    Ok(last)
}

fn wanted_routes(lab: &Lab) -> Result<Vec<Wanted>> {
    let prefix: Ipv6Net = POD_PREFIX.parse()?;
    let pods = PodPrefix::new(prefix).context("POD_PREFIX is a /96")?;
    let mut wanted = Vec::new();
    for (node, blocks) in lab.blocks()? {
        let Some(machine) = MACHINES.iter().find(|m| m.name == node) else {
            continue;
        };
        for block in blocks {
            let via = vec![machine.name];
            wanted.push(Wanted {
                line: "ToR: each node's blocks",
                prefix: block.v6(pods).to_string(),
                via: via.clone(),
            });
            if block.class() == SlotClass::Dual {
                wanted.push(Wanted {
                    line: "ToR: each node's blocks",
                    prefix: block.v4().to_string(),
                    via,
                });
            }
        }
    }
    let virtual_addresses = lab.load_balancers()?;
    for service in lab
        .services
        .iter()
        .filter(|s| s.service.spec.kind.as_deref() == Some("LoadBalancer"))
    {
        let via: Vec<&'static str> = lab
            .pods
            .iter()
            .filter(|pod| backs(service, pod))
            .map(|pod| pod.plan.node.name)
            .collect();
        let addresses = virtual_addresses
            .get(&service.object())
            .with_context(|| format!("{}: no address", service.object()))?;
        for address in addresses {
            let length = if address.is_ipv6() { 128 } else { 32 };
            wanted.push(Wanted {
                line: "ToR: virtual addresses",
                prefix: format!("{address}/{length}"),
                via: via.clone(),
            });
        }
    }
    for prefix in [PREF64, NAT64_POOL] {
        wanted.push(Wanted {
            line: "ToR: Pref64 and the IPv4 pool",
            prefix: prefix.to_owned(),
            via: vec!["gateway"],
        });
    }
    Ok(wanted)
}

fn compare(wanted: &[Wanted], routes: &[TorRoute]) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for want in wanted {
        let at = lines
            .iter()
            .position(|line| line.what == want.line)
            .unwrap_or_else(|| {
                lines.push(Line::new(want.line, ""));
                lines.len() - 1
            });
        let route = routes.iter().find(|route| route.prefix == want.prefix);
        lines[at].count(match route {
            None => Err(format!("{}: no route", want.prefix)),
            Some(route)
                if route.towards.is_empty()
                    || !route.towards.iter().all(|t| want.via.contains(&t.as_str())) =>
            {
                Err(format!("{}: via {}", want.prefix, route.towards.join(", ")))
            }
            Some(route) => Ok(format!("{} via {}", want.prefix, route.towards.join(", "))),
        });
    }
    lines
}

/// The application's own pods, for whoever wants to disturb one.
pub fn application_pods(lab: &Lab) -> impl Iterator<Item = &Pod> {
    lab.pods
        .iter()
        .filter(|pod| pod.plan.namespace != OWN_NAMESPACE && pod.plan.namespace != "kube-system")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_must_be_there_and_lead_to_the_right_machine() {
        let wanted = [Wanted {
            line: "l",
            prefix: "10.0.0.0/26".into(),
            via: vec!["node-a"],
        }];
        let route = |via: &str| TorRoute {
            prefix: "10.0.0.0/26".into(),
            towards: vec![via.into()],
        };
        assert!(compare(&wanted, &[route("node-a")])[0].holds());
        assert!(!compare(&wanted, &[route("node-b")])[0].holds());
        assert!(!compare(&wanted, &[])[0].holds());
    }

    #[test]
    fn addresses_are_embedded_as_rfc_6052_has_it() {
        assert_eq!(
            synthesized(Ipv4Addr::new(203, 0, 113, 80))
                .unwrap()
                .to_string(),
            "2001:db8:64:64::cb00:7150"
        );
    }
}
