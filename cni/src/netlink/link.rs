//! An interface as the kernel shows it, and how it is read out of a message.
//!
//! A link message has some sixty attributes, and a node shows thousands of links in one look. Nine of them are read here and
//! the rest is passed over; everything that is not a link is left to the codec.

use kun_cni_core::plan::Ipv6Setting;
use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NlaBuffer, NlasIterator, parse_i32,
    parse_string, parse_u8, parse_u32,
};
use netlink_packet_route::RouteNetlinkMessage;

/// linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;

/// `struct ifinfomsg`.
const HEADER: usize = 16;

/// linux/if.h
const IFF_UP: u32 = 1;
const IF_OPER_UP: u8 = 6;

/// linux/if_link.h
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINK: u16 = 5;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_LINK_NETNSID: u16 = 37;
const IFLA_CARRIER_DOWN_COUNT: u16 = 48;
const IFLA_INET6_CONF: u16 = 2;

/// linux/socket.h
const AF_INET6: u16 = 10;

/// Places in `IFLA_INET6_CONF` (linux/ipv6.h).
const DEVCONF_FORWARDING: usize = 0;
const DEVCONF_ACCEPT_RA: usize = 3;
const DEVCONF_PROXY_NDP: usize = 22;
const DEVCONF_DISABLE_IPV6: usize = 26;

/// An interface as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// MTU.
    pub mtu: u32,
    /// Hardware address.
    pub mac: Vec<u8>,
    /// ifalias.
    pub alias: Option<String>,
    /// Administratively up.
    pub up: bool,
    /// The kernel sends on it.
    pub running: bool,
    /// How often its carrier has gone. A new pair's ends have none: that is once.
    pub carrier_losses: u32,
    /// Index of a pair's other end, in its own namespace.
    pub peer: Option<u32>,
    /// The other end's namespace, by the number that this one has given it.
    pub peer_netns: Option<i32>,
    /// `net.ipv6.conf.<name>`, as far as anybody asks.
    ipv6: Option<Ipv6Conf>,
}

/// Some of an interface's IPv6 settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ipv6Conf {
    disabled: bool,
    forwarding: bool,
    accept_ra: i32,
    proxy_ndp: bool,
}

impl Link {
    /// Out of the payload of a message about a link.
    fn parse(payload: &[u8]) -> Result<Self, DecodeError> {
        let (header, attributes) = payload
            .split_at_checked(HEADER)
            .ok_or_else(|| DecodeError::from("a link message without a header"))?;
        let mut link = Self {
            index: parse_u32(&header[4..8])?,
            up: parse_u32(&header[8..12])? & IFF_UP != 0,
            ..Self::default()
        };
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            let value = attribute.value();
            match attribute.kind() {
                IFLA_ADDRESS => link.mac = value.to_vec(),
                IFLA_IFNAME => link.name = parse_string(value)?,
                IFLA_MTU => link.mtu = parse_u32(value)?,
                IFLA_LINK => link.peer = Some(parse_u32(value)?),
                IFLA_OPERSTATE => link.running = parse_u8(value)? == IF_OPER_UP,
                IFLA_IFALIAS => link.alias = Some(parse_string(value)?),
                IFLA_LINK_NETNSID => link.peer_netns = Some(parse_i32(value)?),
                IFLA_CARRIER_DOWN_COUNT => link.carrier_losses = parse_u32(value)?,
                IFLA_AF_SPEC => link.ipv6 = ipv6_conf(value)?,
                _ => {}
            }
        }
        Ok(link)
    }

    /// Whether it has this setting. What the kernel does not tell it has not.
    pub fn has(&self, setting: Ipv6Setting) -> bool {
        self.ipv6.is_some_and(|conf| match setting {
            Ipv6Setting::Enabled => !conf.disabled,
            Ipv6Setting::Forwarding => conf.forwarding,
            // Who forwards hears advertisements only with 2.
            Ipv6Setting::NoRouterAdvertisements => {
                conf.accept_ra == 0 || conf.accept_ra == 1 && conf.forwarding
            }
            Ipv6Setting::NoProxy => !conf.proxy_ndp,
        })
    }
}

