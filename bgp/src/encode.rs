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
        let mut path = vec![PathAttribute::Origin(Origin::Igp)];
        // RFC 4271 §5.1.2: our own AS towards external peers, an empty path towards internal ones.
        let segments = if self.internal {
            Vec::new()
        } else {
            vec![AsPathSegment::AsSequence(vec![self.asn])]
        };
        path.push(PathAttribute::AsPath(AsPath { segments }));
        if self.internal {
            path.push(PathAttribute::LocalPref(LOCAL_PREF));
        }
        if !attributes.communities.is_empty() {
            path.push(PathAttribute::Communities(
                attributes.communities.iter().map(|c| c.0).collect(),
            ));
        }
        let (global, link_local) = match next_hop {
            NextHop::V4(address) if afi == Afi::Ipv4 => {
                path.push(PathAttribute::NextHop(address));
                return UpdateMessage::try_build(
                    &body_nlri(prefixes),
                    &[],
                    &path,
                    self.four_octet_as,
                    false,
                    Ipv4UnicastMode::Body,
                );
            }
            NextHop::V4(address) => (IpAddr::V4(address), None),
            NextHop::V6(global, link_local) => (IpAddr::V6(global), link_local),
        };
        path.push(PathAttribute::MpReachNlri(Box::new(MpReachNlri {
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
        })));
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
