//! What the BGP kinds share: AS numbers, communities, references to secrets.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::check::{Checked, Rule, attach};
use super::text::{Name, Server, Text, Written};

/// RFC 6793 §9: stands in for four-octet AS numbers where a speaker has only two octets.
const AS_TRANS: u32 = 23456;

/// The number of an autonomous system that a speaker may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Asn(pub u32);

impl Checked for Asn {
    const NAME: &'static str = "ASN";
    const RULES: &'static [Rule<Self>] = &[Rule {
        cel: "self != 23456 && self != 65535",
        holds: |asn| asn.0 != AS_TRANS && asn.0 != 65_535,
        field: "",
        wrong: "a reserved AS number (23456: RFC 6793 §9, 65535: RFC 7300)",
        right: "write the number of a network, such as 64512",
    }];
}

impl JsonSchema for Asn {
    fn schema_name() -> Cow<'static, str> {
        Self::NAME.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        // 0 is no AS (RFC 7607), 4294967295 is reserved (RFC 7300).
        let mut schema =
            schemars::json_schema!({"type": "integer", "minimum": 1, "maximum": 4_294_967_294_u32});
        attach::<Self>(&mut schema);
        schema
    }
}

/// A community (RFC 1997), or the name of a well-known one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Community(pub u32);

/// RFC 1997, RFC 7999, RFC 8326: communities that have a name.
const WELL_KNOWN: [(&str, u32); 5] = [
    ("graceful-shutdown", 0xffff_0000),
    ("blackhole", 0xffff_029a),
    ("no-export", 0xffff_ff01),
    ("no-advertise", 0xffff_ff02),
    ("no-export-subconfed", 0xffff_ff03),
];

impl Community {
    /// What is so marked does not leave the AS that hears it.
    pub const NO_EXPORT: Community = Community(0xffff_ff01);
}

impl fmt::Display for Community {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match WELL_KNOWN.iter().find(|(_, value)| *value == self.0) {
            Some((name, _)) => f.write_str(name),
            None => write!(f, "{}:{}", self.0 >> 16, self.0 & 0xffff),
        }
    }
}

impl Written for Community {
    const NAME: &'static str = "Community";
    const NOUN: &'static str = "a community: two numbers up to 65535, or no-export, no-advertise, no-export-subconfed, graceful-shutdown, blackhole";
    const EXAMPLE: &'static str = "64512:100";
    const LONGEST: usize = 19;
    // 65535 of the left is the range of the well-known ones (RFC 1997), which are written by name.
    const SERVER: Server = Server::Cel(
        "self in ['no-export', 'no-advertise', 'no-export-subconfed', 'graceful-shutdown', 'blackhole'] || (self.matches('^(0|[1-9][0-9]{0,4}):(0|[1-9][0-9]{0,4})$') && int(self.split(':')[0]) < 65535 && int(self.split(':')[1]) <= 65535)",
    );

    fn read(text: &str) -> Option<Self> {
        if let Some((_, value)) = WELL_KNOWN.iter().find(|(name, _)| *name == text) {
            return Some(Community(*value));
        }
        let (high, low) = text.split_once(':')?;
        let (high, low) = (digits(high)?, digits(low)?);
        (high < 65_535 && low <= 65_535).then_some(Community(high << 16 | low))
    }
}

/// A large community (RFC 8092).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LargeCommunity(pub [u32; 3]);

impl fmt::Display for LargeCommunity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c] = self.0;
        write!(f, "{a}:{b}:{c}")
    }
}

impl Written for LargeCommunity {
    const NAME: &'static str = "LargeCommunity";
    const NOUN: &'static str = "a large community: three numbers up to 4294967295";
    const EXAMPLE: &'static str = "64512:1:100";
    const LONGEST: usize = 32;
    const SERVER: Server = Server::Cel(
        "self.matches('^(0|[1-9][0-9]{0,9}):(0|[1-9][0-9]{0,9}):(0|[1-9][0-9]{0,9})$') && self.split(':').all(n, int(n) <= 4294967295)",
    );

    fn read(text: &str) -> Option<Self> {
        let mut numbers = text.split(':').map(digits);
        let community = [numbers.next()??, numbers.next()??, numbers.next()??];
        numbers
            .next()
            .is_none()
            .then_some(LargeCommunity(community))
    }
}

/// Decimal digits without leading zeros.
fn digits(text: &str) -> Option<u32> {
    let number: u32 = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

/// A key of a Secret in the namespace that kun itself runs in; secrets of other namespaces are nobody's to point at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SecretKey {
    /// The name of the Secret.
    pub name: Text<Name>,
    /// The key in its data.
    #[serde(default = "password")]
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

fn password() -> String {
    "password".to_owned()
}
