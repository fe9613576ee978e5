//! Values that keep their place, for faults that only show when two of them meet.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net};

use crate::yaml::{Cursor, Mark};

/// A prefix and where it was written.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) net: IpNet,
    at: Mark,
    path: String,
}

impl Placed {
    pub(super) fn new(net: impl Into<IpNet>, c: &Cursor<'_, '_>) -> Self {
        Self {
            net: net.into(),
            at: c.at(),
            path: c.path(),
        }
    }
}

/// Reads a list of prefixes.
pub(super) fn nets<N: Copy + Into<IpNet>>(
    list: Option<Cursor<'_, '_>>,
    read: impl Fn(&Cursor<'_, '_>) -> Option<N>,
) -> (Vec<N>, Vec<Placed>) {
    let Some(list) = list else {
        return (Vec::new(), Vec::new());
    };
    list.elements()
        .filter_map(|c| read(&c).map(|net| (net, Placed::new(net, &c))))
        .unzip()
}

/// No two prefixes of the lists may share an address: neither within a list nor between them.
pub(super) fn check_overlaps(root: &Cursor<'_, '_>, ipam: &[Placed], nat64: &[Placed]) {
    let all: Vec<&Placed> = ipam.iter().chain(nat64).collect();
    for (i, later) in all.iter().enumerate() {
        for earlier in &all[..i] {
            if earlier.net.contains(&later.net) || later.net.contains(&earlier.net) {
                root.sink().fault(
                    Some(later.at),
                    later.path.clone(),
                    format_args!("{} overlaps {} ({})", later.net, earlier.path, earlier.net),
                    "an address has one use: make them disjoint",
                );
            }
        }
    }
}

/// Whether a prefix is outside what the IPv4 internet routes (IANA IPv4 special-purpose registry, Globally Reachable = False).
pub(super) fn is_non_global(net: Ipv4Net) -> bool {
    const SPECIAL: [&str; 14] = [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
    ];
    SPECIAL
        .iter()
        .filter_map(|s| s.parse::<Ipv4Net>().ok())
        .any(|special| special.contains(&net))
}

/// Whether an address is one that a host can have.
pub(super) fn is_unicast(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(a) if a.is_broadcast());
    !address.is_unspecified() && !address.is_multicast() && !broadcast
}
