//! The maps in memory: an interpreter of ops that looks services up as the kernel programs do, and finds torn state.
//!
//! It is the oracle of the tests, and what `kunctl why` and other dataplanes may be compared with.

use std::collections::BTreeMap;

use kun_ebpf_abi::service::{Backend as Record, ServiceKey, View, ViewKind, state};

use crate::ops::{Backend, Observed, Op};

/// Maps in memory.
#[derive(Debug, Clone, Default)]
pub struct Model {
    held: Observed,
    /// Slots as written; index = slot.
    slots: BTreeMap<u32, u32>,
}

/// State that no reader may ever see.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Torn {
    /// A view points past what was written.
    #[error("view {view} of service {service}: slot {slot} was never written")]
    Unwritten {
        /// Service id.
        service: u32,
        /// View.
        view: u32,
        /// Slot.
        slot: u32,
    },
    /// A slot leads to another service's backend.
    #[error("view {view} of service {service}: backend {backend} belongs to service {owner}")]
    Foreign {
        /// Service id.
        service: u32,
        /// View.
        view: u32,
        /// Backend id.
        backend: u32,
        /// Its record's service.
        owner: u32,
    },
    /// A view with slots and none of them leads to a backend that takes flows.
    #[error("view {view} of service {service} has only dead backends")]
    AllDead {
        /// Service id.
        service: u32,
        /// View.
        view: u32,
    },
}

impl Model {
    /// What a client of `key` may get, with how many slots: the backends of the view that take new flows. `None`: no such frontend.
    pub fn lookup(
        &self,
        key: &ServiceKey,
        external: bool,
    ) -> Option<BTreeMap<u32, (Record, usize)>> {
        let value = self.held.services.get(key)?;
        let kind = if external {
            value.external_view
        } else {
            value.internal_view
        };
        Some(self.selectable(value.service, u32::from(kind)))
    }

    /// The backends of a view that take new flows, with their slots.
    pub fn selectable(&self, service: u32, view: u32) -> BTreeMap<u32, (Record, usize)> {
        let mut found: BTreeMap<u32, (Record, usize)> = BTreeMap::new();
        for id in self.table(service, view).into_iter().flatten() {
            match self.held.backends.get(&id) {
                Some(record) if record.state == state::ACTIVE => {
                    found.entry(id).or_insert((*record, 0)).1 += 1;
                }
                _ => {}
            }
        }
        found
    }

    fn table(&self, service: u32, view: u32) -> Vec<Option<u32>> {
        let published = self.view(service, view);
        (published.base..published.base + u32::from(published.count))
            .map(|slot| self.slots.get(&slot).copied())
            .collect()
    }

    fn view(&self, service: u32, view: u32) -> View {
        self.held
            .views
            .get(&(service, view))
            .copied()
            .unwrap_or_default()
    }

    /// A backend's record.
    pub fn backend(&self, id: u32) -> Option<&Record> {
        self.held.backends.get(&id)
    }

    /// All frontends.
    pub fn frontends(&self) -> impl Iterator<Item = &ServiceKey> {
        self.held.services.keys()
    }

    /// Everything that a reader could see now.
    pub fn check(&self) -> Result<(), Torn> {
        for (&(service, view), published) in &self.held.views {
            let mut alive = false;
            for (slot, id) in (published.base..).zip(self.table(service, view)) {
                let backend = id.ok_or(Torn::Unwritten {
                    service,
                    view,
                    slot,
                })?;
                let record = self.held.backends.get(&backend).ok_or(Torn::Unwritten {
                    service,
                    view,
                    slot,
                })?;
                if record.service != service {
                    return Err(Torn::Foreign {
                        service,
                        view,
                        backend,
                        owner: record.service,
                    });
                }
                alive |= record.state == state::ACTIVE;
            }
            let reachable = self.held.services.values().any(|v| {
                v.service == service && [v.internal_view, v.external_view].contains(&(view as u8))
            });
            if published.count > 0 && !alive && reachable {
                return Err(Torn::AllDead { service, view });
            }
        }
        Ok(())
    }

    /// The epoch that a view shows.
    pub fn epoch(&self, service: u32, view: ViewKind) -> u16 {
        self.view(service, view as u32).epoch
    }
}

impl Backend for Model {
    type Error = std::convert::Infallible;

    fn apply(&mut self, op: &Op) -> Result<(), Self::Error> {
        match op {
            Op::Backend { id, record } => {
                self.held.backends.insert(*id, *record);
            }
            Op::Slots { base, ids } => {
                self.slots.extend((*base..).zip(ids.iter().copied()));
            }
            Op::Publish {
                service,
                view,
                value,
            } => {
                self.held.views.insert((*service, *view as u32), *value);
            }
            Op::Frontend { key, value } => {
                self.held.services.insert(*key, *value);
            }
            Op::RemoveFrontend { key } => {
                self.held.services.remove(key);
            }
            Op::Grace => {}
        }
        Ok(())
    }

    fn observe(&mut self) -> Result<Observed, Self::Error> {
        let mut observed = self.held.clone();
        for (&(service, view), published) in &self.held.views {
            if published.count > 0 {
                let table = self.table(service, view).into_iter().flatten().collect();
                observed.slots.insert((service, view), table);
            }
        }
        Ok(observed)
    }
}
