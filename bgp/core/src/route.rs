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
    /// Loopback, link-local, multicast, unspecified, or 240.0.0.0/4: no router forwards to it.
    NotRoutable,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Limit => write!(f, "{MAX_ROUTES_PER_PEER} prefixes are the limit of a peer"),
            Refusal::DefaultRoute => f.write_str("a node never announces a default route"),
            Refusal::NotRoutable => f.write_str("no router forwards to this address"),
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
    /// Takes the routes whose family the peer carries, in order, the first of a prefix deciding. Over [`MAX_ROUTES_PER_PEER`],
    /// prefixes that `held` holds stay and newcomers are refused.
    pub fn build(
        routes: impl IntoIterator<Item = Route>,
        families: Families,
        held: &RouteSet,
    ) -> Self {
        Self::build_within(MAX_ROUTES_PER_PEER, routes, families, held)
    }

    fn build_within(
        limit: usize,
        routes: impl IntoIterator<Item = Route>,
        families: Families,
        held: &RouteSet,
    ) -> Self {
        let mut set = RouteSet::default();
        let mut newcomers = Vec::new();
        for mut route in routes {
            route.prefix = route.prefix.trunc();
            let carried = match route.prefix {
                IpNet::V4(_) => families.v4,
                IpNet::V6(_) => families.v6,
            };
            if !carried {
                continue;
            }
            if let Some(reason) = refusal(route.prefix) {
                set.refused.push(Refused {
                    prefix: route.prefix,
                    source: route.source,
                    reason,
                });
            } else if held.routes.contains_key(&route.prefix) && set.routes.len() < limit {
                set.routes.entry(route.prefix).or_insert(route);
            } else {
                newcomers.push(route);
            }
        }
        for route in newcomers {
            if set.routes.len() < limit {
                set.routes.entry(route.prefix).or_insert(route);
            } else if !set.routes.contains_key(&route.prefix) {
                set.refused.push(Refused {
                    prefix: route.prefix,
                    source: route.source,
                    reason: Refusal::Limit,
                });
            }
        }
        set
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

/// What may never be announced, whatever asked for it.
fn refusal(prefix: IpNet) -> Option<Refusal> {
    if prefix.prefix_len() == 0 {
        return Some(Refusal::DefaultRoute);
    }
    let first = prefix.network();
    let unroutable = match first {
        IpAddr::V4(a) => {
            a.is_loopback()
                || a.is_link_local()
                || a.is_multicast()
                || a.is_unspecified()
                || a.octets()[0] >= 240
        }
        IpAddr::V6(a) => {
            a.is_loopback()
                || a.is_unicast_link_local()
                || a.is_multicast()
                || a.is_unspecified()
                || a.to_ipv4_mapped().is_some()
        }
    };
    unroutable.then_some(Refusal::NotRoutable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: Families = Families { v4: true, v6: true };

    fn prefix() -> impl Strategy<Value = IpNet> {
        // Few distinct prefixes, so that sets meet and duplicates happen.
        prop_oneof![
            (1u8..=9, 24u8..=32).prop_map(
                |(n, len)| IpNet::new(IpAddr::from([10, 0, n, 0]), len).expect("len <= 32")
            ),
            (1u16..=9, 120u8..=128).prop_map(|(n, len)| {
                IpNet::new(IpAddr::from([0x2001, 0xdb8, n, 0, 0, 0, 0, 0]), len)
                    .expect("len <= 128")
            }),
        ]
    }

    fn route() -> impl Strategy<Value = Route> {
        (prefix(), proptest::collection::btree_set(0u32..3, 0..3)).prop_map(
            |(prefix, communities)| Route {
                prefix,
                source: RouteSource::Extra,
                attributes: Attributes {
                    communities: communities.into_iter().map(Community).collect(),
                },
            },
        )
    }

    fn set() -> impl Strategy<Value = RouteSet> {
        proptest::collection::vec(route(), 0..30)
            .prop_map(|routes| RouteSet::build(routes, BOTH, &RouteSet::default()))
    }

    /// What a peer holds after a delta.
    fn applied(old: &RouteSet, delta: &Delta) -> BTreeMap<IpNet, Attributes> {
        let mut table: BTreeMap<_, _> = old
            .routes()
            .map(|r| (r.prefix, r.attributes.clone()))
            .collect();
        for p in &delta.withdraw {
            assert!(
                table.remove(p).is_some(),
                "{p} withdrawn, but the peer never had it"
            );
        }
        for r in &delta.announce {
            table.insert(r.prefix, r.attributes.clone());
        }
        table
    }

    proptest! {
        #[test]
        fn delta_turns_the_old_set_into_the_new_one(old in set(), new in set()) {
            let delta = new.delta_from(&old);
            let want: BTreeMap<_, _> = new.routes().map(|r| (r.prefix, r.attributes.clone())).collect();
            prop_assert_eq!(applied(&old, &delta), want);
            prop_assert!(new.delta_from(&new).is_empty());
            for r in &delta.announce {
                prop_assert!(!delta.withdraw.contains(&r.prefix));
                prop_assert_ne!(old.get(&r.prefix).map(|o| &o.attributes), Some(&r.attributes), "announced again unchanged");
            }
        }

        #[test]
        fn over_the_limit_what_stands_stays(first in proptest::collection::vec(route(), 0..40), then in proptest::collection::vec(route(), 0..40), limit in 1usize..20) {
            let held = RouteSet::build_within(limit, first, BOTH, &RouteSet::default());
            let wanted: BTreeSet<IpNet> = then.iter().map(|r| r.prefix).collect();
            let set = RouteSet::build_within(limit, then, BOTH, &held);
            prop_assert!(set.len() <= limit);
            prop_assert_eq!(set.len(), wanted.len().min(limit), "a free place is used");
            for p in held.routes().map(|r| r.prefix).filter(|p| wanted.contains(p)) {
                prop_assert!(set.get(&p).is_some(), "{} was held and is wanted", p);
            }
            let refused: BTreeSet<IpNet> = set.refused().iter().map(|r| r.prefix).collect();
            for p in wanted {
                prop_assert!(set.get(&p).is_some() != refused.contains(&p), "{} is announced or reported", p);
            }
        }

        #[test]
        fn a_family_that_the_peer_does_not_carry_is_left_out(routes in proptest::collection::vec(route(), 0..30), v4: bool, v6: bool) {
            let set = RouteSet::build(routes.clone(), Families { v4, v6 }, &RouteSet::default());
            for r in set.routes() {
                let carried = match r.prefix { IpNet::V4(_) => v4, IpNet::V6(_) => v6 };
                prop_assert!(carried);
            }
            prop_assert!(!(v4 && v6) || routes.is_empty() || !set.is_empty());
        }
    }

    #[test]
    fn what_no_router_forwards_is_refused() {
        let table = [
            ("0.0.0.0/0", Some(Refusal::DefaultRoute)),
            ("::/0", Some(Refusal::DefaultRoute)),
            ("127.0.0.0/8", Some(Refusal::NotRoutable)),
            ("169.254.1.1/32", Some(Refusal::NotRoutable)),
            ("224.0.0.0/24", Some(Refusal::NotRoutable)),
            ("240.0.0.0/26", Some(Refusal::NotRoutable)),
            ("fe80::/64", Some(Refusal::NotRoutable)),
            ("ff02::1/128", Some(Refusal::NotRoutable)),
            ("::1/128", Some(Refusal::NotRoutable)),
            ("::ffff:10.0.0.0/104", Some(Refusal::NotRoutable)),
            ("10.0.0.0/26", None),
            ("192.0.2.1/32", None),
            ("64:ff9b::/96", None),
            ("2001:db8::/122", None),
        ];
        for (text, want) in table {
            let prefix: IpNet = text.parse().expect("a prefix");
            let route = Route {
                prefix,
                source: RouteSource::Extra,
                attributes: Attributes::default(),
            };
            let set = RouteSet::build([route], BOTH, &RouteSet::default());
            assert_eq!(set.refused().first().map(|r| r.reason), want, "{text}");
            assert_eq!(set.is_empty(), want.is_some(), "{text}");
        }
    }

    #[test]
    fn communities_read_as_people_write_them() {
        assert_eq!(Community::GRACEFUL_SHUTDOWN.to_string(), "65535:0");
    }
}
