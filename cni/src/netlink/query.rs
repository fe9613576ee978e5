//! The requests: what is asked of the kernel, in its own words.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use ipnet::IpNet;
use kun_cni_core::plan::{Ipv4Setting, Mac, Pair, ROUTE_PROTOCOL};
use netlink_packet_core::{DefaultNla, NLA_F_NESTED, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth,
    LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::{Query, family};

/// `IFLA_INET_CONF` (linux/ip.h).
const IFLA_INET_CONF: u16 = 1;

impl Query {
    /// A veth pair, both ends down, the far end in `netns` from the first moment.
    ///
    /// With one queue each way. The kernel would make one a processor, each with its files below /sys: most of what a pair costs
    /// on a large machine. They share no work between processors as long as the pair has neither XDP in the kernel's driver mode nor
    /// GRO: what is sent is received by the processor that sent it.
    pub fn create_pair(pair: &Pair, mtu: u32, netns: BorrowedFd<'_>) -> Self {
        let mut peer = LinkMessage::default();
        peer.attributes = vec![
            LinkAttribute::IfName(pair.pod.clone()),
            LinkAttribute::Address(pair.pod_mac.0.to_vec()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NetNsFd(netns.as_raw_fd()),
            LinkAttribute::NumTxQueues(1),
            LinkAttribute::NumRxQueues(1),
        ];
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(pair.host.clone()),
            LinkAttribute::Address(pair.host_mac.0.to_vec()),
            LinkAttribute::Mtu(mtu),
            LinkAttribute::NumTxQueues(1),
            LinkAttribute::NumRxQueues(1),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
            ]),
        ];
        Self {
            message: RouteNetlinkMessage::NewLink(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            asks: false,
        }
    }

    /// The interface of this name.
    pub fn link(name: &str) -> Self {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
        ];
        Self {
            message: RouteNetlinkMessage::GetLink(message),
            flags: 0,
            asks: true,
        }
    }

    /// The same, for what is missing alone: an address or route that is there already stays as it is, and the kernel says EEXIST.
    pub fn unless_there(mut self) -> Self {
        self.flags = NLM_F_CREATE | NLM_F_EXCL;
        self
    }

    /// Tags and settings; the kernel makes no link-local address on it.
    pub fn configure(name: &str, alias: Option<&str>, ipv4: &[(Ipv4Setting, u32)]) -> Self {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let mut families = vec![AfSpecUnspec::Inet6(vec![mode])];
        if !ipv4.is_empty() {
            families.push(AfSpecUnspec::Inet(vec![AfSpecInet::Other(ipv4_conf(ipv4))]));
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.into()),
            LinkAttribute::AfSpecUnspec(families),
        ];
        if let Some(alias) = alias {
            message
                .attributes
                .push(LinkAttribute::IfAlias(alias.into()));
        }
        Self {
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            asks: false,
        }
    }

    /// Administratively up.
    pub fn up(name: &str) -> Self {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.into()));
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        Self {
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            asks: false,
        }
    }

    /// Puts the interface into a group.
    pub fn group(index: u32, group: u32) -> Self {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Group(group));
        Self {
            message: RouteNetlinkMessage::SetLink(message),
            flags: 0,
            asks: false,
        }
    }

    /// Removes the interface of this index, and with it its peer.
    pub fn remove(index: u32) -> Self {
        let mut message = LinkMessage::default();
        message.header.index = index;
        Self {
            message: RouteNetlinkMessage::DelLink(message),
            flags: 0,
            asks: false,
        }
    }

    /// Removes the interfaces of a group, and with them their peers, addresses, routes and neighbours. All at once: most of the
    /// time is spent waiting until no processor looks at them any more.
    pub fn remove_group(group: u32) -> Self {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::Group(group));
        Self {
            message: RouteNetlinkMessage::DelLink(message),
            flags: 0,
            asks: false,
        }
    }

    /// An address that is usable at once.
    pub fn address(index: u32, address: IpNet) -> Self {
        let ip = address.addr();
        let mut message = AddressMessage::default();
        message.header.family = family(ip);
        message.header.index = index;
        message.header.prefix_len = address.prefix_len();
        message.header.scope = AddressScope::Universe;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        if ip.is_ipv6() {
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        Self {
            message: RouteNetlinkMessage::NewAddress(message),
            flags: NLM_F_CREATE | NLM_F_EXCL,
            asks: false,
        }
    }

    /// A permanent neighbour.
    pub fn neighbour(index: u32, address: IpAddr, mac: Mac) -> Self {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message.header.state = NeighbourState::Permanent;
        message.header.kind = RouteType::Unicast;
        message.attributes = vec![
            NeighbourAttribute::Destination(address.into()),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        Self {
            message: RouteNetlinkMessage::NewNeighbour(message),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            asks: false,
        }
    }

    /// Removes a neighbour entry.
    pub fn remove_neighbour(index: u32, address: IpAddr) -> Self {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message
            .attributes
            .push(NeighbourAttribute::Destination(address.into()));
        Self {
            message: RouteNetlinkMessage::DelNeighbour(message),
            flags: 0,
            asks: false,
        }
    }

    /// A route of ours in the main table. A route left over to the same destination gives way: the slot is ours now.
    pub fn route(index: u32, to: IpNet, via: Option<IpAddr>) -> Self {
        let mut message = RouteMessage::default();
        message.header.address_family = family(to.addr());
        message.header.destination_prefix_length = to.prefix_len();
        message.header.table = netlink_packet_route::route::RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(index));
        if to.prefix_len() > 0 {
            message
                .attributes
                .push(RouteAttribute::Destination(to.addr().into()));
        }
        match via {
            Some(via) => {
                message.header.scope = RouteScope::Universe;
                // The next hop is on no subnet of the interface.
                message.header.flags = RouteFlags::Onlink;
                message.attributes.push(RouteAttribute::Gateway(via.into()));
            }
            None if to.addr().is_ipv4() => message.header.scope = RouteScope::Link,
            None => message.header.scope = RouteScope::Universe,
        }
        Self {
            message: RouteNetlinkMessage::NewRoute(message),
            flags: NLM_F_CREATE | NLM_F_REPLACE,
            asks: false,
        }
    }
}

/// `IFLA_INET_CONF` as the kernel takes it: one attribute a setting, by its number in linux/ip.h.
fn ipv4_conf(settings: &[(Ipv4Setting, u32)]) -> DefaultNla {
    let mut bytes = Vec::new();
    for (setting, value) in settings {
        let number: u16 = match setting {
            Ipv4Setting::Forwarding => 1,
            Ipv4Setting::ProxyArp => 3,
            Ipv4Setting::RpFilter => 8,
        };
        bytes.extend(8_u16.to_ne_bytes());
        bytes.extend(number.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
    }
    DefaultNla::new(IFLA_INET_CONF | NLA_F_NESTED, bytes)
}
