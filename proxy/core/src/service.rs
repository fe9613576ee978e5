//! One Service and its EndpointSlices to what the dataplane has to do for them: frontends, and which endpoint each view sees.
//!
//! Follows kube-proxy's `CategorizeEndpoints` word for word where Kubernetes has a rule: ready endpoints, and only when there is
//! none of them the ones that terminate but still serve; endpoints of a slice are taken per port *name*; an address that stands in
//! two slices counts once. Refuses (plans nothing for) headless and ExternalName Services and those that carry
//! `service.kubernetes.io/service-proxy-name`.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use kun_cluster_core::{EndpointSlice, ObjectName, Protocol, Service, ServiceType, TrafficPolicy};
use kun_ebpf_abi::service::{Scope, ServiceKey, ViewKind, state};
use kun_ebpf_abi::{Addr, Port};

/// Endpoints of one service port in one family beyond this are left out: a view counts its slots in 16 bits, and half of that
/// leaves Maglev at least two slots an endpoint.
pub const MAX_TARGETS: usize = 32_000;

/// Labels that make kube-proxy, and us, look away.
const FOREIGN_PROXY: &str = "service.kubernetes.io/service-proxy-name";
/// Set on Services and slices without a cluster IP.
const HEADLESS: &str = "service.kubernetes.io/headless";

/// An address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }
}

/// An address as the maps hold it: IPv4 as ::ffff:a.b.c.d.
pub fn addr(address: IpAddr) -> Addr {
    match address {
        IpAddr::V4(a) => Addr::v4(a.octets()),
        IpAddr::V6(a) => Addr::v6(a.octets()),
    }
}

/// The address that the maps hold, for people.
pub fn ip(address: Addr) -> IpAddr {
    match address.as_v4() {
        Some(a) => IpAddr::from(a),
        None => IpAddr::from(address.octets()),
    }
}

/// What has one service id: a port of a Service in one family.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    /// The Service.
    pub service: ObjectName,
    /// Name of its port, empty for the only one.
    pub port: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Family.
    pub family: Family,
}

/// An address and port that clients use, and what they get there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frontend {
    /// Key in `services`.
    pub key: ServiceKey,
    /// Where it is reachable from.
    pub scope: Scope,
    /// What clients inside the cluster see.
    pub internal: ViewKind,
    /// What clients outside see.
    pub external: ViewKind,
    /// ClientIP affinity in seconds, 0: off.
    pub affinity_secs: u32,
}

/// Which views an endpoint is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub struct Members(u8);

/// The views that the planner fills. `NodePort` traffic has none of its own: it uses `Local` or `Cluster`.
pub const PLANNED_VIEWS: [ViewKind; 3] = [ViewKind::Cluster, ViewKind::Local, ViewKind::Zone];

impl Members {
    /// In no view.
    pub const NONE: Members = Members(0);

    /// With `view` added.
    pub fn with(self, view: ViewKind) -> Self {
        Members(self.0 | 1 << view as u32)
    }

    /// Whether the endpoint is in `view`.
    pub fn has(self, view: ViewKind) -> bool {
        self.0 & 1 << view as u32 != 0
    }
}

/// One endpoint of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Address.
    pub addr: Addr,
    /// Port on the endpoint.
    pub port: Port,
    /// The views that offer it to new flows.
    pub members: Members,
    /// On this node.
    pub local: bool,
}

impl Target {
    /// [`state::ACTIVE`] while a view offers it, else [`state::DRAINING`].
    pub fn state(&self) -> u8 {
        if self.members == Members::NONE {
            state::DRAINING
        } else {
            state::ACTIVE
        }
    }
}

/// A service port in one family, as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DesiredPort {
    /// Which.
    pub key: PortKey,
    /// Its frontends, in the order of the Service.
    pub frontends: Vec<Frontend>,
    /// Its endpoints, ascending by address and port, each once.
    pub targets: Vec<Target>,
    /// How many endpoints were left out because of [`MAX_TARGETS`].
    pub left_out: usize,
}

/// Where the planner runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Here {
    /// The node's name.
    pub node: Arc<str>,
    /// Its zone, where known.
    pub zone: Option<Arc<str>>,
}

/// Whether kun serves this Service at all; `Err` says why not, for `kunctl why`.
pub fn served(service: &Service) -> Result<(), &'static str> {
    if service.kind == ServiceType::ExternalName {
        return Err("type ExternalName: only DNS answers for it");
    }
    if service.meta.labels.contains_key(FOREIGN_PROXY) {
        return Err("label service.kubernetes.io/service-proxy-name gives it to another proxy");
    }
    if service.meta.labels.contains_key(HEADLESS) || service.cluster_ips.is_empty() {
        return Err("headless: clients connect to its endpoints");
    }
    Ok(())
}

/// Conditions of an endpoint, merged over slices.
#[derive(Clone, Copy)]
struct Conditions {
    ready: bool,
    serving: bool,
    terminating: bool,
    local: bool,
}

impl Conditions {
    /// Two slices may name one address for a moment: while it moves between slices, or when a new pod has it before the old
    /// pod's object is gone. The livelier entry is the truth.
    fn rank(self) -> (bool, bool, bool) {
        (self.ready, self.serving, !self.terminating)
    }
}

