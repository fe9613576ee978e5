//! The incremental planner: collects deltas, and turns one changed Service after the other into ordered ops.
//!
//! Nothing is planned before `Synced`. Numbers taken out of use (service ids, backend ids, extents) wait for a grace period before
//! they are handed out again. Two Services that claim one frontend: the first by namespace and name has it, whatever came first.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::FixedState;
use kun_cluster::{Delta, EndpointSlice, Event, Kind, Node, Object, ObjectName, Service};
use kun_ebpf_abi::service::{Scope, ServiceKey, ServiceValue, View, ViewKind};

use crate::extent::{Extent, Extents};
use crate::ids::Ids;
use crate::ops::Op;
use crate::port::{Held, HeldPort, Published, method};
use crate::service::{
    DesiredPort, Frontend, Here, MAX_TARGETS, PLANNED_VIEWS, PortKey, desired, ip,
};
use crate::table::{Method, build, size};

/// spec.loadBalancerClass of Services whose addresses kun gives and announces.
const OUR_CLASSES: &str = "kun.network/";

/// Room in the maps, as they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Service ids, and frontends.
    pub services: u32,
    /// Backend records.
    pub backends: u32,
    /// Slots.
    pub slots: u32,
}

/// Why a Service is not served as written. It is left out or cut short, never half served.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Problem {
    /// A map is full.
    #[error("no room in the {map} map (proxy.{option} is {limit})")]
    Full {
        /// Which map.
        map: &'static str,
        /// The option that sizes it.
        option: &'static str,
        /// Its value.
        limit: u32,
    },
    /// Another Service has the address and port.
    #[error("{address}:{port} is already {holder}'s")]
    Taken {
        /// Address.
        address: IpAddr,
        /// Port.
        port: u16,
        /// Who has it.
        holder: ObjectName,
    },
    /// More endpoints than a view can hold.
    #[error("{left_out} endpoints of port {port:?} are left out: more than {MAX_TARGETS}")]
    TooManyEndpoints {
        /// Port name.
        port: Arc<str>,
        /// How many.
        left_out: usize,
    },
}

/// Sizes for status and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Frontends programmed.
    pub frontends: usize,
    /// Service ids in use.
    pub services: u32,
    /// Backend records in use, those that wait for a grace period included.
    pub backends: u32,
    /// Slots in use, extents' rounding included.
    pub slots: u32,
    /// Services with a problem.
    pub problems: usize,
    /// Services that wait to be planned.
    pub waiting: usize,
}

/// Out of use, but a program may still be reading it.
#[derive(Debug, Default)]
struct Retired {
    services: Vec<u32>,
    backends: Vec<u32>,
    extents: Vec<Extent>,
}

impl Retired {
    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.backends.is_empty() && self.extents.is_empty()
    }
}

/// Slices of one Service, by name.
type Slices = BTreeMap<ObjectName, Arc<EndpointSlice>>;

/// The planner.
#[derive(Debug)]
pub struct Planner {
    pub(crate) here: Here,
    limits: Limits,
    pub(crate) services: HashMap<ObjectName, Arc<Service>, FixedState>,
    pub(crate) slices: HashMap<ObjectName, Slices, FixedState>,
    /// Which Service a slice was last seen under: its label may change.
    slice_owner: HashMap<ObjectName, ObjectName, FixedState>,
    dirty: BTreeSet<ObjectName>,
    synced: bool,
    pub(crate) ports: Vec<Option<HeldPort>>,
    pub(crate) ids_of: HashMap<ObjectName, Vec<u32>, FixedState>,
    pub(crate) holders: HashMap<ServiceKey, u32, FixedState>,
    /// Services that want a frontend which another one has.
    losers: BTreeMap<ServiceKey, BTreeSet<ObjectName>>,
    pub(crate) orphans: BTreeSet<u32>,
    pub(crate) service_ids: Ids,
    pub(crate) backend_ids: Ids,
    pub(crate) extents: Extents,
    /// Last generation of each backend id, dead or alive.
    pub(crate) generations: Vec<u32>,
    /// Last epoch of each view of each service id.
    pub(crate) epochs: Vec<[u16; PLANNED_VIEWS.len()]>,
    retired: Retired,
    problems: BTreeMap<ObjectName, Vec<Problem>>,
}

/// Ops of one step, by the place that they have in the order.
#[derive(Default)]
struct Steps {
    backends: Vec<Op>,
    slots: Vec<Op>,
    publish: Vec<Op>,
    frontends: Vec<Op>,
    remove_frontends: Vec<Op>,
    unpublish: Vec<Op>,
    kill: Vec<Op>,
}

