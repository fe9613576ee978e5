//! What the agent asks the kernel about interfaces: the node's own addresses, and a queue that keeps departure times.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd as _;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::net::sockopt;

use super::routes::{Netlink, RouteError};

/// Addresses of a node that host ports are on. One with more gives its first, in order; a host port is a frontend on each.
const MAX_ADDRESSES: usize = 64;

/// Marks the queue as ours.
const HANDLE: u16 = 0x6b;

/// Every address of this node that somebody may send to, its loopback ones included, in order.
pub(super) fn addresses() -> Result<Vec<IpAddr>, RouteError> {
    let mut netlink = Netlink::open()?;
    let mut found = Vec::new();
    netlink.send(
        RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        NLM_F_REQUEST | NLM_F_DUMP,
    )?;
    netlink.receive(|answer| {
        if let RouteNetlinkMessage::NewAddress(message) = answer {
            found.extend(usable(&message));
        }
    })??;
    found.sort_unstable();
    found.dedup();
    if found.len() > MAX_ADDRESSES {
        tracing::debug!(
            left_out = found.len() - MAX_ADDRESSES,
            "host ports are on {MAX_ADDRESSES} addresses at most"
        );
        found.truncate(MAX_ADDRESSES);
    }
    Ok(found)
}

/// The interfaces of this namespace that have a clsact queueing discipline, where filters are, by index: one dump of all.
pub(super) fn with_filters() -> Result<BTreeSet<u32>, RouteError> {
    let mut netlink = Netlink::open()?;
    let mut found = BTreeSet::new();
    netlink.send(
        RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()),
        NLM_F_REQUEST | NLM_F_DUMP,
    )?;
    netlink.receive(|answer| {
        if let RouteNetlinkMessage::NewQueueDiscipline(message) = answer
            && is_clsact(&message)
        {
            found.insert(message.header.index.cast_unsigned());
        }
    })??;
    Ok(found)
}

fn is_clsact(message: &TcMessage) -> bool {
    let mut attributes = message.attributes.iter();
    attributes.any(|a| matches!(a, TcAttribute::Kind(kind) if kind == "clsact"))
}

/// The two ends of a clsact queueing discipline (linux/pkt_sched.h: TC_H_MIN_INGRESS, TC_H_MIN_EGRESS).
const HOOKS: [u16; 2] = [0xfff2, 0xfff3];

/// Whether an interface has filters of this priority in both directions.
pub(super) fn has_filters(index: u32, priority: u16) -> Result<bool, RouteError> {
    let mut netlink = Netlink::open()?;
    for minor in HOOKS {
        let mut message = TcMessage::default();
        message.header.index = index.cast_signed();
        message.header.parent = TcHandle {
            major: u16::MAX,
            minor,
        };
        netlink.send(
            RouteNetlinkMessage::GetTrafficFilter(message),
            NLM_F_REQUEST | NLM_F_DUMP,
        )?;
        let mut found = false;
        // An interface that has no such discipline has no filters.
        let _ = netlink.receive(|answer| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
                // The upper half is the priority. Each is told of once more without its filters.
                let (of, handle) = (filter.header.info >> 16, filter.header.handle);
                found |= of == u32::from(priority) && handle != TcHandle::UNSPEC;
            }
        })?;
        if !found {
            return Ok(false);
        }
    }
    Ok(true)
}

/// RTNLGRP_TC (linux/rtnetlink.h).
const TC_GROUP: u32 = 4;

/// Bytes that may wait for a look: each filter that an ADD makes is told too, some eight in as many kilobytes, and a look is a second away.
const LISTENING_BUFFER: usize = 4 << 20;

/// Datagrams of one look. The rest waits for the next.
const MAX_DATAGRAMS: usize = 16_384;

/// Hears of filters and queueing disciplines that are taken away, whoever does it.
#[derive(Debug)]
pub(super) struct Taken {
    socket: Socket,
}

/// What was taken away since the last look.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Losses {
    /// From these interfaces.
    pub(super) interfaces: BTreeSet<u32>,
    /// Messages were lost: it may be others too.
    pub(super) unsure: bool,
}

impl Taken {
    /// From now on, in this network namespace.
    pub(super) fn listen() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // As root no limit of the system's holds.
        let sized = sockopt::set_socket_recv_buffer_size_force(socket.as_fd(), LISTENING_BUFFER);
        sized.map_err(io::Error::from)?;
        socket.set_non_blocking(true)?;
        socket.add_membership(TC_GROUP)?;
        Ok(Self { socket })
    }

    /// What went since the last call; waits for nothing. Filters of other priorities than these are not ours.
    pub(super) fn look(&mut self, priorities: &[u16]) -> io::Result<Losses> {
        let mut losses = Losses::default();
        for _ in 0..MAX_DATAGRAMS {
            match self.socket.recv_from_full() {
                Ok((bytes, _)) => losses.take(&bytes, priorities),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.raw_os_error() == Some(rustix::io::Errno::NOBUFS.raw_os_error()) => {
                    losses.unsure = true
                }
                Err(e) => return Err(e),
            }
        }
        Ok(losses)
    }
}

