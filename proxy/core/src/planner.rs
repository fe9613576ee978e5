//! The incremental planner: collects deltas, and turns one changed Service after the other into ordered ops.
//!
//! Nothing but host ports is planned before `Synced`. While the view is partial (`Partial` until `Whole`), what was adopted and is in no readable
//! manifest stays: frontends, services, backends; what a manifest says is done all the same. Numbers taken out of use (service ids, backend ids, extents) wait for a grace period before
//! they are handed out again. Two Services that claim one frontend: the first by namespace and name has it, whatever came first.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use foldhash::fast::FixedState;
use kun_cluster_core::{Delta, EndpointSlice, Event, Kind, Node, Object, ObjectName, Service};
use kun_ebpf_abi::service::{Scope, ServiceKey, ViewKind};

use crate::extent::{Extent, Extents};
use crate::host_port::{self, HostPorts, is_attachment};
use crate::ids::Ids;
use crate::ops::Op;
use crate::port::HeldPort;
use crate::reconcile::Steps;
use crate::service::{
    DesiredPort, Frontend, Here, MAX_TARGETS, PLANNED_VIEWS, PortKey, desired, ip,
};

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
    /// Adopted frontends that are kept only because the view of the cluster is partial.
    pub held_frontends: usize,
    /// The same of backends.
    pub held_backends: usize,
}

/// Out of use, but a program may still be reading it.
#[derive(Debug, Default)]
pub(crate) struct Retired {
    pub(crate) services: Vec<u32>,
    pub(crate) backends: Vec<u32>,
    pub(crate) extents: Vec<Extent>,
}

impl Retired {
    fn is_empty(&self) -> bool {
        self.services.is_empty() && self.backends.is_empty() && self.extents.is_empty()
    }
}

/// Slices of one Service, ascending by name: one as a rule, a thousand at most (a slice holds a hundred endpoints).
type Slices = Vec<Arc<EndpointSlice>>;

/// The planner.
#[derive(Debug)]
pub struct Planner {
    pub(crate) here: Here,
    pub(crate) limits: Limits,
    pub(crate) services: HashMap<ObjectName, Arc<Service>, FixedState>,
    pub(crate) slices: HashMap<ObjectName, Slices, FixedState>,
    /// Every slice by its own name: the label that names its Service may change.
    slice: HashMap<ObjectName, Arc<EndpointSlice>, FixedState>,
    pub(crate) dirty: BTreeSet<ObjectName>,
    synced: bool,
    pub(crate) partial: bool,
    /// Adopted frontends that no Service has claimed yet; empty unless the view is partial.
    pub(crate) unexplained: HashSet<ServiceKey, FixedState>,
    pub(crate) ports: Vec<Option<HeldPort>>,
    pub(crate) ids_of: HashMap<ObjectName, Vec<u32>, FixedState>,
    pub(crate) holders: HashMap<ServiceKey, u32, FixedState>,
    /// Services that want a frontend which another one has.
    pub(crate) losers: BTreeMap<ServiceKey, BTreeSet<ObjectName>>,
    pub(crate) orphans: BTreeSet<u32>,
    /// Of these, the ones that lead to host ports: attachments explain them, and no manifest.
    pub(crate) host_orphans: BTreeSet<u32>,
    /// Host ports by attachment: as many as a node has pods.
    host_ports: BTreeMap<ObjectName, HostPorts>,
    /// Every attachment that was there at the start has been told.
    attachments_known: bool,
    /// Where host ports are.
    node_addresses: Vec<IpAddr>,
    pub(crate) service_ids: Ids,
    pub(crate) backend_ids: Ids,
    pub(crate) extents: Extents,
    /// Last generation of each backend id, dead or alive.
    pub(crate) generations: Vec<u32>,
    /// Last epoch of each view of each service id.
    pub(crate) epochs: Vec<[u16; PLANNED_VIEWS.len()]>,
    pub(crate) retired: Retired,
    problems: BTreeMap<ObjectName, Vec<Problem>>,
}

