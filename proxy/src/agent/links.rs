//! What the agent asks the kernel about interfaces: the node's own addresses, and a queue that keeps departure times.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};

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
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle {
        major: HANDLE,
        minor: 0,
    };
    message.attributes.push(TcAttribute::Kind("fq".into()));
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
