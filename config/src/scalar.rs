//! Values as `kun.yaml` writes them: durations (`30s`, `1h30m`), counts (`100k`), prefixes without host bits, paths, names.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::yaml::Cursor;

/// `1h30m`, `45s`, `250ms`, `0`: digits and unit, repeated; units d, h, m, s, ms.
pub(crate) fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut total: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..digits].parse().ok()?;
        rest = &rest[digits..];
        let unit = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let millis: u64 = match &rest[..unit] {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return None,
        };
        rest = &rest[unit..];
        total = total.checked_add(number.checked_mul(millis)?)?;
    }
    (!text.is_empty()).then_some(Duration::from_millis(total))
}

/// `65536`, `65_536`, `64Ki`, `100k`, `1M`, `1Mi`.
pub(crate) fn parse_count(text: &str) -> Option<u32> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '_')
        .unwrap_or(text.len());
    let number: u64 = text[..digits].replace('_', "").parse().ok()?;
    let unit: u64 = match &text[digits..] {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        _ => return None,
    };
    u32::try_from(number.checked_mul(unit)?).ok()
}

/// A prefix, with the address that it would have without its host bits if it has some.
fn network<N: FromStr + PartialEq + ToString>(
    at: &Cursor<'_, '_>,
    noun: &str,
    example: &str,
    trunc: impl Fn(&N) -> N,
) -> Option<N> {
    let net: N = at.scalar(noun, format_args!("write one such as {example}"), |t| {
        t.parse().ok()
    })?;
    let truncated = trunc(&net);
    if truncated != net {
        at.fault(
            format_args!("`{}` has host bits", net.to_string()),
            format_args!("write {}", truncated.to_string()),
        );
        return None;
    }
    Some(net)
}

impl Cursor<'_, '_> {
    /// A duration: `30s`, `1h30m`.
    pub fn duration(&self) -> Option<Duration> {
        self.scalar(
            "a duration",
            "write a number and a unit (ms, s, m, h, d), such as 30s",
            parse_duration,
        )
    }

    /// A count within bounds: `65536`, `64Ki`, `100k`.
    pub fn count(&self, min: u32, max: u32) -> Option<u32> {
        let value = self.scalar(
            "a count",
            format_args!("write a number from {min} to {max}; k, M, Ki and Mi multiply"),
            parse_count,
        )?;
        if !(min..=max).contains(&value) {
            self.fault(
                format_args!("{value} is out of range"),
                format_args!("write a number from {min} to {max}"),
            );
            return None;
        }
        Some(value)
    }

    /// An IPv4 prefix without host bits.
    pub fn v4_net(&self) -> Option<Ipv4Net> {
        network(self, "an IPv4 prefix", "10.64.0.0/16", Ipv4Net::trunc)
    }

    /// An IPv6 prefix without host bits.
    pub fn v6_net(&self) -> Option<Ipv6Net> {
        network(self, "an IPv6 prefix", "2001:db8::/96", Ipv6Net::trunc)
    }

    /// A prefix of either family without host bits.
    pub fn any_net(&self) -> Option<IpNet> {
        network(
            self,
            "a prefix",
            "10.64.0.0/16 or 2001:db8::/64",
            IpNet::trunc,
        )
    }

    /// An IPv4 address.
    pub fn v4(&self) -> Option<Ipv4Addr> {
        self.scalar("an IPv4 address", "write one such as 192.0.2.1", |t| {
            t.parse().ok()
        })
    }

    /// An address of either family, without a zone.
    pub fn ip(&self) -> Option<IpAddr> {
        self.scalar(
            "an IP address",
            "write one such as 192.0.2.1 or 2001:db8::1",
            |t| {
                // `fe80::1%eth0` is refused: the interface has its own field.
                t.parse::<Ipv6Addr>()
                    .map(IpAddr::V6)
                    .ok()
                    .or_else(|| t.parse().ok())
            },
        )
    }

    /// An endpoint, or `off`.
    pub fn endpoint(&self) -> Option<Option<SocketAddr>> {
        self.scalar(
            "an address and port",
            "write one such as [::]:9466 or 127.0.0.1:9466, or off",
            |t| {
                if t == "off" {
                    return Some(None);
                }
                t.parse().ok().map(Some)
            },
        )
    }

    /// A non-empty string.
    pub fn string(&self) -> Option<String> {
        let text = self.text()?;
        if text.is_empty() {
            self.fault("empty", "write a value, or leave the field out");
            return None;
        }
        Some(text.to_owned())
    }

    /// A path that begins with `/`.
    pub fn absolute_path(&self) -> Option<PathBuf> {
        self.scalar("an absolute path", "write one that begins with /", |t| {
            t.starts_with('/').then(|| PathBuf::from(t))
        })
    }

    /// A Linux interface name: 1–15 bytes, no `/`, `:` or space, not `.` or `..`.
    pub fn interface(&self) -> Option<String> {
        self.scalar(
            "an interface name",
            "write one of up to 15 letters, such as eth0",
            |t| {
                let fits = (1..=15).contains(&t.len()) && t != "." && t != "..";
                (fits && !t.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()))
                    .then(|| t.to_owned())
            },
        )
    }

    /// A name of an API object (RFC 1123 subdomain).
    pub fn object_name(&self) -> Option<String> {
        self.scalar(
            "a name",
            "write lower-case letters, digits, `-` and `.`, at most 253",
            |t| {
                let inner =
                    |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || c == b'.';
                let edge = |c: Option<&u8>| {
                    c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
                };
                let b = t.as_bytes();
                (b.len() <= 253
                    && b.iter().copied().all(inner)
                    && edge(b.first())
                    && edge(b.last()))
                .then(|| t.to_owned())
            },
        )
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        let right = format!("write {}", words.join(" or "));
        self.scalar("known here", right, |t| {
            choices
                .iter()
                .find(|(word, _)| *word == t)
                .map(|(_, value)| *value)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        let secs = Duration::from_secs;
        for (text, want) in [
            ("0", Some(Duration::ZERO)),
            ("0s", Some(Duration::ZERO)),
            ("30s", Some(secs(30))),
            ("5m", Some(secs(300))),
            ("1h30m", Some(secs(5400))),
            ("1d", Some(secs(86_400))),
            ("250ms", Some(Duration::from_millis(250))),
            ("", None),
            ("30", None),
            ("s", None),
            ("-3s", None),
            ("1.5s", None),
            ("3 s", None),
            ("1y", None),
            ("99999999999999999999s", None),
            ("18446744073709551615d", None),
        ] {
            assert_eq!(parse_duration(text), want, "{text:?}");
        }
    }

    #[test]
    fn counts() {
        for (text, want) in [
            ("0", Some(0)),
            ("65_536", Some(65_536)),
            ("64Ki", Some(65_536)),
            ("100k", Some(100_000)),
            ("1M", Some(1_000_000)),
            ("1Mi", Some(1 << 20)),
            ("4294967295", Some(u32::MAX)),
            ("4294967296", None),
            ("4Gi", None),
            ("", None),
            ("-1", None),
            ("1.5k", None),
        ] {
            assert_eq!(parse_count(text), want, "{text:?}");
        }
    }
}
