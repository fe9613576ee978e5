//! The cluster in memory: every object by kind and name, and the joins that consumers need. Applies deltas, decides nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use crate::{
    Delta, EndpointSlice, IpPool, IpamBlock, Kind, Lease, Namespace, Node, Object, ObjectName, Pod,
    Service,
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

    /// How many objects of each kind.
    pub fn counts(&self) -> [(Kind, usize); 8] {
        [
            (Kind::Service, self.services.len()),
            (Kind::EndpointSlice, self.slices.len()),
            (Kind::Node, self.nodes.len()),
            (Kind::Pod, self.pods.len()),
            (Kind::Namespace, self.namespaces.len()),
            (Kind::Lease, self.leases.len()),
            (Kind::IpPool, self.pools.len()),
            (Kind::IpamBlock, self.blocks.len()),
        ]
    }
}
