//! Manifests to objects: only the fields that kun reads, as tolerant as the API server is about what is absent, and strict about
//! what is wrong. Governing: the Kubernetes API types core/v1, discovery.k8s.io/v1; `kun.network/v1alpha1` is ours and refuses
//! unknown fields.

mod api;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

pub use api::{Reading, read_api};
use kun_config::Faults;
use kun_config::yaml::{Cursor, Fields, Node as Tree, Sink, documents, nearest};

use crate::crd::{self, Definition, How, Unknown};
use crate::interner::Interner;
use crate::service_address::ServiceAddress;
use crate::{
    Endpoint, EndpointPort, EndpointSlice, IpFamily, KUN_GROUP, KUN_VERSION, Meta, NICS_LEFT,
    Namespace, Node, Object, ObjectName, Origin, Pod, Protocol, Service, ServicePort, ServiceType,
    TrafficPolicy,
};

/// Session affinity without a timeout: three hours (core/v1 ClientIPConfig).
const AFFINITY_DEFAULT: u32 = 10_800;

/// What one file says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Objects in the order of the file.
    pub objects: Vec<Object>,
    /// Virtual addresses of services.
    pub addresses: Vec<ServiceAddress>,
    /// Objects of kinds that kun does not read.
    pub ignored: usize,
}

/// Who wrote what is read.
enum Writer {
    File(Arc<str>),
    Server,
}

struct Reader<'r> {
    writer: Writer,
    how: How,
    names: &'r mut Interner,
    manifest: Manifest,
}

/// Reads one manifest from memory: what the folder would make of a file of this name and text.
pub fn parse_manifest(file_name: &str, text: &str) -> Result<Manifest, Faults> {
    parse_with(&mut Interner::default(), file_name, text)
}

/// The same, sharing strings with what was read before.
pub fn parse_with(names: &mut Interner, file_name: &str, text: &str) -> Result<Manifest, Faults> {
    parse_how(How::FOLDER, names, file_name, text)
}

/// The same, with the statuses of kun's own kinds held to their schema as the API server holds whoever writes one.
pub fn parse_with_status(file_name: &str, text: &str) -> Result<Manifest, Faults> {
    parse_how(How::STATUS, &mut Interner::default(), file_name, text)
}

fn parse_how(
    how: How,
    names: &mut Interner,
    file_name: &str,
    text: &str,
) -> Result<Manifest, Faults> {
    let trees = documents(file_name, text).map_err(|fault| Faults(vec![fault]))?;
    let sink = Sink::new(file_name);
    let mut reader = Reader {
        writer: Writer::File(Arc::from(file_name)),
        how,
        names,
        manifest: Manifest::default(),
    };
    for tree in &trees {
        reader.document(tree, &sink);
    }
    let (faults, _) = sink.into_parts();
    if faults.0.is_empty() {
        Ok(reader.manifest)
    } else {
        Err(faults)
    }
}

/// How deep a `List` may hold `List`s; kubectl writes one level.
const MAX_LISTS: usize = 4;