impl Planner {
    /// A planner over empty maps.
    pub fn new(here: Here, limits: Limits) -> Self {
        Self {
            here,
            limits,
            services: HashMap::default(),
            slices: HashMap::default(),
            slice: HashMap::default(),
            dirty: BTreeSet::new(),
            synced: false,
            partial: false,
            unexplained: HashSet::default(),
            ports: Vec::new(),
            ids_of: HashMap::default(),
            holders: HashMap::default(),
            losers: BTreeMap::new(),
            orphans: BTreeSet::new(),
            host_orphans: BTreeSet::new(),
            host_ports: BTreeMap::new(),
            attachments_known: false,
            node_addresses: Vec::new(),
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
            Event::Partial => self.hold_adopted(),
            Event::Synced => self.synced = true,
            Event::Whole => self.let_go(),
            // What was told before stays good. Which revision it is decides nothing here.
            Event::Trouble(_) | Event::Reached(..) => {}
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
                self.slice.insert(slice.meta.name.clone(), slice.clone());
                let slices = self.slices.entry(slice.service.clone()).or_default();
                let at = slices.partition_point(|s| s.meta.name < slice.meta.name);
                slices.insert(at, slice.clone());
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
        let Some(gone) = self.slice.remove(name) else {
            return;
        };
        if let Some(slices) = self.slices.get_mut(&gone.service) {
            if let Ok(at) = slices.binary_search_by(|s| s.meta.name.cmp(name)) {
                slices.remove(at);
            }
            if slices.is_empty() {
                self.slices.remove(&gone.service);
            }
        }
        self.dirty.insert(gone.service.clone());
    }

    fn on_node(&mut self, node: &Node) {
        if *node.meta.name.name == *self.here.node && node.zone() != self.here.zone.as_ref() {
            self.here.zone = node.zone().cloned();
        }
    }

    /// An attachment's host ports; `None`: it has none any more. The next steps plan them, or [`Planner::plan_attachment`].
    pub fn set_host_ports(&mut self, name: ObjectName, ports: Option<HostPorts>) {
        let before = match ports {
            Some(ports) => self.host_ports.insert(name.clone(), ports),
            None => self.host_ports.remove(&name),
        };
        if before.as_ref() != self.host_ports.get(&name) {
            self.dirty.insert(name);
        }
    }

    /// The node's addresses, where host ports are.
    pub fn set_node_addresses(&mut self, addresses: Vec<IpAddr>) {
        if self.node_addresses != addresses {
            self.node_addresses = addresses;
            self.dirty.extend(self.host_ports.keys().cloned());
        }
    }

    /// Every attachment that an earlier life served has been told by now: adopted host ports that none of them wants may go.
    pub fn attachments_known(&mut self) {
        self.attachments_known = true;
    }

    /// The ops of one attachment's host ports, out of turn: a pod's ADD waits for them. Each has to be applied before the next call.
    pub fn plan_attachment(&mut self, name: &ObjectName) -> Vec<Op> {
        if self.dirty.remove(name) {
            self.plan_service(name)
        } else {
            Vec::new()
        }
    }

    /// What keeps an attachment's host ports from being served as asked.
    pub fn problems_of<'a>(
        &'a self,
        name: &ObjectName,
    ) -> impl Iterator<Item = &'a Problem> + use<'a> {
        self.problems.get(name).into_iter().flatten()
    }

    /// Whether host ports wait to be planned, which they are without a synced view too.
    pub fn host_ports_wait(&self) -> bool {
        self.dirty.last().is_some_and(is_attachment)
            || (self.attachments_known && !self.host_orphans.is_empty())
    }

    /// The next name to plan: without a synced view an attachment's.
    fn next_dirty(&mut self) -> Option<ObjectName> {
        if self.synced {
            return self.dirty.pop_first();
        }
        let last = self
            .dirty
            .last()
            .filter(|name| is_attachment(name))?
            .clone();
        self.dirty.remove(&last);
        Some(last)
    }

    /// The next adopted service id that nobody wants.
    fn next_orphan(&mut self) -> Option<u32> {
        let id = if self.attachments_known && !self.host_orphans.is_empty() {
            *self.host_orphans.first()?
        } else if self.synced && !self.partial {
            *self.orphans.first()?
        } else {
            return None;
        };
        self.disown(id);
        Some(id)
    }

    /// The id is no orphan any more; false: it was none.
    pub(crate) fn disown(&mut self, id: u32) -> bool {
        self.host_orphans.remove(&id);
        self.orphans.remove(&id)
    }

