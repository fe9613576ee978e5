//! The objects, reduced to what is read.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::crd::{
    BgpAdvertisement, BgpPeer, BgpRouteAffinity, BgpSession, BrakeOverride, IpPool, IpamBlock,
    KunService,
};

/// namespace/name; cluster-scoped objects have an empty namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectName {
    /// Namespace.
    pub namespace: Arc<str>,
    /// Name.
    pub name: Arc<str>,
}

impl ObjectName {
    /// Of a namespaced object.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            f.write_str(&self.name)
        } else {
            write!(f, "{}/{}", self.namespace, self.name)
        }
    }
}

/// Where an object was read, for `kunctl why`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Origin {
    /// A manifest: file and 1-based line of the document.
    File {
        /// Path as configured.
        path: Arc<str>,
        /// Line.
        line: u32,
    },
    /// The API server.
    Api {
        /// metadata.resourceVersion.
        resource_version: Arc<str>,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::File { path, line } => write!(f, "{path}:{line}"),
            Origin::Api { resource_version } => write!(f, "resourceVersion {resource_version}"),
        }
    }
}

/// What every object has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// Name.
    pub name: ObjectName,
    /// metadata.uid, may be empty in manifests.
    pub uid: Arc<str>,
    /// metadata.labels.
    pub labels: BTreeMap<Arc<str>, Arc<str>>,
    /// metadata.annotations that kun knows (`kun.network/…`, `kubernetes.io/…-bandwidth`, `service.kubernetes.io/…`).
    pub annotations: BTreeMap<Arc<str>, Arc<str>>,
    /// Where it was read.
    pub origin: Origin,
}

/// Transport protocol of a service port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// 6
    Tcp,
    /// 17
    Udp,
    /// 132
    Sctp,
}

impl Protocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

/// spec.type of a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServiceType {
    /// ClusterIP; headless when no cluster IPs.
    ClusterIp,
    /// NodePort.
    NodePort,
    /// LoadBalancer.
    LoadBalancer,
    /// ExternalName.
    ExternalName,
}

/// An entry of spec.ipFamilies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "the families are their names")]
pub enum IpFamily {
    V4,
    V6,
}

impl IpFamily {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

/// internalTrafficPolicy, externalTrafficPolicy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TrafficPolicy {
    /// All endpoints.
    #[default]
    Cluster,
    /// Endpoints on this node only.
    Local,
}

/// A Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Name, labels, origin.
    pub meta: Meta,
    /// spec.type
    pub kind: ServiceType,
    /// spec.clusterIPs, `None` entries removed; empty: headless.
    pub cluster_ips: Vec<IpAddr>,
    /// spec.ipFamilies, in order; empty where the manifest leaves them to the cluster.
    pub families: Vec<IpFamily>,
    /// status.loadBalancer.ingress[].ip; in a folder, else what the ServiceAddress of its name says.
    pub load_balancer_ips: Vec<IpAddr>,
    /// status.loadBalancer.ingress has an entry without an address: the host name of another implementation's balancer.
    pub load_balancer_named: bool,
    /// spec.loadBalancerClass: whose business its address is; `None`: the default implementation's.
    pub load_balancer_class: Option<Arc<str>>,
    /// spec.externalName
    pub external_name: Option<Arc<str>>,
    /// spec.ports
    pub ports: Vec<ServicePort>,
    /// spec.sessionAffinity ClientIP: its timeout in seconds.
    pub affinity_secs: Option<u32>,
    /// spec.internalTrafficPolicy
    pub internal_policy: TrafficPolicy,
    /// spec.externalTrafficPolicy
    pub external_policy: TrafficPolicy,
    /// spec.publishNotReadyAddresses
    pub publish_not_ready: bool,
}

/// One port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, empty for the only port.
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port.
    pub port: u16,
    /// nodePort, where allocated.
    pub node_port: Option<u16>,
}

