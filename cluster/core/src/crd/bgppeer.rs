//! BGPPeer: a router that nodes speak BGP with. Governing: RFC 4271, 4724, 5082, 5880, 8212, 8326, 8950, 9234, 9494.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::bgp::{Asn, Community, SecretKey};
use super::check::{Checked, Rule, Step, attach, yes};
use super::condition::Condition;
use super::family::{Family, is_host};
use super::selector::LabelSelector;
use super::text::{InterfaceName, LabelKey, Name, Text};
use super::{Column, Custom, Spec};
use crate::Object;

/// One router, or the routers that each node finds for itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct BgpPeerSpec {
    /// The nodes that speak with it. Absent: none. Empty: all.
    pub node_selector: Option<LabelSelector>,
    /// The peer's address. A link-local one needs `interface` as well, since every link has fe80::/10.
    pub address: Option<Text<IpAddr>>,
    /// The interface that leads to the peer. Without `address`, the peer is the router that announces itself there (unnumbered).
    pub interface: Option<Text<InterfaceName>>,
    /// How each node finds its routers, where there is neither `address` nor `interface`.
    pub discovery: Option<Discovery>,
    /// The peer's AS number. This or `dynamicASN`.
    #[serde(rename = "peerASN")]
    pub peer_asn: Option<Asn>,
    /// Any AS number of this kind, as the peer tells it.
    #[serde(rename = "dynamicASN")]
    pub dynamic_asn: Option<DynamicAsn>,
    /// The AS number that this peer sees instead of the node's (replace-as). With external peers only.
    #[serde(rename = "localASN")]
    pub local_asn: Option<Asn>,
    /// The peer's TCP port.
    #[serde(default = "bgp_port")]
    #[schemars(range(min = 1))]
    pub port: u16,
    /// The address that the session starts from; of the family of `address`.
    pub source_address: Option<Text<IpAddr>>,
    /// The families of routes.
    #[serde(default = "Family::both")]
    #[schemars(length(min = 1, max = 2), extend("x-kubernetes-list-type" = "set"))]
    pub families: Vec<Family>,
    /// The next hop of what is announced.
    #[serde(default)]
    pub next_hop: NextHop,
    /// How the session is authenticated. With the secret missing, it stays down.
    #[serde(default)]
    pub auth: Auth,
    /// Timers of the session.
    #[serde(default)]
    pub timers: Timers,
    /// Finds a dead peer in a fraction of a second (BFD). Absent: the hold time has to find it.
    pub bfd: Option<Bfd>,
    /// What the peer keeps while the agent restarts. Absent: nothing.
    pub graceful_restart: Option<GracefulRestart>,
    /// How far away the peer may be. Absent: one hop.
    #[serde(default)]
    pub ttl: Ttl,
    /// How often the own AS may stand in the path of what the peer announces.
    #[serde(default, rename = "allowOwnAS")]
    #[schemars(range(max = 10))]
    pub allow_own_as: u32,
    /// What this network is to the peer (RFC 9234). With external peers only.
    pub role: Option<Role>,
    /// What is taken from the peer. Absent: nothing (RFC 8212).
    #[serde(default)]
    pub import: Import,
    /// What the peer is told.
    #[serde(default)]
    pub export: Export,
    /// How a node leaves.
    #[serde(default)]
    pub drain: Drain,
}

/// How a node finds its routers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Discovery {
    /// Where it looks.
    pub by: DiscoveryBy,
    /// The family of the routers' addresses.
    pub family: Family,
    /// The most routers that it speaks with.
    #[serde(default = "two")]
    #[schemars(range(min = 1, max = 8))]
    pub max: u32,
}

/// Where routers are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DiscoveryBy {
    /// The next hops of the node's default route.
    DefaultGateway,
    /// The routers that send router advertisements.
    RouterAdvertisement,
}

/// Kinds of AS numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DynamicAsn {
    /// Any but the node's own.
    External,
    /// The node's own.
    Internal,
}

