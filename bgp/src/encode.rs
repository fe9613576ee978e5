//! Deltas as UPDATE messages: as many prefixes a message as fit, one set of path attributes a group.
//!
//! IPv4 travels in the message body with NEXT_HOP (RFC 4271 §4.3), or in MP_REACH_NLRI where its next hop is IPv6 (RFC 8950); IPv6 always
//! in MP_REACH_NLRI (RFC 4760). Nothing here reads.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytes::BytesMut;
use ipnet::IpNet;
use kun_bgp_core::{Attributes, Delta, Route};
use rustbgpd_wire::{
    Afi, AsPath, AsPathSegment, EncodeError, Ipv4NlriEntry, Ipv4Prefix, Ipv4UnicastMode,
    Ipv6Prefix, MAX_MESSAGE_LEN, MpReachNlri, MpUnreachNlri, NlriEntry, Origin, PathAttribute,
    Prefix, Safi, UpdateMessage,
};

/// LOCAL_PREF of every route towards an internal peer (RFC 4271 §5.1.5): the customary default.
const LOCAL_PREF: u32 = 100;

/// Where a family's traffic is to be sent: this speaker, by the session's own addresses (RFC 4271 §5.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NextHop {
    /// An IPv4 address.
    V4(Ipv4Addr),
    /// An IPv6 address, and the link-local one beside it on a shared link (RFC 2545 §3).
    V6(Ipv6Addr, Option<Ipv6Addr>),
}

/// What the session decides about every UPDATE on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Context {
    /// Our AS.
    pub(crate) asn: u32,
    /// The peer is in our AS.
    pub(crate) internal: bool,
    /// Both speak four-octet AS numbers (RFC 6793).
    pub(crate) four_octet_as: bool,
    /// Next hop of IPv4 routes; `None`: the family is not on this session.
    pub(crate) v4: Option<NextHop>,
    /// Next hop of IPv6 routes; `None`: the family is not on this session.
    pub(crate) v6: Option<NextHop>,
}

impl Context {
    /// Whether the session carries the prefix's family.
    pub(crate) fn carries(&self, prefix: &IpNet) -> bool {
        self.next_hop(family(prefix)).is_some()
    }

    fn next_hop(&self, afi: Afi) -> Option<NextHop> {
        match afi {
            Afi::Ipv4 => self.v4,
            _ => self.v6,
        }
    }

    /// Appends the messages that put `delta` into effect: withdrawals first, so that a peer at its limit has room. Prefixes
    /// of families that the session does not carry are passed over.
    pub(crate) fn updates(&self, delta: &Delta, out: &mut BytesMut) -> Result<u64, EncodeError> {
        let mut messages = 0;
        for afi in [Afi::Ipv4, Afi::Ipv6] {
            let Some(next_hop) = self.next_hop(afi) else {
                continue;
            };
            let body = afi == Afi::Ipv4 && matches!(next_hop, NextHop::V4(_));
            let gone: Vec<Prefix> = delta
                .withdraw
                .iter()
                .filter(|p| family(p) == afi)
                .map(wire_prefix)
                .collect();
            for chunk in chunks(&gone, room(&self.withdrawal(afi, body, &[])?)) {
                self.withdrawal(afi, body, chunk)?.encode(out)?;
                messages += 1;
            }
            let mut groups: BTreeMap<&Attributes, Vec<Prefix>> = BTreeMap::new();
            for Route {
                prefix, attributes, ..
            } in delta.announce.iter().filter(|r| family(&r.prefix) == afi)
            {
                groups
                    .entry(attributes)
                    .or_default()
                    .push(wire_prefix(prefix));
            }
            for (attributes, prefixes) in groups {
                let empty = self.announcement(afi, next_hop, attributes, &[])?;
                for chunk in chunks(&prefixes, room(&empty)) {
                    self.announcement(afi, next_hop, attributes, chunk)?
                        .encode(out)?;
                    messages += 1;
                }
            }
        }
        Ok(messages)
    }

