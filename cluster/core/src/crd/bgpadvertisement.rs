//! BGPAdvertisement: what is announced, with which attributes, and when. Governing: RFC 1997, 3056, 4271, 8092.

use std::sync::Arc;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bgp::{Community, LargeCommunity};
use super::check::{Checked, Rule, Step, attach, one_of, yes};
use super::condition::Condition;
use super::probe::Probe;
use super::selector::LabelSelector;
use super::text::{Name, Text};
use super::{Column, Custom, Spec};
use crate::Object;

/// What is announced. Where and to whom say the BGPRouteAffinity objects that select it; without one it is announced nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct BgpAdvertisementSpec {
    /// Where the routes come from.
    #[schemars(length(min = 1, max = 16), extend("x-kubernetes-list-type" = "atomic"))]
    pub sources: Vec<RouteSource>,
    /// One route for all that lie under it. Absent: each route by itself.
    pub aggregate: Option<Aggregate>,
    /// Path attributes. Of two advertisements with one route, the communities are joined, the highest `localPref` and the lowest
    /// `med` win.
    #[serde(default)]
    pub attributes: Attributes,
    /// When it is announced.
    #[serde(default)]
    pub when: When,
    /// How much may be withdrawn at once.
    #[serde(default)]
    pub guard: Guard,
}

/// Where routes come from: one of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct RouteSource {
    /// Virtual addresses of Services.
    #[serde(rename = "serviceVIP")]
    pub service_vip: Option<ServiceVip>,
    /// Blocks of pod addresses that the node owns.
    pub pod_block: Option<PodBlock>,
    /// The Pref64 and the IPv4 pool of NAT64 gateways.
    pub nat64_prefix: Option<Nat64Prefix>,
    /// Prefixes that the domains of an egress group resolve to.
    pub egress: Option<Egress>,
    /// 2002::/16 prefixes of Services' public IPv4 addresses (RFC 3056).
    pub six_to_four: Option<SixToFour>,
    /// Prefixes as they are written here.
    pub r#static: Option<StaticRoutes>,
}

/// Virtual addresses of Services.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ServiceVip {
    /// The kinds of addresses.
    #[serde(default = "load_balancer")]
    #[schemars(length(min = 1, max = 3), extend("x-kubernetes-list-type" = "set"))]
    pub addresses: Vec<VipKind>,
    /// The Services, and KunServices, by their labels. Absent: all.
    pub selector: Option<LabelSelector>,
}

/// Kinds of a Service's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VipKind {
    /// status.loadBalancer.ingress.
    LoadBalancer,
    /// spec.externalIPs.
    External,
    /// spec.clusterIPs.
    Cluster,
}

/// Blocks of pod addresses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodBlock {
    /// The IPPools that the blocks are of, by their labels. Absent: all.
    pub pool_selector: Option<LabelSelector>,
}

/// The routes of NAT64 gateways.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Nat64Prefix {
    /// The name of the gateway group. Absent: the one of the node's configuration.
    pub r#ref: Option<Text<Name>>,
}

/// The routes of an egress group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Egress {
    /// The name of the egress group. Absent: all groups.
    pub r#ref: Option<Text<Name>>,
}

/// 6to4 prefixes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SixToFour {
    /// The Services by their labels. Absent: all with a public IPv4 address.
    pub service_selector: Option<LabelSelector>,
    /// Takes private IPv4 addresses as well, which mean nothing outside one's own fabric: `no-export` must be among the
    /// communities.
    #[serde(default)]
    pub allow_private: bool,
}

/// Prefixes as they are written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StaticRoutes {
    /// The prefixes.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub cidrs: Vec<Text<IpNet>>,
}

/// One route for all that lie under it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Aggregate {
    /// The length of IPv4 aggregates. Absent: IPv4 routes stay as they are.
    #[schemars(range(min = 8, max = 31))]
    pub v4: Option<u8>,
    /// The length of IPv6 aggregates. Absent: IPv6 routes stay as they are.
    #[schemars(range(min = 16, max = 127))]
    pub v6: Option<u8>,
    /// Packets to addresses under it that nobody has are dropped here. It must be said, since without it they would loop between
    /// node and router.
    pub blackhole_unassigned: bool,
}