/// Next hops by family. Absent: the node's own address of that family.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct NextHop {
    /// The next hop of IPv4 routes. An IPv6 one needs a peer that takes it (RFC 8950).
    pub v4: Option<Text<IpAddr>>,
    /// The next hop of IPv6 routes.
    pub v6: Option<Text<Ipv6Addr>>,
}

/// How a session is authenticated. One of the two, or none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Auth {
    /// The key of TCP MD5 signatures (RFC 2385).
    pub md5_secret_ref: Option<SecretKey>,
    /// The keychain of TCP-AO (RFC 5925): a Secret that rolls over without a reset.
    pub ao_keychain_ref: Option<Keychain>,
}

/// A Secret that holds a keychain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Keychain {
    /// The name of the Secret.
    pub name: Text<Name>,
}

/// Timers of a session, in seconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Timers {
    /// Silence after which the peer is dead.
    #[serde(default = "hold")]
    #[schemars(range(min = 3))]
    pub hold_seconds: u16,
    /// Time between two keepalives, a third of the hold time at most. Absent: a third.
    #[schemars(range(min = 1, max = 21_845))]
    pub keepalive_seconds: Option<u16>,
    /// Time between two attempts to connect.
    #[serde(default = "retry")]
    #[schemars(range(min = 1, max = 300))]
    pub connect_retry_seconds: u16,
}

impl Default for Timers {
    fn default() -> Self {
        Self {
            hold_seconds: hold(),
            keepalive_seconds: None,
            connect_retry_seconds: retry(),
        }
    }
}

/// Bidirectional forwarding detection (RFC 5880).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Bfd {
    /// Milliseconds between two packets. Below 50, a busy node may be taken for a dead one.
    #[serde(default = "hundred")]
    #[schemars(range(min = 10, max = 60_000))]
    pub interval_milliseconds: u32,
    /// Lost packets after which the peer is dead.
    #[serde(default = "three")]
    #[schemars(range(min = 2, max = 255))]
    pub multiplier: u32,
    /// Over more than one hop (RFC 5883).
    #[serde(default)]
    pub multihop: bool,
}

/// Graceful restart (RFC 4724) and its long-lived form (RFC 9494).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GracefulRestart {
    /// How long the peer keeps the routes.
    #[serde(default = "hundred_twenty")]
    #[schemars(range(max = 4095))]
    pub seconds: u32,
    /// How long it keeps them afterwards as a last resort.
    #[schemars(range(max = 16_777_215))]
    pub long_lived_seconds: Option<u32>,
}

/// How far away the peer may be. One of the two, or none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Ttl {
    /// The time to live of what is sent, for a peer over several hops.
    #[schemars(range(min = 1, max = 255))]
    pub multihop: Option<u32>,
    /// The hops that a packet of the peer may have made (GTSM, RFC 5082). Both ends must have it.
    #[schemars(range(min = 1, max = 254))]
    pub gtsm_hops: Option<u32>,
}

/// What a network is to its peer (RFC 9234 §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Role {
    /// Transit provider.
    Provider,
    /// Route server.
    RouteServer,
    /// Client of a route server.
    RouteServerClient,
    /// Customer.
    Customer,
    /// Equal.
    Peer,
}

/// What is taken from a peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Import {
    /// The prefixes that are taken. None: nothing.
    #[serde(default)]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "atomic"))]
    pub prefixes: Vec<ImportPrefix>,
    /// The most routes that the peer may announce; one more ends the session.
    #[serde(default = "hundred")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_prefixes: u32,
}

impl Default for Import {
    fn default() -> Self {
        Self {
            prefixes: Vec::new(),
            max_prefixes: hundred(),
        }
    }
}

/// A prefix and the lengths of what is taken below it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(transform = attach::<Self>)]
pub struct ImportPrefix {
    /// The prefix.
    pub cidr: Text<IpNet>,
    /// The shortest length. Absent: that of the prefix.
    #[schemars(range(max = 128))]
    pub ge: Option<u8>,
    /// The longest length. Absent: `ge`, or that of the prefix.
    #[schemars(range(max = 128))]
    pub le: Option<u8>,
}