/// An EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointSlice {
    /// Name, labels, origin.
    pub meta: Meta,
    /// Label `kubernetes.io/service-name`.
    pub service: ObjectName,
    /// Its ports by name.
    pub ports: Vec<EndpointPort>,
    /// Its endpoints, addresses of one family (addressType).
    pub endpoints: Vec<Endpoint>,
}

/// One port of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointPort {
    /// Matches [`ServicePort::name`].
    pub name: Arc<str>,
    /// Protocol.
    pub protocol: Protocol,
    /// Port on the endpoint.
    pub port: u16,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// addresses[0]; the others are never used by Kubernetes (KEP-752).
    pub address: IpAddr,
    /// conditions.ready, absent = true.
    pub ready: bool,
    /// conditions.serving, absent = ready.
    pub serving: bool,
    /// conditions.terminating
    pub terminating: bool,
    /// nodeName
    pub node: Option<Arc<str>>,
    /// zone
    pub zone: Option<Arc<str>>,
    /// hostname
    pub hostname: Option<Arc<str>>,
    /// targetRef of kind Pod.
    pub pod: Option<ObjectName>,
}

/// A Node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Name, labels (`topology.kubernetes.io/zone`), origin.
    pub meta: Meta,
    /// status.addresses of type InternalIP.
    pub addresses: Vec<IpAddr>,
    /// Condition Ready.
    pub ready: bool,
    /// Condition [`NICS_LEFT`], as the node's agent wrote it last.
    pub nics_left: Option<bool>,
}

/// The type of the Node's condition that says whether interfaces of pods that are gone are still there.
pub const NICS_LEFT: &str = "kun.network/VirtualNICNotReclaimed";

impl Node {
    /// Its zone.
    pub fn zone(&self) -> Option<&Arc<str>> {
        self.meta.labels.get("topology.kubernetes.io/zone")
    }
}

/// A Pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Name, labels, annotations, origin.
    pub meta: Meta,
    /// spec.nodeName
    pub node: Option<Arc<str>>,
    /// status.podIPs
    pub ips: Vec<IpAddr>,
    /// spec.hostname, spec.subdomain
    pub hostname: Option<Arc<str>>,
    /// spec.subdomain
    pub subdomain: Option<Arc<str>>,
    /// spec.hostNetwork
    pub host_network: bool,
    /// status.phase is Succeeded or Failed.
    pub finished: bool,
}

impl Pod {
    /// The addresses that are its own: one that shares the node's network has none, and one that ended has given its own up.
    pub fn own_ips(&self) -> &[IpAddr] {
        match self.host_network || self.finished {
            true => &[],
            false => &self.ips,
        }
    }
}

/// A Namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Namespace {
    /// Name, labels, origin.
    pub meta: Meta,
}

/// A Lease (`coordination.k8s.io/v1`). Its times are the holder's clock: they are compared with each other, never with ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// Name, origin.
    pub meta: Meta,
    /// spec.holderIdentity
    pub holder: Option<Arc<str>>,
    /// spec.leaseDurationSeconds
    pub duration_secs: Option<u32>,
    /// spec.acquireTime, as written.
    pub acquire_time: Option<Arc<str>>,
    /// spec.renewTime, as written.
    pub renew_time: Option<Arc<str>>,
    /// spec.leaseTransitions
    pub transitions: u32,
}

/// Any object.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "each variant is the type of its name")]
pub enum Object {
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    Node(Arc<Node>),
    Pod(Arc<Pod>),
    Namespace(Arc<Namespace>),
    Lease(Arc<Lease>),
    IpPool(Arc<IpPool>),
    IpamBlock(Arc<IpamBlock>),
    BgpPeer(Arc<BgpPeer>),
    BgpAdvertisement(Arc<BgpAdvertisement>),
    BgpRouteAffinity(Arc<BgpRouteAffinity>),
    BgpSession(Arc<BgpSession>),
    KunService(Arc<KunService>),
    BrakeOverride(Arc<BrakeOverride>),
}

