//! A rtnetlink socket, synchronous: one batch out, its acknowledgements in.
//!
//! A socket belongs to the network namespace in which it was opened, whatever its thread does later. Requests of one batch are
//! sent with one call. The kernel works through all of them in order, tells of each that it refuses, and acknowledges the last.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

mod link;
mod query;

pub(crate) use link::Answer;
pub use link::Link;

/// Messages in one answer to a dump of one namespace: a node's links and a pod's addresses and routes, ten times over.
const MAX_DUMP: usize = 100_000;

/// The kernel sends datagrams of at most 32 KiB.
const DATAGRAM: usize = 32 << 10;

/// The kernel answers at once, unless somebody holds its one big network lock.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// linux/rtnetlink.h
const RTNLGRP_LINK: u32 = 1;

/// Bytes of messages that may wait for a listener.
const LISTENING_BUFFER: i32 = 4 << 20;

/// Why a conversation failed. What the kernel refuses is an `io::Error` beside it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The socket.
    #[error("rtnetlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The answer.
    #[error("rtnetlink answer: {0}")]
    Decode(#[from] netlink_packet_core::DecodeError),
    /// Read again and again, and never whole.
    #[error(
        "rtnetlink dump: interfaces, routes or neighbours changed each time while they were read"
    )]
    Disturbed,
    /// More than anybody has.
    #[error("rtnetlink dump: more than {MAX_DUMP} messages")]
    TooMany,
}

/// One request.
#[derive(Debug, Clone)]
pub struct Query {
    message: RouteNetlinkMessage,
    flags: u16,
    /// The answer is a message rather than an acknowledgement.
    asks: bool,
}

/// What a link message tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkChange {
    /// It is, or became, so.
    Now(Link),
    /// The interface of this index is gone.
    Gone(u32),
}

/// The socket.
#[derive(Debug)]
pub struct Rtnl {
    socket: Socket,
    sequence: u32,
    datagram: Vec<u8>,
}