fn ipv6_conf(families: &[u8]) -> Result<Option<Ipv6Conf>, DecodeError> {
    let Some(parts) = find(families, AF_INET6)? else {
        return Ok(None);
    };
    let Some(conf) = find(parts.value(), IFLA_INET6_CONF)? else {
        return Ok(None);
    };
    // The kernel appends to the array and never takes away.
    let at = |place: usize| match conf.value().chunks_exact(4).nth(place) {
        Some(value) => parse_i32(value),
        None => Err(DecodeError::from("too few IPv6 settings of a link")),
    };
    Ok(Some(Ipv6Conf {
        disabled: at(DEVCONF_DISABLE_IPV6)? != 0,
        forwarding: at(DEVCONF_FORWARDING)? != 0,
        accept_ra: at(DEVCONF_ACCEPT_RA)?,
        proxy_ndp: at(DEVCONF_PROXY_NDP)? != 0,
    }))
}

fn find(attributes: &[u8], kind: u16) -> Result<Option<NlaBuffer<&[u8]>>, DecodeError> {
    for attribute in NlasIterator::new(attributes) {
        let attribute = attribute?;
        if attribute.kind() == kind {
            return Ok(Some(attribute));
        }
    }
    Ok(None)
}

/// What the kernel says.
#[derive(Debug, Clone)]
pub(crate) enum Answer {
    /// An interface.
    Link(Link),
    /// The interface of this index is gone.
    LinkGone(u32),
    /// Anything else.
    Other(RouteNetlinkMessage),
}