    /// Appends End-of-RIB for every family on the session (RFC 4724 §2).
    pub(crate) fn end_of_rib(&self, out: &mut BytesMut) -> Result<u64, EncodeError> {
        let mut messages = 0;
        for afi in [Afi::Ipv4, Afi::Ipv6] {
            if self.next_hop(afi).is_some() {
                self.withdrawal(afi, afi == Afi::Ipv4, &[])?.encode(out)?;
                messages += 1;
            }
        }
        Ok(messages)
    }

    fn withdrawal(
        &self,
        afi: Afi,
        body: bool,
        prefixes: &[Prefix],
    ) -> Result<UpdateMessage, EncodeError> {
        if body {
            return UpdateMessage::try_build(
                &[],
                &body_nlri(prefixes),
                &[],
                self.four_octet_as,
                false,
                Ipv4UnicastMode::Body,
            );
        }
        let attribute = PathAttribute::MpUnreachNlri(Box::new(MpUnreachNlri {
            afi,
            safi: Safi::Unicast,
            withdrawn: mp_nlri(prefixes),
            flowspec_withdrawn: Vec::new(),
            evpn_withdrawn: Vec::new(),
            bgpls_withdrawn: Vec::new(),
            vpn_withdrawn: Vec::new(),
            labeled_withdrawn: Vec::new(),
            rtc_withdrawn: Vec::new(),
        }));
        UpdateMessage::try_build(
            &[],
            &[],
            &[attribute],
            self.four_octet_as,
            false,
            Ipv4UnicastMode::MpReach,
        )
    }

    fn announcement(
        &self,
        afi: Afi,
        next_hop: NextHop,
        attributes: &Attributes,
        prefixes: &[Prefix],
    ) -> Result<UpdateMessage, EncodeError> {
        // RFC 4271 §5.1.2: our own AS towards external peers, an empty path towards internal ones.
        let segments = match self.internal {
            true => Vec::new(),
            false => vec![AsPathSegment::AsSequence(vec![self.asn])],
        };
        // Ascending by type, as RFC 4271 §5 wishes.
        let mut path = vec![
            PathAttribute::Origin(Origin::Igp),
            PathAttribute::AsPath(AsPath { segments }),
        ];
        let body = match next_hop {
            NextHop::V4(address) if afi == Afi::Ipv4 => Some(address),
            _ => None,
        };
        if let Some(address) = body {
            path.push(PathAttribute::NextHop(address));
        }
        if self.internal {
            path.push(PathAttribute::LocalPref(LOCAL_PREF));
        }
        if !attributes.communities.is_empty() {
            path.push(PathAttribute::Communities(
                attributes.communities.iter().map(|c| c.0).collect(),
            ));
        }
        if body.is_some() {
            return UpdateMessage::try_build(
                &body_nlri(prefixes),
                &[],
                &path,
                self.four_octet_as,
                false,
                Ipv4UnicastMode::Body,
            );
        }
        let (global, link_local) = match next_hop {
            NextHop::V4(address) => (IpAddr::V4(address), None),
            NextHop::V6(global, link_local) => (IpAddr::V6(global), link_local),
        };
        let reach = PathAttribute::MpReachNlri(Box::new(MpReachNlri {
            afi,
            safi: Safi::Unicast,
            next_hop: global,
            link_local_next_hop: link_local,
            announced: mp_nlri(prefixes),
            flowspec_announced: Vec::new(),
            evpn_announced: Vec::new(),
            bgpls_announced: Vec::new(),
            vpn_announced: Vec::new(),
            labeled_announced: Vec::new(),
            rtc_announced: Vec::new(),
        }));
        // RFC 7606 §5.1: before all others, so that a damaged attribute behind it leaves the routes readable.
        path.insert(0, reach);
        UpdateMessage::try_build(
            &[],
            &[],
            &path,
            self.four_octet_as,
            false,
            Ipv4UnicastMode::MpReach,
        )
    }
}

/// The bytes left for prefixes beside a message without any. One attribute length grows from one octet to two when it passes 255.
fn room(empty: &UpdateMessage) -> usize {
    usize::from(MAX_MESSAGE_LEN) - empty.encoded_len() - 1
}