/// All ports of `service`, in both families: the same answer whatever the order of `slices`.
pub fn desired<'a>(
    service: &Service,
    slices: impl Iterator<Item = &'a EndpointSlice> + Clone,
    here: &Here,
) -> Vec<DesiredPort> {
    if served(service).is_err() {
        return Vec::new();
    }
    let mut ports = Vec::with_capacity(service.ports.len());
    // An API server refuses a Service that says one address, protocol and port twice; a manifest may: the first counts.
    let mut seen = BTreeSet::new();
    for port in &service.ports {
        for family in [Family::V4, Family::V6] {
            let frontend = |address: &IpAddr, scope| frontend(service, *address, port, scope);
            let mut frontends: Vec<Frontend> = service
                .cluster_ips
                .iter()
                .filter(|a| Family::of(**a) == family)
                .map(|a| frontend(a, Scope::Cluster))
                .chain(
                    service
                        .load_balancer_ips
                        .iter()
                        .filter(|a| Family::of(**a) == family)
                        .map(|a| frontend(a, Scope::External)),
                )
                .collect();
            frontends.retain(|f| seen.insert(f.key));
            if frontends.is_empty() {
                continue;
            }
            let endpoints = endpoints(service, port, family, slices.clone(), here);
            let mut targets = targets(&endpoints, port.protocol);
            let left_out = targets.len().saturating_sub(MAX_TARGETS);
            targets.truncate(MAX_TARGETS);
            ports.push(DesiredPort {
                key: PortKey {
                    service: service.meta.name.clone(),
                    port: port.name.clone(),
                    protocol: port.protocol,
                    family,
                },
                frontends,
                targets,
                left_out,
            });
        }
    }
    ports
}

fn frontend(
    service: &Service,
    address: IpAddr,
    port: &kun_cluster_core::ServicePort,
    scope: Scope,
) -> Frontend {
    let internal = match (scope, service.internal_policy) {
        (Scope::Cluster, TrafficPolicy::Local) => ViewKind::Local,
        // From inside, a LoadBalancer address is a short cut to the whole Service, whatever its policies.
        _ => ViewKind::Cluster,
    };
    Frontend {
        key: ServiceKey {
            addr: addr(address),
            port: Port::new(port.port),
            proto: port.protocol.number(),
            pad: 0,
        },
        scope,
        internal,
        // Only a node with a ready local endpoint announces the address, and a local backend answers by the way the
        // packet came; both policies therefore use the local endpoints, and the client's address survives.
        external: ViewKind::Local,
        affinity_secs: service.affinity_secs.unwrap_or(0),
    }
}

fn endpoints<'a>(
    service: &Service,
    port: &kun_cluster_core::ServicePort,
    family: Family,
    slices: impl Iterator<Item = &'a EndpointSlice>,
    here: &Here,
) -> Vec<(u128, u16, Conditions)> {
    let mut found = Vec::new();
    for slice in slices {
        let numbers = slice
            .ports
            .iter()
            .filter(|p| p.name == port.name && p.protocol == port.protocol);
        for number in numbers {
            let same_family = slice
                .endpoints
                .iter()
                .filter(|e| Family::of(e.address) == family);
            found.extend(same_family.map(|endpoint| {
                let conditions = Conditions {
                    ready: endpoint.ready || service.publish_not_ready,
                    serving: endpoint.serving,
                    terminating: endpoint.terminating,
                    local: endpoint.node.as_ref() == Some(&here.node),
                };
                let address = u128::from_be_bytes(addr(endpoint.address).octets());
                (address, number.port, conditions)
            }));
        }
    }
    // The livelier entry of an address first, so that it is the one that stays.
    found.sort_unstable_by_key(|(address, port, c)| (*address, *port, Reverse(c.rank())));
    found.dedup_by_key(|(address, port, _)| (*address, *port));
    found
}

fn targets(endpoints: &[(u128, u16, Conditions)], protocol: Protocol) -> Vec<Target> {
    let any = |f: &dyn Fn(&Conditions) -> bool| endpoints.iter().any(|(_, _, c)| f(c));
    let usable = |c: &Conditions, fallback: bool| {
        if fallback {
            c.serving && c.terminating
        } else {
            c.ready
        }
    };
    let cluster_fallback = !any(&|c| c.ready);
    let local_fallback = !any(&|c| c.ready && c.local);
    endpoints
        .iter()
        .filter_map(|&(address, port, ref c)| {
            let mut members = Members::NONE;
            if usable(c, cluster_fallback) {
                members = members.with(ViewKind::Cluster);
            }
            if c.local && usable(c, local_fallback) {
                members = members.with(ViewKind::Local);
            }
            // An endpoint that lost readiness keeps its TCP connections, as conntrack would; a UDP flow has no end and
            // moves on, unless the endpoint terminates and still serves.
            let listed = members != Members::NONE || c.serving || protocol == Protocol::Tcp;
            listed.then_some(Target {
                addr: Addr::v6(address.to_be_bytes()),
                port: Port::new(port),
                members,
                local: c.local,
            })
        })
        .collect()
}