impl NetlinkDeserializable for Answer {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(match header.message_type {
            RTM_NEWLINK => Self::Link(Link::parse(payload)?),
            RTM_DELLINK => Self::LinkGone(Link::parse(payload)?.index),
            _ => Self::Other(RouteNetlinkMessage::deserialize(header, payload)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
    use netlink_packet_route::link::{
        AfSpecInet6, AfSpecUnspec, Inet6DevConf, LinkAttribute, LinkFlags, LinkMessage, State,
    };

    fn read(bytes: &[u8]) -> Result<Answer, DecodeError> {
        let (_, payload) = NetlinkMessage::<Answer>::deserialize(bytes)?.into_parts();
        match payload {
            NetlinkPayload::InnerMessage(answer) => Ok(answer),
            other => panic!("{other:?}"),
        }
    }

    fn written(message: RouteNetlinkMessage) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn message() -> LinkMessage {
        let mut conf = Inet6DevConf::default();
        conf.forwarding = 1;
        conf.accept_ra = 2;
        conf.proxy_ndp = 1;
        let mut message = LinkMessage::default();
        message.header.index = 7;
        message.header.flags = LinkFlags::Up | LinkFlags::Running;
        message.attributes = vec![
            LinkAttribute::IfName("kun0".into()),
            LinkAttribute::Mtu(1450),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 9]),
            LinkAttribute::IfAlias("kun/1".into()),
            LinkAttribute::OperState(State::Up),
            LinkAttribute::CarrierDownCount(3),
            LinkAttribute::Link(2),
            LinkAttribute::LinkNetNsId(-1),
            LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::DevConf(
                conf,
            )])]),
        ];
        message
    }

    /// The codec writes, we read.
    #[test]
    fn each_attribute_is_read_from_where_the_codec_writes_it() {
        let Answer::Link(link) = read(&written(RouteNetlinkMessage::NewLink(message()))).unwrap()
        else {
            panic!("no link");
        };
        let expected = Link {
            index: 7,
            name: "kun0".into(),
            mtu: 1450,
            mac: vec![2, 0, 0, 0, 0, 9],
            alias: Some("kun/1".into()),
            up: true,
            running: true,
            carrier_losses: 3,
            peer: Some(2),
            peer_netns: Some(-1),
            ipv6: Some(Ipv6Conf {
                disabled: false,
                forwarding: true,
                accept_ra: 2,
                proxy_ndp: true,
            }),
        };
        assert_eq!(link, expected);
        let gone = read(&written(RouteNetlinkMessage::DelLink(message()))).unwrap();
        assert!(matches!(gone, Answer::LinkGone(7)), "{gone:?}");
    }

    /// A message that is cut anywhere is an error or a link with less in it, and never a panic.
    #[test]
    fn a_message_cut_short_does_no_harm() {
        let bytes = written(RouteNetlinkMessage::NewLink(message()));
        let header: NetlinkHeader = NetlinkMessage::<Answer>::deserialize(&bytes)
            .unwrap()
            .header;
        for end in 0..bytes.len() - 16 {
            let _ = Answer::deserialize(&header, &bytes[16..16 + end]);
        }
        assert!(Answer::deserialize(&header, &bytes[16..24]).is_err());
    }

    /// What the running kernel shows of its own interfaces, by ours and by the codec.
    #[test]
    fn the_kernels_own_links_are_read_as_the_codec_reads_them() {
        if !kun_harness::require_root() {
            return;
        }
        let netns = kun_harness::Netns::new("links").unwrap();
        for command in [
            "link add name a0 mtu 1400 type veth peer name a1",
            "link set a0 up alias ours",
            "link set a1 up",
        ] {
            netns.exec(command).unwrap();
        }
        let datagrams = netns.run(dumped).unwrap();
        let mut seen = 0;
        for bytes in &datagrams {
            let theirs = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes).unwrap();
            let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(theirs)) = theirs.payload
            else {
                continue;
            };
            let Answer::Link(ours) = read(bytes).unwrap() else {
                panic!("no link");
            };
            seen += 1;
            assert_eq!(ours.index, theirs.header.index);
            assert_eq!(ours.up, theirs.header.flags.contains(LinkFlags::Up));
            for attribute in theirs.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => assert_eq!(ours.name, name),
                    LinkAttribute::Mtu(mtu) => assert_eq!(ours.mtu, mtu),
                    LinkAttribute::Address(mac) => assert_eq!(ours.mac, mac),
                    LinkAttribute::IfAlias(alias) => assert_eq!(ours.alias, Some(alias)),
                    LinkAttribute::OperState(s) => assert_eq!(ours.running, s == State::Up),
                    LinkAttribute::CarrierDownCount(n) => assert_eq!(ours.carrier_losses, n),
                    LinkAttribute::Link(index) => assert_eq!(ours.peer, Some(index)),
                    LinkAttribute::LinkNetNsId(id) => assert_eq!(ours.peer_netns, Some(id)),
                    LinkAttribute::AfSpecUnspec(families) => {
                        let conf = families.iter().find_map(|family| match family {
                            AfSpecUnspec::Inet6(parts) => parts.iter().find_map(|p| match p {
                                AfSpecInet6::DevConf(conf) => Some(conf),
                                _ => None,
                            }),
                            _ => None,
                        });
                        let conf = conf.map(|conf| Ipv6Conf {
                            disabled: conf.disable_ipv6 != 0,
                            forwarding: conf.forwarding != 0,
                            accept_ra: conf.accept_ra,
                            proxy_ndp: conf.proxy_ndp != 0,
                        });
                        assert_eq!(ours.ipv6, conf);
                    }
                    _ => {}
                }
            }
        }
        assert_eq!(seen, 3, "lo, a0, a1");
    }

    /// Each message of a dump of all links, as it came.
    fn dumped() -> anyhow::Result<Vec<Vec<u8>>> {
        let mut socket = netlink_sys::Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
        let mut ask = NetlinkMessage::from(RouteNetlinkMessage::GetLink(LinkMessage::default()));
        ask.header.flags = netlink_packet_core::NLM_F_REQUEST | netlink_packet_core::NLM_F_DUMP;
        ask.finalize();
        let mut bytes = vec![0; ask.buffer_len()];
        ask.serialize(&mut bytes);
        socket.send(&bytes, 0)?;
        let mut all = Vec::new();
        loop {
            let mut datagram = Vec::with_capacity(32 << 10);
            socket.recv(&mut datagram, 0)?;
            let mut rest = datagram.as_slice();
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes(rest[..4].try_into()?) as usize;
                let kind = u16::from_ne_bytes(rest[4..6].try_into()?);
                if kind == 3 {
                    return Ok(all);
                }
                all.push(rest[..length].to_vec());
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}