impl Steps {
    fn ordered(self) -> Vec<Op> {
        let mut ops = self.backends;
        ops.extend(self.slots);
        ops.extend(self.publish);
        ops.extend(self.frontends);
        ops.extend(self.remove_frontends);
        ops.extend(self.unpublish);
        ops.extend(self.kill);
        ops
    }
}

impl Planner {
    /// A planner over empty maps.
    pub fn new(here: Here, limits: Limits) -> Self {
        Self {
            here,
            limits,
            services: HashMap::default(),
            slices: HashMap::default(),
            slice_owner: HashMap::default(),
            dirty: BTreeSet::new(),
            synced: false,
            ports: Vec::new(),
            ids_of: HashMap::default(),
            holders: HashMap::default(),
            losers: BTreeMap::new(),
            orphans: BTreeSet::new(),
            service_ids: Ids::new(limits.services),
            backend_ids: Ids::new(limits.backends),
            extents: Extents::new(limits.slots),
            generations: Vec::new(),
            epochs: Vec::new(),
            retired: Retired::default(),
            problems: BTreeMap::new(),
        }
    }

    /// Takes in what the source says. Cheap; the work is in [`Planner::step`].
    pub fn on_event(&mut self, event: &Event) {
        match event {
            Event::Deltas(deltas) => deltas.iter().for_each(|d| self.on_delta(d)),
            Event::Synced => self.synced = true,
            // What was told before stays good.
            Event::Trouble(_) => {}
        }
    }

    fn on_delta(&mut self, delta: &Delta) {
        match delta {
            Delta::Upsert(Object::Service(service)) => {
                let name = service.meta.name.clone();
                self.services.insert(name.clone(), service.clone());
                self.dirty.insert(name);
            }
            Delta::Upsert(Object::EndpointSlice(slice)) => {
                self.forget_slice(&slice.meta.name);
                self.slice_owner
                    .insert(slice.meta.name.clone(), slice.service.clone());
                self.slices
                    .entry(slice.service.clone())
                    .or_default()
                    .insert(slice.meta.name.clone(), slice.clone());
                self.dirty.insert(slice.service.clone());
            }
            Delta::Upsert(Object::Node(node)) => self.on_node(node),
            Delta::Remove(Kind::Service, name) => {
                self.services.remove(name);
                self.dirty.insert(name.clone());
            }
            Delta::Remove(Kind::EndpointSlice, name) => self.forget_slice(name),
            _ => {}
        }
    }

    fn forget_slice(&mut self, name: &ObjectName) {
        let Some(owner) = self.slice_owner.remove(name) else {
            return;
        };
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        self.dirty.insert(owner);
    }

    fn on_node(&mut self, node: &Node) {
        if *node.meta.name.name == *self.here.node && node.zone() != self.here.zone.as_ref() {
            self.here.zone = node.zone().cloned();
        }
    }

    /// Whether the first snapshot is complete.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// The ops of one changed Service, in order; `None`: nothing to do. Every returned op has to be applied before the next call.
    ///
    /// After the last Service of a batch come, one step each: what was adopted and nobody wants, then one [`Op::Grace`].
    pub fn step(&mut self) -> Option<Vec<Op>> {
        if !self.synced {
            return None;
        }
        while let Some(name) = self.dirty.pop_first() {
            let ops = self.plan_service(&name);
            if !ops.is_empty() {
                return Some(ops);
            }
        }
        if let Some(id) = self.orphans.pop_first() {
            let mut steps = Steps::default();
            self.remove_port(id, &mut steps);
            return Some(steps.ordered());
        }
        if self.retired.is_empty() {
            return None;
        }
        // The op is returned before anything that reuses these numbers can be, and ops are applied in order.
        let retired = std::mem::take(&mut self.retired);
        retired
            .services
            .into_iter()
            .for_each(|id| self.service_ids.give(id));
        retired
            .backends
            .into_iter()
            .for_each(|id| self.backend_ids.give(id));
        retired
            .extents
            .into_iter()
            .for_each(|e| self.extents.give(e));
        let short = self
            .problems
            .iter()
            .filter(|(_, problems)| problems.iter().any(|p| matches!(p, Problem::Full { .. })));
        self.dirty.extend(short.map(|(name, _)| name.clone()));
        Some(vec![Op::Grace])
    }

    /// Services that are not served as written, and why.
    pub fn problems(&self) -> impl Iterator<Item = (&ObjectName, &Problem)> {
        self.problems
            .iter()
            .flat_map(|(name, problems)| problems.iter().map(move |p| (name, p)))
    }

