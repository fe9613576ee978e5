//! KunService: a service that says more than Kubernetes' own: weights, zones, backends outside the cluster with probes, a canary, and
//! when its addresses are announced.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, Step, attach, one_of, yes};
use super::condition::Condition;
use super::family::{Family, family, is_host};
use super::probe::Probe;
use super::text::{HostName, Label, LabelValue, Name, Text};
use super::{Column, Custom, Spec};
use crate::Object;

/// A service: its addresses and ports, and where their traffic goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct KunServiceSpec {
    /// Its virtual addresses, one of each family at most. Absent: given out of the IPPools.
    #[serde(default)]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub addresses: Vec<Text<IpAddr>>,
    /// The families that it has an address of.
    #[serde(default = "Family::both")]
    #[schemars(length(min = 1, max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub families: Vec<Family>,
    /// Its ports.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["port", "protocol"]))]
    pub ports: Vec<KunPort>,
    /// Where traffic goes, group by group.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub backends: Vec<Backend>,
    /// Whether traffic stays in the client's zone.
    #[serde(default)]
    pub zone: Zone,
    /// A group that gets a share of the connections, whatever its weight. Absent: none.
    pub canary: Option<Canary>,
    /// Connections of one client go to one endpoint. Absent: each by itself.
    pub session_affinity: Option<SessionAffinity>,
    /// Endpoints for traffic from outside.
    #[serde(default)]
    pub external_traffic_policy: Locality,
    /// Endpoints for traffic from pods and nodes.
    #[serde(default)]
    pub internal_traffic_policy: Locality,
    /// Sources that may use it. Absent: all.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub allowed_sources: Vec<Text<IpNet>>,
    /// When its addresses are announced by BGP.
    #[serde(default)]
    pub advertisement: Announce,
}

/// A port of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KunPort {
    /// Its name. With several ports, each has one; it names the port of the backends' Services.
    pub name: Option<Text<Label>>,
    /// The transport protocol.
    #[serde(default)]
    pub protocol: Transport,
    /// The port of the virtual address.
    #[schemars(range(min = 1))]
    pub port: u16,
    /// The port of static and external endpoints. Absent: the same. A Service's endpoints have their own.
    #[schemars(range(min = 1))]
    pub target_port: Option<u16>,
}

/// Transport protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum Transport {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A group of endpoints. One of `service`, `static` and `external`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(transform = attach::<Self>)]
pub struct Backend {
    /// Its name.
    pub name: Text<Label>,
    /// Its share of the connections, against the other groups' weights. 0: none.
    #[serde(default = "hundred")]
    #[schemars(range(max = 1000))]
    pub weight: u32,
    /// The endpoints of a Service in this namespace.
    pub service: Option<ServiceRef>,
    /// Endpoints inside the cluster's network, as they are written here.
    pub r#static: Option<StaticBackend>,
    /// Endpoints outside, to which the node's own address is shown.
    pub external: Option<ExternalBackend>,
    /// How endpoints are found to be alive. For `static` and `external`, of which nobody else tells.
    pub probe: Option<Probe>,
}

/// A Service of the same namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceRef {
    /// The Service's name.
    pub name: Text<Name>,
}

/// Endpoints inside the cluster's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StaticBackend {
    /// The endpoints.
    #[schemars(length(min = 1, max = 256), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["address"]))]
    pub endpoints: Vec<StaticEndpoint>,
}

/// An endpoint as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StaticEndpoint {
    /// Its address.
    pub address: Text<IpAddr>,
    /// Its share of the group's connections.
    #[serde(default = "hundred")]
    #[schemars(range(max = 1000))]
    pub weight: u32,
    /// The zone that it is in.
    pub zone: Option<Text<LabelValue>>,
    /// The name of the Node that it is on, for `Local`.
    pub node: Option<Text<Name>>,
}

/// Endpoints outside the cluster. One of `hostname` and `addresses`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(transform = attach::<Self>)]
pub struct ExternalBackend {
    /// The name that the addresses are found under, again and again.
    pub hostname: Option<Text<HostName>>,
    /// The addresses.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub addresses: Vec<Text<IpAddr>>,
    /// Shows the node's address to the endpoints, so that answers come back. Without it they must route pods.
    #[serde(default = "yes")]
    pub masquerade: bool,
}

/// Whether traffic stays in the client's zone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Zone {
    /// How strictly.
    #[serde(default)]
    pub policy: ZonePolicy,
    /// How much of its fair share an endpoint may get before traffic leaves its zone, in percent; 115 when absent.
    #[schemars(range(min = 100, max = 1000))]
    pub overload_percent: Option<u32>,
}

