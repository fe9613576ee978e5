//! From what this node owns and what is ready to a route set for every peer.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kun_config::types::{BlockId, PodPrefix, SlotClass};
use kun_config::{Advertise, Bgp};

use crate::{Attributes, Community, Route, RouteSet, RouteSource};

/// Whether the kernel would forward what we announce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Datapath {
    /// Not yet: nothing is announced for the first time, and nothing that stands is withdrawn.
    #[default]
    Starting,
    /// Programs are attached and maps are filled.
    Ready,
    /// It was there and broke: VIPs and the translator's prefixes go, blocks (plain routes) stay.
    Failed,
}

/// What the plan depends on, besides the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// The /96 under which blocks have their IPv6 half.
    pub pod_prefix: PodPrefix,
    /// Blocks that this node owns.
    pub blocks: Vec<BlockId>,
    /// Virtual addresses of LoadBalancer services, and whether this node has a ready endpoint for each.
    pub vips: BTreeMap<IpAddr, bool>,
    /// Prefixes that this gateway translates; empty elsewhere.
    pub pref64: Vec<Ipv6Net>,
    /// IPv4 addresses that this gateway translates to; empty elsewhere.
    pub nat64_pool: Vec<Ipv4Net>,
    /// Services, EndpointSlices and blocks were read to the end once, and are read still.
    pub synced: bool,
    /// The kernel side.
    pub datapath: Datapath,
    /// This node is to be emptied: every route carries GRACEFUL_SHUTDOWN (RFC 8326) before it goes.
    pub draining: bool,
}

/// Why there is no plan: whoever asked keeps what it announces now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Hold {
    /// Half a view of the cluster withdraws what the other half needs.
    #[error("the cluster view is not complete; routes stay as they are")]
    NotSynced,
    /// A route announced before its datapath stands is a black hole.
    #[error("the datapath is not ready; routes stay as they are")]
    DatapathStarting,
}

/// The route set of every peer of `config`, by the peer's name. `held` is what the last plan gave: over the limit of a peer, what it
/// holds already stays.
pub fn plan(
    config: &Bgp,
    inputs: &Inputs,
    held: &BTreeMap<String, RouteSet>,
) -> Result<BTreeMap<String, RouteSet>, Hold> {
    if !inputs.synced {
        return Err(Hold::NotSynced);
    }
    if inputs.datapath == Datapath::Starting {
        return Err(Hold::DatapathStarting);
    }
    let wanted = wanted(&config.advertise, inputs);
    let nothing = RouteSet::default();
    let sets = config.peers.iter().map(|peer| {
        let before = held.get(&peer.name).unwrap_or(&nothing);
        let set = RouteSet::build(wanted.iter().cloned(), peer.families, before);
        (peer.name.clone(), set)
    });
    Ok(sets.collect())
}

