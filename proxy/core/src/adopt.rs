//! Adoption: a new planner over maps that an earlier one filled.
//!
//! The earlier one may have died between any two ops. What is reachable stays as it is until the first synced plan says otherwise;
//! what is unreachable is cleaned by that plan. Records say which service they belong to, so a table is checked, not trusted.

use kun_ebpf_abi::service::{Scope, ViewKind, state};

use crate::extent::Extent;
use crate::host_port::is_host_scope;
use crate::ops::Observed;
use crate::planner::{Limits, Planner};
use crate::port::{Held, HeldPort, Published, method};
use crate::service::{Frontend, Here, Members, PLANNED_VIEWS};
use crate::table::build;

impl Planner {
    /// Takes over what `observed` holds.
    pub fn adopt(here: Here, limits: Limits, observed: &Observed) -> Self {
        let mut planner = Planner::new(here, limits);
        for (key, value) in &observed.services {
            let Some(port) = planner.orphan(value.service) else {
                continue;
            };
            // A value that no version of us writes is replaced by the first plan: it equals no desired frontend.
            port.frontends.push(Frontend {
                key: *key,
                scope: scope(value.scope),
                internal: view(value.internal_view),
                external: view(value.external_view),
                affinity_secs: value.affinity_secs,
            });
            if is_host_scope(scope(value.scope)) {
                planner.host_orphans.insert(value.service);
            }
            planner.holders.insert(*key, value.service);
        }
        for (id, record) in &observed.backends {
            let index = *id as usize;
            if planner.generations.len() <= index {
                planner.generations.resize(index + 1, 0);
            }
            planner.generations[index] = record.generation;
            let lives = record.state == state::ACTIVE || record.state == state::DRAINING;
            if !lives
                || planner.orphan(record.service).is_none()
                || !planner.backend_ids.reserve(*id)
            {
                continue;
            }
            let port = planner.orphan(record.service).expect("made above");
            port.backends.push(Held {
                addr: record.addr,
                port: record.port,
                members: Members::NONE,
                local: record.local != 0,
                state: record.state,
                unexplained: false,
                id: *id,
                generation: record.generation,
            });
        }
        for id in planner.orphans.clone() {
            let port = planner.orphan(id).expect("made above");
            port.backends.sort_unstable_by_key(Held::key);
        }
        for ((id, number), view) in &observed.views {
            let Some(index) = PLANNED_VIEWS.iter().position(|k| *k as u32 == *number) else {
                continue;
            };
            if view.count == 0 && !planner.orphans.contains(id) {
                if *id < planner.limits.services {
                    planner.place(*id);
                    planner.epochs[*id as usize][index] = view.epoch;
                }
                continue;
            }
            if planner.orphan(*id).is_none() {
                continue;
            }
            planner.epochs[*id as usize][index] = view.epoch;
            let extent =
                Extent::of_view(view.base, view.count).filter(|e| planner.extents.reserve(*e));
            let slots = observed.slots.get(&(*id, *number));
            planner.adopt_view(*id, index, *view, extent, slots.map_or(&[], Vec::as_slice));
        }
        planner
    }

    /// Starts over from what `observed` holds, with the cluster as it was told so far: the way back after an op that failed.
    pub fn adopt_again(&mut self, observed: &Observed) {
        let fresh = Planner::adopt(self.here.clone(), self.limits, observed);
        let old = std::mem::replace(self, fresh);
        self.take_cluster(old);
    }

    /// The view is partial: what was adopted is not taken away for being in no manifest that can be read. To be called while
    /// everything adopted is still an orphan.
    pub(crate) fn hold_adopted(&mut self) {
        self.partial = true;
        for id in self.orphans.difference(&self.host_orphans) {
            let Some(port) = &mut self.ports[*id as usize] else {
                continue;
            };
            self.unexplained
                .extend(port.frontends.iter().map(|f| f.key));
            for held in &mut port.backends {
                held.unexplained = true;
            }
        }
    }

    /// The view is whole: what it does not explain goes with the next plan.
    pub(crate) fn let_go(&mut self) {
        self.partial = false;
        let frontends = std::mem::take(&mut self.unexplained);
        for port in self.ports.iter_mut().flatten() {
            let mut held = port.frontends.iter().any(|f| frontends.contains(&f.key));
            for backend in &mut port.backends {
                held |= std::mem::take(&mut backend.unexplained);
            }
            if let Some(key) = port.key.as_ref().filter(|_| held) {
                self.dirty.insert(key.service.clone());
            }
        }
    }

    fn adopt_view(
        &mut self,
        id: u32,
        index: usize,
        view: kun_ebpf_abi::service::View,
        extent: Option<Extent>,
        slots: &[u32],
    ) {
        let kind = PLANNED_VIEWS[index];
        let port = self.orphan(id).expect("made by the caller");
        let mut present: Vec<u32> = slots.to_vec();
        present.sort_unstable();
        for held in &mut port.backends {
            if present.binary_search(&held.id).is_ok() {
                held.members = held.members.with(kind);
            }
        }
        let external = port.frontends.iter().any(|f| f.scope == Scope::External);
        let built = build(method(kind, external), &port.entries(kind));
        port.views[index] = Published {
            view,
            extent,
            maglev: method(kind, external) == crate::Method::Maglev,
            stale: built != slots || (view.count > 0 && extent.is_none()),
        };
    }

    /// The port of service id `id`, made as an orphan when it is new; `None`: the id is beyond the map.
    fn orphan(&mut self, id: u32) -> Option<&mut HeldPort> {
        if id >= self.limits.services {
            return None;
        }
        self.place(id);
        if self.ports[id as usize].is_none() {
            self.service_ids.reserve(id);
            self.orphans.insert(id);
            self.ports[id as usize] = Some(HeldPort::empty());
        }
        self.ports[id as usize].as_mut()
    }
}

fn scope(number: u8) -> Scope {
    match number {
        1 => Scope::External,
        2 => Scope::NodePort,
        3 => Scope::HostPort,
        4 => Scope::HostLoopback,
        _ => Scope::Cluster,
    }
}

fn view(number: u8) -> ViewKind {
    match number {
        1 => ViewKind::Local,
        2 => ViewKind::Zone,
        _ => ViewKind::Cluster,
    }
}