impl Reader<'_> {
    /// Reads one document.
    fn document(&mut self, tree: &Tree<'_>, sink: &Sink<'_>) {
        self.object(Cursor::root(tree, sink), None, 0);
    }

    fn object(&mut self, c: Cursor<'_, '_>, kind_of_list: Option<&str>, lists: usize) {
        let line = c.at().line;
        let f = c.fields();
        let text = |name| f.get(name).and_then(|c| c.text().map(str::to_owned));
        let (api, kind) = (text("apiVersion"), text("kind"));
        let Some(kind) = kind.or_else(|| kind_of_list.map(str::to_owned)) else {
            c.fault(
                "the field `kind` is missing",
                "every document is a Kubernetes object with apiVersion and kind",
            );
            return;
        };
        let api = api.as_deref().unwrap_or("v1");
        let (group, version) = api.rsplit_once('/').unwrap_or(("", api));
        match (group, &*kind) {
            (_, list) if list.ends_with("List") => {
                if lists == MAX_LISTS {
                    c.fault(
                        format_args!("a List inside {MAX_LISTS} Lists"),
                        "write the objects themselves",
                    );
                    return;
                }
                let of = Some(list.trim_end_matches("List")).filter(|of| !of.is_empty());
                if let Some(items) = f.get("items") {
                    for item in items.elements() {
                        self.object(item, of, lists + 1);
                    }
                }
            }
            ("", "Service") => {
                let object = self.service(&f, line).map(|o| Object::Service(Arc::new(o)));
                self.manifest.objects.extend(object);
            }
            ("discovery.k8s.io", "EndpointSlice") => match self.slice(&f, line) {
                Some(slice) => self
                    .manifest
                    .objects
                    .push(Object::EndpointSlice(Arc::new(slice))),
                None => self.manifest.ignored += 1,
            },
            ("", "Node") => {
                let object = self.node(&f, line).map(|o| Object::Node(Arc::new(o)));
                self.manifest.objects.extend(object);
            }
            ("", "Pod") => {
                let object = self.pod(&f, line).map(|o| Object::Pod(Arc::new(o)));
                self.manifest.objects.extend(object);
            }
            ("", "Namespace") => {
                let object = self.meta(&f, line, false).map(|meta| Namespace { meta });
                self.manifest
                    .objects
                    .extend(object.map(|o| Object::Namespace(Arc::new(o))));
            }
            ("coordination.k8s.io", "Lease") => {
                let object = self.lease(&f, line).map(|o| Object::Lease(Arc::new(o)));
                self.manifest.objects.extend(object);
            }
            (KUN_GROUP, _) if version != KUN_VERSION => c.fault(
                format_args!("no version `{version}` of kun.network"),
                format_args!("write apiVersion: {}/{}", KUN_GROUP, KUN_VERSION),
            ),
            ("kun.network", "ServiceAddress") => {
                let meta = self.meta(&f, line, true);
                let address = meta.and_then(|meta| ServiceAddress::read(&f, meta));
                self.manifest.addresses.extend(address);
                finish(f);
            }
            (KUN_GROUP, other) => match crd::definition(other) {
                Some(definition) => {
                    let object = self.custom(f, line, definition);
                    self.manifest.objects.extend(object);
                }
                None => {
                    let kinds = crd::DEFINITIONS.iter().map(|d| d.resource.kind);
                    let kinds: Vec<&str> = kinds.chain(["ServiceAddress"]).collect();
                    let right = match nearest(other, &kinds) {
                        Some(kind) => format!("did you mean `{kind}`?"),
                        None => format!("known here: {}", kinds.join(", ")),
                    };
                    c.fault(
                        format_args!("no kind `{other}` in kun.network/v1alpha1"),
                        right,
                    );
                }
            },
            _ => self.manifest.ignored += 1,
        }
    }

    fn meta(&mut self, f: &Fields<'_, '_>, line: u32, namespaced: bool) -> Option<Meta> {
        let m = f
            .require("metadata", "every object has metadata with a name")?
            .fields();
        let name = m
            .require("name", "every object has a name")?
            .text()?
            .to_owned();
        if name.is_empty() || name.len() > 253 || name.contains('/') {
            m.cursor().fault(
                format_args!("`{name}` is not a name"),
                "write lower-case letters, digits, `-` and `.`",
            );
            return None;
        }
        let namespace = m.get("namespace").and_then(|c| c.text().map(str::to_owned));
        let namespace = match (namespaced, namespace) {
            (false, _) => String::new(),
            (true, None) => "default".to_owned(),
            (true, Some(namespace)) if namespace.is_empty() => "default".to_owned(),
            (true, Some(namespace)) => namespace,
        };
        let labels = self.strings(m.get("labels"), |_| true);
        let annotations = self.strings(m.get("annotations"), is_known_annotation);
        Some(Meta {
            name: ObjectName {
                namespace: self.names.get(&namespace),
                name: name.into(),
            },
            uid: m
                .get("uid")
                .and_then(|c| c.text())
                .unwrap_or_default()
                .into(),
            labels,
            annotations,
            origin: match &self.writer {
                Writer::File(path) => Origin::File {
                    path: Arc::clone(path),
                    line,
                },
                Writer::Server => Origin::Api {
                    resource_version: m
                        .get("resourceVersion")
                        .and_then(|c| c.text())
                        .unwrap_or_default()
                        .into(),
                },
            },
        })
    }

    fn strings(
        &mut self,
        field: Option<Cursor<'_, '_>>,
        keep: impl Fn(&str) -> bool,
    ) -> BTreeMap<Arc<str>, Arc<str>> {
        let Some(field) = field else {
            return BTreeMap::new();
        };
        let mut strings = BTreeMap::new();
        for (key, value) in field.pairs().filter(|(key, _)| keep(key)) {
            if let Some(value) = value.text() {
                strings.insert(self.names.get(key), self.names.get(value));
            }
        }
        strings
    }

    fn service(&mut self, f: &Fields<'_, '_>, line: u32) -> Option<Service> {
        let meta = self.meta(f, line, true)?;
        let spec = f.require("spec", "a Service has a spec")?.fields();
        let kind = spec.get("type").and_then(|c| {
            c.choice(&[
                ("ClusterIP", ServiceType::ClusterIp),
                ("NodePort", ServiceType::NodePort),
                ("LoadBalancer", ServiceType::LoadBalancer),
                ("ExternalName", ServiceType::ExternalName),
            ])
        });
        let mut cluster_ips: Vec<IpAddr> = Vec::new();
        if let Some(list) = spec.get("clusterIPs") {
            cluster_ips.extend(list.elements().filter_map(|c| cluster_ip(&c)));
        } else if let Some(c) = spec.get("clusterIP") {
            cluster_ips.extend(cluster_ip(&c));
        }
        let families = spec.get("ipFamilies").map(|list| {
            let family =
                |c: Cursor<'_, '_>| c.choice(&[("IPv4", IpFamily::V4), ("IPv6", IpFamily::V6)]);
            list.elements().filter_map(family).collect()
        });
        let affinity = spec
            .get("sessionAffinity")
            .and_then(|c| c.choice(&[("None", false), ("ClientIP", true)]));
        let ports = match spec.get("ports") {
            Some(list) => list
                .elements()
                .filter_map(|c| self.service_port(&c.fields()))
                .collect(),
            None => Vec::new(),
        };
        let policy = |name| {
            let choices = [
                ("Cluster", TrafficPolicy::Cluster),
                ("Local", TrafficPolicy::Local),
            ];
            spec.get(name)
                .and_then(|c: Cursor<'_, '_>| c.choice(&choices))
                .unwrap_or_default()
        };
        let (load_balancer_ips, load_balancer_named) = load_balancer(f);
        Some(Service {
            kind: kind.unwrap_or(ServiceType::ClusterIp),
            cluster_ips,
            families: families.unwrap_or_default(),
            load_balancer_ips,
            load_balancer_named,
            load_balancer_class: spec
                .get("loadBalancerClass")
                .and_then(|c| c.text())
                .map(Arc::from),
            external_name: spec
                .get("externalName")
                .and_then(|c| c.text())
                .filter(|t| !t.is_empty())
                .map(Arc::from),
            ports,
            affinity_secs: (affinity == Some(true)).then(|| affinity_timeout(&spec)),
            internal_policy: policy("internalTrafficPolicy"),
            external_policy: policy("externalTrafficPolicy"),
            publish_not_ready: flag(&spec, "publishNotReadyAddresses").unwrap_or(false),
            meta,
        })
    }

    fn service_port(&mut self, f: &Fields<'_, '_>) -> Option<ServicePort> {
        Some(ServicePort {
            name: self
                .names
                .get(f.get("name").and_then(|c| c.text()).unwrap_or_default()),
            protocol: protocol(f)?,
            port: port(&f.require("port", "a port has a number")?)?,
            node_port: f
                .get("nodePort")
                .filter(|c| c.text() != Some("0"))
                .and_then(|c| port(&c)),
        })
    }

    /// `None` without a fault: a slice of no service, or of host names.
    fn slice(&mut self, f: &Fields<'_, '_>, line: u32) -> Option<EndpointSlice> {
        let meta = self.meta(f, line, true)?;
        let service = Arc::clone(meta.labels.get("kubernetes.io/service-name")?);
        let v6 = f
            .require(
                "addressType",
                "an EndpointSlice has an addressType: IPv4 or IPv6",
            )?
            .choice(&[("IPv4", Some(false)), ("IPv6", Some(true)), ("FQDN", None)])??;
        let ports = f.get("ports").map(|list| {
            list.elements()
                .filter_map(|c| self.slice_port(&c.fields()))
                .collect()
        });
        let endpoints = f.get("endpoints").map(|list| {
            let endpoints = list
                .elements()
                .filter_map(|c| self.endpoint(&c.fields(), v6));
            endpoints.collect()
        });
        Some(EndpointSlice {
            service: ObjectName {
                namespace: Arc::clone(&meta.name.namespace),
                name: service,
            },
            ports: ports.unwrap_or_default(),
            endpoints: endpoints.unwrap_or_default(),
            meta,
        })
    }

    /// A port without a number means all ports, which no Service can use.
    fn slice_port(&mut self, f: &Fields<'_, '_>) -> Option<EndpointPort> {
        Some(EndpointPort {
            name: self
                .names
                .get(f.get("name").and_then(|c| c.text()).unwrap_or_default()),
            protocol: protocol(f)?,
            port: port(&f.get("port")?)?,
        })
    }

    fn endpoint(&mut self, f: &Fields<'_, '_>, v6: bool) -> Option<Endpoint> {
        let addresses = f.require("addresses", "an endpoint has one address")?;
        let Some(first) = addresses.elements().next() else {
            addresses.fault("an empty list", "an endpoint has one address");
            return None;
        };
        let address = first.ip()?;
        if address.is_ipv6() != v6 {
            first.fault(
                format_args!("{address} is of another family than addressType"),
                "a slice has one family",
            );
            return None;
        }
        let (ready, serving, terminating) = match f.get("conditions") {
            None => (None, None, None),
            Some(c) => {
                let c = c.fields();
                (
                    flag(&c, "ready"),
                    flag(&c, "serving"),
                    flag(&c, "terminating"),
                )
            }
        };
        let pod = f.get("targetRef").and_then(|c| {
            let t = c.fields();
            let text = |name| t.get(name).and_then(|c| c.text().map(str::to_owned));
            (text("kind").as_deref() == Some("Pod")).then_some(())?;
            Some(ObjectName {
                namespace: self
                    .names
                    .get(&text("namespace").unwrap_or_else(|| "default".to_owned())),
                name: text("name")?.into(),
            })
        });
        let mut name = |field| {
            f.get(field)
                .and_then(|c| c.text())
                .map(|t| self.names.get(t))
        };
        Some(Endpoint {
            address,
            ready: ready.unwrap_or(true),
            serving: serving.or(ready).unwrap_or(true),
            terminating: terminating.unwrap_or(false),
            node: name("nodeName"),
            zone: name("zone"),
            hostname: f.get("hostname").and_then(|c| c.text()).map(Arc::from),
            pod,
        })
    }

    /// A manifest without conditions is a node that somebody wrote down because it works.
    fn node(&mut self, f: &Fields<'_, '_>, line: u32) -> Option<Node> {
        let meta = self.meta(f, line, false)?;
        let (mut addresses, mut ready, mut nics_left) = (Vec::new(), true, None);
        if let Some(status) = f.get("status") {
            let status = status.fields();
            if let Some(list) = status.get("addresses") {
                for a in list.elements().map(Cursor::fields) {
                    if a.get("type").and_then(|c| c.text()) == Some("InternalIP") {
                        addresses.extend(a.get("address").and_then(|c| c.ip()));
                    }
                }
            }
            if let Some(list) = status.get("conditions") {
                for c in list.elements().map(Cursor::fields) {
                    let status = || c.get("status").and_then(|c| c.text());
                    match c.get("type").and_then(|c| c.text()) {
                        Some("Ready") => ready = status() == Some("True"),
                        Some(NICS_LEFT) => nics_left = status().map(|s| s == "True"),
                        _ => {}
                    }
                }
            }
        }
        Some(Node {
            meta,
            addresses,
            ready,
            nics_left,
        })
    }

    fn pod(&mut self, f: &Fields<'_, '_>, line: u32) -> Option<Pod> {
        let meta = self.meta(f, line, true)?;
        let mut pod = Pod {
            meta,
            node: None,
            ips: Vec::new(),
            hostname: None,
            subdomain: None,
            host_network: false,
            finished: false,
        };
        if let Some(spec) = f.get("spec") {
            let spec = spec.fields();
            let mut name = |field| {
                spec.get(field)
                    .and_then(|c| c.text())
                    .map(|t| self.names.get(t))
            };
            pod.node = name("nodeName");
            pod.hostname = name("hostname");
            pod.subdomain = name("subdomain");
            pod.host_network = flag(&spec, "hostNetwork").unwrap_or(false);
        }
        if let Some(status) = f.get("status") {
            let status = status.fields();
            if let Some(list) = status.get("podIPs") {
                let ip = |c: Cursor<'_, '_>| c.fields().get("ip").and_then(|c| c.ip());
                pod.ips = list.elements().filter_map(ip).collect();
            } else if let Some(c) = status.get("podIP") {
                pod.ips.extend(c.ip());
            }
            let phase = status.get("phase").and_then(|c| c.text());
            pod.finished = matches!(phase, Some("Succeeded" | "Failed"));
        }
        Some(pod)
    }

    fn custom(
        &mut self,
        f: Fields<'_, '_>,
        line: u32,
        definition: &'static Definition,
    ) -> Option<Object> {
        let meta = self.meta(&f, line, definition.resource.namespaced);
        let object = definition.read(&f, meta?, self.how);
        match self.how.unknown {
            Unknown::Refuse => finish(f).then_some(object?),
            Unknown::Ignore => object,
        }
    }
}

