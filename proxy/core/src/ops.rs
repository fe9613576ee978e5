//! What the planner asks of a dataplane, and what a dataplane tells about itself.
//!
//! The order of a plan is its safety: a backend's record before a slot that names it, slots before the view that publishes them,
//! the view before the frontend that leads to it; taking away goes the other way round. A dataplane applies ops one by one, in
//! order, and may die between any two of them.

use std::collections::BTreeMap;

use kun_ebpf_abi::service::{Backend as Record, ServiceKey, ServiceValue, View, ViewKind};

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// Writes a backend's record. A death is this op with the next generation and state DEAD.
    Backend {
        /// Index in `backends`.
        id: u32,
        /// The record.
        record: Record,
    },
    /// Fills an extent that no published view uses.
    Slots {
        /// First slot.
        base: u32,
        /// Backend ids.
        ids: Vec<u32>,
    },
    /// Publishes a backend set with one store.
    Publish {
        /// Service id.
        service: u32,
        /// Which of its views.
        view: ViewKind,
        /// What readers will see.
        value: View,
    },
    /// Adds or replaces a frontend.
    Frontend {
        /// Address, port, protocol.
        key: ServiceKey,
        /// The service it leads to.
        value: ServiceValue,
    },
    /// Removes a frontend.
    RemoveFrontend {
        /// Address, port, protocol.
        key: ServiceKey,
    },
    /// Waits until no reader can still see what earlier ops took out of use.
    Grace,
}

/// What a dataplane holds, read back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Observed {
    /// All frontends.
    pub services: BTreeMap<ServiceKey, ServiceValue>,
    /// All views that were ever published: service id and [`ViewKind`] as a number.
    pub views: BTreeMap<(u32, u32), View>,
    /// Contents of the slots of each view with a count above 0.
    pub slots: BTreeMap<(u32, u32), Vec<u32>>,
    /// All records that were ever written.
    pub backends: BTreeMap<u32, Record>,
}

/// A dataplane: eBPF maps, IPVS, or a model in memory.
pub trait Backend {
    /// Why an op could not be applied.
    type Error;

    /// Applies one op.
    fn apply(&mut self, op: &Op) -> Result<(), Self::Error>;

    /// Reads everything back, for adoption.
    fn observe(&mut self) -> Result<Observed, Self::Error>;
}

impl Op {
    /// Whether the op can take something away from a client: used by logs and, later, the brake.
    pub fn withdraws(&self) -> bool {
        match self {
            Op::RemoveFrontend { .. } => true,
            Op::Publish { value, .. } => value.count == 0,
            _ => false,
        }
    }
}
