//! Kubernetes DNS (specification 1.1.0) as CoreDNS's `kubernetes` plugin answers it, from an immutable snapshot.
//!
//! Names are kept relative to the zone, so that one snapshot serves several zones; A and AAAA record sets are kept encoded with a
//! pointer to the question as their owner, so that an answer is one copy.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use foldhash::fast::FixedState;
use kun_cluster_core::{EndpointSlice, ObjectName, Protocol, Service, ServiceType};
use kun_config::corefile::{Kubernetes as Spec, PodMode};
use kun_config::types::{DnsName, wire_is_within};

use crate::answer::begin;
use crate::cluster::ClusterView;
use crate::query::Query;
use crate::wire::{HEADER, IN, MAX_MESSAGE, flag, put_u16, rcode, reverse_address, rtype};

/// What the specification calls itself.
const DNS_VERSION: &[u8] = b"1.1.0";

/// Labels in wire form without a root.
type Relative = Box<[u8]>;

#[derive(Debug, Default)]
struct Node {
    /// Encoded A records.
    a: Box<[u8]>,
    /// Encoded AAAA records.
    aaaa: Box<[u8]>,
    srv: Box<[Srv]>,
    cname: Option<DnsName>,
}

#[derive(Debug)]
struct Srv {
    port: u16,
    target: Relative,
}

/// All names of a cluster at one moment.
#[derive(Debug)]
pub struct Snapshot {
    synced: bool,
    serial: u32,
    ttl: u32,
    pods: PodMode,
    names: HashMap<Relative, Node, FixedState>,
    reverse: HashMap<IpAddr, Vec<Relative>>,
    pod_ips: HashSet<(IpAddr, Relative)>,
    namespaces: HashSet<Relative>,
    primary: Option<DnsName>,
}

/// What the plugin says to a query.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    /// The answer is written; order, truncation and OPT are not.
    Answered,
    /// An alias: its target is to be found first.
    Alias {
        /// Target.
        target: DnsName,
        /// TTL of the CNAME record.
        ttl: u32,
    },
    /// Not this plugin's: the next one is asked.
    Next,
}

#[derive(Default)]
struct Build {
    v4: BTreeSet<std::net::Ipv4Addr>,
    v6: BTreeSet<std::net::Ipv6Addr>,
    srv: BTreeSet<(Vec<u8>, u16)>,
    cname: Option<DnsName>,
}

impl Build {
    fn address(&mut self, ip: IpAddr) {
        match ip {
            IpAddr::V4(a) => self.v4.insert(a),
            IpAddr::V6(a) => self.v6.insert(a),
        };
    }
}

/// Appends a label in lower case; what is no label is left out and makes the name unreachable, not wrong.
fn label(out: &mut Vec<u8>, text: &str) {
    if (1..=63).contains(&text.len()) {
        out.push(text.len() as u8);
        out.extend(text.bytes().map(|b| b.to_ascii_lowercase()));
    }
}

fn relative(labels: &[&str]) -> Vec<u8> {
    let mut out = Vec::new();
    for l in labels {
        label(&mut out, l);
    }
    out
}

fn protocol(p: Protocol) -> &'static str {
    match p {
        Protocol::Tcp => "_tcp",
        Protocol::Udp => "_udp",
        Protocol::Sctp => "_sctp",
    }
}

fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

struct Builder<'a> {
    view: &'a ClusterView,
    spec: &'a Spec,
    names: BTreeMap<Vec<u8>, Build>,
    reverse: HashMap<IpAddr, Vec<Relative>>,
}

