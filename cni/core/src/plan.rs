//! The verbs as plans: what ADD does to the kernel, in order, and how each step is undone. CHECK expects what ADD made, so it
//! reads the same plan.
//!
//! A pod's default route goes to a next hop that nobody owns (`fe80::1`, `169.254.1.1`) with a static neighbour entry for the
//! host side's hardware address: no neighbour discovery, no ARP, no duplicate address detection, and the first packet passes.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kun_config::Interfaces;
use kun_config::types::SlotClass;
use serde_json::Map;
use sha2::{Digest, Sha256};

use crate::ipam::Key;
use crate::names::{self, Carries};
use crate::spec::{Interface, Ip, Route, Success};
use crate::tag;

/// The pod's IPv6 next hop; on no interface.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// The pod's IPv4 next hop; on no interface (RFC 3927).
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// `rtm_protocol` of every route that kun installs: whoever cleans up knows them by it.
pub const ROUTE_PROTOCOL: u8 = 0x6b;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Of its text, with `:` or `-`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next()?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return None;
            }
            *byte = u8::from_str_radix(part, 16).ok()?;
        }
        parts.next().is_none().then_some(Self(bytes))
    }

    /// One interface's, and not nobody's.
    pub fn is_unicast(self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }

    /// The link-local address that the kernel would make of it (RFC 4291 appendix A).
    pub fn link_local(self) -> Ipv6Addr {
        let [a, b, c, d, e, f] = self.0.map(u16::from);
        Ipv6Addr::new(
            0xfe80,
            0,
            0,
            0,
            (a ^ 2) << 8 | b,
            c << 8 | 0xff,
            0xfe00 | d,
            e << 8 | f,
        )
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Which namespace an op works in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The node.
    Host,
    /// The pod.
    Pod,
}

/// A veth pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// What it carries.
    pub carries: Carries,
    /// Host-side name.
    pub host: String,
    /// Name in the pod.
    pub pod: String,
    /// Host-side hardware address.
    pub host_mac: Mac,
    /// Hardware address in the pod.
    pub pod_mac: Mac,
    /// Host-side ifalias: whose, and of which generation.
    pub alias: String,
    /// Addresses in the pod, as /128 and /32.
    pub addresses: Vec<IpNet>,
}

/// A setting below `net.ipv4.conf.<interface>`, which a message can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv4Setting {
    /// `forwarding`
    Forwarding,
    /// `proxy_arp`
    ProxyArp,
    /// `rp_filter`
    RpFilter,
}

/// A setting below `net.ipv6.conf.<interface>`, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ipv6Setting {
    /// `disable_ipv6` = 0: runtimes may turn IPv6 off in new namespaces.
    Enabled,
    /// `forwarding` = 1
    Forwarding,
    /// `accept_ra` = 0
    NoRouterAdvertisements,
    /// `proxy_ndp` = 0
    NoProxy,
}

impl Ipv6Setting {
    /// The file's name and its value.
    pub fn file(self) -> (&'static str, &'static str) {
        match self {
            Self::Enabled => ("disable_ipv6", "0"),
            Self::Forwarding => ("forwarding", "1"),
            Self::NoRouterAdvertisements => ("accept_ra", "0"),
            Self::NoProxy => ("proxy_ndp", "0"),
        }
    }
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// A veth pair with both ends down, its far end made inside the pod.
    CreatePair {
        /// The pair.
        pair: Pair,
        /// MTU of both ends.
        mtu: u32,
    },
    /// An interface's tag and settings, in one message. The kernel makes no link-local address on it.
    Configure {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
        /// ifalias.
        alias: Option<String>,
        /// IPv4 settings of the interface.
        ipv4: Vec<(Ipv4Setting, u32)>,
    },
    /// IPv6 settings of an interface, which no message sets: written where the kernel's own are others.
    Ipv6 {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
        /// The settings.
        settings: &'static [Ipv6Setting],
    },
    /// A file below /proc/sys/net.
    Sysctl {
        /// Where.
        side: Side,
        /// `ipv4/ip_local_port_range`
        path: String,
        /// Value.
        value: String,
    },
    /// Administratively up.
    Up {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
    },
    /// An address, without duplicate address detection.
    Address {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
        /// Address and prefix length.
        address: IpNet,
    },
    /// A permanent neighbour.
    Neighbour {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
        /// Its address.
        address: IpAddr,
        /// Its hardware address.
        mac: Mac,
    },
    /// A route, through a next hop or on the link.
    Route {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
        /// Destination.
        to: IpNet,
        /// Next hop.
        via: Option<IpAddr>,
    },
    /// Waits until the kernel sends on the interface: what is sent before is lost.
    AwaitCarrier {
        /// Where.
        side: Side,
        /// Interface.
        ifname: String,
    },
}