/// Our kinds have these fields at their top, and no others.
fn finish(f: Fields<'_, '_>) -> bool {
    f.get("apiVersion");
    f.get("kind");
    f.get("metadata");
    f.get("status");
    f.finish()
}

fn is_known_annotation(key: &str) -> bool {
    key.starts_with("kun.network/")
        || key.starts_with("service.kubernetes.io/")
        || (key.starts_with("kubernetes.io/") && key.ends_with("-bandwidth"))
}

/// `None` and the empty string are no address.
fn cluster_ip(c: &Cursor<'_, '_>) -> Option<IpAddr> {
    match c.text()? {
        "None" | "" => None,
        _ => c.ip(),
    }
}

/// Addresses of status.loadBalancer.ingress, and whether an entry has none.
fn load_balancer(f: &Fields<'_, '_>) -> (Vec<IpAddr>, bool) {
    let none = (Vec::new(), false);
    let Some(status) = f.get("status") else {
        return none;
    };
    let status = status.fields();
    let Some(balancer) = status.get("loadBalancer") else {
        return none;
    };
    let balancer = balancer.fields();
    let Some(list) = balancer.get("ingress") else {
        return none;
    };
    let ip = |c: Cursor<'_, '_>| c.fields().get("ip").and_then(|c| c.ip());
    let entries: Vec<Option<IpAddr>> = list.elements().map(ip).collect();
    let named = entries.contains(&None);
    (entries.into_iter().flatten().collect(), named)
}