/// Kind of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[allow(missing_docs, reason = "each variant is the kind of its name")]
pub enum Kind {
    Service,
    EndpointSlice,
    Node,
    Pod,
    Namespace,
    Lease,
    IpPool,
    IpamBlock,
    BgpPeer,
    BgpAdvertisement,
    BgpRouteAffinity,
    BgpSession,
    KunService,
    BrakeOverride,
}

impl Object {
    /// Its metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Object::Service(o) => &o.meta,
            Object::EndpointSlice(o) => &o.meta,
            Object::Node(o) => &o.meta,
            Object::Pod(o) => &o.meta,
            Object::Namespace(o) => &o.meta,
            Object::Lease(o) => &o.meta,
            Object::IpPool(o) => &o.meta,
            Object::IpamBlock(o) => &o.meta,
            Object::BgpPeer(o) => &o.meta,
            Object::BgpAdvertisement(o) => &o.meta,
            Object::BgpRouteAffinity(o) => &o.meta,
            Object::BgpSession(o) => &o.meta,
            Object::KunService(o) => &o.meta,
            Object::BrakeOverride(o) => &o.meta,
        }
    }

    /// Kind and name, which identify it.
    pub fn key(&self) -> (Kind, ObjectName) {
        (self.kind(), self.meta().name.clone())
    }

    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Service(_) => Kind::Service,
            Object::EndpointSlice(_) => Kind::EndpointSlice,
            Object::Node(_) => Kind::Node,
            Object::Pod(_) => Kind::Pod,
            Object::Namespace(_) => Kind::Namespace,
            Object::Lease(_) => Kind::Lease,
            Object::IpPool(_) => Kind::IpPool,
            Object::IpamBlock(_) => Kind::IpamBlock,
            Object::BgpPeer(_) => Kind::BgpPeer,
            Object::BgpAdvertisement(_) => Kind::BgpAdvertisement,
            Object::BgpRouteAffinity(_) => Kind::BgpRouteAffinity,
            Object::BgpSession(_) => Kind::BgpSession,
            Object::KunService(_) => Kind::KunService,
            Object::BrakeOverride(_) => Kind::BrakeOverride,
        }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delta {
    /// New or changed.
    Upsert(Object),
    /// Gone.
    Remove(Kind, ObjectName),
}

/// Which revisions of a kind a view has been through. A `resourceVersion` that is a number may be compared with another of the same
/// kind and the same server's data (KEP-5504, "Comparable Resource Version"; conformance from Kubernetes 1.35 on).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reached {
    /// The list that the view began with. Since then every change has been told; what was before that list and after the one
    /// before it has not.
    pub since: u64,
    /// The last change, or that list: from here to `at` nothing was different.
    pub changed: u64,
    /// Everything up to here is told.
    pub at: u64,
}

/// What a source says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Changes that belong together, in order: apply all, then act once.
    Deltas(Vec<Delta>),
    /// Told before [`Event::Synced`]: some file has not been read right since the source began, so objects may be missing
    /// from the snapshot that nobody removed. State adopted from an earlier life may belong to them.
    Partial,
    /// The first snapshot is complete, as far as the files can be read.
    Synced,
    /// After [`Event::Partial`], once: every file is known by now.
    Whole,
    /// Of kinds whose revisions were asked for ([`crate::Wanted::revisions_of`]), from an API server: all that was told of the kind
    /// before this event is what the server had at this revision. `None`: nobody knows any more which revision it is, until the
    /// kind has been listed anew.
    Reached(Kind, Option<Reached>),
    /// The source has trouble, told once; what was told before stays good.
    Trouble(String),
}

/// The router ids and addresses of a node, for whoever needs one IPv4.
pub fn first_v4(addresses: &[IpAddr]) -> Option<Ipv4Addr> {
    addresses.iter().find_map(|a| match a {
        IpAddr::V4(a) => Some(*a),
        IpAddr::V6(_) => None,
    })
}