impl Op {
    /// In which namespace it works.
    pub fn side(&self) -> Side {
        match self {
            Op::CreatePair { .. } => Side::Host,
            Op::Configure { side, .. }
            | Op::Ipv6 { side, .. }
            | Op::Sysctl { side, .. }
            | Op::Up { side, .. }
            | Op::Address { side, .. }
            | Op::Neighbour { side, .. }
            | Op::Route { side, .. }
            | Op::AwaitCarrier { side, .. } => *side,
        }
    }

    /// What undoes it. Everything else hangs on the pair and goes with it; the namespace's sysctls go with the pod.
    pub fn undo(&self) -> Option<Undo> {
        match self {
            Op::CreatePair { pair, .. } => Some(Undo::RemoveLink {
                host: pair.host.clone(),
            }),
            Op::Configure { .. }
            | Op::Ipv6 { .. }
            | Op::Sysctl { .. }
            | Op::Up { .. }
            | Op::Address { .. }
            | Op::Neighbour { .. }
            | Op::Route { .. }
            | Op::AwaitCarrier { .. } => None,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |side: &Side| match side {
            Side::Host => "node",
            Side::Pod => "pod",
        };
        match self {
            Op::CreatePair { pair, mtu } => {
                write!(
                    f,
                    "veth pair {} – {} in the pod, mtu {mtu}",
                    pair.host, pair.pod
                )
            }
            Op::Sysctl { side, path, value } => {
                write!(f, "{}: /proc/sys/net/{path} = {value}", at(side))
            }
            Op::Configure { side, ifname, .. } => write!(f, "{}: settings of {ifname}", at(side)),
            Op::Ipv6 { side, ifname, .. } => write!(f, "{}: IPv6 settings of {ifname}", at(side)),
            Op::Up { side, ifname } => write!(f, "{}: {ifname} up", at(side)),
            Op::Address {
                side,
                ifname,
                address,
            } => write!(f, "{}: address {address} on {ifname}", at(side)),
            Op::Neighbour {
                side,
                ifname,
                address,
                mac,
            } => write!(f, "{}: neighbour {address} at {mac} on {ifname}", at(side)),
            Op::Route {
                side,
                ifname,
                to,
                via: Some(via),
            } => write!(f, "{}: route {to} via {via} on {ifname}", at(side)),
            Op::Route {
                side,
                ifname,
                to,
                via: None,
            } => write!(f, "{}: route {to} on {ifname}", at(side)),
            Op::AwaitCarrier { side, ifname } => write!(f, "{}: carrier on {ifname}", at(side)),
        }
    }
}

/// How a step is undone; each succeeds when there is nothing to undo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Undo {
    /// Removes a host-side interface and with it the pair, its routes and neighbours.
    RemoveLink {
        /// Its name.
        host: String,
    },
}

/// What is known of an ADD before its slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    /// Whose.
    pub key: Key,
    /// With IPv4 or without, as far as anybody knows.
    pub class: SlotClass,
    /// Split or shared.
    pub interfaces: Interfaces,
    /// MTU of every interface.
    pub mtu: u32,
    /// Hardware address of CNI_IFNAME; `None`: of our making.
    pub mac: Option<Mac>,
}

impl Draft {
    /// The pairs to make, IPv6's first, without addresses and tagged as [unfinished](tag::UNFINISHED).
    pub fn pairs(&self) -> Vec<Pair> {
        names::pairs(self.class, self.interfaces)
            .iter()
            .map(|&carries| Pair {
                carries,
                host: names::host_name(&self.key, carries),
                pod: match carries {
                    Carries::V6 | Carries::Both => self.key.ifname.clone(),
                    Carries::V4 => second_name(&self.key.ifname),
                },
                host_mac: mac(&self.key, carries, "host"),
                pod_mac: match (carries, self.mac) {
                    (Carries::V6 | Carries::Both, Some(mac)) => mac,
                    (Carries::V4, _) | (_, None) => mac(&self.key, carries, "pod"),
                },
                alias: tag::of(&self.key, tag::UNFINISHED, self.mac),
                addresses: Vec::new(),
            })
            .collect()
    }
}

