//! ServiceAddress: a kind of folders only.

use std::net::IpAddr;

use kun_config::yaml::Fields;

use crate::Meta;

/// ServiceAddress (`kun.network/v1alpha1`): in a folder, where a Service has no status that anybody could patch, the virtual
/// addresses of the Service of its name. Written by `kun-operator`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAddress {
    /// The Service's namespace and name.
    pub meta: Meta,
    /// spec.addresses: at most one of each family.
    pub addresses: Vec<IpAddr>,
}

impl ServiceAddress {
    /// Reads its spec.
    pub(crate) fn read(f: &Fields<'_, '_>, meta: Meta) -> Option<Self> {
        let spec = f
            .require("spec", "a ServiceAddress has a spec with `addresses`")?
            .fields();
        let mut addresses: Vec<IpAddr> = Vec::new();
        if let Some(list) = spec.require(
            "addresses",
            "write a list of one IPv4 address, one IPv6 address, or both",
        ) {
            for c in list.elements() {
                let Some(address) = c.ip() else { continue };
                if addresses.iter().any(|a| a.is_ipv4() == address.is_ipv4()) {
                    c.fault(
                        format_args!("{address} is a second one of its family"),
                        "a Service has one of each",
                    );
                }
                addresses.push(address);
            }
        }
        spec.finish();
        Some(Self { meta, addresses })
    }
}
