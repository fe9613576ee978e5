//! `unreachable` routes for the blocks that this node owns, so that packets to a slot without a pod end here.
//!
//! The fabric sends a whole block to its owner; without these the node's default route would send what has no pod back, and the
//! packet would run to and fro until its hop limit ends it. Routes of ours carry protocol 107 (0x6b); pods' own routes are longer
//! and win. So does a link that has a whole block on it, as the bridge of another plugin that takes its addresses from kun: the
//! kernel's route to that has a lower metric. Other routes are never touched.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Marks what is ours.
const PROTOCOL: RouteProtocol = RouteProtocol::Other(0x6b);

/// After the kernel's own route to a link, which has none, and before any that a routing daemon makes of what it learns.
const METRIC_V4: u32 = 1;

/// The same: the kernel's own have 256. It is what IPv6 makes of no metric at all.
const METRIC_V6: u32 = 1024;

/// More answers than a routing table of any node holds: a dump that does not end is a bug, not a table.
const MAX_MESSAGES: usize = 1_000_000;

/// Why routes are not as they should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RouteError {
    /// Netlink.
    #[error("the kernel's routing socket: {0}")]
    Netlink(#[from] io::Error),
    /// An answer that cannot be read.
    #[error("the kernel's routing socket answered nonsense: {0}")]
    Decode(#[from] netlink_packet_core::DecodeError),
    /// The kernel refused.
    #[error("the kernel refused to {what} the unreachable route {net}: {source}")]
    Refused {
        /// `add` or `remove`.
        what: &'static str,
        /// Which.
        net: IpNet,
        /// Its word.
        source: io::Error,
    },
    /// A dump without end.
    #[error("the kernel's routing table has no end")]
    Endless,
}

/// A route of ours: destination and metric.
type Held = (IpNet, u32);

/// Makes the set of our `unreachable` routes equal to `wanted`. Adds before it removes; one of another metric, which an earlier
/// version made, gives way.
pub(crate) fn set(wanted: &BTreeSet<IpNet>) -> Result<(), RouteError> {
    let wanted: BTreeSet<Held> = wanted.iter().map(|net| (*net, metric(net))).collect();
    let mut netlink = Netlink::open()?;
    let held = netlink.held()?;
    for route in wanted.difference(&held) {
        netlink.change(*route, true)?;
    }
    for route in held.difference(&wanted) {
        netlink.change(*route, false)?;
    }
    Ok(())
}

fn metric(net: &IpNet) -> u32 {
    match net {
        IpNet::V4(_) => METRIC_V4,
        IpNet::V6(_) => METRIC_V6,
    }
}

/// A conversation with the kernel.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    pub(super) fn open() -> Result<Self, RouteError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    pub(super) fn send(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), RouteError> {
        let mut message = NetlinkMessage::from(message);
        self.sequence += 1;
        message.header.sequence_number = self.sequence;
        message.header.flags = flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        Ok(())
    }

    /// Hands every message of the answer to `each`; ends at the acknowledgement, `Done`, or an error, which is returned.
    pub(super) fn receive(
        &mut self,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> Result<Result<(), io::Error>, RouteError> {
        let mut seen = 0;
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                seen += 1;
                if seen > MAX_MESSAGES {
                    return Err(RouteError::Endless);
                }
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)?;
                // Lengths are padded to four bytes between messages.
                let length = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(Ok(())),
                    NetlinkPayload::Error(e) if e.code.is_none() => return Ok(Ok(())),
                    NetlinkPayload::Error(e) => return Ok(Err(e.to_io())),
                    NetlinkPayload::InnerMessage(inner) => each(inner),
                    _ => {}
                }
            }
        }
    }

    fn held(&mut self) -> Result<BTreeSet<Held>, RouteError> {
        let mut held = BTreeSet::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            self.send(
                RouteNetlinkMessage::GetRoute(message),
                NLM_F_REQUEST | NLM_F_DUMP,
            )?;
            self.receive(|answer| {
                if let RouteNetlinkMessage::NewRoute(route) = answer {
                    held.extend(ours(&route));
                }
            })??;
        }
        Ok(held)
    }

    /// Of two that differ in their metric alone the kernel removes the first, which is the lower one's, when that is none.
    fn change(&mut self, (net, metric): Held, add: bool) -> Result<(), RouteError> {
        let message = route(net, metric);
        let (message, flags, what) = if add {
            let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
            (RouteNetlinkMessage::NewRoute(message), flags, "add")
        } else {
            let flags = NLM_F_REQUEST | NLM_F_ACK;
            (RouteNetlinkMessage::DelRoute(message), flags, "remove")
        };
        self.send(message, flags)?;
        match self.receive(|_| {})? {
            // Somebody was there first, with the same aim.
            Err(e) if add && e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(source) => Err(RouteError::Refused { what, net, source }),
            Ok(()) => Ok(()),
        }
    }
}