/// Every route that this node would announce, the most needed first: over the limit the last ones are refused.
fn wanted(advertise: &Advertise, inputs: &Inputs) -> Vec<Route> {
    let attributes = Attributes {
        communities: inputs
            .draining
            .then_some(Community::GRACEFUL_SHUTDOWN)
            .into_iter()
            .collect(),
    };
    let mut routes = Vec::new();
    let mut push = |prefix: IpNet, source| {
        routes.push(Route {
            prefix,
            source,
            attributes: attributes.clone(),
        });
    };
    let forwards = inputs.datapath == Datapath::Ready;
    if advertise.blocks {
        for &block in &inputs.blocks {
            push(
                block.v6(inputs.pod_prefix).into(),
                RouteSource::Block(block),
            );
            if block.class() == SlotClass::Dual {
                push(block.v4().into(), RouteSource::Block(block));
            }
        }
    }
    if advertise.nat64 && forwards {
        for &prefix in &inputs.pref64 {
            push(prefix.into(), RouteSource::Pref64);
        }
        for &prefix in &inputs.nat64_pool {
            push(prefix.into(), RouteSource::Nat64Pool);
        }
    }
    for &prefix in &advertise.extra {
        push(prefix, RouteSource::Extra);
    }
    if advertise.vips && forwards {
        for (&address, _) in inputs.vips.iter().filter(|&(_, &ready)| ready) {
            // A Service's status may hold ::ffff:a.b.c.d; the route is the IPv4 one.
            let address = address.to_canonical();
            push(IpNet::from(address), RouteSource::Vip(address));
        }
    }
    routes
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kun_config::types::Slot;
    use kun_config::{BgpPeer, Families};
    use proptest::prelude::*;

    use super::*;

    fn peer(name: &str, v4: bool, v6: bool) -> BgpPeer {
        BgpPeer {
            name: name.to_owned(),
            address: "192.0.2.1".parse().expect("an address"),
            interface: None,
            asn: 64512,
            port: 179,
            source: None,
            families: Families { v4, v6 },
            hold: Duration::from_secs(9),
            md5_file: None,
            gtsm: false,
        }
    }

    fn config(advertise: Advertise) -> Bgp {
        Bgp {
            enabled: true,
            asn: 64513,
            router_id: None,
            listen: None,
            peers: vec![peer("both", true, true), peer("v6", false, true)],
            advertise,
            graceful_restart: Duration::from_secs(120),
        }
    }

    fn everything() -> Advertise {
        Advertise {
            blocks: true,
            vips: true,
            nat64: true,
            extra: vec!["198.51.100.0/24".parse().expect("a prefix")],
        }
    }

    fn block(first: [u8; 4]) -> BlockId {
        BlockId::new(Slot::from(std::net::Ipv4Addr::from(first))).expect("aligned")
    }

    fn inputs() -> Inputs {
        Inputs {
            pod_prefix: PodPrefix::new("fd00:10:96::/96".parse().expect("a prefix"))
                .expect("a /96"),
            blocks: vec![block([10, 1, 0, 64]), block([240, 0, 0, 128])],
            vips: BTreeMap::from([
                ("192.0.2.10".parse().expect("an address"), true),
                ("2001:db8::10".parse().expect("an address"), true),
                ("192.0.2.11".parse().expect("an address"), false),
            ]),
            pref64: vec!["64:ff9b::/96".parse().expect("a prefix")],
            nat64_pool: vec!["203.0.113.0/28".parse().expect("a prefix")],
            synced: true,
            datapath: Datapath::Ready,
            draining: false,
        }
    }

    fn prefixes(set: &RouteSet) -> Vec<String> {
        set.routes().map(|r| r.prefix.to_string()).collect()
    }

    #[test]
    fn every_source_has_its_routes() {
        let sets = plan(&config(everything()), &inputs(), &BTreeMap::new()).expect("ready");
        assert_eq!(
            prefixes(&sets["both"]),
            [
                "10.1.0.64/26",
                "192.0.2.10/32",
                "198.51.100.0/24",
                "203.0.113.0/28",
                "64:ff9b::/96",
                "2001:db8::10/128",
                "fd00:10:96::a01:40/122",
                "fd00:10:96::f000:80/122",
            ]
        );
        assert_eq!(
            prefixes(&sets["v6"]),
            [
                "64:ff9b::/96",
                "2001:db8::10/128",
                "fd00:10:96::a01:40/122",
                "fd00:10:96::f000:80/122"
            ]
        );
    }

    #[test]
    fn each_switch_of_advertise_rules_its_source_alone() {
        let nothing = Advertise {
            blocks: false,
            vips: false,
            nat64: false,
            extra: Vec::new(),
        };
        let count = |a: Advertise| {
            plan(&config(a), &inputs(), &BTreeMap::new()).expect("ready")["both"].len()
        };
        assert_eq!(count(nothing.clone()), 0);
        assert_eq!(
            count(Advertise {
                blocks: true,
                ..nothing.clone()
            }),
            3
        );
        assert_eq!(
            count(Advertise {
                vips: true,
                ..nothing.clone()
            }),
            2
        );
        assert_eq!(
            count(Advertise {
                nat64: true,
                ..nothing
            }),
            2
        );
    }

    #[test]
    fn half_a_view_changes_nothing() {
        let half = Inputs {
            synced: false,
            ..inputs()
        };
        assert_eq!(
            plan(&config(everything()), &half, &BTreeMap::new()),
            Err(Hold::NotSynced)
        );
        let starting = Inputs {
            datapath: Datapath::Starting,
            ..inputs()
        };
        assert_eq!(
            plan(&config(everything()), &starting, &BTreeMap::new()),
            Err(Hold::DatapathStarting)
        );
    }

    #[test]
    fn a_broken_datapath_keeps_plain_routes_and_nothing_else() {
        let broken = Inputs {
            datapath: Datapath::Failed,
            ..inputs()
        };
        let sets = plan(&config(everything()), &broken, &BTreeMap::new()).expect("a plan");
        assert_eq!(
            prefixes(&sets["both"]),
            [
                "10.1.0.64/26",
                "198.51.100.0/24",
                "fd00:10:96::a01:40/122",
                "fd00:10:96::f000:80/122"
            ]
        );
    }

    #[test]
    fn a_mapped_vip_is_an_ipv4_route() {
        let mut mapped = inputs();
        mapped.vips = BTreeMap::from([("::ffff:192.0.2.10".parse().expect("an address"), true)]);
        let sets = plan(&config(everything()), &mapped, &BTreeMap::new()).expect("ready");
        assert!(
            sets["both"]
                .get(&"192.0.2.10/32".parse().expect("a prefix"))
                .is_some()
        );
        assert!(sets["both"].refused().is_empty());
    }

    proptest! {
        #[test]
        fn draining_marks_every_route_and_moves_none(blocks in proptest::collection::vec(0u32..64, 0..20), vips in proptest::collection::btree_map(any::<u32>(), any::<bool>(), 0..20)) {
            let mut calm = inputs();
            calm.blocks = blocks.iter().map(|b| BlockId::new(Slot(0x0a00_0000 + b * 64)).expect("aligned")).collect();
            calm.vips = vips.iter().map(|(&a, &ready)| (IpAddr::from(a.to_be_bytes()), ready)).collect();
            let drain = Inputs { draining: true, ..calm.clone() };
            let config = config(everything());
            let before = plan(&config, &calm, &BTreeMap::new()).expect("ready");
            let after = plan(&config, &drain, &before).expect("ready");
            for (name, set) in &after {
                prop_assert_eq!(prefixes(set), prefixes(&before[name]));
                for route in set.routes() {
                    prop_assert!(route.attributes.communities.contains(&Community::GRACEFUL_SHUTDOWN));
                }
                prop_assert_eq!(set.delta_from(&before[name]).announce.len(), set.len());
            }
        }

        #[test]
        fn the_order_of_inputs_does_not_matter(mut blocks in proptest::collection::vec(0u32..64, 0..20)) {
            let make = |blocks: &[u32]| {
                let mut i = inputs();
                i.blocks = blocks.iter().map(|b| BlockId::new(Slot(0x0a00_0000 + b * 64)).expect("aligned")).collect();
                plan(&config(everything()), &i, &BTreeMap::new()).expect("ready")
            };
            let one = make(&blocks);
            blocks.reverse();
            prop_assert_eq!(one, make(&blocks));
        }
    }
}
