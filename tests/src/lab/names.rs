//! The lab's names and addresses. Everything on the machine that belongs to a lab is found by the lab's name alone, so that
//! taking it down needs no memory of how it came up.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

/// Where labs keep their files; lost at reboot, like the namespaces.
pub const RUN: &str = "/run/kun-lab";
/// Where labs with a control plane keep what is large.
pub const STATE: &str = "/var/lib/kun-lab";

/// Namespaces of all labs begin so.
const NETNS_MARK: &str = "kun-lab-";

/// The name of a lab: short, so that sockets' paths stay short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabName(String);

impl LabName {
    /// 1..=20 characters of `a-z`, `0-9` and `_`.
    pub fn new(name: &str) -> Result<Self> {
        let fits = (1..=20).contains(&name.len());
        let plain = name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
        ensure!(
            fits && plain,
            "--name {name}: a lab's name is 1 to 20 characters of a-z, 0-9 and _"
        );
        Ok(Self(name.to_owned()))
    }

    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The network namespace of a part of it.
    pub fn netns(&self, part: &str) -> String {
        format!("{NETNS_MARK}{}-{part}", self.0)
    }

    /// Whether the namespace is of this lab: no lab's name has a dash.
    pub fn owns_netns(&self, netns: &str) -> bool {
        netns
            .strip_prefix(NETNS_MARK)
            .and_then(|rest| rest.split_once('-'))
            .is_some_and(|(name, _)| name == self.0)
    }

    /// Its files.
    pub fn directory(&self) -> PathBuf {
        Path::new(RUN).join(&self.0)
    }

    /// What containers, kubelets and etcd keep: images, which a `/run` in memory has no room for.
    pub fn state(&self) -> PathBuf {
        Path::new(STATE).join(&self.0)
    }

    /// Its cgroup's name, in every hierarchy.
    pub fn cgroup_name(&self) -> String {
        format!("{NETNS_MARK}{}", self.0)
    }

    /// Its cgroup below the root of a hierarchy.
    pub fn cgroup(&self, root: &Path) -> PathBuf {
        root.join(self.cgroup_name())
    }
}

/// A machine of the lab, its link to the ToR, and its BGP identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Node name, and the part in the namespace's name.
    pub name: &'static str,
    /// topology.kubernetes.io/zone
    pub zone: &'static str,
    /// Number of its link: 192.0.2.(4n)/30 and 2001:db8:f:n::/64.
    pub link: u8,
    /// Its AS.
    pub asn: u32,
    /// Whether pods run there.
    pub schedulable: bool,
    /// Whether it translates.
    pub gateway: bool,
}

/// Two nodes in two zones, and the gateway.
pub const MACHINES: [Machine; 3] = [
    Machine {
        name: "node-a",
        zone: "a",
        link: 1,
        asn: 64601,
        schedulable: true,
        gateway: false,
    },
    Machine {
        name: "node-b",
        zone: "b",
        link: 2,
        asn: 64602,
        schedulable: true,
        gateway: false,
    },
    Machine {
        name: "gateway",
        zone: "a",
        link: 3,
        asn: 64603,
        schedulable: false,
        gateway: true,
    },
];

/// Where the control plane runs: a machine of the fabric that is no node.
pub const CONTROL: Machine = Machine {
    name: "control",
    zone: "a",
    link: 4,
    asn: 0,
    schedulable: false,
    gateway: false,
};

impl Machine {
    /// The ToR's address on the link.
    pub fn tor_v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self.link * 4 + 1)
    }

    /// The machine's address on the link.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(192, 0, 2, self.link * 4 + 2)
    }

    /// The ToR's address on the link.
    pub fn tor_v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0xf, u16::from(self.link), 0, 0, 0, 1)
    }

    /// The machine's address on the link.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0x2001, 0xdb8, 0xf, u16::from(self.link), 0, 0, 0, 2)
    }

    /// The ToR's interface towards it.
    pub fn tor_interface(&self) -> String {
        self.name.to_owned()
    }
}

/// The ToR's AS.
pub const TOR_ASN: u32 = 64512;
/// The ToR on the internet's link.
pub const TOR_INTERNET_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
/// The ToR's leg for IPv6 clients from outside.
pub const TOR_OUTSIDE_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xcafe, 0, 0, 0, 0, 1);
/// The internet host, a client of the cluster's virtual addresses.
pub const INTERNET_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// Its web server.
pub const WEB_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 80);
/// Its authoritative DNS server.
pub const DNS_V4: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
/// The web server's name; A only.
pub const WEB_NAME: &str = "web.example.net";

/// The /96 over all pods.
pub const POD_PREFIX: &str = "2001:db8:10::/96";
/// Dual slots: four blocks.
pub const POD_V4: &str = "10.64.0.0/24";
/// IPv6-only slots: eight blocks.
pub const POD_V6_ONLY: &str = "240.0.0.0/23";
/// Network-specific Pref64: the well-known one must not carry documentation addresses (RFC 6052 §3.1).
pub const PREF64: &str = "2001:db8:64:64::/96";
/// What translated flows come from.
pub const NAT64_POOL: &str = "198.51.100.64/28";
/// LoadBalancer addresses.
pub const VIPS_V4: &str = "198.51.100.0/28";
/// LoadBalancer addresses.
pub const VIPS_V6: &str = "2001:db8:5::/124";
/// The cluster DNS service.
pub const CLUSTER_DNS_V4: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// The cluster DNS service.
pub const CLUSTER_DNS_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0xa);
/// The cluster's domain.
pub const CLUSTER_DOMAIN: &str = "cluster.local";

/// The n-th cluster address of each family, in 10.96.0.0/16 and fd00:10:96::/112; the DNS service has the tenth.
pub fn cluster_ip(n: u16, v6: bool) -> IpAddr {
    let [high, low] = n.to_be_bytes();
    if v6 {
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, n))
    } else {
        IpAddr::V4(Ipv4Addr::new(10, 96, high, low))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_owns_only_its_own() {
        let (one, other) = (LabName::new("lab").unwrap(), LabName::new("lab2").unwrap());
        assert!(one.owns_netns(&one.netns("pod-3")));
        assert!(!one.owns_netns(&other.netns("tor")));
        assert!(!other.owns_netns(&one.netns("tor")));
        assert!(LabName::new("a-b").is_err());
        assert!(LabName::new("").is_err());
        assert!(LabName::new("../x").is_err());
    }

    #[test]
    fn the_dns_service_has_its_address() {
        assert_eq!(cluster_ip(10, false), IpAddr::V4(CLUSTER_DNS_V4));
        assert_eq!(cluster_ip(10, true), IpAddr::V6(CLUSTER_DNS_V6));
    }
}