impl Losses {
    fn take(&mut self, bytes: &[u8], priorities: &[u16]) {
        let mut rest = bytes;
        while !rest.is_empty() {
            // What cannot be read may have been anything.
            let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else {
                self.unsure = true;
                return;
            };
            let length = (message.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            let NetlinkPayload::InnerMessage(message) = message.payload else {
                continue;
            };
            let index = match message {
                RouteNetlinkMessage::DelQueueDiscipline(gone) if is_clsact(&gone) => {
                    gone.header.index
                }
                RouteNetlinkMessage::DelTrafficFilter(gone)
                    if priorities
                        .iter()
                        .any(|p| u32::from(*p) == gone.header.info >> 16) =>
                {
                    gone.header.index
                }
                _ => continue,
            };
            self.interfaces.insert(index.cast_unsigned());
        }
    }
}

/// The interfaces of [`with_filters`], by name.
pub(super) fn named_with_filters() -> Result<Vec<String>, RouteError> {
    let indices = with_filters()?;
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    )
    .map_err(io::Error::from)?;
    // One that went meanwhile has no name.
    Ok((indices.iter())
        .filter_map(|&index| rustix::net::netdevice::index_to_name(&socket, index).ok())
        .collect())
}

fn usable(message: &AddressMessage) -> Option<IpAddr> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            // Of a point-to-point interface the address is the peer's.
            AddressAttribute::Local(a) => local = Some(*a),
            AddressAttribute::Address(a) => address = Some(*a),
            _ => {}
        }
    }
    let address: IpAddr = local.or(address)?;
    let scope = message.header.scope;
    let good = match address {
        // 127.0.0.1 alone of its net: the maps know addresses.
        IpAddr::V4(a) if a.is_loopback() => a == std::net::Ipv4Addr::LOCALHOST,
        IpAddr::V6(a) if a.is_loopback() => true,
        _ => scope == AddressScope::Universe || scope == AddressScope::Site,
    };
    good.then_some(address)
}

/// Gives an interface `fq`, which lets each packet leave at its time; false: this kernel has none.
pub(super) fn pace(index: u32) -> Result<bool, RouteError> {
    queue(index, "fq")
}

fn queue(index: u32, kind: &str) -> Result<bool, RouteError> {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle {
        major: HANDLE,
        minor: 0,
    };
    message.attributes.push(TcAttribute::Kind(kind.into()));
    let mut netlink = Netlink::open()?;
    // One that is there already is changed in nothing, and keeps its packets.
    netlink.send(
        RouteNetlinkMessage::NewQueueDiscipline(message),
        NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
    )?;
    match netlink.receive(|_| {})? {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use kun_harness::{Netns, require_root, require_tool};

    use super::*;

    #[test]
    fn loopback_and_global_addresses_are_found_and_link_local_ones_are_not() {
        if !require_root() || !require_tool("ip") {
            return;
        }
        let netns = Netns::new("addresses").unwrap();
        for words in [
            "link set lo up",
            "addr add 127.0.0.5/8 dev lo",
            "addr add 192.0.2.7/32 dev lo",
            "addr add 169.254.9.9/32 scope link dev lo",
            "addr add 2001:db8::7/128 dev lo",
            "addr add fe80::7/64 dev lo",
        ] {
            netns.exec(words).unwrap();
        }
        let found: Vec<String> = (netns.run(addresses).unwrap().iter())
            .map(ToString::to_string)
            .collect();
        assert_eq!(found, ["127.0.0.1", "192.0.2.7", "::1", "2001:db8::7"]);
    }

    /// With a queue that every kernel has: `fq` is a module.
    #[test]
    fn a_queue_is_given_once_and_one_that_the_kernel_lacks_is_told() {
        if !require_root() || !require_tool("tc") {
            return;
        }
        let netns = Netns::new("queue").unwrap();
        assert!(!netns.run(|| queue(1, "no-such-queue")).unwrap());
        for _ in 0..2 {
            assert!(netns.run(|| queue(1, "pfifo")).unwrap());
        }
        let mut show = Command::new("tc");
        show.args(["qdisc", "show", "dev", "lo"]);
        let shown = String::from_utf8(netns.output(show).unwrap().stdout).unwrap();
        assert!(shown.contains("qdisc pfifo 6b: root"), "{shown}");
        assert!(netns.run(|| queue(12345, "pfifo")).is_err());
    }
}
