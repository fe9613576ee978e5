//! "Why does this packet go there?": the chain of objects and rules that decided, first decided first.
//!
//! Answers from what the planner holds, so it explains the dataplane as it is, and names the manifest or resourceVersion behind it.

use std::net::IpAddr;

use kun_cluster_core::{Endpoint, EndpointSlice, ObjectName, Protocol};
use kun_ebpf_abi::Port;
use kun_ebpf_abi::service::{Scope, ServiceKey, ViewKind, state};

use crate::planner::Planner;
use crate::port::{Held, HeldPort};
use crate::service::{Frontend, addr, ip, served};

/// Backends named one by one; the rest is counted.
const NAMED: usize = 16;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Protocol.
    pub protocol: Protocol,
    /// The client, where known.
    pub source: Option<IpAddr>,
    /// Whether the client is outside the cluster.
    pub external: bool,
    /// Destination address.
    pub destination: IpAddr,
    /// Destination port.
    pub port: u16,
}

/// One link of the chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// `service`, `view`, `backend`, `endpoint`, `pod`, `manifest`, `drop`, `problem`.
    pub what: &'static str,
    /// The object.
    pub object: String,
    /// One line for people.
    pub detail: String,
    /// File and line, or resourceVersion.
    pub source: Option<String>,
}

impl Planner {
    /// The answer; never empty.
    pub fn why(&self, question: &Question) -> Vec<Reason> {
        let key = ServiceKey {
            addr: addr(question.destination),
            port: Port::new(question.port),
            proto: question.protocol.number(),
            pad: 0,
        };
        match self.holders.get(&key) {
            Some(id) => self.why_service(*id, &key, question),
            None => self.why_not(question),
        }
    }

    fn why_service(&self, id: u32, key: &ServiceKey, question: &Question) -> Vec<Reason> {
        let Some(port) = self.ports.get(id as usize).and_then(Option::as_ref) else {
            return Vec::new();
        };
        let Some((frontend, name)) = port
            .frontends
            .iter()
            .find(|f| f.key == *key)
            .zip(port.key.as_ref())
        else {
            return vec![Reason {
                what: "service",
                object: format!("service id {id}"),
                detail: if self.partial {
                    "adopted from an earlier agent, in no manifest that can be read; kept until all can"
                } else {
                    "adopted from an earlier agent; the cluster is not synced yet"
                }
                .into(),
                source: None,
            }];
        };
        let service = self.services.get(&name.service);
        let colon = if name.port.is_empty() { "" } else { ":" };
        let object = format!("{}{colon}{}", name.service, name.port);
        let mut steps = vec![Reason {
            what: "service",
            object: object.clone(),
            detail: format!(
                "{} {}, service id {id}",
                match frontend.scope {
                    Scope::Cluster => "ClusterIP",
                    Scope::External => "LoadBalancer address",
                    Scope::NodePort => "node port",
                    Scope::HostPort => "host port",
                    Scope::HostLoopback => "host port for the node itself",
                },
                endpoint_text(question.destination, question.port),
            ),
            source: service.map(|s| s.meta.origin.to_string()),
        }];
        for (of, problem) in self.problems().filter(|(n, _)| **n == name.service) {
            steps.push(Reason {
                what: "problem",
                object: of.to_string(),
                detail: problem.to_string(),
                source: None,
            });
        }
        steps.push(self.why_view(port, frontend, question, &object));
        let kind = seen_view(frontend, question);
        let chosen: Vec<&Held> = port
            .backends
            .iter()
            .filter(|b| b.members.has(kind))
            .collect();
        if chosen.is_empty() {
            steps.push(Reason {
                what: "drop",
                object,
                detail:
                    "no endpoint: connect() gets ECONNREFUSED, a packet an ICMP port unreachable"
                        .into(),
                source: None,
            });
        }
        for held in chosen.iter().take(NAMED) {
            self.why_backend(&name.service, held, &mut steps);
        }
        if chosen.len() > NAMED {
            steps.push(Reason {
                what: "backend",
                object: format!("{} more", chosen.len() - NAMED),
                detail: "not named".into(),
                source: None,
            });
        }
        for held in port.backends.iter().filter(|b| b.state == state::DRAINING) {
            steps.push(Reason {
                what: "backend",
                object: endpoint_text(ip(held.addr), held.port.get()),
                detail: format!(
                    "draining: keeps its flows, takes no new ones (id {})",
                    held.id
                ),
                source: None,
            });
        }
        steps
    }