/// How strictly traffic stays in its zone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum ZonePolicy {
    /// Zones do not matter.
    #[default]
    Any,
    /// It stays as long as the zone has a ready endpoint.
    Strict,
    /// It stays as long as no endpoint is overloaded by it; the least possible share leaves.
    Balanced,
}

/// A group that is tried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Canary {
    /// The name of the group.
    pub backend: Text<Label>,
    /// Its share of new connections in percent.
    #[schemars(range(max = 100))]
    pub percent: u32,
    /// Clients whose connections all go there.
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub clients: Vec<Text<IpNet>>,
}

/// Connections of one client go to one endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SessionAffinity {
    /// Seconds without a connection after which the client is forgotten.
    #[serde(default = "three_hours")]
    #[schemars(range(min = 1, max = 86_400))]
    pub seconds: u32,
}

/// Which endpoints traffic may go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Locality {
    /// Those of the whole cluster.
    #[default]
    Cluster,
    /// Those of the node that the traffic is on.
    Local,
}

/// When addresses are announced.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Announce {
    /// When.
    #[serde(default)]
    pub policy: AnnouncePolicy,
    /// The names of the BGPAdvertisements that may announce it. Absent: every one that selects it.
    #[serde(default)]
    #[schemars(length(max = 8), extend("x-kubernetes-list-type" = "set"))]
    pub names: Vec<Text<Name>>,
}

/// When addresses are announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AnnouncePolicy {
    /// While an endpoint is ready.
    #[default]
    WhenReady,
    /// With or without endpoints.
    Always,
    /// Not at all: it is for the cluster's inside.
    Never,
}

fn hundred() -> u32 {
    100
}
fn three_hours() -> u32 {
    10_800
}

/// What became of a service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KunServiceStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Its virtual addresses.
    #[serde(default)]
    #[schemars(length(max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub addresses: Vec<Text<IpAddr>>,
    /// Endpoints that take traffic.
    #[schemars(range(min = 0))]
    pub ready_endpoints: Option<i64>,
    /// Endpoints in all.
    #[schemars(range(min = 0))]
    pub endpoints: Option<i64>,
    /// Endpoints of each group.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub backends: Vec<BackendStatus>,
    /// `Ready`: it has addresses and an endpoint. `Announced`: some peer knows an address. `Held`: the brake keeps endpoints that
    /// should go.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Endpoints of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BackendStatus {
    /// The group's name.
    pub name: Text<Label>,
    /// Endpoints that take traffic.
    pub ready: u32,
    /// Endpoints in all.
    pub total: u32,
}

impl Checked for Backend {
    const NAME: &'static str = "Backend";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "[has(self.service), has(self.static), has(self.external)].exists_one(x, x)",
            holds: |b| {
                one_of(&[
                    b.service.is_some(),
                    b.r#static.is_some(),
                    b.external.is_some(),
                ])
            },
            field: "",
            wrong: "not one kind of endpoints",
            right: "write one of `service`, `static` and `external`; another one is another group",
        },
        Rule {
            cel: "has(self.service) || has(self.probe)",
            holds: |b| b.service.is_some() || b.probe.is_some(),
            field: "",
            wrong: "without `probe` nobody tells whether these endpoints are alive",
            right: "write a probe, such as {tcp: {}}",
        },
    ];
}

impl Checked for ExternalBackend {
    const NAME: &'static str = "ExternalBackend";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "has(self.hostname) != (has(self.addresses) && size(self.addresses) > 0)",
        holds: |b| b.hostname.is_some() == b.addresses.is_empty(),
        field: "",
        wrong: "not one of `hostname` and `addresses`",
        right: "write one of them",
    }];
}

impl Checked for Zone {
    const NAME: &'static str = "Zone";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "!has(self.overloadPercent) || self.policy == 'Balanced'",
        holds: |z| z.overload_percent.is_none() || z.policy == ZonePolicy::Balanced,
        field: ".overloadPercent",
        wrong: "without `policy: Balanced` nothing counts an overload",
        right: "remove it, or write `policy: Balanced`",
    }];
}

