//! The cluster in memory: every object by kind and name, and the joins that consumers need. Applies deltas, decides nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::{
    BgpAdvertisement, BgpPeer, BgpRouteAffinity, BgpSession, BrakeOverride, Delta, EndpointSlice,
    IpPool, IpamBlock, Kind, KunService, Lease, Namespace, Node, Object, ObjectName, Pod, Service,
};

/// All objects. Bounded by the cluster itself.
#[derive(Debug, Clone, Default)]
pub struct Store {
    services: BTreeMap<ObjectName, Arc<Service>>,
    slices: HashMap<ObjectName, Arc<EndpointSlice>>,
    slices_of: HashMap<ObjectName, BTreeSet<ObjectName>>,
    nodes: BTreeMap<ObjectName, Arc<Node>>,
    pods: BTreeMap<ObjectName, Arc<Pod>>,
    /// Holders of an address, the latest last: while one pod ends and the next begins there may be two.
    pods_at: HashMap<IpAddr, Vec<ObjectName>>,
    namespaces: BTreeMap<ObjectName, Arc<Namespace>>,
    leases: BTreeMap<ObjectName, Arc<Lease>>,
    pools: BTreeMap<ObjectName, Arc<IpPool>>,
    blocks: BTreeMap<ObjectName, Arc<IpamBlock>>,
    peers: BTreeMap<ObjectName, Arc<BgpPeer>>,
    advertisements: BTreeMap<ObjectName, Arc<BgpAdvertisement>>,
    affinities: BTreeMap<ObjectName, Arc<BgpRouteAffinity>>,
    sessions: BTreeMap<ObjectName, Arc<BgpSession>>,
    kun_services: BTreeMap<ObjectName, Arc<KunService>>,
    overrides: BTreeMap<ObjectName, Arc<BrakeOverride>>,
}

impl Store {
    /// Empty.
    pub fn new() -> Self {
        Self::default()
    }

    /// Applies one change and returns what stood under its name before.
    pub fn apply(&mut self, delta: Delta) -> Option<Object> {
        match delta {
            Delta::Upsert(object) => self.upsert(object),
            Delta::Remove(kind, name) => self.remove(kind, &name),
        }
    }

    fn upsert(&mut self, object: Object) -> Option<Object> {
        let name = object.meta().name.clone();
        match object {
            Object::Service(o) => self.services.insert(name, o).map(Object::Service),
            Object::EndpointSlice(o) => {
                let service = o.service.clone();
                let before = self.slices.insert(name.clone(), o);
                if let Some(before) = &before
                    && before.service != service
                {
                    self.unlink_slice(&before.service, &name);
                }
                self.slices_of.entry(service).or_default().insert(name);
                before.map(Object::EndpointSlice)
            }
            Object::Node(o) => self.nodes.insert(name, o).map(Object::Node),
            Object::Pod(o) => {
                let ips = o.ips.clone();
                // Host-network pods share their node's addresses: those name no pod.
                let indexed = !o.host_network && !o.finished;
                let before = self.pods.insert(name.clone(), o);
                if let Some(before) = &before {
                    self.unlink_pod(before);
                }
                if indexed {
                    for ip in ips {
                        self.pods_at.entry(ip).or_default().push(name.clone());
                    }
                }
                before.map(Object::Pod)
            }
            Object::Namespace(o) => self.namespaces.insert(name, o).map(Object::Namespace),
            Object::Lease(o) => self.leases.insert(name, o).map(Object::Lease),
            Object::IpPool(o) => self.pools.insert(name, o).map(Object::IpPool),
            Object::IpamBlock(o) => self.blocks.insert(name, o).map(Object::IpamBlock),
            Object::BgpPeer(o) => self.peers.insert(name, o).map(Object::BgpPeer),
            Object::BgpAdvertisement(o) => self
                .advertisements
                .insert(name, o)
                .map(Object::BgpAdvertisement),
            Object::BgpRouteAffinity(o) => self
                .affinities
                .insert(name, o)
                .map(Object::BgpRouteAffinity),
            Object::BgpSession(o) => self.sessions.insert(name, o).map(Object::BgpSession),
            Object::KunService(o) => self.kun_services.insert(name, o).map(Object::KunService),
            Object::BrakeOverride(o) => self.overrides.insert(name, o).map(Object::BrakeOverride),
        }
    }

    fn remove(&mut self, kind: Kind, name: &ObjectName) -> Option<Object> {
        match kind {
            Kind::Service => self.services.remove(name).map(Object::Service),
            Kind::EndpointSlice => {
                let before = self.slices.remove(name)?;
                self.unlink_slice(&before.service, name);
                Some(Object::EndpointSlice(before))
            }
            Kind::Node => self.nodes.remove(name).map(Object::Node),
            Kind::Pod => {
                let before = self.pods.remove(name)?;
                self.unlink_pod(&before);
                Some(Object::Pod(before))
            }
            Kind::Namespace => self.namespaces.remove(name).map(Object::Namespace),
            Kind::Lease => self.leases.remove(name).map(Object::Lease),
            Kind::IpPool => self.pools.remove(name).map(Object::IpPool),
            Kind::IpamBlock => self.blocks.remove(name).map(Object::IpamBlock),
            Kind::BgpPeer => self.peers.remove(name).map(Object::BgpPeer),
            Kind::BgpAdvertisement => self
                .advertisements
                .remove(name)
                .map(Object::BgpAdvertisement),
            Kind::BgpRouteAffinity => self.affinities.remove(name).map(Object::BgpRouteAffinity),
            Kind::BgpSession => self.sessions.remove(name).map(Object::BgpSession),
            Kind::KunService => self.kun_services.remove(name).map(Object::KunService),
            Kind::BrakeOverride => self.overrides.remove(name).map(Object::BrakeOverride),
        }
    }

