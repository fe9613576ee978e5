//! Filters of the clsact queueing discipline: which are ours, and taking those away. One is ours by priority, handle and program's
//! name together. Others give their programs such names too (`uplink_ingress`), and may have our priorities (rtnetlink(7), `linux/pkt_cls.h`).

use std::io;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::object::Direction;
use crate::sys;

/// More filters than anybody gives one interface: a dump that does not end is a bug.
const MAX_MESSAGES: usize = 100_000;

/// `ETH_P_ALL`, as a filter's header has it: in network order.
const ALL_PROTOCOLS: u16 = 3_u16.to_be();

/// What a filter of ours is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mark<'a> {
    pub(crate) priority: u16,
    pub(crate) handle: u16,
    pub(crate) program: &'a str,
}

impl Mark<'_> {
    fn handle(&self) -> TcHandle {
        TcHandle {
            major: 0,
            minor: self.handle,
        }
    }

    fn is_on(&self, filter: &TcMessage) -> bool {
        // The upper half is the priority.
        (filter.header.info >> 16, filter.header.handle) == (self.priority.into(), self.handle())
            && filter.attributes.iter().any(|attribute| {
                let TcAttribute::Options(options) = attribute else {
                    return false;
                };
                options.iter().any(|option| {
                    matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(name)) if name == self.program)
                })
            })
    }
}

/// Removes our filter from an interface of the current network namespace; false: there is none, or no such interface.
pub(crate) fn remove(interface: &str, direction: Direction, mark: &Mark<'_>) -> io::Result<bool> {
    let Ok(index) = sys::interface_index(interface) else {
        return Ok(false);
    };
    let mut header = TcHeader {
        index: index.cast_signed(),
        // linux/pkt_sched.h: TC_H_CLSACT with TC_H_MIN_INGRESS or TC_H_MIN_EGRESS.
        parent: TcHandle {
            major: u16::MAX,
            minor: match direction {
                Direction::Ingress => 0xfff2,
                Direction::Egress => 0xfff3,
            },
        },
        ..TcHeader::default()
    };
    let mut found = false;
    let dump = RouteNetlinkMessage::GetTrafficFilter(message(&header));
    // Without such a discipline the kernel refuses, and there is no filter.
    let dumped = ask(dump, NLM_F_DUMP, |filter| found |= mark.is_on(&filter))?;
    if dumped.is_err() || !found {
        return Ok(false);
    }
    header.handle = mark.handle();
    header.info = u32::from(mark.priority) << 16 | u32::from(ALL_PROTOCOLS);
    ask(
        RouteNetlinkMessage::DelTrafficFilter(message(&header)),
        NLM_F_ACK,
        |_| {},
    )??;
    Ok(true)
}

fn message(header: &TcHeader) -> TcMessage {
    TcMessage::from_parts(header.clone(), Vec::new())
}

/// One request; each filter of the answer, then the kernel's verdict.
fn ask(
    request: RouteNetlinkMessage,
    flag: u16,
    mut each: impl FnMut(TcMessage),
) -> io::Result<io::Result<()>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | flag;
    request.header.sequence_number = 1;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    for _ in 0..MAX_MESSAGES {
        let (bytes, _) = socket.recv_from_full()?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                .map_err(io::Error::other)?;
            // Lengths are padded to four bytes between messages.
            let length = (answer.header.length as usize).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            match answer.payload {
                NetlinkPayload::Done(_) => return Ok(Ok(())),
                NetlinkPayload::Error(e) if e.code.is_none() => return Ok(Ok(())),
                NetlinkPayload::Error(e) => return Ok(Err(e.to_io())),
                NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewTrafficFilter(filter)) => {
                    each(filter);
                }
                _ => {}
            }
        }
    }
    Err(io::Error::other("a list of filters without end"))
}
