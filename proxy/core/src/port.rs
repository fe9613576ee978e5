//! What the planner believes the dataplane holds for one service id.

use kun_ebpf_abi::service::{Backend as Record, View, ViewKind, state};
use kun_ebpf_abi::{Addr, Port};

use crate::extent::Extent;
use crate::service::{Frontend, Members, PLANNED_VIEWS, PortKey};
use crate::table::{Entry, Method, stable_hash};

/// One backend of a service port, 32 bytes: there may be a million.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) addr: Addr,
    pub(crate) port: Port,
    pub(crate) members: Members,
    pub(crate) local: bool,
    /// As the record says it.
    pub(crate) state: u8,
    /// Adopted, kept while the view of the cluster is partial, and named by no slice so far.
    pub(crate) unexplained: bool,
    pub(crate) id: u32,
    pub(crate) generation: u32,
}

impl Held {
    pub(crate) fn key(&self) -> (Addr, Port) {
        (self.addr, self.port)
    }

    pub(crate) fn record(&self, service: u32) -> Record {
        Record {
            addr: self.addr,
            port: self.port,
            state: self.state,
            local: u8::from(self.local),
            generation: self.generation,
            service,
            pad: 0,
        }
    }

    /// The record that ends every flow to it.
    pub(crate) fn dead(&self, service: u32) -> Record {
        Record {
            state: state::DEAD,
            generation: self.generation.wrapping_add(1),
            ..self.record(service)
        }
    }

    fn entry(&self) -> Entry {
        let mut bytes = [0; 18];
        bytes[..16].copy_from_slice(&self.addr.octets());
        bytes[16..].copy_from_slice(&self.port.get().to_be_bytes());
        Entry {
            id: self.id,
            hash: stable_hash(&bytes),
        }
    }
}

/// A published view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Published {
    pub(crate) view: View,
    pub(crate) extent: Option<Extent>,
    /// Built by [`Method::Maglev`].
    pub(crate) maglev: bool,
    /// Adopted in a shape that today's plan would not give it: publish anew at the first chance.
    pub(crate) stale: bool,
}

/// A service id in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HeldPort {
    /// `None`: adopted and not yet recognised.
    pub(crate) key: Option<PortKey>,
    pub(crate) frontends: Vec<Frontend>,
    /// Ascending by address and port.
    pub(crate) backends: Vec<Held>,
    pub(crate) views: [Published; PLANNED_VIEWS.len()],
}

impl HeldPort {
    pub(crate) fn empty() -> Self {
        Self {
            key: None,
            frontends: Vec::new(),
            backends: Vec::new(),
            views: [Published::default(); PLANNED_VIEWS.len()],
        }
    }

    /// What goes into the table of `view`: the same order on every node.
    pub(crate) fn entries(&self, view: ViewKind) -> Vec<Entry> {
        self.backends
            .iter()
            .filter(|b| b.members.has(view))
            .map(Held::entry)
            .collect()
    }
}

/// The table of a view: what comes from outside may meet another node next time.
pub(crate) fn method(view: ViewKind, external: bool) -> Method {
    match view {
        ViewKind::Local if external => Method::Maglev,
        _ => Method::Compact,
    }
}