    /// Sizes.
    pub fn totals(&self) -> Totals {
        Totals {
            frontends: self.holders.len(),
            services: self.service_ids.used(),
            backends: self.backend_ids.used(),
            slots: self.extents.used(),
            problems: self.problems.len(),
            waiting: self.dirty.len(),
        }
    }

    /// LoadBalancer addresses that are ours to announce, and whether this node has an endpoint for new flows to each. Those of
    /// another implementation's class are served and left to it.
    pub fn vips(&self) -> BTreeMap<IpAddr, bool> {
        let mut vips = BTreeMap::new();
        for port in self.ports.iter().flatten() {
            let Some(service) = port
                .key
                .as_ref()
                .and_then(|k| self.services.get(&k.service))
            else {
                continue;
            };
            let class = service.load_balancer_class.as_deref();
            if class.is_some_and(|c| !c.starts_with(OUR_CLASSES)) {
                continue;
            }
            let here = port.views[ViewKind::Local as usize].view.count > 0;
            for frontend in &port.frontends {
                if frontend.scope == Scope::External {
                    *vips.entry(ip(frontend.key.addr)).or_insert(false) |= here;
                }
            }
        }
        vips
    }

    fn plan_service(&mut self, name: &ObjectName) -> Vec<Op> {
        self.problems.remove(name);
        for losers in self.losers.values_mut() {
            losers.remove(name);
        }
        self.losers.retain(|_, l| !l.is_empty());
        let wanted = match self.services.get(name) {
            Some(service) => {
                let slices = self.slices.get(name);
                desired(
                    service,
                    slices.into_iter().flat_map(|s| s.values().map(Arc::as_ref)),
                    &self.here,
                )
            }
            None => Vec::new(),
        };
        let mut steps = Steps::default();
        let mut old = self.ids_of.remove(name).unwrap_or_default();
        let mut new = Vec::with_capacity(wanted.len());
        for mut port in wanted {
            if port.left_out > 0 {
                let problem = Problem::TooManyEndpoints {
                    port: port.key.port.clone(),
                    left_out: port.left_out,
                };
                self.problem(name, problem);
            }
            port.frontends.retain(|frontend| self.claim(name, frontend));
            if port.frontends.is_empty() {
                continue;
            }
            match self.id_for(&port, &mut old) {
                Some(id) => {
                    self.reconcile(id, port, &mut steps);
                    new.push(id);
                }
                None => self.full(name, "services", "maxServices", self.limits.services),
            }
        }
        for id in old {
            self.remove_port(id, &mut steps);
        }
        if !new.is_empty() {
            self.ids_of.insert(name.clone(), new);
        }
        steps.ordered()
    }

    fn problem(&mut self, name: &ObjectName, problem: Problem) {
        let problems = self.problems.entry(name.clone()).or_default();
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }

    fn full(&mut self, name: &ObjectName, map: &'static str, option: &'static str, limit: u32) {
        self.problem(name, Problem::Full { map, option, limit });
    }

    /// Whether `name` may have the frontend. Taking it from a Service that comes later makes that one plan again.
    fn claim(&mut self, name: &ObjectName, frontend: &Frontend) -> bool {
        let Some(holder) = self.holders.get(&frontend.key) else {
            return true;
        };
        let Some(key) = self.ports[*holder as usize]
            .as_ref()
            .and_then(|p| p.key.as_ref())
        else {
            // Adopted: whoever wants it first may have it; the order of names is kept when others come.
            return true;
        };
        match key.service.cmp(name) {
            std::cmp::Ordering::Equal => true,
            std::cmp::Ordering::Greater => {
                self.dirty.insert(key.service.clone());
                true
            }
            std::cmp::Ordering::Less => {
                let problem = Problem::Taken {
                    address: ip(frontend.key.addr),
                    port: frontend.key.port.get(),
                    holder: key.service.clone(),
                };
                self.losers
                    .entry(frontend.key)
                    .or_default()
                    .insert(name.clone());
                self.problem(name, problem);
                false
            }
        }
    }

    /// The id that the port has, or one that leads from its frontends, or a fresh one.
    fn id_for(&mut self, port: &DesiredPort, old: &mut Vec<u32>) -> Option<u32> {
        let position = old.iter().position(|id| {
            self.ports[*id as usize]
                .as_ref()
                .and_then(|p| p.key.as_ref())
                == Some(&port.key)
        });
        if let Some(position) = position {
            return Some(old.swap_remove(position));
        }
        for frontend in &port.frontends {
            let Some(id) = self.holders.get(&frontend.key).copied() else {
                continue;
            };
            if self.orphans.remove(&id) {
                return Some(id);
            }
            // A renamed port keeps its id, and so its flows.
            if let Some(position) = old.iter().position(|o| *o == id) {
                return Some(old.swap_remove(position));
            }
        }
        let id = self.service_ids.take()?;
        self.place(id);
        self.ports[id as usize] = Some(HeldPort::empty());
        Some(id)
    }