/// What an ADD is to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Whose.
    pub key: Key,
    /// Generation of the slot.
    pub generation: u64,
    /// IPv6 address, always.
    pub v6: Ipv6Addr,
    /// IPv4 address of dual slots.
    pub v4: Option<Ipv4Addr>,
    /// Split or shared.
    pub interfaces: Interfaces,
    /// MTU of every interface.
    pub mtu: u32,
    /// Hardware address of CNI_IFNAME; `None`: of our making.
    pub mac: Option<Mac>,
    /// First and last port of the pod's `ip_local_port_range`: its NAT64 port block is found by it.
    pub local_ports: (u16, u16),
}

impl Facts {
    /// The same without what the slot told.
    pub fn draft(&self) -> Draft {
        Draft {
            key: self.key.clone(),
            class: match self.v4 {
                Some(_) => SlotClass::Dual,
                None => SlotClass::V6Only,
            },
            interfaces: self.interfaces,
            mtu: self.mtu,
            mac: self.mac,
        }
    }

    /// The pairs to make, IPv6's first.
    pub fn pairs(&self) -> Vec<Pair> {
        let v6 = IpNet::V6(Ipv6Net::from(self.v6));
        let v4 = self.v4.map(|v4| IpNet::V4(Ipv4Net::from(v4)));
        let mut pairs = self.draft().pairs();
        for pair in &mut pairs {
            pair.alias = tag::of(&self.key, self.generation, self.mac);
            pair.addresses = match pair.carries {
                Carries::V6 => vec![v6],
                Carries::V4 => v4.into_iter().collect(),
                Carries::Both => [Some(v6), v4].into_iter().flatten().collect(),
            };
        }
        pairs
    }
}

/// What of ADD needs no slot: these pairs, while the slot is being made durable. They lead nowhere yet.
///
/// The host side comes up before the pod's: then the pod's has a carrier at once, and its packets pass.
pub fn begin(pairs: &[Pair], mtu: u32) -> Vec<Op> {
    let mut ops = Vec::new();
    for pair in pairs {
        ops.push(Op::CreatePair {
            pair: pair.clone(),
            mtu,
        });
        ops.push(Op::Configure {
            side: Side::Host,
            ifname: pair.host.clone(),
            alias: Some(pair.alias.clone()),
            ipv4: Vec::new(),
        });
        // By a message of its own. What changes on an interface that is up without a carrier has the kernel go through all of the
        // node's IPv6 routes.
        ops.push(Op::Up {
            side: Side::Host,
            ifname: pair.host.clone(),
        });
    }
    ops
}

/// The pod's ends of these pairs, up and without addresses.
pub fn link(pairs: &[Pair], local_ports: (u16, u16)) -> Vec<Op> {
    let (first, last) = local_ports;
    let mut ops = Vec::new();
    if pairs.is_empty() {
        return ops;
    }
    ops.push(Op::Sysctl {
        side: Side::Pod,
        path: "ipv4/ip_local_port_range".to_owned(),
        value: format!("{first}\t{last}"),
    });
    // A port that the pod closed rests for a minute otherwise: with a block of 1,024 that would be 17 connections a second to one
    // server. RFC 6191 lets timestamps tell the old connection from the new one; the kernel asks for a second between them.
    ops.push(Op::Sysctl {
        side: Side::Pod,
        path: "ipv4/tcp_tw_reuse".to_owned(),
        value: "1".to_owned(),
    });
    ops.extend(pairs.iter().flat_map(pod_link_ops));
    ops
}

/// The rest of ADD, when the slot is durable: two turns, in the pod and on the node.
///
/// Each is one conversation with the kernel: what has to be known of an interface beyond its index is asked for at its end.
pub fn finish(facts: &Facts) -> Vec<Op> {
    let pairs = facts.pairs();
    let mut ops: Vec<Op> = pairs.iter().flat_map(pod_address_ops).collect();
    // Before the first route: an interface that routes lead to tells whose they are.
    for pair in &pairs {
        ops.push(Op::Configure {
            side: Side::Host,
            ifname: pair.host.clone(),
            alias: Some(pair.alias.clone()),
            ipv4: host_ipv4(pair.carries),
        });
    }
    for pair in &pairs {
        ops.extend(reach(pair));
    }
    for pair in &pairs {
        ops.extend(host_ipv6(pair));
        ops.push(Op::AwaitCarrier {
            side: Side::Host,
            ifname: pair.host.clone(),
        });
    }
    ops
}