impl Checked for KunServiceSpec {
    const NAME: &'static str = "KunServiceSpec";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "!has(self.addresses) || size(self.addresses) < 2 || ip(self.addresses[0]).family() != ip(self.addresses[1]).family()",
            holds: |s| match &s.addresses[..] {
                [a, b] => family(a) != family(b),
                _ => true,
            },
            field: ".addresses",
            wrong: "two addresses of one family",
            right: "write one of each family",
        },
        Rule {
            cel: "!has(self.addresses) || self.addresses.all(a, (ip(a).family() == 4 ? 'IPv4' : 'IPv6') in self.families)",
            holds: |s| s.addresses.iter().all(|a| s.families.contains(&family(a))),
            field: ".addresses",
            wrong: "an address of a family that is not among `families`",
            right: "add its family, or remove the address",
        },
        Rule {
            cel: "!has(self.addresses) || self.addresses.all(a, ip(a).isGlobalUnicast())",
            holds: |s| s.addresses.iter().all(|a| is_host(a.0) && !is_of_link(a.0)),
            field: ".addresses",
            wrong: "an address that no router leads to",
            right: "write unicast addresses that are neither loopback nor link-local",
        },
        Rule {
            cel: "size(self.ports) == 1 || self.ports.all(p, has(p.name) && self.ports.exists_one(q, has(q.name) && q.name == p.name))",
            holds: |s| {
                let named = |p: &KunPort| s.ports.iter().filter(|q| q.name == p.name).count() == 1;
                s.ports.len() == 1 || s.ports.iter().all(|p| p.name.is_some() && named(p))
            },
            field: ".ports",
            wrong: "several ports, and not each has a name of its own",
            right: "name every port",
        },
        Rule {
            cel: "self.backends.exists(b, b.weight > 0)",
            holds: |s| s.backends.iter().any(|b| b.weight > 0),
            field: ".backends",
            wrong: "every group has weight 0",
            right: "give one of them a weight",
        },
        Rule {
            cel: "self.backends.all(b, !has(b.static) || b.static.endpoints.all(e, (ip(e.address).family() == 4 ? 'IPv4' : 'IPv6') in self.families))",
            holds: |s| {
                let backends = s.backends.iter().filter_map(|b| b.r#static.as_ref());
                let mut endpoints = backends.flat_map(|b| &b.endpoints);
                endpoints.all(|e| s.families.contains(&family(&e.address)))
            },
            field: ".backends",
            wrong: "a static endpoint of a family that is not among `families`",
            right: "add its family, or remove the endpoint: no address of this service could lead to it",
        },
        Rule {
            cel: "!has(self.canary) || self.backends.exists(b, b.name == self.canary.backend)",
            holds: |s| {
                s.canary
                    .as_ref()
                    .is_none_or(|c| s.backends.iter().any(|b| b.name == c.backend))
            },
            field: ".canary.backend",
            wrong: "no group has this name",
            right: "write the name of one of `backends`",
        },
        Rule {
            cel: "!has(self.canary) || self.backends.exists(b, b.name != self.canary.backend && b.weight > 0)",
            holds: |s| {
                let rest = |c: &Canary| {
                    s.backends
                        .iter()
                        .any(|b| b.name != c.backend && b.weight > 0)
                };
                s.canary.as_ref().is_none_or(rest)
            },
            field: ".canary",
            wrong: "the rest of the connections has nowhere to go",
            right: "give another group a weight",
        },
    ];
}

/// Loopback and link-local addresses.
fn is_of_link(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => a.is_loopback() || a.is_link_local(),
        IpAddr::V6(a) => a.is_loopback() || a.is_unicast_link_local(),
    }
}

/// KunService (`kun.network/v1alpha1`): a service that says more than Kubernetes' own.
pub type KunService = Custom<KunServiceSpec, KunServiceStatus>;

impl Spec for KunServiceSpec {
    type Status = KunServiceStatus;
    const KIND: &'static str = "KunService";
    const PLURAL: &'static str = "kunservices";
    const SHORT: &'static str = "kuns";
    const NAMESPACED: bool = true;
    const ABOUT: &'static str = "A service with weights, zones, backends inside and outside the cluster with probes, a canary, and a say in its announcement.";
    const COLUMNS: &'static [Column] = &[
        Column::new(
            "Addresses",
            "string",
            ".status.addresses",
            "Virtual addresses",
        ),
        Column::new("Ports", "string", ".spec.ports[*].port", "Ports"),
        Column::new(
            "Ready",
            "integer",
            ".status.readyEndpoints",
            "Endpoints that take traffic",
        ),
        Column::new(
            "Endpoints",
            "integer",
            ".status.endpoints",
            "Endpoints in all",
        ),
        Column::new(
            "Zone",
            "string",
            ".spec.zone.policy",
            "Whether traffic stays in its zone",
        )
        .wide(),
        Column::new(
            "Canary%",
            "integer",
            ".spec.canary.percent",
            "Share of the canary",
        )
        .wide(),
        Column::new(
            "Announced",
            "string",
            ".status.conditions[?(@.type=='Announced')].status",
            "Whether some peer knows an address",
        ),
    ];
    const RULES: &'static [Rule<KunService>] = &[];
    const STEPS: &'static [Step<KunService>] = &[];

    fn object(object: Arc<KunService>) -> Object {
        Object::KunService(object)
    }

    fn of(object: &Object) -> Option<&Arc<KunService>> {
        match object {
            Object::KunService(object) => Some(object),
            _ => None,
        }
    }
}