impl Builder<'_> {
    fn at(&mut self, labels: &[&str]) -> &mut Build {
        self.names.entry(relative(labels)).or_default()
    }

    fn service(&mut self, name: &ObjectName, service: &Service, slices: &[&EndpointSlice]) {
        let (svc, ns): (&str, &str) = (&name.name, &name.namespace);
        if service.kind == ServiceType::ExternalName {
            // An address is no name: CoreDNS has no record for it either.
            let target = service
                .external_name
                .as_deref()
                .filter(|t| t.parse::<IpAddr>().is_err());
            if let Some(target) = target.and_then(|t| DnsName::parse(t).ok()) {
                self.at(&[svc, ns, "svc"]).cname = Some(target);
            }
            return;
        }
        let headless = service.cluster_ips.is_empty();
        let usable = |e: &kun_cluster_core::Endpoint| e.ready || service.publish_not_ready;
        let empty = !slices.iter().flat_map(|s| &s.endpoints).any(usable);
        if (empty && self.spec.ignore_empty_service) || (headless && self.spec.no_endpoints) {
            return;
        }
        self.at(&[svc, ns, "svc"]);
        if !headless {
            let target = relative(&[svc, ns, "svc"]);
            for ip in &service.cluster_ips {
                self.at(&[svc, ns, "svc"]).address(*ip);
                self.reverse.insert(*ip, vec![target.clone().into()]);
            }
            for port in &service.ports {
                self.at(&[svc, ns, "svc"])
                    .srv
                    .insert((target.clone(), port.port));
                if !port.name.is_empty() {
                    let named = self.at(&[
                        &format!("_{}", port.name),
                        protocol(port.protocol),
                        svc,
                        ns,
                        "svc",
                    ]);
                    named.srv.insert((target.clone(), port.port));
                    service.cluster_ips.iter().for_each(|ip| named.address(*ip));
                }
            }
        }
        if self.spec.no_endpoints {
            return;
        }
        for slice in slices {
            for e in slice.endpoints.iter().filter(|e| usable(e)) {
                let own = match (&e.hostname, &e.pod) {
                    (Some(hostname), _) => hostname.to_string(),
                    (None, Some(pod)) if self.spec.endpoint_pod_names => pod.name.to_string(),
                    _ => dashed(e.address),
                };
                let target = relative(&[&own, svc, ns, "svc"]);
                self.at(&[&own, svc, ns, "svc"]).address(e.address);
                if e.hostname.is_some() && !service.cluster_ips.contains(&e.address) {
                    let targets = self.reverse.entry(e.address).or_default();
                    if !targets.iter().any(|t| **t == *target) {
                        targets.push(target.clone().into());
                    }
                }
                for port in &slice.ports {
                    self.at(&[&own, svc, ns, "svc"])
                        .srv
                        .insert((target.clone(), port.port));
                    if headless {
                        self.at(&[svc, ns, "svc"])
                            .srv
                            .insert((target.clone(), port.port));
                        if !port.name.is_empty() {
                            let named = self.at(&[
                                &format!("_{}", port.name),
                                protocol(port.protocol),
                                svc,
                                ns,
                                "svc",
                            ]);
                            named.srv.insert((target.clone(), port.port));
                            named.address(e.address);
                        }
                    }
                }
                if headless {
                    self.at(&[svc, ns, "svc"]).address(e.address);
                }
            }
        }
    }
}

impl Snapshot {
    /// Builds the names that `spec` wants from `view`.
    pub fn build(view: &ClusterView, spec: &Spec) -> Self {
        let wanted =
            |ns: &str| spec.namespaces.is_empty() || spec.namespaces.iter().any(|n| n == ns);
        let mut slices: BTreeMap<&ObjectName, Vec<&EndpointSlice>> = BTreeMap::new();
        for slice in view.slices.values() {
            slices.entry(&slice.service).or_default().push(slice);
        }
        let mut b = Builder {
            view,
            spec,
            names: BTreeMap::new(),
            reverse: HashMap::new(),
        };
        b.at(&["svc"]);
        b.at(&["pod"]);
        b.at(&["dns"]);
        b.at(&["ns", "dns"]);
        for (name, service) in &b.view.services {
            if wanted(&name.namespace) {
                b.service(name, service, slices.get(name).map_or(&[], |s| &s[..]));
            }
        }
        let own = ObjectName::new("kube-system", "kube-dns");
        for ip in view.services.get(&own).iter().flat_map(|s| &s.cluster_ips) {
            b.at(&["ns", "dns"]).address(*ip);
        }
        let mut namespaces = HashSet::new();
        for ns in view.namespace_names() {
            if wanted(ns) {
                b.at(&[ns, "svc"]);
                b.at(&[ns, "pod"]);
                namespaces.insert(relative(&[ns]).into());
            }
        }
        let pods = view
            .pods
            .values()
            .filter(|p| spec.pods == PodMode::Verified && !p.finished);
        let pod_ips = pods
            .flat_map(|p| {
                p.ips
                    .iter()
                    .map(|ip| (*ip, relative(&[&p.meta.name.namespace]).into()))
            })
            .collect();
        Self {
            synced: view.synced(),
            serial: view.version(),
            ttl: spec.ttl,
            pods: spec.pods,
            names: b
                .names
                .into_iter()
                .map(|(name, build)| (name.into(), encode(build, spec.ttl)))
                .collect(),
            reverse: b.reverse,
            pod_ips,
            namespaces,
            primary: spec.zones.iter().find(|z| !is_reverse(z.wire())).cloned(),
        }
    }