fn affinity_timeout(spec: &Fields<'_, '_>) -> u32 {
    let Some(config) = spec.get("sessionAffinityConfig") else {
        return AFFINITY_DEFAULT;
    };
    let config = config.fields();
    let Some(client) = config.get("clientIP") else {
        return AFFINITY_DEFAULT;
    };
    let client = client.fields();
    // core/v1: 1 to 86400 seconds.
    let timeout = client
        .get("timeoutSeconds")
        .and_then(|c| c.count(1, 86_400));
    timeout.unwrap_or(AFFINITY_DEFAULT)
}

/// TCP where none is given; `None`: one that kun does not know, and no reason to call it TCP.
fn protocol(f: &Fields<'_, '_>) -> Option<Protocol> {
    let choices = [
        ("TCP", Protocol::Tcp),
        ("UDP", Protocol::Udp),
        ("SCTP", Protocol::Sctp),
    ];
    match f.get("protocol") {
        Some(c) => c.choice(&choices),
        None => Some(Protocol::Tcp),
    }
}

fn port(c: &Cursor<'_, '_>) -> Option<u16> {
    c.scalar("a port", "write a number from 1 to 65535", |t| {
        t.parse().ok().filter(|p| *p != 0)
    })
}

fn flag(f: &Fields<'_, '_>, name: &'static str) -> Option<bool> {
    f.get(name).and_then(|c| c.boolean())
}
