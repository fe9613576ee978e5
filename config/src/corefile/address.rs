//! Keys of server blocks and zone arguments: schemes, ports, names, and networks that stand for reverse zones.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::types::DnsName;

/// A key taken apart.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key {
    /// `dns`, `tls`, `quic`, `grpc`, `https`, `https3`, `unix`.
    pub(super) scheme: &'static str,
    /// One zone, or the reverse zones of a network.
    pub(super) zones: Vec<DnsName>,
    /// The port, where given.
    pub(super) port: Option<u16>,
}

const SCHEMES: &[&str] = &["dns", "tls", "quic", "grpc", "https", "https3", "unix"];

/// Takes `dns://example.org:1053` or `10.0.0.0/15:53` apart.
pub(super) fn key(text: &str) -> Result<Key, String> {
    let (scheme, rest) = match text.split_once("://") {
        None => (SCHEMES[0], text),
        Some((scheme, rest)) => (
            SCHEMES
                .iter()
                .copied()
                .find(|s| *s == scheme)
                .ok_or_else(|| format!("unknown scheme \"{scheme}://\""))?,
            rest,
        ),
    };
    let (zones, port) = split_host_port(rest)?;
    Ok(Key {
        scheme,
        zones,
        port,
    })
}

/// A zone argument of a plugin: a name or a network, no port.
pub(super) fn zones(text: &str) -> Result<Vec<DnsName>, String> {
    match split_host_port(text)? {
        (zones, None) => Ok(zones),
        (_, Some(port)) => Err(format!(
            "a zone without port was expected, \"{text}\" has port {port}"
        )),
    }
}

fn split_host_port(text: &str) -> Result<(Vec<DnsName>, Option<u16>), String> {
    // A number behind the last colon is a port: names hold no colon, and a network ends with its mask.
    let (host, port) = match text.rsplit_once(':') {
        Some((_, "")) => return Err(format!("nothing behind the last colon of \"{text}\"")),
        Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => {
            let port = port
                .parse()
                .ok()
                .filter(|p| *p != 0)
                .ok_or_else(|| format!("port {port} is outside 1 to 65535"))?;
            (host, Some(port))
        }
        _ => (text, None),
    };
    if let Ok(net) = host.parse::<IpNet>() {
        if host.starts_with(':') || (host.starts_with('0') && host.contains(':')) {
            return Err(format!("\"{host}\" cannot be written as a reverse zone"));
        }
        return Ok((reverse_zones(net.trunc()), port));
    }
    let name = DnsName::parse(host).map_err(|e| format!("\"{host}\" is not a zone: {e}"))?;
    Ok((vec![name], port))
}

/// The reverse zones that cover `net`: split up to the next octet (IPv4) or nibble (IPv6).
fn reverse_zones(net: IpNet) -> Vec<DnsName> {
    let step = if matches!(net, IpNet::V4(_)) { 8 } else { 4 };
    let len = net.prefix_len().div_ceil(step) * step;
    let parts = net
        .subnets(len)
        .expect("a longer prefix of the same family");
    parts
        .map(|n| reverse_zone(n.addr(), usize::from(len / step)))
        .collect()
}

/// The reverse zone of the first `units` octets or nibbles of `address`.
fn reverse_zone(address: IpAddr, units: usize) -> DnsName {
    let mut text = String::new();
    match address {
        IpAddr::V4(a) => {
            for octet in a.octets()[..units].iter().rev() {
                text.push_str(&format!("{octet}."));
            }
            text.push_str("in-addr.arpa.");
        }
        IpAddr::V6(a) => {
            let nibbles = a
                .octets()
                .into_iter()
                .flat_map(|o| [o >> 4, o & 15])
                .take(units)
                .collect::<Vec<_>>();
            for nibble in nibbles.iter().rev() {
                text.push_str(&format!("{nibble:x}."));
            }
            text.push_str("ip6.arpa.");
        }
    }
    DnsName::parse(&text).expect("at most 34 short labels")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> (String, Option<u16>) {
        let k = key(text).unwrap();
        (
            k.zones
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" "),
            k.port,
        )
    }

    #[test]
    fn keys() {
        for (text, zones, port) in [
            (".", ".", None),
            (".:53", ".", Some(53)),
            ("Example.ORG", "example.org.", None),
            ("dns://example.org.:1053", "example.org.", Some(1053)),
            ("10.0.0.0/15", "0.10.in-addr.arpa. 1.10.in-addr.arpa.", None),
            ("10.0.0.0/24:5300", "0.0.10.in-addr.arpa.", Some(5300)),
            (
                "10.9.3.0/18",
                &(0..64)
                    .map(|i| format!("{i}.9.10.in-addr.arpa."))
                    .collect::<Vec<_>>()
                    .join(" "),
                None,
            ),
            (
                "2001:db8::/29",
                &(8..16u8)
                    .map(|n| format!("{n:x}.b.d.0.1.0.0.2.ip6.arpa."))
                    .collect::<Vec<_>>()
                    .join(" "),
                None,
            ),
            ("fd00::/8", "d.f.ip6.arpa.", None),
        ] {
            assert_eq!(of(text), (zones.to_owned(), port), "{text}");
        }
        assert_eq!(key("tls://.").unwrap().scheme, "tls");
    }

    #[test]
    fn refused() {
        for text in [
            "::/64",
            "0::/64",
            "example.org:",
            "x:70000",
            "x:0",
            "a..b",
            "ftp://x",
        ] {
            assert!(key(text).is_err(), "{text}");
        }
    }
}