    /// Makes room for service id `id`.
    pub(crate) fn place(&mut self, id: u32) {
        let needed = id as usize + 1;
        if self.ports.len() < needed {
            self.ports.resize_with(needed, || None);
            self.epochs.resize(needed, [0; PLANNED_VIEWS.len()]);
        }
    }

    fn reconcile(&mut self, id: u32, want: DesiredPort, steps: &mut Steps) {
        let mut port = self.ports[id as usize]
            .take()
            .expect("an id in use has a port");
        let name = want.key.service.clone();
        let dead = self.merge_backends(id, &mut port, &want, steps);
        let external = want.frontends.iter().any(|f| f.scope == Scope::External);
        let mut cut = false;
        for (index, kind) in PLANNED_VIEWS.into_iter().enumerate() {
            cut |= !self.publish(id, index, kind, external, &mut port, steps);
        }
        if cut {
            self.full(&name, "slots", "maxSlots", self.limits.slots);
        }
        self.merge_frontends(id, &mut port, &want, steps);
        for held in dead {
            self.kill(id, &held, steps);
        }
        port.key = Some(want.key);
        self.ports[id as usize] = Some(port);
    }

    /// Brings `port.backends` to `want.targets`; what is left over is returned, to be killed once no view holds it.
    fn merge_backends(
        &mut self,
        id: u32,
        port: &mut HeldPort,
        want: &DesiredPort,
        steps: &mut Steps,
    ) -> Vec<Held> {
        let mut dead = Vec::new();
        let mut held = std::mem::take(&mut port.backends).into_iter().peekable();
        let mut merged = Vec::with_capacity(want.targets.len());
        for target in &want.targets {
            let key = (target.addr, target.port);
            while let Some(gone) = held.next_if(|h| h.key() < key) {
                dead.push(gone);
            }
            if let Some(mut same) = held.next_if(|h| h.key() == key) {
                let before = same.record(id);
                if same.members != target.members {
                    for (view, kind) in port.views.iter_mut().zip(PLANNED_VIEWS) {
                        view.stale |= same.members.has(kind) != target.members.has(kind);
                    }
                    same.members = target.members;
                }
                same.local = target.local;
                same.state = target.state();
                let record = same.record(id);
                if record != before {
                    // To ACTIVE before the views change; to DRAINING after, like a death.
                    let place = if same.members == crate::Members::NONE {
                        &mut steps.kill
                    } else {
                        &mut steps.backends
                    };
                    place.push(Op::Backend {
                        id: same.id,
                        record,
                    });
                }
                merged.push(same);
                continue;
            }
            let Some(backend) = self.backend_ids.take() else {
                self.full(
                    &want.key.service,
                    "backends",
                    "maxBackends",
                    self.limits.backends,
                );
                continue;
            };
            let index = backend as usize;
            if self.generations.len() <= index {
                self.generations.resize(index + 1, 0);
            }
            self.generations[index] = self.generations[index].wrapping_add(1);
            let fresh = Held {
                addr: target.addr,
                port: target.port,
                members: target.members,
                local: target.local,
                state: target.state(),
                id: backend,
                generation: self.generations[index],
            };
            for (view, kind) in port.views.iter_mut().zip(PLANNED_VIEWS) {
                view.stale |= fresh.members.has(kind);
            }
            steps.backends.push(Op::Backend {
                id: backend,
                record: fresh.record(id),
            });
            merged.push(fresh);
        }
        dead.extend(held);
        for gone in &dead {
            for (view, kind) in port.views.iter_mut().zip(PLANNED_VIEWS) {
                view.stale |= gone.members.has(kind);
            }
        }
        port.backends = merged;
        dead
    }

