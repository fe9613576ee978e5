//! The node itself: forwarding switched on, its uplinks found, its addresses towards the fabric.
//!
//! Reads `/proc/thread-self/net` and writes `/proc/sys/net`, both of the network namespace that the agent runs in.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use kun_cni::netlink::Rtnl;

/// Where default routes are told, and which columns hold the interface, the destination and its prefix length.
const V6_ROUTES: &str = "/proc/thread-self/net/ipv6_route";
const V4_ROUTES: &str = "/proc/thread-self/net/route";

/// Only a default route leads to these: they are for documentation (RFC 3849, RFC 5737).
const FAR: [IpAddr; 2] = [
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
];

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

/// Finds the uplinks again and again. The kernel tells default routes only together with all others, of which a dense node has
/// thousands; where one would lead is told at once.
#[derive(Debug)]
pub(crate) struct Uplinks {
    configured: Option<String>,
    read: Option<Read>,
}

/// What was found when all routes were read.
#[derive(Debug)]
struct Read {
    at: Instant,
    led_to: Hint,
    found: Vec<String>,
}

/// The interfaces of the default routes of both families, of several one.
type Hint = [Option<u32>; 2];

/// A second next hop of a default route that goes on leading where it led is found so late.
const READ_EVERY: Duration = Duration::from_secs(15);

impl Uplinks {
    pub(crate) fn new(configured: Option<&str>) -> Self {
        Self {
            configured: configured.map(str::to_owned),
            read: None,
        }
    }

    /// As [`uplinks`] finds them now, or found them a moment ago.
    pub(crate) fn find(&mut self) -> Vec<String> {
        if self.configured.is_some() {
            return uplinks(self.configured.as_deref());
        }
        let led_to = hint();
        if let Some(read) = &self.read
            && let Some(now) = led_to
            && read.led_to == now
            && read.at.elapsed() < READ_EVERY
        {
            return read.found.clone();
        }
        let found = default_interfaces();
        self.read = led_to.map(|led_to| Read {
            at: Instant::now(),
            led_to,
            found: found.clone(),
        });
        found
    }
}

/// `None`: the kernel cannot be asked.
fn hint() -> Option<Hint> {
    let mut rtnl = Rtnl::open().ok()?;
    let [v6, v4] = FAR.map(|address| rtnl.route_to(address).ok());
    Some([v6?, v4?])
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

/// The index of an interface of this namespace; `None`: there is none of that name. By a message: asked by SIOCGIFINDEX for a name
/// that it does not know, the kernel starts a program that looks for a module of that name.
pub(crate) fn interface_index(name: &str) -> Option<u32> {
    let found = Rtnl::open().and_then(|mut rtnl| rtnl.link(name));
    found.ok().flatten().map(|link| link.index)
}

/// The BGP identifier where none is configured: the IPv4 address that the node would talk to the fabric with, else the low 32 bits
/// of the IPv6 one.
pub(crate) fn router_id() -> Option<Ipv4Addr> {
    // Connecting a UDP socket sends nothing: it asks the routing table.
    let [v6, v4] = FAR.map(source_towards);
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
    fn another_uplink_is_found_at_once_and_a_further_one_soon() {
        if !kun_harness::require_root() {
            return;
        }
        let netns = kun_harness::Netns::new("uplinks").unwrap();
        let ip = |words: &str| netns.exec(words).unwrap();
        for (name, address) in [("up0", "fd00:a::1/64"), ("up1", "fd00:b::1/64")] {
            ip(&format!("link add {name} type veth peer name {name}-far"));
            ip(&format!("link set {name}-far up"));
            ip(&format!("link set {name} up"));
            ip(&format!("address add {address} dev {name} nodad"));
        }
        netns.run(|| {
            let mut uplinks = Uplinks::new(None);
            assert_eq!(uplinks.find(), [""; 0]);
            ip("-6 route add default via fd00:a::2");
            assert_eq!(uplinks.find(), ["up0"]);
            ip("-6 route replace default via fd00:b::2");
            assert_eq!(uplinks.find(), ["up1"]);
            // It goes on leading to the one, and the other is found when all routes are read.
            ip("-6 route append default via fd00:a::2 metric 2000");
            assert_eq!(uplinks.find(), ["up1"]);
            let read = uplinks.read.as_mut().expect("it was read");
            read.at -= READ_EVERY;
            assert_eq!(uplinks.find(), ["up1", "up0"]);
        });
    }

    #[test]
    fn an_interface_that_is_not_there_has_no_index() {
        assert!(interface_index("lo").is_some());
        assert_eq!(interface_index("nothing-of-it"), None);
    }
}