    /// How many names there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are no names.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether the first snapshot of the cluster was complete.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Answers `query` for the longest of `spec`'s zones that its name is in.
    pub fn answer(&self, query: &Query<'_>, spec: &Spec, out: &mut Vec<u8>) -> Said {
        let name = query.name();
        let zones = spec.zones.iter().filter(|z| wire_is_within(name, z.wire()));
        let Some(zone) = zones.max_by_key(|z| z.wire().len()) else {
            return Said::Next;
        };
        let falls = spec.fallthrough.covers(name);
        if !self.synced {
            begin(query, u16::from(rcode::SERVFAIL), out);
            return Said::Answered;
        }
        let mut reply = Reply {
            query,
            zone_at: HEADER + name.len() - zone.wire().len(),
            ttl: self.ttl,
            out,
            answers: 0,
            additional: 0,
        };
        if is_reverse(zone.wire()) && name.len() > zone.wire().len() {
            let targets = reverse_address(name).and_then(|ip| self.reverse.get(&ip));
            return match (targets, &self.primary) {
                (Some(targets), Some(primary)) if query.qtype == rtype::PTR => {
                    reply.begin(rcode::NOERROR);
                    targets.iter().for_each(|t| reply.ptr(t, primary));
                    reply.end()
                }
                (Some(_), Some(_)) => reply.denial(rcode::NOERROR, self.serial),
                _ if falls => Said::Next,
                _ => reply.denial(rcode::NXDOMAIN, self.serial),
            };
        }
        let relative = &name[..name.len() - zone.wire().len()];
        if relative.is_empty() {
            return self.apex(reply);
        }
        if relative == b"\x0bdns-version" {
            reply.begin(rcode::NOERROR);
            if query.qtype != rtype::TXT {
                return reply.denial(rcode::NOERROR, self.serial);
            }
            reply.record(
                rtype::TXT,
                &[&[DNS_VERSION.len() as u8], DNS_VERSION].concat(),
            );
            return reply.end();
        }
        let Some(node) = self.names.get(relative) else {
            return match self.pod(relative) {
                Some(ip) => {
                    reply.begin(rcode::NOERROR);
                    match (ip, query.qtype) {
                        (IpAddr::V4(a), rtype::A) => reply.record(rtype::A, &a.octets()),
                        (IpAddr::V6(a), rtype::AAAA) => reply.record(rtype::AAAA, &a.octets()),
                        _ => return reply.denial(rcode::NOERROR, self.serial),
                    }
                    reply.end()
                }
                None if falls => Said::Next,
                None => reply.denial(rcode::NXDOMAIN, self.serial),
            };
        };
        if let Some(target) = &node.cname {
            return Said::Alias {
                target: target.clone(),
                ttl: self.ttl,
            };
        }
        reply.begin(rcode::NOERROR);
        match query.qtype {
            rtype::A => reply.encoded(&node.a, 16),
            rtype::AAAA => reply.encoded(&node.aaaa, 28),
            rtype::SRV => self.srv(&node.srv, zone, &mut reply),
            _ => {}
        }
        if reply.answers == 0 {
            return reply.denial(rcode::NOERROR, self.serial);
        }
        reply.end()
    }

    fn apex(&self, mut reply: Reply<'_, '_>) -> Said {
        reply.begin(rcode::NOERROR);
        match reply.query.qtype {
            rtype::SOA => {
                reply.soa(self.serial);
                reply.answers = 1;
            }
            rtype::NS => {
                let pointer = reply.zone_pointer().to_be_bytes();
                reply.record(rtype::NS, &[b"\x02ns\x03dns", &pointer[..]].concat());
                let target = (reply.out.len() - 9) as u16;
                if let Some(node) = self.names.get(&b"\x02ns\x03dns"[..]) {
                    reply.addresses_of(node, target);
                }
            }
            _ => return reply.denial(rcode::NOERROR, self.serial),
        }
        reply.end()
    }

    fn srv(&self, records: &[Srv], zone: &DnsName, reply: &mut Reply<'_, '_>) {
        // CoreDNS: weights share 100 among the records of one priority.
        let weight = (100 / records.len().max(1)).max(1) as u16;
        let mut targets: Vec<(u16, &Relative)> = Vec::new();
        for srv in records {
            let mut data = vec![0, 0];
            data.extend_from_slice(&weight.to_be_bytes());
            data.extend_from_slice(&srv.port.to_be_bytes());
            // RFC 2782: the target is not compressed.
            data.extend_from_slice(&srv.target);
            data.extend_from_slice(zone.wire());
            let before = reply.out.len();
            reply.record(rtype::SRV, &data);
            // Pointers reach 14 bits; a target behind that gets no additional records.
            if reply.out.len() < 0x4000
                && reply.out.len() > before
                && !targets.iter().any(|(_, t)| **t == srv.target)
            {
                targets.push(((before + 18) as u16, &srv.target));
            }
        }
        for (at, target) in targets {
            if let Some(node) = self.names.get(target) {
                reply.addresses_of(node, at);
            }
        }
    }

