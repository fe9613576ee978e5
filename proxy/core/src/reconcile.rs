//! One service port brought to what is wanted: which ops, and in which of the places that make their order safe.

use kun_ebpf_abi::service::{Scope, ServiceValue, View, ViewKind};

use crate::ops::Op;
use crate::planner::Planner;
use crate::port::{Held, HeldPort, Published, method};
use crate::service::{DesiredPort, Frontend, PLANNED_VIEWS};
use crate::table::{Method, build, size};

/// Ops of one step, by the place that they have in the order.
#[derive(Default)]
pub(crate) struct Steps {
    backends: Vec<Op>,
    slots: Vec<Op>,
    publish: Vec<Op>,
    frontends: Vec<Op>,
    remove_frontends: Vec<Op>,
    unpublish: Vec<Op>,
    kill: Vec<Op>,
}

impl Steps {
    pub(crate) fn ordered(self) -> Vec<Op> {
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
    pub(crate) fn reconcile(&mut self, id: u32, want: DesiredPort, steps: &mut Steps) {
        let mut port = self.ports[id as usize]
            .take()
            .expect("an id in use has a port");
        let name = want.key.service.clone();
        let dead = self.merge_backends(id, &mut port, &want, steps);
        let stays = |f: &&Frontend| self.unexplained.contains(&f.key);
        let external = (want.frontends.iter())
            .chain(port.frontends.iter().filter(stays))
            .any(|f| f.scope == Scope::External);
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
                part(gone, &mut merged, &mut dead);
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
                same.unexplained = false;
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
                unexplained: false,
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
        held.for_each(|gone| part(gone, &mut merged, &mut dead));
        for gone in &dead {
            for (view, kind) in port.views.iter_mut().zip(PLANNED_VIEWS) {
                view.stale |= gone.members.has(kind);
            }
        }
        port.backends = merged;
        dead
    }

    /// Publishes one view where its members or its method changed; `false`: no room for the slots, the old table stays
    /// and leads to as many of the new members as it holds.
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
                None => {
                    // What is gone must leave all the same: its record will be another's. Each slot is one store.
                    if let Some(extent) = held.extent {
                        let ids = entries.iter().map(|e| e.id).cycle();
                        steps.slots.push(Op::Slots {
                            base: extent.base,
                            ids: ids.take(held.view.count.into()).collect(),
                        });
                    }
                    return false;
                }
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
            self.unexplained.remove(&frontend.key);
            kept.push(*frontend);
        }
        let gone = std::mem::replace(&mut port.frontends, kept);
        for frontend in gone {
            if want.frontends.iter().any(|w| w.key == frontend.key) {
                continue;
            }
            if self.unexplained.contains(&frontend.key) {
                port.frontends.push(frontend);
            } else {
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
        self.unexplained.remove(&frontend.key);
        steps
            .remove_frontends
            .push(Op::RemoveFrontend { key: frontend.key });
        if let Some(losers) = self.losers.get(&frontend.key) {
            self.dirty.extend(losers.iter().cloned());
        }
    }

    pub(crate) fn remove_port(&mut self, id: u32, steps: &mut Steps) {
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
}

/// Where a backend goes that is not wanted: with at most [`crate::MAX_TARGETS`] of either, both kinds fit one table.
fn part(gone: Held, kept: &mut Vec<Held>, dead: &mut Vec<Held>) {
    if gone.unexplained {
        kept.push(gone);
    } else {
        dead.push(gone);
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
