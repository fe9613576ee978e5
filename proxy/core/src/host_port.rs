//! Ports of the node that lead to one pod each (CNI `portMappings`), as service ports with one endpoint.
//!
//! To the planner an attachment with host ports is a Service of its own, in a namespace that no Service can have and that comes
//! after all that they can: where both want an address and port, the Service has it. What makes them is no manifest: they are
//! planned before the cluster is synced, and a partial view of it holds none of them back.
//!
//! Two attachments that want the same port are refused before they get here ([`HostPort::overlaps`]).

use std::net::IpAddr;

use kun_cluster_core::{ObjectName, Protocol};
use kun_ebpf_abi::Port;
use kun_ebpf_abi::service::{Scope, ServiceKey, ViewKind};

use crate::service::{DesiredPort, Family, Frontend, Members, PortKey, Target, addr};

/// The namespace of attachments. A tilde is in no Kubernetes name and sorts after all that are.
const NAMESPACE: &str = "~host-port";

/// A port of the node that leads into a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    /// On this address of the node alone; unspecified: on any of that family; `None`: on any.
    pub host_ip: Option<IpAddr>,
    /// On the node.
    pub port: u16,
    /// Protocol.
    pub protocol: Protocol,
    /// In the pod.
    pub target: u16,
}

impl HostPort {
    /// Whether one address of the node could not be both's.
    pub fn overlaps(&self, other: &HostPort) -> bool {
        let any = |a: Option<IpAddr>| a.is_none_or(|a| a.is_unspecified());
        let address = match (self.host_ip, other.host_ip) {
            (None, _) | (_, None) => true,
            (Some(a), Some(b)) if any(Some(a)) || any(Some(b)) => a.is_ipv4() == b.is_ipv4(),
            (a, b) => a == b,
        };
        address && (self.port, self.protocol) == (other.port, other.protocol)
    }

    fn is_at(&self, address: IpAddr) -> bool {
        match self.host_ip {
            None => true,
            Some(any) if any.is_unspecified() => any.is_ipv4() == address.is_ipv4(),
            Some(one) => one == address,
        }
    }
}

/// The host ports of one attachment.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostPorts {
    /// The pod's addresses, one a family at most.
    pub pod: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<HostPort>,
}

/// The name under which the planner has an attachment; `attachment` is unique on the node.
pub fn host_port_name(attachment: &str) -> ObjectName {
    ObjectName::new(NAMESPACE, attachment)
}

/// Whether the name is an attachment's.
pub(crate) fn is_attachment(name: &ObjectName) -> bool {
    &*name.namespace == NAMESPACE
}

/// Whether the frontend leads to a host port.
pub(crate) fn is_host_scope(scope: Scope) -> bool {
    matches!(scope, Scope::HostPort | Scope::HostLoopback)
}

/// The attachment's ports on `node`, the addresses of this node, in each family that the pod has.
pub(crate) fn desired(name: &ObjectName, ports: &HostPorts, node: &[IpAddr]) -> Vec<DesiredPort> {
    let mut all = Vec::new();
    for port in &ports.ports {
        for pod in &ports.pod {
            let family = Family::of(*pod);
            let frontends: Vec<Frontend> = (node.iter())
                .filter(|a| Family::of(**a) == family && port.is_at(**a))
                .map(|a| frontend(port, *a))
                .collect();
            if frontends.is_empty() {
                continue;
            }
            let host = port.host_ip.map_or_else(String::new, |ip| format!("{ip} "));
            all.push(DesiredPort {
                key: PortKey {
                    service: name.clone(),
                    port: format!("{host}{}", port.port).into(),
                    protocol: port.protocol,
                    family,
                },
                frontends,
                targets: vec![Target {
                    addr: addr(*pod),
                    port: Port::new(port.target),
                    members: Members::NONE.with(ViewKind::Local),
                    local: true,
                }],
                left_out: 0,
            });
        }
    }
    all
}

fn frontend(port: &HostPort, address: IpAddr) -> Frontend {
    Frontend {
        key: ServiceKey {
            addr: addr(address),
            port: Port::new(port.port),
            proto: port.protocol.number(),
            pad: 0,
        },
        scope: if address.is_loopback() {
            Scope::HostLoopback
        } else {
            Scope::HostPort
        },
        internal: ViewKind::Local,
        external: ViewKind::Local,
        affinity_secs: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(host_ip: &str, port: u16, protocol: Protocol) -> HostPort {
        HostPort {
            host_ip: host_ip.parse().ok(),
            port,
            protocol,
            target: 80,
        }
    }

    #[test]
    fn what_overlaps() {
        let on = |ip| port(ip, 53, Protocol::Udp);
        let table = [
            ("", "", true),
            ("", "0.0.0.0", true),
            ("", "::1", true),
            ("0.0.0.0", "::", false),
            ("0.0.0.0", "192.0.2.1", true),
            ("::", "2001:db8::1", true),
            ("::", "192.0.2.1", false),
            ("192.0.2.1", "192.0.2.1", true),
            ("192.0.2.1", "192.0.2.2", false),
        ];
        for (a, b, overlaps) in table {
            assert_eq!(on(a).overlaps(&on(b)), overlaps, "{a} and {b}");
            assert_eq!(on(b).overlaps(&on(a)), overlaps, "{b} and {a}");
        }
        assert!(!on("").overlaps(&port("", 53, Protocol::Tcp)));
        assert!(!on("").overlaps(&port("", 54, Protocol::Udp)));
    }

    #[test]
    fn a_service_of_any_name_comes_first() {
        let attachment = host_port_name("shop/web abc/eth0");
        assert!(is_attachment(&attachment));
        assert!(ObjectName::new("zzz", "zzz") < attachment);
    }
}
