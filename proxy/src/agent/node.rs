//! The node itself: forwarding switched on, its uplinks found, its addresses towards the fabric.
//!
//! Reads `/proc/net` and writes `/proc/sys/net`, both of the network namespace that the agent runs in.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Where default routes are told, and which columns hold the interface, the destination and its prefix length.
const V6_ROUTES: &str = "/proc/net/ipv6_route";
const V4_ROUTES: &str = "/proc/net/route";

/// What forwarding needs. `accept_ra` 2: a forwarding host would otherwise lose the default route that a router advertises.
const SYSCTLS: [(&str, &str); 2] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
];

/// A sysctl that could not be set.
#[derive(Debug, thiserror::Error)]
#[error("/proc/sys/{name} cannot be set to {value} ({source}); pods would have no route out")]
pub(crate) struct SysctlError {
    name: String,
    value: &'static str,
    source: io::Error,
}

/// Lets this namespace forward; `uplinks` keep the routes that their routers advertise.
pub(crate) fn forward(uplinks: &[String]) -> Result<(), SysctlError> {
    for (name, value) in SYSCTLS {
        set(name.to_owned(), value)?;
    }
    for uplink in uplinks {
        let name = format!("net/ipv6/conf/{uplink}/accept_ra");
        // Absent or 0: nobody advertises there, and nothing is lost.
        if fs::read_to_string(format!("/proc/sys/{name}")).is_ok_and(|v| v.trim() == "1") {
            set(name, "2")?;
        }
    }
    Ok(())
}

fn set(name: String, value: &'static str) -> Result<(), SysctlError> {
    let path = format!("/proc/sys/{name}");
    if fs::read_to_string(&path).is_ok_and(|v| v.trim() == value) {
        return Ok(());
    }
    fs::write(&path, value).map_err(|source| SysctlError {
        name,
        value,
        source,
    })
}

/// The uplinks: the configured one, else those of the default routes.
pub(crate) fn uplinks(configured: Option<&str>) -> Vec<String> {
    match configured {
        Some(name) => vec![name.to_owned()],
        None => default_interfaces(),
    }
}

/// The interfaces of the default routes, IPv6's first, each once. Empty while there is none.
fn default_interfaces() -> Vec<String> {
    let v6 = fs::read_to_string(V6_ROUTES).unwrap_or_default();
    let v4 = fs::read_to_string(V4_ROUTES).unwrap_or_default();
    let mut found: Vec<String> = Vec::new();
    for name in parse_v6(&v6).chain(parse_v4(&v4)) {
        if name != "lo" && !found.iter().any(|f| f == name) {
            found.push(name.to_owned());
        }
    }
    found
}

/// Lines of `destination prefixlen source prefixlen nexthop metric refcount use flags interface`, in hexadecimal.
fn parse_v6(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter_map(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        let [destination, "00", _, _, _, _, _, _, flags, interface] = columns[..] else {
            return None;
        };
        // RTF_UP without RTF_REJECT (0x200): the kernel lists its "no route" entries here as well.
        let flags = u32::from_str_radix(flags, 16).ok()?;
        let good = flags & 0x1 != 0 && flags & 0x200 == 0;
        (good && destination.bytes().all(|b| b == b'0')).then_some(interface)
    })
}

/// Lines of `interface destination gateway flags refcount use metric mask …`, in hexadecimal, after a heading.
fn parse_v4(text: &str) -> impl Iterator<Item = &str> {
    text.lines().skip(1).filter_map(|line| {
        let columns: Vec<&str> = line.split_ascii_whitespace().collect();
        let [interface, "00000000", _, flags, _, _, _, "00000000", ..] = columns[..] else {
            return None;
        };
        let flags = u32::from_str_radix(flags, 16).ok()?;
        (flags & 0x1 != 0 && flags & 0x200 == 0).then_some(interface)
    })
}

/// The index of an interface of this namespace; `None`: there is none of that name.
pub(crate) fn interface_index(name: &str) -> Option<u32> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    rustix::net::netdevice::name_to_index(&socket, name).ok()
}

/// The BGP identifier where none is configured: the IPv4 address that the node would talk to the fabric with, else the low 32 bits
/// of the IPv6 one.
pub(crate) fn router_id() -> Option<Ipv4Addr> {
    // Connecting a UDP socket sends nothing: it asks the routing table. The destinations are for documentation (RFC 5737, 3849).
    let v4 = source_towards(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)));
    let v6 = source_towards(IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)));
    match (v4, v6) {
        (Some(IpAddr::V4(a)), _) if !a.is_loopback() => Some(a),
        (_, Some(IpAddr::V6(a))) => {
            let low = Ipv4Addr::from(u128::from(a) as u32);
            (!low.is_unspecified()).then_some(low)
        }
        _ => None,
    }
}

fn source_towards(destination: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match destination {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((destination, 9)).ok()?;
    socket.local_addr().ok().map(|a| a.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_and_no_others() {
        let v6 = "\
fd00000000000000000000000000000a 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000001 00000000 00000001     eth1
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fe800000000000000000000000000001 00000400 00000002 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 ffffffff 00000001 00000000 00200200       lo
";
        assert_eq!(parse_v6(v6).collect::<Vec<_>>(), ["eth0"]);
        let v4 = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth1\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF\t0\t0\t0
eth2\t00000000\t0100000A\t0003\t0\t0\t0\t00000000\t0\t0\t0
";
        assert_eq!(parse_v4(v4).collect::<Vec<_>>(), ["eth2"]);
    }

    #[test]
    fn an_interface_that_is_not_there_has_no_index() {
        assert!(interface_index("lo").is_some());
        assert_eq!(interface_index("nothing-of-it"), None);
    }
}