/// What stands after ADD; CHECK looks for it.
pub fn standing(facts: &Facts) -> Vec<Op> {
    let made = facts.pairs().into_iter().map(|pair| Op::CreatePair {
        pair,
        mtu: facts.mtu,
    });
    made.chain(link(&facts.pairs(), facts.local_ports))
        .chain(finish(facts))
        .collect()
}

/// What the going down of this host-side interface takes away.
pub fn restore(facts: &Facts, host: &str) -> Vec<Op> {
    let pairs = facts.pairs();
    let of_host = pairs.iter().filter(|pair| pair.host == host);
    of_host
        .flat_map(|pair| reach(pair).into_iter().chain(host_ipv6(pair)))
        .collect()
}

/// What the going down of the pod's end of this pair takes away: IPv6 addresses too, and routes and neighbours of both families.
pub fn restore_in_pod(facts: &Facts, host: &str) -> Vec<Op> {
    let pairs = facts.pairs();
    let of_host = pairs.iter().filter(|pair| pair.host == host);
    of_host.flat_map(pod_address_ops).collect()
}

/// DEL's part in the kernel: by name, whatever of ADD was reached.
pub fn del(key: &Key) -> Vec<Undo> {
    [Carries::V4, Carries::V6]
        .into_iter()
        .map(|carries| Undo::RemoveLink {
            host: names::host_name(key, carries),
        })
        .collect()
}

/// ADD's result.
///
/// Both addresses must reach `status.podIPs`, and containerd takes a pod's addresses from the interface that the runtime named
/// (`eth0`) alone: it files each address under `interfaces[interface]`, and one without `interface` under `eth0`. The IPv4
/// address of a split pod is on `eth1`, where containerd would lose it; so it is told as belonging to the attachment as a
/// whole, which is true, and not to `eth0`, which is not. CRI-O takes every address.
pub fn result(facts: &Facts, netns: &str) -> Success {
    let pairs = facts.pairs();
    let interface = |name: &str, mac: Mac, sandbox: &str| Interface {
        name: name.to_owned(),
        mac: Some(mac.to_string()),
        mtu: Some(facts.mtu),
        sandbox: sandbox.to_owned(),
        rest: Map::new(),
    };
    let mut success = Success::default();
    for pair in &pairs {
        success
            .interfaces
            .push(interface(&pair.pod, pair.pod_mac, netns));
    }
    for pair in &pairs {
        success
            .interfaces
            .push(interface(&pair.host, pair.host_mac, ""));
    }
    for (index, pair) in pairs.iter().enumerate() {
        for address in &pair.addresses {
            let gateway = gateway(address);
            success.ips.push(Ip {
                address: *address,
                gateway: Some(gateway),
                interface: (index == 0).then_some(index),
            });
            success.routes.push(Route {
                dst: default_route(address),
                gw: Some(gateway),
                rest: Map::new(),
            });
        }
    }
    success
}

/// The host side's neighbours and routes to the pod.
fn reach(pair: &Pair) -> Vec<Op> {
    let side = Side::Host;
    let ifname = pair.host.clone();
    let mut ops = Vec::new();
    for address in &pair.addresses {
        ops.push(Op::Neighbour {
            side,
            ifname: ifname.clone(),
            address: address.addr(),
            mac: pair.pod_mac,
        });
        ops.push(Op::Route {
            side,
            ifname: ifname.clone(),
            to: *address,
            via: None,
        });
    }
    ops
}

/// The host side's IPv6 settings: nothing learnt, nothing answered on others' behalf.
fn host_ipv6(pair: &Pair) -> Option<Op> {
    match pair.carries {
        Carries::V6 | Carries::Both => Some(Op::Ipv6 {
            side: Side::Host,
            ifname: pair.host.clone(),
            settings: &[
                Ipv6Setting::Forwarding,
                Ipv6Setting::NoRouterAdvertisements,
                Ipv6Setting::NoProxy,
            ],
        }),
        Carries::V4 => None,
    }
}

/// Forwarding on; nothing answered on others' behalf; a pod's packets must come from its own address.
fn host_ipv4(carries: Carries) -> Vec<(Ipv4Setting, u32)> {
    match carries {
        Carries::V6 => Vec::new(),
        Carries::V4 | Carries::Both => vec![
            (Ipv4Setting::Forwarding, 1),
            (Ipv4Setting::RpFilter, 1),
            (Ipv4Setting::ProxyArp, 0),
        ],
    }
}

