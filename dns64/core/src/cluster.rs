//! The part of the cluster that has names: collected from deltas, read when a [`Snapshot`](crate::Snapshot) is built.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kun_cluster_core::{
    Delta, EndpointSlice, Event, Kind, Namespace, Object, ObjectName, Pod, Service,
};

/// Services, EndpointSlices, Pods and Namespaces.
#[derive(Debug, Clone, Default)]
pub struct ClusterView {
    synced: bool,
    /// Grows with each change: the serial number of the zones.
    version: u32,
    pub(crate) services: BTreeMap<ObjectName, Arc<Service>>,
    pub(crate) slices: BTreeMap<ObjectName, Arc<EndpointSlice>>,
    pub(crate) pods: BTreeMap<ObjectName, Arc<Pod>>,
    pub(crate) namespaces: BTreeMap<ObjectName, Arc<Namespace>>,
}

impl ClusterView {
    /// An empty one that is to take this one's place: serial numbers go on growing.
    pub fn successor(&self) -> Self {
        Self {
            version: self.version,
            ..Self::default()
        }
    }

    /// Takes an event in; true if snapshots are to be built anew.
    pub fn apply(&mut self, event: &Event) -> bool {
        let changed = match event {
            Event::Synced => !std::mem::replace(&mut self.synced, true),
            Event::Trouble(_) | Event::Partial | Event::Whole | Event::Reached(..) => false,
            Event::Deltas(deltas) => deltas
                .iter()
                .fold(false, |changed, d| self.delta(d) | changed),
        };
        self.version = self.version.wrapping_add(changed.into());
        changed && self.synced
    }

    fn delta(&mut self, delta: &Delta) -> bool {
        match delta {
            Delta::Upsert(object) => {
                let name = object.meta().name.clone();
                match object {
                    Object::Service(o) => self.services.insert(name, o.clone()).as_ref() != Some(o),
                    Object::EndpointSlice(o) => {
                        self.slices.insert(name, o.clone()).as_ref() != Some(o)
                    }
                    Object::Pod(o) => self.pods.insert(name, o.clone()).as_ref() != Some(o),
                    Object::Namespace(o) => {
                        self.namespaces.insert(name, o.clone()).as_ref() != Some(o)
                    }
                    _ => false,
                }
            }
            Delta::Remove(Kind::Service, name) => self.services.remove(name).is_some(),
            Delta::Remove(Kind::EndpointSlice, name) => self.slices.remove(name).is_some(),
            Delta::Remove(Kind::Pod, name) => self.pods.remove(name).is_some(),
            Delta::Remove(Kind::Namespace, name) => self.namespaces.remove(name).is_some(),
            Delta::Remove(..) => false,
        }
    }

    /// Whether the first snapshot is complete.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// Grows with each change.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Namespaces that exist: a folder of manifests often holds none of the objects themselves.
    pub(crate) fn namespace_names(&self) -> BTreeSet<&str> {
        let named = self.namespaces.keys().map(|n| &*n.name);
        let used = self
            .services
            .keys()
            .chain(self.pods.keys())
            .map(|n| &*n.namespace);
        named.chain(used).collect()
    }
}