/// What a peer is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Export {
    /// The most routes that the peer is told; more are refused and alarmed, and those that it has stay.
    #[serde(default = "twenty_thousand")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_prefixes: u32,
    /// Communities on every route to this peer.
    #[serde(default)]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "set"))]
    pub communities_add: Vec<Text<Community>>,
}

impl Default for Export {
    fn default() -> Self {
        Self {
            max_prefixes: twenty_thousand(),
            communities_add: Vec::new(),
        }
    }
}

/// How a node leaves: it asks for other ways, waits, then withdraws.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(transform = attach::<Self>)]
pub struct Drain {
    /// Marks the routes with GRACEFUL_SHUTDOWN (RFC 8326) first.
    #[serde(default = "yes")]
    pub gshut: bool,
    /// The seconds between the mark and the withdrawal.
    #[serde(default = "ten")]
    #[schemars(range(max = 3600))]
    pub wait_seconds: u32,
    /// Keys of taints that drain a node besides its shutdown. Never node.kubernetes.io/unschedulable: a cordoned node still serves.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "set"))]
    pub on_taints: Vec<Text<LabelKey>>,
}

impl Default for Drain {
    fn default() -> Self {
        Self {
            gshut: true,
            wait_seconds: ten(),
            on_taints: Vec::new(),
        }
    }
}

/// What became of a peer, over all nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BgpPeerStatus {
    /// The metadata.generation that this is about.
    #[schemars(range(min = 0))]
    pub observed_generation: Option<i64>,
    /// Sessions that there should be.
    #[schemars(range(min = 0))]
    pub sessions: Option<i64>,
    /// Sessions that are established.
    #[schemars(range(min = 0))]
    pub established: Option<i64>,
    /// `Ready`: every session is established. `SecretMissing`: sessions wait for their key. `Unprotected`: graceful restart
    /// without BFD keeps routes to a dead node.
    #[serde(default)]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// Who the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerTarget<'a> {
    /// At an address; a link-local one at an interface.
    Address(IpAddr, Option<&'a str>),
    /// The router that announces itself at an interface.
    Unnumbered(&'a str),
    /// The routers that the node finds.
    Discovered(&'a Discovery),
}

/// Which AS the peer may be of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAs {
    /// This one.
    Is(Asn),
    /// Any of a kind.
    Any(DynamicAsn),
}

impl BgpPeerSpec {
    /// Who the peer is. `None` for a spec that was never checked.
    pub fn target(&self) -> Option<PeerTarget<'_>> {
        let interface = self.interface.as_ref().map(|i| i.as_str());
        match (&self.address, interface, &self.discovery) {
            (Some(address), interface, None) => Some(PeerTarget::Address(address.0, interface)),
            (None, Some(interface), None) => Some(PeerTarget::Unnumbered(interface)),
            (None, None, Some(discovery)) => Some(PeerTarget::Discovered(discovery)),
            _ => None,
        }
    }

    /// Which AS the peer may be of. `None` for a spec that was never checked.
    pub fn peer_as(&self) -> Option<PeerAs> {
        match (self.peer_asn, self.dynamic_asn) {
            (Some(asn), None) => Some(PeerAs::Is(asn)),
            (None, Some(any)) => Some(PeerAs::Any(any)),
            _ => None,
        }
    }

    fn is_internal(&self) -> bool {
        self.dynamic_asn == Some(DynamicAsn::Internal)
    }
}

/// A link-local IPv6 address, which means nothing without its link.
fn needs_link(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(a) if a.is_unicast_link_local())
}