    fn why_view(
        &self,
        port: &HeldPort,
        frontend: &Frontend,
        question: &Question,
        object: &str,
    ) -> Reason {
        let kind = seen_view(frontend, question);
        let published = port.views[kind as usize].view;
        let who = if question.external {
            "a client outside the cluster"
        } else {
            "a client inside the cluster"
        };
        let sees = match kind {
            ViewKind::Cluster => "all endpoints of the cluster".to_owned(),
            ViewKind::Local => format!("the endpoints on node {}", self.here.node),
            ViewKind::Zone => "the endpoints that zone affinity selects".to_owned(),
        };
        let affinity = match frontend.affinity_secs {
            0 => String::new(),
            secs => format!(", ClientIP affinity for {secs} s"),
        };
        Reason {
            what: "view",
            object: format!("{object} {}", view_name(kind)),
            detail: format!(
                "{who} sees {sees}: {} slots from {}, epoch {}{affinity}",
                published.count, published.base, published.epoch
            ),
            source: None,
        }
    }

    fn why_backend(&self, service: &ObjectName, held: &Held, steps: &mut Vec<Reason>) {
        let object = endpoint_text(ip(held.addr), held.port.get());
        steps.push(Reason {
            what: "backend",
            object: object.clone(),
            detail: format!("id {}, generation {}", held.id, held.generation),
            source: None,
        });
        let slices = self.slices.get(service).into_iter().flatten();
        for slice in slices {
            let Some(endpoint) = slice
                .endpoints
                .iter()
                .find(|e| addr(e.address) == held.addr)
            else {
                continue;
            };
            steps.push(endpoint_step(slice, endpoint));
            if let Some(pod) = &endpoint.pod {
                steps.push(Reason {
                    what: "pod",
                    object: pod.to_string(),
                    detail: format!(
                        "on node {}",
                        endpoint.node.as_deref().unwrap_or("(not named)")
                    ),
                    source: None,
                });
            }
        }
    }

    /// The destination is no frontend of ours: say the nearest thing that is known about it.
    fn why_not(&self, question: &Question) -> Vec<Reason> {
        let there = endpoint_text(question.destination, question.port);
        let mut steps = Vec::new();
        let mut services: Vec<_> = self.services.values().collect();
        services.sort_unstable_by(|a, b| a.meta.name.cmp(&b.meta.name));
        for service in services {
            let has = |list: &[IpAddr]| list.contains(&question.destination);
            if !has(&service.cluster_ips) && !has(&service.load_balancer_ips) {
                continue;
            }
            let ports: Vec<String> = service
                .ports
                .iter()
                .map(|p| format!("{}/{}", p.port, protocol_name(p.protocol)))
                .collect();
            let problems: Vec<String> = self
                .problems()
                .filter(|(n, _)| **n == service.meta.name)
                .map(|(_, p)| p.to_string())
                .collect();
            let detail = match (served(service), problems.is_empty()) {
                (Err(why), _) => format!("not served: {why}"),
                (Ok(()), false) => format!("not served as written: {}", problems.join("; ")),
                (Ok(()), true) => format!(
                    "has the address, but no port {}/{}: it has {}",
                    question.port,
                    protocol_name(question.protocol),
                    ports.join(", ")
                ),
            };
            steps.push(Reason {
                what: "service",
                object: service.meta.name.to_string(),
                detail,
                source: Some(service.meta.origin.to_string()),
            });
        }
        let mut slices: Vec<_> = self.slices.values().flatten().collect();
        slices.sort_unstable_by(|a, b| a.meta.name.cmp(&b.meta.name));
        for slice in slices {
            for endpoint in &slice.endpoints {
                if endpoint.address == question.destination {
                    steps.push(endpoint_step(slice, endpoint));
                }
            }
        }
        if steps.is_empty() {
            steps.push(Reason {
                what: "route",
                object: there,
                detail: "no Service or endpoint has this address: the routing table decides".into(),
                source: None,
            });
        } else {
            steps.push(Reason {
                what: "route",
                object: there,
                detail: "no frontend: the packet is left as it is and the routing table decides"
                    .into(),
                source: None,
            });
        }
        steps
    }
}

fn seen_view(frontend: &Frontend, question: &Question) -> ViewKind {
    if question.external {
        frontend.external
    } else {
        frontend.internal
    }
}

fn endpoint_step(slice: &EndpointSlice, endpoint: &Endpoint) -> Reason {
    let yes = |b: bool| if b { "yes" } else { "no" };
    Reason {
        what: "endpoint",
        object: format!("{} {}", slice.meta.name, endpoint.address),
        detail: format!(
            "of Service {}: ready {}, serving {}, terminating {}",
            slice.service,
            yes(endpoint.ready),
            yes(endpoint.serving),
            yes(endpoint.terminating)
        ),
        source: Some(slice.meta.origin.to_string()),
    }
}

fn endpoint_text(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

fn view_name(kind: ViewKind) -> &'static str {
    match kind {
        ViewKind::Cluster => "cluster",
        ViewKind::Local => "local",
        ViewKind::Zone => "zone",
    }
}

fn protocol_name(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}
