//! BGPRouteAffinity: where and to whom advertisements go.

use std::sync::Arc;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, Step, attach};
use super::condition::Condition;
use super::selector::LabelSelector;
use super::text::{LabelKey, Text};
use super::{Column, Custom, Spec};
use crate::Object;

/// Routes that all selectors select are announced by the nodes and to the peers that all selectors select. What no affinity selects
/// is announced nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct BgpRouteAffinitySpec {
    /// The BGPAdvertisements. Absent: all.
    pub advertisement_selector: Option<LabelSelector>,
    /// The Services, of routes that come from Services. Absent: all.
    pub service_selector: Option<LabelSelector>,
    /// The nodes. Absent: all.
    pub node_selector: Option<LabelSelector>,
    /// The BGPPeers. Absent: all.
    pub peer_selector: Option<LabelSelector>,
    /// The label of nodes whose values are places, such as racks: each place has gateways of its own.
    pub topology_key: Option<Text<LabelKey>>,
    /// Nodes of each place that should announce a route; 2 when absent. With fewer, a condition says so and nothing is withdrawn.
    #[schemars(range(min = 1, max = 64))]
    pub min_gateways: Option<u32>,
    /// Whether other nodes announce as well.
    #[serde(default)]
    pub mode: AffinityMode,
    /// How other nodes make their routes the worse ones, under `Preferred`. Prepend when absent.
    pub elsewhere: Option<Elsewhere>,
    /// Of affinities that select one route the highest counts; of equal ones the first by name.
    #[serde(default)]
    #[schemars(range(min = -1000, max = 1000))]
    pub priority: i32,
    /// Nodes that announce one route at most: what the routers' ECMP groups hold. Absent: no limit.
    #[schemars(range(min = 1, max = 512))]
    pub max_paths: Option<u32>,
}

/// Whether nodes announce that the affinity does not select.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum AffinityMode {
    /// They do not.
    #[default]
    Required,
    /// They do, with worse routes.
    Preferred,
}

/// How a route is made the worse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Elsewhere {
    /// The own AS three times more.
    Prepend,
    /// The community GRACEFUL_SHUTDOWN (RFC 8326).
    GracefulShutdown,
}

/// What became of an affinity.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BgpRouteAffinityStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Routes that it places.
    #[schemars(range(min = 0))]
    pub routes: Option<i64>,
    /// Nodes that it selects.
    #[schemars(range(min = 0))]
    pub nodes: Option<i64>,
    /// Peers that it selects.
    #[schemars(range(min = 0))]
    pub peers: Option<i64>,
    /// `Ready`: it places routes. `TooFewGateways`: some place has fewer nodes than `minGateways`.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

impl Checked for BgpRouteAffinitySpec {
    const NAME: &'static str = "BGPRouteAffinitySpec";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "!has(self.minGateways) || has(self.topologyKey)",
            holds: |s| s.min_gateways.is_none() || s.topology_key.is_some(),
            field: ".minGateways",
            wrong: "without `topologyKey`",
            right: "write the label whose values are the places, such as topology.kubernetes.io/zone",
        },
        Rule {
            cel: "!has(self.elsewhere) || self.mode == 'Preferred'",
            holds: |s| s.elsewhere.is_none() || s.mode == AffinityMode::Preferred,
            field: ".elsewhere",
            wrong: "with `mode: Required` no other node announces",
            right: "remove it, or write `mode: Preferred`",
        },
        Rule {
            cel: "!has(self.minGateways) || !has(self.maxPaths) || self.minGateways <= self.maxPaths",
            holds: |s| {
                s.min_gateways
                    .zip(s.max_paths)
                    .is_none_or(|(min, max)| min <= max)
            },
            field: ".minGateways",
            wrong: "more than `maxPaths`",
            right: "write `maxPaths` at most",
        },
    ];
}

/// BGPRouteAffinity (`kun.network/v1alpha1`): where and to whom advertisements go.
pub type BgpRouteAffinity = Custom<BgpRouteAffinitySpec, BgpRouteAffinityStatus>;

impl Spec for BgpRouteAffinitySpec {
    type Status = BgpRouteAffinityStatus;
    const KIND: &'static str = "BGPRouteAffinity";
    const PLURAL: &'static str = "bgprouteaffinities";
    const SHORT: &'static str = "kaff";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str = "Which nodes announce which routes to which peers.";
    const COLUMNS: &'static [Column] = &[
        Column::new(
            "Mode",
            "string",
            ".spec.mode",
            "Whether other nodes announce as well",
        ),
        Column::new(
            "Priority",
            "integer",
            ".spec.priority",
            "The highest counts",
        ),
        Column::new(
            "Topology",
            "string",
            ".spec.topologyKey",
            "Label whose values are places",
        ),
        Column::new(
            "Routes",
            "integer",
            ".status.routes",
            "Routes that it places",
        ),
        Column::new("Nodes", "integer", ".status.nodes", "Nodes that it selects").wide(),
        Column::new("Peers", "integer", ".status.peers", "Peers that it selects").wide(),
        Column::new(
            "Ready",
            "string",
            ".status.conditions[?(@.type=='Ready')].status",
            "Whether it places routes",
        ),
    ];
    const RULES: &'static [Rule<BgpRouteAffinity>] = &[];
    const STEPS: &'static [Step<BgpRouteAffinity>] = &[];

    fn object(object: Arc<BgpRouteAffinity>) -> Object {
        Object::BgpRouteAffinity(object)
    }

    fn of(object: &Object) -> Option<&Arc<BgpRouteAffinity>> {
        match object {
            Object::BgpRouteAffinity(object) => Some(object),
            _ => None,
        }
    }
}
