//! Values that are written as text, each in one way only: what has two spellings is two values to whoever compares texts, such as
//! a field selector or a list that is a set (KEP-4858 asks the same of new fields).

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use kun_config::types::{BlockId, Slot};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::json;

use super::check::{Broken, CHECK, Check, VALIDATIONS, validation};

/// How the API server checks a text.
#[derive(Debug, Clone, Copy)]
pub enum Server {
    /// By a CEL rule; `self` is the text.
    Cel(&'static str),
    /// By a pattern, which costs nothing of the budget for rules.
    Pattern(&'static str),
}

/// A value that is written as text.
pub trait Written: fmt::Display + Sized + 'static {
    /// Names it among the checks.
    const NAME: &'static str;
    /// `an IPv4 prefix`
    const NOUN: &'static str;
    /// One, as it is written.
    const EXAMPLE: &'static str;
    /// Characters of the longest.
    const LONGEST: usize;
    /// For the API server.
    const SERVER: Server;

    /// Reads it. `None`: not one, or written in another way than [`fmt::Display`] does.
    fn read(text: &str) -> Option<Self>;

    /// What was surely meant by a text that is not one.
    fn meant(_text: &str) -> Option<String> {
        None
    }
}

/// A value that is written as text, with its schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Text<T>(pub T);

impl<T> Deref for Text<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: fmt::Display> fmt::Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn wrong<T: Written>(text: &str) -> Broken {
    let right = match T::meant(text) {
        Some(meant) => format!("write {meant}"),
        None => format!("write one such as {}", T::EXAMPLE),
    };
    Broken {
        field: "",
        wrong: format!("`{text}` is not {}", T::NOUN).into(),
        right: right.into(),
    }
}

impl<'de, T: Written> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        T::read(&text)
            .map(Text)
            .ok_or_else(|| de::Error::custom(wrong::<T>(&text).wrong))
    }
}

impl<T: Written> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<T: Written> JsonSchema for Text<T> {
    fn schema_name() -> Cow<'static, str> {
        T::NAME.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let mut schema =
            schemars::json_schema!({"type": "string", "maxLength": T::LONGEST, CHECK: T::NAME});
        match T::SERVER {
            Server::Cel(cel) => {
                let wrong = format!("not {}", T::NOUN);
                let right = format!("write one such as {}", T::EXAMPLE);
                let rule = validation(cel, "", &wrong, &right);
                schema.insert(VALIDATIONS.to_owned(), json!([rule]));
            }
            Server::Pattern(pattern) => {
                schema.insert("pattern".to_owned(), json!(pattern));
            }
        }
        schema
    }
}

impl Check {
    /// Of a value that is written as text.
    pub(super) const fn of_text<T: Written>() -> Self {
        Self {
            name: T::NAME,
            run: |value| {
                let text = value.as_str().unwrap_or_default();
                match T::read(text) {
                    Some(_) => Vec::new(),
                    None => vec![wrong::<T>(text)],
                }
            },
        }
    }
}

/// A value that is its own text again.
fn canonical<T: fmt::Display>(value: T, text: &str) -> Option<T> {
    (value.to_string() == text).then_some(value)
}

/// A prefix whose text is its own again without host bits.
fn network<T: fmt::Display>(net: Option<T>, trunc: impl Fn(&T) -> T, text: &str) -> Option<T> {
    canonical(trunc(&net?), text)
}

impl Written for Ipv4Net {
    const NAME: &'static str = "IPv4Prefix";
    const NOUN: &'static str = "an IPv4 prefix without host bits";
    const EXAMPLE: &'static str = "192.0.2.0/24";
    const LONGEST: usize = 18;
    const SERVER: Server = Server::Cel(
        "isCIDR(self) && cidr(self).ip().family() == 4 && string(cidr(self).masked()) == self",
    );

    fn read(text: &str) -> Option<Self> {
        network(text.parse().ok(), Ipv4Net::trunc, text)
    }

    fn meant(text: &str) -> Option<String> {
        let net: Ipv4Net = text.parse().ok()?;
        Some(net.trunc().to_string())
    }
}

impl Written for Ipv6Net {
    const NAME: &'static str = "IPv6Prefix";
    const NOUN: &'static str = "an IPv6 prefix without host bits, in its canonical text";
    const EXAMPLE: &'static str = "2001:db8::/64";
    const LONGEST: usize = 43;
    const SERVER: Server = Server::Cel(
        "isCIDR(self) && cidr(self).ip().family() == 6 && string(cidr(self).masked()) == self",
    );

    fn read(text: &str) -> Option<Self> {
        network(text.parse().ok(), Ipv6Net::trunc, text).filter(|net| !is_mapped(net.addr()))
    }

    fn meant(text: &str) -> Option<String> {
        let net: Ipv6Net = text.parse().ok()?;
        (!is_mapped(net.addr())).then(|| net.trunc().to_string())
    }
}

impl Written for IpNet {
    const NAME: &'static str = "Prefix";
    const NOUN: &'static str = "a prefix without host bits, in its canonical text";
    const EXAMPLE: &'static str = "192.0.2.0/24 or 2001:db8::/64";
    const LONGEST: usize = 43;
    const SERVER: Server = Server::Cel("isCIDR(self) && string(cidr(self).masked()) == self");