impl Rtnl {
    /// A socket in the calling thread's network namespace.
    pub fn open() -> Result<Self, NetlinkError> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        rustix::net::sockopt::set_socket_timeout(
            socket.as_fd(),
            rustix::net::sockopt::Timeout::Recv,
            Some(ANSWER_WITHIN),
        )
        .map_err(io::Error::from)?;
        Ok(Self {
            socket,
            sequence: 0,
            datagram: Vec::with_capacity(DATAGRAM),
        })
    }

    /// A socket that hears of every change of a link.
    pub fn listen_to_links() -> Result<Self, NetlinkError> {
        let rtnl = Self::open()?;
        rtnl.socket.add_membership(RTNLGRP_LINK)?;
        // A burst of 2,500 pods is told in some kilobytes each.
        rtnl.socket.set_rx_buf_sz(LISTENING_BUFFER)?;
        Ok(rtnl)
    }

    /// The next changes; waits for them so long, and fails then with `WouldBlock`. Fails otherwise when messages were lost.
    pub fn link_changes(&mut self, within: Duration) -> Result<Vec<LinkChange>, NetlinkError> {
        rustix::net::sockopt::set_socket_timeout(
            self.socket.as_fd(),
            rustix::net::sockopt::Timeout::Recv,
            // Zero would be for ever.
            Some(within.max(Duration::from_millis(1))),
        )
        .map_err(io::Error::from)?;
        let mut changes = Vec::new();
        self.receive(|_, payload| match payload {
            NetlinkPayload::InnerMessage(Answer::Link(link)) => {
                changes.push(LinkChange::Now(link));
            }
            NetlinkPayload::InnerMessage(Answer::LinkGone(index)) => {
                changes.push(LinkChange::Gone(index));
            }
            _ => {}
        })?;
        Ok(changes)
    }

    /// Sends all requests at once; gives the kernel's verdict on each, in order, with the interface for those that ask for one.
    pub fn batch(
        &mut self,
        queries: &[Query],
    ) -> Result<Vec<io::Result<Option<Link>>>, NetlinkError> {
        let Some((last, before)) = queries.split_last() else {
            return Ok(Vec::new());
        };
        let mut bytes = Vec::new();
        let first = self.sequence + 1;
        for query in before {
            self.emit(query, 0, &mut bytes);
        }
        // A refusal is told without being asked for, and all of them before the last one's answer.
        self.emit(last, if last.asks { 0 } else { NLM_F_ACK }, &mut bytes);
        self.socket.send(&bytes, 0)?;
        let mut verdicts: Vec<io::Result<Option<Link>>> =
            queries.iter().map(|_| Ok(None)).collect();
        let mut done = false;
        while !done {
            self.receive(|header, payload| {
                let Some(index) = header.sequence_number.checked_sub(first) else {
                    return;
                };
                let Some(verdict) = verdicts.get_mut(index as usize) else {
                    return;
                };
                match payload {
                    NetlinkPayload::Error(e) if e.code.is_some() => *verdict = Err(e.to_io()),
                    NetlinkPayload::InnerMessage(Answer::Link(link)) => {
                        *verdict = Ok(Some(link));
                    }
                    _ => {}
                }
                done |= index as usize == queries.len() - 1;
            })?;
        }
        Ok(verdicts)
    }

    /// The index of the interface of this name: no message, and no wait for whoever changes some other interface. For those that should
    /// be there: of a name that it does not know the kernel looks for a module to load (SIOCGIFINDEX).
    pub fn index(&self, name: &str) -> Result<Option<u32>, NetlinkError> {
        match rustix::net::netdevice::name_to_index(self.socket.as_fd(), name) {
            Ok(index) => Ok(Some(index)),
            Err(rustix::io::Errno::NODEV) => Ok(None),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }

    /// The interface of this name.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>, NetlinkError> {
        let answer = self.batch(&[Query::link(name)])?.pop();
        Ok(answer.and_then(Result::ok).flatten())
    }

    /// The interface of this index.
    pub fn link_by_index(&mut self, index: u32) -> Result<Option<Link>, NetlinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        let answer = self.ask(RouteNetlinkMessage::GetLink(message))?;
        Ok(match answer {
            Ok(Answer::Link(link)) => Some(link),
            Ok(_) | Err(_) => None,
        })
    }

    /// Every interface; one that comes or goes meanwhile may hide another.
    pub fn links(&mut self) -> Result<Vec<Link>, NetlinkError> {
        Ok(self.links_and_whether_all()?.0)
    }

    /// Every interface, and whether none can be missing.
    pub(crate) fn links_and_whether_all(&mut self) -> Result<(Vec<Link>, bool), NetlinkError> {
        let mut message = LinkMessage::default();
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let mut links = Vec::new();
        let all = self.dump(RouteNetlinkMessage::GetLink(message), |answer| {
            if let Answer::Link(link) = answer {
                links.push(link);
            }
        })?;
        Ok((links, all))
    }

    /// The addresses on an interface.
    pub fn addresses(&mut self, index: u32) -> Result<Vec<IpNet>, NetlinkError> {
        let mut found = Vec::new();
        let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.dump(all, |answer| {
            if let Answer::Other(RouteNetlinkMessage::NewAddress(message)) = answer
                && message.header.index == index
            {
                found.extend(net(&message));
            }
        })?;
        Ok(found)
    }

    /// The interface through which the kernel would send to this address; `None`: no route.
    pub fn route_to(&mut self, address: IpAddr) -> Result<Option<u32>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(address);
        message.header.destination_prefix_length = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        message
            .attributes
            .push(RouteAttribute::Destination(address.into()));
        let answer = self.ask(RouteNetlinkMessage::GetRoute(message))?;
        Ok(match answer {
            Ok(Answer::Other(RouteNetlinkMessage::NewRoute(route))) => route
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    RouteAttribute::Oif(index) => Some(*index),
                    _ => None,
                }),
            Ok(_) | Err(_) => None,
        })
    }

    /// The number that this socket's namespace has given another one; `None`: it knows none of that name.
    pub fn netns_id(&mut self, netns: BorrowedFd<'_>) -> Result<Option<i32>, NetlinkError> {
        let mut message = NsidMessage::default();
        let fd = u32::try_from(netns.as_raw_fd()).unwrap_or(u32::MAX);
        message.attributes.push(NsidAttribute::Fd(fd));
        let answer = self.ask(RouteNetlinkMessage::GetNsId(message))?;
        Ok(match answer {
            Ok(Answer::Other(RouteNetlinkMessage::NewNsId(told))) => {
                told.attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        // -1: it has given it none.
                        NsidAttribute::Id(id) if *id >= 0 => Some(*id),
                        _ => None,
                    })
            }
            Ok(_) | Err(_) => None,
        })
    }

    /// The hardware address of a neighbour, if it is permanent.
    pub fn permanent_neighbour(
        &mut self,
        index: u32,
        address: IpAddr,
    ) -> Result<Option<Vec<u8>>, NetlinkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message
            .attributes
            .push(NeighbourAttribute::Destination(address.into()));
        let answer = self.ask(RouteNetlinkMessage::GetNeighbour(message))?;
        Ok(match answer {
            Ok(Answer::Other(RouteNetlinkMessage::NewNeighbour(neighbour)))
                if neighbour.header.state == NeighbourState::Permanent =>
            {
                neighbour
                    .attributes
                    .iter()
                    .find_map(|attribute| match attribute {
                        NeighbourAttribute::LinkLayerAddress(mac) => Some(mac.clone()),
                        _ => None,
                    })
            }
            Ok(_) | Err(_) => None,
        })
    }

    /// One question, one answer, or the kernel's refusal.
    fn ask(&mut self, message: RouteNetlinkMessage) -> Result<io::Result<Answer>, NetlinkError> {
        let mut bytes = Vec::new();
        let query = Query {
            message,
            flags: 0,
            asks: true,
        };
        self.emit(&query, 0, &mut bytes);
        let sequence = self.sequence;
        self.socket.send(&bytes, 0)?;
        let mut answer = None;
        while answer.is_none() {
            self.receive(|header, payload| {
                if header.sequence_number != sequence {
                    return;
                }
                answer = match payload {
                    NetlinkPayload::Error(e) => Some(Err(e.to_io())),
                    NetlinkPayload::InnerMessage(message) => Some(Ok(message)),
                    _ => None,
                };
            })?;
        }
        Ok(answer.unwrap_or_else(|| Err(io::ErrorKind::UnexpectedEof.into())))
    }

    /// Hands on what there is, message by message: all of a node's interfaces in one place would be tens of megabytes. Gives whether
    /// nothing changed meanwhile; else something that was there all the time may be missing (`NLM_F_DUMP_INTR`).
    pub(crate) fn dump(
        &mut self,
        message: RouteNetlinkMessage,
        mut take: impl FnMut(Answer),
    ) -> Result<bool, NetlinkError> {
        let mut bytes = Vec::new();
        let query = Query {
            message,
            flags: NLM_F_DUMP,
            asks: true,
        };
        self.emit(&query, 0, &mut bytes);
        let sequence = self.sequence;
        self.socket.send(&bytes, 0)?;
        let mut taken = 0;
        let mut end = None;
        let mut undisturbed = true;
        while end.is_none() {
            if taken > MAX_DUMP {
                return Err(NetlinkError::TooMany);
            }
            self.receive(|header, payload| {
                if header.sequence_number != sequence {
                    return;
                }
                undisturbed &= header.flags & NLM_F_DUMP_INTR == 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => {
                        taken += 1;
                        take(message);
                    }
                    NetlinkPayload::Done(done) if done.code == 0 => end = Some(Ok(())),
                    NetlinkPayload::Done(done) => {
                        end = Some(Err(io::Error::from_raw_os_error(
                            done.code.saturating_neg(),
                        )));
                    }
                    NetlinkPayload::Error(e) => end = Some(Err(e.to_io())),
                    _ => {}
                }
            })?;
        }
        end.unwrap_or(Ok(()))?;
        Ok(undisturbed)
    }

    fn emit(&mut self, query: &Query, more_flags: u16, bytes: &mut Vec<u8>) {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | query.flags | more_flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(query.message.clone()));
        message.finalize();
        let begin = bytes.len();
        // NLMSG_ALIGN
        bytes.resize(begin + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[begin..]);
    }

    /// Reads one datagram and hands over its messages.
    fn receive(
        &mut self,
        mut take: impl FnMut(NetlinkHeader, NetlinkPayload<Answer>),
    ) -> Result<(), NetlinkError> {
        self.datagram.clear();
        self.socket.recv(&mut self.datagram, 0)?;
        let mut rest = self.datagram.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<Answer>::deserialize(rest)?;
            let length = usize::try_from(message.header.length)
                .unwrap_or(usize::MAX)
                .next_multiple_of(4)
                .max(4);
            let (header, payload) = message.into_parts();
            take(header, payload);
            rest = rest.get(length..).unwrap_or_default();
        }
        Ok(())
    }
}