impl Checked for BgpPeerSpec {
    const NAME: &'static str = "BGPPeerSpec";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "has(self.discovery) != (has(self.address) || has(self.interface))",
            holds: |s| s.discovery.is_some() != (s.address.is_some() || s.interface.is_some()),
            field: "",
            wrong: "it is not said who the peer is, or in two ways",
            right: "write `address` (with `interface` when it is link-local), `interface` alone, or `discovery`",
        },
        Rule {
            cel: "!has(self.address) || ip(self.address).isGlobalUnicast() || ip(self.address).isLinkLocalUnicast() || ip(self.address).isLoopback()",
            holds: |s| s.address.as_ref().is_none_or(|a| is_host(a.0)),
            field: ".address",
            wrong: "no host's address",
            right: "write the peer's own address",
        },
        Rule {
            cel: "!has(self.address) || has(self.interface) == (ip(self.address).family() == 6 && ip(self.address).isLinkLocalUnicast())",
            holds: |s| {
                s.address
                    .as_ref()
                    .is_none_or(|a| s.interface.is_some() == needs_link(a.0))
            },
            field: ".interface",
            wrong: "`interface` and `address` do not fit",
            right: "write the interface that leads to a link-local address, and none with another address",
        },
        Rule {
            cel: "has(self.peerASN) != has(self.dynamicASN)",
            holds: |s| s.peer_asn.is_some() != s.dynamic_asn.is_some(),
            field: "",
            wrong: "not one of `peerASN` and `dynamicASN`",
            right: "write the peer's AS number as `peerASN`, or `dynamicASN: External` or `Internal`",
        },
        Rule {
            cel: "!has(self.localASN) || !((has(self.peerASN) && self.peerASN == self.localASN) || (has(self.dynamicASN) && self.dynamicASN == 'Internal'))",
            holds: |s| s.local_asn.is_none() || !(s.local_asn == s.peer_asn || s.is_internal()),
            field: ".localASN",
            wrong: "with an internal peer",
            right: "remove it, or write another AS number than the peer's",
        },
        Rule {
            cel: "!has(self.role) || !(has(self.dynamicASN) && self.dynamicASN == 'Internal')",
            holds: |s| s.role.is_none() || !s.is_internal(),
            field: ".role",
            wrong: "with an internal peer",
            right: "remove it: roles are between networks (RFC 9234)",
        },
        Rule {
            cel: "!has(self.sourceAddress) || (has(self.address) && ip(self.sourceAddress).family() == ip(self.address).family())",
            holds: |s| {
                let family = |a: &Text<IpAddr>| a.is_ipv4();
                let source = s.source_address.as_ref().map(family);
                source.is_none() || source == s.address.as_ref().map(family)
            },
            field: ".sourceAddress",
            wrong: "not of the family of `address`",
            right: "write an address of the family of `address`, or remove it",
        },
        Rule {
            cel: "!has(self.bfd) || !self.bfd.multihop || (has(self.ttl) && has(self.ttl.multihop))",
            holds: |s| !s.bfd.as_ref().is_some_and(|b| b.multihop) || s.ttl.multihop.is_some(),
            field: ".bfd.multihop",
            wrong: "without `ttl.multihop`",
            right: "write `ttl.multihop`: the session has to reach as far",
        },
    ];
}

impl Checked for Auth {
    const NAME: &'static str = "Auth";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "!(has(self.md5SecretRef) && has(self.aoKeychainRef))",
        holds: |a| a.md5_secret_ref.is_none() || a.ao_keychain_ref.is_none(),
        field: "",
        wrong: "both `md5SecretRef` and `aoKeychainRef`",
        right: "keep one of them: a connection has one kind of signature (RFC 5925 §2)",
    }];
}

impl Checked for Timers {
    const NAME: &'static str = "Timers";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "!has(self.keepaliveSeconds) || self.keepaliveSeconds * 3 <= self.holdSeconds",
        holds: |t| {
            t.keepalive_seconds
                .is_none_or(|k| u32::from(k) * 3 <= u32::from(t.hold_seconds))
        },
        field: ".keepaliveSeconds",
        wrong: "more than a third of `holdSeconds`",
        right: "write a third at most, so that one lost keepalive ends nothing (RFC 4271 §10)",
    }];
}

impl Checked for Ttl {
    const NAME: &'static str = "TTL";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "!(has(self.multihop) && has(self.gtsmHops))",
        holds: |t| t.multihop.is_none() || t.gtsm_hops.is_none(),
        field: "",
        wrong: "both `multihop` and `gtsmHops`",
        right: "keep one of them: GTSM sends with 255 and says itself how far the peer may be",
    }];
}