/// Runs of prefixes that fit into `room` bytes each.
fn chunks(prefixes: &[Prefix], room: usize) -> impl Iterator<Item = &[Prefix]> {
    let mut rest = prefixes;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|p| {
            // RFC 4271 §4.3: a length octet and as many octets as the prefix needs.
            bytes += 1 + usize::from(p.prefix_len().div_ceil(8));
            bytes <= room
        });
        let n = fits.count();
        let (chunk, after) = rest.split_at(n);
        rest = after;
        (n > 0).then_some(chunk)
    })
}

fn family(prefix: &IpNet) -> Afi {
    match prefix {
        IpNet::V4(_) => Afi::Ipv4,
        IpNet::V6(_) => Afi::Ipv6,
    }
}

fn wire_prefix(prefix: &IpNet) -> Prefix {
    match prefix {
        IpNet::V4(p) => Prefix::V4(Ipv4Prefix::new(p.addr(), p.prefix_len())),
        IpNet::V6(p) => Prefix::V6(Ipv6Prefix::new(p.addr(), p.prefix_len())),
    }
}

fn body_nlri(prefixes: &[Prefix]) -> Vec<Ipv4NlriEntry> {
    prefixes
        .iter()
        .filter_map(|p| match p {
            Prefix::V4(prefix) => Some(Ipv4NlriEntry {
                path_id: 0,
                prefix: *prefix,
            }),
            Prefix::V6(_) => None,
        })
        .collect()
}

