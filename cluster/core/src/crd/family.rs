//! Families of addresses, and what an address is good for.

use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::text::Text;
use crate::IpFamily;

/// The families of addresses.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema,
)]
pub enum Family {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

impl Family {
    /// Both, the default of whatever may have either.
    pub fn both() -> Vec<Family> {
        vec![Family::IPv4, Family::IPv6]
    }
}

impl From<IpFamily> for Family {
    fn from(family: IpFamily) -> Self {
        match family {
            IpFamily::V4 => Family::IPv4,
            IpFamily::V6 => Family::IPv6,
        }
    }
}

/// The family of an address.
pub(super) fn family(address: &Text<IpAddr>) -> Family {
    IpFamily::of(address.0).into()
}

/// A unicast address.
pub(super) fn is_host(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => !(a.is_unspecified() || a.is_multicast() || a.is_broadcast()),
        IpAddr::V6(a) => !(a.is_unspecified() || a.is_multicast()),
    }
}
