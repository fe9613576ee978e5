//! `ipam`.

use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use super::place::{Placed, nets};
use crate::sections::{Interfaces, Ipam};
use crate::types::{PodPrefix, SlotClass};
use crate::yaml::Fields;

/// 240.0.0.0/4 (RFC 1112 §4, class E): never routed, so its addresses can be identifiers.
fn shadow() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 4)
}

/// A unique local prefix (RFC 4193) for clusters that did not choose one; `6b:756e` spells "kun".
fn default_pod_prefix() -> PodPrefix {
    let net = Ipv6Net::new_assert([0xfd6b, 0x756e, 0, 0x1, 0, 0, 0, 0].into(), 96);
    PodPrefix::new(net).expect("a /96 without host bits")
}

pub(super) fn read(f: Fields<'_, '_>) -> (Ipam, Vec<Placed>) {
    let mut places = Vec::new();
    let pod_prefix = f.get("podPrefix").and_then(|c| {
        let net = c.v6_net()?;
        places.push(Placed::new(net, &c));
        let prefix = PodPrefix::new(net);
        if prefix.is_none() {
            c.fault(
                format_args!("{net} is a /{}", net.prefix_len()),
                "write a /96: the last 32 bits of a pod's address are its slot",
            );
        }
        prefix
    });
    let (v4_pools, pool_places) = nets(f.get("v4Pools"), |c| {
        let net = c.v4_net()?;
        if shadow().contains(&net) || net.contains(&shadow()) {
            c.fault(
                format_args!("{net} meets 240.0.0.0/4"),
                "that range is for IPv6-only slots: put it into `v6OnlyPool`",
            );
            return None;
        }
        whole_blocks(c, net)
    });
    places.extend(pool_places);
    let v6_only_pool = f.get("v6OnlyPool").and_then(|c| {
        let net = c.v4_net()?;
        places.push(Placed::new(net, &c));
        if !shadow().contains(&net) {
            c.fault(
                format_args!("{net} is not inside 240.0.0.0/4"),
                "write a part of it, such as 240.0.0.0/8: an IPv6-only slot must not be a real IPv4 address",
            );
            return None;
        }
        whole_blocks(&c, net)
    });
    let default_class = f.get("defaultClass").and_then(|c| {
        let class = c.choice(&[("v6-only", SlotClass::V6Only), ("dual", SlotClass::Dual)])?;
        if class == SlotClass::Dual && f.get("v4Pools").is_none() {
            c.warn(
                "dual, without `v4Pools`",
                "IPv4 addresses then come from IPPool objects alone",
            );
        }
        Some(class)
    });
    let ipam = Ipam {
        pod_prefix: pod_prefix.unwrap_or_else(default_pod_prefix),
        v4_pools,
        v6_only_pool: v6_only_pool
            .unwrap_or_else(|| Ipv4Net::new_assert(Ipv4Addr::new(240, 0, 0, 0), 8)),
        default_class: default_class.unwrap_or(SlotClass::V6Only),
        interfaces: f
            .get("interfaces")
            .and_then(|c| c.choice(&[("split", Interfaces::Split), ("shared", Interfaces::Shared)]))
            .unwrap_or(Interfaces::Split),
        cooldown: cooldown(&f),
        quarantine_after: super::duration(
            &f,
            "quarantineAfter",
            Duration::from_secs(3600),
            Duration::from_secs(60),
            Duration::from_secs(30 * 86_400),
        ),
        return_blocks_after: super::duration(
            &f,
            "returnBlocksAfter",
            Duration::from_secs(1800),
            Duration::from_secs(1),
            Duration::from_secs(30 * 86_400),
        ),
        // 1280: RFC 8200 §5. 65535: a veth's limit.
        mtu: f.get("mtu").and_then(|c| c.count(1280, 65_535)),
    };
    f.finish();
    (ipam, places)
}

/// A pool is cut into /26 blocks.
fn whole_blocks(c: &crate::yaml::Cursor<'_, '_>, net: Ipv4Net) -> Option<Ipv4Net> {
    if net.prefix_len() > 26 {
        c.fault(
            format_args!("{net} is smaller than a block"),
            "write a /26 or larger: a node gets whole blocks of 64 slots",
        );
        return None;
    }
    Some(net)
}

fn cooldown(f: &Fields<'_, '_>) -> Duration {
    let default = Duration::from_secs(120);
    let value = super::duration(
        f,
        "cooldown",
        default,
        Duration::ZERO,
        Duration::from_secs(7 * 86_400),
    );
    if value < Duration::from_secs(30)
        && let Some(c) = f.get("cooldown")
    {
        c.warn(
            format_args!("{} s is shorter than what routers and resolvers remember", value.as_secs_f64()),
            "30s or more keeps an address from being reused while others still send to its last owner",
        );
    }
    value
}

/// Whether every address of `inner` is in one of the slots' ranges.
pub(super) fn covers(ipam: &Ipam, inner: Ipv4Net) -> bool {
    let inner = IpNet::V4(inner);
    let mut pools = ipam.v4_pools.iter().chain([&ipam.v6_only_pool]);
    pools.any(|pool| IpNet::V4(*pool).contains(&inner))
}
