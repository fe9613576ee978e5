//! IPPool: where blocks of pod addresses and virtual addresses come from.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::ops::Deref;
use std::sync::Arc;

use ipnet::{Ipv4Net, Ipv6Net};
use kun_config::types::{Slot, SlotClass};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, Step, attach};
use super::condition::Condition;
use super::selector::LabelSelector;
use super::text::{Server, Text, Written};
use super::{Column, Custom, Spec};
use crate::Object;

/// A range that is cut into blocks of 64 slots: an IPv4 prefix of /26 or larger. Outside 240.0.0.0/4 its slots are *dual*, inside
/// they are *IPv6-only*, an identifier and no address (`SlotClass`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodRange(Ipv4Net);

impl PodRange {
    /// What its slots are.
    pub fn class(&self) -> SlotClass {
        Slot::from(self.0.network()).class()
    }
}

impl Deref for PodRange {
    type Target = Ipv4Net;
    fn deref(&self) -> &Ipv4Net {
        &self.0
    }
}

impl fmt::Display for PodRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Written for PodRange {
    const NAME: &'static str = "PodRange";
    const NOUN: &'static str = "a range for pods: an IPv4 prefix without host bits, of /26 or larger, outside 0.0.0.0/8, 127.0.0.0/8 and 224.0.0.0/4";
    const EXAMPLE: &'static str = "10.64.0.0/16";
    const LONGEST: usize = 18;
    // A prefix with addresses on both sides of 240.0.0.0 contains 224.0.0.0/4 as well.
    const SERVER: Server = Server::Cel(
        "isCIDR(self) && cidr(self).ip().family() == 4 && string(cidr(self).masked()) == self && cidr(self).prefixLength() <= 26 && ['0.0.0.0/8', '127.0.0.0/8', '224.0.0.0/4'].all(r, !cidr(r).containsCIDR(self) && !cidr(self).containsCIDR(r))",
    );

    fn read(text: &str) -> Option<Self> {
        let net = Ipv4Net::read(text).filter(|net| net.prefix_len() <= 26)?;
        let reserved = [([0, 0, 0, 0], 8), ([127, 0, 0, 0], 8), ([224, 0, 0, 0], 4)];
        let is_free = reserved.into_iter().all(|(address, len)| {
            let reserved = Ipv4Net::new(Ipv4Addr::from(address), len);
            reserved.is_ok_and(|r| !r.contains(&net) && !net.contains(&r))
        });
        is_free.then_some(PodRange(net))
    }

    fn meant(text: &str) -> Option<String> {
        let net: Ipv4Net = text.parse().ok()?;
        let block = Ipv4Net::new(net.addr(), net.prefix_len().min(26)).ok()?;
        let meant = block.trunc().to_string();
        Self::read(&meant).map(|range| range.to_string())
    }
}

/// Ranges of addresses for pods, for virtual addresses of services, or for both.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct IpPoolSpec {
    /// IPv4 ranges that are cut into blocks of 64 slots, each of /26 or larger. A pod's IPv6 address is the pod prefix followed by
    /// its slot. Slots outside 240.0.0.0/4 have an IPv4 address as well; ranges inside it are for IPv6-only pods.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub pods: Vec<Text<PodRange>>,
    /// Ranges of virtual addresses for services of type LoadBalancer.
    #[serde(default)]
    pub services: ServiceRanges,
    /// The nodes that get blocks out of `pods`. Absent: all nodes.
    pub node_selector: Option<LabelSelector>,
    /// The Services that get addresses out of `services`, by their labels. Absent: all Services.
    pub service_selector: Option<LabelSelector>,
    /// Whether a pod has an IPv4 address that does not say so itself, on the nodes that the pool selects. The annotation
    /// kun.network/ipv4 of the pod goes first, then that of its namespace, then the first pool by name that selects the node and says
    /// something here, then `ipam.defaultClass` of the node's kun.yaml. Pods that live keep what they have.
    pub ipv4_by_default: Option<bool>,
    /// The most blocks of each class that one node gets out of this pool. Absent: no limit of its own.
    #[schemars(range(min = 1, max = 1024))]
    pub max_blocks_per_node: Option<u32>,
    /// Gives out nothing more; what was given out stays. The first step of taking a pool away.
    #[serde(default)]
    pub closed: bool,
}