    fn read(text: &str) -> Option<Self> {
        match text.contains(':') {
            true => Ipv6Net::read(text).map(IpNet::V6),
            false => Ipv4Net::read(text).map(IpNet::V4),
        }
    }

    fn meant(text: &str) -> Option<String> {
        match text.contains(':') {
            true => Ipv6Net::meant(text),
            false => Ipv4Net::meant(text),
        }
    }
}

/// ::ffff:0:0/96 stands for IPv4 inside programs and is no address to write down (KEP-4858).
fn is_mapped(address: Ipv6Addr) -> bool {
    address.to_ipv4_mapped().is_some()
}

impl Written for Ipv4Addr {
    const NAME: &'static str = "IPv4Address";
    const NOUN: &'static str = "an IPv4 address";
    const EXAMPLE: &'static str = "192.0.2.1";
    const LONGEST: usize = 15;
    const SERVER: Server = Server::Cel("isIP(self) && ip(self).family() == 4");

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }
}

impl Written for Ipv6Addr {
    const NAME: &'static str = "IPv6Address";
    const NOUN: &'static str = "an IPv6 address in its canonical text, without a zone";
    const EXAMPLE: &'static str = "2001:db8::1";
    const LONGEST: usize = 39;
    const SERVER: Server =
        Server::Cel("isIP(self) && ip(self).family() == 6 && ip.isCanonical(self)");

    fn read(text: &str) -> Option<Self> {
        let address: Ipv6Addr = text.parse().ok()?;
        canonical(address, text).filter(|a| !is_mapped(*a))
    }

    fn meant(text: &str) -> Option<String> {
        let address: Ipv6Addr = text.parse().ok()?;
        Some(address.to_string()).filter(|_| !is_mapped(address))
    }
}

impl Written for IpAddr {
    const NAME: &'static str = "Address";
    const NOUN: &'static str = "an IP address in its canonical text, without a zone";
    const EXAMPLE: &'static str = "192.0.2.1 or 2001:db8::1";
    const LONGEST: usize = 39;
    const SERVER: Server = Server::Cel("isIP(self) && ip.isCanonical(self)");

    fn read(text: &str) -> Option<Self> {
        match text.contains(':') {
            true => Ipv6Addr::read(text).map(IpAddr::V6),
            false => Ipv4Addr::read(text).map(IpAddr::V4),
        }
    }

    fn meant(text: &str) -> Option<String> {
        Ipv6Addr::meant(text)
    }
}

/// The first slot of a block, written as the IPv4 address that it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FirstSlot(pub BlockId);

impl fmt::Display for FirstSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.first().fmt(f)
    }
}

impl Written for FirstSlot {
    const NAME: &'static str = "FirstSlot";
    const NOUN: &'static str =
        "the first slot of a block: an IPv4 address that is a multiple of 64";
    const EXAMPLE: &'static str = "10.64.0.64";
    const LONGEST: usize = 15;
    // 26 bits of prefix are the block: without its last six bits the address is the same.
    const SERVER: Server =
        Server::Cel("isCIDR(self + '/26') && string(cidr(self + '/26').masked().ip()) == self");

    fn read(text: &str) -> Option<Self> {
        let first: Ipv4Addr = text.parse().ok()?;
        BlockId::new(Slot::from(first)).map(FirstSlot)
    }

    fn meant(text: &str) -> Option<String> {
        let first: Ipv4Addr = text.parse().ok()?;
        Some(Slot::from(first).block().first().to_string())
    }
}