impl Checked for ImportPrefix {
    const NAME: &'static str = "ImportPrefix";
    const RULES: &'static [Rule<Self>] = &[
        Rule {
            cel: "!has(self.ge) || self.ge >= cidr(self.cidr).prefixLength()",
            holds: |p| p.ge.is_none_or(|ge| ge >= p.cidr.prefix_len()),
            field: ".ge",
            wrong: "shorter than the prefix",
            right: "write the prefix's length or more",
        },
        Rule {
            cel: "!has(self.le) || self.le >= (has(self.ge) ? self.ge : cidr(self.cidr).prefixLength())",
            holds: |p| {
                p.le.is_none_or(|le| le >= p.ge.unwrap_or(p.cidr.prefix_len()))
            },
            field: ".le",
            wrong: "shorter than the shortest",
            right: "write `ge` or more, and the prefix's length or more",
        },
        Rule {
            cel: "cidr(self.cidr).ip().family() == 6 || ((!has(self.ge) || self.ge <= 32) && (!has(self.le) || self.le <= 32))",
            holds: |p| {
                let longest = p.cidr.max_prefix_len();
                [p.ge, p.le].into_iter().flatten().all(|len| len <= longest)
            },
            field: "",
            wrong: "longer than an IPv4 address",
            right: "write 32 at most",
        },
    ];
}

/// A cordoned node serves on (metallb took it for drained once, and broke its users).
const CORDON: &str = "node.kubernetes.io/unschedulable";

impl Checked for Drain {
    const NAME: &'static str = "Drain";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "!has(self.onTaints) || !('node.kubernetes.io/unschedulable' in self.onTaints)",
        holds: |d| !d.on_taints.iter().any(|taint| taint.as_str() == CORDON),
        field: ".onTaints",
        wrong: "a cordoned node would drain",
        right: "write the key of a taint that means it: cordon only keeps new pods away",
    }];
}

/// BGPPeer (`kun.network/v1alpha1`): a router that nodes speak BGP with.
pub type BgpPeer = Custom<BgpPeerSpec, BgpPeerStatus>;

impl Spec for BgpPeerSpec {
    type Status = BgpPeerStatus;
    const KIND: &'static str = "BGPPeer";
    const PLURAL: &'static str = "bgppeers";
    const SHORT: &'static str = "kpeer";
    const NAMESPACED: bool = false;
    const ABOUT: &'static str = "A router that nodes speak BGP with.";
    const COLUMNS: &'static [Column] = &[
        Column::new("Address", "string", ".spec.address", "The peer's address"),
        Column::new(
            "Interface",
            "string",
            ".spec.interface",
            "The interface that leads to it",
        ),
        Column::new("ASN", "integer", ".spec.peerASN", "The peer's AS number"),
        Column::new(
            "Sessions",
            "integer",
            ".status.sessions",
            "Sessions that there should be",
        ),
        Column::new(
            "Established",
            "integer",
            ".status.established",
            "Sessions that are established",
        ),
        Column::new(
            "BFD",
            "integer",
            ".spec.bfd.intervalMilliseconds",
            "Milliseconds between two BFD packets",
        )
        .wide(),
        Column::new(
            "Hold",
            "integer",
            ".spec.timers.holdSeconds",
            "Hold time in seconds",
        )
        .wide(),
        Column::new(
            "Ready",
            "string",
            ".status.conditions[?(@.type=='Ready')].status",
            "Whether every session is established",
        ),
    ];
    const RULES: &'static [Rule<BgpPeer>] = &[];
    const STEPS: &'static [Step<BgpPeer>] = &[];

    fn object(object: Arc<BgpPeer>) -> Object {
        Object::BgpPeer(object)
    }

    fn of(object: &Object) -> Option<&Arc<BgpPeer>> {
        match object {
            Object::BgpPeer(object) => Some(object),
            _ => None,
        }
    }
}

fn bgp_port() -> u16 {
    179
}
fn hold() -> u16 {
    9
}
fn retry() -> u16 {
    5
}
fn two() -> u32 {
    2
}
fn three() -> u32 {
    3
}
fn ten() -> u32 {
    10
}
fn hundred() -> u32 {
    100
}
fn hundred_twenty() -> u32 {
    120
}
fn twenty_thousand() -> u32 {
    20_000
}