fn pod_link_ops(pair: &Pair) -> Vec<Op> {
    let side = Side::Pod;
    let ifname = pair.pod.clone();
    let mut ops = Vec::new();
    match pair.carries {
        Carries::V6 | Carries::Both => ops.push(Op::Ipv6 {
            side,
            ifname: ifname.clone(),
            settings: &[Ipv6Setting::Enabled, Ipv6Setting::NoRouterAdvertisements],
        }),
        Carries::V4 => {}
    }
    ops.push(Op::Configure {
        side,
        ifname: ifname.clone(),
        alias: None,
        ipv4: match pair.carries {
            // A new namespace has the node's.
            Carries::V4 | Carries::Both => vec![(Ipv4Setting::Forwarding, 0)],
            Carries::V6 => Vec::new(),
        },
    });
    ops.push(Op::Up { side, ifname });
    ops
}

fn pod_address_ops(pair: &Pair) -> Vec<Op> {
    let side = Side::Pod;
    let ifname = pair.pod.clone();
    let mut ops = Vec::new();
    if matches!(pair.carries, Carries::V6 | Carries::Both) {
        // The kernel's own would wait for duplicate address detection, on a link that only the two of us are on.
        ops.push(Op::Address {
            side,
            ifname: ifname.clone(),
            address: IpNet::V6(Ipv6Net::new_assert(pair.pod_mac.link_local(), 64)),
        });
    }
    for address in &pair.addresses {
        let gateway = gateway(address);
        ops.push(Op::Address {
            side,
            ifname: ifname.clone(),
            address: *address,
        });
        ops.push(Op::Neighbour {
            side,
            ifname: ifname.clone(),
            address: gateway,
            mac: pair.host_mac,
        });
        ops.push(Op::Route {
            side,
            ifname: ifname.clone(),
            to: default_route(address),
            via: Some(gateway),
        });
    }
    ops
}

fn gateway(address: &IpNet) -> IpAddr {
    match address {
        IpNet::V6(_) => GATEWAY_V6.into(),
        IpNet::V4(_) => GATEWAY_V4.into(),
    }
}

fn default_route(address: &IpNet) -> IpNet {
    match address {
        IpNet::V6(_) => IpNet::V6(Ipv6Net::default()),
        IpNet::V4(_) => IpNet::V4(Ipv4Net::default()),
    }
}

/// `eth0` → `eth1`, `net7` → `net8`, `pod` → `pod1`.
fn second_name(first: &str) -> String {
    let stem = first.trim_end_matches(|c: char| c.is_ascii_digit());
    let number: u32 = first[stem.len()..].parse().unwrap_or(0);
    let number = number.saturating_add(1).to_string();
    let stem: String = stem.chars().take(names::MAX_NAME - number.len()).collect();
    stem + &number
}

