//! `bgp`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use super::place::{is_unicast, nets};
use crate::scalar::parse_count;
use crate::sections::{Advertise, Bgp, BgpPeer, Families};
use crate::yaml::{Cursor, Fields};

/// RFC 6793 §9: stands in for four-octet AS numbers where a speaker has only two octets.
const AS_TRANS: u32 = 23456;

/// Peers of one node: two routers and spares; each costs a task and a socket.
const MAX_PEERS: usize = 64;

pub(super) fn read(f: Fields<'_, '_>) -> Bgp {
    let peers: Vec<BgpPeer> = match f.get("peers") {
        Some(list) => peers(&list),
        None => Vec::new(),
    };
    let enabled = f
        .get("enabled")
        .and_then(|c| c.boolean())
        .unwrap_or(!peers.is_empty());
    if let Some(c) = f.get("enabled")
        && enabled
        && peers.is_empty()
        && f.get("peers").is_none()
    {
        c.warn(
            "true, without `peers`",
            "nothing is announced until there is a peer",
        );
    }
    let asn = match f.get("asn") {
        Some(c) => asn(&c),
        None if enabled => f
            .require("asn", "write this node's AS number, such as 64512")
            .and(None),
        None => None,
    };
    let router_id = f.get("routerId").and_then(|c| {
        let id = c.v4()?;
        if id.is_unspecified() {
            c.fault(
                "0.0.0.0",
                "a BGP identifier is a non-zero IPv4 address (RFC 6286 §2.1)",
            );
        }
        Some(id)
    });
    let empty = super::empty();
    let bgp = Bgp {
        enabled,
        // Without a speaker the number is never used.
        asn: asn.unwrap_or(0),
        router_id,
        listen: f.get("listen").and_then(|c| c.endpoint()).flatten(),
        peers,
        advertise: advertise(f.section("advertise", &empty)),
        // RFC 4724 §3: twelve bits of seconds.
        graceful_restart: super::duration(
            &f,
            "gracefulRestart",
            Duration::from_secs(120),
            Duration::ZERO,
            Duration::from_secs(4095),
        ),
    };
    f.finish();
    bgp
}

fn asn(c: &Cursor<'_, '_>) -> Option<u32> {
    let value = c.scalar(
        "an AS number",
        "write a number from 1 to 4294967294, such as 64512",
        parse_asn,
    )?;
    let why = match value {
        0 => "0 is no AS (RFC 7607)",
        AS_TRANS => "23456 is AS_TRANS, a stand-in (RFC 6793 §9)",
        65_535 | u32::MAX => "reserved (RFC 7300)",
        _ => return Some(value),
    };
    c.fault(why, "write this network's AS number, such as 64512");
    None
}

/// asplain, or asdot (`1.10`), RFC 5396 §2.
fn parse_asn(text: &str) -> Option<u32> {
    match text.split_once('.') {
        None => text
            .bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| parse_count(text))
            .flatten(),
        Some((high, low)) => {
            let (high, low): (u16, u16) = (high.parse().ok()?, low.parse().ok()?);
            Some(u32::from(high) << 16 | u32::from(low))
        }
    }
}

fn peers(list: &Cursor<'_, '_>) -> Vec<BgpPeer> {
    let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
    let mut peers = Vec::new();
    for c in list.elements() {
        if peers.len() == MAX_PEERS {
            c.fault(format_args!("more than {MAX_PEERS} peers"), "remove some");
            break;
        }
        let Some(peer) = peer(c.fields()) else {
            continue;
        };
        if !names.insert(peer.name.clone()) {
            c.fault(
                format_args!("a second peer called `{}`", peer.name),
                "give each peer its own name",
            );
        }
        if !addresses.insert((peer.address, peer.interface.clone(), peer.port)) {
            c.fault(
                format_args!("a second peer at {}", peer.address),
                "a session is per address: remove one",
            );
        }
        peers.push(peer);
    }
    peers
}

fn peer(f: Fields<'_, '_>) -> Option<BgpPeer> {
    let address = f
        .require("address", "write the peer's address")
        .and_then(|c| {
            let address = c.ip()?;
            if !is_unicast(address) {
                c.fault(
                    format_args!("{address} is no host's address"),
                    "write the peer's own address",
                );
            }
            Some(address)
        });
    let asn = f
        .require("asn", "write the peer's AS number")
        .and_then(|c| asn(&c));
    let interface = f.get("interface").and_then(|c| c.interface());
    let link_local = matches!(address, Some(IpAddr::V6(a)) if a.is_unicast_link_local());
    if link_local && f.get("interface").is_none() {
        f.cursor().fault(
            "a link-local address without `interface`",
            "write the interface that leads to the peer: every link has fe80::/10",
        );
    }
    if let Some(c) = f.get("interface")
        && address.is_some()
        && !link_local
    {
        c.fault("only link-local peers have one", "remove it");
    }
    let source = f.get("source").and_then(|c| {
        let source = c.ip()?;
        if address.is_some_and(|a| a.is_ipv4() != source.is_ipv4()) {
            c.fault(
                format_args!("{source} is of the other family"),
                "write an address of the same family as `address`",
            );
        }
        Some(source)
    });
    let hold = f.get("hold").map_or(Some(Duration::from_secs(9)), |c| {
        let hold = c.duration()?;
        let whole = hold.subsec_nanos() == 0;
        // RFC 4271 §4.2: sixteen bits of seconds, zero or at least three.
        if !whole || matches!(hold.as_secs(), 1 | 2) || hold.as_secs() > 65_535 {
            c.fault(
                format_args!("a hold time of {} s", hold.as_secs_f64()),
                "write 0, or whole seconds from 3s to 65535s (RFC 4271 §4.2)",
            );
            return None;
        }
        Some(hold)
    });
    let name = f
        .get("name")
        .and_then(|c| c.string())
        .or_else(|| address.map(|a| a.to_string()));
    let port = f
        .get("port")
        .map_or(Some(179), |c| c.count(1, 65_535).map(|p| p as u16));
    let families = match f.get("families") {
        Some(c) => families(&c),
        None => Some(Families { v4: true, v6: true }),
    };
    let md5_file = f.get("md5File").and_then(|c| c.absolute_path());
    let gtsm = f.get("gtsm").and_then(|c| c.boolean()).unwrap_or(false);
    f.finish();
    Some(BgpPeer {
        name: name?,
        address: address?,
        interface,
        asn: asn?,
        port: port?,
        source,
        families: families?,
        hold: hold?,
        md5_file,
        gtsm,
    })
}

fn families(list: &Cursor<'_, '_>) -> Option<Families> {
    let mut families = Families {
        v4: false,
        v6: false,
    };
    for c in list.elements() {
        match c.choice(&[("ipv4", false), ("ipv6", true)])? {
            false => families.v4 = true,
            true => families.v6 = true,
        }
    }
    if !families.v4 && !families.v6 {
        list.fault("no family", "write [ipv4, ipv6], or one of them");
        return None;
    }
    Some(families)
}

fn advertise(f: Fields<'_, '_>) -> Advertise {
    let flag = |name| f.get(name).and_then(|c| c.boolean()).unwrap_or(true);
    let (extra, _) = nets(f.get("extra"), |c| c.any_net());
    let advertise = Advertise {
        blocks: flag("blocks"),
        vips: flag("vips"),
        nat64: flag("nat64"),
        extra,
    };
    f.finish();
    advertise
}