    /// Whether the first snapshot is complete.
    pub fn synced(&self) -> bool {
        self.synced
    }

    /// The ops of one changed Service, in order; `None`: nothing to do. Every returned op has to be applied before the next call.
    ///
    /// After the last Service of a batch come, one step each: what was adopted and nobody wants, then one [`Op::Grace`].
    pub fn step(&mut self) -> Option<Vec<Op>> {
        while let Some(name) = self.next_dirty() {
            let ops = self.plan_service(&name);
            if !ops.is_empty() {
                return Some(ops);
            }
        }
        if let Some(id) = self.next_orphan() {
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
            held_frontends: self.unexplained.len(),
            held_backends: self.held_backends(),
        }
    }

    fn held_backends(&self) -> usize {
        if !self.partial {
            return 0;
        }
        let backends = self.ports.iter().flatten().flat_map(|p| &p.backends);
        backends.filter(|b| b.unexplained).count()
    }

    /// Whether manifests are missing from the view that an earlier life may have known.
    pub fn partial(&self) -> bool {
        self.partial
    }

    /// LoadBalancer addresses that are ours to announce, and whether this node has an endpoint for new flows to each. Those of
    /// another implementation's class are served and left to it.
    pub fn vips(&self) -> BTreeMap<IpAddr, bool> {
        let mut vips = BTreeMap::new();
        for port in self.ports.iter().flatten() {
            let service = port.key.as_ref().map(|k| self.services.get(&k.service));
            let class = match service {
                Some(Some(service)) => service.load_balancer_class.as_deref(),
                // Adopted and held: whoever announced it goes on.
                None if self.partial => None,
                Some(None) | None => continue,
            };
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
            _ if is_attachment(name) => self.host_ports.get(name).map_or_else(Vec::new, |ports| {
                host_port::desired(name, ports, &self.node_addresses)
            }),
            Some(service) => {
                let slices = self.slices.get(name);
                desired(
                    service,
                    slices.into_iter().flatten().map(Arc::as_ref),
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

    pub(crate) fn full(
        &mut self,
        name: &ObjectName,
        map: &'static str,
        option: &'static str,
        limit: u32,
    ) {
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
            // Adopted: whoever wants it first may have it; the order of names is kept when others come. An attachment waits
            // for what may be a Service's: that one is to be served without a gap.
            if !is_attachment(name) || self.host_orphans.contains(holder) {
                return true;
            }
            let adopted = ObjectName::new("", "a Service that was adopted");
            self.lose(name, frontend, adopted);
            return false;
        };
        match key.service.cmp(name) {
            std::cmp::Ordering::Equal => true,
            std::cmp::Ordering::Greater => {
                self.dirty.insert(key.service.clone());
                true
            }
            // Kept for nobody that is known.
            std::cmp::Ordering::Less if self.unexplained.contains(&frontend.key) => {
                self.dirty.insert(key.service.clone());
                true
            }
            std::cmp::Ordering::Less => {
                let holder = key.service.clone();
                self.lose(name, frontend, holder);
                false
            }
        }
    }

    fn lose(&mut self, name: &ObjectName, frontend: &Frontend, holder: ObjectName) {
        let problem = Problem::Taken {
            address: ip(frontend.key.addr),
            port: frontend.key.port.get(),
            holder,
        };
        self.losers
            .entry(frontend.key)
            .or_default()
            .insert(name.clone());
        self.problem(name, problem);
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
            if self.disown(id) {
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

    /// Takes the cluster from another planner, and plans all of it.
    pub(crate) fn take_cluster(&mut self, from: Planner) {
        self.dirty.extend(from.services.keys().cloned());
        self.services = from.services;
        self.slices = from.slices;
        self.slice = from.slice;
        self.dirty.extend(from.host_ports.keys().cloned());
        self.host_ports = from.host_ports;
        self.node_addresses = from.node_addresses;
        self.attachments_known = from.attachments_known;
        self.synced = from.synced;
        if from.partial {
            self.hold_adopted();
        }
    }

    /// The service id that a frontend leads to, with its key; `None` while nobody has it.
    pub fn holder(&self, key: &ServiceKey) -> Option<(u32, &PortKey)> {
        let id = *self.holders.get(key)?;
        let port = self.ports[id as usize].as_ref()?;
        Some((id, port.key.as_ref()?))
    }
}
