//! `nat64`: prefixes by RFC 6052, port blocks.

use std::net::Ipv6Addr;

use ipnet::{Ipv4Net, Ipv6Net};

use super::ipam::covers;
use super::place::{Placed, is_non_global, nets};
use crate::sections::{Ipam, Nat64, Nat64Gateway};
use crate::yaml::{Cursor, Fields};

/// RFC 6052 §2.1.
fn well_known() -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96)
}

/// Ports below this are never given to a pod's block (RFC 6335 §6: system ports).
const SYSTEM_PORTS: u32 = 1024;

pub(super) fn read(f: Fields<'_, '_>, ipam: &Ipam) -> (Nat64, Vec<Placed>) {
    let (pref64, mut places) = nets(f.get("pref64"), pref64);
    let pref64 = if f.get("pref64").is_none() {
        vec![well_known()]
    } else {
        pref64
    };
    let port_block_bits = f
        .get("portBlockBits")
        .and_then(|c| c.count(6, 12))
        .unwrap_or(10) as u8;
    let local_port_base = local_port_base(&f, port_block_bits);
    let gateway = f.get("gateway").map(|c| {
        let g = c.fields();
        let gateway = gateway(&g, ipam, &pref64, port_block_bits, &mut places);
        g.finish();
        gateway
    });
    f.finish();
    let nat64 = Nat64 {
        pref64,
        gateway,
        port_block_bits,
        local_port_base,
    };
    (nat64, places)
}

fn pref64(c: &Cursor<'_, '_>) -> Option<Ipv6Net> {
    let net = c.v6_net()?;
    let length = net.prefix_len();
    if !matches!(length, 32 | 40 | 48 | 56 | 64 | 96) {
        c.fault(
            format_args!("/{length} is no Pref64 length"),
            "write a /32, /40, /48, /56, /64 or /96 (RFC 6052 §2.2)",
        );
        return None;
    }
    // RFC 6052 §2.2: bits 64 to 71 of the address are zero; only a /96 can get them wrong.
    if net.addr().octets()[8] != 0 {
        c.fault(
            format_args!("bits 64 to 71 of {net} are not zero"),
            "write a prefix whose ninth byte is 0 (RFC 6052 §2.2)",
        );
        return None;
    }
    Some(net)
}

fn local_port_base(f: &Fields<'_, '_>, bits: u8) -> u16 {
    let size = 1_u32 << bits;
    // The last block of the port space: far from every well-known service.
    let default = (65_536 - size) as u16;
    let Some(c) = f.get("localPortBase") else {
        return default;
    };
    let Some(base) = c.count(SYSTEM_PORTS, 65_535) else {
        return default;
    };
    if base % size != 0 {
        let (below, above) = (base / size * size, base / size * size + size);
        let fits = |n: &u32| (SYSTEM_PORTS..=u32::from(default)).contains(n);
        let near: Vec<String> = [below, above]
            .iter()
            .filter(|n| fits(n))
            .map(u32::to_string)
            .collect();
        c.fault(
            format_args!("{base} is not a multiple of {size} (2^portBlockBits)"),
            format_args!("write {}", near.join(" or ")),
        );
    } else if base + size > 65_536 {
        c.fault(
            format_args!("{size} ports from {base} reach past 65535"),
            format_args!("write {default} or less"),
        );
    }
    base as u16
}

fn gateway(
    g: &Fields<'_, '_>,
    ipam: &Ipam,
    pref64: &[Ipv6Net],
    bits: u8,
    places: &mut Vec<Placed>,
) -> Nat64Gateway {
    let pool_field = g.require(
        "pool",
        "write the IPv4 prefixes that translated flows come from",
    );
    let (pool, pool_places) = nets(pool_field, |c| {
        let net = c.v4_net()?;
        if net.addr().is_multicast()
            || net.addr().is_loopback()
            || net.addr().octets()[0] >= 240
            || net.addr().octets()[0] == 0
        {
            c.fault(
                format_args!("{net} cannot be a source address"),
                "write IPv4 prefixes that are routed to the gateway",
            );
            return None;
        }
        if is_non_global(net) && pref64.contains(&well_known()) {
            c.warn(
                format_args!("{net} is not globally routed, and 64:ff9b::/96 stands for the global IPv4 internet (RFC 6052 §3.1)"),
                "use a Pref64 of your own, or a pool that the internet routes to you",
            );
        }
        Some(net)
    });
    if let Some(c) = g.get("pool")
        && c.elements().next().is_none()
    {
        c.fault("an empty list", "a gateway needs at least one IPv4 address");
    }
    places.extend(pool_places);
    let (clients, _) = nets(g.get("clients"), |c| {
        let net = c.v4_net()?;
        if !covers(ipam, net) {
            c.warn(
                format_args!("{net} is in neither ipam.v4Pools nor ipam.v6OnlyPool"),
                "only slots that pods can have need port blocks",
            );
        }
        Some(net)
    });
    let clients = if g.get("clients").is_none() {
        default_clients(ipam)
    } else {
        clients
    };
    if let Some(c) = g.get("clients").or_else(|| g.get("pool")) {
        check_capacity(&c, &pool, &clients, bits);
    }
    if pref64.iter().any(|p| p.prefix_len() != 96) {
        g.cursor().fault(
            "the gateway translates /96 prefixes alone",
            "write a /96 into nat64.pref64, or leave `gateway` out",
        );
    }
    Nat64Gateway {
        pool,
        clients,
        slice: g.get("slice").and_then(|c| c.count(0, 15)).unwrap_or(0) as u8,
    }
}

/// Every slot that a pod can have, IPv6-only ones first, since they have no other way out.
fn default_clients(ipam: &Ipam) -> Vec<Ipv4Net> {
    [ipam.v6_only_pool]
        .into_iter()
        .chain(ipam.v4_pools.iter().copied())
        .collect()
}

/// Blocks of the pool: its last address serves what does not fit in a block.
fn check_capacity(c: &Cursor<'_, '_>, pool: &[Ipv4Net], clients: &[Ipv4Net], bits: u8) {
    let count = |nets: &[Ipv4Net]| {
        nets.iter()
            .map(|n| 1_u64 << (32 - n.prefix_len()))
            .sum::<u64>()
    };
    let per_address = (65_536_u64 >> bits) - u64::from(SYSTEM_PORTS.div_ceil(1 << bits));
    let blocks = count(pool).saturating_sub(1) * per_address;
    let slots = count(clients);
    if !pool.is_empty() && slots > blocks {
        c.warn(
            format_args!("{slots} slots, but the pool has {blocks} port blocks"),
            "the slots past the last block share the stateful slices: widen the pool, narrow the clients, or lower portBlockBits",
        );
    }
}