fn net(message: &AddressMessage) -> Option<IpNet> {
    // IPv4 has the address itself in IFA_LOCAL, IPv6 in IFA_ADDRESS.
    let find = |local: bool| {
        message
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(ip) if local => Some(*ip),
                AddressAttribute::Address(ip) if !local => Some(*ip),
                _ => None,
            })
    };
    let ip = find(true).or_else(|| find(false))?;
    IpNet::new(ip, message.header.prefix_len).ok()
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new interface while the list is told: the kernel says that something may be missing, and so does the dump.
    #[test]
    fn a_dump_that_something_changed_under_says_so() {
        if !kun_harness::require_root() {
            return;
        }
        let netns = kun_harness::Netns::new("dump").unwrap();
        // More than fit into the datagrams that the kernel fills ahead.
        for i in 0..100 {
            netns
                .exec(&format!("link add name a{i} type veth peer name b{i}"))
                .unwrap();
        }
        let mut rtnl = netns.run(Rtnl::open).unwrap();
        let (links, all) = rtnl.links_and_whether_all().unwrap();
        assert!(links.len() > 200 && all, "{} {all}", links.len());
        let mut told = 0;
        let undisturbed = rtnl
            .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()), |_| {
                if told == 0 {
                    netns
                        .exec("link add name new type veth peer name newer")
                        .unwrap();
                }
                told += 1;
            })
            .unwrap();
        assert!(told > 200 && !undisturbed, "{told} {undisturbed}");
    }
}
