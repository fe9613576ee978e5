//! The service proxy's core: cluster objects to a desired model, and from what a dataplane holds to ordered ops. Pure.
//!
//! ```text
//! Event ─→ Planner ─ desired() per changed Service ─→ diff against what is held ─→ Vec<Op> ─→ Backend::apply
//!              ↑ adopt(Observed) once at start
//! ```
//!
//! A change of one Service costs what that Service costs, at 100,000 Services as at ten. The planner's belief about the dataplane
//! is exact as long as every op it returned was applied; a shell whose `apply` fails drops the planner and adopts anew.

#![forbid(unsafe_code)]

mod adopt;
mod bandwidth;
mod extent;
mod host_port;
mod ids;
mod model;
mod ops;
mod planner;
mod port;
mod reconcile;
mod service;
mod table;
mod why;

pub use bandwidth::{Buckets, Full, LimitOp, PodLimits};
pub use extent::{Extent, Extents};
pub use host_port::{HostPort, HostPorts, host_port_name};
pub use model::{Model, Torn};
pub use ops::{Backend, Observed, Op};
pub use planner::{Limits, Planner, Problem, Totals};
pub use service::{
    DesiredPort, Family, Frontend, Here, MAX_TARGETS, Members, PLANNED_VIEWS, PortKey, Target,
    addr, desired, ip, served,
};
pub use table::{Entry, Method, build, size, stable_hash, weighted};
pub use why::{Question, Reason};