/// Locally administered, unicast, fixed by the key: neighbours can be static on both sides before either end exists.
fn mac(key: &Key, carries: Carries, end: &str) -> Mac {
    let digest = Sha256::digest(format!("{} {end}", names::host_name(key, carries)));
    let mut bytes = [0; 6];
    bytes.copy_from_slice(&digest[..6]);
    bytes[0] = bytes[0] & 0xfc | 0x02;
    Mac(bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::spec::Version;

    fn facts(v4: bool, interfaces: Interfaces) -> Facts {
        Facts {
            key: Key {
                container_id: "c1".into(),
                ifname: "eth0".into(),
                network: "kun".into(),
            },
            generation: 3,
            v6: "fd00::a00:1".parse().unwrap(),
            v4: v4.then(|| "10.0.0.1".parse().unwrap()),
            interfaces,
            mtu: 1500,
            mac: None,
            local_ports: (64512, 65535),
        }
    }

    const ALL: [(bool, Interfaces); 4] = [
        (true, Interfaces::Split),
        (true, Interfaces::Shared),
        (false, Interfaces::Split),
        (false, Interfaces::Shared),
    ];

    /// An interface that changes while it is up and its peer is not costs a walk through all of the node's IPv6 routes.
    #[test]
    fn a_nodes_end_is_as_it_will_be_before_it_comes_up() {
        for (v4, interfaces) in ALL {
            let pairs = facts(v4, interfaces).draft().pairs();
            let ops = begin(&pairs, 1500);
            for pair in &pairs {
                let place = |wanted: &dyn Fn(&Op) -> bool| ops.iter().position(wanted);
                let configured =
                    place(&|op| matches!(op, Op::Configure { ifname, .. } if *ifname == pair.host));
                let up = place(&|op| matches!(op, Op::Up { ifname, .. } if *ifname == pair.host));
                assert!(configured.is_some() && configured < up, "{ops:?}");
            }
        }
    }

    #[test]
    fn every_pair_made_is_removed_by_undo_and_by_del() {
        for (v4, interfaces) in ALL {
            let facts = facts(v4, interfaces);
            let undone: Vec<Undo> = standing(&facts).iter().filter_map(Op::undo).collect();
            assert_eq!(undone.len(), facts.pairs().len());
            for undo in undone {
                assert!(del(&facts.key).contains(&undo));
            }
        }
    }

    #[test]
    fn every_address_has_its_route_and_neighbour_on_both_sides() {
        for (v4, interfaces) in ALL {
            let facts = facts(v4, interfaces);
            let ops = standing(&facts);
            for pair in facts.pairs() {
                for address in &pair.addresses {
                    for needed in [
                        Op::Route {
                            side: Side::Host,
                            ifname: pair.host.clone(),
                            to: *address,
                            via: None,
                        },
                        Op::Neighbour {
                            side: Side::Host,
                            ifname: pair.host.clone(),
                            address: address.addr(),
                            mac: pair.pod_mac,
                        },
                        Op::Neighbour {
                            side: Side::Pod,
                            ifname: pair.pod.clone(),
                            address: gateway(address),
                            mac: pair.host_mac,
                        },
                        Op::Route {
                            side: Side::Pod,
                            ifname: pair.pod.clone(),
                            to: default_route(address),
                            via: Some(gateway(address)),
                        },
                    ] {
                        assert!(ops.contains(&needed), "{needed}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_v6_only_pod_has_no_ipv4_at_all() {
        for interfaces in [Interfaces::Split, Interfaces::Shared] {
            let facts = facts(false, interfaces);
            assert!(!standing(&facts).iter().any(|op| match op {
                Op::Address { address, .. } => address.addr().is_ipv4(),
                Op::Route { to, .. } => to.addr().is_ipv4(),
                Op::Neighbour { address, .. } => address.is_ipv4(),
                _ => false,
            }));
            assert_eq!(result(&facts, "/n").ips.len(), 1);
        }
    }

    /// How containerd (go-cni `createResult`) files the addresses of a result, by interface name.
    fn filed_by_containerd(success: &Success) -> BTreeMap<String, Vec<IpAddr>> {
        let mut filed: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
        for ip in &success.ips {
            let name = match ip.interface {
                Some(index) => success.interfaces[index].name.clone(),
                None => "eth0".to_owned(),
            };
            filed.entry(name).or_default().push(ip.address.addr());
        }
        filed
    }

    #[test]
    fn containerd_finds_both_addresses_on_eth0_in_every_version() {
        for interfaces in [Interfaces::Split, Interfaces::Shared] {
            let facts = facts(true, interfaces);
            for version in Version::ALL {
                let json = result(&facts, "/run/netns/x").to_json(version);
                let filed = filed_by_containerd(&Success::parse(&json).unwrap());
                let expected: Vec<IpAddr> = vec![facts.v6.into(), facts.v4.expect("dual").into()];
                assert_eq!(filed["eth0"], expected, "{interfaces:?} {version}");
            }
        }
    }

    #[test]
    fn the_interfaces_of_a_split_pod() {
        let pairs = facts(true, Interfaces::Split).pairs();
        let names: Vec<_> = pairs.iter().map(|p| p.pod.as_str()).collect();
        assert_eq!(names, ["eth0", "eth1"]);
        let macs: std::collections::BTreeSet<_> = pairs
            .iter()
            .flat_map(|p| [p.host_mac.0, p.pod_mac.0])
            .collect();
        assert_eq!(macs.len(), 4);
        assert!(macs.iter().all(|m| m[0] & 3 == 2), "local, unicast");
    }

    #[test]
    fn second_names() {
        for (first, second) in [
            ("eth0", "eth1"),
            ("net9", "net10"),
            ("pod", "pod1"),
            ("abcdefghijklmn9", "abcdefghijklm10"),
            ("7", "8"),
        ] {
            assert_eq!(second_name(first), second);
            assert!(second.len() <= names::MAX_NAME);
        }
    }
}