/// Path attributes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Attributes {
    /// Communities (RFC 1997).
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub communities: Vec<Text<Community>>,
    /// Large communities (RFC 8092).
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub large_communities: Vec<Text<LargeCommunity>>,
    /// MULTI_EXIT_DISC: lower is preferred.
    pub med: Option<u32>,
    /// LOCAL_PREF, higher is preferred; told to internal peers only.
    pub local_pref: Option<u32>,
    /// How often the own AS is written once more.
    #[serde(default)]
    #[schemars(range(max = 10))]
    pub prepend: u32,
}

/// When a route is announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct When {
    /// Whether externalTrafficPolicy counts.
    #[serde(default)]
    pub traffic_policy: Honour,
    /// Ready endpoints that a Service must have: on the node under `Local`, in the cluster else.
    #[serde(default = "one")]
    #[schemars(range(max = 1000))]
    pub min_ready: u32,
    /// A probe that must succeed besides.
    pub probe: Option<Probe>,
    /// What becomes of a route whose Service has too few endpoints.
    #[serde(default)]
    pub on_no_endpoints: OnNoEndpoints,
    /// Waits until the node's datapath serves.
    #[serde(default = "yes")]
    pub require_datapath_ready: bool,
}

impl Default for When {
    fn default() -> Self {
        Self {
            traffic_policy: Honour::default(),
            min_ready: one(),
            probe: None,
            on_no_endpoints: OnNoEndpoints::default(),
            require_datapath_ready: true,
        }
    }
}

/// Whether a Service's externalTrafficPolicy counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Honour {
    /// A Service with `Local` is announced by nodes with an endpoint of its own only.
    #[default]
    Honour,
    /// Every node announces it.
    Ignore,
}

/// What becomes of a route without endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum OnNoEndpoints {
    /// It goes.
    #[default]
    Withdraw,
    /// It stays; packets are answered with a refusal.
    Keep,
}

/// How much may be withdrawn at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Guard {
    /// Percent of the live routes that may go within the window; the rest is held.
    #[serde(default = "twenty")]
    #[schemars(range(min = 1, max = 100))]
    pub max_withdraw_percent: u32,
    /// The window in seconds.
    #[serde(default = "thirty")]
    #[schemars(range(min = 1, max = 3600))]
    pub window_seconds: u32,
}

impl Default for Guard {
    fn default() -> Self {
        Self {
            max_withdraw_percent: twenty(),
            window_seconds: thirty(),
        }
    }
}

fn load_balancer() -> Vec<VipKind> {
    vec![VipKind::LoadBalancer]
}
fn one() -> u32 {
    1
}
fn twenty() -> u32 {
    20
}
fn thirty() -> u32 {
    30
}

/// What became of an advertisement.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BgpAdvertisementStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Routes that it makes.
    #[schemars(range(min = 0))]
    pub routes: Option<i64>,
    /// Nodes that announce some of them.
    #[schemars(range(min = 0))]
    pub nodes: Option<i64>,
    /// Withdrawals that the guard holds back.
    #[schemars(range(min = 0))]
    pub held: Option<i64>,
    /// `Ready`: routes are with peers. `Unplaced`: no BGPRouteAffinity selects it. `Held`: the guard holds withdrawals back.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl Checked for RouteSource {
    const NAME: &'static str = "RouteSource";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "[has(self.serviceVIP), has(self.podBlock), has(self.nat64Prefix), has(self.egress), has(self.sixToFour), has(self.static)].exists_one(x, x)",
        holds: |s| {
            one_of(&[
                s.service_vip.is_some(),
                s.pod_block.is_some(),
                s.nat64_prefix.is_some(),
                s.egress.is_some(),
                s.six_to_four.is_some(),
                s.r#static.is_some(),
            ])
        },
        field: "",
        wrong: "not one kind of source",
        right: "write one of `serviceVIP`, `podBlock`, `nat64Prefix`, `egress`, `sixToFour` and `static`; another one is another entry",
    }];
}