    /// The address that a pod's name says: `1-2-3-4.default.pod`.
    fn pod(&self, relative: &[u8]) -> Option<IpAddr> {
        if self.pods == PodMode::Disabled {
            return None;
        }
        let head = relative.strip_suffix(b"\x03pod")?;
        let (&n, rest) = head.split_first()?;
        let (own, namespace) = rest.split_at_checked(usize::from(n))?;
        if !self.namespaces.contains(namespace) {
            return None;
        }
        let text = std::str::from_utf8(own).ok()?;
        let v4 = text.matches('-').count() == 3 && !text.contains("--");
        let ip: IpAddr = text.replace('-', if v4 { "." } else { ":" }).parse().ok()?;
        let exists =
            self.pods == PodMode::Insecure || self.pod_ips.contains(&(ip, namespace.into()));
        exists.then_some(ip)
    }
}

fn is_reverse(zone: &[u8]) -> bool {
    wire_is_within(zone, b"\x07in-addr\x04arpa\0") || wire_is_within(zone, b"\x03ip6\x04arpa\0")
}

fn encode(b: Build, ttl: u32) -> Node {
    let record = |t: u16, data: &[u8]| {
        let mut r = vec![0xc0, HEADER as u8];
        r.extend_from_slice(&t.to_be_bytes());
        r.extend_from_slice(&IN.to_be_bytes());
        r.extend_from_slice(&ttl.to_be_bytes());
        r.extend_from_slice(&(data.len() as u16).to_be_bytes());
        r.extend_from_slice(data);
        r
    };
    Node {
        a: b.v4
            .iter()
            .flat_map(|a| record(rtype::A, &a.octets()))
            .collect(),
        aaaa: b
            .v6
            .iter()
            .flat_map(|a| record(rtype::AAAA, &a.octets()))
            .collect(),
        srv: b
            .srv
            .into_iter()
            .map(|(target, port)| Srv {
                port,
                target: target.into(),
            })
            .collect(),
        cname: b.cname,
    }
}

/// An answer being written.
struct Reply<'a, 'q> {
    query: &'a Query<'q>,
    /// Where the zone begins in the question.
    zone_at: usize,
    ttl: u32,
    out: &'a mut Vec<u8>,
    answers: u16,
    additional: u16,
}

impl Reply<'_, '_> {
    fn begin(&mut self, code: u8) {
        begin(self.query, flag::AA | u16::from(code), self.out);
    }

    fn zone_pointer(&self) -> u16 {
        0xc000 | self.zone_at as u16
    }

    /// Room for one more record and OPT? What does not fit a message is left out.
    fn fits(&self, len: usize) -> bool {
        self.out.len() + len + 11 <= MAX_MESSAGE
    }

    fn record(&mut self, t: u16, data: &[u8]) {
        if self.fits(12 + data.len()) {
            self.raw(0xc000 | HEADER as u16, t, self.ttl, data);
            self.answers += 1;
        }
    }

    fn raw(&mut self, owner: u16, t: u16, ttl: u32, data: &[u8]) {
        self.out.extend_from_slice(&owner.to_be_bytes());
        self.out.extend_from_slice(&t.to_be_bytes());
        self.out.extend_from_slice(&IN.to_be_bytes());
        self.out.extend_from_slice(&ttl.to_be_bytes());
        self.out
            .extend_from_slice(&(data.len() as u16).to_be_bytes());
        self.out.extend_from_slice(data);
    }

    fn encoded(&mut self, records: &[u8], each: usize) {
        let room = (MAX_MESSAGE - 11 - self.out.len()) / each * each;
        let take = records.len().min(room);
        self.out.extend_from_slice(&records[..take]);
        self.answers = (take / each) as u16;
    }

    fn addresses_of(&mut self, node: &Node, owner_at: u16) {
        for (records, each) in [(&node.a, 16), (&node.aaaa, 28)] {
            for record in records.chunks_exact(each) {
                if self.fits(each) {
                    let at = self.out.len();
                    self.out.extend_from_slice(record);
                    put_u16(self.out, at, 0xc000 | owner_at);
                    self.additional += 1;
                }
            }
        }
    }

    fn ptr(&mut self, target: &[u8], zone: &DnsName) {
        self.record(rtype::PTR, &[target, zone.wire()].concat());
    }

    fn soa(&mut self, serial: u32) {
        let pointer = self.zone_pointer().to_be_bytes();
        let mut data = [&b"\x02ns\x03dns"[..], &pointer, b"\x0ahostmaster", &pointer].concat();
        for number in [serial, 7200, 1800, 86_400, self.ttl] {
            data.extend_from_slice(&number.to_be_bytes());
        }
        self.raw(self.zone_pointer(), rtype::SOA, self.ttl.min(300), &data);
    }

    fn denial(mut self, code: u8, serial: u32) -> Said {
        self.begin(code);
        self.soa(serial);
        put_u16(self.out, 8, 1);
        Said::Answered
    }

    fn end(self) -> Said {
        put_u16(self.out, 6, self.answers);
        put_u16(self.out, 10, self.additional);
        Said::Answered
    }
}