fn route(net: IpNet, metric: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: match net {
            IpNet::V4(_) => AddressFamily::Inet,
            IpNet::V6(_) => AddressFamily::Inet6,
        },
        destination_prefix_length: net.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: PROTOCOL,
        scope: RouteScope::Universe,
        kind: RouteType::Unreachable,
        ..RouteHeader::default()
    };
    message
        .attributes
        .push(RouteAttribute::Destination(RouteAddress::from(net.addr())));
    message.attributes.push(RouteAttribute::Priority(metric));
    message
}

/// A route that this module made.
fn ours(route: &RouteMessage) -> Option<Held> {
    let header = &route.header;
    if header.kind != RouteType::Unreachable
        || header.protocol != PROTOCOL
        || header.table != RouteHeader::RT_TABLE_MAIN
    {
        return None;
    }
    let address = route
        .attributes
        .iter()
        .find_map(|a| match a {
            RouteAttribute::Destination(RouteAddress::Inet(a)) => Some(IpAddr::V4(*a)),
            RouteAttribute::Destination(RouteAddress::Inet6(a)) => Some(IpAddr::V6(*a)),
            _ => None,
        })
        // A default route has no destination.
        .unwrap_or(match header.address_family {
            AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            _ => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        });
    let metric = route.attributes.iter().find_map(|a| match a {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    let net = IpNet::new(address, header.destination_prefix_length).ok()?;
    Some((net, metric.unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use kun_harness::{Netns, require_root, require_tool};

    use super::*;

    fn shown(netns: &Netns, words: &str) -> String {
        let mut ip = Command::new("ip");
        ip.args(words.split_whitespace());
        String::from_utf8(netns.output(ip).unwrap().stdout).unwrap()
    }

    /// A bridge of another plugin has the first address of a block, with the block's length.
    #[test]
    fn a_block_on_a_link_is_reached_and_an_earlier_versions_route_gives_way() {
        if !require_root() || !require_tool("ip") {
            return;
        }
        let netns = Netns::new("blocks").unwrap();
        for words in [
            "link set lo up",
            "route add unreachable 10.64.0.0/26 proto 107",
            "link add name end type veth peer name other",
            "link set end up",
            "link set other up",
            "addr add 10.64.0.0/26 dev end",
            "addr add fd00:64::a40:0/122 dev end nodad",
        ] {
            netns.exec(words).unwrap();
        }
        let both: BTreeSet<IpNet> = ["10.64.0.0/26", "fd00:64::a40:0/122"]
            .into_iter()
            .map(|net| net.parse().unwrap())
            .collect();
        for _ in 0..2 {
            netns.run(|| set(&both)).unwrap();
        }
        assert_eq!(
            shown(&netns, "-4 route show proto 107").trim(),
            "unreachable 10.64.0.0/26 metric 1"
        );
        let v6 = shown(&netns, "-6 route show proto 107");
        assert!(v6.contains("unreachable fd00:64::a40:0/122"), "{v6}");
        for address in ["10.64.0.5", "fd00:64::a40:5"] {
            let way = shown(&netns, &format!("route get {address}"));
            assert!(way.contains("dev end"), "{address}: {way}");
        }
        netns.run(|| set(&BTreeSet::new())).unwrap();
        assert_eq!(shown(&netns, "-4 route show proto 107"), "");
        assert_eq!(shown(&netns, "-6 route show proto 107"), "");
    }
}
