//! Attachments as the dataplane's thread knows them: programs on their interfaces, limits, host ports, and who may have which port.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use kun_cluster::Protocol;
use kun_control::{Allocation, AttachmentKey, PodRef, PortMapping, Traffic, Transport};
use kun_proxy_core::{HostPort, HostPorts, host_port_name};

/// An attachment, and all that is to be done for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Whose.
    pub(crate) key: AttachmentKey,
    /// Namespace and name of the pod, or the container where the runtime told none.
    pub(crate) pod: String,
    /// The pod's addresses.
    pub(crate) addresses: Vec<IpAddr>,
    /// Interfaces on the node.
    pub(crate) interfaces: Vec<String>,
    /// Limits and host ports.
    pub(crate) traffic: Traffic,
}

impl Attachment {
    /// Of an allocation.
    pub(crate) fn new(allocation: &Allocation, interfaces: Vec<String>, traffic: Traffic) -> Self {
        Self {
            key: allocation.key.clone(),
            pod: shown(&allocation.pod, &allocation.key),
            addresses: [IpAddr::V6(allocation.v6)]
                .into_iter()
                .chain(allocation.v4.map(IpAddr::V4))
                .collect(),
            interfaces,
            traffic,
        }
    }

    /// One that asks for these host ports, and has no slot yet.
    pub(crate) fn wish(key: &AttachmentKey, pod: &PodRef, ports: &[PortMapping]) -> Self {
        Self {
            key: key.clone(),
            pod: shown(pod, key),
            addresses: Vec::new(),
            interfaces: Vec::new(),
            traffic: Traffic {
                port_mappings: ports.to_vec(),
                ..Traffic::default()
            },
        }
    }

    /// Its host ports, for the planner.
    pub(crate) fn host_ports(&self) -> HostPorts {
        HostPorts {
            pod: self.addresses.clone(),
            ports: self.traffic.port_mappings.iter().map(host_port).collect(),
        }
    }

    /// The planner's name for it.
    pub(crate) fn name(&self) -> kun_cluster::ObjectName {
        let key = &self.key;
        host_port_name(&format!(
            "{} {} {} {}",
            self.pod, key.network, key.container_id, key.ifname
        ))
    }
}

/// The pod, or the container where the runtime told none.
fn shown(pod: &PodRef, key: &AttachmentKey) -> String {
    match pod.name.as_str() {
        "" => key.container_id.clone(),
        name => format!("{}/{name}", pod.namespace),
    }
}

fn host_port(mapping: &PortMapping) -> HostPort {
    HostPort {
        host_ip: mapping.host_ip,
        port: mapping.host_port.get(),
        protocol: match mapping.protocol {
            Transport::Tcp => Protocol::Tcp,
            Transport::Udp => Protocol::Udp,
            Transport::Sctp => Protocol::Sctp,
        },
        target: mapping.container_port.get(),
    }
}

/// The attachments that were told, by key.
#[derive(Debug, Default)]
pub(crate) struct Attachments {
    held: BTreeMap<AttachmentKey, Attachment>,
    /// Without an address at the last look.
    suspects: BTreeSet<AttachmentKey>,
}

impl Attachments {
    /// Why this one's host ports cannot be served: a protocol that no program translates, or a port that another one has.
    pub(crate) fn refuses(&self, new: &Attachment) -> Option<String> {
        let ports: Vec<HostPort> = new.host_ports().ports;
        for (index, port) in ports.iter().enumerate() {
            if port.protocol == Protocol::Sctp {
                return Some(format!(
                    "host port {}: SCTP is not translated by this node; use hostNetwork, or TCP or UDP",
                    show(port)
                ));
            }
            if let Some(other) = ports[..index].iter().find(|o| o.overlaps(port)) {
                return Some(format!(
                    "host port {}: the pod asks for {} too; one address and port of the node leads to one port of one pod",
                    show(port),
                    show(other)
                ));
            }
            for held in self.held.values().filter(|h| h.key != new.key) {
                let theirs = held.host_ports().ports;
                if let Some(other) = theirs.iter().find(|o| o.overlaps(port)) {
                    return Some(format!(
                        "host port {} is taken: pod {} (container {}) has {} on this node; choose another port or hostIP, or wait until that pod is gone",
                        show(port),
                        held.pod,
                        held.key.container_id,
                        show(other)
                    ));
                }
            }
        }
        None
    }