/// Ranges of virtual addresses by family.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct ServiceRanges {
    /// IPv4 ranges.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub v4: Vec<Text<Ipv4Net>>,
    /// IPv6 ranges.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "set"))]
    pub v6: Vec<Text<Ipv6Net>>,
}

impl Checked for IpPoolSpec {
    const NAME: &'static str = "IPPoolSpec";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "(has(self.pods) && size(self.pods) > 0) || (has(self.services) && ((has(self.services.v4) && size(self.services.v4) > 0) || (has(self.services.v6) && size(self.services.v6) > 0)))",
            holds: |s| !(s.pods.is_empty() && s.services.v4.is_empty() && s.services.v6.is_empty()),
            field: "",
            wrong: "a pool without a range",
            right: "write ranges in `pods`, `services.v4` or `services.v6`",
        },
        Rule {
            cel: "!has(self.pods) || self.pods.all(a, self.pods.all(b, a == b || !cidr(a).containsCIDR(b)))",
            holds: |s| {
                let inside = |a: &Text<PodRange>, b: &Text<PodRange>| a != b && a.contains(&***b);
                !s.pods.iter().any(|a| s.pods.iter().any(|b| inside(a, b)))
            },
            field: ".pods",
            wrong: "one range lies inside another",
            right: "keep the larger one",
        },
    ];
}

/// What became of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IpPoolStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Blocks in all of `pods`.
    #[schemars(range(min = 0))]
    pub blocks: Option<i64>,
    /// Blocks that nodes have.
    #[schemars(range(min = 0))]
    pub blocks_given: Option<i64>,
    /// Virtual addresses that Services have.
    #[schemars(range(min = 0))]
    pub addresses_given: Option<i64>,
    /// `Ready`: the pool is in use. `Exhausted`: something could not be given because it is empty.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// IPPool (`kun.network/v1alpha1`): where blocks and virtual addresses come from.
pub type IpPool = Custom<IpPoolSpec, IpPoolStatus>;

impl IpPool {
    /// Whether a node with these labels gets blocks from here.
    pub fn serves_node(&self, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        self.spec
            .node_selector
            .as_ref()
            .is_none_or(|s| s.matches(labels))
    }

    /// Whether a Service with these labels gets addresses from here.
    pub fn serves_service(&self, labels: &BTreeMap<Arc<str>, Arc<str>>) -> bool {
        self.spec
            .service_selector
            .as_ref()
            .is_none_or(|s| s.matches(labels))
    }
}

/// Whether pods that do not say so have an IPv4 address on a node with these labels: the word of the first pool that selects it and has
/// one. Pools by name, as the store has them.
pub fn ipv4_by_default<'a>(
    pools: impl IntoIterator<Item = &'a Arc<IpPool>>,
    labels: &BTreeMap<Arc<str>, Arc<str>>,
) -> Option<bool> {
    let serving = pools.into_iter().filter(|pool| pool.serves_node(labels));
    serving.filter_map(|pool| pool.spec.ipv4_by_default).next()
}

impl Spec for IpPoolSpec {
    type Status = IpPoolStatus;
    const KIND: &'static str = "IPPool";
    const PLURAL: &'static str = "ippools";
    const SHORT: &'static str = "kpool";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str =
        "Where blocks of pod addresses and virtual addresses of services come from.";
    const COLUMNS: &'static [Column] = &[
        Column::new(
            "Pods",
            "string",
            ".spec.pods",
            "Ranges that are cut into blocks",
        ),
        Column::new("Blocks", "integer", ".status.blocks", "Blocks in all"),
        Column::new(
            "Given",
            "integer",
            ".status.blocksGiven",
            "Blocks that nodes have",
        ),
        Column::new(
            "Addresses",
            "integer",
            ".status.addressesGiven",
            "Virtual addresses that Services have",
        ),
        Column::new(
            "Closed",
            "boolean",
            ".spec.closed",
            "Gives out nothing more",
        )
        .wide(),
        Column::new(
            "Exhausted",
            "string",
            ".status.conditions[?(@.type=='Exhausted')].status",
            "Whether something could not be given",
        ),
    ];
    const RULES: &'static [Rule<IpPool>] = &[];
    const STEPS: &'static [Step<IpPool>] = &[];

    fn object(object: Arc<IpPool>) -> Object {
        Object::IpPool(object)
    }

    fn of(object: &Object) -> Option<&Arc<IpPool>> {
        match object {
            Object::IpPool(object) => Some(object),
            _ => None,
        }
    }
}