fn mp_nlri(prefixes: &[Prefix]) -> Vec<NlriEntry> {
    prefixes
        .iter()
        .map(|&prefix| NlriEntry { path_id: 0, prefix })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use kun_bgp_core::{Community, RouteSource};
    use proptest::prelude::*;
    use rustbgpd_wire::{Message, decode_message};

    use super::*;

    fn context(asn: u32, internal: bool) -> Context {
        Context {
            asn,
            internal,
            four_octet_as: true,
            v4: Some(NextHop::V4(Ipv4Addr::new(192, 0, 2, 2))),
            v6: Some(NextHop::V6("2001:db8::2".parse().unwrap(), None)),
        }
    }

    fn route(prefix: &str, communities: &[u32]) -> Route {
        Route {
            prefix: prefix.parse().unwrap(),
            source: RouteSource::Extra,
            attributes: Attributes {
                communities: communities.iter().map(|&c| Community(c)).collect(),
            },
        }
    }

    fn encoded(context: &Context, announce: Vec<Route>, withdraw: &[&str]) -> Vec<u8> {
        let withdraw = withdraw.iter().map(|p| p.parse().unwrap()).collect();
        let mut out = BytesMut::new();
        context
            .updates(&Delta { announce, withdraw }, &mut out)
            .unwrap();
        out.to_vec()
    }

    fn message(body: &[u8]) -> Vec<u8> {
        let length = (19 + body.len() as u16).to_be_bytes();
        [&[0xff; 16][..], &length, &[2], body].concat()
    }

    #[test]
    fn golden_bytes() {
        let external = context(4_200_000_001, false);
        let as_path = [0x40, 2, 6, 2, 1, 0xfa, 0x56, 0xea, 0x01];
        // 10.1.0.64/26 with GRACEFUL_SHUTDOWN, in the body.
        let v4 = [
            &[0, 0, 0, 27, 0x40, 1, 1, 0][..],
            &as_path,
            &[0x40, 3, 4, 192, 0, 2, 2, 0xc0, 8, 4, 0xff, 0xff, 0, 0],
            &[26, 10, 1, 0, 64],
        ]
        .concat();
        assert_eq!(
            encoded(&external, vec![route("10.1.0.64/26", &[0xffff_0000])], &[]),
            message(&v4)
        );
        // 2001:db8:1::/48, in MP_REACH_NLRI, and no NEXT_HOP.
        let next_hop = [0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
        let v6 = [
            &[0, 0, 0, 44, 0x80, 14, 28, 0, 2, 1, 16][..],
            &next_hop,
            &[0, 48, 0x20, 1, 0x0d, 0xb8, 0, 1],
            &[0x40, 1, 1, 0],
            &as_path,
        ]
        .concat();
        assert_eq!(
            encoded(&external, vec![route("2001:db8:1::/48", &[])], &[]),
            message(&v6)
        );
        // Withdrawals.
        assert_eq!(
            encoded(&external, vec![], &["10.1.0.64/26"]),
            message(&[0, 5, 26, 10, 1, 0, 64, 0, 0])
        );
        assert_eq!(
            encoded(&external, vec![], &["2001:db8:1::/48"]),
            message(&[
                0, 0, 0, 13, 0x80, 15, 10, 0, 2, 1, 48, 0x20, 1, 0x0d, 0xb8, 0, 1
            ])
        );
    }

    #[test]
    fn end_of_rib_is_the_empty_update() {
        let mut out = BytesMut::new();
        assert_eq!(context(1, false).end_of_rib(&mut out).unwrap(), 2);
        let v4 = message(&[0, 0, 0, 0]);
        let v6 = message(&[0, 0, 0, 6, 0x80, 15, 3, 0, 2, 1]);
        assert_eq!(out.to_vec(), [v4, v6].concat());
    }

    #[test]
    fn an_internal_peer_gets_local_pref_and_an_empty_path() {
        let bytes = encoded(&context(64513, true), vec![route("10.0.0.0/26", &[])], &[]);
        let parsed = table(&bytes).1;
        let attributes = &parsed[0];
        assert!(attributes.contains(&PathAttribute::LocalPref(100)));
        assert!(attributes.contains(&PathAttribute::AsPath(AsPath {
            segments: Vec::new()
        })));
    }

    /// What a peer holds after these bytes, by its communities; and the attributes of each message.
    fn table(mut bytes: &[u8]) -> (BTreeMap<IpNet, BTreeSet<u32>>, Vec<Vec<PathAttribute>>) {
        let (mut held, mut all) = (BTreeMap::new(), Vec::new());
        while !bytes.is_empty() {
            let length = usize::from(u16::from_be_bytes([bytes[16], bytes[17]]));
            let mut one = bytes::Bytes::copy_from_slice(&bytes[..length]);
            bytes = &bytes[length..];
            let Message::Update(update) = decode_message(&mut one, MAX_MESSAGE_LEN).unwrap() else {
                panic!("not an UPDATE")
            };
            let parsed = update.parse(true, false, &[]).unwrap();
            let communities = parsed.attributes.iter().find_map(|a| match a {
                PathAttribute::Communities(c) => Some(c.iter().copied().collect()),
                _ => None,
            });
            let communities: BTreeSet<u32> = communities.unwrap_or_default();
            let net = |p: &Prefix| format!("{p}").parse::<IpNet>().unwrap();
            for entry in &parsed.announced {
                held.insert(net(&Prefix::V4(entry.prefix)), communities.clone());
            }
            for attribute in &parsed.attributes {
                if let PathAttribute::MpReachNlri(reach) = attribute {
                    for entry in &reach.announced {
                        held.insert(net(&entry.prefix), communities.clone());
                    }
                }
            }
            all.push(parsed.attributes);
        }
        (held, all)
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_what_was_meant(
            v4 in proptest::collection::btree_map(any::<u32>(), 0u32..3, 0..3000),
            v6 in proptest::collection::btree_map(any::<u128>(), 0u32..3, 0..1000),
        ) {
            let four = v4.iter().map(|(&a, &c)| (IpNet::from(IpAddr::from(a.to_be_bytes())), c));
            let six = v6.iter().map(|(&a, &c)| (IpNet::from(IpAddr::from(a.to_be_bytes())), c));
            let want: BTreeMap<IpNet, BTreeSet<u32>> =
                four.chain(six).map(|(p, c)| (p, if c == 0 { BTreeSet::new() } else { BTreeSet::from([c]) })).collect();
            let announce = want.iter().map(|(p, c)| route(&p.to_string(), &c.iter().copied().collect::<Vec<_>>())).collect();
            let bytes = encoded(&context(64513, false), announce, &[]);
            let (held, messages) = table(&bytes);
            prop_assert_eq!(&held, &want);
            // Packed: a message more than the bytes need, at most, in each of six groups.
            let least = bytes.len() / usize::from(MAX_MESSAGE_LEN);
            prop_assert!(messages.len() <= least + 6 + 1, "{} messages for {} bytes", messages.len(), bytes.len());
        }
    }
}