    /// It stands.
    pub(crate) fn insert(&mut self, attachment: Attachment) {
        self.suspects.remove(&attachment.key);
        self.held.insert(attachment.key.clone(), attachment);
    }

    /// It is gone.
    pub(crate) fn remove(&mut self, key: &AttachmentKey) -> Option<Attachment> {
        self.suspects.remove(key);
        self.held.remove(key)
    }

    /// By key.
    pub(crate) fn get(&self, key: &AttachmentKey) -> Option<&Attachment> {
        self.held.get(key)
    }

    /// How many host ports there are.
    pub(crate) fn ports(&self) -> usize {
        let held = self.held.values();
        held.map(|a| a.traffic.port_mappings.len()).sum()
    }

    /// Attachments without an address, now and at the look before: released while nobody told us. One look may have been
    /// before an ADD that is told already.
    pub(crate) fn gone(&mut self, live: &BTreeSet<AttachmentKey>) -> Vec<AttachmentKey> {
        let dead = self.held.keys().filter(|key| !live.contains(key));
        let dead: BTreeSet<AttachmentKey> = dead.cloned().collect();
        let gone = dead.intersection(&self.suspects).cloned().collect();
        self.suspects = dead;
        gone
    }
}

fn show(port: &HostPort) -> String {
    let protocol = match port.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    match port.host_ip {
        Some(IpAddr::V6(ip)) => format!("[{ip}]:{}/{protocol}", port.port),
        Some(ip) => format!("{ip}:{}/{protocol}", port.port),
        None => format!("{}/{protocol}", port.port),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;

    fn attachment(container: &str, ports: &[(u16, Transport, Option<&str>)]) -> Attachment {
        let port_mappings = ports
            .iter()
            .map(|(port, protocol, ip)| PortMapping {
                host_port: NonZeroU16::new(*port).unwrap(),
                container_port: NonZeroU16::MIN,
                protocol: *protocol,
                host_ip: ip.map(|ip| ip.parse().unwrap()),
            })
            .collect();
        Attachment {
            key: AttachmentKey {
                network: "kun".into(),
                container_id: container.into(),
                ifname: "eth0".into(),
            },
            pod: format!("shop/{container}"),
            addresses: vec![IpAddr::from([10, 0, 0, 1])],
            interfaces: Vec::new(),
            traffic: Traffic {
                port_mappings,
                ..Traffic::default()
            },
        }
    }

    #[test]
    fn a_taken_port_is_refused_and_says_by_whom() {
        let mut all = Attachments::default();
        all.insert(attachment("a", &[(80, Transport::Tcp, None)]));
        let refused = all.refuses(&attachment("b", &[(80, Transport::Tcp, Some("192.0.2.1"))]));
        let why = refused.unwrap();
        for part in ["192.0.2.1:80/tcp", "shop/a", "container a"] {
            assert!(why.contains(part), "{why}");
        }
        assert_eq!(
            all.refuses(&attachment("a", &[(80, Transport::Tcp, None)])),
            None
        );
        assert_eq!(
            all.refuses(&attachment("b", &[(80, Transport::Udp, None)])),
            None
        );
        let twice = [(80, Transport::Udp, None), (80, Transport::Udp, Some("::"))];
        assert!(all.refuses(&attachment("b", &twice)).is_some());
        assert!(
            all.refuses(&attachment("b", &[(9, Transport::Sctp, None)]))
                .is_some()
        );
        all.remove(&attachment("a", &[]).key);
        assert_eq!(
            all.refuses(&attachment("b", &[(80, Transport::Tcp, None)])),
            None
        );
    }

    #[test]
    fn an_attachment_goes_at_the_second_look_without_an_address() {
        let mut all = Attachments::default();
        let a = attachment("a", &[]);
        all.insert(a.clone());
        let none = BTreeSet::new();
        assert!(all.gone(&none).is_empty());
        assert!(all.gone(&BTreeSet::from([a.key.clone()])).is_empty());
        assert!(all.gone(&none).is_empty());
        assert_eq!(all.gone(&none), [a.key]);
    }
}