    fn unlink_slice(&mut self, service: &ObjectName, slice: &ObjectName) {
        if let Some(slices) = self.slices_of.get_mut(service) {
            slices.remove(slice);
            if slices.is_empty() {
                self.slices_of.remove(service);
            }
        }
    }

    fn unlink_pod(&mut self, pod: &Pod) {
        for ip in &pod.ips {
            if let Some(names) = self.pods_at.get_mut(ip) {
                names.retain(|name| *name != pod.meta.name);
                if names.is_empty() {
                    self.pods_at.remove(ip);
                }
            }
        }
    }

    /// Services by name.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// A service.
    pub fn service(&self, name: &ObjectName) -> Option<&Arc<Service>> {
        self.services.get(name)
    }

    /// All slices, in no order.
    pub fn slices(&self) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        self.slices.values()
    }

    /// A slice.
    pub fn slice(&self, name: &ObjectName) -> Option<&Arc<EndpointSlice>> {
        self.slices.get(name)
    }

    /// The slices of a service, by name, whether the service exists or not.
    pub fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &Arc<EndpointSlice>> {
        let names = self.slices_of.get(service).into_iter().flatten();
        names.filter_map(|name| self.slices.get(name))
    }

    /// Nodes by name.
    pub fn nodes(&self) -> impl Iterator<Item = &Arc<Node>> {
        self.nodes.values()
    }

    /// A node.
    pub fn node(&self, name: &str) -> Option<&Arc<Node>> {
        self.nodes.get(&ObjectName::new("", name))
    }

    /// Pods by name.
    pub fn pods(&self) -> impl Iterator<Item = &Arc<Pod>> {
        self.pods.values()
    }

    /// A pod.
    pub fn pod(&self, name: &ObjectName) -> Option<&Arc<Pod>> {
        self.pods.get(name)
    }

    /// The running pod that has an address of its own, the latest if there are two.
    pub fn pod_at(&self, address: IpAddr) -> Option<&Arc<Pod>> {
        self.pods.get(self.pods_at.get(&address)?.last()?)
    }

    /// Namespaces by name.
    pub fn namespaces(&self) -> impl Iterator<Item = &Arc<Namespace>> {
        self.namespaces.values()
    }

    /// A namespace.
    pub fn namespace(&self, name: &str) -> Option<&Arc<Namespace>> {
        self.namespaces.get(&ObjectName::new("", name))
    }

    /// Leases by name.
    pub fn leases(&self) -> impl Iterator<Item = &Arc<Lease>> {
        self.leases.values()
    }

    /// A lease.
    pub fn lease(&self, name: &ObjectName) -> Option<&Arc<Lease>> {
        self.leases.get(name)
    }

    /// Pools by name.
    pub fn pools(&self) -> impl Iterator<Item = &Arc<IpPool>> {
        self.pools.values()
    }

    /// Blocks by name.
    pub fn blocks(&self) -> impl Iterator<Item = &Arc<IpamBlock>> {
        self.blocks.values()
    }

    /// A block's object.
    pub fn block(&self, name: &ObjectName) -> Option<&Arc<IpamBlock>> {
        self.blocks.get(name)
    }

    /// The blocks of a node, by name.
    pub fn blocks_of(&self, node: &str) -> impl Iterator<Item = &Arc<IpamBlock>> {
        self.blocks.values().filter(move |b| **b.node() == *node)
    }

    /// BGP peers by name.
    pub fn peers(&self) -> impl Iterator<Item = &Arc<BgpPeer>> {
        self.peers.values()
    }

    /// Advertisements by name.
    pub fn advertisements(&self) -> impl Iterator<Item = &Arc<BgpAdvertisement>> {
        self.advertisements.values()
    }

    /// Route affinities by name.
    pub fn affinities(&self) -> impl Iterator<Item = &Arc<BgpRouteAffinity>> {
        self.affinities.values()
    }

    /// BGP sessions by name.
    pub fn sessions(&self) -> impl Iterator<Item = &Arc<BgpSession>> {
        self.sessions.values()
    }

    /// KunServices by name.
    pub fn kun_services(&self) -> impl Iterator<Item = &Arc<KunService>> {
        self.kun_services.values()
    }

    /// Overrides of the brakes by name.
    pub fn overrides(&self) -> impl Iterator<Item = &Arc<BrakeOverride>> {
        self.overrides.values()
    }

    /// How many objects of each kind.
    pub fn counts(&self) -> [(Kind, usize); 14] {
        [
            (Kind::Service, self.services.len()),
            (Kind::EndpointSlice, self.slices.len()),
            (Kind::Node, self.nodes.len()),
            (Kind::Pod, self.pods.len()),
            (Kind::Namespace, self.namespaces.len()),
            (Kind::Lease, self.leases.len()),
            (Kind::IpPool, self.pools.len()),
            (Kind::IpamBlock, self.blocks.len()),
            (Kind::BgpPeer, self.peers.len()),
            (Kind::BgpAdvertisement, self.advertisements.len()),
            (Kind::BgpRouteAffinity, self.affinities.len()),
            (Kind::BgpSession, self.sessions.len()),
            (Kind::KunService, self.kun_services.len()),
            (Kind::BrakeOverride, self.overrides.len()),
        ]
    }
}