/// Declares a text type whose value is the text itself.
macro_rules! plain_text {
    ($(#[$doc:meta])* $name:ident, $noun:literal, $example:literal, $longest:literal, $pattern:literal, $fits:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(std::sync::Arc<str>);

        impl $name {
            /// As text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            /// As shared text.
            pub fn shared(&self) -> &std::sync::Arc<str> {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Written for $name {
            const NAME: &'static str = stringify!($name);
            const NOUN: &'static str = $noun;
            const EXAMPLE: &'static str = $example;
            const LONGEST: usize = $longest;
            const SERVER: Server = Server::Pattern($pattern);

            fn read(text: &str) -> Option<Self> {
                let fits: fn(&str) -> bool = $fits;
                (text.len() <= $longest && fits(text)).then(|| $name(text.into()))
            }
        }
    };
}

plain_text!(
    /// The name of an object: an RFC 1123 subdomain.
    Name,
    "a name (lower-case letters, digits, `-` and `.`)",
    "node-a",
    253,
    r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
    |text| text.split('.').all(|label| is_label(label, u8::is_ascii_lowercase))
);

plain_text!(
    /// A name of one label (RFC 1123), such as a namespace's or a port's.
    Label,
    "a name of one label (lower-case letters, digits and `-`)",
    "web",
    63,
    "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
    |text| is_label(text, u8::is_ascii_lowercase)
);

plain_text!(
    /// The name of a Linux network interface.
    InterfaceName,
    "an interface name",
    "eth0",
    15,
    r"^[A-Za-z0-9_-][A-Za-z0-9_.@-]*$",
    |text| {
        let inner = |c: u8| c.is_ascii_alphanumeric() || b"_.@-".contains(&c);
        text.bytes().all(inner) && !text.is_empty() && !text.starts_with(['.', '@'])
    }
);

plain_text!(
    /// A label's key: an optional prefix and a name.
    LabelKey,
    "a label's key",
    "topology.kubernetes.io/zone",
    317,
    r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$",
    |text| {
        let (prefix, name) = match text.split_once('/') {
            Some((prefix, name)) => (Some(prefix), name),
            None => (None, text),
        };
        let label = |label| is_label(label, u8::is_ascii_lowercase);
        prefix.is_none_or(|prefix| prefix.split('.').all(label)) && is_qualified(name)
    }
);

plain_text!(
    /// A label's value, which may be empty.
    LabelValue,
    "a label's value (letters, digits, `-`, `_` and `.`)",
    "a",
    63,
    "^([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?$",
    |text| text.is_empty() || is_qualified(text)
);

plain_text!(
    /// A UID that the API server gave.
    Uid,
    "an object's UID",
    "1b4e28ba-2fa1-11d2-883f-0016d3cca427",
    128,
    "^[A-Za-z0-9-]+$",
    |text| !text.is_empty() && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-')
);

plain_text!(
    /// A host's name in the DNS.
    HostName,
    "a host name",
    "api.example.org",
    253,
    r"^[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*$",
    |text| text.split('.').all(|label| is_label(label, u8::is_ascii_alphabetic))
);

plain_text!(
    /// The path of an HTTP request.
    HttpPath,
    "an absolute path",
    "/healthz",
    1024,
    r"^/[!-~]*$",
    |text| text.starts_with('/') && text.bytes().all(|c| c.is_ascii_graphic())
);

plain_text!(
    /// Who somebody is to the API server: a user name.
    UserName,
    "a user's name",
    "alice@example.org",
    253,
    r"^[!-~]+$",
    |text| !text.is_empty() && text.bytes().all(|c| c.is_ascii_graphic())
);

plain_text!(
    /// An Ed25519 signature in base64 (RFC 4648 §4): 64 octets, hence 86 characters and `==`.
    Signature,
    "an Ed25519 signature in base64: 86 characters and `==`",
    "…==",
    88,
    "^[A-Za-z0-9+/]{85}[AQgw]==$",
    |text| {
        let digit = |c: u8| c.is_ascii_alphanumeric() || c == b'+' || c == b'/';
        text.strip_suffix("==").is_some_and(|digits| {
            digits.len() == 86 && digits.bytes().all(digit) && digits.ends_with(['A', 'Q', 'g', 'w'])
        })
    }
);

fn is_label(label: &str, letter: fn(&u8) -> bool) -> bool {
    let edge = |c: Option<&u8>| c.is_some_and(|c| letter(c) || c.is_ascii_digit());
    let bytes = label.as_bytes();
    let inner = |c: &u8| letter(c) || c.is_ascii_digit() || *c == b'-';
    bytes.iter().all(inner) && edge(bytes.first()) && edge(bytes.last())
}

/// The name part of a label's key.
fn is_qualified(name: &str) -> bool {
    let edge = |c: Option<&u8>| c.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let inner = |c: &u8| c.is_ascii_alphanumeric() || b"_.-".contains(c);
    bytes.len() <= 63 && bytes.iter().all(inner) && edge(bytes.first()) && edge(bytes.last())
}

/// A moment, as RFC 3339 in UTC and whole seconds, as Kubernetes writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(jiff::Timestamp);

impl Moment {
    /// Seconds since 1970.
    pub fn unix(self) -> i64 {
        self.0.as_second()
    }

    /// At so many seconds since 1970; `None` outside the years 2000 to 2999.
    pub fn from_unix(seconds: i64) -> Option<Self> {
        let moment = Moment(jiff::Timestamp::from_second(seconds).ok()?);
        moment.to_string().starts_with('2').then_some(moment)
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Written for Moment {
    const NAME: &'static str = "Moment";
    const NOUN: &'static str = "a time in UTC and whole seconds (RFC 3339)";
    const EXAMPLE: &'static str = "2026-11-26T09:50:00Z";
    const LONGEST: usize = 20;
    // The pattern says the shape, and the millennium, at whose far ends no two implementations agree; `timestamp` fails on a 31st
    // of February.
    const SERVER: Server = Server::Cel(
        "self.matches('^2[0-9]{3}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$') && string(timestamp(self)) == self",
    );

    fn read(text: &str) -> Option<Self> {
        let moment = Moment(text.parse().ok()?);
        // A fraction makes the text longer, an offset makes it another one.
        let fits = text.len() == Self::LONGEST && text.starts_with('2');
        canonical(moment, text).filter(|_| fits)
    }

    fn meant(text: &str) -> Option<String> {
        let moment: jiff::Timestamp = text.parse().ok()?;
        Self::from_unix(moment.as_second()).map(|m| m.to_string())
    }
}