impl Checked for Aggregate {
    const NAME: &'static str = "Aggregate";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "has(self.v4) || has(self.v6)",
            holds: |a| a.v4.is_some() || a.v6.is_some(),
            field: "",
            wrong: "neither `v4` nor `v6`",
            right: "write the length of one of them",
        },
        Rule {
            cel: "self.blackholeUnassigned",
            holds: |a| a.blackhole_unassigned,
            field: ".blackholeUnassigned",
            wrong: "packets to addresses that nobody has would loop between node and router",
            right: "write true",
        },
    ];
}

impl Checked for BgpAdvertisementSpec {
    const NAME: &'static str = "BGPAdvertisementSpec";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "!has(self.aggregate) || self.when.trafficPolicy == 'Ignore' || !self.sources.exists(s, has(s.serviceVIP))",
            holds: |s| {
                s.aggregate.is_none()
                    || s.when.traffic_policy == Honour::Ignore
                    || s.sources.iter().all(|source| source.service_vip.is_none())
            },
            field: ".aggregate",
            wrong: "an aggregate of services would bring packets to nodes without an endpoint of a `Local` one",
            right: "write `when.trafficPolicy: Ignore`, or remove `aggregate`",
        },
        Rule {
            cel: "!self.sources.exists(s, has(s.sixToFour) && s.sixToFour.allowPrivate) || (has(self.attributes) && has(self.attributes.communities) && 'no-export' in self.attributes.communities)",
            holds: |s| {
                let private = |source: &RouteSource| {
                    source.six_to_four.as_ref().is_some_and(|f| f.allow_private)
                };
                !s.sources.iter().any(private)
                    || s.attributes
                        .communities
                        .contains(&Text(Community::NO_EXPORT))
            },
            field: ".attributes",
            wrong: "6to4 prefixes of private addresses would leave the fabric",
            right: "write no-export among `attributes.communities`",
        },
    ];
}

/// BGPAdvertisement (`kun.network/v1alpha1`): what is announced.
pub type BgpAdvertisement = Custom<BgpAdvertisementSpec, BgpAdvertisementStatus>;

impl Spec for BgpAdvertisementSpec {
    type Status = BgpAdvertisementStatus;
    const KIND: &'static str = "BGPAdvertisement";
    const PLURAL: &'static str = "bgpadvertisements";
    const SHORT: &'static str = "kadv";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str = "What is announced by BGP, with which attributes, and when.";
    const COLUMNS: &'static [Column] = &[
        Column::new(
            "Routes",
            "integer",
            ".status.routes",
            "Routes that it makes",
        ),
        Column::new(
            "Nodes",
            "integer",
            ".status.nodes",
            "Nodes that announce some of them",
        ),
        Column::new(
            "Held",
            "integer",
            ".status.held",
            "Withdrawals that the guard holds back",
        ),
        Column::new(
            "Communities",
            "string",
            ".spec.attributes.communities",
            "Communities",
        )
        .wide(),
        Column::new(
            "Guard%",
            "integer",
            ".spec.guard.maxWithdrawPercent",
            "Percent of the routes that may go within the window",
        )
        .wide(),
        Column::new(
            "Ready",
            "string",
            ".status.conditions[?(@.type=='Ready')].status",
            "Whether routes are with peers",
        ),
    ];
    const RULES: &'static [Rule<BgpAdvertisement>] = &[];
    const STEPS: &'static [Step<BgpAdvertisement>] = &[];

    fn object(object: Arc<BgpAdvertisement>) -> Object {
        Object::BgpAdvertisement(object)
    }

    fn of(object: &Object) -> Option<&Arc<BgpAdvertisement>> {
        match object {
            Object::BgpAdvertisement(object) => Some(object),
            _ => None,
        }
    }
}