    /// Publishes one view where its members or its method changed; `false`: no room for the slots, the old set stays.
    fn publish(
        &mut self,
        id: u32,
        index: usize,
        kind: ViewKind,
        external: bool,
        port: &mut HeldPort,
        steps: &mut Steps,
    ) -> bool {
        let method = method(kind, external);
        let held = port.views[index];
        let maglev = method == Method::Maglev;
        if !held.stale && (held.maglev == maglev || held.view.count == 0) {
            return true;
        }
        let entries = port.entries(kind);
        let count = size(method, entries.len());
        let extent = match count {
            0 => None,
            _ => match self.extents.take(count) {
                Some(extent) => Some(extent),
                None => return false,
            },
        };
        let epoch = &mut self.epochs[id as usize][index];
        *epoch = epoch.wrapping_add(1);
        let view = View {
            epoch: *epoch,
            count: count as u16,
            base: extent.map_or(0, |e| e.base),
        };
        if let Some(extent) = extent {
            steps.slots.push(Op::Slots {
                base: extent.base,
                ids: build(method, &entries),
            });
        }
        // A view runs empty only after frontends that leave it have left.
        let place = if count == 0 {
            &mut steps.unpublish
        } else {
            &mut steps.publish
        };
        place.push(Op::Publish {
            service: id,
            view: kind,
            value: view,
        });
        self.retired.extents.extend(held.extent);
        port.views[index] = Published {
            view,
            extent,
            maglev,
            stale: false,
        };
        true
    }

    fn merge_frontends(
        &mut self,
        id: u32,
        port: &mut HeldPort,
        want: &DesiredPort,
        steps: &mut Steps,
    ) {
        let mut full = false;
        let mut kept = Vec::with_capacity(want.frontends.len());
        for frontend in &want.frontends {
            let same =
                self.holders.get(&frontend.key) == Some(&id) && port.frontends.contains(frontend);
            if !same {
                if !self.holders.contains_key(&frontend.key)
                    && self.holders.len() >= self.limits.services as usize
                {
                    full = true;
                    continue;
                }
                steps.frontends.push(Op::Frontend {
                    key: frontend.key,
                    value: value(id, frontend),
                });
                self.holders.insert(frontend.key, id);
            }
            kept.push(*frontend);
        }
        let gone = std::mem::replace(&mut port.frontends, kept);
        for frontend in gone {
            if !want.frontends.iter().any(|w| w.key == frontend.key) {
                self.release(id, &frontend, steps);
            }
        }
        if full {
            let name = &want.key.service;
            self.full(name, "services", "maxServices", self.limits.services);
        }
    }

    /// Removes a frontend, unless another service id has it by now; whoever lost it before plans again.
    fn release(&mut self, id: u32, frontend: &Frontend, steps: &mut Steps) {
        if self.holders.get(&frontend.key) != Some(&id) {
            return;
        }
        self.holders.remove(&frontend.key);
        steps
            .remove_frontends
            .push(Op::RemoveFrontend { key: frontend.key });
        if let Some(losers) = self.losers.get(&frontend.key) {
            self.dirty.extend(losers.iter().cloned());
        }
    }

    fn remove_port(&mut self, id: u32, steps: &mut Steps) {
        let port = self.ports[id as usize]
            .take()
            .expect("an id in use has a port");
        for frontend in &port.frontends {
            self.release(id, frontend, steps);
        }
        for (index, kind) in PLANNED_VIEWS.into_iter().enumerate() {
            let held = port.views[index];
            if held.view.count > 0 {
                let epoch = &mut self.epochs[id as usize][index];
                *epoch = epoch.wrapping_add(1);
                steps.unpublish.push(Op::Publish {
                    service: id,
                    view: kind,
                    value: View {
                        epoch: *epoch,
                        count: 0,
                        base: 0,
                    },
                });
            }
            self.retired.extents.extend(held.extent);
        }
        for held in &port.backends {
            self.kill(id, held, steps);
        }
        self.retired.services.push(id);
    }

    fn kill(&mut self, service: u32, held: &Held, steps: &mut Steps) {
        let record = held.dead(service);
        self.generations[held.id as usize] = record.generation;
        steps.kill.push(Op::Backend {
            id: held.id,
            record,
        });
        self.retired.backends.push(held.id);
    }

    /// Sizes of the maps.
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// Takes the cluster from another planner, and plans all of it.
    pub(crate) fn take_cluster(&mut self, from: Planner) {
        self.dirty.extend(from.services.keys().cloned());
        self.services = from.services;
        self.slices = from.slices;
        self.slice_owner = from.slice_owner;
        self.synced = from.synced;
    }

    pub(crate) fn limit_services(&self) -> u32 {
        self.limits.services
    }

    /// The service id that a frontend leads to, with its key; `None` while nobody has it.
    pub fn holder(&self, key: &ServiceKey) -> Option<(u32, &PortKey)> {
        let id = *self.holders.get(key)?;
        let port = self.ports[id as usize].as_ref()?;
        Some((id, port.key.as_ref()?))
    }
}

fn value(service: u32, frontend: &Frontend) -> ServiceValue {
    ServiceValue {
        service,
        scope: frontend.scope as u8,
        internal_view: frontend.internal as u8,
        external_view: frontend.external as u8,
        pad: 0,
        affinity_secs: frontend.affinity_secs,
    }
}
